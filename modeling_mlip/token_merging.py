# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Token merging as pure functions that know nothing of models: schedule, guide, matching, pruning, merge, unmerge.

A step is an `assignment` `(B, N)`: for each of N tokens the index of the one of M new tokens that it becomes part of.
Whatever follows the tokens (hidden states, frequency features, importance, sizes) follows the same assignment.
Matching is bipartite between alternate tokens, as in ToMe (Bolya et al. 2023, arXiv 2210.09461, section 3); similarity
in two domains and the guide are MLIP's (arXiv 2406.01460), as this project reads it.
Axes: B images, N tokens before a step, M after it, C channels. The class token never comes here.
"""

from itertools import pairwise

import torch


def merge_schedule(num_tokens: int, merge_ratio: float, num_stages: int) -> list[int]:
    """Tokens removed at each stage, so that every stage keeps about the same share and the last meets the ratio.

    Args:
        num_tokens: patch tokens at the start.
        merge_ratio: share of them that is gone at the end, `0 <= merge_ratio < 1`.
        num_stages: how many stages there are.

    Raises:
        ValueError: if no token would be left.
    """
    kept = [round(num_tokens * (1 - merge_ratio) ** (stage / num_stages)) for stage in range(num_stages + 1)]
    if kept[-1] < 1:
        raise ValueError(
            f"merge_ratio={merge_ratio} leaves none of {num_tokens} patch tokens; "
            f"choose at most {1 - 1 / num_tokens:.3f}, larger images or smaller patches."
        )
    return [before - after for before, after in pairwise(kept)]


def z_score(scores: torch.Tensor) -> torch.Tensor:
    """`(B, N)` scores in standard deviations from their mean over the tokens of each image."""
    centred = scores - scores.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True).sqrt() + 1e-6)


def joint_similarity_features(*domains: torch.Tensor) -> torch.Tensor:
    """`(B, N, C1 + C2 + ...)`: each part normalised, so that the dot product of two tokens is their mean cosine."""
    return torch.cat([torch.nn.functional.normalize(part, dim=-1) for part in domains], dim=-1) / len(domains) ** 0.5


def places(scores: torch.Tensor) -> torch.Tensor:
    """`(B, N)` scores -> `(B, N)` int64 places, 0 for the highest, ties by position.

    A place is the number of those ahead: ONNX has no stable sort.
    """
    this, other = scores[:, :, None], scores[:, None, :]
    position = torch.arange(scores.shape[1], device=scores.device)
    earlier = position[None, :] < position[:, None]
    return ((other > this) | ((other == this) & earlier)).sum(dim=-1)


def match_tokens(
    features: torch.Tensor, importance: torch.Tensor | None, num_removed: int, max_share: float = 0.5
) -> torch.Tensor:
    """Finds which tokens become one.

    Step (1): alternate tokens form two sets. Step (2): each of the first set proposes the token of the second that
    resembles it most. Step (3): the proposals are ranked by similarity minus importance, ties by position, and the best
    are carried out. More than `max_share` of the tokens go in several such rounds: in a round that takes half of them
    every proposal is carried out, also that of a token that resembles no other.

    Args:
        features: `(B, N, C)`, whose dot products are similarities.
        importance: `(B, N)` in units of similarity; important tokens go later. `None`: no guide.
        num_removed: how many tokens to remove, fewer than N.
        max_share: share of the tokens that one round removes at most, up to a half.

    Returns:
        assignment `(B, N)`, values 0 to N - num_removed - 1; new tokens keep the order of the old.
    """
    num_here = min(num_removed, max(int(features.shape[1] * max_share), 1))
    assignment = _match_once(features, importance, num_here)
    if num_here == num_removed:
        return assignment
    num_left = features.shape[1] - num_here
    matrix = merge_matrix(assignment, torch.ones_like(features[..., 0]), num_left)
    features = merge_tokens(features, matrix)
    if importance is not None:
        importance = merge_tokens(importance[..., None], matrix)[..., 0]
    return compose(assignment, match_tokens(features, importance, num_removed - num_here, max_share))


def _match_once(features: torch.Tensor, importance: torch.Tensor | None, num_removed: int) -> torch.Tensor:
    B, N, _ = features.shape
    # Step (1): the proposers stand at odd positions, so that at N = 2k + 1 tokens k of them can go.
    proposers, targets = features[:, 1::2], features[:, 0::2]  # (B, N//2, C), (B, N - N//2, C)
    # Step (2)
    similarity, partner = (proposers @ targets.transpose(1, 2)).max(dim=-1)  # (B, N//2) each
    # Step (3)
    place = places(similarity if importance is None else similarity - importance[:, 1::2])  # (B, N//2)
    position = torch.arange(N, device=features.device)
    target = torch.where(place < num_removed, 2 * partner, position[1::2])  # (B, N//2): who absorbs each proposer
    target = position.expand(B, N).scatter(1, position[1::2].expand(B, -1), target)  # (B, N): who absorbs each token
    new_index = (target == position).long().cumsum(dim=1) - 1  # survivors counted in order
    return new_index.gather(1, target)


def fuse_least_important(importance: torch.Tensor, num_removed: int) -> torch.Tensor:
    """Keeps the most important tokens and makes one of all others (ELIP, Guo et al. 2023, arXiv 2309.16738).

    Args:
        importance: `(B, N)`, ties by position.
        num_removed: how many tokens to remove, fewer than N.

    Returns:
        assignment `(B, N)`: tokens that stay keep their order, and the last new one is the fused one.
    """
    num_new = importance.shape[1] - num_removed
    stays = places(importance) < num_new - 1
    return torch.where(stays, stays.long().cumsum(dim=1) - 1, num_new - 1)


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The assignment `(B, N)` of doing `first` `(B, N)` and then `second` `(B, M)`."""
    return second.gather(1, first)


