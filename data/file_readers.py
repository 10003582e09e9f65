# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Read lists of files of one kind: text tables, parquet files and tar shards, each row read or counted."""

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, IterableDataset

from .columns import find_image_column
from .items import one_line, undecoded
from .source_files import data_files
from .table_files import CSV_OPTIONS, check_table, count_lines, read_repaired_table, report_lone_quotes
from .tar_shards import load_tar_shards

# Extension -> the builder of datasets that reads it, and its options.
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", CSV_OPTIONS),
    ".tsv": ("csv", {**CSV_OPTIONS, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
}
EXTENSIONS = (*TABLES, ".tar")


@dataclass(frozen=True)
class ReadOptions:
    """How a source is read.

    Args:
        image_column, streaming, captioned: the arguments of `load_splits`.
        is_metadata: whether the tables are metadata files of a folder of images.
    """

    image_column: str | None
    streaming: bool
    captioned: bool
    is_metadata: bool = False


def load_files(
    options: ReadOptions, source: str, paths: Sequence[Path], root: Path | None = None
) -> Dataset | IterableDataset:
    """Load files of one kind; image paths in a table are relative to `root`, or else to the folder of the table."""
    loaded = []
    for folder, group in itertools.groupby(paths, key=lambda path: root or path.parent):
        dataset = _load_files_of_folder(options, source, list(group))
        if options.is_metadata:
            dataset = _rename_file_names(dataset)
        if not is_empty(dataset):
            loaded.append(with_absolute_paths(folder, dataset, options.image_column))
    if not loaded:
        raise ValueError(f"{source}: holds no pairs.")
    return datasets.concatenate_datasets(loaded)


def _load_files_of_folder(options: ReadOptions, source: str, paths: list[Path]) -> Dataset | IterableDataset:
    extension = paths[0].suffix.lower()
    if extension == ".tar":
        with readable(source):
            return load_tar_shards([str(path) for path in paths], options.streaming)
    builder, builder_options = TABLES[extension]
    num_rows = None
    if builder == "csv":
        separator = builder_options.get("sep", ",")
        num_rows, has_lone_quotes = _check_tables(options, source, paths, separator)
        if has_lone_quotes:
            return _load_repaired(options, source, paths, separator)
    elif extension == ".jsonl" and not options.streaming:
        num_rows = sum(map(count_lines, paths))
    files = {"train": data_files(paths)}
    dataset = load_with_datasets(source, builder, options.streaming, data_files=files, **builder_options)["train"]
    if num_rows is not None and isinstance(dataset, Dataset) and len(dataset) < num_rows:
        raise ValueError(f"{source}: {num_rows} rows are in the files, and {len(dataset)} could be read; check them.")
    return dataset


def _check_tables(options: ReadOptions, source: str, paths: list[Path], separator: str) -> tuple[int, bool]:
    """Count the rows of csv or tsv files; return their number and whether a cell begins with a lone quote."""
    with readable(source):
        tables = [check_table(path, separator, options.image_column) for path in paths]
    for path, table in zip(paths, tables, strict=True):
        if table.lone_quotes:
            report_lone_quotes(path, table.lone_quotes)
    return sum(table.num_rows for table in tables), any(table.lone_quotes for table in tables)


def _load_repaired(options: ReadOptions, source: str, paths: list[Path], separator: str) -> Dataset | IterableDataset:
    with readable(source):
        tables = [read_repaired_table(path, separator, options.image_column) for path in paths]
    rows = datasets.concatenate_datasets(tables)
    return rows.to_iterable_dataset() if options.streaming else rows


def _rename_file_names(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Rename the columns file_name and NAME_file_name to image and NAME, as in an imagefolder."""
    names = list(dataset.features or next(iter(dataset), {}))
    for name in names:
        new = "image" if name == "file_name" else name.removesuffix("_file_name")
        if new not in names:
            dataset = dataset.rename_column(name, new)
    return dataset


def load_with_datasets(source: str, path: str, streaming: bool, **options: Any) -> dict[str, Dataset | IterableDataset]:
    """Load all splits with `datasets.load_dataset`; its errors become one line that begins with `source`."""
    with readable(source):
        return datasets.load_dataset(path, streaming=streaming, **options)


@contextmanager
def readable(source: str) -> Iterator[None]:
    """Turn any error into one line that begins with `source`; datasets raises many types and wraps the true cause."""
    try:
        yield
    except Exception as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        if "corresponds to no data" in str(cause):
            raise ValueError(f"{source}: holds no pairs.") from error
        raise kind(f"{source} could not be read: {one_line(cause)}") from error


@dataclass(frozen=True)
class _JoinPath:
    """Makes the relative paths of one column absolute; an object that spawned workers can unpickle."""

    column: str
    folder: str

    def __call__(self, path: Any) -> dict[str, Any]:
        is_local = isinstance(path, str) and path and "://" not in path
        return {self.column: os.path.join(self.folder, path) if is_local else path}


def with_absolute_paths(
    folder: Path, dataset: Dataset | IterableDataset, image_column: str | None
) -> Dataset | IterableDataset:
    """Make the image paths of a table absolute; columns of other kinds of images stay as they are."""
    features = dataset.features
    column = find_image_column(dataset, image_column)
    if features is not None and getattr(features[column], "dtype", None) not in ("string", "large_string"):
        return dataset
    return dataset.map(_JoinPath(column, os.path.abspath(folder)), input_columns=[column])


def is_empty(dataset: Dataset | IterableDataset) -> bool:
    """Whether a data set has no rows."""
    return next(iter(undecoded(dataset)), None) is None
