# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip export MODEL --to onnx --output_dir FOLDER`: both towers as ONNX files, compared with the model.

    mlip export runs/mine --to onnx --output_dir onnx
    mlip export runs/mine --to onnx --merge_ratio 0 --output_dir onnx-unmerged

It writes image_encoder.onnx (pixel_values -> image_embeds), text_encoder.onnx (input_ids, attention_mask ->
text_embeds) and the files of the processor. Both take any batch size. The merge ratio is part of the image encoder.
Captions are padded to the context length of the model.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from modeling_mlip import MLIPModel
from modeling_mlip.hub.atomic_files import check_target, new_folder
from modeling_mlip.hub.extras import require_modules
from modeling_mlip.hub.flag_help import FlagHelpFormatter
from modeling_mlip.hub.loading import load_pretrained, load_processor

IMAGE_FILE, TEXT_FILE = "image_encoder.onnx", "text_encoder.onnx"
# Largest difference to the model, as a fraction of the length of an embedding.
TOLERANCE = 1e-4
BATCH_SIZES = (2, 3)  # of the example for the export, and of the example for the comparison


class ImageEncoder(nn.Module):
    """`(B, 3, H, W)` pixel values to `(B, P)` embeddings, not normalised."""

    def __init__(self, model: MLIPModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values).pooler_output


class TextEncoder(nn.Module):
    """`(B, L)` token ids and attention mask to `(B, P)` embeddings, not normalised."""

    def __init__(self, model: MLIPModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model.get_text_features(input_ids, attention_mask).pooler_output


def example_images(model: MLIPModel, batch_size: int) -> dict[str, Tensor]:
    """Normal pixel values."""
    size, channels = model.config.vision_config.image_size, model.config.vision_config.num_channels
    generator = torch.Generator().manual_seed(batch_size)
    return {"pixel_values": torch.randn(batch_size, channels, size, size, generator=generator)}


def example_captions(model: MLIPModel, batch_size: int) -> dict[str, Tensor]:
    """Captions of random tokens and different lengths, padded to the context length."""
    config = model.config.text_config
    length = config.max_position_embeddings
    generator = torch.Generator().manual_seed(batch_size)
    input_ids = torch.randint(0, config.vocab_size, (batch_size, length), generator=generator)
    input_ids[input_ids == config.eos_token_id] = 0
    ends = torch.randint(length // 2, length, (batch_size,), generator=generator)
    attention_mask = (torch.arange(length) <= ends[:, None]).long()
    input_ids[torch.arange(length) >= ends[:, None]] = config.eos_token_id
    return {"input_ids": input_ids, "attention_mask": attention_mask}


@torch.inference_mode()
def export_encoder(encoder: nn.Module, examples: list[dict[str, Tensor]], output_name: str, path: Path) -> float:
    """Writes an encoder as an ONNX file with a dynamic batch, and compares it with the encoder.

    Args:
        examples: the first one is for the export, the second one, with another batch size, for the comparison.

    Returns:
        The largest difference of an element, as a fraction of the length of its embedding.

    Raises:
        ValueError: if the difference exceeds `TOLERANCE`.
    """
    import onnxruntime

    first, second = examples
    encoder.eval()
    torch.onnx.export(
        encoder,
        (),
        path,
        kwargs=first,
        output_names=[output_name],
        dynamic_shapes={name: {0: torch.export.Dim("batch")} for name in first},
        dynamo=True,
        verbose=False,
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    [ours] = session.run(None, {name: value.numpy() for name, value in second.items()})
    theirs = encoder(**second).numpy()
    difference = float((np.abs(ours - theirs) / np.linalg.norm(theirs, axis=-1, keepdims=True)).max())
    if not difference <= TOLERANCE:
        raise ValueError(
            f"{path.name} differs from the model by {difference:.1e} of the length of an embedding, and at most "
            f"{TOLERANCE} is allowed; nothing was written."
        )
    return difference


def export_onnx(
    name_or_path: str, output_dir: str | Path, merge_ratio: float | None = None, overwrite: bool = False
) -> dict[str, float]:
    """Writes both towers of a saved model as ONNX files, with its processor.

    Args:
        name_or_path: a folder or Hub id of an MLIP model.
        output_dir: a folder that does not exist, or with `overwrite` a model folder, which is replaced.
        merge_ratio: the fraction of patch tokens that merge; the saved ratio if not given.

    Returns:
        The difference of each file to the model, as `export_encoder` returns it.

    Raises:
        ImportError: if onnxscript or onnxruntime is not installed.
        OSError: if the model cannot be read, or `output_dir` exists or cannot be written.
        ValueError: for a merge ratio that is not allowed, or a file that computes something else than the model.
    """
    require_modules("Export to ONNX", "onnx", "onnxscript", "onnxruntime")
    check_target(output_dir, overwrite)
    model, processor = load_pretrained(name_or_path).float().eval(), load_processor(name_or_path)
    if merge_ratio is not None:
        model.set_merge_ratio(merge_ratio)
    images = [example_images(model, batch_size) for batch_size in BATCH_SIZES]
    captions = [example_captions(model, batch_size) for batch_size in BATCH_SIZES]
    with new_folder(output_dir, overwrite) as folder:
        differences = {
            IMAGE_FILE: export_encoder(ImageEncoder(model), images, "image_embeds", folder / IMAGE_FILE),
            TEXT_FILE: export_encoder(TextEncoder(model), captions, "text_embeds", folder / TEXT_FILE),
        }
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
    return differences


def main(arguments: list[str] | None = None) -> None:
    """Raises ValueError, OSError and ImportError in one line that says what to do."""
    parser = argparse.ArgumentParser(
        prog="mlip export", description=__doc__, formatter_class=FlagHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="A saved MLIP model: a folder or a Hub id. Convert a CLIP model first.")
    parser.add_argument("--to", choices=("onnx",), default="onnx", help="The format.")
    parser.add_argument("--output_dir", required=True, help="The folder to write.")
    parser.add_argument("--merge_ratio", type=float, help="Fraction of patch tokens to merge; else the saved ratio.")
    parser.add_argument("--overwrite", action="store_true", help="Replace --output_dir if it is a model folder.")
    flags = parser.parse_args(arguments)
    differences = export_onnx(flags.model, flags.output_dir, flags.merge_ratio, flags.overwrite)
    for name, difference in differences.items():
        print(f"{Path(flags.output_dir) / name}: largest difference to the model {difference:.1e}")


if __name__ == "__main__":
    main()
