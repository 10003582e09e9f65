# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Verification detects NaN, infinite, missing, empty and misshapen tensors, and paths of this machine."""

import math

import pytest
import torch
from conftest import small_model

from modeling_mlip.hub.verification import (
    check_files,
    is_pushed,
    local_path_in,
    nonfinite_names,
    unequal_names,
    verify_folder,
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_named_and_not_pushed(value, tmp_path):
    model = small_model()
    with torch.no_grad():
        model.text_projection.weight[1, 1] = value
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="NaN or infinite values in.*text_projection.weight"):
        verify_folder(str(tmp_path))


def test_unequal_names_lists_every_kind_of_difference():
    ours = {name: torch.ones(2) for name in ("equal", "value", "shape", "dtype", "ours", "nan")}
    theirs = {**ours, "value": torch.zeros(2), "shape": torch.ones(2, 1), "dtype": torch.ones(2).double()}
    ours["nan"] = theirs["nan"] = torch.tensor([1.0, math.nan])
    del theirs["ours"]
    theirs["theirs"] = torch.ones(0)
    assert unequal_names(ours, theirs) == ["dtype", "nan", "ours", "shape", "theirs", "value"]
    assert nonfinite_names(ours) == ["nan"]


@pytest.mark.parametrize("text", ['"name": "/home/ada/models/b32"', "see /Users/ada/x", "path=/tmp/run-3/model"])
def test_a_path_of_this_machine_is_refused(text, tmp_path):
    assert local_path_in(text) is not None
    (tmp_path / "notes.md").write_text(text)
    with pytest.raises(ValueError, match="notes.md contains a path of this machine"):
        check_files(tmp_path)


@pytest.mark.parametrize("text", ["https://example.org/home/ada", "a/tmp/b", "image/png", "1/2", "owner/home/x"])
def test_addresses_and_relative_paths_are_not_paths_of_this_machine(text):
    assert local_path_in(text) is None


def test_files_that_name_the_machine_are_not_pushed():
    assert not is_pushed("trainer_state.json")
    assert not is_pushed("runs/Nov01_host/events.out.tfevents.1.host.2.0")
    assert is_pushed("config.json")
