# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""MLIP beside CLIP: the same program, data, schedule and wall-clock time, several seeds each.

    python benchmarks/clip_vs_mlip.py --train_file train.parquet --validation_file test.parquet --minutes 12

CLIP is `mlip train` with the frequency stage, the token loss and merging off. A short run of both, side by side, tells
how many steps each does in the time given; then every seed trains both side by side, each on half of the cores. What is
done is not done again, so an interrupted run goes on. The table says the time that each run really took.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from modeling_mlip.training.report import format_table

SETUPS = {
    "CLIP": ["--frequency_layers", "0", "--frequency_loss_weight", "0", "--token_loss_weight", "0"],
    "MLIP": ["--merge_ratio", "0.5"],
}
METRICS = ("text_to_image_recall@1", "image_to_text_recall@1", "mean_recall")
CALIBRATION_STEPS = 30


def command(flags: argparse.Namespace, setup: str, seed: int, steps: int, folder: Path, *more: str) -> list[str]:
    precision = ["--bf16"] if flags.bf16 else []
    return [
        *(sys.executable, "-m", "modeling_mlip.training.command", "train"),
        *("--config_name", flags.config_name, "--attn_implementation", "eager", "--use_cpu", *precision),
        *("--train_file", flags.train_file, "--validation_file", flags.validation_file),
        *("--output_dir", str(folder), "--max_steps", str(steps), "--seed", str(seed)),
        *("--save_strategy", "no", "--report_to", "none", "--learning_rate", str(flags.learning_rate)),
        *(*SETUPS[setup], *(flags.mlip_flags if setup == "MLIP" else []), *more),
    ]


def side_by_side(flags: argparse.Namespace, seed: int, steps: dict[str, int], folder: Path) -> dict[str, Any]:
    """Runs both setups at once and returns what each left in all_results.json."""
    threads = str(max((os.cpu_count() or 2) // 2, 1))
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    running = {}
    for setup in SETUPS:
        log = open(folder / f"{setup}-{seed}.log", "w")
        running[setup] = subprocess.Popen(
            command(flags, setup, seed, steps[setup], folder / f"{setup}-{seed}"),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
        )
    for setup, process in running.items():
        if process.wait():
            raise RuntimeError(f"{setup} failed:\n{(folder / f'{setup}-{seed}.log').read_text()[-2000:]}")
    return {setup: json.loads((folder / f"{setup}-{seed}" / "all_results.json").read_text()) for setup in SETUPS}


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = []
    for setup in SETUPS:
        mine = [run for run in runs if run["setup"] == setup]
        row: dict[str, Any] = {"": setup, "seeds": len(mine), "steps": mine[0]["steps"]}
        row["minutes"] = f"{statistics.mean(run['seconds'] for run in mine) / 60:.1f}"
        for name in METRICS:
            values = [run[name] for run in mine]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row[name.replace("_", " ")] = f"{statistics.mean(values):.1f}{spread}"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train_file", required=True, help="Pairs to train on.")
    parser.add_argument("--validation_file", required=True, help="Pairs to evaluate on.")
    parser.add_argument("--minutes", type=float, default=12, help="Wall-clock time of each run.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--config_name", default="tiny")
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--bf16", action="store_true", help="Train in bfloat16 autocast, which some CPUs do faster.")
    parser.add_argument("--mlip_flags", nargs=argparse.REMAINDER, default=[], help="More flags for MLIP; must be last.")
    parser.add_argument("--results", default=str(Path(__file__).parent / "results" / "clip_vs_mlip.json"))
    flags = parser.parse_args()

    results = Path(flags.results)
    settings = {
        name: getattr(flags, name)
        for name in ("minutes", "config_name", "learning_rate", "bf16", "mlip_flags", "train_file", "validation_file")
    }
    machine = f"{platform.machine()}, {os.cpu_count()} cores, half for each of two runs; torch {torch.__version__}"
    record = {"settings": settings, "machine": machine, "steps_per_second": None, "runs": []}
    if results.exists():
        found = json.loads(results.read_text())
        if found["settings"] != settings:
            raise SystemExit(f"{results} holds other settings: {found['settings']}. Name another file with --results.")
        record = found
    folder = Path(tempfile.mkdtemp(prefix="clip_vs_mlip-"))
    if record["steps_per_second"] is None:
        short = side_by_side(flags, 999, dict.fromkeys(SETUPS, CALIBRATION_STEPS), folder)
        record["steps_per_second"] = {setup: CALIBRATION_STEPS / run["train_runtime"] for setup, run in short.items()}
    steps = {name: round(flags.minutes * 60 * rate) for name, rate in record["steps_per_second"].items()}
    for seed in tqdm(flags.seeds, desc="seeds"):
        if any(run["seed"] == seed for run in record["runs"]):
            continue
        for setup, found in side_by_side(flags, seed, steps, folder).items():
            values = {name: found[f"eval_{name}"] for name in METRICS}
            run = {"setup": setup, "seed": seed, "steps": steps[setup], "seconds": found["train_runtime"], **values}
            record["runs"].append(run)
        results.parent.mkdir(exist_ok=True)
        results.write_text(json.dumps(record, indent=2) + "\n")
    shutil.rmtree(folder)
    print(format_table(summarise(record["runs"])))


if __name__ == "__main__":
    main()
