# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/gpu.py: a dry run of every stage on the CPU, commands that fail or exceed their limit, and the parts that
it consists of (largest_batch.py, step_profile.py)."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from processes import run_in_fork

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import gpu  # noqa: E402
from largest_batch import search_largest  # noqa: E402
from step_profile import find_synchronisations  # noqa: E402


def load_program(path: str) -> ModuleType:
    """Import a benchmark program anew."""
    spec = importlib.util.spec_from_file_location(f"stage_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def run_tests_in_a_fork(arguments: list[str], environment: dict[str, str], log: Path) -> int:
    """Run `python -m pytest ...` in the folder of the project; returns its exit status."""
    assert arguments[:3] == ["-P", "-m", "pytest"]  # -P: the folder of the project is no package path

    def run_tests() -> int:
        os.chdir(BENCHMARKS.parent)
        os.environ |= environment
        sys.modules.pop("test_gpu", None)
        return pytest.main(arguments[3:])

    return run_in_fork(run_tests, log)


@pytest.fixture
def record_of():
    return lambda folder: json.loads((folder / "run.json").read_text())


def test_a_dry_run_writes_the_results_of_every_stage(tmp_path, monkeypatch, record_of, capsys):
    """The commands run in this process, because imports would take most of their time. The tests run in a fork of it:
    here their module may be imported already, for another device."""

    def run_here(command, seconds, environment, log):
        if command.name == "tests":
            return run_tests_in_a_fork(command.arguments, environment, log)
        log.write_text("")
        program = load_program(command.arguments[0])
        if "--training" in command.arguments:  # measured by one process for each model
            monkeypatch.setattr(program, "peak_memory", lambda everyone, flags: dict.fromkeys(everyone, 1.0))
        program.main(command.arguments[1:])
        return 0

    monkeypatch.setattr(gpu, "run_with_limit", run_here)
    assert gpu.main(["--device", "cpu", "--quick", "--stages", "a", "b", "c", "--output_dir", str(tmp_path)]) == 0
    record = record_of(tmp_path)
    assert {entry["stage"] for entry in record["commands"]} == {"a", "b", "c"}
    assert record["machine"]["packages"]["torch"] == torch.__version__.partition("+")[0]
    tests = json.loads((tmp_path / "tests.json").read_text())
    assert set(tests["counts"]) == {"passed"} and tests["counts"]["passed"] >= 2
    speed = json.loads((tmp_path / "speed.json").read_text())
    assert {entry["settings"]["task"] for entry in speed} == {"inference", "training"}
    batches = json.loads((tmp_path / "largest_batch.json").read_text())["rows"]
    assert [row["pairs"] for row in batches] == [2, 2, 2] and not any(row["is_limit"] for row in batches)
    profile = json.loads((tmp_path / "profile.json").read_text())
    passes = {row["pass"]: row["synchronisations"] for row in profile["synchronisations"]}
    assert passes["vision tower"] == passes["both towers, no attention mask"] == 0
    assert passes["both towers"] == passes["CLIP, both towers"]  # transformers reads the attention mask
    operations = {row["tower"]: row["operations"] for row in profile["towers"]}
    assert operations["no frequency stage, no merging"] < operations["no merging"] < operations["0.5 in layers 0 to 2"]
    assert list(profile["phase_seconds"]) == ["forward", "losses", "backward", "optimizer"]
    assert sum(row["share"] for row in profile["profile"]["operations"]) <= 1.001
    assert json.loads((tmp_path / "parts.json").read_text())[0]["settings"]["task"] == "parts"


def test_a_command_that_fails_or_exceeds_its_limit_loses_only_itself(tmp_path, monkeypatch, record_of, capsys):
    def commands_of(stage, flags, seconds):
        writes = f"open({str(tmp_path / stage)!r}, 'w').write('kept'); "
        ends = {"a": "import time; time.sleep(60)", "b": "raise MemoryError('too large')", "c": "print('done')"}
        return [gpu.Command(f"command {stage}", ["-c", writes + ends[stage]])]

    monkeypatch.setattr(gpu, "commands_of", commands_of)
    flags = ["--device", "cpu", "--stages", "a", "b", "c", "--minutes", "0.1", "--output_dir", str(tmp_path)]
    assert gpu.main(flags) == 1
    results = {entry["stage"]: entry for entry in record_of(tmp_path)["commands"]}
    assert results["a"]["result"] == "time limit exceeded" and results["a"]["seconds"] < 10
    assert results["b"]["result"] == "failed with status 1"
    assert "too large" in results["b"]["end_of_log"][-1]
    assert results["c"]["result"] == "passed"
    assert all((tmp_path / stage).read_text() == "kept" for stage in "abc")
    assert "not passed: command a, command b" in capsys.readouterr().out


def test_without_a_gpu_or_data_the_program_says_what_to_do(tmp_path, capsys):
    if not torch.cuda.is_available():
        assert gpu.main(["--output_dir", str(tmp_path)]) == 2
        assert "--device cpu --quick" in capsys.readouterr().out
    assert gpu.main(["--device", "cpu", "--stages", "d", "--output_dir", str(tmp_path)]) == 0
    assert "give --train_file and --validation_file" in capsys.readouterr().out


def test_the_commands_of_the_study_are_those_that_its_program_takes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "study"))
    import run as study_program
    from study_data import read_study_data

    flags = gpu.parse_gpu_flags(["--train_file", "train.parquet", "--validation_file", "validation.parquet"])
    [command] = gpu.study_commands(flags, seconds=1800)
    parsed = study_program.parse_study_flags(command.arguments[1:])
    assert (parsed.arms, parsed.seeds, parsed.device) == (["CLIP", "MLIP", "FLIP"], [0, 1, 2], "cuda")
    assert parsed.seconds_per_run == 180
    data = read_study_data(parsed.data, parsed.train_file, parsed.validation_file)
    tokenizer = study_program.train_tokenizer(["a red circle"], max_seq_length=32)
    vision = study_program.build_arm_model("MLIP", tokenizer, data).config.vision_config
    assert (vision.hidden_size, vision.image_size, vision.patch_size, vision.merge_ratio) == (384, 96, 16, 0.5)


