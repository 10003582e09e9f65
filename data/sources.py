# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Load the splits of a data set from files, a folder, the Hub, or the drawn shapes."""

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, IterableDataset, IterableDatasetDict
from PIL import Image as PILImage

from .columns import find_columns, find_image_column
from .file_readers import (
    EXTENSIONS,
    TABLES,
    ReadOptions,
    is_empty,
    load_files,
    load_with_datasets,
    readable,
    with_absolute_paths,
)
from .framed_shapes import framed_shapes_dataset
from .shapes import shapes_dataset
from .source_files import expand_pattern, list_files, report_left_out, split_files

logger = logging.getLogger(__name__)

VALIDATION_SPLITS = ("validation", "val", "valid", "dev", "test")
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")


def load_pairs(
    *, image_column: str | None = None, caption_column: str | None = None, **source: Any
) -> DatasetDict | IterableDatasetDict:
    """Load the splits "train" and "validation" of image-caption pairs; either may be missing.

    Args:
        image_column: name of the image column; found by its usual names if None.
        caption_column: name of the caption column; found by its usual names if None.
        source: the other arguments of `load_splits`.

    Raises:
        FileNotFoundError, ValueError: as `load_splits`, or if a split has no caption column.
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
    """Load the splits "train" and "validation" from exactly one source; either split may be missing.

    Relative image paths in a table become absolute. They are relative to the folder of a table or metadata file, and
    in a folder of tables to that folder.

    Args:
        dataset_name: an id on the Hub, a local folder, "shapes" or "framed-shapes".
        dataset_config_name: the configuration of that data set.
        data_dir: a folder of tar shards, of images with metadata files, of tables, or written by `save_to_disk`; or of
            images alone, whose folders are their classes.
        train_file: a csv, tsv, json, jsonl, parquet or tar file, or a pattern of these, to train on.
        validation_file: the same, to evaluate on.
        image_column: name of the image column; found by its usual names if None.
        streaming: load streams, which are read while they are used.
        max_train_samples: number of rows to keep of the train split.
        max_eval_samples: number of rows to keep of the validation split.
        captioned: refuse a folder of images without metadata before its images are listed.

    Raises:
        FileNotFoundError: if a folder, a file or a data set of the Hub does not exist.
        ValueError: if there are no or several sources, or one that is unreadable, empty or without an image column.
    """
    parameter, value = _only_source(
        {
            "dataset_name": dataset_name,
            "data_dir": data_dir,
            "train_file/validation_file": train_file or validation_file,
        }
    )
    options = ReadOptions(image_column, streaming, captioned)
    if dataset_name:
        splits = _load_name(options, dataset_name, dataset_config_name)
    elif data_dir:
        splits = _load_folder(options, f"data_dir={data_dir}", Path(data_dir))
    else:
        patterns = {"train": train_file, "validation": validation_file}
        splits = {name: _load_pattern(options, f"{name}_file", files) for name, files in patterns.items() if files}

    chosen = _choose_splits(parameter, splits)
    limits = {
        "train": ("max_train_samples", max_train_samples),
        "validation": ("max_eval_samples", max_eval_samples),
    }
    for name, dataset in chosen.items():
        chosen[name] = dataset = first_rows(dataset, *limits[name])
        if is_empty(dataset):
            raise ValueError(f"{parameter}={value}: the {name} split holds no pairs.")
        find_image_column(dataset, image_column)
    return IterableDatasetDict(chosen) if streaming else DatasetDict(chosen)


def first_rows(dataset: Dataset | IterableDataset, limit_name: str, limit: int | None) -> Dataset | IterableDataset:
    """Return the first `limit` rows of a data set; all of them if `limit` is None.

    Args:
        limit_name: the name of the parameter, for the message.

    Raises:
        ValueError: if `limit` is below 1.
    """
    if limit is None:
        return dataset
    if limit < 1:
        raise ValueError(f"{limit_name}={limit}: choose 1 or more, or leave it out.")
    return dataset.select(range(min(limit, len(dataset)))) if isinstance(dataset, Dataset) else dataset.take(limit)


def _only_source(sources: dict[str, str | None]) -> tuple[str, str]:
    given = {parameter: value for parameter, value in sources.items() if value}
    if len(given) != 1:
        raise ValueError(
            f"Got {' and '.join(given) or 'no source of image-caption pairs'}: give one of {', '.join(sources)} "
            "(dataset_name=shapes needs no files)."
        )
    [(parameter, value)] = given.items()
    return parameter, str(value)


def _choose_splits(
    parameter: str, splits: dict[str, Dataset | IterableDataset]
) -> dict[str, Dataset | IterableDataset]:
    """Return the split "train" and, as "validation", the first of `VALIDATION_SPLITS`."""
    chosen = {"train": splits["train"]} if "train" in splits else {}
    held_out = [name for name in VALIDATION_SPLITS if name in splits]
    if held_out:
        chosen["validation"] = splits[held_out[0]]
    if not chosen:
        raise ValueError(f"{parameter} has the splits {', '.join(splits)}: name one of them train, validation or test.")
    left_out = [name for name in splits if name not in ("train", *held_out[:1])]
    if left_out:
        used = " and ".join(name for name in ("train", *held_out[:1]) if name in splits)
        logger.warning("%s: left out the splits %s; %s are used.", parameter, ", ".join(left_out), used)
    return chosen


# Sources


def _load_name(options: ReadOptions, name: str, config_name: str | None) -> dict[str, Dataset | IterableDataset]:
    if name in ("shapes", "framed-shapes"):
        drawn = shapes_dataset() if name == "shapes" else framed_shapes_dataset()
        return {split: rows.to_iterable_dataset() if options.streaming else rows for split, rows in drawn.items()}
    source, folder = f"dataset_name={name}", Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise FileNotFoundError(f"{source}: no such folder; give a folder, a Hub id, 'shapes' or 'framed-shapes'.")
        return load_with_datasets(source, name, options.streaming, name=config_name)
    if config_name is None and not _describes_itself(folder):
        return _load_folder(options, source, folder)
    loaded = load_with_datasets(source, str(folder), options.streaming, name=config_name)
    return {
        split: dataset if is_empty(dataset) else with_absolute_paths(folder, dataset, options.image_column)
        for split, dataset in loaded.items()
    }


def _describes_itself(folder: Path) -> bool:
    """Whether the README.md of a folder lists its files, as that of a Hub data set does."""
    readme = folder / "README.md"
    return readme.is_file() and re.search(r"(?m)^configs:", readme.read_text(errors="replace")) is not None


def _load_folder(options: ReadOptions, source: str, folder: Path) -> dict[str, Dataset | IterableDataset]:
    folder = folder.expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{source}: no such folder.")
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _load_saved(options, source, folder)
    files = list_files(folder)
    tars = [path for path in files if path.suffix.lower() == ".tar"]
    metadata = [path for path in files if path.name in METADATA_FILES]
    images = [path for path in files if _is_image_file(path)]
    if tars:
        report_left_out(source, _without(files, tars), "beside the tar shards")
        return _load_each_split(source, folder, tars, lambda paths: load_files(options, source, paths, folder))
    if metadata:
        return _load_metadata(options, source, folder, metadata, files)
    if images:
        return _load_images(options, source, folder, images, files)
    tables = [path for path in files if path.suffix.lower() in TABLES and not path.stem.endswith("_stats")]
    if not tables:
        return load_with_datasets(source, str(folder), options.streaming)
    kind = next(kind for kind in (".parquet", ".jsonl", ".json", ".csv", ".tsv") if kind in _extensions(tables))
    tables = [path for path in tables if path.suffix.lower() == kind]
    report_left_out(source, _without(files, tables), f"beside the {kind} files")
    return _load_each_split(source, folder, tables, lambda paths: load_files(options, source, paths, folder))


def _load_each_split(
    source: str,
    folder: Path,
    paths: list[Path],
    load: Callable[[list[Path]], Dataset | IterableDataset],
    by_file_name: bool = True,
) -> dict[str, Dataset | IterableDataset]:
    splits, others = split_files(paths, folder, by_file_name)
    report_left_out(source, others, f"that belong to none of the splits {', '.join(splits)}")
    return {name: load(split_paths) for name, split_paths in splits.items()}


def _load_saved(options: ReadOptions, source: str, folder: Path) -> dict[str, Dataset | IterableDataset]:
    """Load what `save_to_disk` of datasets wrote."""
    with readable(source):
        saved = datasets.load_from_disk(str(folder))
    splits = dict(saved) if isinstance(saved, DatasetDict) else {"train": saved}
    if not options.streaming:
        return splits
    return {
        name: rows.to_iterable_dataset(num_shards=max(1, min(len(rows), len(rows.cache_files))))
        for name, rows in splits.items()
    }


def _load_metadata(
    options: ReadOptions, source: str, folder: Path, metadata: list[Path], files: list[Path]
) -> dict[str, Dataset | IterableDataset]:
    """Load the images that metadata files name, relative to the folder of each."""
    if len(_extensions(metadata)) > 1:
        raise ValueError(
            f"{source}: got metadata files of the kinds {', '.join(_extensions(metadata))}; keep one kind."
        )
    options = replace(options, is_metadata=True)
    splits = _load_each_split(source, folder, metadata, lambda paths: load_files(options, source, paths), False)
    others = [path for path in _without(files, metadata) if not _is_image_file(path)]
    report_left_out(source, others, "beside the metadata")
    if not options.streaming:
        named: set[str] = set()
        for rows in splits.values():
            column = find_image_column(rows, options.image_column)
            named |= {
                os.path.normpath(path) for path in rows.select_columns([column])[:][column] if isinstance(path, str)
            }
        unnamed = [path for path in files if _is_image_file(path) and str(path) not in named]
        report_left_out(source, unnamed, "that no metadata file names")
    return {name: _with_images(rows, options.image_column) for name, rows in splits.items()}


def _with_images(dataset: Dataset | IterableDataset, image_column: str | None) -> Dataset | IterableDataset:
    """Make a column of paths a column of images; a stream without features keeps its paths."""
    column = find_image_column(dataset, image_column)
    return dataset if dataset.features is None else dataset.cast_column(column, Image())


def _load_images(
    options: ReadOptions, source: str, folder: Path, images: list[Path], files: list[Path]
) -> dict[str, Dataset | IterableDataset]:
    """Load a folder of images, whose classes are the folders that hold them if all are at one depth."""
    if options.captioned:
        raise ValueError(
            f"{source}: found neither tar shards nor a metadata.csv or metadata.jsonl; {caption_hint(files)}."
        )
    report_left_out(source, _without(files, images), "beside the images")
    names = sorted({path.parent.name for path in images})
    has_classes = len(names) > 1 and len({len(path.parts) for path in images}) == 1
    features = Features({"image": Image(), **({"label": ClassLabel(names=names)} if has_classes else {})})

    def load(paths: list[Path]) -> Dataset | IterableDataset:
        columns: dict[str, list[str]] = {"image": [str(path) for path in paths]}
        if has_classes:
            columns["label"] = [path.parent.name for path in paths]
        rows = Dataset.from_dict(columns, features=features)
        return rows.to_iterable_dataset() if options.streaming else rows

    return _load_each_split(source, folder, images, load, by_file_name=False)


def _load_pattern(options: ReadOptions, parameter: str, pattern: str) -> Dataset | IterableDataset:
    source = f"{parameter}={pattern}"
    try:
        paths = [Path(path) for path in expand_pattern(pattern)]
    except (FileNotFoundError, ValueError) as error:
        raise type(error)(f"{parameter}={error}") from None
    if not paths:
        raise FileNotFoundError(f"{source}: no such file.")
    folders = [path for path in paths if path.is_dir()]
    if folders:
        raise ValueError(f"{source}: {folders[0]} is a folder; give its files, or the folder with data_dir=FOLDER.")
    extensions = _extensions(paths)
    if len(extensions) > 1 or extensions[0] not in EXTENSIONS:
        raise ValueError(f"{source}: got {', '.join(extensions)} files; give one kind of {', '.join(EXTENSIONS)}.")
    return load_files(options, source, paths)


def caption_hint(files: Sequence[Path], parameter: str = "train_file") -> str:
    """How to give the captions of a folder of images without metadata files.

    Args:
        files: the files of the folder.
        parameter: takes a table of captions.
    """
    columns = "the columns file_name and caption"
    tables = [path.name for path in files if path.suffix.lower() in TABLES]
    if tables:
        return f"rename {tables[0]} to metadata{Path(tables[0]).suffix} with {columns}, or give it as {parameter}"
    return f"add one with {columns}, or give your own table as {parameter}"


def _without(paths: Sequence[Path], used: Sequence[Path]) -> list[Path]:
    left_out = set(used)
    return [path for path in paths if path not in left_out]


def _extensions(paths: Sequence[Path]) -> list[str]:
    return sorted({path.suffix.lower() for path in paths})


def _is_image_file(path: Path) -> bool:
    return PILImage.registered_extensions().get(path.suffix.lower()) in PILImage.OPEN
