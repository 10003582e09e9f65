# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Training on a long and a short caption of each image (Long-CLIP, Zhang et al. 2024, arXiv 2403.15378, section 3.3).

The losses of the model compare the long captions with the image embeddings. The part of this file compares the short
captions with the principal components of the image embeddings: a short caption names few of the things in an image, so
it must not be as close to the whole embedding as the long one.
"""

from typing import Any

import torch
from torch import nn

from modeling_mlip.losses import caption_keys, instance_loss, positive_pairs, positive_targets, sigmoid_loss

from .objective import ObjectivePart

NUM_COMPONENTS = 32


def principal_components(embeds: torch.Tensor, num_components: int = NUM_COMPONENTS) -> torch.Tensor:
    """The first principal components of a batch, those with the largest variance, without gradient.

    The derivative of a component is infinite where two components have equal variance, so it is left out.

    Args:
        embeds: `(C, P)` in float32 or float64.
        num_components: K at most. C embeddings have C - 1 components, so a smaller batch keeps everything: the result
            is the identity.

    Returns:
        `(P, K)`, orthonormal columns. Columns without variance, such as those of equal embeddings, are zero.

    Source: https://github.com/beichenzbc/Long-CLIP/blob/3966af9ae9331666309a22128468b734db4672a7/model/model_longclip.py#L389
    """
    C, P = embeds.shape
    if min(C - 1, P) <= num_components:
        return torch.eye(P, dtype=embeds.dtype, device=embeds.device)
    with torch.no_grad():
        centred = embeds - embeds.mean(dim=0)
        variances, directions = torch.linalg.eigh(centred.t() @ centred)  # (P,) ascending, (P, P)
        has_variance = variances > P * torch.finfo(embeds.dtype).eps * variances[-1]
        return (directions * has_variance)[:, -num_components:]


def rebuild_from_components(embeds: torch.Tensor, mean: torch.Tensor, components: torch.Tensor) -> torch.Tensor:
    """`(R, P)`: embeddings `(R, P)` without what lies outside the components `(P, K)` around the mean `(P,)`."""
    return mean + (embeds - mean) @ components @ components.t()  # (R, P) @ (P, K) @ (K, P)


class ShortCaptionLoss(ObjectivePart):
    """The model's instance loss between short captions and the principal components of the image embeddings.

    The batch holds `short_input_ids` and `short_attention_mask` `(R, L)`, as `PairCollator` makes them of items with
    long captions. They take a second pass through the text tower.

    Args:
        weight: factor of the loss; Long-CLIP adds both losses with weight 1.
        num_components: number of principal components; 32 in Long-CLIP.
    """

    name = "short_caption"
    input_names = ("short_input_ids", "short_attention_mask")

    def __init__(self, weight: float = 1.0, num_components: int = NUM_COMPONENTS):
        super().__init__(weight)
        self.num_components = num_components

    def rows(self, model: nn.Module, outputs: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        input_ids, attention_mask = inputs["short_input_ids"], inputs["short_attention_mask"]
        keys = [caption_keys(input_ids, attention_mask.bool())]
        if outputs.pairs.image_keys is not None:
            keys.append(outputs.pairs.image_keys)
        return {
            "images": outputs.pairs.image_embeds,
            "texts": model(input_ids=input_ids, attention_mask=attention_mask).text_embeds,
            "keys": keys,
        }

    def forward(self, model: Any, rows: dict[str, Any], columns: dict[str, Any]) -> dict[str, torch.Tensor]:
        # Step (1): the images of the batch, and of this process, in principal components
        dtype = torch.promote_types(rows["images"].dtype, torch.float32)
        all_images, all_texts, texts = (
            tensor.to(dtype) for tensor in (columns["images"], columns["texts"], rows["texts"])
        )
        mean, components = all_images.mean(dim=0), principal_components(all_images, self.num_components)
        images = rebuild_from_components(rows["images"].to(dtype), mean, components)
        # Step (2): the loss of the model's configuration
        if model.config.instance_loss == "sigmoid":
            positives = positive_pairs(rows["keys"], columns["keys"])
            loss = sigmoid_loss(images, all_texts, model.logit_scale, model.logit_bias, positives)
        else:
            all_images = rebuild_from_components(all_images, mean, components)
            targets = positive_targets(rows["keys"], columns["keys"])
            loss = instance_loss(images, texts, model.logit_scale, targets, all_images, all_texts)
        return {"short_caption_loss": loss}
