# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The losses of MLIP, as pure functions that return named parts.

Every function takes its own rows against all columns, so that a process of several can compute its share of one large
contrastive batch; with one process both are the batch. Axes: I images, T captions, M image tokens, L caption tokens,
P width of the shared space.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

MAX_LOGIT_SCALE = math.log(100.0)
# Similarities of token pairs held at a time: 2**24 of them take 64 MiB in float32.
MAX_BLOCK_ELEMENTS = 2**24
# Captions, from the shortest to the longest, are compared in at least so many blocks, each as wide as its longest.
CAPTION_BLOCKS = 4


def caption_keys(input_ids: torch.Tensor, caption_mask: torch.Tensor) -> torch.Tensor:
    """A 64-bit key for each caption, equal where captions are equal, whatever their padding.

    Args:
        input_ids: `(T, L)`.
        caption_mask: `(T, L)` bool, False at padding.

    Returns:
        `(T,)` int64. Different captions collide with a probability of about 2**-64 for a pair.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    # A random-looking number for each (token, position), in wrapping 64-bit integers; their sum describes the caption.
    mixed = (input_ids + 1) * 0x5851F42D4C957F2D + (positions + 1) * 0x14057B7EF767814F
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 29)) * 0x5851F42D4C957F2D
    return (mixed ^ (mixed >> 32)).masked_fill(~caption_mask, 0).sum(dim=1)


def positive_targets(row_keys: list[torch.Tensor], column_keys: list[torch.Tensor]) -> torch.Tensor:
    """Soft targets: a row's positives are the columns that share any of its keys, with equal weight.

    Args:
        row_keys: one `(R,)` for each kind of key (caption, image).
        column_keys: one `(C,)` for each kind; every row has an equal among them.

    Returns:
        `(R, C)` float32, rows sum to 1.
    """
    equal = [rows[:, None] == columns[None, :] for rows, columns in zip(row_keys, column_keys, strict=True)]
    positives = torch.stack(equal).any(dim=0).float()
    return positives / positives.sum(dim=1, keepdim=True)


def info_nce(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of `logits` `(R, C)` against soft `targets` `(R, C)`, in at least float32; a scalar."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -(targets.to(logits.dtype) * logits.log_softmax(dim=-1)).sum(dim=-1).mean()


def temperature(logit_scale: torch.Tensor) -> torch.Tensor:
    """exp of the learned scale, at most 100 (Radford et al. 2021, arXiv 2103.00020, section 2.5).

    The cap is on the value alone: with its gradient cut off, a scale that once reaches the cap could never come back.
    """
    capped = logit_scale + (logit_scale.clamp(max=MAX_LOGIT_SCALE) - logit_scale).detach()
    return capped.exp()


def instance_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    targets: torch.Tensor,
    all_image_embeds: torch.Tensor | None = None,
    all_text_embeds: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric InfoNCE.

    Args:
        image_embeds: `(R, P)`, normalised: the images of this process.
        text_embeds: `(R, P)`, normalised: their captions.
        logit_scale: log of the inverse temperature.
        targets: `(R, C)`, from `positive_targets`.
        all_image_embeds: `(C, P)`, those of all processes; `None`: the rows are all there is.
        all_text_embeds: `(C, P)`, likewise.

    Returns:
        A scalar: the mean of image -> text and text -> image over the rows.
    """
    scale = temperature(logit_scale)
    image_columns = image_embeds if all_image_embeds is None else all_image_embeds
    text_columns = text_embeds if all_text_embeds is None else all_text_embeds
    image_to_text = info_nce(scale * image_embeds @ text_columns.t(), targets)
    text_to_image = info_nce(scale * text_embeds @ image_columns.t(), targets)
    return (image_to_text + text_to_image) / 2


