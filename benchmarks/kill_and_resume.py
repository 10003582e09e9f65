# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Kills training runs with SIGKILL, resumes them, and compares how they end with how they end undisturbed.

    python benchmarks/kill_and_resume.py --rounds 12

A round is one run of `mlip train` that is killed twice and then left to end, always by the same command with
`--resume_from_checkpoint true`. A kill strikes a random one of the moments that the undisturbed run went through:
before a batch, while a file of a checkpoint is being written (half of it is then on the disk), before or after a
rename, or while an old checkpoint is being deleted. Rounds take turns between data read and streamed, without and with
workers. The model has dropout, one image is broken, and steps accumulate two batches.

Equal endings: the bytes of the weights, every tensor of the optimizer, the schedule, the random states of all
generators, and the counts of skipped images and truncated captions.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers.trainer_utils import get_last_checkpoint

from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.data.shapes import shapes_dataset
from modeling_mlip.training import checkpoint, train
from modeling_mlip.training.trainer import MLIPTrainer

RESULTS = Path(__file__).parent / "results" / "kill_and_resume.json"
KINDS = [(False, 0), (True, 2), (True, 0), (False, 2)]  # streamed, workers
STEPS, SAVE_STEPS, KEPT = 10, 3, 2
NUM_PAIRS, NUM_SHARDS, BROKEN = 23, 3, 5


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if an ending differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="Runs, each killed twice.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)  # this process computes nothing: threads do not survive a fork
    record: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}; torch {torch.__version__}",
        "run": f"{STEPS} steps, a checkpoint every {SAVE_STEPS}, {KEPT} kept",
        "rounds": [],
    }
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        in_child(lambda: write_data(root))
        expected: dict[tuple[bool, int], tuple[dict[str, Any], list[str]]] = {}
        for number in range(flags.rounds):
            kind = KINDS[number % len(KINDS)]
            if kind not in expected:
                (root / "undisturbed.moments").unlink(missing_ok=True)
                run_command(root, kind, "undisturbed", list_moments=True)
                moments = (root / "undisturbed.moments").read_text().splitlines()
                expected[kind] = ending(root / "undisturbed"), moments
                shutil.rmtree(root / "undisturbed")
            start = time.perf_counter()
            found = round_of_kills(root, kind, expected[kind][1], random.Random(f"{flags.seed} {number}"))
            different = sorted(name for name in found["ending"] if found["ending"][name] != expected[kind][0][name])
            record["rounds"].append(
                {
                    "streamed": kind[0],
                    "workers": kind[1],
                    "killed": found["killed"],
                    "identical": not different,
                    "different": different,
                    "seconds": round(time.perf_counter() - start, 1),
                }
            )
            print(json.dumps(record["rounds"][-1]), flush=True)
            record["kills"] = sum(len(entry["killed"]) for entry in record["rounds"])
            record["identical endings"] = sum(entry["identical"] for entry in record["rounds"])
            flags.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"{record['kills']} kills, {record['identical endings']} of {len(record['rounds'])} endings identical")
    return int(record["identical endings"] < len(record["rounds"]))


def write_data(root: Path) -> None:
    """Shards of drawn pairs, one image broken, and a tokenizer: none can be trained on a stream."""
    rows = shapes_dataset(NUM_PAIRS, 0)["train"].select_columns(["image", "caption"])
    train_tokenizer(rows["caption"][:], max_seq_length=16).save_pretrained(root / "tokenizer")
    rows = rows.cast_column("image", datasets.Image(decode=False))
    rows = rows.map(
        lambda row, n: {"image": {"bytes": b"no", "path": None} if n == BROKEN else row["image"]}, with_indices=True
    )
    for index in range(NUM_SHARDS):
        rows.shard(NUM_SHARDS, index).to_parquet(root / f"{index}.parquet")


def command(root: Path, kind: tuple[bool, int], name: str) -> list[str]:
    """The flags of `mlip train`, the same for the start and for each restart."""
    streamed, workers = kind
    model = "--config_name tiny --hidden_size 16 --num_attention_heads 2 --num_hidden_layers 2 --patch_size 32"
    steps = (
        f"--max_steps {STEPS} --per_device_train_batch_size 3 --gradient_accumulation_steps 2 --attention_dropout 0.1"
    )
    saving = f"--save_steps {SAVE_STEPS} --save_total_limit {KEPT} --resume_from_checkpoint true --logging_steps 1"
    rest = f"--use_cpu --report_to none --disable_tqdm true --skip_budget 0.5 --dataloader_num_workers {workers}"
    files = ["--train_file", str(root / "*.parquet"), "--tokenizer_name", str(root / "tokenizer")]
    flags = f"{model} {steps} {saving} {rest}".split() + files + ["--output_dir", str(root / name)]
    return flags + (["--streaming"] if streamed else [])


def round_of_kills(root: Path, kind: tuple[bool, int], moments: list[str], rng: random.Random) -> dict[str, Any]:
    """One run that is killed twice; the second time after it was resumed, later than the first."""
    killed = []
    # Even a run that was killed at its very end goes through 25 moments when it is resumed.
    for index in (rng.randrange(1, len(moments)), rng.randrange(1, 25)):
        status = run_command(root, kind, "killed", kill_at=index)
        if status != -signal.SIGKILL:
            raise RuntimeError(f"A run ended before its moment {index}; killed before: {killed}.")
        killed.append((root / "killed.moment").read_text())
    if run_command(root, kind, "killed") != 0:
        raise RuntimeError(f"The run that was killed at {' and at '.join(killed)} does not resume.")
    left = sorted(path.name for path in (root / "killed").glob("*checkpoint*"))
    found = {"killed": killed, "ending": ending(root / "killed")}
    if len(left) != KEPT or (root / "killed" / checkpoint.UNFINISHED).exists():
        raise RuntimeError(f"Killed at {' and at '.join(killed)}, the run leaves {', '.join(left)}.")
    shutil.rmtree(root / "killed")
    return found


