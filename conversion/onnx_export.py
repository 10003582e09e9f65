# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip export MODEL --to onnx --output_dir FOLDER`: both towers as ONNX files, compared with the model.

    mlip export runs/mine --to onnx --output_dir onnx
    mlip export runs/mine --to onnx --merge_ratio 0 --output_dir onnx-unmerged
    mlip export runs/mine --to onnx --dtype int8 --output_dir onnx-int8

It writes image_encoder.onnx (pixel_values -> image_embeds), text_encoder.onnx (input_ids, attention_mask ->
text_embeds) and the files of the processor. Both take any batch size. The merge ratio is part of the image encoder.
Captions are padded to the context length of the model. `--dtype int8` stores the weights of the linear layers in int8
and quantises their inputs while it computes (onnxruntime's dynamic quantisation). Its embeddings are compared with
those of float32: nothing is written if a cosine similarity is below 0.9, and a note is printed if it is below 0.99.
"""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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
# Smallest cosine similarity of int8 embeddings to float32 ones that is accepted, and that is accepted without a note.
MIN_COSINE, MIN_COSINE_WITHOUT_NOTE = 0.9, 0.99
DTYPES = ("float32", "int8")
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


def quantize_encoder(source: Path, path: Path) -> None:
    """Writes an ONNX file with the weights of its linear layers in int8, one scale for each output channel.

    Products of activations (attention, merging), embeddings of patches and tokens, and the query of the frequency stage
    stay in float32. The weights use 7 of 8 bits: processors without VNNI instructions add two products in 16 bits, and
    products of 8-bit weights could exceed these.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(source, load_external_data=False).graph
    num_axes = {weight.name: len(weight.dims) for weight in graph.initializer}
    other_products = [
        node.name for node in graph.node if node.op_type == "MatMul" and num_axes.get(node.input[1], 2) != 2
    ]
    with _without_warnings():
        quantize_dynamic(
            source,
            path,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=other_products,
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
        )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Hides the advice of onnxruntime, on the root logger, to optimise a file before it is quantised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(disabled)


def smallest_cosine(path: Path, reference: Path, inputs: dict[str, Tensor]) -> float:
    """Smallest cosine similarity of the embeddings of two ONNX files, over the rows of `inputs`."""
    import onnxruntime

    feeds = {name: value.numpy() for name, value in inputs.items()}
    embeddings = []
    for file in (path, reference):
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        embeddings.append(torch.from_numpy(session.run(None, feeds)[0]))
    ours, theirs = embeddings
    return float(torch.cosine_similarity(ours, theirs).min())


def check_int8(name: str, cosine: float) -> None:
    """Raises ValueError if the embeddings of an int8 file differ grossly from those of the float32 file."""
    if not cosine >= MIN_COSINE:  # also if it is NaN
        raise ValueError(
            f"{name} in int8 has a cosine similarity of {cosine:.4f} to float32, and at least {MIN_COSINE} is needed: "
            "export with dtype='float32'; nothing was written."
        )


def export_onnx(
    name_or_path: str,
    output_dir: str | Path,
    merge_ratio: float | None = None,
    overwrite: bool = False,
    dtype: str = "float32",
) -> dict[str, float]:
    """Writes both towers of a saved model as ONNX files, with its processor.

    Args:
        name_or_path: a folder or Hub id of an MLIP model.
        output_dir: a folder that does not exist, or with `overwrite` a model folder, which is replaced.
        merge_ratio: the fraction of patch tokens that merge; the saved ratio if not given.
        dtype: of the weights of the linear layers, "float32" or "int8".

    Returns:
        For each file, with float32 the difference to the model as `export_encoder` returns it, with int8 the smallest
        cosine similarity to the embeddings of the float32 file, on random inputs, which is at least `MIN_COSINE`.

    Raises:
        ImportError: if onnxscript or onnxruntime is not installed.
        OSError: if the model cannot be read, or `output_dir` exists or cannot be written.
        ValueError: for a merge ratio or dtype that is not allowed, a float32 file that computes something else than the
            model, or an int8 file that differs too much from it.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}.")
    require_modules("Export to ONNX", "onnx", "onnxscript", "onnxruntime")
    check_target(output_dir, overwrite)
    model, processor = load_pretrained(name_or_path).float().eval(), load_processor(name_or_path)
    if merge_ratio is not None:
        model.set_merge_ratio(merge_ratio)
    encoders = {
        IMAGE_FILE: (ImageEncoder(model), "image_embeds", [example_images(model, size) for size in BATCH_SIZES]),
        TEXT_FILE: (TextEncoder(model), "text_embeds", [example_captions(model, size) for size in BATCH_SIZES]),
    }
    deviations = {}
    with new_folder(output_dir, overwrite) as folder, tempfile.TemporaryDirectory() as scratch:
        target = folder if dtype == "float32" else Path(scratch)
        for name, (encoder, output_name, examples) in encoders.items():
            deviations[name] = export_encoder(encoder, examples, output_name, target / name)
            if dtype == "int8":
                quantize_encoder(target / name, folder / name)
                deviations[name] = smallest_cosine(folder / name, target / name, examples[-1])
                check_int8(name, deviations[name])
        model.config.save_pretrained(folder)
        processor.save_pretrained(folder)
    return deviations


def main(arguments: list[str] | None = None) -> None:
    """Raises ValueError, OSError and ImportError in one line that says what to do."""
    parser = argparse.ArgumentParser(
        prog="mlip export", description=__doc__, formatter_class=FlagHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="A saved MLIP model: a folder or a Hub id. Convert a CLIP model first.")
    parser.add_argument("--to", choices=("onnx",), default="onnx", help="The format.")
    parser.add_argument("--output_dir", required=True, help="The folder to write.")
    parser.add_argument("--merge_ratio", type=float, help="Fraction of patch tokens to merge; else the saved ratio.")
    parser.add_argument("--dtype", default="float32", help=f"Type of the weights: {', '.join(DTYPES)}.")
    parser.add_argument("--overwrite", action="store_true", help="Replace --output_dir if it is a model folder.")
    flags = parser.parse_args(arguments)
    deviations = export_onnx(flags.model, flags.output_dir, flags.merge_ratio, flags.overwrite, flags.dtype)
    for name, deviation in deviations.items():
        path = Path(flags.output_dir) / name
        if flags.dtype == "int8":
            size = path.stat().st_size / 2**20
            print(f"{path}: {size:.1f} MiB, smallest cosine similarity to float32 {deviation:.4f} on random inputs")
            if deviation < MIN_COSINE_WITHOUT_NOTE:
                print(f"Note: below {MIN_COSINE_WITHOUT_NOTE}. Compare recall with the float32 files before use.")
        else:
            print(f"{path}: largest difference to the model {deviation:.1e}")


if __name__ == "__main__":
    main()
