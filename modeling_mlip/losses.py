# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The losses of MLIP, as pure functions that return named parts.

Each function compares R rows, the pairs of this process, with C columns, the pairs of all processes, so that several
processes share one large contrastive batch. With one process, rows and columns are the same. Axes: I images, T
captions, M image tokens, L caption tokens, P width of the shared space.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

MAX_LOGIT_SCALE = math.log(100.0)
# Maximum number of token similarities in memory at a time: 2**24 values take 64 MiB in float32.
MAX_BLOCK_ELEMENTS = 2**24
# Minimum number of blocks of captions, sorted by length. Each block is as wide as its longest caption.
CAPTION_BLOCKS = 4


def caption_keys(input_ids: torch.Tensor, caption_mask: torch.Tensor) -> torch.Tensor:
    """A 64-bit key for each caption; equal captions have equal keys, independent of padding.

    Args:
        input_ids: `(T, L)`.
        caption_mask: `(T, L)` bool, False at padding.

    Returns:
        `(T,)` int64. Two different captions have equal keys with a probability of about 2**-64.
    """
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    # A hash of each (token, position) in 64-bit integers that wrap around; the key is the sum of the hashes.
    mixed = (input_ids + 1) * 0x5851F42D4C957F2D + (positions + 1) * 0x14057B7EF767814F
    for _ in range(2):
        mixed = (mixed ^ (mixed >> 29)) * 0x5851F42D4C957F2D
    return (mixed ^ (mixed >> 32)).masked_fill(~caption_mask, 0).sum(dim=1)


