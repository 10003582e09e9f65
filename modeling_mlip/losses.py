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
from torch import nn

from .token_similarity import TokenEmbeddings, aligned_image_tokens, token_scores

MAX_LOGIT_SCALE = math.log(100.0)


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


def positive_pairs(row_keys: list[torch.Tensor], column_keys: list[torch.Tensor]) -> torch.Tensor:
    """`(R, C)` bool, whether row and column have an equal key of any kind.

    Args:
        row_keys: one `(R,)` for each kind of key (caption, image).
        column_keys: one `(C,)` for each kind.
    """
    equal = [rows[:, None] == columns[None, :] for rows, columns in zip(row_keys, column_keys, strict=True)]
    return torch.stack(equal).any(dim=0)


def positive_targets(row_keys: list[torch.Tensor], column_keys: list[torch.Tensor]) -> torch.Tensor:
    """Soft targets: the positives of a row are the columns with an equal key of any kind, with equal weights.

    Args:
        row_keys: one `(R,)` for each kind of key (caption, image).
        column_keys: one `(C,)` for each kind; every row key must occur among them.

    Returns:
        `(R, C)` float32, rows sum to 1.
    """
    positives = positive_pairs(row_keys, column_keys).float()
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


def sigmoid_loss(
    image_embeds: torch.Tensor,
    text_embeds: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    positives: torch.Tensor,
) -> torch.Tensor:
    """The loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343, section 3.2), in at least float32, autocast off.

    -1/R sum_ij log sigmoid(z_ij (exp(logit_scale) image_i . text_j + logit_bias)), z_ij = 1 for positives, else -1. It
    is a sum over captions, so the losses of several blocks of captions add up to the loss of all of them. The scale has
    no maximum.

    Args:
        image_embeds: `(R, P)`, normalised.
        text_embeds: `(C, P)`, normalised.
        logit_scale: log of the inverse temperature.
        logit_bias: added to every logit.
        positives: `(R, C)` bool, from `positive_pairs`.

    Returns:
        A scalar: the mean over images of the sum over captions.
    """
    dtype = torch.promote_types(image_embeds.dtype, torch.float32)
    device_type = image_embeds.device.type
    with torch.autocast("cpu" if device_type == "meta" else device_type, enabled=False):  # "meta" has no autocast
        similarity = image_embeds.to(dtype) @ text_embeds.to(dtype).t()  # (R, P) @ (P, C) -> (R, C)
        logits = similarity * logit_scale.exp() + logit_bias
        return -nn.functional.logsigmoid(torch.where(positives, logits, -logits)).sum(dim=1).mean()


class SigmoidRows(NamedTuple):
    """The R images of one process for `sigmoid_losses`, in K domains."""

    image_embeds: list[torch.Tensor]  # K times (R, P)
    logit_scales: list[torch.Tensor]  # K scalars
    logit_biases: list[torch.Tensor]  # K scalars
    keys: list[torch.Tensor]  # one (R,) for each kind of key, see `positive_pairs`


class SigmoidColumns(NamedTuple):
    """A block of C captions for `sigmoid_losses`."""

    text_embeds: torch.Tensor  # (C, P)
    keys: list[torch.Tensor]  # one (C,) for each kind of key


def sigmoid_losses(rows: SigmoidRows, columns: SigmoidColumns) -> torch.Tensor:
    """`(K,)`, the `sigmoid_loss` of each domain on one block of captions."""
    positives = positive_pairs(rows.keys, columns.keys)
    domains = zip(rows.image_embeds, rows.logit_scales, rows.logit_biases, strict=True)
    return torch.stack(
        [sigmoid_loss(embeds, columns.text_embeds, scale, bias, positives) for embeds, scale, bias in domains]
    )


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
    tokens: TokenEmbeddings, keys: list[torch.Tensor], logit_scale: torch.Tensor, group_size: int | None
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


