# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

from typing import Any

import datasets
from datasets import Dataset, IterableDataset

# Usual names, the likeliest first; upper or lower case.
IMAGE_COLUMNS = (
    *("image", "img", "images", "jpg", "jpeg", "png", "webp"),
    *("image_path", "image_file", "file_name", "filename", "filepath", "file_path", "path"),
)


CAPTION_COLUMNS = (
    *("caption", "captions", "text", "texts", "txt", "sentence", "sentences"),
    *("description", "descriptions", "raw", "alt_text", "title"),
)


def find_columns(
    dataset: Dataset | IterableDataset, image_column: str | None = None, caption_column: str | None = None
) -> tuple[str, str]:
    """The names of the image and the caption column, by flag or by their usual names.

    A caption inside a struct, such as the json of a webdataset, is named "json.caption".
    """
    columns = _columns(dataset)
    inner = {
        f"{outer}.{name}": kind
        for outer, names in columns.items()
        if isinstance(names, dict)
        for name, kind in names.items()
    }
    image = find_image_column(dataset, image_column)
    caption = _find("caption", caption_column, CAPTION_COLUMNS, columns | inner)
    kind = (columns | inner)[caption]
    if dataset.features is not None and not _holds_text(kind):
        raise ValueError(
            f"The caption column {caption} holds {kind}: choose one of strings or lists of strings with "
            "--caption_column."
        )
    return image, caption


def find_image_column(dataset: Dataset | IterableDataset, image_column: str | None = None) -> str:
    """The name of the image column, by flag or by its usual names."""
    return _find("image", image_column, IMAGE_COLUMNS, _columns(dataset))


def _columns(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    # A stream of csv or json knows its columns from its first row alone.
    return dict(dataset.features or next(iter(dataset), {}))


def _find(role: str, flag: str | None, usual: tuple[str, ...], columns: dict[str, Any]) -> str:
    listed = f"the columns are {', '.join(columns)}"
    if flag is not None:
        if flag not in columns:
            raise ValueError(f"--{role}_column {flag}: no such column; {listed}.")
        return flag
    by_name = {name.rsplit(".")[-1].lower(): name for name in columns} | {name.lower(): name for name in columns}
    found = [by_name[name] for name in usual if name in by_name]
    if not found:
        raise ValueError(f"No {role} column with a usual name: {listed}; choose one with --{role}_column.")
    return found[0]


def _holds_text(feature: Any) -> bool:
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "binary")
