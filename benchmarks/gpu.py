# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""All measurements and tests that need a GPU, in stages, in about 8 minutes.

    make gpu
    python benchmarks/gpu.py --stages a b                            # without `make`, with the packages of this Python
    python benchmarks/gpu.py --stages d --minutes 30 --train_file train.parquet --validation_file validation.parquet
    python benchmarks/gpu.py --device cpu --quick                    # a dry run on tiny models

Stages: a, the tests marked `gpu`; b, speed of the towers and of the training step (`speed.py`) and the largest batch
(`largest_batch.py`); c, parts of the step and host synchronisations (`speed.py --parts`, `step_profile.py`); d, the
study on the data of `--train_file` and `--validation_file` (`study/run.py`).

Each stage has a share of the time that is left; each command of a stage is a process with a time limit. A command that
fails or exceeds its limit ends alone: it keeps what it has written, and the next one starts. `run.json` holds the
machine, the commands and how each of them ended. The exit status is 1 if a command did not end well.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent
RESULTS, DRY_RUN = FOLDER / "results" / "gpu", ROOT / "runs" / "gpu-dry-run"
# Share of each stage in the whole time, relative to the other stages.
STAGE_SHARES = {"a": 1.5, "b": 4.5, "c": 0.7, "d": 2.0}  # on an H200: 106 s for a, 45 s for c
TEST_FILE = "tests/model/test_gpu.py"
ROOMS = ("hub", "data", "evaluation", "training", "conversion", "search")  # folders that are sub-packages
PACKAGES = ("torch", "transformers", "accelerate", "open_clip_torch", "timm", "triton", "flash_attn")
SECONDS_TO_START = 20  # of a run of the study: imports and reading the images
LARGEST_SECONDS_PER_RUN = 180
TEST_PROCESSES = 8
LEAST_SECONDS_TO_COMPILE = {"inference": 60, "training": 180}
LOG_LINES = 30  # lines of the output that `run.json` holds of a command that failed


@dataclass(frozen=True)
class Command:
    """One process of a stage.

    Args:
        name: unique; the name of the log file.
        arguments: what follows the Python interpreter.
        share: share in the time of the stage, relative to the commands that follow.
        least_seconds: the command is skipped if it would have a smaller limit.
    """

    name: str
    arguments: list[str]
    share: float = 1.0
    least_seconds: float = 0.0


# The machine and the package


