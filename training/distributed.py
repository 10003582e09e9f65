# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Exact contrastive losses over several processes.

Each process compares its own R rows with the C rows of all processes, so it computes `(R, C)` scores instead of
`(C, C)`. The backward pass of each collective sums the gradients of a row over all processes. `Exchange.row_share` and
the mean that DDP and FSDP take over processes turn these sums into the gradient of the mean over all C rows, for any
distribution of the rows.

A loss that is a sum over columns, such as the sigmoid loss, needs no more than the columns of one process at a time
(`Exchange.sum_over_chunks`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_numbers(*numbers: int, device: torch.device | str = "cpu") -> list[list[int]]:
    """Gathers the integers of each process, ordered by rank."""
    if num_processes() == 1:
        return [list(numbers)]
    local = torch.tensor(numbers, device=device)
    gathered = local.new_empty(num_processes(), len(numbers))
    dist.all_gather_into_tensor(gathered, local[None])
    return gathered.tolist()


def gather_strings(strings: list[str]) -> list[str]:
    """Gathers the strings of all processes, ordered by rank."""
    gathered: list[Any] = [strings]
    if num_processes() > 1:
        gathered = [None] * num_processes()
        dist.all_gather_object(gathered, strings)
    return [string for strings_of_rank in gathered for string in strings_of_rank]


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Averages the gradients of parameters that no wrapper averages. A missing gradient counts as zeros, because the
    processes may differ in which parameters have one."""
    if num_processes() == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        dist.all_reduce(parameter.grad.div_(num_processes()))


class Exchange:
    """Collectives for the rows of one batch.

    Args:
        num_rows: R, the pairs of this process.
        device: where tensors are exchanged.
    """

    def __init__(self, num_rows: int, device: torch.device | str = "cpu"):
        self.rows = [rows for (rows,) in gather_numbers(num_rows, device=device)]  # of each process
        self.num_rows = num_rows
        self.device = device

    @property
    def num_columns(self) -> int:
        """C, the pairs of all processes."""
        return sum(self.rows)

    @property
    def row_share(self) -> float:
        """Factor of the mean over this process's rows, so that the mean over processes is the mean over all C rows."""
        return len(self.rows) * self.num_rows / self.num_columns

    def gather(self, structure: Any) -> Any:
        """Gathers every tensor `(R, ...)` of a nested structure to `(C, ...)`, ordered by rank, with gradients.

        Trailing axes may differ between processes, such as the length of the longest caption. They are padded with
        zeros to the largest. Tensors of all processes must have the same number of axes. With one process the structure
        itself is returned.
        """
        if len(self.rows) == 1:
            return structure
        leaves, spec = tree_flatten(structure)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        lengths = [length for tensor in tensors for length in tensor.shape[1:]]
        all_lengths = gather_numbers(*lengths, device=self.device) if lengths else []
        largest = [max(column) for column in zip(*all_lengths, strict=True)]
        gathered = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                sizes, largest = largest[: leaf.ndim - 1], largest[leaf.ndim - 1 :]
                leaf = _GatherRows.apply(_pad(leaf, [len(leaf), *sizes]), self.rows)
            gathered.append(leaf)
        return tree_unflatten(gathered, spec)

    def swap_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """`(R, C)`, own images against all captions -> `(C, R)`, all images against own captions, with gradients."""
        return _SwapScores.apply(scores, self.rows)

    def sum_over_chunks(self, block: Callable[[Any, Any], torch.Tensor], rows: Any, chunk: Any) -> torch.Tensor:
        """The sum of `block(rows, chunk)` over the chunks of all processes, with gradients.

        The chunks go from process to process, so that a process holds its own chunk and one other. The backward pass
        sends them round again, each with its gradient, and computes every block a second time. So neither the columns
        nor the scores of all processes are ever in memory (Zhai et al. 2023, arXiv 2303.15343, section 3.3).

        Args:
            block: `(rows, chunk)` -> a tensor whose shape does not depend on the chunk; without side effects.
            rows: nested structure of tensors that stay in this process: its rows, and parameters.
            chunk: nested structure of tensors `(R, ...)` of this process. Only the first axis may differ between
                processes.
        """
        if len(self.rows) == 1:
            return block(rows, chunk)
        leaves, spec = tree_flatten((rows, chunk))

        def block_of_leaves(tensors: list[torch.Tensor]) -> torch.Tensor:
            return block(*tree_unflatten(tensors, spec))

        return _SumOverChunks.apply(block_of_leaves, self.rows, len(tree_leaves(rows)), *leaves)


def _pad(tensor: torch.Tensor, shape: list[int]) -> torch.Tensor:
    """Pads a tensor with zeros at the end of each axis."""
    missing = [size - length for size, length in zip(shape, tensor.shape, strict=True)]
    if not any(missing):
        return tensor
    return nn.functional.pad(tensor, [amount for pair in ((0, m) for m in reversed(missing)) for amount in pair])


class _GatherRows(torch.autograd.Function):
    """`(R, ...)` of each process -> `(C, ...)`."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
        ctx.rows = rows
        padded = _pad(tensor, [max(rows), *tensor.shape[1:]]).contiguous()
        gathered = padded.new_empty(len(rows) * max(rows), *tensor.shape[1:])
        dist.all_gather_into_tensor(gathered, padded)
        blocks = gathered.split(max(rows))
        return torch.cat([block[:count] for block, count in zip(blocks, rows, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = ctx.rows
        padded = gradient.new_zeros(len(rows), max(rows), *gradient.shape[1:])
        for block, gradient_of_rank in zip(padded, gradient.split(rows), strict=True):
            block[: len(gradient_of_rank)] = gradient_of_rank
        local = gradient.new_empty(max(rows), *gradient.shape[1:])
        dist.reduce_scatter_tensor(local, padded.flatten(0, 1))
        return local[: rows[dist.get_rank()]], None


class _SwapScores(torch.autograd.Function):
    """`(R, C)` -> `(C, R)`: each process receives the columns that belong to its rows."""

    @staticmethod
    def forward(ctx, scores: torch.Tensor, rows: list[int]) -> torch.Tensor:
        ctx.rows = rows
        num_rows = rows[dist.get_rank()]
        sizes = [num_rows * count for count in rows]
        sent = torch.cat([block.flatten() for block in scores.split(rows, dim=1)])  # (R, R_s) for each process s
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, sizes, sizes)  # (R_s, R) of each process s
        return received.view(sum(rows), num_rows)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = ctx.rows
        num_rows = rows[dist.get_rank()]
        sizes = [num_rows * count for count in rows]
        sent = gradient.contiguous().flatten()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, sizes, sizes)  # (R, R_s) of each process s
        blocks = [block.view(num_rows, count) for block, count in zip(received.split(sizes), rows, strict=True)]
        return torch.cat(blocks, dim=1), None


class _SumOverChunks(torch.autograd.Function):
    """See `Exchange.sum_over_chunks`. The first `num_staying` tensors stay in this process, the others travel."""

    @staticmethod
    def forward(
        ctx,
        block: Callable[[list[torch.Tensor]], torch.Tensor],
        rows: list[int],
        num_staying: int,
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        ctx.block, ctx.rows, ctx.num_staying = block, rows, num_staying
        ctx.save_for_backward(*tensors)
        staying, chunk = list(tensors[:num_staying]), list(tensors[num_staying:])
        total = block(staying + chunk)
        for step in range(1, len(rows)):
            chunk = _pass_on(chunk, rows, step)
            total = total + block(staying + chunk)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: torch.Tensor) -> tuple[Any, ...]:
        rows = ctx.rows
        staying, chunk = list(ctx.saved_tensors[: ctx.num_staying]), list(ctx.saved_tensors[ctx.num_staying :])
        needed = [place for place, is_needed in enumerate(ctx.needs_input_grad[3:]) if is_needed]
        # Sums of gradients, in at least float32. Those of the chunk travel with it, and in the end they are home.
        sums = {place: _zeros_for_sum(ctx.saved_tensors[place]) for place in needed}
        travelling = [place for place in needed if place >= ctx.num_staying]
        for step in range(1, len(rows) + 1):
            inputs = [tensor.detach().requires_grad_(place in sums) for place, tensor in enumerate(staying + chunk)]
            with torch.enable_grad():
                output = ctx.block(inputs)
            gradients = torch.autograd.grad(output, [inputs[place] for place in needed], gradient)
            for place, gradient_of_block in zip(needed, gradients, strict=True):
                sums[place] += gradient_of_block
            if step < len(rows):
                chunk = _pass_on(chunk, rows, step)
            received = _pass_on([sums[place] for place in travelling], rows, step)
            sums.update(zip(travelling, received, strict=True))
        results = [sums[place].to(tensor.dtype) if place in sums else None
                   for place, tensor in enumerate(ctx.saved_tensors)]  # fmt: skip
        return None, None, None, *results


def _zeros_for_sum(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32))


def _pass_on(tensors: list[torch.Tensor], rows: list[int], step: int) -> list[torch.Tensor]:
    """Sends tensors `(rows of a process, ...)` to the previous process in the ring, and receives those of the next one.

    Args:
        rows: of each process.
        step: 1 for the first time that the tensors move. The received tensors belong to the process `step` ranks
            further on.
    """
    rank, num = dist.get_rank(), len(rows)
    num_rows = rows[(rank + step) % num]
    received = [tensor.new_empty(num_rows, *tensor.shape[1:]) for tensor in tensors]
    transfers = []
    for tag, (sent, place) in enumerate(zip(tensors, received, strict=True)):
        transfers.append(dist.P2POp(dist.isend, sent.contiguous(), (rank - 1) % num, tag=tag))
        transfers.append(dist.P2POp(dist.irecv, place, (rank + 1) % num, tag=tag))
    for transfer in dist.batch_isend_irecv(transfers) if transfers else []:
        transfer.wait()
    return received
