# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`EmbeddingFolder`: parquet shards of embeddings and embeddings.json, which says how they were made.

A shard exists completely or not at all, and its metadata says which rows it holds. So the shards alone tell what is
left to embed. Any reader of parquet reads them: `datasets.load_dataset("parquet", data_files="FOLDER/*.parquet")`.
"""

import json
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from modeling_mlip.hub.atomic_files import check_folder_is_writable, write_atomically

from .chunks import Chunk

METADATA = "embeddings.json"
SHARDS = "shard-*.parquet"
KEY = b"mlip"  # of the metadata of a shard
DTYPES_OF_EMBEDDINGS: dict[str, type[np.floating]] = {"float16": np.float16, "float32": np.float32}
# Result of a run, which a later run does not compare with its own settings.
RESULTS = ("num_embeddings", "num_skipped", "skipped", "finished")
# Names that describe a setting of which another entry decides: a model may move, and its weights decide.
DESCRIPTIONS = ("model", "revision")


@dataclass(frozen=True)
class ShardSummary:
    """What the metadata of a shard say.

    Args:
        num_rows: rows of the collection that were read for it.
        num_embeddings: rows of the shard.
        skipped: "row: reason" of the rows that could not be used.
        ends_part: whether the part of the collection ends with this shard.
    """

    chunk: Chunk
    num_rows: int
    num_embeddings: int
    skipped: list[str]
    ends_part: bool


class EmbeddingFolder:
    """A folder of embeddings, to write or to read."""

    def __init__(self, path: str | Path):
        self.path = Path(path)

    def read_metadata(self) -> dict[str, Any]:
        """The settings, and the results if the run is finished.

        Raises:
            FileNotFoundError: if the folder was not written by `mlip embed`.
        """
        file = self.path / METADATA
        if not file.is_file():
            raise FileNotFoundError(f"{self.path} has no {METADATA}; give a folder that mlip embed wrote.")
        return json.loads(file.read_text(encoding="utf-8"))

    def begin(self, settings: dict[str, Any]) -> bool:
        """Start a run, or continue one with the same settings; return whether it is finished already.

        Raises:
            FileExistsError: if the folder holds other files.
            OSError: if it cannot be written.
            ValueError: if the run in the folder has other settings.
        """
        if not (self.path / METADATA).is_file():
            if self.path.exists() and (not self.path.is_dir() or set(self.path.iterdir()) - self._unfinished_files()):
                raise FileExistsError(f"output_dir={self.path}: not empty, and no run of mlip embed; choose another.")
            check_folder_is_writable(self.path)
            self.path.mkdir(parents=True, exist_ok=True)
            self.write_metadata({**settings, "finished": False})
            return False
        metadata = self.read_metadata()
        for name, value in settings.items():
            if name not in DESCRIPTIONS and metadata.get(name) != value:
                raise ValueError(
                    f"output_dir={self.path}: was begun with {name}={metadata.get(name)}, and this run has "
                    f"{name}={value}; use the same settings to resume it, or choose another folder."
                )
        return metadata["finished"]

    def write_metadata(self, metadata: dict[str, Any]) -> None:
        """Replace embeddings.json."""
        write_atomically(self.path / METADATA, json.dumps(metadata, indent=2, ensure_ascii=False) + "\n")

    def write_shard(
        self, summary: ShardSummary, ids: list[str], captions: list[str | None] | None, embeddings: np.ndarray
    ) -> None:
        """Write one shard.

        Args:
            captions: None if the collection has no captions.
            embeddings: `(len(ids), D)`, float16 or float32.
        """
        columns: dict[str, pa.Array] = {"id": pa.array(ids, pa.string())}
        if captions is not None:
            columns["caption"] = pa.array(captions, pa.string())
        columns["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
        content = {"num_rows": summary.num_rows, "skipped": summary.skipped, "ends_part": summary.ends_part}
        table = pa.table(columns).replace_schema_metadata({KEY: json.dumps(content).encode()})
        buffer = BytesIO()
        # A dictionary of embeddings, which all differ, would cost time and save nothing.
        pq.write_table(table, buffer, use_dictionary=False)
        write_atomically(self._shard_path(summary.chunk), buffer.getvalue())

    def _shard_path(self, chunk: Chunk) -> Path:
        return self.path / f"shard-{chunk.part:05}-{chunk.number:06}.parquet"

    def list_shards(self) -> list[Path]:
        """The shards in the order of their rows."""
        return sorted(self.path.glob(SHARDS), key=_chunk_of)

    def read_summaries(self) -> list[ShardSummary]:
        """The summary of each shard, in the order of their rows.

        Raises:
            ValueError: if a shard cannot be read.
        """
        return [_read_summary(path) for path in self.list_shards()]

    def remove_unfinished_files(self) -> None:
        """Remove the temporary files of a run that was killed."""
        for file in self._unfinished_files():
            file.unlink()

    def _unfinished_files(self) -> set[Path]:
        return {*self.path.glob(f".{SHARDS}.*"), *self.path.glob(f".{METADATA}.*")}


def _chunk_of(path: Path) -> Chunk:
    _, part, number = path.stem.split("-")
    return Chunk(int(part), int(number))


def _read_summary(path: Path) -> ShardSummary:
    try:
        file = pq.read_metadata(path)
        content = json.loads(file.metadata[KEY])
    except (pa.ArrowException, KeyError, ValueError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{path} is no complete shard ({message}); remove it and run mlip embed again.") from error
    return ShardSummary(_chunk_of(path), content["num_rows"], file.num_rows, content["skipped"], content["ends_part"])
