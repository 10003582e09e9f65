# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`EvaluationSplit`: the rows to evaluate, with their columns and classes checked before anything is encoded."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader

from modeling_mlip.data.collators import EvaluationCollator
from modeling_mlip.data.columns import find_columns, find_image_column
from modeling_mlip.data.items import PairDataset, StreamedPairDataset
from modeling_mlip.data.skip_budget import SkipBudget
from modeling_mlip.data.sources import VALIDATION_SPLITS, first_rows

from .encoders import Encoder
from .labels import Classes, LabelCollator, LabelledImages, StreamedLabelledImages, find_label_columns, read_classes

Rows: TypeAlias = Dataset | IterableDataset
MIN_SEQ_LENGTH = 3  # BOS, one token, EOS


@dataclass(frozen=True)
class LoadingOptions:
    """How images are read.

    Args:
        batch_size: images per batch; the results do not depend on it.
        num_workers: processes that decode images.
        skip_budget: share of rows that may be skipped because they cannot be read.

    Raises:
        ValueError: for a value out of range.
    """

    batch_size: int = 128
    num_workers: int = 0
    skip_budget: float = 0.01

    def __post_init__(self):
        for name, least in (("batch_size", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: choose {least} or more.")
        if not 0 <= self.skip_budget <= 1:
            raise ValueError(f"skip_budget={self.skip_budget}: choose a share from 0 to 1.")

    def dataloader(self, items: Any, collate_fn: Callable) -> DataLoader:
        """Batches of items, in order."""
        return DataLoader(items, batch_size=self.batch_size, collate_fn=collate_fn, num_workers=self.num_workers)

    def new_budget(self, rows: Rows) -> SkipBudget:
        """A budget for one pass over the rows."""
        return SkipBudget(self.skip_budget, len(rows) if isinstance(rows, Dataset) else None)


@dataclass(frozen=True)
class EvaluationSplit:
    """A split that is ready to be encoded.

    Args:
        rows: the rows of the split.
        name: name of the split, if known.
        dataloader: batches for `encode_pairs`, with captions if `is_captioned`, else with labels.
        is_captioned: whether captions are read.
        classes: the classes of each label column.
        train: the split to train classifiers on, if there is one.
        image_column: name of the column of images.
        max_seq_length: longest caption or prompt in tokens.
        loading: how images are read.
    """

    rows: Rows
    name: str | None
    dataloader: DataLoader
    is_captioned: bool
    classes: list[Classes]
    train: Rows | None
    image_column: str
    max_seq_length: int
    loading: LoadingOptions

    @property
    def label_columns(self) -> list[str]:
        """The names of the label columns."""
        return [classes.column for classes in self.classes]

    @property
    def train_table(self) -> Dataset:
        """The train split.

        Raises:
            ValueError: if there is none, or it is a stream.
        """
        if not isinstance(self.train, Dataset):
            raise ValueError("Classifiers need a train split that is not streamed, beside the split to evaluate.")
        return self.train


def choose_split(dataset: Rows | Mapping[str, Rows], split: str | None = None) -> tuple[str | None, dict[str, Rows]]:
    """The name of the split to evaluate, and all splits by name.

    Args:
        dataset: one split, or several by name.
        split: the split to evaluate; without it the first of validation, val, valid, dev and test that exists, else
            train.

    Raises:
        ValueError: if there is no such split.
    """
    if not isinstance(dataset, Mapping):
        name = split or (str(dataset.split) if dataset.split is not None else None)
        return name, {name or "": dataset}
    splits = dict(dataset)
    usual = [name for name in (*VALIDATION_SPLITS, "train") if name in splits]
    name = split or (usual[0] if usual else None)
    if name not in splits:
        asked = f"split={split!r}: no such split" if split else "No split has a usual name"
        raise ValueError(f"{asked}; the data set has {', '.join(map(repr, splits))}: choose one with split=NAME.")
    return name, splits


def prepare_split(
    encoder: Encoder,
    dataset: Rows | Mapping[str, Rows],
    *,
    with_captions: bool,
    with_labels: bool,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_columns: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
    max_seq_length: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    loading: LoadingOptions | None = None,
) -> EvaluationSplit:
    """Finds the columns and the classes of a split, and makes its batches.

    Classes are those of the whole data set, even if only its first rows are evaluated.

    Args:
        dataset: the rows to evaluate, or splits by name, as in `choose_split`.
        with_captions: read captions. Rows with captions and the same image then count as one image.
        with_labels: read class labels. Beside captions `label_columns` must name their columns.
        image_column, caption_column: found by their usual names if not given.
        label_columns: found by their ClassLabel feature or their usual names if not given.
        class_names: names of the classes of the only label column.
        max_seq_length: longest caption in tokens, BOS and EOS included; the model's context if not given.
        max_train_samples, max_eval_samples: use only the first rows of the train split and of the evaluated split.

    Raises:
        ValueError: for a column, a split, a name or a length that does not exist or fit.
    """
    loading = loading or LoadingOptions()
    name, splits = choose_split(dataset, split)
    whole = splits[name or ""]
    train = splits["train"] if name != "train" and "train" in splits else None
    is_train_split = isinstance(dataset, Mapping) and name == "train"
    limits = {"max_train_samples": max_train_samples, "max_eval_samples": max_eval_samples}
    limit_name = "max_train_samples" if is_train_split else "max_eval_samples"
    rows = first_rows(whole, limit_name, limits[limit_name])
    length = _check_length(encoder, max_seq_length)
    image_column = find_image_column(whole, image_column)
    classes = _find_classes(list(splits.values()), whole, with_captions, with_labels, label_columns, class_names)
    if with_captions:
        pair_class: Any = PairDataset if isinstance(rows, Dataset) else StreamedPairDataset
        columns = find_columns(whole, image_column, caption_column)
        items = pair_class(rows, *columns, transform=encoder.transform, training=False, seed=0)
        collate_fn: Callable = EvaluationCollator(encoder.tokenizer, length)
    else:
        items = label_images(encoder, rows, image_column, classes)
        collate_fn = LabelCollator()
    return EvaluationSplit(
        rows=rows,
        name=name,
        dataloader=loading.dataloader(items, collate_fn),
        is_captioned=with_captions,
        classes=classes,
        train=None if train is None else first_rows(train, "max_train_samples", max_train_samples),
        image_column=image_column,
        max_seq_length=length,
        loading=loading,
    )


def label_images(
    encoder: Encoder, rows: Rows, image_column: str, classes: Sequence[Classes]
) -> LabelledImages | StreamedLabelledImages:
    """The items of rows with class labels."""
    item_class = StreamedLabelledImages if isinstance(rows, IterableDataset) else LabelledImages
    return item_class(rows, image_column, classes, encoder.transform)


def _find_classes(
    splits: Sequence[Rows],
    rows: Rows,
    with_captions: bool,
    with_labels: bool,
    label_columns: Sequence[str],
    class_names: Sequence[str] | None,
) -> list[Classes]:
    """The classes of each label column; none if labels are not read."""
    if with_labels and with_captions and not label_columns:
        raise ValueError("Class labels beside captions: choose their columns with label_columns=NAME.")
    if label_columns and not with_labels:
        raise ValueError(
            f"label_columns={list(label_columns)}: none of the tasks reads class labels; add one that does, such as "
            "zero_shot."
        )
    columns = find_label_columns(rows, label_columns) if with_labels else []
    if columns and with_captions and isinstance(rows, IterableDataset):
        raise ValueError(
            "Labels beside captions cannot be read from a stream; do not stream, or leave out label_columns."
        )
    if class_names is not None and len(columns) != 1:
        raise ValueError(
            f"class_names names the classes of one column, and {len(columns)} are classified "
            f"({', '.join(columns) or 'no label is read'}); choose one with label_columns=NAME."
        )
    return [read_classes(splits, column, class_names) for column in columns]


def _check_length(encoder: Encoder, max_seq_length: int | None) -> int:
    length = encoder.context if max_seq_length is None else max_seq_length
    if not MIN_SEQ_LENGTH <= length <= encoder.context:
        raise ValueError(
            f"max_seq_length={length}: {encoder.name} takes {MIN_SEQ_LENGTH} (BOS, one token, EOS) to "
            f"{encoder.context} tokens."
        )
    return length
