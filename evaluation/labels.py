# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Class labels of a data set: their columns, their names, and labelled images as batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset
from torch import Tensor

from modeling_mlip.data.items import one_line, read_image_cell, undecoded

LABEL_COLUMNS = ("label", "labels", "class", "classes", "class_name", "category", "target", "fine_label", "cls")


def find_label_columns(dataset: Dataset | IterableDataset, label_columns: Sequence[str] = ()) -> list[str]:
    """The columns of class labels.

    Args:
        label_columns: names to use. Without them, every column with a ClassLabel feature is returned; without such a
            column, the first one with a usual name (`LABEL_COLUMNS`).

    Raises:
        ValueError: if there is no such column.
    """
    columns = dict(dataset.features or next(iter(dataset), {}))
    listed = f"the columns are {', '.join(columns)}"
    for name in label_columns:
        if name not in columns:
            raise ValueError(f"label_columns={name}: no such column; {listed}.")
    names = list(label_columns) or [name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    names = names or [name for name in LABEL_COLUMNS if name in columns][:1]
    if not names:
        raise ValueError(
            f"No column of class labels with a usual name or a ClassLabel feature: {listed}; choose one with "
            "label_columns=NAME, or a column of captions with caption_column=NAME."
        )
    return names


@dataclass
class Classes:
    """The classes of one label column.

    Args:
        column: name of the column.
        names: C class names, as prompts contain them.
        index: value in the column -> index of its class in `names`.
    """

    column: str
    names: list[str]
    index: dict[Any, int]

    def label_of(self, value: Any) -> int:
        """The class index of a value.

        Raises:
            ValueError: if the value is not a class.
        """
        if value not in self.index:
            known = ", ".join(map(repr, list(self.index)[:5]))
            raise ValueError(f"{self.column}={value!r} is none of the {len(self.names)} classes ({known} ...)")
        return self.index[value]

    @property
    def name_ids(self) -> Tensor:
        """(C,) long, equal for classes with equal names: ImageNet has two classes "missile"."""
        number_of = {name: n for n, name in enumerate(self.names)}
        return torch.tensor([number_of[name] for name in self.names])


def read_classes(
    splits: Sequence[Dataset | IterableDataset], column: str, class_names: Sequence[str] | None = None
) -> Classes:
    """The classes of a column, from its ClassLabel feature, from `class_names`, or from the strings in all splits.

    Args:
        splits: the whole splits of one data set; those without the column are ignored.
        class_names: replace the names of a ClassLabel, in its order; for numbers, the names from class 0 on.

    Raises:
        ValueError: if the names are unknown, differ between splits, are fewer than two, or do not match the number of
            classes.
    """
    classes = _read_classes([rows for rows in splits if column in (rows.features or {column})], column, class_names)
    if len(classes.names) < 2:
        raise ValueError(
            f"{column} has {len(classes.names)} class(es) ({', '.join(classes.names)}), and classification needs two "
            "or more; name all classes with class_names=NAMES."
        )
    return classes


def _read_classes(
    splits: Sequence[Dataset | IterableDataset], column: str, class_names: Sequence[str] | None
) -> Classes:
    features = [(rows.features or {}).get(column) for rows in splits]
    feature = features[0]
    if any(other != feature for other in features):
        raise ValueError(
            f"{column} is not the same in every split: {' and '.join(map(str, features))}; give every split the same "
            "classes in the same order."
        )
    if isinstance(feature, datasets.ClassLabel):
        names = [name.replace("_", " ") for name in feature.names]
        if class_names is not None and len(class_names) != len(names):
            raise ValueError(
                f"class_names has {len(class_names)} names, and {column} has {len(names)} classes "
                f"({', '.join(feature.names[:5])} ...); give one name for each, in this order."
            )
        return Classes(column, list(class_names or names), {n: n for n in range(len(names))})
    tables = [rows for rows in splits if isinstance(rows, Dataset)]
    if not tables:
        if class_names is None:
            raise ValueError(
                f"The classes of {column} are not known before a stream is read; give them with class_names=NAMES, or "
                "do not stream."
            )
        return Classes(column, list(class_names), _index_of(class_names))
    if not isinstance(feature, datasets.Value):
        raise ValueError(f"{column} holds {feature}; a class label is a ClassLabel, a string or a number.")
    values = {value for rows in tables for value in rows.unique(column)} - {None}
    if all(isinstance(value, int) for value in values):
        if class_names is None:
            raise ValueError(
                f"{column} holds numbers without names; give the names from class 0 on with class_names=NAMES."
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
    """Maps each name and each number to the class, for columns of either kind."""
    return {name: n for n, name in enumerate(names)} | {n: n for n in range(len(names))}


def labels_of(dataset: Dataset, classes: Classes, rows: Tensor) -> Tensor:
    """The labels `(R,)` of the rows `(R,)`.

    Raises:
        ValueError: if the value of a row is not a class.
    """
    values = dataset.select_columns([classes.column])[:][classes.column]
    labels = []
    for row in rows.tolist():
        try:
            labels.append(classes.label_of(values[row]))
        except ValueError as error:
            raise ValueError(f"Row {row}: {error}.") from None
    return torch.tensor(labels, dtype=torch.long)


class _Labelled:
    """The item of one row: {"pixel_values": float (3, H, W), "labels": C class indices}.

    A row that cannot be used gives {"where": str, "error": str}.
    """

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
        """The item of a row; `where` names the row in reports of skipped rows."""
        try:
            labels = [kind.label_of(row[kind.column]) for kind in self.classes]
            image, _ = read_image_cell(row[self.image_column])
        except Exception as error:
            return {"where": where, "error": one_line(error)}
        return {"pixel_values": self.transform(image), "labels": labels}


class LabelledImages(_Labelled, torch.utils.data.Dataset):
    """Items of a table, by index."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(self.dataset[index], f"row {index}")


class StreamedLabelledImages(_Labelled, torch.utils.data.IterableDataset):
    """Items of a stream, in order."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        info = torch.utils.data.get_worker_info()
        for count, row in enumerate(self.dataset):
            yield self.item(row, f"row {count} of worker {info.id if info else 0}")


class LabelCollator:
    """Items to a batch of B images.

    pixel_values float (B, 3, H, W); labels int64 (B, C); kept int64 (B,), the place of each image among the items;
    skipped, a list of "where: why" for the other items.
    """

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        kept = [place for place, item in enumerate(items) if "error" not in item]
        return {
            "pixel_values": torch.stack([items[place]["pixel_values"] for place in kept]) if kept else torch.empty(0),
            "labels": torch.tensor([items[place]["labels"] for place in kept], dtype=torch.long),
            "kept": torch.tensor(kept, dtype=torch.long),
            "skipped": [f"{item['where']}: {item['error']}" for item in items if "error" in item],
            "num_truncated": 0,
        }
