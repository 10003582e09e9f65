# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of ONNX files compares speeds within a round, and int8 embeddings with those of the model."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import onnx_speed as benchmark  # noqa: E402


def test_a_ratio_of_speeds_is_that_of_the_processor_seconds_within_a_round(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(benchmark.time, "process_time", lambda: clock[0])

    def runner(*seconds):
        left = [seconds[0], *seconds]  # the first is the warm-up
        return lambda: clock.__setitem__(0, clock[0] + left.pop(0))

    runners = {benchmark.EAGER: runner(2, 4, 6), benchmark.FLOAT: runner(1, 1, 1), benchmark.INT8: runner(4, 4, 4)}
    row = benchmark.compare_speed(runners, batch_size=8, rounds=3)
    assert row["rows_per_second"] == 2.0
    assert row[benchmark.FLOAT] == 4 and row[f"{benchmark.FLOAT}, range"] == [2, 6]
    assert row[benchmark.INT8] == 1 and row[f"{benchmark.INT8}, range"] == [0.5, 1.5]


def test_cosines_and_recall_are_those_of_corresponding_rows():
    theirs = torch.eye(4)
    ours = theirs.clone()
    ours[3] = torch.tensor([1.0, 0, 0, 1])
    assert benchmark.describe_cosines(ours, theirs) == {
        "mean": pytest.approx((3 + 1 / math.sqrt(2)) / 4, abs=1e-4),
        "smallest": pytest.approx(1 / math.sqrt(2), abs=1e-4),
    }
    swapped = theirs[[1, 0, 2, 3]]
    assert benchmark.recall_at_1({benchmark.IMAGE_FILE: swapped, benchmark.TEXT_FILE: theirs}) == 50


def test_the_published_record_has_each_tower_and_batch_size():
    record = json.loads((BENCHMARKS / "results" / "onnx_speed.json").read_text())
    measured = {(row["tower"], row["batch_size"]) for row in record["speed"]}
    assert measured == {(tower, size) for tower in ("image", "text") for size in benchmark.ROUNDS}
    assert record["accuracy"]["image"]["smallest"] <= record["accuracy"]["image"]["mean"] <= 1
