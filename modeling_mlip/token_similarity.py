# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Similarity of image and caption tokens, as pure functions: late interaction in blocks, and aligned image tokens.

Axes: I images, T captions, R pairs, M image tokens, L caption tokens, P width of the shared space.
"""

import math
from typing import NamedTuple

import torch
from torch.utils.checkpoint import checkpoint

# Maximum number of token similarities in memory at a time: 2**24 values take 64 MiB in float32.
MAX_BLOCK_ELEMENTS = 2**24
# Minimum number of blocks of captions, sorted by length. Each block is as wide as its longest caption.
CAPTION_BLOCKS = 4


class TokenEmbeddings(NamedTuple):
    """The inputs of the token-level loss, see `token_scores`."""

    image_tokens: torch.Tensor  # (R, M, P)
    image_weights: torch.Tensor  # (R, M), rows sum to 1
    text_tokens: torch.Tensor  # (R, L, P)
    text_mask: torch.Tensor  # (R, L) bool


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


def aligned_image_tokens(tokens: TokenEmbeddings) -> torch.Tensor:
    """For each caption token, the mean of the image tokens that are similar to it (SPARC, Bica et al. 2024,
    arXiv 2401.09865, section 3.2).

    The weights are the similarities of a caption token to the M image tokens of its own pair, scaled to the range from
    0 to 1, with weights below 1/M set to zero. A merged token counts as the patches that it replaces.

    Returns:
        `(R, L, P)`, normalised, in at least float32.
    """
    dtype = torch.promote_types(tokens.image_tokens.dtype, torch.float32)
    image_tokens, text_tokens = tokens.image_tokens.to(dtype), tokens.text_tokens.to(dtype)
    similarity = text_tokens @ image_tokens.transpose(1, 2)  # (R, L, M)
    lowest, highest = similarity.amin(dim=-1, keepdim=True), similarity.amax(dim=-1, keepdim=True)
    epsilon = torch.finfo(torch.float16).eps  # if all similarities are equal, all weights are zero
    scaled = (similarity - lowest) / (highest - lowest).clamp(min=epsilon)
    weights = torch.where(scaled < 1 / similarity.shape[-1], 0.0, scaled) * tokens.image_weights.to(dtype)[:, None]
    return torch.nn.functional.normalize(weights @ image_tokens, dim=-1)
