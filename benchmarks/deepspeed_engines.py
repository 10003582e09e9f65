# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Trains with DeepSpeed ZeRO-2 in two processes on CPUs, and compares each run with the same run with DDP.

    pip install deepspeed
    python benchmarks/deepspeed_engines.py

Every run is `mlip train` in float32, by `recipes/zero2.json` or DDP: four steps, each of two accumulated batches of
three pairs per process, with the token loss over all pairs, an evaluation and a checkpoint every two steps, and a
temperature that starts above its limit. With SGD the differences of the weights are those of the
gradients times the learning rate. The exit status is 1 if a run differs by more than float32's error.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported

import deepspeed.ops
import torch
from kill_and_resume import in_child, write_data
from safetensors.torch import load_file
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from transformers import AutoModel

from modeling_mlip.conversion.parity import largest
from modeling_mlip.hub.cli import main as mlip

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "deepspeed.json"
OPTIMIZERS = {"SGD": "--optim sgd --learning_rate 0.01", "AdamW": "--learning_rate 0.001"}
MINI_BATCHES = "--mini_batch_size 2"  # cuts three pairs into two and one
SCALE = "logit_scale"
# Of a weight after four steps. AdamW divides by the size of a gradient, so it enlarges errors of small gradients.
TOLERANCE = {"SGD": 1e-5, "AdamW": 1e-4}
METRIC_TOLERANCE = 1e-5  # of losses and recall, relative


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if a run differs from its reference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="AdamW with mini-batches, and resume, only.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads do not survive a fork
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled by each machine; for inference only
    packages = ("deepspeed", "torch", "transformers", "accelerate")
    record: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}, two processes, gloo",
        "versions": {name: version(name) for name in packages},
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        in_child(lambda: write_start(root), root / "log.txt")
        for comparison in compare_engines(root, flags.quick):
            record["runs"].append(comparison)
            print(json.dumps(comparison), flush=True)
            flags.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(not all(run["equal"] for run in record["runs"]))


def write_start(root: Path) -> None:
    """Shards of drawn pairs, and a model whose temperature is above its limit."""
    write_data(root)
    model = "--config_name tiny --hidden_size 16 --num_attention_heads 2 --num_hidden_layers 2 --patch_size 32"
    losses = f"--token_loss_weight 0.1 --token_loss_group_size null --{SCALE}_init_value 5 --merge_ratio 0.5"
    data = f"--train_file {root}/*.parquet --tokenizer_name {root}/tokenizer --skip_budget 0.5"
    run = f"--max_steps 1 --learning_rate 1e-9 --use_cpu --report_to none --output_dir {root}/start"
    mlip(["train", *f"{model} {losses} {data} {run} --per_device_train_batch_size 4".split()])
    model = AutoModel.from_pretrained(root / "start")
    with torch.no_grad():
        getattr(model, SCALE).fill_(5.0)
    model.save_pretrained(root / "start")


def train_in_two_processes(root: Path, name: str, more: str, uses_deepspeed: bool = True) -> float:
    """Runs `mlip train` into the folder `name`; returns the seconds. Raises RuntimeError if it fails."""
    data = f"--train_file {root}/*.parquet --validation_file {root}/0.parquet --skip_budget 0.5"
    steps = "--max_steps 4 --per_device_train_batch_size 3 --gradient_accumulation_steps 2 --warmup_steps 0"
    saving = "--save_steps 2 --eval_strategy steps --eval_steps 2 --logging_steps 1 --resume_from_checkpoint true"
    rest = f"--use_cpu --report_to none --disable_tqdm true --no_augment --output_dir {root}/{name}"
    flags = f"--model_name_or_path {root}/start {data} {steps} {saving} {rest} {more}".split()
    if uses_deepspeed:
        flags += ["--deepspeed", str(ROOT / "recipes" / "zero2.json")]

    def launch() -> None:
        settings = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
        config = LaunchConfig(1, 1, nproc_per_node=2, run_id=name, start_method="fork", **settings)
        status = max(elastic_launch(config, mlip)(["train", *flags]).values())
        if status:
            raise RuntimeError(f"mlip train ended with {status}.")

    log = root / f"{name}.txt"
    start = time.perf_counter()
    if in_child(launch, log) != 0:
        raise RuntimeError(f"{name}:\n{log.read_text()[-6000:]}")
    return time.perf_counter() - start