def ending(folder: Path) -> dict[str, Any]:
    """What two runs that end alike have in common."""
    last = Path(get_last_checkpoint(str(folder)))
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    counts = [entry for entry in history if "skipped_samples" in entry][-1]
    data = json.loads((last / checkpoint.DATA_STATE.format(0)).read_text())
    return {
        "steps": last.name,
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "optimizer": digest(torch.load(last / "optimizer.pt", weights_only=True)),
        "schedule": digest(torch.load(last / "scheduler.pt", weights_only=True)),
        "random states": digest(torch.load(last / "rng_state.pth", weights_only=False)),  # of our own run
        "counts": [counts["skipped_samples"], counts["truncated_captions"], data["skip_budget"]],
        "stream": data["stream"],
    }


def digest(value: Any) -> str:
    """Equal for equal contents: the files of torch.save hold names as well."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): plain(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        if not hasattr(value, "dtype"):
            return value
        tensor = torch.as_tensor(value)
        content = tensor.contiguous().flatten().view(torch.uint8).numpy()
        return [str(tensor.dtype), list(tensor.shape), hashlib.sha256(content).hexdigest()]

    return hashlib.sha256(json.dumps(plain(value), sort_keys=True, default=str).encode()).hexdigest()


# Processes


def in_child(work: Callable[[], None], log: Path | None = None) -> int:
    """Does the work in a fork of this process, which has imported all; returns its exit status or minus its signal."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.setsid()
            if log is not None:
                descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(descriptor, 1)
                os.dup2(descriptor, 2)
            work()
            status = 0
        except BaseException as error:
            import traceback

            traceback.print_exc()
            print(type(error).__name__, error, flush=True)
        finally:
            sys.stdout.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_command(
    root: Path, kind: tuple[bool, int], name: str, kill_at: int | None = None, list_moments: bool = False
) -> int:
    """Runs the command in a child, to its end or to the moment of that number."""

    def work() -> None:
        datasets.config.HF_DATASETS_CACHE = str(root / "cache")
        Moments(root / f"{name}.moments" if list_moments else None, root / f"{name}.moment", kill_at)
        train.main(command(root, kind, name))

    status = in_child(work, root / "log.txt")
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"A run ended with {status}:\n{(root / 'log.txt').read_text()[-3000:]}")
    return status


class Moments:
    """Names and counts the moments that this process goes through, and kills it at one of them."""

    def __init__(self, listing: Path | None, last_words: Path, kill_at: int | None):
        self.listing, self.last_words, self.kill_at = listing, last_words, kill_at
        self.count = 0
        self.step = 0
        steps, save, replace, rmtree, weights = (
            MLIPTrainer.training_step,
            torch.save,
            os.replace,
            shutil.rmtree,
            MLIPTrainer._save,
        )

        def training_step(trainer: Any, *args: Any, **kwargs: Any) -> Any:
            self.step = trainer.state.global_step
            self.pass_by("before the batch", lambda: None)
            return steps(trainer, *args, **kwargs)

        def torch_save(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            def write_half() -> None:
                buffer = io.BytesIO()
                save(value, buffer, *args, **kwargs)
                Path(path).write_bytes(buffer.getvalue()[: buffer.tell() // 2])

            if isinstance(path, (str, Path)):
                self.pass_by(f"half of {Path(path).name}", write_half)
            save(value, path, *args, **kwargs)

        def save_weights(trainer: Any, *args: Any, **kwargs: Any) -> None:
            weights(trainer, *args, **kwargs)
            folder = Path(args[0])

            def halve() -> None:
                path = next(folder.rglob("model.safetensors"))
                path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

            if folder.parent.name == checkpoint.UNFINISHED:
                self.pass_by("half of model.safetensors", halve)

        def os_replace(source: Any, target: Any, **kwargs: Any) -> None:
            self.pass_by(f"before renaming {Path(source).name}", lambda: None)
            replace(source, target, **kwargs)
            self.pass_by(f"after renaming {Path(source).name}", lambda: None)

        def delete(path: Any, *args: Any, **kwargs: Any) -> None:
            files = [file for file in Path(path).rglob("*") if file.is_file()]
            if files:
                self.pass_by(f"{Path(path).name} half deleted", lambda: files[0].unlink())
            rmtree(path, *args, **kwargs)

        MLIPTrainer.training_step, MLIPTrainer._save = training_step, save_weights
        torch.save = torch_save
        checkpoint.os = Patched(os, replace=os_replace)
        checkpoint.shutil = Patched(shutil, rmtree=delete)

    def pass_by(self, name: str, begin: Callable[[], None]) -> None:
        name = f"{name}, step {self.step}"
        if self.listing is not None:
            with open(self.listing, "a") as file:
                print(name, file=file)
        if self.count == self.kill_at:
            begin()
            self.last_words.write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1


class Patched:
    """A module of which one function is another, seen from one file alone."""

    def __init__(self, module: Any, **functions: Callable[..., Any]):
        self._module = module
        self.__dict__.update(functions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


if __name__ == "__main__":
    sys.exit(main())