def assignment_matrix(assignment: torch.Tensor, num_new: int, dtype: torch.dtype) -> torch.Tensor:
    """`(B, M, N)` of zeros and ones: which old tokens each new one is made of."""
    new_tokens = torch.arange(num_new, device=assignment.device)[None, :, None]
    return (assignment[:, None, :] == new_tokens).to(dtype)


def merge_matrix(assignment: torch.Tensor, weights: torch.Tensor, num_new: int) -> torch.Tensor:
    """What each old token counts in each new one, computed once for all that follows the tokens.

    A product with this small matrix is deterministic on every device (adding at indices is not on a GPU), exports, and
    leaves a token that merges with no other as it is, to the bit, in half precision too.

    Args:
        assignment: `(B, N)`, values below `num_new`.
        weights: `(B, N)`, positive: the sizes before the step, or attention.
        num_new: M.

    Returns:
        `(B, M, N)` in at least float32; rows sum to 1.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    matrix = assignment_matrix(assignment, num_new, weights.dtype) * weights[:, None, :]
    return matrix / matrix.sum(dim=-1, keepdim=True)


def merge_tokens(tokens: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Weighted means of the tokens that become one: `(B, N, C)` -> `(B, M, C)` in the dtype of `tokens`, by the matrix
    of `merge_matrix`."""
    return matrix.to(tokens.dtype) @ tokens


def merge_sizes(sizes: torch.Tensor, assignment: torch.Tensor, num_new: int) -> torch.Tensor:
    """Sizes `(B, N)` -> `(B, M)`: how many patches each of the `num_new` tokens stands for."""
    return (assignment_matrix(assignment, num_new, sizes.dtype) @ sizes[..., None])[..., 0]


def unmerge(tokens: torch.Tensor, token_map: torch.Tensor) -> torch.Tensor:
    """Gives every patch the features of the token that it became part of.

    Args:
        tokens: `(B, M, C)`.
        token_map: `(B, N)`, patch -> token, as the vision tower returns it on request.

    Returns:
        `(B, N, C)`, patches row by row: `.unflatten(1, (H, W))` is the patch grid.
    """
    return tokens.gather(1, token_map[..., None].expand(-1, -1, tokens.shape[-1]))