def compare_engines(root: Path, quick: bool) -> Iterator[dict[str, Any]]:
    """Yields the comparison of each run with that of DDP, or of a resumed run with the uninterrupted one."""
    forms = {"mini-batches": MINI_BATCHES} if quick else {"plain": "", "mini-batches": MINI_BATCHES}
    for optimizer in ["AdamW"] if quick else OPTIMIZERS:
        for form, more in forms.items():
            flags = f"{OPTIMIZERS[optimizer]} {more}"
            name, reference = f"ZeRO-2-{optimizer}-{form}", f"DDP-{optimizer}-{form}"
            train_in_two_processes(root, reference, flags, uses_deepspeed=False)
            seconds = train_in_two_processes(root, name, flags)
            comparison = {"optimizer": optimizer, "form": form, "against": "DDP"}
            comparison |= compare_runs(root, name, reference, TOLERANCE[optimizer])
            yield comparison | {"seconds": round(seconds, 1)}
    original = root / "ZeRO-2-AdamW-mini-batches"
    shutil.copytree(original / "checkpoint-2", root / "resumed" / "checkpoint-2")
    seconds = train_in_two_processes(root, "resumed", f"{OPTIMIZERS['AdamW']} {MINI_BATCHES}")
    comparison = {"optimizer": "AdamW", "form": "resumed at step 2", "against": "uninterrupted"}
    comparison |= compare_runs(root, "resumed", original.name, 0.0)
    yield comparison | {"seconds": round(seconds, 1)}


def compare_runs(root: Path, name: str, reference: str, tolerance: float) -> dict[str, Any]:
    """Differences of weights, logged losses and evaluation of two runs, and whether they are within the tolerance."""
    weights, expected = (load_file(root / run / "model.safetensors") for run in (name, reference))
    start = load_file(root / "start" / "model.safetensors")
    if weights.keys() != expected.keys():
        raise RuntimeError(f"{name}: other weights than {reference}: {weights.keys() ^ expected.keys()}.")
    difference = largest((weights[key] - expected[key]).abs().max().item() for key in weights)
    change = largest((expected[key] - start[key]).abs().max().item() for key in weights)
    logs, expected_logs = (read_log(root / run) for run in (name, reference))
    if logs.keys() != expected_logs.keys():
        raise RuntimeError(f"{name} logged other values than {reference}: {logs.keys() ^ expected_logs.keys()}.")
    metric_difference = largest(
        abs(value - expected_logs[key]) / max(1.0, abs(expected_logs[key])) for key, value in logs.items()
    )
    is_whole = is_whole_model(root / name) and is_whole_model(root / name / "checkpoint-4")
    return {
        "largest difference of a weight": difference,
        "largest change of a weight": change,
        "largest relative difference of a logged value": metric_difference,
        SCALE: weights[SCALE].item(),
        "saved model and checkpoint whole": is_whole,
        "equal": difference <= tolerance and metric_difference <= METRIC_TOLERANCE and is_whole,
    }


def read_log(folder: Path) -> dict[tuple[int, str], float]:
    """The losses, gradient norms, temperatures and metrics that a run logged after step 2, by step and name."""
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    words = ("loss", "grad_norm", SCALE, "recall")
    return {
        (entry["step"], key): value
        for entry in history
        for key, value in entry.items()
        if entry["step"] > 2 and key != "train_loss" and any(word in key for word in words)
    }


def is_whole_model(folder: Path) -> bool:
    """Whether a folder loads with `AutoModel`, every weight from its file, all of them those of the run."""
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    saved = load_file(folder / "model.safetensors")
    loaded = model.state_dict()
    return not any(report.values()) and all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())


if __name__ == "__main__":
    sys.exit(main())
