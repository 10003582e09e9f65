# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip interpolate START END`: the models between a model and its fine-tuned version, measured on new and old data.

    mlip interpolate openai/clip-vit-base-patch32 runs/fine --output_dir runs/between \\
        --validation_file new.parquet --validation_file old.parquet
    mlip interpolate runs/mine runs/fine --alphas 0 0.5 0.9 1 --alpha 0.9 --output_dir runs/between \\
        --validation_file new.parquet --validation_file old.parquet

The weights at alpha are (1 - alpha) * START + alpha * END, in float32 (WiSE-FT, arXiv 2109.01903). START and END are
folders or Hub ids of MLIP models, or of CLIP models of transformers. Parameters that START lacks, such as a frequency
stage, are those of END.

The command prints the mean recall of retrieval on both files for each alpha, and writes one of the models to
--output_dir, with a picture (interpolation.png) and all results (interpolation.json). It is the one with the largest
share of the gain on the new file less the share of the loss on the old file, or the one of --alpha. START and END are
equal by this rule if END gains on one file and loses on the other. Of equal ones it is the one with the highest recall
on the new file, and then the one nearest to END.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPProcessor

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.data.sources import load_splits
from modeling_mlip.hub.atomic_files import check_target, new_folder, write_atomically
from modeling_mlip.hub.configurations import START_CLASSES, saved_config
from modeling_mlip.hub.flag_help import FlagHelpFormatter
from modeling_mlip.hub.formatting import format_names, format_table
from modeling_mlip.hub.loading import CLIP_ONLY, load_pretrained, load_processor
from modeling_mlip.hub.model_card import add_to_model_card, shown_name, write_model_card
from modeling_mlip.hub.results import Result, values_by_name

from .encoders import Encoder, make_encoder
from .evaluation_split import EvaluationSplit, LoadingOptions
from .interpolation import check_same_shapes, choose_alpha, interpolate_weights
from .plots import plot_interpolation
from .runner import prepare_tasks, run_tasks
from .tasks import Retrieval

RESULTS_FILE, PICTURE_FILE = "interpolation.json", "interpolation.png"
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
METRIC = "mean_recall"


@dataclass(frozen=True)
class InterpolationPoint:
    """The results of the weights at one alpha on the new and on the old data."""

    alpha: float
    new: list[Result]
    old: list[Result]

    @property
    def accuracies(self) -> tuple[float, float]:
        """Mean recall on the new and on the old data, in percent."""
        return values_by_name(self.new)[METRIC], values_by_name(self.old)[METRIC]


def main(arguments: list[str] | None = None) -> None:
    """Raises ValueError, OSError and ImportError in one line that says what to do."""
    flags = build_interpolation_parser().parse_args(arguments)
    # Step (1): what can be refused before the models are loaded
    check_flags(flags)
    check_target(flags.output_dir, flags.overwrite)
    # Step (2): the models and the data
    model, processor = load_weights(flags.end), load_processor(flags.end)
    start, end = load_weights(flags.start).state_dict(), copy_state(model)
    check_same_shapes(start, end)
    for note in notes_on_names(start, end):
        print(f"Note: {note}")
    encoder = make_encoder(flags.end, model.eval().to("cuda" if torch.cuda.is_available() else "cpu"), processor)
    splits = [prepare_file(encoder, path, flags) for path in flags.validation_file]
    # Step (3): the results at each alpha
    alphas = sorted({*flags.alphas, *([] if flags.alpha is None else [flags.alpha])})
    points = measure_alphas(encoder, start, end, alphas, splits)
    accuracies = {point.alpha: point.accuracies for point in points}
    chosen = choose_alpha(accuracies) if flags.alpha is None else flags.alpha
    names = display_names(flags.validation_file)
    print(format_table(accuracy_rows(accuracies, names)))
    print(f"\n{describe_choice(chosen, is_given=flags.alpha is not None)}")
    # Step (4): the model
    model.load_state_dict(interpolate_weights(start, end, chosen))
    with new_folder(flags.output_dir, flags.overwrite) as folder:
        write_interpolated(folder, model.cpu(), processor, points, chosen, names, flags)
    print(f"Saved to {flags.output_dir}: weights, processor, model card, {RESULTS_FILE}, {PICTURE_FILE}.")


# Step (1)


def check_flags(flags: argparse.Namespace) -> None:
    """Raises ValueError for an alpha out of range, or another number of files than two."""
    for alpha in [*flags.alphas, *([] if flags.alpha is None else [flags.alpha])]:
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha={alpha:g}: choose 0 (START) to 1 (END).")
    if len(flags.validation_file) != 2:
        raise ValueError(
            f"Got {len(flags.validation_file)} validation files: give --validation_file twice, first the new data and "
            "then the old data."
        )


# Step (2)


def load_weights(name_or_path: str) -> MLIPModel:
    """The model of a folder or Hub id in float32, without parameters that it does not contain.

    Raises:
        OSError, ValueError: as `load_pretrained`.
    """
    config = saved_config(name_or_path, START_CLASSES)
    config = MLIPConfig.from_clip_config(config, **CLIP_ONLY) if isinstance(config, CLIPConfig) else None
    return load_pretrained(name_or_path, config=config, dtype=torch.float32)