def test_a_study_by_seconds_trains_for_as_many_steps_as_fit(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS / "study"))
    from run import steps_of

    record = {"seconds_per_run": 30, "step_seconds": {"CLIP": 0.1, "MLIP": 0.05}, "data": {"steps": 7}}
    assert (steps_of(record, "CLIP", "compute"), steps_of(record, "MLIP", "compute")) == (300, 600)


def test_results_of_tests_are_read_from_an_output_that_was_cut_short():
    lines = [
        "tests/model/test_gpu.py::test_x[a-bf16] PASSED [ 5%]",
        "tests/model/test_gpu.py::test_y FAILED [ 9%]",
        "tests/model/test_gpu.py::test_z[bf16]",  # what several processes print when a test begins
        "[gw3] [ 12%] PASSED tests/model/test_gpu.py::test_z[bf16] ",
        "t",
    ]
    assert gpu.read_test_results(lines) == {
        "counts": {"failed": 1, "passed": 2},
        "tests": {"test_x[a-bf16]": "passed", "test_y": "failed", "test_z[bf16]": "passed"},
    }


def test_a_command_that_cannot_end_in_its_time_is_not_started(tmp_path, monkeypatch, record_of, capsys):
    command = gpu.Command("compiled", ["-c", "raise SystemExit(1)"], least_seconds=1e6)
    monkeypatch.setattr(gpu, "commands_of", lambda *_: [command])
    assert gpu.main(["--device", "cpu", "--stages", "b", "--output_dir", str(tmp_path)]) == 0
    assert record_of(tmp_path)["commands"] == []
    assert "compiled: skipped, it needs 1000000 s; raise --minutes" in capsys.readouterr().out


def test_stages_that_run_later_complete_the_record_of_one_machine(tmp_path):
    machine = {"device": "cuda", "gpu": "a GPU", "packages": {"torch": "2.11.0"}, "date": "today"}
    entries = [{"stage": "a", "name": "tests"}, {"stage": "b", "name": "speed"}]
    path = tmp_path / "run.json"
    assert gpu.kept_commands(path, machine, ["a"]) == []
    path.write_text(json.dumps({"machine": {**machine, "date": "yesterday"}, "commands": entries}))
    assert gpu.kept_commands(path, machine, ["b", "c"]) == entries[:1]
    assert gpu.kept_commands(path, {**machine, "gpu": "another"}, ["b"]) == []


def test_a_failure_of_an_earlier_run_is_not_one_of_this_run(tmp_path, monkeypatch, capsys):
    kept = {"stage": "a", "name": "tests", "result": "failed with status 1"}
    passed = {"stage": "b", "name": "speed", "result": "passed"}
    monkeypatch.setattr(gpu, "run_stages", lambda flags: {"commands": [kept, passed]})
    flags = ["--device", "cpu", "--output_dir", str(tmp_path), "--stages"]
    assert gpu.main([*flags, "b"]) == 0 and gpu.main([*flags, "a", "b"]) == 1
    assert "not passed: tests" in capsys.readouterr().out


@pytest.mark.parametrize("limit", [0, 1, 2, 37, 100, 1000])
def test_the_largest_batch_is_found_within_an_eighth(limit):
    largest, seconds = search_largest(lambda size: 0.5 if size <= limit else None, 2, 512)
    assert largest <= min(limit, 512)
    assert largest >= min(limit, 512) * 8 / 9 - 1 or limit < 2
    assert seconds == (0.5 if largest else None)


def test_synchronisations_are_found_with_their_place():
    values = torch.arange(3)
    assert find_synchronisations(lambda: values + 1, "cpu") == []
    [place] = find_synchronisations(lambda: values.sum().item(), "cpu")
    assert place.startswith("test_gpu_stages.py:")
