# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Steps whose loss, rows or gradient are not finite are skipped and their samples named."""

import pytest
import torch

from modeling_mlip.losses import PairEmbeddings
from modeling_mlip.training.step_guard import StepGuard


def make_pairs(**changes: torch.Tensor) -> PairEmbeddings:
    return PairEmbeddings(torch.ones(3, 2), torch.ones(3, 2), torch.arange(3))._replace(**changes)


def test_an_infinite_gradient_of_a_finite_loss_is_skipped():
    guard = StepGuard(max_nonfinite_steps=2)
    skipped = []
    for is_finite in (True, False, True, False):
        guard.add_batch(torch.tensor(1.0), ["a", "b", "c"], make_pairs())
        skipped.append(guard.should_skip(is_finite, step=0, max_steps=9))
    assert skipped == [False, True, False, True]
    assert guard.skipped_steps == 2
    broken = make_pairs(image_embeds=torch.tensor([[1.0, 1.0], [1.0, torch.nan], [1.0, 1.0]]))
    guard.add_batch(torch.tensor(1.0), ["d", "e", "f"], broken)
    with pytest.raises(ValueError, match=r"Samples: a, b, c, e\."):
        guard.should_skip(False, step=4, max_steps=9)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_sample_is_named_by_any_row_tensor_of_any_part(value):
    guard = StepGuard(max_nonfinite_steps=1)
    tokens = torch.zeros(3, 2, 2)
    tokens[2, 1, 0] = value
    rows = {"model": make_pairs(), "other": [(tokens, None)], "scalar_per_pair": torch.zeros(3)}
    guard.add_batch(torch.tensor(torch.nan), ["a", "b", "c"], rows)
    with pytest.raises(ValueError, match=r"Samples: c\."):
        guard.should_skip(True, step=0, max_steps=9)


def test_the_state_of_the_guard_is_restored():
    guard = StepGuard(max_nonfinite_steps=3)
    guard.add_batch(torch.tensor(torch.nan), ["a", "b", "c"], make_pairs())
    assert guard.should_skip(True, step=0, max_steps=9)
    restored = StepGuard(max_nonfinite_steps=3)
    restored.load_state_dict(guard.state_dict())
    assert restored.state_dict() == guard.state_dict() and restored.skipped_steps == 1
