# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The code of ToMe's and PiToMe's authors, here small stand-ins, drives the merging of a tower."""

import math
import sys
from pathlib import Path

import pytest
import torch

from modeling_mlip import MLIPVisionConfig, MLIPVisionModel

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import original_merging as benchmark  # noqa: E402

# Merge functions with the interface of the originals: (B, 1 + N, C) -> (B, 1 + M, C), the class token first.
STAND_IN = """
import torch
from modeling_mlip.token_merging import match_tokens

calls = []

def merge_by(metric, r):
    patches = torch.nn.functional.normalize(metric[:, 1:], dim=-1)
    assignment = torch.nn.functional.pad(match_tokens(patches, None, r) + 1, (1, 0))

    def merge(x, mode="mean"):
        index = assignment[..., None].expand(-1, -1, x.shape[-1])
        return x.new_zeros(len(x), x.shape[1] - r, x.shape[-1]).scatter_reduce(1, index, x, mode)

    return merge

def merge_source(merge, x, source=None):
    return merge(torch.eye(x.shape[1], device=x.device).expand(len(x), -1, -1), mode="amax")

def bipartite_soft_matching(metric, r, class_token=False):
    return merge_by(metric, r), None

def pitome_vision(metric, ratio, margin, class_token, use_bsm_pitome=False):
    num_tokens = metric.shape[1] - 1
    calls.append((metric.shape[-1], int(num_tokens - num_tokens * ratio), round(margin, 4), use_bsm_pitome))
    return merge_by(metric, calls[-1][1])
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clone")
    for file in ("tome/merge.py", "algo/pitome/merge.py"):
        (folder / file).parent.mkdir(parents=True)
        (folder / file).write_text(STAND_IN)
    return folder


@pytest.fixture
def tower() -> MLIPVisionModel:
    torch.manual_seed(0)
    sizes = dict(image_size=32, patch_size=8, hidden_size=32, intermediate_size=64, num_attention_heads=2)
    config = MLIPVisionConfig(**sizes, num_hidden_layers=4, frequency_layers=0, merge_method="tome")
    config.merge_layers, config.merge_ratio = [0, 1, 2], 0.7
    return MLIPVisionModel(config).eval()


@torch.inference_mode()
def embed(tower: MLIPVisionModel) -> torch.Tensor:
    return tower(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))).pooler_output


def test_a_matching_that_equals_ours_gives_our_embeddings(clone, tower):
    matching = benchmark.tome_matchings(clone)["tome (own code)"]
    ours = embed(tower)
    with benchmark.merging_by(tower, matching):
        theirs = embed(tower)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    tower.config.merge_method = "elip"
    with benchmark.merging_by(tower, matching):
        assert torch.equal(embed(tower), theirs)  # merge_method no longer matters
    assert not torch.allclose(embed(tower), theirs, atol=1e-3)  # and it does again


def test_without_sizes_attention_ignores_how_many_patches_a_token_replaces(clone, tower, monkeypatch):
    matching = benchmark.tome_matchings(clone)["tome (own code)"]
    with benchmark.merging_by(tower, benchmark.OriginalMatching(matching.match, matching.merge_source, False)):
        theirs = embed(tower)
    with_sizes = embed(tower)
    monkeypatch.setattr("modeling_mlip.modeling_mlip.log_size_bias", lambda sizes, num_prefix, dtype: None)
    ours = embed(tower)
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-6)
    assert not torch.allclose(ours, with_sizes, atol=1e-4)


def test_pitome_gets_the_number_of_tokens_and_the_margin_of_each_layer(clone, tower):
    matchings = benchmark.pitome_matchings(clone)
    removed = [count for count in tower.encoder.tokens_removed(16) if count]
    calls = matchings["pitome (own code)"].merge_source.__globals__["calls"]
    for name, width, margin in (("pitome (own code)", 16, 0.75), ("pitome (own code), CLIP", 32, 0.95)):
        assert not matchings[name].uses_sizes and matchings[name + ", sizes"].uses_sizes
        calls.clear()
        with benchmark.merging_by(tower, matchings[name]):
            embed(tower)
        margins = [round(margin * (1 - layer / 4), 4) for layer in range(3)]
        is_bipartite = [layer < 2 and name == "pitome (own code)" for layer in range(3)]
        assert calls == list(zip([width] * 3, removed, margins, is_bipartite, strict=True))


def test_the_products_that_replace_indexing_are_counted(tower):
    kept = [16, *(round(16 * 0.3 ** (n / 3)) for n in (1, 2, 3))]
    products = [2 * before * after * 32 for before, after in zip(kept[:-1], kept[1:], strict=True)]
    assert benchmark.merge_product_flops(tower, 16) == math.fsum(products)


def test_faults_of_the_folder_and_of_the_ratio_are_named(clone, tower, tmp_path):
    with pytest.raises(OSError, match=r"does not contain tome/merge.py; give the folder of the cloned repository"):
        benchmark.tome_matchings(tmp_path)
    (tmp_path / "algo" / "pitome").mkdir(parents=True)
    (tmp_path / "algo" / "pitome" / "merge.py").write_text("merge_source = 1")
    with pytest.raises(ValueError, match=r"does not define pitome_vision; give a clone"):
        benchmark.pitome_matchings(tmp_path)
    tower.config.merge_layers = [0]
    matching = benchmark.tome_matchings(clone)["tome (own code)"]
    with benchmark.merging_by(tower, matching), pytest.raises(ValueError, match=r"cannot remove 11 of 16 tokens"):
        embed(tower)
