# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`Collection`: the rows to embed, from every source that training reads, each with an id that never changes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset

from modeling_mlip.data.columns import find_caption_column, find_image_column, get_cell
from modeling_mlip.data.file_readers import EXTENSIONS
from modeling_mlip.data.items import split_image_cell, undecoded
from modeling_mlip.data.sources import load_splits

WILDCARDS = frozenset("*?[{")


@dataclass(frozen=True)
class Row:
    """One row of a collection.

    Args:
        id: the file name of the image; else the key of its sample in a tar; else the number of the row.
        image: cell of the image, not decoded.
        captions: cell of the captions; None without a caption column.
    """

    id: str
    image: Any
    captions: Any


@dataclass(frozen=True)
class Collection:
    """The rows of one split. A data set with a length is one part; each shard of a stream is a part.

    Args:
        rows: images are not decoded.
        image_column: name of the column of images.
        caption_column: name of the column of captions, if there is one.
        source: the folder, file, pattern or Hub id; an absolute path if it is local.
        split: name of the split.
        root: file names in ids are relative to this folder; None if the source is not a local folder.
    """

    rows: Dataset | IterableDataset
    image_column: str
    caption_column: str | None
    source: str
    split: str
    root: str | None

    @property
    def num_rows(self) -> int | None:
        """Number of rows; None for a stream."""
        return len(self.rows) if isinstance(self.rows, Dataset) else None

    @property
    def num_parts(self) -> int:
        """Number of parts, which are read independently."""
        return 1 if isinstance(self.rows, Dataset) else self.rows.num_shards

    def read(self, part: int, start: int, stop: int | None = None) -> Iterator[Row]:
        """Iterate over the rows of a part from row `start` on, up to row `stop` or the end of the part."""
        if isinstance(self.rows, Dataset):
            rows: Any = self.rows.select(range(start, len(self.rows) if stop is None else stop))
        else:
            rows = self.rows.shard(self.num_parts, part) if self.num_parts > 1 else self.rows
            rows = rows.skip(start) if start else rows
            rows = rows if stop is None else rows.take(stop - start)
        prefix = f"{part}-" if self.num_parts > 1 else ""
        for number, row in enumerate(rows, start):
            captions = None if self.caption_column is None else get_cell(row, self.caption_column)
            yield Row(self._id_of(row, f"{prefix}{number}"), row[self.image_column], captions)

    def _id_of(self, row: dict[str, Any], number: str) -> str:
        if row.get("__url__"):
            return f"{os.path.basename(row['__url__'])}/{row['__key__']}"
        try:
            data, path = split_image_cell(row[self.image_column])
        except TypeError:  # the reader of the image reports it
            return number
        if data is not None or not path:
            return number
        is_below = self.root is not None and Path(path).is_relative_to(self.root)
        return os.path.relpath(path, self.root) if is_below else path


def load_collection(
    source: str,
    *,
    split: str | None = None,
    dataset_config_name: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    streaming: bool = False,
) -> Collection:
    """Load one split of a source.

    Args:
        source: a folder, a file or pattern of files (csv, tsv, json, jsonl, parquet, tar), a Hub id, or "shapes". A
            folder of images needs no captions.
        split: "train" or "validation"; if None, "train", or "validation" if that is the only one.
        dataset_config_name: the configuration of a data set of the Hub.
        image_column, caption_column: found by their usual names if None.

    Raises:
        FileNotFoundError, ValueError: as `load_splits`, or if there is no such split.
    """
    path = Path(source).expanduser()
    is_files = not path.is_dir() and (
        path.is_file() or path.suffix.lower() in EXTENSIONS or not WILDCARDS.isdisjoint(source)
    )
    splits = load_splits(
        train_file=source if is_files else None,
        dataset_name=None if is_files else source,
        dataset_config_name=dataset_config_name,
        image_column=image_column,
        streaming=streaming,
    )
    name = split or next(iter(splits))
    if name not in splits:
        raise ValueError(f"split={name}: {source} has the splits {', '.join(splits)}; choose one of them.")
    rows = splits[name]
    local = os.path.abspath(path)
    root = local if path.is_dir() else os.path.dirname(local) if is_files else None
    return Collection(
        rows=undecoded(rows),
        image_column=find_image_column(rows, image_column),
        caption_column=find_caption_column(rows, caption_column),
        source=source if root is None else local,
        split=name,
        root=root,
    )
