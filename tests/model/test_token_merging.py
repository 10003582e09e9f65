# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""token_merging.py: schedule, matching, merging and its inverse."""

import pytest
import torch

from modeling_mlip.token_merging import (
    assignment_matrix,
    compose,
    fuse_least_important,
    joint_similarity_features,
    match_tokens,
    match_tokens_by_cost,
    merge_matrix,
    merge_schedule,
    merge_sizes,
    merge_tokens,
    places,
    unmerge,
    z_score,
)


def merge(tokens: torch.Tensor, weights: torch.Tensor, assignment: torch.Tensor, num_new: int) -> torch.Tensor:
    return merge_tokens(tokens, merge_matrix(assignment, weights, num_new)[0])


def merge_by_loop(tokens: torch.Tensor, sizes: torch.Tensor, assignment: torch.Tensor, num_new: int) -> torch.Tensor:
    merged = torch.zeros(tokens.shape[0], num_new, tokens.shape[2], dtype=torch.float64)
    totals = torch.zeros(tokens.shape[0], num_new, dtype=torch.float64)
    for image in range(tokens.shape[0]):
        for old, new in enumerate(assignment[image].tolist()):
            merged[image, new] += sizes[image, old] * tokens[image, old]
            totals[image, new] += sizes[image, old]
    return merged / totals[..., None]


