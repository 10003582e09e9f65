# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Columns of images and captions: find their names in a data set, and read their cells.

A column inside a struct is named with dots: "json.caption" is the field "caption" of the struct "json". The same
functions name a column and read it, and a flat column whose own name holds a dot comes first.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
from datasets import Dataset, IterableDataset
from PIL import Image

# The usual names, the most likely first; upper or lower case.
IMAGE_COLUMNS = (
    *("image", "img", "images", "jpg", "jpeg", "png", "webp"),
    *("image_path", "image_file", "file_name", "filename", "filepath", "file_path", "path"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "texts", "txt", "sentence", "sentences"),
    *("description", "descriptions", "raw", "alt_text", "title"),
)
TEXT_TYPES = ("string", "large_string", "string_view", "binary", "large_binary")


# Finding


def find_columns(
    dataset: Dataset | IterableDataset, image_column: str | None = None, caption_column: str | None = None
) -> tuple[str, str]:
    """Return the names of the image column and the caption column.

    Args:
        image_column: the name to use instead of the usual ones.
        caption_column: the same for the captions.

    Raises:
        ValueError: if there is no such column, or it does not hold images or captions.
    """
    image = find_image_column(dataset, image_column)
    caption = find_caption_column(dataset, caption_column)
    if caption is None:
        raise ValueError(
            f"No caption column with a usual name: {_format_columns(dataset)}; choose one with caption_column=NAME."
        )
    return image, caption


def find_image_column(dataset: Dataset | IterableDataset, image_column: str | None = None) -> str:
    """Return the name of the image column.

    Raises:
        ValueError: if there is no such column, or it does not hold one image per row.
    """
    columns = _flat_columns(dataset)
    if image_column is not None:
        _check_name(dataset, "image_column", image_column, columns)
        candidates = [image_column]
    else:
        candidates = _usual_columns(IMAGE_COLUMNS, columns)
    if not candidates:
        raise ValueError(
            f"No image column with a usual name: {_format_columns(dataset)}; choose one with image_column=NAME."
        )
    usable = [name for name in candidates if _holds_image(columns[name])]
    if not usable:
        raise ValueError(
            f"The image column {candidates[0]} holds {_describe(columns[candidates[0]])}: choose one with a single "
            "image, path or URL per row with image_column=NAME."
        )
    return usable[0]


def find_caption_column(
    dataset: Dataset | IterableDataset, caption_column: str | None = None, parameter: str = "caption_column"
) -> str | None:
    """Return the name of the caption column, or None if none has a usual name.

    Args:
        parameter: what messages call `caption_column`.

    Raises:
        ValueError: if `caption_column` is not a column, or the column does not hold text.
    """
    columns = list_columns(dataset)
    if caption_column is not None:
        _check_name(dataset, parameter, caption_column, columns)
        candidates = [caption_column]
    else:
        candidates = _usual_columns(CAPTION_COLUMNS, columns)
    if not candidates:
        return None
    if not _holds_text(columns[candidates[0]]):
        raise ValueError(
            f"The caption column {candidates[0]} holds {_describe(columns[candidates[0]])}: choose one of strings or "
            f"lists of strings with {parameter}=NAME."
        )
    return candidates[0]


def list_columns(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    """Map the name of each column, and of each field inside a struct, to its feature.

    A stream of csv or json files has no features; there the values are those of its first row.
    """
    columns = _flat_columns(dataset)
    inner = {
        f"{outer}.{name}": kind
        for outer, fields in columns.items()
        if isinstance(fields, dict)
        for name, kind in _fields(fields)
    }
    return columns | {name: kind for name, kind in inner.items() if name not in columns}


def _fields(struct: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, kind in struct.items():
        yield name, kind
        if isinstance(kind, dict):
            yield from ((f"{name}.{inner}", inner_kind) for inner, inner_kind in _fields(kind))


def _flat_columns(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    return dict(dataset.features or next(iter(dataset), {}))


def _format_columns(dataset: Dataset | IterableDataset) -> str:
    return f"the columns are {', '.join(_flat_columns(dataset))}"


def _check_name(dataset: Dataset | IterableDataset, parameter: str, name: str, columns: dict[str, Any]) -> None:
    if name not in columns:
        raise ValueError(f"{parameter}={name}: no such column; {_format_columns(dataset)}.")


def _usual_columns(usual: tuple[str, ...], columns: dict[str, Any]) -> list[str]:
    """Return the columns with usual names, the most likely first; a whole name comes before a struct's field."""
    by_name = {name.rsplit(".")[-1].lower(): name for name in columns} | {name.lower(): name for name in columns}
    return [by_name[name] for name in usual if name in by_name]


def _holds_image(kind: Any) -> bool:
    """Whether a feature, or the value in the first row of a stream, can be one image."""
    if isinstance(kind, datasets.Value):
        return kind.dtype in TEXT_TYPES or kind.dtype == "null"
    if isinstance(kind, dict):
        return not kind.keys().isdisjoint(("bytes", "path"))
    return kind is None or isinstance(kind, (datasets.Image, str, bytes, Image.Image))


def _holds_text(kind: Any) -> bool:
    """Whether a feature, or the value in the first row of a stream, can be captions."""
    if isinstance(kind, (datasets.List, datasets.LargeList)):
        kind = kind.feature
    if isinstance(kind, list):
        return all(value is None or isinstance(value, (str, bytes)) for value in kind)
    if isinstance(kind, datasets.Value):
        return kind.dtype in TEXT_TYPES
    return kind is None or isinstance(kind, (str, bytes))


def _describe(kind: Any) -> str:
    """Describe a feature, or a value in the first row of a stream."""
    if isinstance(kind, (str, bytes, int, float, list, tuple)):
        return f"values of type {type(kind).__name__}"
    return " ".join(str(kind).split())


# Reading


def outer_column(columns: Mapping[str, Any], column: str) -> str:
    """Return the flat column that holds `column`: the column itself, or the struct around it."""
    if column in columns:
        return column
    outer = [name for name in columns if column.startswith(f"{name}.")]
    if not outer:
        raise KeyError(column)
    return max(outer, key=len)


def get_cell(row: Mapping[str, Any] | None, column: str) -> Any:
    """Return the value of a row in a column that `list_columns` names; None inside a struct that is missing."""
    if row is None:
        return None
    outer = outer_column(row, column)
    return row[outer] if outer == column else get_cell(row[outer], column.removeprefix(f"{outer}."))


def read_captions(value: Any) -> list[str]:
    """Return the captions in one cell: a string, its bytes, or a list of these. Empty captions are left out.

    Raises:
        TypeError: if a caption is not text.
        UnicodeDecodeError: if the bytes are not UTF-8.
    """
    values = value if isinstance(value, list) else [] if value is None else [value]
    captions = [
        caption.decode() if isinstance(caption, bytes) else caption for caption in values if caption is not None
    ]
    for caption in captions:
        if not isinstance(caption, str):
            raise TypeError(f"a caption is of type {type(caption).__name__}, not a string")
    return [caption.strip() for caption in captions if caption.strip()]


def iterate_captions(dataset: Dataset | IterableDataset, column: str) -> Iterator[str]:
    """Iterate over all captions of a data set without decoding its images.

    Cells that `read_captions` refuses are left out; the data set of pairs counts them as skipped.

    Args:
        column: the name of the caption column, as `find_columns` returns it.
    """
    for row in dataset.select_columns([outer_column(_flat_columns(dataset), column)]):
        try:
            captions = read_captions(get_cell(row, column))
        except (TypeError, UnicodeDecodeError):
            continue
        yield from captions
