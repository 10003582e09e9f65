# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip evaluate`: retrieval, zero-shot classification and classifiers on frozen features, of a saved model.

    mlip evaluate --model_name_or_path runs/mine --validation_file test.parquet
    mlip evaluate --model_name_or_path runs/mine --validation_file test.parquet --rerank 20
    mlip evaluate --model_name_or_path runs/mine --dataset_name cifar10 --templates openai
    mlip evaluate --model_name_or_path runs/mine --data_dir pets --linear_probe --shots 1 4 16
    mlip evaluate --model_name_or_path runs/shapes --dataset_name shapes --merge_ratio 0.5 \
        --label_columns shape texture --templates "a {} with stripes" "a shape with {} stripes"
    mlip evaluate --model_name_or_path open_clip:ViT-B-32:laion2b_s34b_b79k --dataset_name cifar10

A data set with captions is evaluated by retrieval, and by zero-shot classification for each of --label_columns. A data
set without captions is evaluated by zero-shot classification for each of its label columns.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from modeling_mlip.data.columns import find_caption_column
from modeling_mlip.data.data_arguments import DataArguments
from modeling_mlip.data.source_files import list_files
from modeling_mlip.data.sources import caption_hint, load_splits
from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.flag_help import FlagHelpFormatter, group_dataclasses
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.hub.model_card import add_to_model_card
from modeling_mlip.hub.results import results_table

from .encoders import DTYPES, Encoder, load_encoder, set_merging
from .evaluation_split import EvaluationSplit, LoadingOptions, Rows, choose_split
from .runner import Evaluation, prepare_tasks, run_tasks
from .tasks import TASKS, Task
from .templates import read_lines


