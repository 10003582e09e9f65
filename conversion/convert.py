# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip convert SRC DST`: converts CLIP, SigLIP and OpenCLIP checkpoints to MLIP, and MLIP models back.

mlip convert laion/CLIP-ViT-B-32-laion2B-s34B-b79K mlip-b32 --merge-ratio 0.5
mlip convert epoch_32.pt mlip-b16 --model ViT-B-16
mlip convert mlip-b32 exported --to both
"""

import argparse
import time
from pathlib import Path

from modeling_mlip.hub.atomic_files import check_target, new_folder
from modeling_mlip.hub.extras import install_hint
from modeling_mlip.hub.text_context import stretch_text_context

from .checkpoints import Conversion, convert, write_mlip
from .export import FORMATS, export, write_exported
from .open_clip_configurations import towers
from .reports import write_reports
from .speedup import choose_merging


def main(argv: list[str] | None = None) -> None:
    """Runs the command.

    Raises:
        ImportError, OSError, ValueError: as `convert_checkpoint` and `export_checkpoint`.
    """
    arguments = _parser().parse_args(argv)
    began = time.perf_counter()
    check_target(arguments.target, arguments.overwrite)
    overrides = {name: getattr(arguments, name) for name in ("merge_ratio", "merge_layers", "merge_method")}
    overrides = {name: value for name, value in overrides.items() if value is not None}

    if arguments.speedup is not None and {"merge_ratio", "merge_layers"} & set(overrides):
        raise ValueError(f"--speedup {arguments.speedup} chooses --merge_ratio and --merge_layers; leave them out.")

    print(f"Reading {arguments.source}")
    conversion = convert(arguments.source, arguments.model, overrides)
    if arguments.speedup is not None:
        _set_merging(conversion, arguments.speedup)
    if arguments.max_seq_length is not None:
        _stretch_context(conversion, arguments.max_seq_length)
    _print_summary(conversion)
    if arguments.to == "mlip":
        with new_folder(arguments.target, arguments.overwrite) as folder:
            write_mlip(conversion, folder, name=Path(arguments.target).absolute().name)
    else:
        _export(conversion, arguments)
    print(f"Wrote {arguments.target} in {time.perf_counter() - began:.1f} s")


def _set_merging(conversion: Conversion, speedup: float) -> None:
    """Sets the merging that gives this speed-up, and prints it."""
    config = conversion.model.config
    vision_config, _ = towers(config)
    for name, value in choose_merging(vision_config, speedup).items():
        setattr(config, name, value)
    layers = " ".join(map(str, config.merge_layers))
    print(f"For {speedup:g} times fewer FLOPs: --merge_ratio {config.merge_ratio} --merge_layers {layers}")


def _stretch_context(conversion: Conversion, length: int) -> None:
    """Gives the model and its tokenizer a longer context."""
    context = conversion.model.config.text_config.max_position_embeddings
    stretch_text_context(conversion.model, length)
    conversion.processor.tokenizer.model_max_length = length
    conversion.notes.append(f"positions of captions stretched from {context} to {length} tokens after the comparison")


def _export(conversion: Conversion, arguments: argparse.Namespace) -> None:
    exported, notes = export(conversion.model, conversion.processor, arguments.to, arguments.drop_frequency)
    for item in exported:
        print(item.report or f"Parity of {item.format} was not checked: {install_hint('openclip')}.")
    for note in notes:
        print(f"Note: {note}")
    with new_folder(arguments.target, arguments.overwrite) as folder:
        write_exported(exported, conversion.processor, conversion.model.config, folder)
        reports = {item.format: item.report for item in exported}
        name = Path(arguments.target).absolute().name
        write_reports(reports, conversion.notes + notes, conversion.source.name, folder, None, name)


def _print_summary(conversion: Conversion) -> None:
    source = conversion.source
    vision, text = towers(conversion.model.config)
    print(
        f"Found {source.kind}: {source.num_bytes / 1e6:.0f} MB, image tower {vision.num_hidden_layers} x "
        f"{vision.hidden_size} ({vision.image_size}/{vision.patch_size}, {vision.hidden_act}, {vision.pooling} "
        f"pooling), text tower {text.num_hidden_layers} x {text.hidden_size} ({text.vocab_size} tokens, "
        f"{text.pooling} pooling)"
    )
    for note in conversion.notes:
        print(f"Note: {note}")
    if conversion.report is not None:
        print(conversion.report)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlip convert", description="Convert CLIP, SigLIP and OpenCLIP checkpoints to MLIP and back."
    )
    parser.add_argument("source", metavar="SRC", help="folder, checkpoint file or Hub id")
    parser.add_argument("target", metavar="DST", help="folder to write")
    parser.add_argument(
        "--model", help="for a checkpoint file: a model name of OpenCLIP (ViT-B-32), a JSON configuration, or openai"
    )
    parser.add_argument(
        "--merge-ratio", "--merge_ratio", type=float, help="fraction of patch tokens that merging removes, 0 <= r < 1"
    )
    parser.add_argument(
        "--speedup",
        type=float,
        help="FLOPs of the image tower without merging divided by those with it, above 1, for example 1.5: "
        "chooses --merge_ratio and --merge_layers",
    )
    parser.add_argument(
        "--merge-layers", "--merge_layers", type=int, nargs="+", help="layers that merge tokens, counted from 0"
    )
    parser.add_argument(
        "--merge-method",
        "--merge_method",
        help="mlip, tome, elip or ward (the default for a checkpoint that is not MLIP's)",
    )
    parser.add_argument(
        "--max-seq-length",
        "--max_seq_length",
        type=int,
        help="longest caption in tokens, above the context of the checkpoint: stretches its position embeddings",
    )
    parser.add_argument("--to", choices=("mlip", *FORMATS), default="mlip", help="format to write")
    parser.add_argument("--drop-frequency", "--drop_frequency", action="store_true",
                        help="export without a frequency stage that the model uses")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a model folder")
    return parser
