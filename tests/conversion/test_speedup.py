# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip convert --speedup`: the FLOPs that the chosen merging leaves."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_mlip import MLIPVisionConfig, MLIPVisionModel
from modeling_mlip.conversion.speedup import build_without_memory, choose_merging, count_flops, place_layers


def make_config(**keys) -> MLIPVisionConfig:
    small = dict(image_size=80, patch_size=8, hidden_size=48, intermediate_size=192, num_hidden_layers=4)
    return MLIPVisionConfig(
        **{**small, "num_attention_heads": 4, "frequency_layers": 0, "merge_method": "ward", **keys}
    )


def measured_flops(config: MLIPVisionConfig) -> int:
    tower = MLIPVisionModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        tower(torch.randn(1, 3, config.image_size, config.image_size))
    return counter.get_total_flops()


@pytest.mark.parametrize("speedup, layers", [(1.3, [1, 2, 3]), (2.0, [0, 1, 2])])
def test_the_tower_needs_the_wanted_fraction_of_its_flops(speedup, layers):
    config = make_config()
    chosen = choose_merging(config, speedup)
    assert chosen["merge_layers"] == layers
    merged = make_config(**chosen)
    assert measured_flops(config) / measured_flops(merged) == pytest.approx(speedup, rel=0.02)
    assert count_flops(build_without_memory(merged)) == measured_flops(merged)


@pytest.mark.parametrize(
    "speedup, message",
    [
        (1.0, "speedup=1.0: choose a factor above 1"),
        (float("nan"), "speedup=nan: choose a factor above 1"),
        (float("inf"), "speedup=inf: choose a factor above 1"),
        (20.0, "reaches at most"),
    ],
)
def test_a_speedup_out_of_reach_is_refused(speedup, message):
    with pytest.raises(ValueError, match=message):
        choose_merging(make_config(num_hidden_layers=2), speedup)


def test_short_towers_merge_in_each_layer_once():
    assert place_layers((0.25, 0.5, 0.75), 12) == [3, 6, 9]
    assert place_layers((0.0, 0.25, 0.5), 3) == [0, 1]
