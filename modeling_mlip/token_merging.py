# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Token merging as pure functions: schedule, importance, matching, merging, and its inverse.

A merge is an `assignment` `(B, N)`: for each of N tokens, the index of the new token (0 to M - 1) that it becomes part
of. The same assignment merges hidden states, frequency features, importance and sizes. Matching is bipartite between
tokens at odd and even positions, as in ToMe (Bolya et al. 2023, arXiv 2210.09461, section 3). Similarity in two domains
and the guidance by importance follow MLIP (arXiv 2406.01460); their details are decisions of this project, see
`docs/method.md`. Axes: B images, N patch tokens before a merge, M after it, C channels.
"""

from itertools import pairwise

import torch


def merge_schedule(num_tokens: int, merge_ratio: float, num_stages: int) -> list[int]:
    """The number of tokens to remove at each stage. Every stage keeps about the same fraction of its tokens.

    Args:
        num_tokens: number of patch tokens before the first stage.
        merge_ratio: fraction of the tokens that all stages together remove, `0 <= merge_ratio < 1`.
        num_stages: number of stages.

    Raises:
        ValueError: if `merge_ratio` leaves no tokens.
    """
    kept = [round(num_tokens * (1 - merge_ratio) ** (stage / num_stages)) for stage in range(num_stages + 1)]
    if kept[-1] < 1:
        raise ValueError(
            f"merge_ratio={merge_ratio} leaves none of the {num_tokens} patch tokens; "
            f"choose at most {1 - 1 / num_tokens:.3f}, larger images or smaller patches."
        )
    return [before - after for before, after in pairwise(kept)]


def z_score(scores: torch.Tensor) -> torch.Tensor:
    """`(B, N)` scores minus their mean over the tokens of each image, in standard deviations."""
    centred = scores - scores.mean(dim=-1, keepdim=True)
    return centred / (centred.square().mean(dim=-1, keepdim=True).sqrt() + 1e-6)


def joint_similarity_features(*domains: torch.Tensor) -> torch.Tensor:
    """Concatenates the features of several domains `(B, N, C1)`, `(B, N, C2)`, ..., each normalised.

    Returns:
        `(B, N, C1 + C2 + ...)`. The dot product of two tokens is the mean of their cosine similarities in each domain.
    """
    normalised = [torch.nn.functional.normalize(features, dim=-1) for features in domains]
    return torch.cat(normalised, dim=-1) / len(domains) ** 0.5


def places(scores: torch.Tensor) -> torch.Tensor:
    """`(B, N)` scores -> `(B, N)` int64 ranks, 0 for the highest score; of equal scores the first comes first.

    The rank is computed by counting the scores ahead, because ONNX has no stable sort.
    """
    this, other = scores[:, :, None], scores[:, None, :]
    position = torch.arange(scores.shape[1], device=scores.device)
    earlier = position[None, :] < position[:, None]
    return ((other > this) | ((other == this) & earlier)).sum(dim=-1)


def match_tokens(
    features: torch.Tensor, importance: torch.Tensor | None, num_removed: int, max_share: float = 0.5
) -> torch.Tensor:
    """Chooses the tokens to merge, in one or several rounds of bipartite matching.

    Step (1): the tokens at odd positions are sources, those at even positions are targets. Step (2): each source is
    paired with its most similar target. Step (3): the pairs are ranked by similarity minus the importance of the
    source, and the pairs with the highest rank merge. A round that removes half of the tokens merges every pair, even a
    source without a similar target; `max_share` limits each round, so that a larger number takes several rounds.

    Args:
        features: `(B, N, C)`; dot products are similarities.
        importance: `(B, N)`, in units of similarity; more important tokens merge later. `None`: similarity only.
        num_removed: number of tokens to remove, less than N.
        max_share: maximum fraction of tokens removed per round, at most 0.5.

    Returns:
        The assignment `(B, N)` with values 0 to N - num_removed - 1. New tokens keep the order of their targets.
    """
    num_removed_now = min(num_removed, max(int(features.shape[1] * max_share), 1))
    assignment = _match_once(features, importance, num_removed_now)
    if num_removed_now == num_removed:
        return assignment
    num_left = features.shape[1] - num_removed_now
    matrix, _ = merge_matrix(assignment, features.new_ones(features.shape[:2]), num_left)
    features = merge_tokens(features, matrix)
    if importance is not None:
        importance = merge_tokens(importance[..., None], matrix)[..., 0]
    return compose(assignment, match_tokens(features, importance, num_removed - num_removed_now, max_share))


def match_tokens_by_cost(
    features: torch.Tensor, sizes: torch.Tensor, num_removed: int, num_rounds: int
) -> torch.Tensor:
    """Chooses the tokens to merge by Ward's cost (Ward 1963, doi 10.1080/01621459.1963.10500845).

    Merging tokens i and j increases the sum of squared distances of all patches to the mean of their token by
    `|f_i - f_j|^2 n_i n_j / (n_i + n_j)`, with the sizes n. So of two equally similar pairs the smaller tokens merge
    first. Sources, targets and ranks are those of `match_tokens`, with the lowest cost instead of the highest
    similarity. Several rounds, each removing about the same fraction, accept better pairs than one.

    Args:
        features: `(B, N, C)`.
        sizes: `(B, N)`, the number of patches in each token.
        num_removed: number of tokens to remove, less than N.
        num_rounds: number of rounds; more where one would have to remove more than half of the tokens.

    Returns:
        The assignment `(B, N)`, as `match_tokens` returns it.
    """
    return _match_by_products(features @ features.transpose(1, 2), sizes, num_removed, num_rounds)


def _match_by_products(products: torch.Tensor, sizes: torch.Tensor, num_removed: int, num_rounds: int) -> torch.Tensor:
    """Rounds of `match_tokens_by_cost` from the dot products of all tokens `(B, N, N)`.

    The products of merged tokens are means of products, so that no round needs the features.
    """
    N = products.shape[1]
    kept = ((N - num_removed) / N) ** (1 / num_rounds)  # fraction per round
    num_removed_now = min(max(N - round(N * kept), 1), num_removed, N // 2)
    squares = products.diagonal(dim1=1, dim2=2)
    distances = (squares[:, 1::2, None] + squares[:, None, 0::2] - 2 * products[:, 1::2, 0::2]).clamp(min=0)
    best, partner = (-distances / (1 / sizes[:, 1::2, None] + 1 / sizes[:, None, 0::2])).max(dim=-1)  # (B, N//2) each
    assignment = _assign_best(best, partner, num_removed_now, N)
    if num_removed_now == num_removed:
        return assignment
    num_left = N - num_removed_now
    matrix, sizes = merge_matrix(assignment, sizes, num_left)
    products = matrix @ products @ matrix.transpose(1, 2)  # (B, M, M)
    rest = _match_by_products(products, sizes, num_removed - num_removed_now, max(num_rounds - 1, 1))
    return compose(assignment, rest)


def _match_once(features: torch.Tensor, importance: torch.Tensor | None, num_removed: int) -> torch.Tensor:
    # Step (1)
    sources, targets = features[:, 1::2], features[:, 0::2]  # (B, N//2, C), (B, N - N//2, C)
    # Step (2)
    similarity, partner = (sources @ targets.transpose(1, 2)).max(dim=-1)  # (B, N//2) each
    # Step (3)
    scores = similarity if importance is None else similarity - importance[:, 1::2]
    return _assign_best(scores, partner, num_removed, features.shape[1])


def _assign_best(scores: torch.Tensor, partner: torch.Tensor, num_removed: int, N: int) -> torch.Tensor:
    """Merges the `num_removed` sources of the highest `scores` `(B, N//2)` into their partners `(B, N//2)`, indices of
    targets. Returns the assignment `(B, N)`."""
    B, place = scores.shape[0], places(scores)
    position = torch.arange(N, device=scores.device)
    target = torch.where(place < num_removed, 2 * partner, position[1::2])  # (B, N//2): a kept source is its own target
    target = position.expand(B, N).scatter(1, position[1::2].expand(B, -1), target)  # (B, N), for all tokens
    new_index = (target == position).long().cumsum(dim=1) - 1  # numbers the kept tokens in order
    return new_index.gather(1, target)


def fuse_least_important(importance: torch.Tensor, num_removed: int) -> torch.Tensor:
    """Keeps the most important tokens and fuses all others into one (ELIP, Guo et al. 2023, arXiv 2309.16738).

    Args:
        importance: `(B, N)`; of equally important tokens the first is kept.
        num_removed: number of tokens to remove, less than N.

    Returns:
        The assignment `(B, N)`. Kept tokens stay in order, and the fused token is the last one.
    """
    num_new = importance.shape[1] - num_removed
    stays = places(importance) < num_new - 1
    return torch.where(stays, stays.long().cumsum(dim=1) - 1, num_new - 1)


def compose(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """The assignment `(B, N)` of the merge `first` `(B, N)` followed by the merge `second` `(B, M)`."""
    return second.gather(1, first)


def assignment_matrix(assignment: torch.Tensor, num_new: int, dtype: torch.dtype) -> torch.Tensor:
    """`(B, M, N)` of zeros and ones: entry (m, n) is 1 if old token n becomes part of new token m."""
    new_tokens = torch.arange(num_new, device=assignment.device)[None, :, None]
    return (assignment[:, None, :] == new_tokens).to(dtype)


def merge_matrix(assignment: torch.Tensor, weights: torch.Tensor, num_new: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The share of each old token in each new token, and the weight of each new token.

    Multiplying by this small matrix is deterministic on every device (index addition is not, on a GPU), can be
    exported, and leaves an unmerged token unchanged to the bit, also in half precision.

    Args:
        assignment: `(B, N)`, values below `num_new`.
        weights: `(B, N)`, positive: the sizes before the merge, or attention.
        num_new: M.

    Returns:
        The matrix of shares `(B, M, N)`, whose rows sum to 1, and the sums of weights `(B, M)`: the sizes after the
        merge, if the weights are sizes. Both in at least float32.
    """
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    matrix = torch.where(assignment_matrix(assignment, num_new, torch.bool), weights[:, None], 0)
    totals = matrix.sum(dim=-1)
    return matrix / totals[..., None], totals


def merge_tokens(tokens: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Weighted means of merged tokens: `(B, N, C)` -> `(B, M, C)` in the dtype of `tokens`.

    Args:
        tokens: `(B, N, C)`.
        matrix: `(B, M, N)`, from `merge_matrix`.
    """
    return matrix.to(tokens.dtype) @ tokens


def merge_sizes(sizes: torch.Tensor, assignment: torch.Tensor, num_new: int) -> torch.Tensor:
    """Sizes `(B, N)` -> `(B, M)`: the number of patches that each new token replaces."""
    return (assignment_matrix(assignment, num_new, sizes.dtype) @ sizes[..., None])[..., 0]


def unmerge(tokens: torch.Tensor, token_map: torch.Tensor) -> torch.Tensor:
    """Copies the features of each token to the patches that became part of it.

    Args:
        tokens: `(B, M, C)`.
        token_map: `(B, N)`, the token of each patch, as the vision tower returns it with `output_token_map=True`.

    Returns:
        `(B, N, C)`, patches row by row: `.unflatten(1, (H, W))` gives the patch grid.
    """
    return tokens.gather(1, token_map[..., None].expand(-1, -1, tokens.shape[-1]))
