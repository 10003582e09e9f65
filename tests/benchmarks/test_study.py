# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/study: what it holds out, and how long each arm trains."""

import json
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "study"))
from run import ARMS, carry_out, fresh_split, steps_of  # noqa: E402


def test_what_is_held_out_was_training_data_and_shares_every_word_with_what_is_left():
    hands = [
        f"{sign} hand {tone} skin" for sign in ("waving", "raised", "folded") for tone in ("light", "dark", "medium")
    ]
    train = [*hands, "a Unique word", "light", "dark", "medium", "waving", "raised"]
    published = ["folded hand", "dark skin"]
    splits = DatasetDict(
        train=Dataset.from_dict({"caption": train}), validation=Dataset.from_dict({"caption": published})
    )
    found = fresh_split(splits)
    held_out, rest = found["validation"]["caption"], found["train"]["caption"]
    assert len(held_out) == 2 and not set(held_out) & set(published)
    assert sorted([*held_out, *rest]) == sorted([*train, *published])
    known = {word for caption in rest for word in caption.lower().split()}
    assert all(word in known for caption in held_out for word in caption.lower().split())
    assert fresh_split(splits)["validation"]["caption"] == held_out  # the same for every arm and seed


def test_words_that_occur_once_stay_in_training():
    splits = DatasetDict(
        train=Dataset.from_dict({"caption": ["one two", "two three", "three four", "two three"]}),
        validation=Dataset.from_dict({"caption": ["two", "three"]}),
    )
    assert fresh_split(splits)["validation"]["caption"] == ["two three", "two three"]


def test_equal_compute_buys_more_of_the_cheaper_steps():
    record = {"step_seconds": {"CLIP": 2.0, "MLIP": 0.8}, "data": {"steps": 100}}
    steps = {equal: steps_of(record, "MLIP", equal) for equal in ("steps", "compute", "short")}
    assert steps == {"steps": 100, "compute": 250, "short": 150}
    assert "CLIP" in ARMS and steps_of(record, "CLIP", "compute") == 100


def test_a_run_that_fails_costs_none_that_finished(tmp_path):
    started = []

    def start(run: tuple) -> dict:
        started.append(run)
        if run == ("CLIP", 1, 5):
            raise RuntimeError("no more memory")
        time.sleep(0.3 * (run[1] > 1))  # the next is on its way by then
        return {"arm": run[0], "seed": run[1]}

    path, record = tmp_path / "results.json", {"runs": []}
    waiting = [("CLIP", seed, 5) for seed in range(6)]
    with pytest.raises(RuntimeError, match="no more memory"):
        carry_out(start, waiting, 1, record, path)
    kept = [run["seed"] for run in json.loads(path.read_text())["runs"]]
    assert 0 in kept and 1 not in kept and len(started) < 6