@pytest.mark.parametrize("num_tokens", [1, 2, 16, 49, 64, 196, 257])
@pytest.mark.parametrize("merge_ratio", [0, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("num_stages", [1, 3, 12])
def test_the_schedule_removes_the_configured_fraction(num_tokens, merge_ratio, num_stages):
    if round(num_tokens * (1 - merge_ratio)) < 1:
        with pytest.raises(ValueError, match="leaves none"):
            merge_schedule(num_tokens, merge_ratio, num_stages)
        return
    removed = merge_schedule(num_tokens, merge_ratio, num_stages)
    assert len(removed) == num_stages
    assert min(removed) >= 0
    assert num_tokens - sum(removed) == round(num_tokens * (1 - merge_ratio))


def test_the_schedule_at_ratio_0_removes_nothing():
    assert merge_schedule(196, 0, 3) == [0, 0, 0]


@pytest.mark.parametrize("num_tokens, num_removed", [(8, 1), (8, 4), (9, 4), (9, 8), (16, 11), (2, 1)])
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("max_share", [0.5, 0.25, 0.01])
def test_every_token_becomes_part_of_exactly_one_new_token(num_tokens, num_removed, guided, max_share):
    torch.manual_seed(0)
    features = joint_similarity_features(torch.randn(3, num_tokens, 5))
    importance = torch.randn(3, num_tokens) if guided else None
    assignment = match_tokens(features, importance, num_removed, max_share)
    num_new = num_tokens - num_removed
    assert assignment.shape == (3, num_tokens)
    assert (assignment_matrix(assignment, num_new, torch.int64).sum(dim=1) == 1).all()  # each old in one new
    for row in assignment:
        assert row.unique().tolist() == list(range(num_new))  # no new token is empty


def test_the_most_similar_pair_merges_first():
    torch.manual_seed(0)
    tokens = torch.randn(1, 8, 64)
    tokens[0, 5] = tokens[0, 2] * 3 + 0.01  # the direction counts, not the length
    assignment = match_tokens(joint_similarity_features(tokens), None, 1)
    assert assignment[0, 5] == assignment[0, 2] == 2
    assert assignment[0].tolist() == [0, 1, 2, 3, 4, 2, 5, 6]  # the others keep their order


def test_importance_decides_between_equally_similar_pairs():
    tokens = torch.eye(4).repeat_interleave(2, dim=0)[None]  # tokens 0 = 1, 2 = 3, 4 = 5, 6 = 7
    importance = torch.tensor([[0.0, 0.3, 0.0, 0.1, 0.0, 0.2, 0.0, 0.4]])
    assignment = match_tokens(joint_similarity_features(tokens), importance, 2)
    merged = [pair for pair in range(4) if assignment[0, 2 * pair] == assignment[0, 2 * pair + 1]]
    assert merged == [1, 2]


def test_several_rounds_keep_a_token_without_a_similar_one():
    """Of six equal tokens and two different ones, a single round that removes half merges a different one."""
    tokens = torch.eye(8)[[0, 0, 0, 0, 0, 0, 1, 2]][None]
    forced = match_tokens(tokens, None, 4, max_share=0.5)
    in_rounds = match_tokens(tokens, None, 4, max_share=0.25)
    assert len(forced[0, 6:].unique()) < 2 or (forced[0] == forced[0, 7]).sum() > 1
    for token in (6, 7):
        assert (in_rounds[0] == in_rounds[0, token]).sum() == 1


def test_of_equal_pairs_the_first_merge():
    assignment = match_tokens(torch.ones(2, 10, 3), None, 2)
    assert assignment.tolist() == [[0, 0, 1, 0, 2, 3, 4, 5, 6, 7]] * 2


def test_matching_of_an_image_does_not_depend_on_the_others():
    torch.manual_seed(0)
    features = joint_similarity_features(torch.randn(6, 20, 8))
    importance = torch.randn(6, 20)
    together = match_tokens(features, importance, 13)
    alone = torch.cat([match_tokens(features[i : i + 1], importance[i : i + 1], 13) for i in range(6)])
    assert torch.equal(together, alone)


def test_both_domains_have_equal_weight_in_the_similarity():
    spatial, frequency = torch.randn(1, 5, 7) * 100, torch.randn(1, 5, 3) * 0.01
    features = joint_similarity_features(spatial, frequency)
    cosines = [torch.nn.functional.cosine_similarity(x[:, :, None], x[:, None], dim=-1) for x in (spatial, frequency)]
    torch.testing.assert_close(features @ features.transpose(1, 2), (cosines[0] + cosines[1]) / 2, rtol=0, atol=1e-6)


def test_z_score_has_mean_0_and_deviation_1_and_is_0_for_constants():
    scores = z_score(torch.randn(3, 50) * 7 + 3)
    torch.testing.assert_close(scores.mean(dim=1), torch.zeros(3), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores.square().mean(dim=1), torch.ones(3), rtol=1e-4, atol=0)
    assert torch.equal(z_score(torch.ones(1, 4)), torch.zeros(1, 4))


def test_places_are_those_of_a_stable_sort():
    torch.manual_seed(0)
    scores = torch.randint(0, 6, (5, 30)).float()  # with many ties
    expected = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    assert torch.equal(places(scores), expected)


@pytest.mark.parametrize("num_removed", [1, 4, 8])
def test_the_most_important_tokens_are_kept_and_all_others_fused(num_removed):
    torch.manual_seed(0)
    importance = torch.rand(4, 9)
    assignment = fuse_least_important(importance, num_removed)
    num_new = 9 - num_removed
    for row, scores in zip(assignment.tolist(), importance, strict=True):
        stay = sorted(scores.topk(num_new - 1).indices.tolist())
        assert [row[token] for token in stay] == list(range(num_new - 1))
        assert all(row[token] == num_new - 1 for token in range(9) if token not in stay)


def test_merging_is_the_size_weighted_mean_and_conserves_size():
    torch.manual_seed(0)
    tokens, sizes = torch.randn(3, 12, 5, dtype=torch.float64), torch.randint(1, 9, (3, 12)).double()
    assignment = match_tokens(joint_similarity_features(tokens), None, 7)
    merged, new_sizes = merge(tokens, sizes, assignment, 5), merge_sizes(sizes, assignment, 5)
    assert torch.equal(merge_matrix(assignment, sizes, 5)[1], new_sizes)
    torch.testing.assert_close(merged, merge_by_loop(tokens, sizes, assignment, 5), rtol=0, atol=1e-12)
    torch.testing.assert_close(new_sizes.sum(dim=1), sizes.sum(dim=1))
    total = (merged * new_sizes[..., None]).sum(dim=1)
    torch.testing.assert_close(total, (tokens * sizes[..., None]).sum(dim=1), rtol=0, atol=1e-12)


def match_by_loop(features: torch.Tensor, num_removed: int) -> list[int]:
    """`match_tokens` of one image `(N, C)` without importance, at most a quarter of the tokens per round, by loops."""
    tokens = features.double().tolist()
    members = [[patch] for patch in range(len(tokens))]
    while num_removed > 0:
        pairs = []
        for source in range(1, len(tokens), 2):
            products = [
                sum(a * b for a, b in zip(tokens[source], tokens[target], strict=True))
                for target in range(0, len(tokens), 2)
            ]
            best = max(range(len(products)), key=products.__getitem__)
            pairs.append((-products[best], source, 2 * best))
        pairs = sorted(pairs)[: min(num_removed, max(len(tokens) // 4, 1))]
        num_removed -= len(pairs)
        groups = {token: [token] for token in range(len(tokens))}
        for _, source, target in pairs:
            groups[target] += groups.pop(source)
        tokens = [
            [sum(tokens[t][c] for t in group) / len(group) for c in range(len(tokens[0]))] for group in groups.values()
        ]
        members = [[patch for token in group for patch in members[token]] for group in groups.values()]
    return [token for _, token in sorted((patch, new) for new, group in enumerate(members) for patch in group)]


@pytest.mark.parametrize("num_tokens, num_removed", [(16, 4), (17, 11), (30, 15)])
def test_matching_in_rounds_equals_loops_over_tokens_in_float64(num_tokens, num_removed):
    torch.manual_seed(0)
    features = joint_similarity_features(torch.randn(2, num_tokens, 6))
    assignment = match_tokens(features, None, num_removed, 0.25)
    assert assignment.tolist() == [match_by_loop(image, num_removed) for image in features]


def test_gradients_of_a_merge_equal_finite_differences():
    tokens = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    sizes, assignment = torch.ones(2, 6, dtype=torch.float64), torch.tensor([[0, 0, 1, 0, 2, 1], [0, 1, 1, 1, 1, 2]])
    assert torch.autograd.gradcheck(lambda tokens: merge(tokens, sizes, assignment, 3), tokens)


def test_bfloat16_merging_rounds_once():
    torch.manual_seed(0)
    tokens, sizes = torch.randn(2, 40, 16).bfloat16(), torch.randint(1, 30, (2, 40)).float()
    assignment = torch.randint(0, 5, (2, 40))
    merged = merge(tokens, sizes, assignment, 5)
    assert merged.dtype == torch.bfloat16
    expected = merge_by_loop(tokens.double(), sizes.double(), assignment, 5)
    torch.testing.assert_close(merged.double(), expected, rtol=2**-7, atol=2e-3)


def test_composition_is_one_step_after_the_other():
    torch.manual_seed(0)
    tokens, ones = torch.randn(2, 16, 4, dtype=torch.float64), torch.ones(2, 16, dtype=torch.float64)
    first = match_tokens(joint_similarity_features(tokens), None, 5)
    merged, sizes = merge(tokens, ones, first, 11), merge_sizes(ones, first, 11)
    second = match_tokens(joint_similarity_features(merged), None, 4)
    twice = merge(merged, sizes, second, 7)
    torch.testing.assert_close(merge(tokens, ones, compose(first, second), 7), twice, rtol=0, atol=1e-12)


def test_unmerge_gives_every_patch_its_token():
    tokens = torch.arange(6.0).view(2, 3, 1)
    token_map = torch.tensor([[0, 0, 1, 2], [2, 1, 0, 0]])
    assert unmerge(tokens, token_map)[..., 0].tolist() == [[0, 0, 1, 2], [5, 4, 3, 3]]


def ward_cost(features: torch.Tensor, assignment: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """Size-weighted sum of squared distances to the mean of each new token, `(B,)`, by its definition."""
    totals = []
    for states, groups, counts in zip(features, assignment, sizes, strict=True):
        total = torch.zeros(())
        for group in groups.unique():
            members, weights = states[groups == group], counts[groups == group, None]
            mean = (members * weights).sum(dim=0) / weights.sum()
            total = total + (weights * (members - mean).square()).sum()
        totals.append(total)
    return torch.stack(totals)


def test_one_merge_by_cost_is_the_cheapest_of_all_pairs_of_source_and_target():
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(4, 9, 5, generator=generator)
    sizes = torch.randint(1, 6, (4, 9), generator=generator).float()
    assignment = match_tokens_by_cost(features, sizes, num_removed=1, num_rounds=1)
    chosen = ward_cost(features, assignment, sizes)
    for image in range(4):
        costs = []
        for source in range(1, 9, 2):
            for target in range(0, 9, 2):
                groups = torch.arange(9)
                groups[source] = target
                one = slice(image, image + 1)
                costs.append(ward_cost(features[one], groups[None], sizes[one]))
        torch.testing.assert_close(chosen[image], torch.cat(costs).min())


def test_of_equally_distant_pairs_the_smaller_tokens_merge_first():
    features = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [9.0, 9.0], [9.0, 8.0]]])
    assert match_tokens_by_cost(features, torch.tensor([[5.0, 5.0, 1.0, 1.0]]), 1, 1).tolist() == [[0, 1, 2, 2]]
    assert match_tokens_by_cost(features, torch.tensor([[1.0, 1.0, 5.0, 5.0]]), 1, 1).tolist() == [[0, 0, 1, 2]]


@pytest.mark.parametrize("num_tokens, num_removed", [(2, 1), (9, 8), (64, 1), (64, 40), (65, 64), (196, 98)])
@pytest.mark.parametrize("num_rounds", [1, 4])
def test_merging_by_cost_removes_the_number_asked_for(num_tokens, num_removed, num_rounds):
    features = torch.randn(2, num_tokens, 4, generator=torch.Generator().manual_seed(0))
    assignment = match_tokens_by_cost(features, torch.ones(2, num_tokens), num_removed, num_rounds)
    for row in assignment:
        assert row.unique().tolist() == list(range(num_tokens - num_removed))


def test_four_rounds_by_cost_are_cheaper_than_one():
    features = torch.randn(8, 64, 6, generator=torch.Generator().manual_seed(1))
    sizes = torch.ones(8, 64)
    one, four = (ward_cost(features, match_tokens_by_cost(features, sizes, 32, rounds), sizes) for rounds in (1, 4))
    assert four.mean() < one.mean()