def describe_gpu_machine(device: str) -> dict[str, Any]:
    """GPU, driver, versions of packages, processor and commit; `None` for what is not there."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    name, driver, memory = (*(first_line(query) or "").split(", "), None, None, None)[:3]
    return {
        "device": device,
        "gpu": name or None,
        "driver": driver,
        "memory": memory,
        "python": platform.python_version(),
        "packages": versions,
        "cores": os.cpu_count(),
        "commit": first_line(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "date": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def first_line(command: list[str]) -> str | None:
    """The first line that a command prints; `None` if it fails or is not installed."""
    if shutil.which(command[0]) is None:
        return None
    finished = subprocess.run(command, capture_output=True, text=True)
    return next(iter(finished.stdout.splitlines()), None) if finished.returncode == 0 else None


def package_environment(folder: Path) -> dict[str, str]:
    """The environment of the commands. If the package is not installed, links in `folder` form it."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if importlib.util.find_spec("modeling_mlip") and importlib.util.find_spec("modeling_mlip.hub"):
        return environment
    package = folder / "modeling_mlip"
    package.mkdir(parents=True, exist_ok=True)
    links = {package / source.name: source for source in (ROOT / "modeling_mlip").glob("*.py")}
    links |= {package / room: ROOT / room for room in ROOMS}
    links[folder / "mlip_command.py"] = ROOT / "mlip_command.py"
    for link, source in links.items():
        link.unlink(missing_ok=True)
        link.symlink_to(source)
    paths = (str(folder), os.environ.get("PYTHONPATH"))
    return {**environment, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


# The stages


def precision_flags(device: str) -> list[str]:
    """bfloat16 on a GPU only: many CPUs emulate it."""
    return ["--bf16"] if device == "cuda" else []


def gpu_test_commands(flags: argparse.Namespace) -> list[Command]:
    """Stage a, by several processes if pytest-xdist is installed.

    A dry run takes one test of each kind that a CPU does in seconds.
    """
    chosen = []
    if flags.quick:
        chosen = ["-k", "bf16 and (loads and MLIPModel or flash)"]
    elif importlib.util.find_spec("xdist"):
        chosen = ["-n", str(TEST_PROCESSES)]
    arguments = ["-P", "-m", "pytest", "-m", "gpu", "-vv", "--tb=short", "-p", "no:cacheprovider", *chosen, TEST_FILE]
    return [Command("tests", arguments)]


def speed_commands(flags: argparse.Namespace) -> list[Command]:
    """Stage b, the most important measurements first."""
    speed, output = str(FOLDER / "speed.py"), ["--output", str(flags.output_dir / "speed.json")]
    output += ["--device", flags.device, *precision_flags(flags.device)]
    methods = ["CLIP (open_clip)", "MLIP, no frequency stage", "MLIP", "MLIP, default weights", "ToMe (timm)"]
    rounds = ["--rounds", "5", "--turn_seconds", "0.05"]
    base, large, batches, ratios = "vit-b-16", "vit-l-14", ["64", "256"], ["0.3", "0.5", "0.7"]
    if flags.quick:
        base, large, batches, ratios, rounds = "tiny", "tiny", ["2"], ["0.5"], ["--rounds", "1", "--turn_seconds", "0"]
        methods = ["MLIP"]
    shared = [*output, *rounds]
    placements = ["early"] if flags.quick else ["three", "early"]
    half = ["--merge_ratios", "0.5", "--placements"]
    towers = [speed, "--config_name", base, "--batch_size", *batches, "--merge_ratios", *ratios, "--methods", *methods]
    towers += ["--placements", *placements]
    training = [speed, "--training", "--config_name", base, "--batch_size", *batches, *half, *placements]
    large_towers = [speed, "--config_name", large, "--batch_size", *batches, *half, *placements]
    compiled = [
        speed,
        "--compile",
        "--compile_mode",
        "reduce-overhead",
        "--config_name",
        base,
        "--batch_size",
        batches[0],
        *half,
        "early",
    ]
    batch_flags = ["--device", flags.device, "--output", str(flags.output_dir / "largest_batch.json")]
    batch_flags += ["--config_name", "tiny", "--most_pairs", "2"] if flags.quick else []
    commands = [
        Command("speed of B/16", [*towers, *shared], 3),
        Command("training step of B/16", [*training, *shared, "--methods", *methods], 3),
        Command("largest batch", [str(FOLDER / "largest_batch.py"), *batch_flags], 2.5),
    ]
    if flags.quick:  # the commands below differ from the first one in these flags only
        return commands
    return [
        *commands,
        Command("speed of L/14", [*large_towers, *shared, "--methods", *methods], 2),
        Command(
            "speed of compiled B/16",
            [*compiled, *shared, "--methods", "MLIP", "MLIP, default weights"],
            2.5,
            LEAST_SECONDS_TO_COMPILE["inference"],
        ),
        Command(
            "compiled training step of B/16",
            [*training[:5], batches[0], *half, "early", "--compile", *shared, "--methods", "MLIP"],
            2,
            LEAST_SECONDS_TO_COMPILE["training"],
        ),
    ]


def part_commands(flags: argparse.Namespace) -> list[Command]:
    """Stage c."""
    size = ["--config_name", "tiny", "--batch_size", "2"] if flags.quick else []
    profile = [str(FOLDER / "step_profile.py"), "--device", flags.device, *size]
    parts = [
        str(FOLDER / "speed.py"),
        "--parts",
        "--device",
        flags.device,
        *precision_flags(flags.device),
        "--merge_ratios",
        "0.5",
    ]
    parts += ["--placements", "three", "--turn_seconds", "0", *(size or ["--batch_size", "64"])]
    return [
        Command("profile", [*profile, "--output", str(flags.output_dir / "profile.json")], 1.5),
        Command(
            "parts",
            [*parts, "--rounds", "1" if flags.quick else "5", "--output", str(flags.output_dir / "parts.json")],
        ),
    ]


def has_study_data(flags: argparse.Namespace) -> bool:
    """Whether stage d can run; says so if not."""
    if flags.train_file and flags.validation_file:
        return True
    print("Stage d is skipped: give --train_file and --validation_file, pairs to train on and to evaluate on.")
    return False


def study_commands(flags: argparse.Namespace, seconds: float) -> list[Command]:
    """Stage d: three arms, three seeds at a time.

    Args:
        seconds: time limit of the stage. The runs train for what is left after imports, reading and calibration.
    """
    arms, seeds = ["CLIP", "MLIP", "FLIP"], ["0"] if flags.quick else ["0", "1", "2"]
    per_run = min((seconds - 2 * SECONDS_TO_START) / len(arms) - SECONDS_TO_START, LARGEST_SECONDS_PER_RUN)
    per_run = 0.1 if flags.quick else max(per_run, 5)
    data = str(flags.study_data or "flickr8k-96px")
    arguments = [str(FOLDER / "study" / "run.py"), "--data", data, "--device", flags.device]
    arguments += ["--train_file", flags.train_file, "--validation_file", flags.validation_file]
    arguments += ["--arms", *(arms[:1] if flags.quick else arms), "--seeds", *seeds, "--equal", "compute"]
    arguments += ["--seconds_per_run", f"{per_run:.1f}", "--parallel", str(len(seeds))]
    arguments += ["--calibration_rounds", "1" if flags.quick else "5", "--output_dir", str(flags.output_dir / "study")]
    return [Command("study", arguments)]


def commands_of(stage: str, flags: argparse.Namespace, seconds: float) -> list[Command]:
    if stage == "d":
        return study_commands(flags, seconds)
    return {"a": gpu_test_commands, "b": speed_commands, "c": part_commands}[stage](flags)


# Running them


def run_with_limit(command: Command, seconds: float, environment: dict[str, str], log: Path) -> int | None:
    """Run a command; after `seconds`, kill it and all processes that it started.

    Returns:
        The exit status, or `None` if the time limit was exceeded.
    """
    with open(log, "w") as file:
        process = subprocess.Popen([sys.executable, *command.arguments], cwd=ROOT, env=environment, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
        try:
            return process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()


def run_stages(flags: argparse.Namespace) -> dict[str, Any]:
    """Run the stages of `flags` in order and write `run.json` after each command; returns its content.

    Commands of other stages that `run.json` holds from the same machine are kept.
    """
    flags.output_dir.mkdir(parents=True, exist_ok=True)
    (flags.output_dir / "logs").mkdir(exist_ok=True)
    environment = package_environment(ROOT / "build" / "gpu" / "package")
    environment["MLIP_GPU_TESTS_DEVICE"] = flags.device
    record: dict[str, Any] = {"machine": describe_gpu_machine(flags.device), "minutes": flags.minutes}
    record["commands"] = kept_commands(flags.output_dir / "run.json", record["machine"], flags.stages)
    write_json(flags.output_dir / "run.json", record)
    end = time.monotonic() + 60 * flags.minutes
    stages = [stage for stage in flags.stages if stage != "d" or has_study_data(flags)]
    for number, stage in enumerate(stages):
        left = [STAGE_SHARES[each] for each in stages[number:]]
        stage_end = time.monotonic() + (end - time.monotonic()) * left[0] / sum(left)
        commands = commands_of(stage, flags, stage_end - time.monotonic())
        for place, command in enumerate(commands):
            shares = [each.share for each in commands[place:]]
            seconds = max((stage_end - time.monotonic()) * shares[0] / sum(shares), 0)
            if seconds < command.least_seconds:
                print(f"{stage}  {command.name}: skipped, it needs {command.least_seconds:.0f} s; raise --minutes")
                continue
            record["commands"].append(run_one(stage, command, seconds, environment, flags.output_dir))
            write_json(flags.output_dir / "run.json", record)
    return record


def kept_commands(path: Path, machine: dict[str, Any], stages: list[str]) -> list[dict[str, Any]]:
    """The entries of a `run.json` of the same machine, without those of `stages`."""
    earlier = json.loads(path.read_text()) if path.exists() else {"machine": {}, "commands": []}
    is_same = all(earlier["machine"].get(name) == machine[name] for name in ("device", "gpu", "packages"))
    return [entry for entry in earlier["commands"] if is_same and entry["stage"] not in stages]


def run_one(
    stage: str, command: Command, seconds: float, environment: dict[str, str], output_dir: Path
) -> dict[str, Any]:
    """Run one command; returns its entry of `run.json`."""
    log, start = output_dir / "logs" / f"{command.name.replace(' ', '-').replace('/', '')}.log", time.monotonic()
    status = run_with_limit(command, seconds, environment, log)
    result = "time limit exceeded" if status is None else "passed" if status == 0 else f"failed with status {status}"
    shown = [argument.replace(f"{ROOT}/", "") for argument in command.arguments]
    entry = {"stage": stage, "name": command.name, "result": result, "limit": round(seconds, 1)}
    entry |= {"seconds": round(time.monotonic() - start, 1), "command": ["python", *shown]}
    print(f"{stage}  {command.name}: {result} ({entry['seconds']} s of {entry['limit']} s)", flush=True)
    lines = log.read_text(errors="replace").splitlines()
    if status != 0:
        entry["end_of_log"] = lines[-LOG_LINES:]
    if command.name == "tests":
        write_json(output_dir / "tests.json", read_test_results(lines))
    return entry


def read_test_results(lines: list[str]) -> dict[str, Any]:
    """The result of each test in the output of `pytest -vv`, by one process or several, and their counts."""
    one = re.compile(r"^\S+?::(?P<test>.+?) (?P<result>PASSED|FAILED|SKIPPED|ERROR)\b")
    several = re.compile(r"^\[gw\d+\] \[ *\d+%\] (?P<result>PASSED|FAILED|SKIPPED|ERROR) \S+?::(?P<test>.+?) *$")
    matches = [one.match(line) or several.match(line) for line in lines]
    results = {match["test"]: match["result"].lower() for match in matches if match}
    counts = {result: list(results.values()).count(result) for result in sorted(set(results.values()))}
    return {"counts": counts, "tests": results}


def write_json(path: Path, content: dict[str, Any]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def parse_gpu_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGE_SHARES, default=list(STAGE_SHARES))
    parser.add_argument("--minutes", type=float, default=8.0, help="Time limit of all stages together.")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="Tiny models, few repetitions: a test of this program.")
    parser.add_argument("--train_file", help="Pairs of stage d to train on.")
    parser.add_argument("--validation_file", help="Pairs of stage d to evaluate on.")
    parser.add_argument("--study_data", help="Description of the data of stage d, see study/run.py --data.")
    parser.add_argument(
        "--output_dir", type=Path, help="Default: benchmarks/results/gpu, or runs/gpu-dry-run on a CPU."
    )
    flags = parser.parse_args(arguments)
    flags.output_dir = (flags.output_dir or (RESULTS if flags.device == "cuda" else DRY_RUN)).resolve()
    return flags


def main(arguments: list[str] | None = None) -> int:
    flags = parse_gpu_flags(arguments)
    if flags.device == "cuda" and not has_cuda():
        print("error: torch finds no CUDA device; run this on a machine with one, or a dry run: --device cpu --quick")
        return 2
    record = run_stages(flags)
    of_this_run = [entry for entry in record["commands"] if entry["stage"] in flags.stages]
    failed = [entry["name"] for entry in of_this_run if entry["result"] != "passed"]
    print(f"written to {flags.output_dir}" + (f"; not passed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
