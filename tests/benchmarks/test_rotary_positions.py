# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of merged rotary positions trains a tower with rotary positions only, and measures both positions."""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import rotary_positions as benchmark  # noqa: E402


def test_both_positions_are_measured_on_a_tower_that_has_no_other_positions():
    torch.manual_seed(0)
    tower = benchmark.build_tower(has_position_embeddings=False)
    classifier = nn.Linear(tower.config.hidden_size, sum(benchmark.NUM_VALUES))
    before = tower.encoder.layers[0].self_attn.q_proj.weight.clone()
    benchmark.train_tower(tower.train(), classifier, steps=2, batch_size=2)
    assert not torch.equal(tower.encoder.layers[0].self_attn.q_proj.weight, before)
    assert tower.embeddings.position_embedding.weight.abs().sum() == 0
    with torch.no_grad():  # so that embeddings depend on positions visibly after so few steps
        for layer in tower.encoder.layers:
            layer.self_attn.q_proj.weight.mul_(30)
            layer.self_attn.out_proj.weight.mul_(30)
    unmerged, *rows = benchmark.measure_positions(tower, classifier, num_images=4)
    assert 0 <= unmerged["right"] <= 1 and len(rows) == 9
    assert all(row["largest"] > 0 and row["mean"] > 0 for row in rows)
    assert all(row["largest"] != row["mean"] for row in rows)
