# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Evaluates a saved model with LAION's CLIP_benchmark.

    python -m modeling_mlip.evaluation.clip_benchmark eval --model_type mlip --model FOLDER --pretrained 0.5 \\
        --dataset cifar10 --task zeroshot_classification --output result.json

`--model` is a folder or a Hub id. `--pretrained` is a merge ratio, or `saved` for the saved ratio. All other flags are
those of CLIP_benchmark (https://github.com/LAION-AI/CLIP_benchmark), which `pip install clip-benchmark` installs.
"""

from collections.abc import Callable

import torch
from transformers import AutoModel

from modeling_mlip import MLIPModel
from modeling_mlip.data.collators import tokenize
from modeling_mlip.data.images import image_transform
from modeling_mlip.hub.loading import load_processor


class ClipBenchmarkModel(torch.nn.Module):
    """An `MLIPModel` with the two methods that CLIP_benchmark calls; CLIP_benchmark normalises the embeddings."""

    def __init__(self, model: MLIPModel):
        super().__init__()
        self.model = model

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        """Embeddings `(B, P)` of `images` `(B, 3, H, W)`."""
        return self.model.get_image_features(images).pooler_output

    def encode_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(T, P)` of `input_ids` `(T, L)`."""
        return self.model.get_text_features(input_ids).pooler_output


def load_mlip(
    model_name: str, pretrained: str = "saved", cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[ClipBenchmarkModel, Callable, Callable[[list[str]], torch.Tensor]]:
    """Loads a model for CLIP_benchmark.

    Args:
        model_name: a folder or a Hub id.
        pretrained: the merge ratio to evaluate at, or `"saved"`.
        cache_dir: folder for downloads.
        device: device of the model.

    Returns:
        the model, a transform of one PIL image to `(3, height, width)`, and a tokenizer of texts to ids `(T, L)`.

    Raises:
        ValueError: if `pretrained` is neither `"saved"` nor a merge ratio, or the folder holds another kind of model.
    """
    model = AutoModel.from_pretrained(model_name, cache_dir=cache_dir).eval()
    if not isinstance(model, MLIPModel):
        raise ValueError(
            f"{model_name} holds a {type(model).__name__}, not an MLIPModel; convert it with 'mlip convert'."
        )
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

    return ClipBenchmarkModel(model).to(device), image_transform(processor.image_processor), tokenizer


def main() -> None:
    """Adds the model type `mlip` to CLIP_benchmark and runs its command."""
    from clip_benchmark import cli, models

    models.TYPE2FUNC["mlip"] = load_mlip
    models.MODEL_TYPES.append("mlip")
    cli.main()


if __name__ == "__main__":
    main()
