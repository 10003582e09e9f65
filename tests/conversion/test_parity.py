# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Parity fails for NaN, infinite, missing and empty values, and its inputs cover every class of token id."""

import math

import pytest
import torch
from conftest import small_config
from conversion_cases import clip_folder
from safetensors.torch import load_file, save_file

from modeling_mlip.conversion.convert import main
from modeling_mlip.conversion.parity import ALL_LENGTHS, OUTPUTS, Report, _difference, captions_of_all_lengths, largest

COMPLETE = [(name, 0.0, 1.0) for name in (*OUTPUTS, ALL_LENGTHS)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_value_that_is_not_finite_fails_wherever_it_stands(value):
    for position in range(len(COMPLETE) + 1):
        rows = [*COMPLETE[:position], ("vision layers 0-1", value, 1.0), *COMPLETE[position:]]
        assert not Report("original", rows).passed
    assert math.isnan(largest([0.0, value])) and math.isnan(largest([value, 0.0]))


def test_a_missing_or_empty_comparison_fails():
    assert Report("original", COMPLETE).passed
    assert not Report("original").passed
    assert not any(Report("original", COMPLETE[:n] + COMPLETE[n + 1 :]).passed for n in range(len(COMPLETE)))
    assert math.isnan(_difference(torch.ones(0), torch.ones(0)))
    assert math.isnan(_difference(torch.ones(2, 1), torch.ones(2, 2)))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_checkpoint_with_values_that_are_not_finite_is_refused_by_their_names(tmp_path, value):
    source, _ = clip_folder(tmp_path / "clip")
    state = load_file(source / "model.safetensors")
    state["vision_model.encoder.layers.1.mlp.fc1.bias"][3] = value
    save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"NaN or infinite values in vision_model\.encoder\.layers\.1\.mlp\.fc1\.bias"):
        main([str(source), str(tmp_path / "mlip")])
    assert not (tmp_path / "mlip").exists()


@pytest.mark.parametrize("pools_at_highest_id", [True, False])
def test_parity_inputs_have_every_length_and_every_class_of_id(pools_at_highest_id):
    config = small_config(text={"vocab_size": 70, "pad_token_id": 0})  # 64 to 69 are added tokens
    ids = captions_of_all_lengths(config, pools_at_highest_id)
    assert ids.shape == (12, 12)
    assert [(row == 63).nonzero()[0].item() for row in ids] == list(range(12))
    before_eos = {number for row, end in zip(ids, range(12), strict=True) for number in row[:end].tolist()}
    assert {0, 1, 2, 3, 62} <= before_eos
    assert ({64, 69} <= before_eos) != pools_at_highest_id
    assert (ids.max() > 63) != pools_at_highest_id
