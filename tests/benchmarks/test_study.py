# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/study: data sets described in files, the validation split, the steps of each arm, and interrupted runs."""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, Features, Image, List, Value
from matplotlib.axes import Axes
from PIL import Image as PILImage

from modeling_mlip.data.shapes import PROMPTS

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))
from figures import draw_curves, draw_study, metrics_table  # noqa: E402
from run import (  # noqa: E402
    ARMS,
    add_costs,
    calibrate,
    do_runs,
    evaluate_settings,
    main,
    mean_recalls,
    missing_runs,
    start_record,
    steps_of,
    train_arm,
)
from study_data import InMemoryPairs, draw_validation_split, load_study_data, read_study_data  # noqa: E402


@pytest.fixture
def described(tmp_path) -> Path:
    """A description file, and parquet files of 12 and 6 images of 80 x 70 pixels with two captions each."""
    features = Features({"picture": Image(), "texts": List(Value("string"))})
    words = ["red", "green", "blue", "small", "large", "round"]
    for split, count in (("train", 12), ("validation", 6)):
        pixels = np.random.default_rng(0).integers(0, 256, (count, 80, 70, 3), dtype=np.uint8)
        columns = {
            "picture": [PILImage.fromarray(each) for each in pixels],
            "texts": [[f"a {words[i % 6]} ball", f"one ball of number {i}"] for i in range(count)],
        }
        Dataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    files = {f"{split}_file": str(tmp_path / f"{split}.parquet") for split in ("train", "validation")}
    description = {
        "source": {**files, "image_column": "picture", "caption_column": "texts"},
        **dict(batch=4, learning_rate=1e-3, steps=5, shift=0.1, scale=0.1, colour=0.1),
        **dict(image_size=32, recall_at=[1, 5], metric="mean_recall", metric_label="mean recall"),
    }
    path = tmp_path / "balls.json"
    path.write_text(json.dumps(description))
    return path


@pytest.mark.parametrize("name", ["noto-emoji", "shapes", "flickr8k"])
def test_the_committed_results_resume_with_the_committed_descriptions(name):
    record = json.loads((STUDY / "results" / f"{name}.json").read_text())
    data = read_study_data(name)
    assert data.record() == record["data"]
    resumed = start_record(STUDY / "results" / f"{name}.json", data, bf16=record["bf16"])
    assert resumed == {**record, "arms": ARMS}
    assert {arm: ARMS[arm] for arm in record["arms"]} == record["arms"]
    flags = argparse.Namespace(equal=["compute"], seeds=[0], arms=["CLIP", "MLIP, all parts"])
    assert missing_runs(record, flags) == []
    shown = {row[""] for row in metrics_table(resumed, "compute")}  # also with arms that have no calibration yet
    assert {"CLIP", "MLIP, all parts"} <= shown <= {run["arm"] for run in record["runs"]}


def test_the_shapes_are_evaluated_with_the_prompts_of_the_package():
    assert read_study_data("shapes").zero_shot == PROMPTS


def test_every_description_in_the_study_folder_is_valid():
    paths = sorted((STUDY / "data").glob("*.json"))
    assert {path.stem for path in paths} >= {"noto-emoji", "shapes", "flickr8k"}
    for path in paths:
        assert read_study_data(path.stem) == read_study_data(str(path))
    flickr = read_study_data("flickr8k", train_file="a.parquet", validation_file="b.parquet")
    assert flickr.source == {
        **{"image_column": "image", "caption_column": "captions"},
        **{"train_file": "a.parquet", "validation_file": "b.parquet"},
    }
    assert (flickr.metric, flickr.record()["recall_at"]) == ("mean_recall", [1, 5, 10])


def test_a_data_set_file_needs_no_code(described):
    data = read_study_data(str(described))
    loaded = load_study_data(data)
    images, captions = loaded["validation"]
    assert images.shape == (6, 3, 32, 32) and images.dtype == torch.uint8
    assert captions[1] == ["a green ball", "one ball of number 1"]
    run = train_arm(data, "CLIP", seed=0, steps=1, bf16=False)
    assert (run["arm"], run["seed"], run["steps"]) == ("CLIP", 0, 1)
    assert run["at_ratio"]["trained"]["mean_recall"] == run["mean_recall"]
    recalls = [run[f"{way}_recall@{k}"] for way in ("text_to_image", "image_to_text") for k in (1, 5)]
    assert run["mean_recall"] == pytest.approx(sum(recalls) / 4, abs=0.01)
    assert run["image_to_text_recall@5"] >= run["image_to_text_recall@1"]


