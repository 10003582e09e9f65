# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A longer context of the text tower: position embeddings stretched as in Long-CLIP (Zhang et al. 2024,
arXiv 2403.15378)."""

import torch
from torch import nn

from modeling_mlip import MLIPModel, MLIPTextConfig

KEPT_POSITIONS = 20


def stretch_positions(weight: torch.Tensor, length: int, keep: int = KEPT_POSITIONS) -> torch.Tensor:
    """Position embeddings of a longer context (Long-CLIP, section 3.1).

    The first `keep` positions stay as they are, so a caption of up to `keep` tokens keeps its embedding. The other
    `n = context - keep` positions become `m = length - keep`: the new position `keep + i` lies at `keep + i * n / m`
    among the old ones, and is interpolated linearly between its two neighbours. New positions beyond the last old one
    are extrapolated from the last two. From 77 to 248 this is what Long-CLIP computes.

    Args:
        weight: `(context, D)`.
        length: new number of positions, above `context`.
        keep: number of positions that stay, at most `context - 2`.

    Returns:
        `(length, D)` in the dtype of `weight`, computed in at least float32.

    Raises:
        ValueError: if `length` or `keep` is out of range.

    Source: https://github.com/beichenzbc/Long-CLIP/blob/3966af9ae9331666309a22128468b734db4672a7/model/longclip.py#L230
    """
    context = len(weight)
    if length <= context:
        raise ValueError(f"length={length}: choose more than the {context} positions that there are.")
    if not 0 <= keep <= context - 2:
        raise ValueError(
            f"keep={keep} of {context} positions leaves fewer than two to interpolate; choose 0 to {context - 2}."
        )
    steps = torch.arange(length - keep, dtype=torch.float64, device=weight.device)
    place = keep + steps * (context - keep) / (length - keep)  # among the old positions
    left = place.long().clamp(max=context - 2)
    values = weight.to(torch.promote_types(weight.dtype, torch.float32))
    stretched = values[left].lerp(values[left + 1], (place - left).to(values.dtype)[:, None])
    return torch.cat([weight[:keep], stretched.to(weight.dtype)])


def check_stretchable(config: MLIPTextConfig, length: int) -> None:
    """Raises ValueError if a text tower cannot be stretched to `length` tokens, which is above its context."""
    context = config.max_position_embeddings
    if config.pooling != "eos" or not config.use_causal_mask:
        raise ValueError(
            f"max_seq_length={length}: this text tower reads the padding (pooling={config.pooling!r}, "
            f"use_causal_mask={config.use_causal_mask}), so a longer context would change the embedding of every "
            f"caption. Choose at most {context}, or a model with a causal text tower that pools at EOS."
        )
    if context < KEPT_POSITIONS + 2:
        raise ValueError(
            f"max_seq_length={length}: the context of {context} tokens is too short to stretch, which keeps the first "
            f"{KEPT_POSITIONS} positions. Choose at most {context}."
        )


@torch.no_grad()
def stretch_text_context(model: MLIPModel, length: int) -> None:
    """Gives the text tower a context of `length` tokens, in place, with `stretch_positions`.

    Args:
        length: above `max_position_embeddings`, which becomes `length` in the configuration.

    Raises:
        ValueError: if the tower reads its padding, or `length` or the context is too short.
    """
    text_model = model.text_model
    check_stretchable(text_model.config, length)
    embeddings = text_model.embeddings
    old = embeddings.position_embedding.weight
    new = nn.Embedding(length, old.shape[1], _weight=stretch_positions(old, length))
    embeddings.position_embedding = new.requires_grad_(old.requires_grad)
    embeddings.position_ids = torch.arange(length, device=embeddings.position_ids.device).expand((1, -1))
    for config in (text_model.config, model.config.text_config):
        config.max_position_embeddings = length
