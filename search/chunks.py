# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Divide a collection into chunks of consecutive rows, each of which one process embeds and writes as one shard.

The chunks depend on the collection and the chunk size alone. So the shards are the same for any number of processes,
and after a kill the missing chunks are embedded as if nothing had happened.
"""

from collections.abc import Collection as Container
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from .collection import Collection, Row

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class Chunk:
    """Rows `number * chunk_size` to `(number + 1) * chunk_size` of a part of a collection; the last may be shorter."""

    part: int
    number: int


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows of one chunk.

    Args:
        ends_chunk: whether these are the last rows of the chunk.
        ends_part: whether these are the last rows of the part.
    """

    chunk: Chunk
    rows: list[Row]
    ends_chunk: bool
    ends_part: bool


@dataclass(frozen=True)
class ChunkReader:
    """Iterates over the rows of the chunks that one process has to embed, in batches.

    Processes share the parts of a stream if there are enough of them. Otherwise each process reads all rows, and
    decodes the images of its own chunks.

    Args:
        finished: chunks to leave out.
        last: the number of the last chunk of each part, where it is known.
    """

    collection: Collection
    chunk_size: int
    batch_size: int
    finished: Container[Chunk] = frozenset()
    last: dict[int, int] = field(default_factory=dict)
    process: int = 0
    num_processes: int = 1

    def __iter__(self) -> Iterator[RowBatch]:
        for part, start, stop in self._spans():
            yield from self._batches(part, start, stop)

    def _spans(self) -> Iterator[tuple[int, int, int | None]]:
        """The spans of rows to read: part, first row and end."""
        num_rows = self.collection.num_rows
        if num_rows is not None:
            for start in range(0, num_rows, self.chunk_size):
                if self._is_wanted(Chunk(0, start // self.chunk_size)):
                    yield 0, start, min(start + self.chunk_size, num_rows)
            return
        for part in range(self.collection.num_parts):
            if self._shares_parts and part % self.num_processes != self.process:
                continue
            first = 0
            while not self._is_wanted(Chunk(part, first)) and first <= self.last.get(part, first):
                first += 1
            if first <= self.last.get(part, first):
                yield part, first * self.chunk_size, None

    @property
    def _shares_parts(self) -> bool:
        return self.collection.num_parts >= self.num_processes > 1

    def _is_wanted(self, chunk: Chunk) -> bool:
        number = chunk.part if self._shares_parts else chunk.part + chunk.number
        return number % self.num_processes == self.process and chunk not in self.finished

    def _batches(self, part: int, start: int, stop: int | None) -> Iterator[RowBatch]:
        rows: list[Row] = []
        for number, (row, is_last) in enumerate(mark_last(self.collection.read(part, start, stop)), start):
            chunk = Chunk(part, number // self.chunk_size)
            if not self._is_wanted(chunk):
                continue
            rows.append(row)
            ends_chunk = is_last or (number + 1) % self.chunk_size == 0
            if ends_chunk or len(rows) == self.batch_size:
                ends_part = is_last and (stop is None or stop == self.collection.num_rows)
                yield RowBatch(chunk, rows, ends_chunk, ends_part)
                rows = []


def mark_last(values: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield each value, and whether it is the last."""
    iterator = iter(values)
    try:
        value = next(iterator)
    except StopIteration:
        return
    for following in iterator:
        yield value, False
        value = following
    yield value, True
