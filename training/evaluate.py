# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip evaluate`: retrieval and zero-shot classification of a saved model.

    mlip evaluate --model_name_or_path runs/mine --validation_file test.parquet
    mlip evaluate --model_name_or_path runs/shapes --dataset_name shapes --merge_ratio 0.5 \
        --label_columns shape texture --templates "a {} with stripes" "a shape with {} stripes"
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import DataLoader
from transformers import CLIPProcessor, HfArgumentParser

from modeling_mlip import MLIPModel

from .arguments import DataArguments, ModelArguments
from .data import (
    EvaluationCollator,
    PairDataset,
    SkipBudget,
    StreamedPairDataset,
    find_columns,
    image_transform,
    load_pairs,
)
from .loading import load_pretrained
from .metrics import EncodedPairs, class_embeddings, encode_pairs, retrieval_metrics, zero_shot_metrics
from .report import format_table

DEFAULT_TEMPLATES = ("a photo of a {}.", "a picture of a {}.", "an image of a {}.", "{}")


@dataclass
class EvaluationArguments:
    """What is measured, and where it goes."""

    merge_ratio: float | None = field(
        default=None, metadata={"help": "Share of patch tokens merged away; as the model was saved if not given."}
    )
    label_columns: list[str] = field(
        default_factory=list, metadata={"help": "Columns of class labels: zero-shot classification by each."}
    )
    templates: list[str] = field(
        default_factory=list,
        metadata={"help": "Prompts with {} for the class: one for each label column, or several for the only one."},
    )
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Images at a time; the metrics do not depend on it."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode images."})
    skip_budget: float = field(default=0.01, metadata={"help": "Share of broken samples at which evaluation stops."})
    output_file: str | None = field(default=None, metadata={"help": "Write the metrics here as JSON."})


def templates_of(columns: Sequence[str], templates: Sequence[str]) -> dict[str, Sequence[str]]:
    """The prompt templates of each label column."""
    if not templates:
        return dict.fromkeys(columns, DEFAULT_TEMPLATES)
    if len(columns) == 1:
        return {columns[0]: templates}
    if len(columns) != len(templates):
        raise ValueError(
            f"Got {len(templates)} templates for {len(columns)} label columns; give one for each, in the same order."
        )
    return {column: [template] for column, template in zip(columns, templates, strict=True)}


def class_labels(rows: datasets.Dataset, column: str) -> tuple[list[str], torch.Tensor]:
    """Class names, and the index of its class for each row `(R,)`."""
    if column not in rows.column_names:
        raise ValueError(f"label_columns={column}: no such column; the columns are {', '.join(rows.column_names)}.")
    feature = rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names, torch.tensor(rows[column][:])
    names = sorted({str(value) for value in rows[column]})
    return names, torch.tensor([names.index(str(value)) for value in rows[column]])


def zero_shot_by_column(
    model: MLIPModel,
    processor: CLIPProcessor,
    rows: datasets.Dataset,
    encoded: EncodedPairs,
    templates: dict[str, Sequence[str]],
) -> dict[str, float]:
    """Zero-shot accuracies, `zero_shot_COLUMN_accuracy@k` in percent, of images that are encoded already."""
    metrics: dict[str, float] = {}
    for column, prompts in templates.items():
        names, labels = class_labels(rows, column)
        length = model.config.text_config.max_position_embeddings
        classes = class_embeddings(model, processor.tokenizer, names, prompts, model.device, length)
        found = zero_shot_metrics(encoded.image_embeds, labels[encoded.image_rows], classes)
        metrics |= {f"zero_shot_{column}_{name}": value for name, value in found.items()}
    return metrics


def evaluate_model(
    model: MLIPModel,
    processor: CLIPProcessor,
    rows: datasets.Dataset | datasets.IterableDataset,
    data_args: DataArguments,
    args: EvaluationArguments,
) -> tuple[dict[str, float], EncodedPairs]:
    """Retrieval, and zero-shot classification by each label column."""
    templates = templates_of(args.label_columns, args.templates)
    if templates and data_args.streaming:
        raise ValueError("Zero-shot classification needs all class names first; leave out --streaming.")
    kind = StreamedPairDataset if data_args.streaming else PairDataset
    pairs = kind(
        rows,
        *find_columns(rows, data_args),
        transform=image_transform(processor.image_processor),
        training=False,
        seed=0,
    )
    length = data_args.max_seq_length or model.config.text_config.max_position_embeddings
    dataloader: DataLoader = DataLoader(
        pairs,
        batch_size=args.per_device_eval_batch_size,
        collate_fn=EvaluationCollator(processor.tokenizer, length),
        num_workers=args.dataloader_num_workers,
    )
    encoded = encode_pairs(model, dataloader, model.device, "Evaluation")
    seen = len(encoded.image_embeds)
    SkipBudget(args.skip_budget, seen + len(encoded.skipped)).add(encoded.skipped, seen=seen)
    metrics = retrieval_metrics(
        encoded.image_embeds, encoded.text_embeds, encoded.caption_image, encoded.caption_ids
    ) | zero_shot_by_column(model, processor, rows, encoded, templates)
    return metrics, encoded


def metrics_table(metrics: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each metric with its values at 1, 5 and 10."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        what, _, at = name.partition("@")
        if at:
            rows.setdefault(what, {"metric": what.replace("_", " ")})[f"@{at}"] = value
    return list(rows.values())


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, EvaluationArguments),
        prog="mlip evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    model_args, data_args, args = parser.parse_args_into_dataclasses(arguments)
    if model_args.model_name_or_path is None:
        raise ValueError("Give the model to evaluate as --model_name_or_path, a folder or a Hub id.")
    model = load_pretrained(model_args.model_name_or_path)
    if args.merge_ratio is not None:
        model.set_merge_ratio(args.merge_ratio)
    processor = CLIPProcessor.from_pretrained(model_args.model_name_or_path)
    model.to("cuda" if torch.cuda.is_available() else "cpu")

    splits = load_pairs(data_args)
    split = "validation" if "validation" in splits else "train"
    metrics, encoded = evaluate_model(model, processor, splits[split], data_args, args)
    print(format_table(metrics_table(metrics)))
    print(
        f"\n{split} split: {len(encoded.image_embeds)} images, {len(encoded.text_embeds)} captions, "
        f"{len(encoded.skipped)} skipped, {encoded.num_truncated} captions truncated; "
        f"merge ratio {model.config.merge_ratio}"
    )
    if args.output_file is not None:
        Path(args.output_file).write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
