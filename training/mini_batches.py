# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A large contrastive batch in the memory of a small one: GradCache (Gao et al. 2021, arXiv 2101.06983).

The first pass embeds mini-batches and keeps no graph, the loss of all embeddings gives a gradient for each of them, and
the second pass embeds each mini-batch again, now with a graph, and carries its gradients on to the weights. These
functions cut, join and replay; the passes themselves are `MLIPTrainer._mini_batch_step`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import get_device_states, set_device_states

from modeling_mlip.losses import PairEmbeddings

from .distributed import gather_numbers


def split_batch(batch: dict[str, torch.Tensor], mini_batch_size: int) -> list[dict[str, torch.Tensor]]:
    """Cuts tensors `(R, ...)` into mini-batches of about equal size, as many in every process.

    Wrappers that exchange weights or gradients do so in each of them, so a process that skipped samples makes its
    mini-batches smaller, not fewer. A process with fewer rows than others have mini-batches makes all of them larger.
    """
    num_rows = len(batch["input_ids"])
    all_rows = [rows for (rows,) in gather_numbers(num_rows, device=batch["input_ids"].device)]
    count = min(-(-max(all_rows) // mini_batch_size), min(all_rows))
    parts = {name: tensor.tensor_split(count) for name, tensor in batch.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(count)]


def join(parts: list[Any]) -> Any:
    """`PairEmbeddings` of mini-batches as those of the batch."""
    first = parts[0]
    if first is None:
        return None
    if isinstance(first, torch.Tensor):
        return torch.cat(parts)
    return type(first)(*(join(list(values)) for values in zip(*parts, strict=True)))


def embeddings(pairs: PairEmbeddings) -> list[torch.Tensor]:
    """The tensors of `pairs` that have gradients, always in the same order."""
    tensors = [pairs.image_embeds, pairs.text_embeds, pairs.frequency_embeds]
    if pairs.tokens is not None:
        tensors += [pairs.tokens.image_tokens, pairs.tokens.text_tokens]
    return [tensor for tensor in tensors if tensor is not None]


class RandomState:
    """The state that the random generators are in when this is made: the CPU's and those of the tensors' devices."""

    def __init__(self, *tensors: torch.Tensor):
        self.device_type = tensors[0].device.type
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(*tensors)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Inside, dropout draws what it drew then; afterwards the generators are as they were before."""
        kind = {} if self.device_type == "cpu" else {"device_type": self.device_type}
        with torch.random.fork_rng(devices=self.devices, **kind):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states, **kind)
            yield
