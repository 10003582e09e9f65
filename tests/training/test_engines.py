# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Several processes from the command line leave one whole model; every recipe and DeepSpeed file is what it is for."""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed.run as torchrun
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from conftest import small_model
from fsdp_on_cpu import run_on_cpu
from processes import run_in_fork
from test_interruption import ROOT, command, root  # noqa: F401
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModel
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.training.arguments import MLIPTrainingArguments
from modeling_mlip.training.flags import parse_arguments
from modeling_mlip.training.starting_point import build_config
from modeling_mlip.training.trainer import MLIPTrainer

RECIPES = ROOT / "recipes"


def launch_ddp(arguments: list[str]) -> int:
    """`torchrun`, which starts a new Python for each process."""
    torchrun.main(["--standalone", "--nproc_per_node", "2", "-m", "modeling_mlip.hub.cli", *arguments])
    return 0


def launch_fsdp(arguments: list[str]) -> int:
    """`torchrun` for a function: the processes are forks, which import nothing anew."""
    settings = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
    config = LaunchConfig(1, 1, nproc_per_node=2, run_id="test", start_method="fork", **settings)
    return max(elastic_launch(config, run_on_cpu)(arguments).values())


ENGINES = {"DDP, streamed": launch_ddp, "FSDP2": launch_fsdp}


def check_code(folder: Path, plain: Path) -> None:
    """The folder has the code files of a model that no engine wraps, and names their classes."""
    small_model().save_pretrained(plain)
    expected, found = ({path.name: path.read_text() for path in saved.glob("*.py")} for saved in (plain, folder))
    assert "modeling_mlip.py" in found and found == expected
    expected, found = (json.loads((saved / "config.json").read_text()) for saved in (plain, folder))
    for key in ("auto_map", "architectures"):
        assert found[key] == expected[key]


def check_metrics(folder: Path, data: Path, evaluation: Path) -> None:
    """The metrics of two processes are those of one process with the saved weights."""
    flags = ["--model_name_or_path", str(folder), "--validation_file", str(data / "0.parquet"), "--do_eval"]
    flags += ["--use_cpu", "--report_to", "none", "--skip_budget", "0.5", "--output_dir", str(evaluation)]
    assert mlip(["train", *flags]) == 0
    files = (folder / "all_results.json", evaluation / "eval_results.json")
    found, expected = (json.loads(path.read_text()) for path in files)
    names = [name for name in expected if "recall" in name]
    assert names and {name: found[name] for name in names} == {name: expected[name] for name in names}


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_started_by_torchrun_leave_a_whole_model_and_checkpoint(
    engine,
    root,  # noqa: F811
    tmp_path,
    monkeypatch,
):
    folder = tmp_path / "run"
    flags = command(root, (engine == "DDP, streamed", 0), str(folder)) + ["--max_steps", "2", "--save_steps", "2"]
    if engine == "FSDP2":
        flags.remove("--use_cpu")
        flags += ["--ddp_backend", "gloo", "--fsdp", "--fsdp_config", str(RECIPES / "fsdp2.json")]
        flags += ["--eval_on_start", "--validation_file", str(root / "0.parquet")]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    status = run_in_fork(lambda: ENGINES[engine](["train", *flags]), tmp_path / "log.txt")
    printed = (tmp_path / "log.txt").read_text()
    assert status == 0, printed
    assert printed.count("Saved to") == 1
    checkpoint = folder / "checkpoint-2"
    for path in (folder, checkpoint):
        model, report = AutoModel.from_pretrained(path, output_loading_info=True)
        assert not any(report.values()), report
        assert all(weight.isfinite().all() for weight in model.parameters())
        check_code(path, tmp_path / "plain")
    if engine == "FSDP2":
        check_metrics(folder, root, tmp_path / "evaluation")
    # 2 steps of 2 accumulated batches of 3 pairs, in each of two processes
    counts = [json.loads((checkpoint / f"data_state_{rank}.json").read_text())["skip_budget"] for rank in (0, 1)]
    assert counts[0] == counts[1] and counts[0]["seen"] == 24
    assert sorted(path.name for path in checkpoint.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]


def test_fsdp_where_accelerate_would_leave_it_out_is_refused():
    starts = dict.fromkeys(("start_merge_ratio", "start_patch_dropout", "start_image_size"))
    args = SimpleNamespace(
        fsdp=True,
        device=torch.device("cpu"),
        mini_batch_size=None,
        steps_without_patch_dropout=0,
        ema_decay=None,
        **starts,
    )
    trainer = SimpleNamespace(model=small_model(), is_fsdp_enabled=False, is_deepspeed_enabled=False, args=args)
    trainer.prepare_fine_tuning = lambda: None
    with pytest.raises(ValueError, match="fsdp=True.*does not shard on cpu"):
        MLIPTrainer._prepare_model(trainer)


# Recipes

FAKE = """#!{python}
import json, os, sys
print(json.dumps(sys.argv), file=open(os.environ["CALLS"], "a"))
"""


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.sh")), ids=lambda path: path.name)
def test_every_flag_of_a_recipe_parses(recipe, tmp_path, monkeypatch):
    """The script runs with stand-ins of its programs, which note how they were called."""
    for name in ("mlip", "torchrun"):
        (tmp_path / name).write_text(FAKE.format(python=sys.executable))
        (tmp_path / name).chmod(stat.S_IRWXU)
    calls = tmp_path / "calls"
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls)}
    assert os.access(recipe, os.X_OK)
    subprocess.run([str(recipe)], check=True, env=environment, cwd=tmp_path)
    lines = [json.loads(line) for line in calls.read_text().splitlines()]
    assert lines
    monkeypatch.chdir(tmp_path)
    for call in lines:
        start = call.index("train") + 1
        if Path(call[0]).name == "torchrun":
            assert call[start - 3 : start] == ["-m", "modeling_mlip.hub.cli", "train"]
        # What only a GPU allows is checked as if it were a CPU's.
        model_args, data_args, training_args, overrides = parse_arguments([*call[start:], "--use_cpu"])
        config = build_config(
            model_name_or_path=model_args.model_name_or_path, config_name=model_args.config_name, overrides=overrides
        )
        assert config.merge_ratio == 0.5
        assert data_args.streaming and training_args.max_steps > 0 and training_args.bf16
        assert data_args.train_file.endswith("/*.tar")


def test_transformers_fills_every_blank_of_the_deepspeed_file():
    """DeepSpeed itself is not needed: this is what transformers does with the file before DeepSpeed sees it."""

    class Config(HfDeepSpeedConfig):
        fill_match = HfTrainerDeepSpeedConfig.fill_match
        fill_only = HfTrainerDeepSpeedConfig.fill_only
        is_auto = HfTrainerDeepSpeedConfig.is_auto
        trainer_config_process = HfTrainerDeepSpeedConfig.trainer_config_process
        trainer_config_finalize = HfTrainerDeepSpeedConfig.trainer_config_finalize

    args = MLIPTrainingArguments("unused", use_cpu=True, bf16=True, report_to="none")
    filled = Config(json.loads((RECIPES / "zero2.json").read_text()))
    filled.mismatches, filled._dtype = [], None
    filled.trainer_config_process(args)
    filled.trainer_config_finalize(args, SimpleNamespace(config=small_model().config), 100)
    assert "auto" not in json.dumps(filled.config)
    assert filled.config["zero_optimization"]["stage"] == 2
    assert filled.config["bf16"]["enabled"] and not filled.config["fp16"]["enabled"]
    assert filled.config["train_batch_size"] == args.per_device_train_batch_size
    assert filled._dtype == torch.bfloat16
