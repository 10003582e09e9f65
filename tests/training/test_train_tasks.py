# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What `mlip train` does for each combination of --do_train, --do_eval, --eval_strategy, --output_dir and resuming."""

import json
import shutil
from pathlib import Path

import pytest
from train_command_cases import error_of, file_digests, train_flags, train_flags_without_data

from modeling_mlip.data.shapes import shapes_dataset
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.training.flags import parse_arguments
from modeling_mlip.training.run_summary import format_summary
from modeling_mlip.training.trainer import MLIPTrainer


def run(flags: list[str]) -> int:
    return mlip([*flags, "--report_to", "none", "--no_sweep"])


# Flags -> whether the run trains, how often it evaluates, and whether its metrics hold recall.
NEW_FOLDER = {
    "no task": ("", True, 1),
    "train": ("--do_train", True, 0),
    "evaluate": ("--do_eval --model_name_or_path {trained}", False, 1),
    "both": ("--do_train --do_eval", True, 1),
    "evaluate while training": ("--eval_strategy steps --eval_steps 2", True, 3),
    "train, evaluate while training": ("--do_train --eval_strategy steps --eval_steps 2", True, 3),
    "evaluate first": ("--eval_on_start", True, 2),
    "evaluate alone with a strategy": ("--do_eval --eval_strategy epoch --model_name_or_path {trained}", False, 1),
    "plateau": ("--lr_scheduler_type reduce_lr_on_plateau --eval_strategy steps --eval_steps 2", True, 3),
    "best": ("--load_best_model_at_end --eval_strategy steps --eval_steps 2 --save_steps 2", True, 3),
    "best only": ("--save_strategy best --eval_strategy steps --eval_steps 2", True, 3),
    "model only": ("--save_only_model --save_steps 2", True, 1),
}


@pytest.mark.parametrize("case", NEW_FOLDER)
def test_a_new_folder_holds_the_results_of_the_tasks_asked_for(case, drawn, trained, tmp_path, monkeypatch):
    calls, evaluate = [], MLIPTrainer.evaluate
    monkeypatch.setattr(
        MLIPTrainer, "evaluate", lambda self, *args, **kwargs: calls.append(1) or evaluate(self, *args, **kwargs)
    )
    flags, trains, evaluations = NEW_FOLDER[case]
    folder, before = tmp_path / "out", file_digests(trained)
    assert run(train_flags(drawn, str(folder), *flags.format(trained=trained).split())) == 0
    assert len(calls) == evaluations
    assert (folder / "model.safetensors").is_file() == (folder / "README.md").is_file() == trains
    results = json.loads((folder / ("all_results.json" if trains else "eval_results.json")).read_text())
    assert ("train_loss" in results) == trains
    assert ("eval_mean_recall" in results) == (case != "train")
    assert file_digests(trained) == before


# Flags for the folder of a finished run -> a part of the error.
FINISHED_FOLDER = {
    "no task": ("", "holds a run already"),
    "train": ("--do_train", "holds a run already"),
    "train and evaluate": ("--do_train --do_eval", "holds a run already"),
    "evaluate while training": ("--eval_strategy epoch", "holds a run already"),
    "evaluate first": ("--eval_on_start", "holds a run already"),
    "own model": ("--model_name_or_path {folder}", "holds a run already"),
    "own model, evaluate while training": ("--model_name_or_path {folder} --eval_strategy epoch", "holds a run"),
    "own model, train and evaluate": ("--model_name_or_path {folder} --do_train --do_eval", "holds a run already"),
    "another run's checkpoint": ("--resume_from_checkpoint {other}", "holds a run already"),
    "evaluate no model": ("--do_eval", "--model_name_or_path"),
    "predict": ("--do_predict", "--do_predict"),
    "predict with a model": ("--do_predict --do_eval --model_name_or_path {folder}", "--do_predict"),
    "push without training": ("--do_eval --push_to_hub --model_name_or_path {folder}", "mlip push"),
    "resume without training": (
        "--do_eval --resume_from_checkpoint true --model_name_or_path {folder}",
        "--resume_from_checkpoint true without training",
    ),
}


@pytest.mark.parametrize("case", FINISHED_FOLDER)
def test_a_finished_run_is_never_written_over(case, drawn, trained, tmp_path, capfd):
    flags, message = FINISHED_FOLDER[case]
    other = tmp_path / "other"
    shutil.copytree(Path(trained) / "checkpoint-4", other / "checkpoint-4")
    before = file_digests(trained)
    assert run(train_flags(drawn, trained, *flags.format(folder=trained, other=other / "checkpoint-4").split())) == 1
    assert message in error_of(capfd.readouterr().err)
    assert file_digests(trained) == before


def test_evaluation_alone_changes_no_file_of_the_run_that_it_evaluates(drawn, trained, tmp_path, monkeypatch, capsys):
    folder = str(tmp_path / "copy")
    (tmp_path / "here").mkdir()
    shutil.copytree(trained, folder)
    before = file_digests(folder)
    flags = train_flags_without_data(folder, "--model_name_or_path", folder, "--validation_file", drawn[1])
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    assert mlip([*flags, "--do_eval", "--report_to", "tensorboard"]) == 0
    after = file_digests(folder)
    assert {name: after[name] for name in before} == before
    assert set(after) - set(before) == {"eval_results.json"}
    assert list((tmp_path / "here").iterdir()) == []  # TensorBoard would begin a folder where the command runs
    results = json.loads((tmp_path / "copy" / "eval_results.json").read_text())
    expected = json.loads((Path(trained) / "all_results.json").read_text())
    assert results["eval_mean_recall"] == pytest.approx(expected["eval_mean_recall"])
    assert "text to image" in capsys.readouterr().out