def positive_targets(row_keys: list[torch.Tensor], column_keys: list[torch.Tensor]) -> torch.Tensor:
    """Soft targets: the positives of a row are the columns with an equal key of any kind, with equal weights.

    Args:
        row_keys: one `(R,)` for each kind of key (caption, image).
        column_keys: one `(C,)` for each kind; every row key must occur among them.

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
    """exp(logit_scale), at most 100 (Radford et al. 2021, arXiv 2103.00020, section 2.5).

    Only the value is clamped. The gradient passes, so that training can lower a scale that has reached the maximum.
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
        image_embeds: `(R, P)`, normalised.
        text_embeds: `(R, P)`, normalised: the captions of these images.
        logit_scale: log of the inverse temperature.
        targets: `(R, C)`, from `positive_targets`.
        all_image_embeds: `(C, P)`, the images of all processes; `None`: `image_embeds`.
        all_text_embeds: `(C, P)`, the captions of all processes; `None`: `text_embeds`.

    Returns:
        A scalar: the mean over the rows and over both directions, image to text and text to image.
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
    """Late interaction (FILIP, Yao et al. 2022, arXiv 2111.07783, equations 4 and 5), with weighted image tokens.

    Captions are sorted by length and compared in blocks, so that little time is spent on padding. If there are more
    than `max_block_elements` similarities, they are computed block by block, and again in the backward pass. Memory
    then holds a few blocks besides the tokens and their gradients.

    Args:
        image_tokens: `(I, M, P)`, normalised.
        image_weights: `(I, M)`, rows sum to 1.
        text_tokens: `(T, L, P)`, normalised.
        text_mask: `(T, L)` bool, False at tokens to leave out; at least one True in each row.
        max_block_elements: maximum number of similarities in a block.

    Returns:
        Two tensors `(I, T)`: the weighted mean over image tokens of the similarity to the most similar caption token,
        and the mean over caption tokens of the similarity to the most similar image token.
    """
    (I, M, _), T = image_tokens.shape, text_tokens.shape[0]
    order, text_tokens, lengths = _sorted_by_length(text_tokens, text_mask)
    image_weights = image_weights.to(image_tokens.dtype)
    # Blocks of few captions hold little padding. If such blocks are still too large, take about square ones.
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
    """Sorts captions by length: their order `(T,)`, tokens `(T, L, P)`, and lengths `(T,)` on the CPU.

    In each caption, the tokens in the mask come first. Copies of the first token replace all others; they change no
    maximum.
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
    """Symmetric InfoNCE over the scores of `token_scores`.

    Args:
        by_image: `(R, C)`, scores of the images of this process with all captions.
        by_text: `(C, R)`, scores of all images with the captions of this process.
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
    """`token_loss` within groups of consecutive pairs of about equal size.

    Comparing all R pairs takes `R^2 M L P` multiplications, more than both towers from some hundreds of pairs on.

    Args:
        tokens: the tokens of R pairs.
        keys: one `(R,)` for each kind of key, see `positive_targets`.
        logit_scale: log of the inverse temperature.
        group_size: maximum number of pairs in a group; `None`: one group.

    Returns:
        A scalar, the mean over the pairs.
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
    """The inputs of the token-level loss, see `token_scores`."""

    image_tokens: torch.Tensor  # (R, M, P)
    image_weights: torch.Tensor  # (R, M), rows sum to 1
    text_tokens: torch.Tensor  # (R, L, P)
    text_mask: torch.Tensor  # (R, L) bool


class PairEmbeddings(NamedTuple):
    """The inputs of the losses for a batch of image-caption pairs; all embeddings are normalised."""

    image_embeds: torch.Tensor  # (R, P)
    text_embeds: torch.Tensor  # (R, P)
    caption_keys: torch.Tensor  # (R,) int64, see `caption_keys`
    image_keys: torch.Tensor | None = None  # (R,) int64, equal for equal images
    frequency_embeds: torch.Tensor | None = None  # (R, P)
    tokens: TokenEmbeddings | None = None


def to_device(structure: Any, device: torch.device) -> Any:
    """Moves every tensor of a nested structure to one device.

    Args:
        structure: a tensor, or any nesting of tuples, named tuples, lists and dictionaries. Values that are not tensors
            (`None`, numbers, functions) stay as they are.
        device: the device that every tensor moves to.

    Returns:
        A structure of the same types.
    """
    if isinstance(structure, torch.Tensor):
        return structure.to(device)
    if isinstance(structure, dict):
        return type(structure)((key, to_device(value, device)) for key, value in structure.items())
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):  # a named tuple
        return type(structure)(*(to_device(value, device) for value in structure))
    if isinstance(structure, tuple | list):
        return type(structure)(to_device(value, device) for value in structure)
    return structure


class TokenColumns(NamedTuple):
    """The caption tokens of all processes, and the function that exchanges scores between processes."""

    text_tokens: torch.Tensor  # (C, L, P)
    text_mask: torch.Tensor  # (C, L) bool
    # Scores (R, C) of the images of this process with all captions -> scores (C, R) of all images with the captions of
    # this process; differentiable
    swap_scores: Callable[[torch.Tensor], torch.Tensor]


class PairColumns(NamedTuple):
    """The C pairs of all processes, with which the rows of one process are compared."""

    image_embeds: torch.Tensor  # (C, P)
    text_embeds: torch.Tensor  # (C, P)
    caption_keys: torch.Tensor  # (C,)
    image_keys: torch.Tensor | None = None  # (C,)
    frequency_embeds: torch.Tensor | None = None  # (C, P)
    tokens: TokenColumns | None = None  # None: the token-level loss compares the pairs of this process only


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
    """The three losses of MLIP on one batch and their weighted sum; a loss whose inputs are `None` is left out.

    Args:
        pairs: the R pairs of this process.
        logit_scale: log of the inverse temperature of the spatial loss.
        frequency_logit_scale: log of the inverse temperature of the frequency loss.
        token_logit_scale: log of the inverse temperature of the token-level loss.
        frequency_loss_weight: weight of the frequency loss; the spatial loss has weight 1.
        token_loss_weight: weight of the token-level loss.
        token_loss_group_size: see `grouped_token_loss`; not used if `columns` hold tokens of other processes.
        columns: the pairs of all processes; `None` if this process is the only one.

    Returns:
        Scalars, means over the rows: `spatial_loss`, `frequency_loss` and `token_loss` if computed, and `loss`.
    """
    row_keys = _keys(pairs)
    targets = positive_targets(row_keys, row_keys if columns is None else _keys(columns))
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
            parts["token_loss"] = grouped_token_loss(tokens, row_keys, token_logit_scale, token_loss_group_size)
        else:  # the process of the image computes both scores of an image and a caption
            text = (columns.tokens.text_tokens, columns.tokens.text_mask)
            by_image, by_text = token_scores(tokens.image_tokens, tokens.image_weights, *text)
            scores = by_image, columns.tokens.swap_scores(by_text)
            parts["token_loss"] = token_loss(*scores, token_logit_scale, targets)
        loss = loss + token_loss_weight * parts["token_loss"]
    return {**parts, "loss": loss}
