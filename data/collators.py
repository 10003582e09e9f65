# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Collators: items of image-caption pairs to batches of tensors, for training and for evaluation."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import CLIPTokenizer

from .items import stable_hash


def tokenize(
    tokenizer: CLIPTokenizer, captions: list[str], max_seq_length: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokenize T captions.

    A caption of more than `max_seq_length` tokens loses its last tokens before EOS; BOS and EOS stay.

    Returns:
        input_ids and attention_mask, int64 (T, L), padded to the longest caption; and the number of tokens of each
        caption before it is shortened, int64 (T,).
    """
    encoded = tokenizer(captions, verbose=False)["input_ids"]
    lengths = torch.tensor([len(ids) for ids in encoded])
    encoded = [ids if len(ids) <= max_seq_length else ids[: max_seq_length - 1] + ids[-1:] for ids in encoded]
    L = max(len(ids) for ids in encoded)
    input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (L - len(ids)) for ids in encoded])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (L - len(ids)) for ids in encoded])
    return input_ids, attention_mask, lengths


@dataclass
class PairCollator:
    """Makes a batch of B images and T captions. In training B = T: an image is repeated for each of its captions.

    A batch holds
        pixel_values: float (B, 3, H, W)
        input_ids, attention_mask: int64 (T, L), of the long captions if the items have some
        short_input_ids, short_attention_mask: int64 (T, L'), of the captions, only beside long captions
        caption_lengths: int64 (T,), tokens of each caption of `input_ids` before it was shortened
        image_ids: int64 (B,), equal for equal images
        names: list of str, the place of each image in the data set
        skipped: list of "place: reason", one for each row that cannot be used
        num_truncated: number of captions that were shortened
        position: in training on a stream, {worker: (pass, rows read)} of the worker that read the batch
    The batches that a resumed stream skips are empty dictionaries.
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
                f"No pair of a batch of {len(skipped)} can be used: {'; '.join(skipped[:5])}. Repair or remove them."
            )
        has_long_captions = "long_captions" in items[0]
        captions = [text for item in items for text in item["captions"]]
        texts = [text for item in items for text in item["long_captions"]] if has_long_captions else captions
        items = self.rows(items)
        input_ids, attention_mask, lengths = tokenize(self.tokenizer, texts, self.max_seq_length)
        batch = {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "caption_lengths": lengths,
            "image_ids": torch.tensor([stable_hash(item["image_id"]) for item in items]),
            "names": [item["where"] for item in items],
            "skipped": skipped,
            "num_truncated": int((lengths > self.max_seq_length).sum()),
            **({"position": {position[0]: position[1:]}} if position else {}),
        }
        if has_long_captions:
            input_ids, attention_mask, _ = tokenize(self.tokenizer, captions, self.max_seq_length)
            batch |= {"short_input_ids": input_ids, "short_attention_mask": attention_mask}
        return batch

    def rows(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the item of each image of the batch."""
        return [item for item in items for _ in item["captions"]]


class EvaluationCollator(PairCollator):
    """Makes a batch of B images and all their T captions.

    Beside the entries of `PairCollator`, a batch holds
        caption_image: int64 (T,), the row of each caption's image in the batch
        kept: int64 (B,), the index of each image among the items
    If no item can be used, B = T = 0.
    """

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