@dataclass
class EncoderArguments:
    """The model to evaluate."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "A folder or a Hub id of an MLIP model or of a CLIP model of transformers; or open_clip:NAME:TAG, "
            "open_clip:NAME:FILE, open_clip:hf-hub:OWNER/NAME."
        },
    )
    dtype: str = field(default="float32", metadata={"help": f"Precision of the model: {', '.join(DTYPES)}."})
    attn_implementation: str = field(default="sdpa", metadata={"help": "Attention implementation: sdpa or eager."})


@dataclass
class LabelArguments:
    """Class labels, and how images are read; the same for `mlip evaluate` and `mlip benchmark`."""

    label_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Columns of class labels to classify by. Without captions they are found by their ClassLabel "
            "feature or their usual names."
        },
    )
    class_names: str | None = field(
        default=None,
        metadata={"help": "A file of class names, one per line from class 0 on, instead of the data set's names."},
    )
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Images per batch; the metrics do not depend on it."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Number of processes that decode images."})
    skip_budget: float = field(
        default=0.01, metadata={"help": "Share of rows that may be skipped because they cannot be read."}
    )

    def __post_init__(self):
        if self.per_device_eval_batch_size < 1:
            raise ValueError(f"per_device_eval_batch_size={self.per_device_eval_batch_size}: choose 1 or more.")
        self.loading()

    def loading(self) -> LoadingOptions:
        """How images are read."""
        return LoadingOptions(self.per_device_eval_batch_size, self.dataloader_num_workers, self.skip_budget)


@dataclass
class EvaluationArguments:
    """The merge ratio, and where the results go."""

    merge_ratio: float | None = field(
        default=None, metadata={"help": "Share of patch tokens to merge away; the saved ratio if not given."}
    )
    output_file: str | None = field(default=None, metadata={"help": "Write the results to this file as JSON."})
    update_model_card: bool = field(
        default=False, metadata={"help": "Add the results to the README.md of the model's folder, and its metadata."}
    )


# 1. From flags to tasks and data


def requested_tasks(
    options: Sequence[Any], *, is_captioned: bool, label_columns: Sequence[str], tasks: Mapping[str, type[Task]] = TASKS
) -> list[Task]:
    """The tasks that the flags and the data ask for.

    Args:
        options: an `Options` object for each task.

    Raises:
        ValueError: for a flag of a task that does not run: it would have no effect.
    """
    chosen = []
    for task_class, task_options in zip(tasks.values(), options, strict=True):
        given = {entry.name: getattr(task_options, entry.name) for entry in fields(task_options)}
        task = task_class(**given)
        if task.is_requested(is_captioned, list(label_columns)):
            chosen.append(task)
            continue
        defaults = task_class.Options()
        changed = [name for name, value in given.items() if value != getattr(defaults, name)]
        if changed:
            raise ValueError(
                f"{changed[0]}={given[changed[0]]!r} has no effect: the task {task.name} does not run; request it, or "
                "leave this out."
            )
    return chosen


def load_data(data_args: DataArguments) -> dict[str, Rows]:
    """The whole splits of the source that the flags name.

    Raises:
        ValueError, OSError: as `data.sources.load_splits`, or for a folder of images without captions and classes.
    """
    source = {**data_args.source(), "max_train_samples": None, "max_eval_samples": None}
    splits = dict(load_splits(image_column=data_args.image_column, **source))
    if data_args.data_dir and all(list(rows.features or ()) == ["image"] for rows in splits.values()):
        hint = caption_hint(list_files(Path(data_args.data_dir).expanduser()), "validation_file")
        raise ValueError(
            f"data_dir={data_args.data_dir}: its images have no captions and no classes. For captions there is no "
            f"metadata.csv or metadata.jsonl; {hint}. For classes, put the images of each class in its own folder."
        )
    return splits


def has_captions(splits: Mapping[str, Rows], data_args: DataArguments) -> bool:
    """Whether the split to evaluate has a column of captions."""
    name, splits = choose_split(splits)
    return find_caption_column(splits[name or ""], data_args.caption_column) is not None


def prepare_from_flags(
    encoder: Encoder,
    splits: Mapping[str, Rows],
    tasks: Sequence[Task],
    data_args: DataArguments,
    label_args: LabelArguments,
) -> EvaluationSplit:
    """`prepare_tasks` with the values of the flags."""
    return prepare_tasks(
        encoder,
        splits,
        tasks,
        **data_args.columns(),
        label_columns=label_args.label_columns,
        class_names=None if label_args.class_names is None else read_lines(label_args.class_names),
        max_seq_length=data_args.max_seq_length,
        max_train_samples=data_args.max_train_samples,
        max_eval_samples=data_args.max_eval_samples,
        loading=label_args.loading(),
    )


def dataset_name(args: DataArguments) -> str:
    """The name of the data set in reports: its Hub id, folder or file, as it was given."""
    return str(args.dataset_name or args.data_dir or args.validation_file or args.train_file)


# 2. The command


def check_evaluation_flags(encoder_args: EncoderArguments, args: EvaluationArguments) -> None:
    """Raises ValueError for what can be refused before the model is loaded."""
    if encoder_args.model_name_or_path is None:
        raise ValueError("Give the model to evaluate as --model_name_or_path, a folder or a Hub id.")
    if args.output_file is not None and not Path(args.output_file).absolute().parent.is_dir():
        raise ValueError(f"--output_file {args.output_file}: there is no folder {Path(args.output_file).parent}.")
    if args.output_file is not None and Path(args.output_file).is_dir():
        raise ValueError(f"--output_file {args.output_file} is a folder; name a file.")
    if args.update_model_card and not (Path(encoder_args.model_name_or_path) / "README.md").is_file():
        raise ValueError(
            f"--update_model_card: {encoder_args.model_name_or_path} has no README.md; give a folder that mlip train "
            "or mlip convert wrote."
        )


def describe(evaluation: Evaluation, split: EvaluationSplit, merge_ratio: float) -> str:
    """The line under the table: what was evaluated."""
    pairs = evaluation.pairs
    return (
        f"{split.name} split: {len(pairs.image_embeds)} images, {len(pairs.text_embeds)} captions, "
        f"{len(pairs.skipped)} skipped, {pairs.num_truncated} captions truncated; merge ratio {merge_ratio}"
    )


def main(arguments: list[str] | None = None) -> None:
    """Raises ValueError, OSError and ImportError in one line that says what to do."""
    parser = HfArgumentParser(
        (
            EncoderArguments,
            DataArguments,
            LabelArguments,
            EvaluationArguments,
            *(task.Options for task in TASKS.values()),
        ),
        prog="mlip evaluate",
        usage="mlip evaluate --model_name_or_path MODEL [--FLAG VALUE ...]",
        description=__doc__,
        formatter_class=FlagHelpFormatter,
        allow_abbrev=False,
    )
    group_dataclasses(
        parser,
        {
            "model": [EncoderArguments],
            "evaluation": [EvaluationArguments],
            "tasks": [task.Options for task in TASKS.values()],
            "data": [DataArguments],
            "labels and loading": [LabelArguments],
        },
    )
    encoder_args, data_args, label_args, args, *options = parser.parse_args_into_dataclasses(arguments)
    # Step (1): the model, the data and the tasks
    check_evaluation_flags(encoder_args, args)
    encoder = load_encoder(encoder_args.model_name_or_path, encoder_args.dtype, encoder_args.attn_implementation)
    set_merging(encoder, args.merge_ratio)
    splits = load_data(data_args)
    tasks = requested_tasks(
        options, is_captioned=has_captions(splits, data_args), label_columns=label_args.label_columns
    )
    split = prepare_from_flags(encoder, splits, tasks, data_args, label_args)
    # Step (2): the results
    [evaluation] = run_tasks(encoder, split, tasks)
    print(format_table(results_table(evaluation.results)))
    print(f"\n{describe(evaluation, split, encoder.merge_ratio)}")
    # Step (3): files
    dataset = dataset_name(data_args)
    if args.output_file is not None:
        content = {
            "model": encoder.name,
            "dataset": dataset,
            "split": split.name,
            "merge_ratio": encoder.merge_ratio,
            "images": len(evaluation.pairs.image_embeds),
            "captions": len(evaluation.pairs.text_embeds),
            "results": [result.to_dict() for result in evaluation.results],
        }
        write_atomically(args.output_file, json.dumps(content, indent=2, allow_nan=False) + "\n")
    if args.update_model_card:
        card = add_to_model_card(encoder_args.model_name_or_path, evaluation.results, dataset=dataset)
        print(f"Added to {card}.")


if __name__ == "__main__":
    main()
