# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Whatever ends a run, its last checkpoint is whole, and resumed it ends as if nothing had happened."""

import errno
import json
import os
import resource
import shutil
import sys
from pathlib import Path

import datasets
import pytest
from safetensors.torch import load_file
from transformers import AutoModel
from transformers.trainer_utils import get_last_checkpoint

from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.training import checkpoint
from modeling_mlip.training.trainer import MLIPTrainer

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from kill_and_resume import command, ending, write_data  # noqa: E402
from kill_and_resume import main as kill_and_resume  # noqa: E402


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    cache, datasets.config.HF_DATASETS_CACHE = datasets.config.HF_DATASETS_CACHE, str(folder / "cache")
    write_data(folder)
    yield folder
    datasets.config.HF_DATASETS_CACHE = cache


def run(root: Path, folder: Path, *more: str, streamed: bool = False, workers: int = 0) -> int:
    return mlip(["train", *command(root, (streamed, workers), str(folder)), *more])


SCHEDULE = ["--max_steps", "7", "--save_steps", "3"]


@pytest.fixture(scope="module", params=[False, True], ids=["read", "streamed"])
def finished(request, root, tmp_path_factory) -> tuple[bool, Path]:
    """A run of 7 steps, 4 an epoch, with checkpoints after 6 and 7."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(root, folder, *SCHEDULE, streamed=request.param) == 0
    return request.param, folder


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name or path.name.startswith("_"))


# Killed


def test_runs_killed_at_random_moments_end_with_the_same_bits(tmp_path):
    """Two runs, read and streamed with two workers, each killed twice; `benchmarks/` holds many more."""
    record = tmp_path / "record.json"
    assert kill_and_resume(["--rounds", "2", "--output", str(record)]) == 0
    rounds = json.loads(record.read_text())["rounds"]
    assert [entry["identical"] for entry in rounds] == [True, True]
    assert sum(len(entry["killed"]) for entry in rounds) == 4


def test_resumed_in_a_later_epoch_a_run_draws_what_it_would_have_drawn(finished, root, tmp_path):
    """Captions, augmentation and order follow from the epoch, which accelerate does not tell everyone who skips."""
    streamed, folder = finished
    expected = ending(folder)
    again = tmp_path / "again"
    shutil.copytree(folder / "checkpoint-6", again / "checkpoint-6")
    assert run(root, again, *SCHEDULE, streamed=streamed) == 0
    assert ending(again) == expected


def test_resumed_from_its_last_step_a_run_takes_no_other(finished, root, tmp_path, capfd):
    streamed, folder = finished
    before = ending(folder)
    (folder / "model.safetensors").unlink()  # killed after the last checkpoint, before the model was saved
    assert run(root, folder, *SCHEDULE, streamed=streamed) == 0
    assert ending(folder) == before
    assert AutoModel.from_pretrained(folder).config.model_type == "mlip"


def test_what_was_begun_is_no_checkpoint_and_the_next_run_removes_it(finished, root):
    streamed, folder = finished
    half = folder / checkpoint.UNFINISHED / "checkpoint-9"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    assert Path(get_last_checkpoint(str(folder))).name == "checkpoint-7"
    assert run(root, folder, *SCHEDULE, streamed=streamed) == 0
    assert checkpoints(folder) == ["checkpoint-6", "checkpoint-7"]


# Saving


@pytest.mark.parametrize("fails", ["model.safetensors", "optimizer.pt"])
def test_a_full_disk_stops_the_run_and_the_last_checkpoint_stays_whole(fails, root, tmp_path, monkeypatch, capfd):
    """The system refuses to let files grow beyond a limit, from the second checkpoint on."""
    folder = tmp_path / "run"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    save_model = MLIPTrainer.save_model

    def save_on_a_full_disk(trainer, *args, **kwargs):
        if trainer.state.global_step == 4:
            size = (folder / "checkpoint-2" / fails).stat().st_size
            resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, hard))
        save_model(trainer, *args, **kwargs)

    monkeypatch.setattr(MLIPTrainer, "save_model", save_on_a_full_disk)
    try:
        status = run(root, folder, "--max_steps", "6", "--save_steps", "2")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert status == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    line = next(line for line in error.splitlines() if line.startswith("mlip train: error:"))
    assert "checkpoint-4 could not be written" in line and "MiB are free" in line
    assert f"--resume_from_checkpoint {folder}/checkpoint-2" in line
    assert checkpoints(folder) == ["checkpoint-2"]
    checkpoint.check_checkpoint(str(folder / "checkpoint-2"))
    assert load_file(folder / "checkpoint-2" / "model.safetensors")


def test_a_full_disk_before_the_first_checkpoint_says_to_start_again(root, tmp_path, monkeypatch, capfd):
    def refuse(trainer, output_dir):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(MLIPTrainer, "_save_scaler", refuse)
    assert run(root, tmp_path / "run", "--max_steps", "1") == 1
    error = capfd.readouterr().err
    assert "checkpoint-1 could not be written" in error and "No space left" in error and "start again" in error
    assert checkpoints(tmp_path / "run") == []


def test_an_older_checkpoint_goes_only_when_the_newer_has_its_name(root, tmp_path, monkeypatch):
    folder, seen = tmp_path / "run", []
    rotate, flush = MLIPTrainer._remove_old_checkpoints, checkpoint.flush_to_disk

    def watch(name, function):
        def watched(*args):
            seen.append((name, checkpoints(folder)))
            return function(*args)

        return watched

    monkeypatch.setattr(MLIPTrainer, "_remove_old_checkpoints", watch("rotate", rotate))
    monkeypatch.setattr(checkpoint, "flush_to_disk", watch("flush", flush))
    assert run(root, folder, "--max_steps", "4", "--save_steps", "2", "--save_total_limit", "1") == 0
    assert seen[:4] == [
        ("flush", ["_unfinished"]),
        ("rotate", ["checkpoint-2"]),
        ("flush", ["_unfinished", "checkpoint-2"]),
        ("rotate", ["checkpoint-2", "checkpoint-4"]),
    ]
    assert checkpoints(folder) == ["checkpoint-4"]


def test_the_best_checkpoint_is_known_by_its_final_name(root, tmp_path):
    folder = tmp_path / "run"
    choice = "--eval_strategy steps --eval_steps 1 --metric_for_best_model eval_mean_recall --greater_is_better true"
    flags = ["--max_steps", "3", "--save_steps", "1", "--save_total_limit", "1", *choice.split()]
    assert run(root, folder, *flags, "--validation_file", str(root / "0.parquet"), "--sweep", "false") == 0
    state = json.loads((folder / get_last_checkpoint(str(folder)) / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.parent == folder and best.is_dir()
    assert best.name == f"checkpoint-{state['best_global_step']}"


# Refused


def test_what_is_no_checkpoint_is_refused_with_the_last_one_there_is(finished, root, tmp_path, capfd):
    streamed, folder = finished
    for wrong, missing in (
        (folder / "checkpoint-8", "no trainer_state.json and no weights and no optimizer and no random states"),
        (folder, "no optimizer and no random states"),
    ):
        assert run(root, tmp_path / "other", "--resume_from_checkpoint", str(wrong), streamed=streamed) == 1
        error = capfd.readouterr().err
        assert f"{wrong} is no checkpoint to resume from: it has {missing}" in error
        assert (f"The last one there is {folder}/checkpoint-7" in error) == (wrong != folder)


def test_a_stream_is_not_resumed_by_other_readers(root, tmp_path, capfd):
    folder = tmp_path / "run"
    assert run(root, folder, "--max_steps", "2", "--save_steps", "1", streamed=True) == 0
    more = ["--max_steps", "3", "--resume_from_checkpoint", str(folder / "checkpoint-1")]
    assert run(root, folder, *more, "--per_device_train_batch_size", "4", streamed=True, workers=2) == 1
    error = capfd.readouterr().err
    assert "workers: 0, now 2; batch size: 3, now 4" in error and "--ignore_data_skip" in error


def test_a_stream_without_a_number_of_steps_is_refused(root, tmp_path, capfd):
    assert run(root, tmp_path / "run", "--max_steps", "-1", streamed=True) == 1
    assert "--max_steps" in capfd.readouterr().err
