# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Turn batches of rows into inputs of a model, in the process that asks or in the workers of a dataloader."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from modeling_mlip.data.collators import tokenize
from modeling_mlip.data.columns import read_captions
from modeling_mlip.data.items import one_line, read_image_cell

from .chunks import Chunk, RowBatch
from .collection import Row


@dataclass
class ReadBatch:
    """The inputs of a batch of rows.

    Args:
        num_rows: rows that were read.
        ids: n ids, one for each embedding.
        captions: n captions; None for an image without one.
        inputs: arguments of the model in slices of at most `num_rows` embeddings; n in all.
        skipped: "id: reason" of the rows that cannot be used.
    """

    chunk: Chunk
    num_rows: int
    ids: list[str]
    captions: list[str | None]
    inputs: list[dict[str, Tensor]]
    skipped: list[str]
    ends_chunk: bool
    ends_part: bool


@dataclass(frozen=True)
class ImageReader(torch.utils.data.Dataset):
    """Reads the images of a batch, and the first caption of each.

    Args:
        transform: maps an RGB image to pixel values (3, H, W).
    """

    transform: Callable[[Image.Image], Tensor]

    def __getitem__(self, batch: RowBatch) -> ReadBatch:
        ids, captions, pixel_values, skipped = [], [], [], []
        for row in batch.rows:
            try:
                image, _ = read_image_cell(row.image)
            except Exception as error:  # decoders raise exceptions of many types
                skipped.append(_describe_skipped(row, error))
                continue
            ids.append(row.id)
            captions.append(_first_caption(row.captions))
            pixel_values.append(self.transform(image))
        inputs = [{"pixel_values": torch.stack(pixel_values)}] if pixel_values else []
        return _read_batch(batch, ids, captions, inputs, skipped)


@dataclass(frozen=True)
class CaptionReader(torch.utils.data.Dataset):
    """Tokenizes the captions of a batch. The id of a caption is that of its row, with #1, #2, ... if there are several.

    Args:
        tokenizer: callable as `data.collators.tokenize` calls it.
        max_seq_length: longest caption in tokens; longer ones are shortened.
    """

    tokenizer: Any
    max_seq_length: int

    def __getitem__(self, batch: RowBatch) -> ReadBatch:
        ids: list[str] = []
        captions: list[str] = []
        skipped = []
        for row in batch.rows:
            try:
                of_row = read_captions(row.captions)
                if not of_row:
                    raise ValueError("the caption is empty")
            except (TypeError, ValueError) as error:
                skipped.append(_describe_skipped(row, error))
                continue
            ids += [row.id] if len(of_row) == 1 else [f"{row.id}#{number}" for number in range(1, len(of_row) + 1)]
            captions += of_row
        inputs = []
        for start in range(0, len(captions), len(batch.rows)):
            texts = captions[start : start + len(batch.rows)]
            input_ids, attention_mask, _ = tokenize(self.tokenizer, texts, self.max_seq_length)
            inputs.append({"input_ids": input_ids, "attention_mask": attention_mask})
        return _read_batch(batch, ids, captions, inputs, skipped)


def _read_batch(
    batch: RowBatch, ids: list[str], captions: Any, inputs: list[dict[str, Tensor]], skipped: list[str]
) -> ReadBatch:
    return ReadBatch(batch.chunk, len(batch.rows), ids, captions, inputs, skipped, batch.ends_chunk, batch.ends_part)


def _describe_skipped(row: Row, error: Exception) -> str:
    return f"{f'row {row.id}' if row.id.replace('-', '').isdigit() else row.id}: {one_line(error)}"


def _first_caption(value: Any) -> str | None:
    try:
        captions = read_captions(value)
    except (TypeError, UnicodeDecodeError):
        return None
    return captions[0] if captions else None
