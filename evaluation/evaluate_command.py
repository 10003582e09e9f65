# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip evaluate`: retrieval, zero-shot classification and classifiers on frozen features, of a saved model.

    mlip evaluate --model_name_or_path runs/mine --validation_file test.parquet
    mlip evaluate --model_name_or_path runs/mine --validation_file test.parquet --rerank 20
    mlip evaluate --model_name_or_path runs/mine --dataset_name cifar10 --templates openai
    mlip evaluate --model_name_or_path runs/mine --data_dir pets --linear_probe --shots 1 4 16
    mlip evaluate --model_name_or_path runs/shapes --dataset_name shapes --merge_ratio 0.5 \
        --label_columns shape texture --templates "a {} with stripes" "a shape with {} stripes"
    mlip evaluate --model_name_or_path open_clip:ViT-B-32:laion2b_s34b_b79k --dataset_name cifar10

A data set with captions is evaluated by retrieval, and by zero-shot classification for each of --label_columns; one
without by the class labels that it has.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import HfArgumentParser

from modeling_mlip import MLIPModel
from modeling_mlip.data.arguments import DataArguments
from modeling_mlip.data.collators import EvaluationCollator
from modeling_mlip.data.columns import CAPTION_COLUMNS, find_columns, find_image_column
from modeling_mlip.data.items import PairDataset, StreamedPairDataset
from modeling_mlip.data.skip_budget import SkipBudget
from modeling_mlip.data.sources import first_rows, load_splits
from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.hub.model_card import add_to_model_card

from .classifiers import SPARE_SHOTS, draw_shots, few_shot, linear_probe, require_sklearn
from .embedding import EncodedPairs, class_embeddings, encode_pairs, encode_variants
from .encoders import DTYPES, Encoder, load_encoder, set_merging
from .labels import (
    Classes,
    LabelCollator,
    LabelledImages,
    StreamedLabelledImages,
    find_label_columns,
    labels_of,
    read_classes,
)
from .metrics import retrieval_metrics, zero_shot_metrics
from .reranking import token_rescore
from .templates import DEFAULT_TEMPLATES, read_lines, read_templates


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
    attn_implementation: str = field(default="sdpa", metadata={"help": "sdpa or eager."})


