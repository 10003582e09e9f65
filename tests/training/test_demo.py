# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The demo trains, evaluates, reloads and reports; here on fewer drawings."""

import pytest

from modeling_mlip.data.shapes import shapes_dataset
from modeling_mlip.training import demo


def test_the_demo_leaves_a_model_and_a_report_and_prints_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("modeling_mlip.data.sources.shapes_dataset", lambda: shapes_dataset(128, 12))
    demo.main(["--output_dir", str(tmp_path), "--num_train_epochs", "1"])
    [folder] = tmp_path.iterdir()
    assert {"model.safetensors", "config.json", "report.html", "README.md"} <= {path.name for path in folder.iterdir()}
    printed = capsys.readouterr().out
    assert "chance" in printed and "pipeline: " in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith(("0 ", "0.3", "0.5", "0.7"))]
    assert len(rows) == 4 and all(0 <= float(value) <= 100 for row in rows for value in row[1:])


@pytest.mark.parametrize("seconds_bf16, seconds_fp32, is_faster", [(1.0, 2.0, True), (2.0, 1.0, False)])
def test_bfloat16_is_chosen_by_measuring(monkeypatch, seconds_bf16, seconds_fp32, is_faster):
    monkeypatch.setattr(demo.torch.accelerator, "is_available", lambda: False)
    clock = iter([0.0, seconds_bf16, 10.0, 10.0 + seconds_fp32])  # start and end of both products
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    assert demo.bfloat16_is_faster() is is_faster
