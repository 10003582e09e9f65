# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Cached gradients: a large contrastive batch in the memory of a mini-batch (GradCache, Gao et al. 2021,
arXiv 2101.06983).

The first pass computes the rows of all mini-batches without a graph. The loss of all rows gives a gradient for each
row. The second pass computes each mini-batch again with a graph and propagates its gradients to the weights. The
functions below split, join and replay; `MLIPTrainer.training_step` runs the passes. They work on nested structures of
tensors (tuples, named tuples, lists, dictionaries, None) whose first axis is the pair.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from .distributed import gather_numbers


def count_mini_batches(num_rows: int, mini_batch_size: int | None, device: torch.device | str = "cpu") -> int:
    """The number of mini-batches, equal in all processes, of at most `mini_batch_size` pairs each.

    DDP and FSDP synchronise in every mini-batch. So a process with fewer rows makes its mini-batches smaller instead of
    making fewer. If one process has fewer rows than others have mini-batches, all mini-batches become larger.
    """
    if mini_batch_size is None:
        return 1
    all_rows = [rows for (rows,) in gather_numbers(num_rows, device=device)]
    return min(-(-max(all_rows) // mini_batch_size), min(all_rows))


def split_rows(structure: Any, count: int) -> list[Any]:
    """Splits every tensor `(R, ...)` of a structure into `count` mini-batches of about equal size."""
    leaves, spec = tree_flatten(structure)
    pieces = [leaf.tensor_split(count) if isinstance(leaf, torch.Tensor) else [leaf] * count for leaf in leaves]
    return [tree_unflatten([piece[i] for piece in pieces], spec) for i in range(count)]


def join_rows(structures: list[Any]) -> Any:
    """Concatenates mini-batches of one structure along the first axis; the inverse of `split_rows`."""
    all_leaves = [tree_leaves(structure) for structure in structures]
    spec = tree_flatten(structures[0])[1]
    joined = [torch.cat(leaves) if isinstance(leaves[0], torch.Tensor) else leaves[0]
              for leaves in map(list, zip(*all_leaves, strict=True))]  # fmt: skip
    return tree_unflatten(joined, spec)


def floating_tensors(structure: Any) -> list[torch.Tensor]:
    """The floating-point tensors of a structure, in a fixed order: those that can have a gradient."""
    return [leaf for leaf in tree_leaves(structure) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]


class RandomState:
    """The state of the random generators of the CPU and of the devices of `tensors` when it is created."""

    def __init__(self, *tensors: torch.Tensor):
        self.device_type = tensors[0].device.type
        self.cpu_state = torch.get_rng_state()
        self.devices, self.device_states = get_device_states(*tensors)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Restores the state inside the context, so that dropout draws the same mask. The current state returns
        afterwards."""
        kind = {} if self.device_type == "cpu" else {"device_type": self.device_type}
        with torch.random.fork_rng(devices=self.devices, **kind):
            torch.set_rng_state(self.cpu_state)
            set_device_states(self.devices, self.device_states, **kind)
            yield
