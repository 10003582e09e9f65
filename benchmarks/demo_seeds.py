# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`make demo` with several seeds, alone and beside programs that keep other cores busy: minutes and accuracies.

    python benchmarks/demo_seeds.py
    python benchmarks/demo_seeds.py --busy_loops 1 --seeds 0

A run is one call of the demo's program, without the installation. Runs that are in the result file are not repeated.
"""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.formatting import format_table

sys.path.insert(0, str(Path(__file__).parent / "study"))
from figures import mean_and_spread  # noqa: E402

RESULT_FILE = Path(__file__).parent / "results" / "demo_seeds.json"
DEMO = "modeling_mlip.training.demo"


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """Keeps `count` cores busy with other programs."""
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def run_demo(seed: int, num_busy_loops: int) -> dict[str, Any]:
    """One run of the demo.

    Raises:
        RuntimeError: if it fails.
    """
    with tempfile.TemporaryDirectory() as folder, busy_loops(num_busy_loops):
        command = [sys.executable, "-m", DEMO, "--output_dir", folder, "--seed", str(seed)]
        start = time.perf_counter()
        finished = subprocess.run(command, capture_output=True, text=True)
        minutes = (time.perf_counter() - start) / 60
        if finished.returncode:
            raise RuntimeError(f"the demo with seed {seed} failed:\n{finished.stderr[-3000:]}")
        [path] = Path(folder).glob("*/results.json")
        rows = json.loads(path.read_text())["rows"]
    return {"seed": seed, "busy_loops": num_busy_loops, "minutes": round(minutes, 2), "rows": rows}


def summarise(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The minutes and, for each model and merge ratio, mean and standard deviation of each percentage over runs."""
    table = []
    for busy in sorted({run["busy_loops"] for run in runs}):
        chosen = [run for run in runs if run["busy_loops"] == busy]
        minutes = [run["minutes"] for run in chosen]
        for index, row in enumerate(chosen[0]["rows"]):
            names = [name for name in row if name not in ("model", "merge ratio")]
            table.append(
                {
                    "busy loops": busy,
                    "runs": len(chosen),
                    "minutes": f"{min(minutes):.1f} to {max(minutes):.1f}",
                    "model": row["model"],
                    "merge ratio": row["merge ratio"],
                    **{name: mean_and_spread([run["rows"][index][name] for run in chosen]) for name in names},
                }
            )
    return table


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--busy_loops", type=int, default=0, help="Programs beside the demo, each on one core.")
    parser.add_argument("--result_file", type=Path, default=RESULT_FILE)
    flags = parser.parse_args(arguments)
    if flags.busy_loops < 0:
        parser.error(f"--busy_loops {flags.busy_loops}: choose 0 or more.")
    machine = f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    record = {"machine": f"{machine}; torch {torch.__version__}", "runs": []}
    if flags.result_file.is_file():
        record = json.loads(flags.result_file.read_text())
    finished = {(run["seed"], run["busy_loops"]) for run in record["runs"]}
    for seed in flags.seeds:
        if (seed, flags.busy_loops) not in finished:
            record["runs"].append(run_demo(seed, flags.busy_loops))
            write_atomically(flags.result_file, json.dumps(record, indent=1) + "\n")
    print(format_table(summarise(record["runs"])))


if __name__ == "__main__":
    main()