def test_files_from_the_command_line_replace_those_of_the_description(described, tmp_path):
    data = read_study_data(str(described), validation_file=str(tmp_path / "train.parquet"))
    assert len(load_study_data(data)["validation"][0]) == 12
    shapes = read_study_data("shapes", train_file="mine.parquet")
    assert shapes.source == {"train_file": "mine.parquet"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stepz": 3}, "stepz"),
        ({"recall_at": [2]}, "recall_at=.2.; choose from 1, 5, 10"),
        ({"batch": None}, "lacks the fields .'batch'."),
    ],
)
def test_wrong_fields_are_refused_by_name(described, change, message):
    description = json.loads(described.read_text()) | change
    described.write_text(json.dumps({name: value for name, value in description.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        read_study_data(str(described))


def test_an_unknown_data_set_and_a_missing_source_are_refused():
    with pytest.raises(
        ValueError,
        match="data='emoji' is unknown; choose one of flickr8k, flickr8k-96px, flickr8k-nano, noto-emoji, shapes",
    ):
        read_study_data("emoji")
    with pytest.raises(ValueError, match="names no source"):
        load_study_data(read_study_data("noto-emoji"))


def test_each_caption_of_an_image_is_drawn_and_one_caption_draws_no_random_number(described):
    data = read_study_data(str(described))
    images, captions = load_study_data(data)["train"]
    pairs = InMemoryPairs(images, captions, data)
    torch.manual_seed(0)
    drawn = {pairs.__getitems__([3])[0]["captions"][0] for _ in range(30)}
    assert drawn == set(captions[3])
    torch.manual_seed(0)
    InMemoryPairs(images, [each[:1] for each in captions], data).__getitems__([3, 4])
    state = torch.get_rng_state()
    torch.manual_seed(0)
    torch.rand(5, 2)  # the amounts of augmentation
    assert torch.equal(state, torch.get_rng_state())


def test_recall_is_averaged_over_copies_and_directions():
    names = [f"{way}_recall@{k}" for k in (1, 5) for way in ("text_to_image", "image_to_text")]
    recalls = [dict(zip(names, values, strict=True)) for values in ((10, 20, 30, 40), (20, 30, 40, 70))]
    assert mean_recalls(recalls, (1,)) == {names[0]: 15, names[1]: 25, "recall@1": 20}
    assert mean_recalls(recalls, (1, 5))["mean_recall"] == (20 + 45) / 2


def test_a_run_keeps_the_metrics_at_every_ratio_and_weight():
    class Model:
        config = argparse.Namespace(merge_ratio=0.5, frequency_embed_weight=0.5)

        def set_merge_ratio(self, ratio):
            self.config.merge_ratio = ratio

    def measure() -> dict[str, float]:
        return {"recall@1": 100 * Model.config.merge_ratio + Model.config.frequency_embed_weight}

    metrics = evaluate_settings("MLIP", Model(), measure)
    assert metrics["recall@1"] == 50.5
    assert {ratio: value["recall@1"] for ratio, value in metrics["at_ratio"].items()} == {
        **{"0": 0.5, "0.3": 30.5, "0.5": 50.5, "0.7": 70.5},
    }
    assert {weight: value["recall@1"] for weight, value in metrics["at_embed_weight"].items()} == {
        **{"0": 50, "0.25": 50.25, "0.5": 50.5, "1": 51},
    }


def test_drawn_validation_pairs_were_training_pairs_and_share_every_word_with_the_training_pairs():
    hands = [
        f"{sign} hand {tone} skin" for sign in ("waving", "raised", "folded") for tone in ("light", "dark", "medium")
    ]
    train = [*hands, "a Unique word", "light", "dark", "medium", "waving", "raised"]
    published = ["folded hand", "dark skin"]
    splits = DatasetDict(
        train=Dataset.from_dict({"caption": train}), validation=Dataset.from_dict({"caption": published})
    )
    new_splits = draw_validation_split(splits)
    drawn, kept = new_splits["validation"]["caption"], new_splits["train"]["caption"]
    assert len(drawn) == 2 and not set(drawn) & set(published)
    assert sorted([*drawn, *kept]) == sorted([*train, *published])
    known = {word for caption in kept for word in caption.lower().split()}
    assert all(word in known for caption in drawn for word in caption.lower().split())
    assert draw_validation_split(splits)["validation"]["caption"] == drawn  # the same for every arm and seed


def test_words_that_occur_once_stay_in_training():
    splits = DatasetDict(
        train=Dataset.from_dict({"caption": ["one two", "two three", "three four", "two three"]}),
        validation=Dataset.from_dict({"caption": ["two", "three"]}),
    )
    assert draw_validation_split(splits)["validation"]["caption"] == ["two three", "two three"]


def test_equal_compute_gives_more_steps_to_an_arm_with_cheaper_steps():
    record = {"step_seconds": {"CLIP": 2.0, "MLIP": 0.8}, "data": {"steps": 100}}
    steps = {equal: steps_of(record, "MLIP", equal) for equal in ("steps", "compute", "short", "long")}
    assert steps == {"steps": 100, "compute": 250, "short": 150, "long": 1250}
    assert "CLIP" in ARMS and steps_of(record, "CLIP", "compute") == 100


def test_new_arms_are_added_in_proportion_to_the_time_of_clip():
    record = {"step_seconds": {"CLIP": 2.0, "MLIP": 0.8}}
    add_costs(record, {"step_seconds": {"CLIP": 4.0, "FLIP": 1.0}, "step_gflops": {"CLIP": 9.0, "FLIP": 3.0}})
    assert record["step_seconds"] == {"CLIP": 2.0, "MLIP": 0.8, "FLIP": 0.5}
    assert record["step_gflops"] == {"CLIP": 9.0, "FLIP": 3.0}


def test_calibration_measures_the_settings_of_the_schedule(described):
    description = json.loads(described.read_text())
    described.write_text(json.dumps({**description, "image_size": 64}))  # 64 patches
    arms = ["CLIP", "FLIP, falling dropout", "Growing images"]
    costs = calibrate(read_study_data(str(described)), arms, rounds=1, bf16=False)
    gflops = costs["step_gflops"]
    assert all(costs["step_seconds"][arm] > 0 for arm in arms)
    # On average, falling dropout keeps 30 % of the patches, and growing images have about half.
    assert 0.2 < gflops["FLIP, falling dropout"] / gflops["CLIP"] < 0.45
    assert 0.4 < gflops["Growing images"] / gflops["CLIP"] < 0.75


def test_a_calibration_is_repeated_without_a_change_to_the_steps(described, tmp_path):
    path = tmp_path / "results" / "balls.json"
    path.parent.mkdir()
    record = {"bf16": False, "arms": ARMS, "data": read_study_data(str(described)).record(), "runs": []}
    record["step_seconds"] = {"CLIP": 2.0, "MLIP": 0.8}
    path.write_text(json.dumps(record))
    flags = ["--data", str(described), "--output_dir", str(path.parent), "--no_bf16", "--arms", "MLIP"]
    costs = {"step_seconds": {"CLIP": 2.1, "MLIP": 0.9}, "step_gflops": {"CLIP": 9.0, "MLIP": 3.0}}
    with mock.patch("run.calibrate", return_value=costs) as calibrated:
        main([*flags, "--calibrate_again"])
    assert calibrated.call_args.args[1] == ["CLIP", "MLIP"]
    repeated = json.loads(path.read_text())
    assert repeated.pop("repeated_step_seconds") == [costs["step_seconds"]]
    assert repeated == record


def test_the_costs_of_another_machine_give_the_steps(described, tmp_path):
    data, arms = read_study_data(str(described)), ["CLIP", "MLIP"]
    costs = {
        "machine": "a processor",
        "step_seconds": {"CLIP": 2.0, "MLIP": 0.8},
        "step_gflops": {"CLIP": 9, "MLIP": 3},
        "repeated_step_seconds": [{"CLIP": 1.0, "MLIP": 0.6}],
    }
    other = tmp_path / "costs.json"
    other.write_text(json.dumps({"data": data.record(), **costs}))
    flags = ["--data", str(described), "--output_dir", str(tmp_path / "results"), "--no_bf16", "--seeds", "0"]
    flags += ["--equal", "compute", "--costs_of", str(other)]
    trained = []

    def start_run(run: tuple) -> dict:
        trained.append(run)
        return {"arm": run[0], "seed": run[1], "steps": run[2]}

    with mock.patch("run.calibrate") as calibrated, mock.patch("run.run_in_process", return_value=start_run):
        main([*flags, "--arms", *arms, "--parallel", "1"])
        with pytest.raises(SystemExit, match="costs.json has no step time of FLIP"):
            main([*flags, "--arms", "FLIP"])
        other.write_text(json.dumps({"data": data.record(), "machine": "a processor", "runs": []}))
        with pytest.raises(SystemExit, match="costs.json has no step time of CLIP"):
            main([*flags, "--arms", "CLIP"])
        other.write_text(json.dumps({"data": {**data.record(), "batch": 1}, **costs}))
        with pytest.raises(SystemExit, match="its runs have other settings than --data balls"):
            main([*flags, "--arms", "CLIP"])
    assert not calibrated.called
    assert trained == [("CLIP", 0, data.steps), ("MLIP", 0, round(2 * data.steps))]  # the mean of 0.4 and 0.6
    written = json.loads((tmp_path / "results" / "balls.json").read_text())
    assert written["step_seconds"] == {"CLIP": 2.0, "MLIP": 1.0}
    assert written["costs_of"]["machine"] == "a processor" and len(written["costs_of"]["calibrations"]) == 2
    assert written["machine"] != "a processor" and written["bf16"] is False


def test_a_negative_number_of_evaluations_is_refused():
    with pytest.raises(SystemExit, match="--evaluations -1: choose 0 or more"):
        main(["--data", "shapes", "--evaluations", "-1"])


def test_a_run_is_evaluated_in_between_and_this_does_not_change_it(described):
    data = replace(read_study_data(str(described)), config="nano", model={"patch_size": 8})
    plain, curved = (train_arm(data, "MLIP", 0, 4, bf16=False, num_evaluations=each) for each in (0, 2))
    curve = curved.pop("curve")
    assert list(curve) == ["2", "4"]
    assert curve["4"] == {name: curved[name] for name in curve["4"]} and "mean_recall" in curve["4"]
    assert set(curve["2"]) == set(curve["4"])
    assert {**curved, "cpu_seconds": 0} == {**plain, "cpu_seconds": 0}


def test_curves_are_drawn_over_compute(described, tmp_path):
    data = read_study_data(str(described))
    record = {"step_seconds": {"CLIP": 2.0, "MLIP": 1.0}, "arms": ARMS, "data": data.record()}  # 5 steps of CLIP
    curve = {"10": {"mean_recall": 3.0}, "50": {"mean_recall": 4.0}}
    record["runs"] = [{"arm": "MLIP", "seed": 0, "steps": 50}]
    assert draw_curves(record, data, tmp_path) is None
    assert draw_study(record, data, tmp_path) is None  # no two arms at equal compute
    record["runs"][0]["curve"] = curve
    with mock.patch.object(Axes, "plot", autospec=True, side_effect=Axes.plot) as plot:
        assert draw_curves(record, data, tmp_path).is_file()
    assert plot.call_args.args[1:3] == ([1.0, 5.0], [3.0, 4.0])


def test_an_arm_whose_settings_have_changed_is_refused(described, tmp_path):
    path, data = tmp_path / "results.json", read_study_data(str(described))
    path.write_text(json.dumps({"arms": {"CLIP": {}}, "data": data.record(), "runs": []}))
    with pytest.raises(SystemExit, match="holds runs with other settings"):
        start_record(path, data, bf16=True)


def test_other_settings_than_those_of_the_result_file_are_refused(described, tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps({"arms": ARMS, "data": {"batch": 5}, "runs": []}))
    with pytest.raises(SystemExit, match="holds runs with other settings"):
        start_record(path, read_study_data(str(described)), bf16=True)


def test_a_failed_run_stops_new_runs_and_finished_runs_are_written(tmp_path):
    started = []

    def start_run(run: tuple) -> dict:
        started.append(run)
        if run == ("CLIP", 1, 5):
            raise RuntimeError("no more memory")
        time.sleep(0.3 * (run[1] > 1))  # the next run has started by then
        return {"arm": run[0], "seed": run[1]}

    path, record = tmp_path / "results.json", {"runs": []}
    runs = [("CLIP", seed, 5) for seed in range(6)]
    with pytest.raises(RuntimeError, match="no more memory"):
        do_runs(start_run, runs, 1, record, path)
    written = [run["seed"] for run in json.loads(path.read_text())["runs"]]
    assert 0 in written and 1 not in written and len(started) < 6
