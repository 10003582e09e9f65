# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""One contrastive batch out of the batches of several processes, with exact gradients.

Every process computes the loss of the whole batch. The backward of the exchange sums what all processes say of an
embedding, and DDP then averages over processes: together the gradient of one loss on one large batch.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.nn.functional import all_gather

from modeling_mlip.losses import PairEmbeddings, TokenEmbeddings


def gather_pairs(pairs: PairEmbeddings) -> PairEmbeddings:
    """The pairs of all processes in the order of their ranks; `pairs` itself when there is one process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return pairs
    # Captions are padded to the longest of their own process, and a process that skipped samples has fewer rows.
    rows = pairs.text_embeds.shape[0]
    length = 0 if pairs.tokens is None else pairs.tokens.text_mask.shape[1]
    shape = torch.tensor([rows, length], device=pairs.text_embeds.device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, shape)
    all_rows, all_lengths = zip(*(shape.tolist() for shape in shapes), strict=True)

    def gather(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else _gather_rows(tensor, all_rows)

    tokens = pairs.tokens
    if tokens is not None:
        missing = max(all_lengths) - length
        tokens = TokenEmbeddings(
            image_tokens=_gather_rows(tokens.image_tokens, all_rows),
            image_weights=_gather_rows(tokens.image_weights, all_rows),
            text_tokens=_gather_rows(nn.functional.pad(tokens.text_tokens, (0, 0, 0, missing)), all_rows),
            text_mask=_gather_rows(nn.functional.pad(tokens.text_mask, (0, missing)), all_rows),
        )
    return PairEmbeddings(
        image_embeds=_gather_rows(pairs.image_embeds, all_rows),
        text_embeds=_gather_rows(pairs.text_embeds, all_rows),
        caption_keys=_gather_rows(pairs.caption_keys, all_rows),
        image_keys=gather(pairs.image_keys),
        frequency_embeds=gather(pairs.frequency_embeds),
        tokens=tokens,
    )


def _gather_rows(tensor: torch.Tensor, all_rows: tuple[int, ...]) -> torch.Tensor:
    """`(R_local, ...)` of each process -> `(R_1 + R_2 + ..., ...)`, with gradients where `tensor` has one."""
    padding = [0, 0] * (tensor.ndim - 1) + [0, max(all_rows) - tensor.shape[0]]
    padded = nn.functional.pad(tensor, padding).contiguous()
    if tensor.requires_grad:
        parts = all_gather(padded)
    else:
        parts = [torch.empty_like(padded) for _ in all_rows]
        dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, all_rows, strict=True)])
