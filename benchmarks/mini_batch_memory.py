# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Memory and time of a training step on a large batch, in mini-batches and plain, and of the token loss's two scopes.

    python benchmarks/mini_batch_memory.py --pairs 4096 --mini_batch_size 128 --plain_pairs 512 1024
    python benchmarks/mini_batch_memory.py --processes 2 --pairs 256

A step is `MLIPTrainer.training_step`: forward and backward pass of `tiny` on random images and captions, half of the
patch tokens merged away, all three losses. Each measurement is a process of its own with a small step ahead. Memory is
the largest resident set of a process; beside it stands what was resident before the step: the program, the weights and
the batch. Two times are given, by the clock and of the processor, as the machine may do other things as well.
"""

import argparse
import json
import os
import platform
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from modeling_mlip import MLIPModel
from modeling_mlip.hub.configurations import named_config, override_config
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.training.arguments import MLIPTrainingArguments
from modeling_mlip.training.trainer import MLIPTrainer

RESULTS = Path(__file__).parent / "results" / "mini_batches.json"
MIB = 2**20
CAPTION_TOKENS = (6, 16)  # shortest and longest, BOS and EOS included


def random_batch(model: MLIPModel, num_pairs: int) -> dict[str, Any]:
    text, vision = model.config.text_config, model.config.vision_config
    lengths = torch.randint(CAPTION_TOKENS[0], CAPTION_TOKENS[1] + 1, (num_pairs,))
    attention_mask = (torch.arange(CAPTION_TOKENS[1])[None] < lengths[:, None]).long()
    words = torch.randint(0, min(text.bos_token_id, text.eos_token_id), attention_mask.shape)
    input_ids = words.masked_fill(attention_mask == 0, text.eos_token_id)
    input_ids[:, 0] = text.bos_token_id
    input_ids[torch.arange(num_pairs), lengths - 1] = text.eos_token_id
    return {
        "pixel_values": torch.randn(num_pairs, 3, vision.image_size, vision.image_size),
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "image_ids": torch.randint(2**62, (num_pairs,)),
        "names": ["?"] * num_pairs,
        "skipped": [],
        "num_truncated": 0,
    }


def measure_step(
    pairs: int,
    mini_batch_size: int | None,
    token_loss_scope: str,
    token_loss_group_size: int | None,
    bf16: bool,
    folder: str,
) -> dict[str, float]:
    """One step in this process."""
    torch.manual_seed(0)
    overrides = {"merge_ratio": 0.5, "token_loss_group_size": token_loss_group_size}
    model = MLIPModel._from_config(override_config(named_config("tiny"), overrides), attn_implementation="eager")
    args = MLIPTrainingArguments(
        folder,
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        bf16=bf16,
        report_to="none",
        per_device_train_batch_size=pairs,
        mini_batch_size=mini_batch_size,
        token_loss_scope=token_loss_scope,
    )
    trainer = MLIPTrainer(model, args, train_dataset=[None] * pairs, processing_class=SimpleNamespace(tokenizer=None))
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    wrapped, _ = trainer.accelerator.prepare(model, trainer.optimizer)
    torch.manual_seed(args.process_index)
    batch = random_batch(model, pairs)
    trainer.training_step(wrapped, random_batch(model, 4))  # what the first call allocates once

    before = psutil.Process().memory_info().rss
    start, start_of_processor = time.perf_counter(), time.process_time()
    trainer.training_step(wrapped, batch)
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time() - start_of_processor,
        "before_mib": before / MIB,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MIB,
    }


def start(setup: dict[str, Any], environment: dict[str, str]) -> subprocess.Popen:
    command = [sys.executable, __file__, "--measure", json.dumps(setup)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment})


def measure_in_processes(setup: dict[str, Any], processes: int) -> dict[str, float]:
    """The step of `processes` processes at once; of each figure the largest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
    environments = [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    running = [start(setup, environment if processes > 1 else {}) for environment in environments]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"A process ended early (out of memory?): {setup}. Give smaller --pairs or --plain_pairs.")
    figures = [json.loads(output.splitlines()[-1]) for output in outputs]
    return {name: max(figure[name] for figure in figures) for name in figures[0]}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=4096, help="Pairs of each process.")
    parser.add_argument("--mini_batch_size", type=int, default=128)
    parser.add_argument("--plain_pairs", type=int, nargs="*", default=[512], help="Batches for the plain path.")
    parser.add_argument("--processes", type=int, default=1, help="With more than one, compare the token loss's scopes.")
    parser.add_argument("--token_loss_group_size", type=int, default=0, help="0: all pairs are compared.")
    parser.add_argument("--no_bf16", action="store_true", help="float32 instead of bfloat16 autocast.")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.measure:
        print(json.dumps(measure_step(**json.loads(flags.measure))))
        return

    group_size = flags.token_loss_group_size or None
    common = {"token_loss_group_size": group_size, "bf16": not flags.no_bf16, "folder": "unused"}
    if flags.processes > 1:
        setups = [
            {"pairs": flags.pairs, "mini_batch_size": None, "token_loss_scope": scope, **common}
            for scope in ("global", "local")
        ]
    else:
        split = {"pairs": flags.pairs, "mini_batch_size": flags.mini_batch_size}
        plain = [{"pairs": pairs, "mini_batch_size": None} for pairs in flags.plain_pairs]
        same_size = [{"pairs": pairs, "mini_batch_size": flags.mini_batch_size} for pairs in flags.plain_pairs]
        setups = [{**setup, "token_loss_scope": "global", **common} for setup in [split, *plain, *same_size]]
    rows = []
    for setup in setups:
        setup_of_row = {"processes": flags.processes, **{k: v for k, v in setup.items() if k != "folder"}}
        row = {
            **setup_of_row,
            **measure_in_processes(setup, flags.processes),
            "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s) a process",
            "torch": torch.__version__,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        history = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        history = [entry for entry in history if any(entry[name] != value for name, value in setup_of_row.items())]
        history.append(row)
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(history, indent=2) + "\n")
    shown = ("processes", "pairs", "mini_batch_size", "token_loss_scope", "token_loss_group_size")
    print(format_table(rows, (*shown, "before_mib", "peak_mib", "seconds", "processor_seconds")))
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
