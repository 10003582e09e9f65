# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPTokenizer

from .items import stable_hash


def tokenize(
    tokenizer: CLIPTokenizer, captions: list[str], max_seq_length: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """T captions to input_ids and attention_mask, int64 (T, L) padded to the longest, and how many were cut.

    A caption of more than `max_seq_length` tokens loses its last words, never BOS or EOS.
    """
    encoded = tokenizer(captions, verbose=False)["input_ids"]
    num_truncated = sum(len(ids) > max_seq_length for ids in encoded)
    encoded = [ids if len(ids) <= max_seq_length else ids[: max_seq_length - 1] + ids[-1:] for ids in encoded]
    L = max(len(ids) for ids in encoded)
    input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (L - len(ids)) for ids in encoded])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (L - len(ids)) for ids in encoded])
    return input_ids, attention_mask, num_truncated


@dataclass
class PairCollator:
    """Items to a batch of B images and T captions (in training B = T pairs: an image comes once for each caption).

    pixel_values float (B, 3, H, W); input_ids, attention_mask int64 (T, L); image_ids int64 (B,), equal for equal
    images; names, a list that says where each image lies; skipped, a list of "where: why" of the rows of no use;
    num_truncated, an int; of a stream also position, {worker: (pass, rows read)} of the one that read the batch. A
    batch that a stream skips is empty.
    """

    tokenizer: CLIPTokenizer
    max_seq_length: int

    def __post_init__(self):
        if self.max_seq_length < 3:
            raise ValueError(f"max_seq_length={self.max_seq_length}: choose at least 3 (BOS, one token, EOS).")

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        if items[0] is None:
            return {}
        position = items[-1].get("position")
        skipped = [f"{item['where']}: {item['error']}" for item in items if "error" in item]
        items = [item for item in items if "error" not in item]
        if not items:
            raise ValueError(
                f"Not one pair of a whole batch can be used: {'; '.join(skipped[:5])}. Repair or remove them."
            )
        captions = [caption for item in items for caption in item["captions"]]
        items = self.rows(items)
        input_ids, attention_mask, num_truncated = tokenize(self.tokenizer, captions, self.max_seq_length)
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "image_ids": torch.tensor([stable_hash(item["image_id"]) for item in items]),
            "names": [item["where"] for item in items],
            "skipped": skipped,
            "num_truncated": num_truncated,
            **({"position": {position[0]: position[1:]}} if position else {}),
        }

    def rows(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The item of each image of the batch."""
        return [item for item in items for _ in item["captions"]]


class EvaluationCollator(PairCollator):
    """The same with all captions of each image, caption_image int64 (T,): the row of each caption's image, and kept
    int64 (B,): the place of each image among the items. A batch in which nothing is of use has B = T = 0."""

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        kept = torch.tensor([place for place, item in enumerate(items) if "error" not in item], dtype=torch.int64)
        counts = torch.tensor([len(items[place]["captions"]) for place in kept], dtype=torch.int64)
        if len(kept) == 0:
            skipped = [f"{item['where']}: {item['error']}" for item in items]
            batch = {"pixel_values": torch.empty(0), "skipped": skipped, "num_truncated": 0}
        else:
            batch = super().__call__(items)
        return {**batch, "kept": kept, "caption_image": torch.repeat_interleave(torch.arange(len(counts)), counts)}

    def rows(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return items
