# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`VectorIndex`: the nearest embeddings of a folder that `mlip embed` wrote, by faiss.

The search is exact on embeddings in float16: on a million of them it takes a fraction of a second, and approximate
indexes lose neighbours (`benchmarks/search_index.py`).
"""

import bisect
import itertools
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from transformers.utils import logging

from modeling_mlip.evaluation.encoders import Encoder, load_encoder, set_merging
from modeling_mlip.hub.extras import require_modules

from .embed import hash_model
from .embedding_folder import METADATA, EmbeddingFolder

INDEX = "index.faiss"
FACTORY = "SQfp16"  # faiss's name of an exact search over vectors that it keeps in float16


@dataclass(frozen=True)
class Hit:
    """A row of the collection, and its cosine similarity with the query."""

    id: str
    score: float
    caption: str | None


class VectorIndex:
    """Searches the embeddings of a folder. The index is built once and saved beside the shards.

    Raises:
        FileNotFoundError: if the folder was not written by `mlip embed`.
        ImportError: if faiss is not installed.
        ValueError: if the run of `mlip embed` is not finished.
    """

    def __init__(self, path: str | Path):
        require_modules("Search", "search", "faiss")
        folder = EmbeddingFolder(path)
        self.metadata = folder.read_metadata()
        if not self.metadata["finished"]:
            raise ValueError(f"{path} is not finished: run the same mlip embed command again to resume it.")
        self.path = folder.path
        self._shards = folder.list_shards()
        lengths = [summary.num_embeddings for summary in folder.read_summaries()]
        self._starts = list(itertools.accumulate(lengths, initial=0))  # first row of each shard, and the number of rows
        self._index = self._load() or self._build()

    def __len__(self) -> int:
        return self._starts[-1]

    def search(self, embedding: np.ndarray, top_k: int = 10) -> list[Hit]:
        """The rows that are nearest to a normalised embedding `(D,)`, best first. Rows with equal ids count once.

        Raises:
            ValueError: if `top_k` is not positive.
        """
        if top_k < 1:
            raise ValueError(f"top_k={top_k}: choose 1 or more.")
        query = np.asarray(embedding, dtype=np.float32)[None]
        hits: dict[str, Hit] = {}
        num_read = 0
        while len(hits) < top_k and num_read < len(self):
            wanted = min(max(top_k, 2 * num_read), len(self))
            scores, rows = self._index.search(query, wanted)
            for score, row in zip(scores[0, num_read:].tolist(), rows[0, num_read:].tolist(), strict=True):
                hit = self._read_hit(row, score)
                hits.setdefault(hit.id, hit)
            num_read = wanted
        return list(hits.values())[:top_k]

    def _read_hit(self, row: int, score: float) -> Hit:
        shard = bisect.bisect_right(self._starts, row) - 1
        columns = ["id"] if self.metadata["caption_column"] is None else ["id", "caption"]
        values = pq.read_table(self._shards[shard], columns=columns).slice(row - self._starts[shard], 1).to_pylist()[0]
        # In float16 a vector times itself may exceed 1 by a little.
        return Hit(values["id"], min(score, 1.0), values.get("caption"))

    def _load(self) -> Any:
        """The saved index, or None if there is none of these embeddings."""
        import faiss

        file = self.path / INDEX
        if not file.is_file() or file.stat().st_mtime_ns < (self.path / METADATA).stat().st_mtime_ns:
            return None
        index = faiss.read_index(str(file))
        return index if (index.d, index.ntotal) == (self.metadata["width"], len(self)) else None

    def _build(self) -> Any:
        """Build the index shard by shard and save it."""
        import faiss

        index = faiss.index_factory(self.metadata["width"], FACTORY, faiss.METRIC_INNER_PRODUCT)
        for path in logging.tqdm(self._shards, desc="Index", unit=" shards", disable=None):
            column = pq.read_table(path, columns=["embedding"])["embedding"].combine_chunks()
            index.add(column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), index.d).astype(np.float32))
        descriptor, temporary = tempfile.mkstemp(prefix=f".{INDEX}.", dir=self.path)
        os.close(descriptor)
        try:
            faiss.write_index(index, temporary)
            os.chmod(temporary, 0o644)
            os.replace(temporary, self.path / INDEX)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return index


def load_index_encoder(metadata: dict[str, Any], model: str | None = None) -> Encoder:
    """The model that made the embeddings, at their merge ratio.

    Args:
        metadata: the content of embeddings.json.
        model: where the model is now, if it was moved.

    Raises:
        ValueError, OSError: if it cannot be loaded, or is not the model that made the embeddings.
    """
    encoder = load_encoder(model or metadata["model"], metadata["model_dtype"])
    if hash_model(encoder.model) != metadata["model_hash"]:
        raise ValueError(
            f"model={encoder.name} is not the model that made the embeddings ({metadata['model']}, hash "
            f"{metadata['model_hash']}); give that model, or embed the collection again."
        )
    if encoder.merge_ratio != metadata["merge_ratio"]:
        set_merging(encoder, metadata["merge_ratio"])
    return encoder