def aligned_token_loss(tokens: TokenEmbeddings, logit_scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE within each pair, between its caption tokens and their `aligned_image_tokens` (SPARC).

    The negatives of a caption token are the other tokens of the same caption, so pairs are independent of each other.

    Args:
        tokens: the tokens of R pairs.
        logit_scale: log of the inverse temperature.

    Returns:
        A scalar: the mean over the tokens of each caption, over both directions and over the pairs.
    """
    aligned = aligned_image_tokens(tokens)
    logits = temperature(logit_scale) * tokens.text_tokens.to(aligned.dtype) @ aligned.transpose(1, 2)  # (R, L, L)
    mask = tokens.text_mask
    excluded = torch.finfo(logits.dtype).min
    by_text = logits.masked_fill(~mask[:, None, :], excluded).log_softmax(dim=2).diagonal(dim1=1, dim2=2)  # (R, L)
    by_image = logits.masked_fill(~mask[:, :, None], excluded).log_softmax(dim=1).diagonal(dim1=1, dim2=2)
    # The values at padding are not finite, and 0 times infinity is not a number.
    log_likelihood = torch.where(mask, by_text, 0.0) + torch.where(mask, by_image, 0.0)
    return -(log_likelihood.sum(dim=1) / mask.sum(dim=1) / 2).mean()


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

    image_embeds: torch.Tensor | None  # (C, P); None with `sum_over_chunks`
    text_embeds: torch.Tensor | None  # (C, P); None with `sum_over_chunks`
    caption_keys: torch.Tensor  # (C,)
    image_keys: torch.Tensor | None = None  # (C,)
    frequency_embeds: torch.Tensor | None = None  # (C, P)
    tokens: TokenColumns | None = None  # None: the token-level loss compares the pairs of this process only
    # For the sigmoid loss: the sum of `sigmoid_losses(rows of this process, columns of each process)`; differentiable
    sum_over_chunks: Callable[[Callable, SigmoidRows, SigmoidColumns], torch.Tensor] | None = None


def _keys(pairs: PairEmbeddings | PairColumns) -> list[torch.Tensor]:
    return [pairs.caption_keys] if pairs.image_keys is None else [pairs.caption_keys, pairs.image_keys]


def _info_nce_parts(
    pairs: PairEmbeddings,
    columns: PairColumns | None,
    targets: torch.Tensor,
    logit_scale: torch.Tensor,
    frequency_logit_scale: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """`spatial_loss`, and `frequency_loss` if there is a frequency domain, by `instance_loss`."""
    others: PairEmbeddings | PairColumns = pairs if columns is None else columns
    parts = {
        "spatial_loss": instance_loss(
            pairs.image_embeds, pairs.text_embeds, logit_scale, targets, others.image_embeds, others.text_embeds
        )
    }
    if pairs.frequency_embeds is not None and frequency_logit_scale is not None:
        parts["frequency_loss"] = instance_loss(
            pairs.frequency_embeds,
            pairs.text_embeds,
            frequency_logit_scale,
            targets,
            others.frequency_embeds,
            others.text_embeds,
        )
    return parts


def _sigmoid_parts(
    pairs: PairEmbeddings,
    columns: PairColumns | None,
    scalars: tuple[torch.Tensor, torch.Tensor],
    frequency_scalars: tuple[torch.Tensor | None, torch.Tensor | None],
) -> dict[str, torch.Tensor]:
    """`spatial_loss`, and `frequency_loss` if there is a frequency domain, by `sigmoid_losses`; `scalars` are scale and
    bias."""
    row_keys = _keys(pairs)
    rows = SigmoidRows([pairs.image_embeds], [scalars[0]], [scalars[1]], row_keys)
    frequency_scale, frequency_bias = frequency_scalars
    if pairs.frequency_embeds is not None and frequency_scale is not None and frequency_bias is not None:
        rows = SigmoidRows(
            [pairs.image_embeds, pairs.frequency_embeds],
            [scalars[0], frequency_scale],
            [scalars[1], frequency_bias],
            row_keys,
        )
    captions = SigmoidColumns(pairs.text_embeds, row_keys)
    if columns is None or columns.sum_over_chunks is None:
        losses = sigmoid_losses(rows, captions)
    else:
        losses = columns.sum_over_chunks(sigmoid_losses, rows, captions)
    return dict(zip(("spatial_loss", "frequency_loss"), losses, strict=False))


def multi_level_loss(
    pairs: PairEmbeddings,
    logit_scale: torch.Tensor,
    frequency_logit_scale: torch.Tensor | None = None,
    token_logit_scale: torch.Tensor | None = None,
    logit_bias: torch.Tensor | None = None,
    frequency_logit_bias: torch.Tensor | None = None,
    frequency_loss_weight: float = 0.0,
    token_loss_weight: float = 0.0,
    token_loss_type: str = "filip",
    token_loss_group_size: int | None = None,
    columns: PairColumns | None = None,
) -> dict[str, torch.Tensor]:
    """The three losses of MLIP on one batch and their weighted sum; a loss whose inputs are `None` is left out.

    Args:
        pairs: the R pairs of this process.
        logit_scale: log of the inverse temperature of the spatial loss.
        frequency_logit_scale: log of the inverse temperature of the frequency loss.
        token_logit_scale: log of the inverse temperature of the token-level loss.
        logit_bias: bias of the spatial loss, which is then the sigmoid loss; `None`: InfoNCE.
        frequency_logit_bias: bias of the frequency loss; needed if there is a `logit_bias`.
        frequency_loss_weight: weight of the frequency loss; the spatial loss has weight 1.
        token_loss_weight: weight of the token-level loss.
        token_loss_type: "filip" (`grouped_token_loss`) or "sparc" (`aligned_token_loss`).
        token_loss_group_size: see `grouped_token_loss`; not used if `columns` hold tokens of other processes.
        columns: the pairs of all processes; `None` if this process is the only one.

    Returns:
        Scalars, means over the rows: `spatial_loss`, `frequency_loss` and `token_loss` if computed, and `loss`.
    """
    row_keys = _keys(pairs)
    column_keys = row_keys if columns is None else _keys(columns)
    # Step (1): instance level, spatial and frequency domain
    targets = None  # (R, C); the sigmoid loss needs none
    if logit_bias is None:
        targets = positive_targets(row_keys, column_keys)
        parts = _info_nce_parts(pairs, columns, targets, logit_scale, frequency_logit_scale)
    else:
        frequency_scalars = (frequency_logit_scale, frequency_logit_bias)
        parts = _sigmoid_parts(pairs, columns, (logit_scale, logit_bias), frequency_scalars)
    loss = parts["spatial_loss"]
    if "frequency_loss" in parts:
        loss = loss + frequency_loss_weight * parts["frequency_loss"]
    # Step (2): token level, both domains
    if pairs.tokens is not None and token_logit_scale is not None:
        tokens = pairs.tokens
        if token_loss_type == "sparc":
            parts["token_loss"] = aligned_token_loss(tokens, token_logit_scale)
        elif columns is None or columns.tokens is None:
            parts["token_loss"] = grouped_token_loss(tokens, row_keys, token_logit_scale, token_loss_group_size)
        else:  # the process of the image computes both scores of an image and a caption
            text = (columns.tokens.text_tokens, columns.tokens.text_mask)
            by_image, by_text = token_scores(tokens.image_tokens, tokens.image_weights, *text)
            scores = by_image, columns.tokens.swap_scores(by_text)
            targets = positive_targets(row_keys, column_keys) if targets is None else targets
            parts["token_loss"] = token_loss(*scores, token_logit_scale, targets)
        loss = loss + token_loss_weight * parts["token_loss"]
    return {**parts, "loss": loss}
