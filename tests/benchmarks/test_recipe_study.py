# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of fine-tuning recipes records each run once, and chooses alpha on the other half of the split."""

import importlib.util
import json
from pathlib import Path

import pytest

REFERENCES = "self-distillation, references"
FILE = Path(__file__).parents[2] / "benchmarks" / "recipe_study.py"


@pytest.fixture(scope="module")
def recipe_study():
    spec = importlib.util.spec_from_file_location("benchmark_recipe_study", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def flags(recipe_study, drawn, tmp_path, monkeypatch):
    description = {"batch": 8, "learning_rate": 1e-3, "steps": 2, "shift": 0.1, "scale": 0.1, "colour": 0.1}
    description |= {"metric": "recall@1", "metric_label": "recall@1", "image_size": 64}
    path = tmp_path / "data.json"
    path.write_text(json.dumps(description))
    step = {"max_steps": 1, "per_device_train_batch_size": 8, "learning_rate": 1e-3}
    settings = {"pretraining": step, "fine_tuning": step, "merging": step}
    monkeypatch.setattr(recipe_study, "SETTINGS", {**settings, "fine_tuning_merge_ratio": 0.5, "merging_ratios": [0.5]})
    monkeypatch.setattr(recipe_study, "ALPHAS", (0.0, 1.0))
    merging = {name: recipe_study.MERGING_RECIPES[name] for name in ("distilled", "fine-tuned")}
    monkeypatch.setattr(recipe_study, "MERGING_RECIPES", merging)
    result = tmp_path / "result.json"
    data = ["--old", str(path), "--old_files", *drawn, "--new", str(path), "--new_files", *drawn]
    return [*data, "--folder", str(tmp_path / "start"), "--seeds", "0", "--result_file", str(result)], result


def test_runs_are_recorded_once_and_alpha_is_chosen_on_the_other_half(recipe_study, flags, monkeypatch):
    arguments, result = flags
    halves = []
    measure = recipe_study.Data.measure
    monkeypatch.setattr(
        recipe_study.Data,
        "measure",
        lambda self, *rest: halves.append(rest[2:] or ("reported",)) or measure(self, *rest),
    )
    arguments += ["--recipes", "plain fine-tuning", REFERENCES]
    recipe_study.main(arguments)
    record = json.loads(result.read_text())
    names = ["start at 0", "start at 0.5", "plain fine-tuning", "WiSE-FT", REFERENCES, f"{REFERENCES}, and WiSE-FT"]
    names += ["merging at 0.5, distilled", "merging at 0.5, fine-tuned"]
    assert [run["recipe"] for run in record["runs"]] == names
    wise = record["runs"][3]
    assert set(wise["chosen_on"]) == {"0", "1"} and wise["alpha"] in (0, 1)
    ends = {0: record["runs"][0], 1: record["runs"][2]}
    assert wise["alpha"] == 0 or (wise["new"], wise["old"]) == (ends[1]["new"], ends[1]["old"])
    assert halves.count(("choice",)) == 2 * 2 * 2  # two recipes, two alphas, two data sets
    assert record["runs"][4]["arguments"] == {"keep_weight": 2.0, "reference_weight": 30.0}
    rows = {row["recipe"]: row for row in recipe_study.summarize(record["runs"])}
    assert rows["plain fine-tuning"]["old"] == f"{record['runs'][2]['old']:.2f}"
    recipe_study.main(arguments)
    assert json.loads(result.read_text())["runs"] == record["runs"]


def test_a_tenth_of_the_steps_of_pretraining_turns_merging_on(recipe_study):
    settings = recipe_study.build_settings("nano", 0.0, 300)
    assert (settings["pretraining"]["max_steps"], settings["merging"]["max_steps"]) == (300, 30)
    assert settings["start"] == {"config_name": "nano", "start_merge_ratio": 0.0}
    assert recipe_study.build_settings("tiny", 0.9, None)["merging"] == recipe_study.SETTINGS["merging"]
