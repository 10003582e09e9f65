# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

import glob
import itertools
import os
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from .columns import find_columns, find_image_column
from .items import one_line, undecoded
from .shapes import shapes_dataset

VALIDATION_SPLITS = ("validation", "val", "valid", "dev", "test")


# Extension -> the builder of datasets that reads it, and what that takes. An empty cell of a csv is an empty string,
# and a caption "None" or "NA" is that word.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".tar": ("webdataset", {}),
}


def load_pairs(
    *, image_column: str | None = None, caption_column: str | None = None, **source: Any
) -> DatasetDict | IterableDatasetDict:
    """Read the splits "train" and "validation" (either may be missing) of image-caption pairs.

    Raises:
        FileNotFoundError, ValueError: as `load_splits`, or without a caption column.
    """
    splits = load_splits(image_column=image_column, captioned=True, **source)
    for dataset in splits.values():
        find_columns(dataset, image_column, caption_column)
    return splits


def load_splits(
    *,
    dataset_name: str | None = None,
    dataset_config_name: str | None = None,
    data_dir: str | None = None,
    train_file: str | None = None,
    validation_file: str | None = None,
    image_column: str | None = None,
    streaming: bool = False,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    captioned: bool = False,
) -> DatasetDict | IterableDatasetDict:
    """Read the splits "train" and "validation" (either may be missing) from the one source that the flags name.

    Relative image paths in a csv, tsv, json or parquet file become relative to the file's folder. With `captioned` a
    folder of images alone is refused before they are listed; without, the names of its folders are classes.

    Raises:
        FileNotFoundError: a folder, file or Hub data set that is not there.
        ValueError: no source or several, an unreadable or empty one, or one without an image column.
    """
    sources = {
        "--dataset_name": dataset_name,
        "--data_dir": data_dir,
        "--train_file/--validation_file": train_file or validation_file,
    }
    given = [flag for flag, value in sources.items() if value]
    if len(given) != 1:
        raise ValueError(
            f"Got {' and '.join(given) or 'no source of image-caption pairs'}: give one of {', '.join(sources)} "
            "('--dataset_name shapes' needs no files)."
        )
    if dataset_name:
        found = _load_name(dataset_name, dataset_config_name, image_column, streaming)
    elif data_dir:
        found = _load_folder(data_dir, captioned, streaming)
    else:
        patterns = {"train": train_file, "validation": validation_file}
        found = {
            split: _load_files(f"--{split}_file", files, image_column, streaming)
            for split, files in patterns.items()
            if files
        }

    splits = {"train": found["train"]} if "train" in found else {}
    held_back = [name for name in VALIDATION_SPLITS if name in found]
    if held_back:
        splits["validation"] = found[held_back[0]]
    if not splits:
        raise ValueError(f"{given[0]} has the splits {', '.join(found)}: name one of them train, validation or test.")
    limits = {"train": max_train_samples, "validation": max_eval_samples}
    for split, dataset in splits.items():
        splits[split] = dataset = first_rows(dataset, limits[split])
        if _is_empty(dataset):
            raise ValueError(f"{given[0]} {sources[given[0]]}: the {split} split holds no pairs.")
        find_image_column(dataset, image_column)
    return IterableDatasetDict(splits) if streaming else DatasetDict(splits)


def _load_name(
    name: str, config_name: str | None, image_column: str | None, streaming: bool
) -> dict[str, Dataset | IterableDataset]:
    if name == "shapes":
        drawn = shapes_dataset()
        return {split: part.to_iterable_dataset() if streaming else part for split, part in drawn.items()}
    folder = os.path.expanduser(name)
    if not os.path.isdir(folder):
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise FileNotFoundError(f"--dataset_name {name}: no such folder; give a folder, a Hub id or 'shapes'.")
        return _load(f"--dataset_name {name}", name, streaming, name=config_name)
    found = _load(f"--dataset_name {name}", folder, streaming, name=config_name)
    return {
        split: dataset if _is_empty(dataset) else _with_paths_from(folder, dataset, image_column)
        for split, dataset in found.items()
    }


def _load_folder(name: str, captioned: bool, streaming: bool) -> dict[str, Dataset | IterableDataset]:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"--data_dir {name}: no such folder.")
    if any(folder.rglob("*.tar")):
        return _load(f"--data_dir {name}", "webdataset", streaming, data_dir=str(folder))
    has_table = any(path.suffix in (".csv", ".jsonl", ".parquet") for path in folder.rglob("metadata.*"))
    if captioned and not has_table:
        raise ValueError(
            f"--data_dir {name}: found neither tar shards nor a metadata.csv or metadata.jsonl; add one with the "
            "columns file_name and caption, or give your own table as --train_file."
        )
    return _load(f"--data_dir {name}", "imagefolder", streaming, data_dir=str(folder))


def _load_files(flag: str, pattern: str, image_column: str | None, streaming: bool) -> Dataset | IterableDataset:
    paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True), key=os.path.split)
    if not paths:
        raise FileNotFoundError(f"{flag} {pattern}: no such file.")
    extensions = sorted({os.path.splitext(path)[1].lower() for path in paths})
    if len(extensions) > 1 or extensions[0] not in READERS:
        raise ValueError(f"{flag} {pattern}: got {', '.join(extensions)} files; give one kind of {', '.join(READERS)}.")
    builder, options = READERS[extensions[0]]
    parts = []
    for folder, group in itertools.groupby(paths, key=os.path.dirname):
        found = _load(f"{flag} {pattern}", builder, streaming, data_files={"train": list(group)}, **options)
        if not _is_empty(found["train"]):
            parts.append(_with_paths_from(folder, found["train"], image_column))
    if not parts:
        raise ValueError(f"{flag} {pattern}: holds no pairs.")
    return datasets.concatenate_datasets(parts)


def _load(source: str, path: str, streaming: bool, **options: Any) -> dict[str, Dataset | IterableDataset]:
    try:
        return datasets.load_dataset(path, streaming=streaming, **options)
    except Exception as error:  # datasets raises nearly anything, and wraps what says why
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        if "corresponds to no data" in str(cause):
            raise ValueError(f"{source}: holds no pairs.") from error
        raise kind(f"{source} could not be read: {one_line(cause)}") from error


def _with_paths_from(
    folder: str, dataset: Dataset | IterableDataset, image_column: str | None
) -> Dataset | IterableDataset:
    """Make the image paths of a table relative to its folder; other kinds of images stay as they are."""
    features = dataset.features
    column = find_image_column(dataset, image_column)
    if features is not None and getattr(features[column], "dtype", None) not in ("string", "large_string"):
        return dataset

    def join(path: Any) -> dict[str, Any]:
        local = isinstance(path, str) and path and "://" not in path
        return {column: os.path.join(os.path.abspath(folder), path) if local else path}

    return dataset.map(join, input_columns=[column])


def first_rows(dataset: Dataset | IterableDataset, limit: int | None) -> Dataset | IterableDataset:
    """So many rows of a data set from its beginning; all of them for `None`."""
    if limit is None:
        return dataset
    return dataset.select(range(min(limit, len(dataset)))) if isinstance(dataset, Dataset) else dataset.take(limit)


def _is_empty(dataset: Dataset | IterableDataset) -> bool:
    return next(iter(undecoded(dataset)), None) is None