@pytest.mark.parametrize("left", ["checkpoint-4", "model.safetensors", "config.json", "trainer_state.json"])
def test_an_interrupted_run_is_not_written_over(left, drawn, trained, tmp_path, capfd):
    folder = tmp_path / "interrupted"
    if left.startswith("checkpoint"):
        shutil.copytree(Path(trained) / left, folder / left)
    else:
        folder.mkdir()
        shutil.copy(Path(trained) / left, folder)
    before = file_digests(folder)
    assert run(train_flags(drawn, str(folder))) == 1
    error = error_of(capfd.readouterr().err)
    assert f"holds a run already ({left})" in error
    assert (f"--resume_from_checkpoint {folder}/checkpoint-4" in error) == left.startswith("checkpoint")
    assert file_digests(folder) == before


def test_a_run_without_optimizer_states_is_not_resumed_and_no_error_suggests_it(drawn, tmp_path, capfd):
    folder = str(tmp_path / "out")
    assert run(train_flags(drawn, folder, "--save_only_model")) == 0
    before = file_digests(folder)
    assert run(train_flags(drawn, folder)) == 1
    assert "--resume_from_checkpoint" not in error_of(capfd.readouterr().err)
    assert run(train_flags(drawn, folder, "--save_only_model", "--resume_from_checkpoint", "true")) == 1
    assert "save_only_model" in error_of(capfd.readouterr().err)
    assert file_digests(folder) == before


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_new_folder_starts_a_run_whether_it_may_be_resumed_or_not(value, drawn, tmp_path):
    assert run(train_flags(drawn, str(tmp_path / "out"), "--resume_from_checkpoint", value)) == 0


# Flags with training data alone -> the flag that the error names.
WITHOUT_VALIDATION = {
    "--eval_strategy epoch": "--eval_strategy epoch",
    "--eval_strategy epoch --save_strategy epoch --load_best_model_at_end": "--eval_strategy epoch",
    "--load_best_model_at_end --save_strategy no": "--load_best_model_at_end",
    "--save_strategy best": "--save_strategy best",
    "--eval_on_start": "--eval_on_start",
    "--do_train --do_eval": "--do_eval",
    "--eval_strategy epoch --lr_scheduler_type reduce_lr_on_plateau": "--eval_strategy epoch",
}


@pytest.mark.parametrize("flags", WITHOUT_VALIDATION)
def test_a_flag_that_needs_validation_data_asks_for_it(flags, drawn, tmp_path, capfd):
    folder = tmp_path / "out"
    command = train_flags_without_data(str(folder), "--train_file", drawn[0], *flags.split())
    assert run(command) == 1
    error = error_of(capfd.readouterr().err)
    assert error.startswith(f"mlip train: error: {WITHOUT_VALIDATION[flags]} needs") and "--validation_file" in error
    assert not folder.exists()


@pytest.mark.parametrize("flags, metric", [("--save_strategy best", "eval_mean_recall"), ("", None)])
def test_the_best_model_has_the_highest_mean_recall_by_default(flags, metric):
    args = parse_arguments(["--output_dir", "unused", "--use_cpu", *flags.split()])[2]
    assert args.metric_for_best_model == metric
    assert args.greater_is_better is (True if metric else None)


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_recall_lowers_the_learning_rate_when_recall_falls(name):
    flags = ["--output_dir", "unused", "--use_cpu", "--lr_scheduler_type", name, "--eval_strategy", "epoch"]
    args = parse_arguments([*flags, "--lr_scheduler_kwargs", '{"factor": 0.5}'])[2]
    assert args.lr_scheduler_kwargs == {"mode": "max", "factor": 0.5}


def test_speed_and_batch_are_those_of_the_pairs_there_are(drawn, tmp_path, capfd):
    """30 pairs and a batch size of 128: a step has 30 pairs."""
    path, folder = str(tmp_path / "thirty.parquet"), tmp_path / "out"
    shapes_dataset(num_train=30, num_validation=0)["train"].to_parquet(path)
    assert run(train_flags((path, drawn[1]), str(folder), "--per_device_train_batch_size", "128")) == 0
    results = json.loads((folder / "all_results.json").read_text())
    speed = results["train_samples_per_second"]
    assert speed == pytest.approx(4 * 30 / results["train_runtime"], rel=0.01)
    assert f"{speed:.1f} pairs/s" in capfd.readouterr().out
    settings = {line.split("|")[1].strip(): line.split("|")[2].strip() for line in card_rows(folder)}
    assert settings["pairs per step"] == "30"


def card_rows(folder: Path) -> list[str]:
    return [line for line in (folder / "README.md").read_text().splitlines() if line.count("|") == 3]


def test_the_summary_shows_what_was_measured():
    recalls = {f"eval_{way}_recall@{k}": 1.0 for way in ("text_to_image", "image_to_text") for k in (1, 5, 10)}
    training = {"train_loss": 2.0, "train_runtime": 3.0, "train_samples_per_second": 4.0}
    assert format_summary({}) == ""
    assert format_summary(training) == "loss 2.000, 3 s, 4.0 pairs/s"
    assert format_summary(recalls | training).splitlines()[-1] == "loss 2.000, 3 s, 4.0 pairs/s"
    assert "loss" not in format_summary(recalls)