def token_scores(
    image_tokens: torch.Tensor,
    image_weights: torch.Tensor,
    text_tokens: torch.Tensor,
    text_mask: torch.Tensor,
    max_block_elements: int = MAX_BLOCK_ELEMENTS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Late interaction (FILIP, Yao et al. 2022, arXiv 2111.07783, equations 4 and 5), image side weighted by size.

    Captions are sorted by length, so that hardly more than the tokens that count are compared. The similarities, where
    they are many, are computed block by block and computed again in backward, so that memory is bounded by a few blocks
    besides the tokens and their gradients.

    Args:
        image_tokens: `(I, M, P)`, normalised.
        image_weights: `(I, M)`, rows sum to 1.
        text_tokens: `(T, L, P)`, normalised.
        text_mask: `(T, L)` bool, False at tokens that do not count; at least one True in each row.
        max_block_elements: largest block.

    Returns:
        Two `(I, T)`: the weighted mean over image tokens of the best caption token, and the mean over caption tokens
        of the best image token.
    """
    (I, M, _), T = image_tokens.shape, text_tokens.shape[0]
    order, text_tokens, lengths = _sorted_by_length(text_tokens, text_mask)
    image_weights = image_weights.to(image_tokens.dtype)
    # Few captions to a block, so that little of it is padding; where that is still large, blocks about as tall as wide.
    fits = max_block_elements >= I * M * int(lengths.sum())
    side = math.isqrt(max_block_elements)
    images = I if fits else max(side // M, 1)
    rows = []
    for tokens, weights in zip(image_tokens.split(images), image_weights.split(images), strict=True):
        row, first = [], 0
        while first < T:
            end = min(first + math.ceil(T / CAPTION_BLOCKS), T)
            if not fits:
                end = min(end, first + max(side // int(lengths[end - 1]), 1))
            block = (tokens, weights, text_tokens[first:end, : int(lengths[end - 1])], lengths[first:end])
            if fits:
                row.append(_block_scores(*block))
            else:
                row.append(checkpoint(_block_scores, *block, use_reentrant=False, preserve_rng_state=False))
            first = end
        rows.append([torch.cat(scores, dim=1) for scores in zip(*row, strict=True)])
    place = order.argsort()
    by_image, by_text = (torch.cat(scores, dim=0)[:, place] for scores in zip(*rows, strict=True))
    return by_image, by_text


def _sorted_by_length(
    text_tokens: torch.Tensor, text_mask: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Captions from the shortest to the longest: their order `(T,)`, tokens `(T, L, P)`, lengths `(T,)` on the CPU.

    The tokens that count come first; those that do not become copies of the first, which no maximum is changed by.
    """
    lengths, order = text_mask.sum(dim=1).sort(stable=True)
    counts = torch.arange(text_mask.shape[1], device=text_mask.device) < lengths[:, None]  # (T, L)
    position = text_mask[order].long().argsort(dim=1, descending=True, stable=True)
    position = torch.where(counts, position, position[:, :1])
    tokens = text_tokens[order].gather(1, position[..., None].expand(-1, -1, text_tokens.shape[-1]))
    return order, tokens, lengths.cpu()


def _block_scores(
    image_tokens: torch.Tensor, image_weights: torch.Tensor, text_tokens: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    (I, M, _), (T, L, _) = image_tokens.shape, text_tokens.shape
    similarity = (image_tokens.flatten(0, 1) @ text_tokens.flatten(0, 1).t()).view(I, M, T, L)
    best_image = similarity.max(dim=1).values  # (I, T, L)
    best_text = similarity.max(dim=3).values  # (I, M, T)
    lengths = lengths.to(similarity.device)[:, None]
    text_weights = (torch.arange(L, device=lengths.device) < lengths) / lengths.to(similarity.dtype)
    by_image = torch.einsum("imt,im->it", best_text, image_weights.to(similarity.dtype))
    by_text = torch.einsum("itl,tl->it", best_image, text_weights)
    return by_image, by_text


def token_loss(
    by_image: torch.Tensor, by_text: torch.Tensor, logit_scale: torch.Tensor, targets: torch.Tensor
) -> torch.Tensor:
    """InfoNCE over the scores of `token_scores`: images choose among captions, captions among images.

    Args:
        by_image: `(R, C)`, rows of this process's images against all captions.
        by_text: `(C, R)`, all images against this process's captions.
        logit_scale: log of the inverse temperature.
        targets: `(R, C)`, from `positive_targets`.

    Returns:
        A scalar.
    """
    scale = temperature(logit_scale)
    return (info_nce(scale * by_image, targets) + info_nce(scale * by_text.t(), targets)) / 2


def grouped_token_loss(
    tokens: "TokenEmbeddings", keys: list[torch.Tensor], logit_scale: torch.Tensor, group_size: int | None
) -> torch.Tensor:
    """`token_loss` within groups of consecutive pairs, all about as large: the mean over the pairs.

    Comparing all R pairs costs `R^2 M L P` multiplications, from some hundreds of pairs on more than both towers.

    Args:
        tokens: of R pairs.
        keys: one `(R,)` for each kind of key, see `positive_targets`.
        logit_scale: log of the inverse temperature.
        group_size: pairs in the largest group; `None`: one group.

    Returns:
        A scalar.
    """
    num_rows = len(tokens.text_mask)
    num_groups = 1 if group_size is None else math.ceil(num_rows / group_size)
    groups = zip(*(tensor.tensor_split(num_groups) for tensor in (*tokens, *keys)), strict=True)
    losses = []
    for image_tokens, image_weights, text_tokens, text_mask, *group_keys in groups:
        targets = positive_targets(group_keys, group_keys)
        scores = token_scores(image_tokens, image_weights, text_tokens, text_mask)
        losses.append(token_loss(*scores, logit_scale, targets) * (len(text_mask) / num_rows))
    return torch.stack(losses).sum()


class TokenEmbeddings(NamedTuple):
    """What the token-level loss needs, see `token_scores`."""

    image_tokens: torch.Tensor  # (R, M, P)
    image_weights: torch.Tensor  # (R, M), rows sum to 1
    text_tokens: torch.Tensor  # (R, L, P)
    text_mask: torch.Tensor  # (R, L) bool


class PairEmbeddings(NamedTuple):
    """What the losses need of a batch of image-caption pairs; everything is normalised where it is an embedding."""

    image_embeds: torch.Tensor  # (R, P)
    text_embeds: torch.Tensor  # (R, P)
    caption_keys: torch.Tensor  # (R,) int64, see `caption_keys`
    image_keys: torch.Tensor | None = None  # (R,) int64, equal for equal images
    frequency_embeds: torch.Tensor | None = None  # (R, P)
    tokens: TokenEmbeddings | None = None


def pairs_on(device: torch.device, pairs: Any) -> Any:
    """The same named tuple with every tensor on one device, which a model on several needs."""
    if isinstance(pairs, torch.Tensor):
        return pairs.to(device)
    return type(pairs)(*(pairs_on(device, part) for part in pairs)) if isinstance(pairs, tuple) else pairs


class TokenColumns(NamedTuple):
    """The caption tokens of all processes, and how processes exchange scores."""

    text_tokens: torch.Tensor  # (C, L, P)
    text_mask: torch.Tensor  # (C, L) bool
    # (R, C), own images against all captions -> (C, R), all images against own captions; differentiable
    swap_scores: Callable[[torch.Tensor], torch.Tensor]


class PairColumns(NamedTuple):
    """What the rows of one process are compared with: the pairs of all processes, C of them."""

    image_embeds: torch.Tensor  # (C, P)
    text_embeds: torch.Tensor  # (C, P)
    caption_keys: torch.Tensor  # (C,)
    image_keys: torch.Tensor | None = None  # (C,)
    frequency_embeds: torch.Tensor | None = None  # (C, P)
    tokens: TokenColumns | None = None  # None: the token level compares the pairs of this process alone


def _keys(pairs: PairEmbeddings | PairColumns) -> list[torch.Tensor]:
    return [pairs.caption_keys] if pairs.image_keys is None else [pairs.caption_keys, pairs.image_keys]


def multi_level_loss(
    pairs: PairEmbeddings,
    logit_scale: torch.Tensor,
    frequency_logit_scale: torch.Tensor | None = None,
    token_logit_scale: torch.Tensor | None = None,
    frequency_loss_weight: float = 0.0,
    token_loss_weight: float = 0.0,
    token_loss_group_size: int | None = None,
    columns: PairColumns | None = None,
) -> dict[str, torch.Tensor]:
    """The three losses of MLIP on one batch and their weighted sum; a level whose inputs are None is left out.

    Args:
        pairs: R rows, the pairs of this process.
        logit_scale: log of the inverse temperature, one for each loss.
        frequency_logit_scale: likewise.
        token_logit_scale: likewise.
        frequency_loss_weight: what the frequency loss counts for beside the spatial one.
        token_loss_weight: what the token loss counts for.
        token_loss_group_size: see `grouped_token_loss`; where tokens of other processes are there, all are compared.
        columns: the pairs of all processes; `None`: the rows are all there is.

    Returns:
        Scalars, means over the rows: `spatial_loss`, `frequency_loss` and `token_loss` where computed, and `loss`.
    """
    own_keys = _keys(pairs)
    targets = positive_targets(own_keys, own_keys if columns is None else _keys(columns))
    others: PairEmbeddings | PairColumns = pairs if columns is None else columns
    # Step (1): instance level, spatial domain
    parts = {
        "spatial_loss": instance_loss(
            pairs.image_embeds, pairs.text_embeds, logit_scale, targets, others.image_embeds, others.text_embeds
        )
    }
    loss = parts["spatial_loss"]
    # Step (2): instance level, frequency domain
    if pairs.frequency_embeds is not None and frequency_logit_scale is not None:
        parts["frequency_loss"] = instance_loss(
            pairs.frequency_embeds,
            pairs.text_embeds,
            frequency_logit_scale,
            targets,
            others.frequency_embeds,
            others.text_embeds,
        )
        loss = loss + frequency_loss_weight * parts["frequency_loss"]
    # Step (3): token level, both domains
    if pairs.tokens is not None and token_logit_scale is not None:
        tokens = pairs.tokens
        if columns is None or columns.tokens is None:
            parts["token_loss"] = grouped_token_loss(tokens, own_keys, token_logit_scale, token_loss_group_size)
        else:  # each pair of image and caption is compared once, where the image is
            text = (columns.tokens.text_tokens, columns.tokens.text_mask)
            by_image, by_text = token_scores(tokens.image_tokens, tokens.image_weights, *text)
            scores = by_image, columns.tokens.swap_scores(by_text)
            parts["token_loss"] = token_loss(*scores, token_logit_scale, targets)
        loss = loss + token_loss_weight * parts["token_loss"]
    return {**parts, "loss": loss}
