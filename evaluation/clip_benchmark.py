# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A saved folder as LAION's CLIP_benchmark takes models: `model, transform, tokenizer`.

    python -m modeling_mlip.evaluation.clip_benchmark eval --model_type mlip --model FOLDER --pretrained 0.5 \\
        --dataset cifar10 --task zeroshot_classification --output result.json

`--model` is a folder or a Hub id, `--pretrained` a merge ratio, or `saved` for the one that was saved. All other flags
are CLIP_benchmark's (https://github.com/LAION-AI/CLIP_benchmark), which `pip install clip-benchmark` installs.
"""

from collections.abc import Callable

import torch
from transformers import AutoModel

from modeling_mlip import MLIPModel
from modeling_mlip.data.collators import tokenize
from modeling_mlip.data.items import image_transform
from modeling_mlip.hub.loading import load_processor


class Encoder(torch.nn.Module):
    """What CLIP_benchmark calls: `encode_image` and `encode_text`, to embeddings `(B, P)` that it normalises."""

    def __init__(self, model: MLIPModel):
        super().__init__()
        self.model = model

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(images).pooler_output

    def encode_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(input_ids).pooler_output


def load_mlip(
    model_name: str, pretrained: str = "saved", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[Encoder, Callable, Callable[[list[str]], torch.Tensor]]:
    """Loads a model for CLIP_benchmark.

    Args:
        model_name: a folder or a Hub id.
        pretrained: the merge ratio to evaluate at, or `"saved"`.
        cache_dir: where downloads go.
        device: where the model goes.

    Returns:
        the model, a transform of one PIL image to `(3, height, width)`, and a tokenizer of texts to ids `(T, L)`.

    Raises:
        ValueError: if `pretrained` is neither `"saved"` nor a merge ratio, or the folder holds another model.
    """
    model = AutoModel.from_pretrained(model_name, cache_dir=cache_dir).eval()
    if not isinstance(model, MLIPModel):
        raise ValueError(f"{model_name} holds a {type(model).__name__}, not an MLIPModel; `mlip convert` makes one.")
    if pretrained != "saved":
        try:
            ratio = float(pretrained)
        except ValueError:
            raise ValueError(f"pretrained={pretrained!r}: give a merge ratio such as 0.5, or 'saved'.") from None
        model.set_merge_ratio(ratio)
    processor = load_processor(model_name, cache_dir=cache_dir)
    length = model.config.text_config.max_position_embeddings

    def tokenizer(texts: list[str]) -> torch.Tensor:
        input_ids, _, _ = tokenize(processor.tokenizer, texts, length)
        return input_ids

    return Encoder(model).to(device), image_transform(processor.image_processor), tokenizer


def main() -> None:
    from clip_benchmark import cli, models

    models.TYPE2FUNC["mlip"] = load_mlip
    models.MODEL_TYPES.append("mlip")
    cli.main()


if __name__ == "__main__":
    main()
