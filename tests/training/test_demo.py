# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The demo trains, evaluates, reloads and reports; here on fewer drawings."""

import json
import multiprocessing
from types import SimpleNamespace

import pytest

from modeling_mlip.data.framed_shapes import framed_shapes_dataset
from modeling_mlip.training import demo


def train_here(log, *arguments):
    """In place of `demo.start_process`: a new process would draw all shapes."""
    demo.train_model(*arguments)
    return SimpleNamespace(join=lambda: None, exitcode=0)


@pytest.fixture
def few_shapes(monkeypatch):
    monkeypatch.setattr("modeling_mlip.data.sources.framed_shapes_dataset", lambda: framed_shapes_dataset(256, 12))
    monkeypatch.setattr(demo, "MEASURED_STEPS", 6)


def test_the_demo_leaves_both_models_and_a_report_that_opens_with_pictures(few_shapes, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "start_process", train_here)
    demo.main(["--output_dir", str(tmp_path), "--max_steps", "2"])
    [folder] = tmp_path.iterdir()
    for model in ("mlip", "clip"):
        names = {path.name for path in (folder / model).iterdir()}
        assert {"model.safetensors", "config.json", "README.md"} <= names
    page = (folder / "report.html").read_text()
    assert 0 < page.index("<img") < page.index("<table")
    printed = capsys.readouterr().out
    assert "Training will take about" in printed and "chance" in printed and "pipeline: " in printed
    rows = [line.split() for line in printed.splitlines() if line.startswith(("MLIP  ", "CLIP  "))]
    assert [row[:2] for row in rows] == [
        ["MLIP", "0"],
        ["MLIP", "0.3"],
        ["MLIP", "0.5"],
        ["MLIP", "0.7"],
        ["CLIP", "0"],
    ]
    assert all(0 <= float(value) <= 100 for row in rows for value in row[2:])
    written = json.loads((folder / "results.json").read_text())
    assert written["seed"] == 0
    shown = [
        [row["model"], row["merge ratio"], *(f"{value:.2f}" for value in list(row.values())[2:])]
        for row in written["rows"]
    ]
    assert shown[:-1] == rows and written["rows"][-1]["model"] == "chance"


def test_the_second_model_takes_as_much_processor_time_as_the_first(few_shapes, tmp_path, monkeypatch):
    seconds = {"mlip": 0.1, "clip": 0.25}
    trained = {}
    monkeypatch.setattr(demo, "measure_training_step", lambda model, ratio, bf16: seconds[model])
    monkeypatch.setattr(demo, "train_model", lambda folder, model, steps, *rest: trained.update({model: steps}))
    monkeypatch.setattr(demo, "start_process", train_here)
    demo.train_models(tmp_path, ["mlip", "clip"], 100, 0.5, 0)
    assert trained == {"mlip": 100, "clip": 40}


def test_a_second_process_that_fails_is_reported_with_its_output(tmp_path, monkeypatch):
    def train_model(folder, model, *rest):
        if model == "clip":
            raise ValueError("no room for clip")

    monkeypatch.setattr(demo, "measure_training_step", lambda model, ratio, bf16: 0.1)
    monkeypatch.setattr(demo, "train_model", train_model)
    fork = multiprocessing.get_context("fork")  # starts at once, and with `train_model` as above
    monkeypatch.setattr(demo.multiprocessing, "get_context", lambda method: fork)
    with pytest.raises(RuntimeError, match=r"status 1.*clip\.log"):
        demo.train_models(tmp_path, ["mlip", "clip"], 3, 0.5, 0)
    assert "no room for clip" in (tmp_path / "clip.log").read_text()


@pytest.mark.parametrize(("flag", "value"), [("--max_steps", "0"), ("--merge_ratio", "1"), ("--merge_ratio", "nan")])
def test_wrong_flags_are_refused_before_anything_is_drawn(flag, value, tmp_path, capsys):
    with pytest.raises(SystemExit):
        demo.main(["--output_dir", str(tmp_path), flag, value])
    assert f"{flag} {value}: choose" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_all_models_train_in_one_dtype_although_the_measurement_varies(tmp_path, monkeypatch):
    answers, dtypes = iter([True, False, False, False]), []
    monkeypatch.setattr(demo, "bfloat16_is_faster", lambda: next(answers))
    monkeypatch.setattr(demo, "measure_training_step", lambda model, ratio, bf16: dtypes.append(bf16) or 0.1)
    monkeypatch.setattr(demo, "train_model", lambda *arguments: dtypes.append(arguments[-1]))
    monkeypatch.setattr(demo, "start_process", train_here)
    demo.train_models(tmp_path, ["mlip", "clip"], 3, 0.5, 0)
    assert dtypes == [True] * 4


@pytest.mark.parametrize("seconds_bf16, seconds_fp32, is_faster", [(1.0, 2.0, True), (2.0, 1.0, False)])
def test_bfloat16_is_chosen_by_measuring(monkeypatch, seconds_bf16, seconds_fp32, is_faster):
    monkeypatch.setattr(demo.torch.accelerator, "is_available", lambda: False)
    clock = iter([0.0, seconds_bf16, 10.0, 10.0 + seconds_fp32])  # start and end of both products
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    assert demo.bfloat16_is_faster() is is_faster
