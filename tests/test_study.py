# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/study: what it holds out, and how long each arm trains."""

import sys
from pathlib import Path

from datasets import Dataset, DatasetDict

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks" / "study"))
from run import ARMS, fresh_split, steps_of  # noqa: E402


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
