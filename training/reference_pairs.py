# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Reference pairs: image-caption pairs beside those of training, on which the embeddings must stay as they were.

`Distillation` compares the trained model with the starting model on them; no other loss uses them. Photographs keep
what a model knows of photographs while it is fine-tuned on drawings (ZSCL, Zheng et al. 2023, arXiv 2303.06628).
"""

from collections.abc import Callable
from typing import Any

import torch

from modeling_mlip.data.items import stable_hash

PREFIX = "reference_"
ENTRIES = ("pixel_values", "input_ids", "attention_mask")


class ReferenceCollator:
    """Adds reference pairs to the batches of another collator: as many as a batch has pairs, with repetition.

    They depend on the seed and the captions of the batch only, so a resumed run and any number of workers draw the
    same ones. A batch gets the entries `reference_pixel_values` `(R, 3, H, W)`, `reference_input_ids` and
    `reference_attention_mask` `(R, L)`. Pairs that cannot be used are replaced by others and listed in "skipped".

    Args:
        collate_fn: makes a batch of items.
        dataset: the items of the reference pairs, one caption each.

    Raises:
        ValueError: if the data set is empty or has no length.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], dict[str, Any]], dataset: Any, seed: int = 0):
        if not getattr(dataset, "__len__", lambda: 0)():
            raise ValueError("The reference data set is empty or a stream: give one with a length, such as a file.")
        self.collate_fn, self.dataset, self.seed = collate_fn, dataset, seed

    def __call__(self, items: list[Any]) -> dict[str, Any]:
        batch = self.collate_fn(items)
        if not batch:  # a batch that a resumed stream skips
            return batch
        num_pairs = len(batch["input_ids"])
        drawn = self._draw(num_pairs, key=f"{self.seed} {batch['input_ids'].tolist()}")
        usable = [item for item in drawn if "error" not in item] or drawn
        rows = self.collate_fn([usable[n % len(usable)] for n in range(num_pairs)])
        skipped = [f"reference {item['where']}: {item['error']}" for item in drawn if "error" in item]
        references = {f"{PREFIX}{name}": rows[name] for name in ENTRIES}
        return {**batch, **references, "skipped": [*batch.get("skipped", []), *skipped]}

    def _draw(self, count: int, key: str) -> list[dict[str, Any]]:
        generator = torch.Generator().manual_seed(stable_hash(key))
        indices = torch.randint(len(self.dataset), (count,), generator=generator).tolist()
        if hasattr(self.dataset, "__getitems__"):
            return self.dataset.__getitems__(indices)
        return [self.dataset[index] for index in indices]
