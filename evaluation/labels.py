# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from modeling_mlip.data.items import one_line, read_image, undecoded

LABEL_COLUMNS = ("label", "labels", "class", "classes", "class_name", "category", "target", "fine_label", "cls")


def find_label_columns(dataset: Dataset | IterableDataset, wanted: Sequence[str]) -> list[str]:
    """The columns of class labels: those wanted, else every ClassLabel, else the first of a usual name.

    Raises:
        ValueError: if there is none, or none of a name wanted.
    """
    columns = dict(dataset.features or next(iter(dataset), {}))
    listed = f"the columns are {', '.join(columns)}"
    for name in wanted:
        if name not in columns:
            raise ValueError(f"label_columns={name}: no such column; {listed}.")
    found = list(wanted) or [name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    found = found or [name for name in LABEL_COLUMNS if name in columns][:1]
    if not found:
        raise ValueError(
            f"There is neither a caption nor a class label in this data set: {listed}; choose with --label_columns or "
            "--caption_column."
        )
    return found


@dataclass
class Classes:
    """The classes of one label column.

    Args:
        column: its name.
        names: C class names.
        index: value in the column -> index of its name.
    """

    column: str
    names: list[str]
    index: dict[Any, int]

    def label_of(self, value: Any) -> int:
        """The index of a value.

        Raises:
            ValueError: for one that is no class.
        """
        if value not in self.index:
            known = ", ".join(map(repr, list(self.index)[:5]))
            raise ValueError(f"{self.column}={value!r} is none of the {len(self.names)} classes ({known} ...)")
        return self.index[value]


def read_classes(
    splits: Sequence[Dataset | IterableDataset], column: str, class_names: Sequence[str] | None = None
) -> Classes:
    """The classes of a column: of its ClassLabel, of the names given, or of the strings that it holds in any split.

    Args:
        splits: of one data set, whole; those without the column do not count.
        class_names: instead of those of a ClassLabel, in its order; for numbers, in the order from 0.

    Raises:
        ValueError: if the names are not known, differ between splits, are fewer than two, or as many as there are
            classes.
    """
    classes = _read_classes([rows for rows in splits if column in (rows.features or {column})], column, class_names)
    if len(classes.names) < 2:
        raise ValueError(
            f"{column} has {len(classes.names)} class(es) ({', '.join(classes.names)}), and choosing needs two or "
            "more; name all of them as --class_names."
        )
    return classes


def _read_classes(
    splits: Sequence[Dataset | IterableDataset], column: str, class_names: Sequence[str] | None
) -> Classes:
    features = [(rows.features or {}).get(column) for rows in splits]
    feature = features[0]
    if any(other != feature for other in features):
        raise ValueError(
            f"{column} is not the same in every split: {' and '.join(map(str, features))}; give all the same classes, "
            "in the same order."
        )
    if isinstance(feature, datasets.ClassLabel):
        names = [name.replace("_", " ") for name in feature.names]
        if class_names is not None and len(class_names) != len(names):
            raise ValueError(
                f"--class_names has {len(class_names)} names, and {column} has {len(names)} classes "
                f"({', '.join(feature.names[:5])} ...); give one in each line, in this order."
            )
        return Classes(column, list(class_names or names), {n: n for n in range(len(names))})
    tables = [rows for rows in splits if isinstance(rows, Dataset)]
    if not tables:
        if class_names is None:
            raise ValueError(
                f"A stream does not tell the classes of {column} in advance; give them as --class_names, or leave out "
                "--streaming."
            )
        return Classes(column, list(class_names), _index_of(class_names))
    if not isinstance(feature, datasets.Value):
        raise ValueError(f"{column} holds {feature}; a class label is a ClassLabel, a string or a number.")
    values = {value for rows in tables for value in rows.unique(column)} - {None}
    if all(isinstance(value, int) for value in values):
        if class_names is None:
            raise ValueError(
                f"{column} holds numbers without names; give a file of names, one in each line from class 0 on, as "
                "--class_names."
            )
        return Classes(column, list(class_names), {n: n for n in range(len(class_names))})
    if not all(isinstance(value, str) for value in values):
        kinds = sorted({type(value).__name__ for value in values})
        raise ValueError(f"{column} holds {', '.join(kinds)}; a class label is a ClassLabel, a string or a number.")
    if class_names is not None:
        return Classes(column, list(class_names), _index_of(class_names))
    ordered = sorted(values)
    return Classes(column, [name.replace("_", " ") for name in ordered], _index_of(ordered))


def _index_of(names: Sequence[str]) -> dict[Any, int]:
    """Both a name and its number, for columns whose kind is not known."""
    return {name: n for n, name in enumerate(names)} | {n: n for n in range(len(names))}


def labels_of(dataset: Dataset, classes: Classes, rows: Tensor) -> Tensor:
    """The labels of some rows `(R,)`.

    Raises:
        ValueError: for a row without one.
    """
    values = dataset.select_columns([classes.column])[:][classes.column]
    found = []
    for row in rows.tolist():
        try:
            found.append(classes.label_of(values[row]))
        except ValueError as error:
            raise ValueError(f"Row {row}: {error}.") from None
    return torch.tensor(found, dtype=torch.long)


class _Labelled:
    """Makes the item of one row: {"pixel_values": float (3, H, W), "labels": C indices}, or {"where", "error"}."""

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        image_column: str,
        classes: Sequence[Classes],
        transform: Callable[[Any], Tensor],
    ):
        self.dataset = undecoded(dataset.select_columns([image_column, *(kind.column for kind in classes)]))
        self.image_column = image_column
        self.classes = classes
        self.transform = transform

    def item(self, row: dict[str, Any], where: str) -> dict[str, Any]:
        value = row[self.image_column]
        value = value if isinstance(value, dict) else {"path": value} if isinstance(value, str) else {"bytes": value}
        try:
            labels = [kind.label_of(row[kind.column]) for kind in self.classes]
            image = read_image(value.get("bytes"), value.get("path"))
        except Exception as error:
            return {"where": where, "error": one_line(error)}
        return {"pixel_values": self.transform(image), "labels": labels}


class LabelledImages(_Labelled, torch.utils.data.Dataset):
    """Items by index."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(self.dataset[index], f"row {index}")


class StreamedLabelledImages(_Labelled, torch.utils.data.IterableDataset):
    """Items of a stream."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        for count, row in enumerate(self.dataset):
            yield self.item(row, f"row {count} of worker {info.id if info else 0}")


class LabelCollator:
    """Items to a batch of B images: pixel_values float (B, 3, H, W), labels int64 (B, C), kept int64 (B,): the place
    of each image among the items, and skipped, "where: why" of the others."""

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        kept = [place for place, item in enumerate(items) if "error" not in item]
        return {
            "pixel_values": torch.stack([items[place]["pixel_values"] for place in kept]) if kept else torch.empty(0),
            "labels": torch.tensor([items[place]["labels"] for place in kept], dtype=torch.long),
            "kept": torch.tensor(kept, dtype=torch.long),
            "skipped": [f"{item['where']}: {item['error']}" for item in items if "error" in item],
            "num_truncated": 0,
        }
