# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The largest batch of a training step that fits into a given GPU memory: without merging, with merging, and with
merging and mini-batches.

    python benchmarks/largest_batch.py --memory_gib 16

A step is `MLIPTrainer.training_step`, forward and backward pass with all losses under bfloat16 autocast, and the
optimizer's step. The batch is doubled until it does not fit, then the size between is halved down to an eighth of the
batch. The memory of the process is limited, so that the answer does not take minutes on a large GPU and machines are
comparable. On a CPU steps are in float32 and no limit applies, so that every batch up to `--most_pairs` fits: a test of
this program.
"""

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from mini_batch_memory import random_batch

from modeling_mlip import MLIPModel
from modeling_mlip.hub.configurations import named_config, override_config
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.training.arguments import MLIPTrainingArguments
from modeling_mlip.training.trainer import MLIPTrainer

RESULTS = Path(__file__).parent / "results" / "gpu" / "largest_batch.json"
ALL_LOSSES = {"token_loss_weight": 0.1, "merge_importance_weight": 0.1}
MERGING = {**ALL_LOSSES, "merge_ratio": 0.5, "merge_layers": [0, 1, 2]}
FIRST_PAIRS = 2


def make_step(config_name: str, overrides: dict[str, Any], device: str, mini_batch_size: int | None) -> Callable:
    """A function that takes a number of pairs, does one training step and returns its seconds."""
    with torch.device(device):  # a GPU draws the weights much faster than the CPU
        model = MLIPModel(override_config(named_config(config_name), overrides))
    folder = tempfile.mkdtemp()
    args = MLIPTrainingArguments(
        folder, use_cpu=device == "cpu", bf16=device == "cuda", report_to="none", mini_batch_size=mini_batch_size
    )
    trainer = MLIPTrainer(model, args, train_dataset=[None] * 8, processing_class=SimpleNamespace(tokenizer=None))
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    wrapped, optimizer = trainer.accelerator.prepare(model, trainer.optimizer)

    def step(num_pairs: int) -> float:
        batch = random_batch(model, num_pairs)
        start = time.perf_counter()
        try:
            trainer.training_step(wrapped, batch)
            optimizer.step()
        finally:
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return step


def fits(step: Callable[[int], float], num_pairs: int) -> float | None:
    """Seconds of a step, or `None` if it runs out of memory."""
    try:
        return step(num_pairs)
    except torch.OutOfMemoryError:
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def search_largest(attempt: Callable[[int], float | None], first: int, most: int) -> tuple[int, float | None]:
    """The largest number of pairs up to `most` for which `attempt` returns seconds, within an eighth, and the seconds.

    Returns:
        0 and `None` if `first` pairs do not fit.
    """
    largest, seconds, smallest_failure = 0, None, None
    size = min(first, most)
    while size is not None:
        taken = attempt(size)
        if taken is None:
            smallest_failure = size
        else:
            largest, seconds = size, taken
        size = next_size(largest, smallest_failure, most)
    return largest, seconds


def next_size(largest: int, smallest_failure: int | None, most: int) -> int | None:
    if smallest_failure is None:
        return min(2 * largest, most) if largest < most else None
    if largest == 0 or smallest_failure - largest <= max(largest // 8, 1):
        return None
    return (largest + smallest_failure) // 2


def limit_memory(memory_gib: float) -> float:
    """Limits the memory of this process on the GPU; returns the limit, at most what the GPU has."""
    whole = torch.cuda.get_device_properties(0).total_memory / 2**30
    torch.cuda.set_per_process_memory_fraction(min(memory_gib / whole, 1.0))
    return min(memory_gib, whole)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_name", default="vit-b-16")
    parser.add_argument("--memory_gib", type=float, default=16.0, help="Memory of the process on the GPU.")
    parser.add_argument("--mini_batch_size", type=int, default=64)
    parser.add_argument("--most_pairs", type=int, default=4096, help="Larger batches are not tried.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    memory_gib = limit_memory(flags.memory_gib) if flags.device == "cuda" else None
    rows: list[dict[str, Any]] = []
    for name, overrides, mini_batch_size in (
        ("no merging", ALL_LOSSES, None),
        ("merge ratio 0.5, layers 0 to 2", MERGING, None),
        ("merge ratio 0.5, layers 0 to 2, mini-batches", MERGING, min(flags.mini_batch_size, flags.most_pairs // 2)),
    ):
        torch.manual_seed(0)
        step = make_step(flags.config_name, overrides, flags.device, mini_batch_size)
        pairs, seconds = search_largest(lambda size, step=step: fits(step, size), FIRST_PAIRS, flags.most_pairs)
        row = {"setting": name, "mini_batch_size": mini_batch_size, "pairs": pairs, "seconds": seconds}
        rows.append({**row, "is_limit": pairs < flags.most_pairs})
        settings = {"config_name": flags.config_name, "memory_gib": memory_gib, "most_pairs": flags.most_pairs}
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        flags.output.write_text(json.dumps({**settings, "torch": torch.__version__, "rows": rows}, indent=1) + "\n")
        del step
    print(format_table(rows))


if __name__ == "__main__":
    main()