@dataclass
class EvaluationArguments:
    """What is measured, and where it goes."""

    merge_ratio: float | None = field(
        default=None, metadata={"help": "Share of patch tokens merged away; as the model was saved if not given."}
    )
    label_columns: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Columns of class labels, to classify by each. Where there are no captions they are found by their "
            "ClassLabel feature or their usual names."
        },
    )
    class_names: str | None = field(
        default=None,
        metadata={"help": "A file of class names, one in each line from class 0 on, instead of those of the data set."},
    )
    templates: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Prompts with {} for the class, files with one in each line, or lists: default, openai, simple "
            "(the last two come with open_clip). One for each label column, or any number for the only one."
        },
    )
    linear_probe: bool = field(
        default=False, metadata={"help": "Logistic regression on frozen features of the train split; scikit-learn."}
    )
    shots: list[int] = field(
        default_factory=list,
        metadata={"help": "The same on so many images of each class of the train split, e.g. 1 4 16."},
    )
    seeds: int = field(default=5, metadata={"help": "How often the images of --shots are drawn."})
    rerank: int = field(
        default=0,
        metadata={"help": "Retrieval: rank the first so many candidates again by their tokens; 0 does not."},
    )
    rerank_weight: float = field(
        default=1.0,
        metadata={"help": "What the score of tokens counts beside that of embeddings, each at its temperature."},
    )
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Images at a time; the metrics do not depend on it."}
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode images."})
    skip_budget: float = field(
        default=0.01, metadata={"help": "Share of broken samples beyond which evaluation stops."}
    )
    output_file: str | None = field(default=None, metadata={"help": "Write the metrics here as JSON."})
    update_model_card: bool = field(
        default=False, metadata={"help": "Add the metrics to the README.md of the model's folder, and its metadata."}
    )

    def __post_init__(self):
        for name, least in (("rerank", 0), ("seeds", 1), ("per_device_eval_batch_size", 1), ("rerank_weight", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: choose {least} or more.")
        if any(shots < 1 for shots in self.shots):
            raise ValueError(f"shots={self.shots}: choose 1 or more images of each class.")
        if self.linear_probe or self.shots:
            require_sklearn()


@dataclass
class Evaluation:
    """A split that is ready to be encoded.

    Args:
        rows: of the split.
        split: its name.
        captioned: whether it is evaluated by retrieval.
        classes: of each label column to classify by.
        dataloader: of batches for `encode_pairs`.
        train: the split to train classifiers on, where there is one.
        image_column: its name.
    """

    rows: Dataset | IterableDataset
    split: str
    captioned: bool
    classes: list[Classes]
    dataloader: DataLoader
    train: Dataset | IterableDataset | None
    image_column: str


# 1. What is evaluated


def has_captions(splits: dict[str, Dataset | IterableDataset], args: DataArguments) -> bool:
    """Whether there is a caption column, by flag or by its usual names."""
    rows = next(iter(splits.values()))
    if args.caption_column is not None:
        return True
    columns = dict(rows.features or next(iter(rows), {}))
    inner = [name for kind in columns.values() if isinstance(kind, dict) for name in kind]
    return any(name.lower() in CAPTION_COLUMNS for name in [*columns, *inner])


def load_evaluation(encoder: Encoder, data_args: DataArguments, args: EvaluationArguments) -> Evaluation:
    """Reads the source that the flags name, for `evaluate_split`.

    Raises:
        ValueError, FileNotFoundError: as `data.load_splits`, or for a data set with neither captions nor labels.
    """
    splits = load_splits(
        image_column=data_args.image_column,
        **{**data_args.source(), "max_train_samples": None, "max_eval_samples": None},
    )
    captioned = has_captions(splits, data_args)
    if captioned:
        for rows in splits.values():
            find_columns(rows, **data_args.columns())
    split = "validation" if "validation" in splits else "train"
    limit = data_args.max_eval_samples if split == "validation" else data_args.max_train_samples
    train = splits["train"] if split == "validation" and "train" in splits else None
    train = None if train is None else first_rows(train, data_args.max_train_samples)
    rows = first_rows(splits[split], limit)
    return prepare(encoder, rows, data_args, args, captioned, split, train, list(splits.values()))


def prepare(
    encoder: Encoder,
    rows: Dataset | IterableDataset,
    data_args: DataArguments,
    args: EvaluationArguments,
    captioned: bool = True,
    split: str = "validation",
    train: Dataset | IterableDataset | None = None,
    whole: Sequence[Dataset | IterableDataset] = (),
) -> Evaluation:
    """What `evaluate_split` takes, of one split; classes are those of the splits `whole`, where given."""
    streamed = isinstance(rows, IterableDataset)
    image_column = find_image_column(rows, data_args.image_column)
    wanted = args.label_columns if captioned else find_label_columns(rows, args.label_columns)
    if wanted and captioned:
        find_label_columns(rows, wanted)
        if streamed:
            raise ValueError(
                "Labels beside captions cannot be read from a stream; leave out --streaming or --label_columns."
            )
    if args.class_names is not None and len(wanted) != 1:
        raise ValueError(
            f"--class_names names the classes of one column, and there are {len(wanted)} "
            f"({', '.join(wanted) or 'the data set has captions'}); choose one with --label_columns."
        )
    names = read_lines(args.class_names) if args.class_names is not None else None
    classes = [read_classes(whole or [rows], column, names) for column in wanted]
    templates_of(wanted, args.templates)
    _length(encoder, data_args)
    if args.rerank:
        check_rerank(encoder, captioned)
    if args.linear_probe or args.shots:
        if not wanted:
            raise ValueError("--linear_probe and --shots classify; choose the column of labels with --label_columns.")
        if train is None or streamed:
            raise ValueError(
                "--linear_probe and --shots need a train and a validation split"
                f"{', and no --streaming' if streamed else ''}; give files as --train_file and --validation_file, or a "
                "data set that has both."
            )
    if captioned:
        pair_kind = StreamedPairDataset if streamed else PairDataset
        items: Any = pair_kind(
            rows, *find_columns(rows, **data_args.columns()), transform=encoder.transform, training=False, seed=0
        )
        collate: Callable = EvaluationCollator(encoder.tokenizer, _length(encoder, data_args))
    else:
        items = labelled_images(encoder, rows, image_column, classes)
        collate = LabelCollator()
    return Evaluation(rows, split, captioned, classes, _dataloader(items, collate, args), train, image_column)


def labelled_images(
    encoder: Encoder, rows: Dataset | IterableDataset, image_column: str, classes: Sequence[Classes]
) -> Any:
    kind = StreamedLabelledImages if isinstance(rows, IterableDataset) else LabelledImages
    return kind(rows, image_column, classes, encoder.transform)


def _dataloader(items: Any, collate: Callable, args: EvaluationArguments) -> DataLoader:
    return DataLoader(
        items,
        batch_size=args.per_device_eval_batch_size,
        collate_fn=collate,
        num_workers=args.dataloader_num_workers,
    )


def _length(encoder: Encoder, data_args: DataArguments) -> int:
    length = encoder.context if data_args.max_seq_length is None else data_args.max_seq_length
    if not 3 <= length <= encoder.context:
        raise ValueError(
            f"--max_seq_length {length}: {encoder.name} takes 3 (BOS, one token, EOS) to {encoder.context} tokens."
        )
    return length


def check_rerank(encoder: Encoder, captioned: bool = True) -> None:
    """Refuses a model without tokens in the shared space, and data without captions."""
    if not captioned:
        raise ValueError("--rerank is for retrieval, and this data set has no captions; leave it out.")
    if not isinstance(encoder.model, MLIPModel) or encoder.model.token_visual_projection is None:
        weight = getattr(encoder.model.config, "token_loss_weight", None) if hasattr(encoder.model, "config") else None
        reason = f"has token_loss_weight={weight}" if weight is not None else "is no MLIP model"
        raise ValueError(
            f"--rerank compares tokens, and {encoder.name} {reason}, so it has learned none to compare; leave it out, "
            "or train an MLIP model with --token_loss_weight above 0."
        )


def templates_of(columns: Sequence[str], templates: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The prompt templates of each label column."""
    if not templates:
        return dict.fromkeys(columns, DEFAULT_TEMPLATES)
    read = [read_templates(value) for value in templates]
    if len(columns) <= 1:
        return {column: tuple(template for group in read for template in group) for column in columns}
    if len(columns) != len(read):
        if len(read) == 1:
            return dict.fromkeys(columns, read[0])
        raise ValueError(
            f"Got {len(read)} templates for {len(columns)} label columns ({', '.join(columns)}); give one for each, in "
            "the same order, or one for all."
        )
    return dict(zip(columns, read, strict=True))


# 2. Metrics


def evaluate_model(
    encoder: Encoder, rows: Dataset | IterableDataset, data_args: DataArguments, args: EvaluationArguments
) -> tuple[dict[str, float], EncodedPairs]:
    """Retrieval among rows with captions, and zero-shot classification by each label column."""
    return evaluate_split(encoder, prepare(encoder, rows, data_args, args), data_args, args)


def evaluate_split(
    encoder: Encoder, evaluation: Evaluation, data_args: DataArguments, args: EvaluationArguments
) -> tuple[dict[str, float], EncodedPairs]:
    """Everything that the arguments ask for, in percent."""
    [(metrics, encoded)] = evaluate_variants(encoder, evaluation, data_args, args, [lambda: None])
    if args.rerank:
        metrics |= rerank_metrics(encoder, encoded, args)
    if args.linear_probe or args.shots:
        metrics |= probe_metrics(encoder, evaluation, encoded, args)
    return metrics, encoded


def evaluate_variants(
    encoder: Encoder,
    evaluation: Evaluation,
    data_args: DataArguments,
    args: EvaluationArguments,
    variants: Sequence[Callable[[], None]],
) -> list[tuple[dict[str, float], EncodedPairs]]:
    """Retrieval and zero-shot metrics of several settings of the model, in one pass over the data."""
    budget = SkipBudget(args.skip_budget, len(evaluation.rows) if isinstance(evaluation.rows, Dataset) else None)
    variants_encoded = encode_variants(
        encoder.model, evaluation.dataloader, encoder.model.device, "Evaluation", variants, args.rerank > 0, budget
    )
    budget.judge_whole()
    templates = templates_of([classes.column for classes in evaluation.classes], args.templates)
    embeds_of = [
        class_embeddings(
            encoder.model,
            encoder.tokenizer,
            classes.names,
            templates[classes.column],
            encoder.model.device,
            _length(encoder, data_args),
        )
        for classes in evaluation.classes
    ]
    results = []
    for encoded in variants_encoded:
        metrics: dict[str, float] = {}
        if evaluation.captioned:
            metrics |= retrieval_metrics(
                encoded.image_embeds, encoded.text_embeds, encoded.caption_image, encoded.caption_ids
            )
        for number, (classes, embeds) in enumerate(zip(evaluation.classes, embeds_of, strict=True)):
            labels = encoded_labels(evaluation, encoded, number)
            number_of = {name: n for n, name in enumerate(classes.names)}
            class_ids = torch.tensor([number_of[name] for name in classes.names])
            found = zero_shot_metrics(encoded.image_embeds, labels, embeds, class_ids)
            metrics |= {f"zero_shot_{classes.column}_{name}": value for name, value in found.items()}
        results.append((metrics, encoded))
    return results


def encoded_labels(evaluation: Evaluation, encoded: EncodedPairs, number: int) -> torch.Tensor:
    """The labels `(I,)` of the images that were encoded, of one column."""
    if encoded.labels is not None:
        return encoded.labels[:, number]
    return labels_of(evaluation.rows, evaluation.classes[number], encoded.image_rows)


def rerank_metrics(encoder: Encoder, encoded: EncodedPairs, args: EvaluationArguments) -> dict[str, float]:
    """`..._reranked_recall@k`: recall when the first candidates are ordered anew by their tokens too."""
    found = retrieval_metrics(
        encoded.image_embeds,
        encoded.text_embeds,
        encoded.caption_image,
        encoded.caption_ids,
        args.rerank,
        token_rescore(encoder.model, encoded, args.rerank_weight),
    )
    return {name.replace("recall", "reranked_recall"): value for name, value in found.items()}


def probe_metrics(
    encoder: Encoder, evaluation: Evaluation, encoded: EncodedPairs, args: EvaluationArguments
) -> dict[str, float]:
    """Accuracies of classifiers on frozen features, trained on the train split."""
    rows = evaluation.train
    assert isinstance(rows, Dataset)
    # Step (1): the images to train on: all, or those alone that some draw takes
    labels = [labels_of(rows, classes, torch.arange(len(rows))) for classes in evaluation.classes]
    needed = torch.arange(len(rows))
    if not args.linear_probe:
        drawn = [  # with spare ones, which take the places of those that turn out broken
            draw_shots(own, max(args.shots), seed, classes.names, spare=SPARE_SHOTS)
            for own, classes in zip(labels, evaluation.classes, strict=True)
            for seed in range(args.seeds)
        ]
        needed = torch.cat(drawn).unique()
    # Step (2): their features
    chosen = rows.select(needed.tolist())
    items = labelled_images(encoder, chosen, evaluation.image_column, evaluation.classes)
    budget = SkipBudget(args.skip_budget, len(needed))
    dataloader = _dataloader(items, LabelCollator(), args)
    trained = encode_pairs(encoder.model, dataloader, encoder.model.device, "Train split", budget=budget)
    assert trained.labels is not None
    # Step (3): classifiers by each column
    metrics: dict[str, float] = {}
    for number, classes in enumerate(evaluation.classes):
        lost = set(labels[number].tolist()) - set(trained.labels[:, number].tolist())
        if lost:
            raise ValueError(
                f"Not one image of {classes.column} {classes.names[min(lost)]!r} in the train split can be used: "
                f"{'; '.join(trained.skipped[:3])}. Repair them, or remove the class."
            )
        features = (
            trained.image_embeds,
            trained.labels[:, number],
            encoded.image_embeds,
            encoded_labels(evaluation, encoded, number),
            len(classes.names),
        )
        if args.linear_probe:
            found = linear_probe(*features)
            metrics |= {f"linear_probe_{classes.column}_{name}": value for name, value in found.items()}
        for shots in args.shots:
            rows_of = needed[trained.image_rows]
            found = few_shot(*features, shots=shots, seeds=args.seeds, rows=rows_of, names=classes.names)
            metrics |= {f"few_shot_{classes.column}_{shots}_shots_{name}": value for name, value in found.items()}
    return metrics


# 3. The command

COLUMNS = {"@1": "@1", "@5": "@5", "@10": "@10", "_mean_per_class_accuracy": "mean per class", "_spread": "±"}


def metrics_table(metrics: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each metric with its values at 1, 5 and 10, the mean over classes and the spread over draws."""
    rows: dict[str, dict[str, Any]] = {}
    for name, value in metrics.items():
        for ending, column in COLUMNS.items():
            if name.endswith(ending):
                what = name.removesuffix(ending)
                what += "_accuracy" if ending == "_mean_per_class_accuracy" else ""
                rows.setdefault(what, {"metric": what.replace("_", " ")})[column] = value
    return list(rows.values())


def dataset_of(args: DataArguments) -> str:
    """What the data set is called."""
    return str(args.dataset_name or args.data_dir or args.validation_file or args.train_file)


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        (EncoderArguments, DataArguments, EvaluationArguments),
        prog="mlip evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    encoder_args, data_args, args = parser.parse_args_into_dataclasses(arguments)
    # Step (1): what is cheap to refuse
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
    # Step (2): the model, the data, the metrics
    encoder = load_encoder(encoder_args.model_name_or_path, encoder_args.dtype, encoder_args.attn_implementation)
    set_merging(encoder, args.merge_ratio)
    evaluation = load_evaluation(encoder, data_args, args)
    metrics, encoded = evaluate_split(encoder, evaluation, data_args, args)
    # Step (3): what people and the model card read
    print(format_table(metrics_table(metrics)))
    print(
        f"\n{evaluation.split} split: {len(encoded.image_embeds)} images, {len(encoded.text_embeds)} captions, "
        f"{len(encoded.skipped)} skipped, {encoded.num_truncated} captions truncated; "
        f"merge ratio {encoder.merge_ratio}"
    )
    results = {
        "model": encoder.name,
        "dataset": dataset_of(data_args),
        "split": evaluation.split,
        "merge_ratio": encoder.merge_ratio,
        "images": len(encoded.image_embeds),
        "captions": len(encoded.text_embeds),
        **metrics,
    }
    if args.output_file is not None:
        write_atomically(args.output_file, json.dumps(results, indent=2) + "\n")
    if args.update_model_card:
        print(f"Added to {add_to_model_card(encoder_args.model_name_or_path, results)}.")


if __name__ == "__main__":
    main()