def copy_state(model: MLIPModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def notes_on_names(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> list[str]:
    """What happens to parameters that only one of the models has."""
    notes = []
    if only_end := sorted(end.keys() - start.keys()):
        notes.append(f"START lacks {format_names(only_end)}; taken from END at every alpha.")
    if only_start := sorted(start.keys() - end.keys()):
        notes.append(f"END lacks {format_names(only_start)}; left out at every alpha, so alpha 0 is not START.")
    return notes


def prepare_file(encoder: Encoder, path: str, flags: argparse.Namespace) -> EvaluationSplit:
    """The pairs of a file, ready to be encoded."""
    return prepare_tasks(
        encoder,
        load_splits(validation_file=path, image_column=flags.image_column, max_eval_samples=flags.max_eval_samples),
        [Retrieval()],
        image_column=flags.image_column,
        caption_column=flags.caption_column,
        loading=LoadingOptions(flags.per_device_eval_batch_size, flags.dataloader_num_workers),
    )


# Step (3)


def measure_alphas(
    encoder: Encoder,
    start: Mapping[str, Tensor],
    end: Mapping[str, Tensor],
    alphas: Sequence[float],
    splits: Sequence[EvaluationSplit],
) -> list[InterpolationPoint]:
    """Retrieval on the new and on the old data at each alpha. The encoder keeps the weights of the last one."""
    points = []
    for alpha in alphas:
        encoder.model.load_state_dict(interpolate_weights(start, end, alpha))
        new, old = (run_tasks(encoder, split, [Retrieval()])[0].results for split in splits)
        points.append(InterpolationPoint(alpha, new, old))
    return points


def display_names(paths: Sequence[str]) -> list[str]:
    """The file names, with their folders if both are equal."""
    names = [Path(path).name for path in paths]
    return names if len(set(names)) == len(names) else ["/".join(Path(path).parts[-2:]) for path in paths]


def accuracy_rows(accuracies: Mapping[float, tuple[float, float]], names: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the table: mean recall in percent."""
    new_name, old_name = (f"{kind}: {name}" for kind, name in zip(("new", "old"), names, strict=True))
    return [
        {"alpha": f"{alpha:g}", new_name: new, old_name: old, "mean": (new + old) / 2}
        for alpha, (new, old) in accuracies.items()
    ]


def describe_choice(chosen: float, is_given: bool) -> str:
    """The line under the table."""
    rule = "given by --alpha" if is_given else "the largest share of the gain less that of the loss"
    return f"Mean recall in percent. alpha {chosen:g}: {rule}."


# Step (4)


def write_interpolated(
    folder: Path,
    model: MLIPModel,
    processor: CLIPProcessor,
    points: Sequence[InterpolationPoint],
    chosen: float,
    names: Sequence[str],
    flags: argparse.Namespace,
) -> None:
    """Writes the model with its processor, picture, results and card into a new folder."""
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    accuracies = {point.alpha: point.accuracies for point in points}
    plot_interpolation(accuracies, chosen, names, folder / PICTURE_FILE)
    content = {
        "start": shown_name(flags.start),
        "end": shown_name(flags.end),
        "alpha": chosen,
        "new": names[0],
        "old": names[1],
        "results": [
            {"alpha": point.alpha, "new": values_by_name(point.new), "old": values_by_name(point.old)}
            for point in points
        ],
    }
    write_atomically(folder / RESULTS_FILE, json.dumps(content, indent=2, allow_nan=False) + "\n")
    table = format_table(accuracy_rows(accuracies, names), markdown=True)
    name = Path(flags.output_dir).absolute().name
    write_model_card(
        folder,
        results=[],
        config=model.config,
        dataset=None,
        base_model=flags.end,
        training={},
        curves=None,
        interpolation=f"The weights are (1 - alpha) * {content['start']} + alpha * {content['end']} at alpha "
        f"{chosen:g}. Mean recall in percent:\n\n{table}\n\n![Accuracy on new over old data]({PICTURE_FILE})",
        name=name,
    )
    [point] = [point for point in points if point.alpha == chosen]
    for results, dataset in ((point.new, names[0]), (point.old, names[1])):
        add_to_model_card(folder, results, dataset=dataset, name=name)


def build_interpolation_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlip interpolate", description=__doc__, formatter_class=FlagHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("start", metavar="START", help="The model before fine-tuning: a folder or a Hub id.")
    parser.add_argument("end", metavar="END", help="The model after fine-tuning, likewise.")
    parser.add_argument(
        "--validation_file",
        action="append",
        required=True,
        help="A file of pairs, as for mlip evaluate. Give it twice: first the new data, then the old data.",
    )
    parser.add_argument("--output_dir", required=True, help="Folder to write the chosen model to.")
    parser.add_argument("--alphas", type=float, nargs="+", default=list(ALPHAS), help="Weights of END to measure.")
    parser.add_argument(
        "--alpha",
        type=float,
        help="Weight of END to write, instead of the one with the largest share of the gain less that of the loss. Of "
        "equal ones, that rule takes the one with the highest recall on the new data.",
    )
    parser.add_argument("--overwrite", action="store_true", help="Replace --output_dir if it is a model folder.")
    parser.add_argument("--image_column", help="The column of images; found by its usual names if not given.")
    parser.add_argument("--caption_column", help="The column of captions; found by its usual names if not given.")
    parser.add_argument("--max_eval_samples", type=int, help="Use this number of images of each file, the first ones.")
    parser.add_argument("--per_device_eval_batch_size", type=int, default=128, help="Images per batch.")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="Number of processes that read images.")
    return parser


if __name__ == "__main__":
    main()
