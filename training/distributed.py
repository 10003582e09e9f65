# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""One contrastive batch out of the batches of several processes, with exact gradients.

Every process compares its own rows with the columns of all, `(R, C)` scores instead of `(C, C)`. The backward pass of
an exchange brings what all processes say of an embedding to the process that it comes from; `row_share` and the mean
that DDP and FSDP take over processes make it the gradient of the mean over the whole batch, whatever the shares.
"""

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from modeling_mlip.losses import PairColumns, PairEmbeddings, TokenColumns

TOKEN_LOSS_SCOPES = ("global", "local")


def num_processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def gather_numbers(*numbers: int, device: torch.device | str = "cpu") -> list[list[int]]:
    """Each process's numbers, in the order of their ranks."""
    if num_processes() == 1:
        return [list(numbers)]
    own = torch.tensor(numbers, device=device)
    every = own.new_empty(num_processes(), len(numbers))
    dist.all_gather_into_tensor(every, own[None])
    return every.tolist()


def gather_strings(strings: list[str]) -> list[str]:
    """The strings of all processes, in the order of their ranks."""
    every: list[Any] = [strings]
    if num_processes() > 1:
        every = [None] * num_processes()
        dist.all_gather_object(every, strings)
    return [string for part in every for string in part]


def row_share(num_rows: int, num_columns: int) -> float:
    """What the mean over this process's rows counts for, so that the mean over processes is the one over all rows."""
    return num_processes() * num_rows / num_columns


def gather_columns(pairs: PairEmbeddings, token_loss_scope: str = "global") -> PairColumns | None:
    """The pairs of all processes, in the order of their ranks; `None` when there is one process.

    With `token_loss_scope="global"` the caption tokens are exchanged, and later the scores; image tokens, the larger
    part, stay where they are. With "local" the token level compares the pairs of one process.
    """
    if num_processes() == 1:
        return None
    # Captions are padded to the longest of their own process, and a process that skipped samples has fewer rows.
    length = 0 if pairs.tokens is None else pairs.tokens.text_mask.shape[1]
    shapes = gather_numbers(len(pairs.text_embeds), length, device=pairs.text_embeds.device)
    rows = [shape[0] for shape in shapes]
    tokens = None
    if pairs.tokens is not None and token_loss_scope == "global":
        missing = max(shape[1] for shape in shapes) - length
        tokens = TokenColumns(
            text_tokens=gather_rows(nn.functional.pad(pairs.tokens.text_tokens, (0, 0, 0, missing)), rows),
            text_mask=gather_rows(nn.functional.pad(pairs.tokens.text_mask, (0, missing)), rows),
            swap_scores=partial(swap_scores, rows=rows),
        )
    return PairColumns(
        image_embeds=gather_rows(pairs.image_embeds, rows),
        text_embeds=gather_rows(pairs.text_embeds, rows),
        caption_keys=gather_rows(pairs.caption_keys, rows),
        image_keys=None if pairs.image_keys is None else gather_rows(pairs.image_keys, rows),
        frequency_embeds=None if pairs.frequency_embeds is None else gather_rows(pairs.frequency_embeds, rows),
        tokens=tokens,
    )


def gather_rows(tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """`(R, ...)` of each process, R as `rows` says -> `(C, ...)` with C = sum(rows), with gradients."""
    return _GatherRows.apply(tensor, rows)


def swap_scores(scores: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """`(R, C)`, own images against all captions -> `(C, R)`, all images against own captions, with gradients."""
    return _SwapScores.apply(scores, rows)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: torch.Tensor, rows: list[int]) -> torch.Tensor:
        ctx.rows = rows
        padding = [0, 0] * (tensor.ndim - 1) + [0, max(rows) - len(tensor)]
        padded = nn.functional.pad(tensor, padding).contiguous()
        every = padded.new_empty(len(rows) * max(rows), *tensor.shape[1:])
        dist.all_gather_into_tensor(every, padded)
        parts = every.split(max(rows))
        return torch.cat([part[:count] for part, count in zip(parts, rows, strict=True)])

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = ctx.rows
        padded = gradient.new_zeros(len(rows), max(rows), *gradient.shape[1:])
        for part, share in zip(padded, gradient.split(rows), strict=True):
            part[: len(share)] = share
        own = gradient.new_empty(max(rows), *gradient.shape[1:])
        dist.reduce_scatter_tensor(own, padded.flatten(0, 1))
        return own[: rows[dist.get_rank()]], None


class _SwapScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores: torch.Tensor, rows: list[int]) -> torch.Tensor:
        ctx.rows = rows
        own = rows[dist.get_rank()]
        sizes = [own * count for count in rows]
        sent = torch.cat([part.flatten() for part in scores.split(rows, dim=1)])  # (R, R_s) for each process s
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, sizes, sizes)  # (R_s, R) of each process s
        return received.view(sum(rows), own)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        rows = ctx.rows
        own = rows[dist.get_rank()]
        sizes = [own * count for count in rows]
        sent = gradient.contiguous().flatten()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, sizes, sizes)  # (R, R_s) of each process s
        parts = [part.view(own, count) for part, count in zip(received.split(sizes), rows, strict=True)]
        return torch.cat(parts, dim=1), None
