# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip benchmark`: what each merge ratio and method costs in accuracy and saves in time, FLOPs and memory.

    mlip benchmark --model_name_or_path runs/mine --validation_file test.parquet --output_dir bench
    mlip benchmark --model_name_or_path runs/mine --dataset_name cifar10 --output_dir bench \
        --merge_ratios 0 0.3 0.5 0.7 --merge_methods mlip tome elip --baseline openai/clip-vit-base-patch32

Accuracy is the mean recall of retrieval where the data set has captions, else zero-shot accuracy. Speed is that of the
image encoder on one batch of the data: all settings take turns, round after round, so that a machine that slows down
slows all of them. It prints a table and writes benchmark.json and pareto.png.
"""

import argparse
import gc
import itertools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser
from transformers.utils import logging

from modeling_mlip import MLIPModel
from modeling_mlip.configuration_mlip import MERGE_METHODS
from modeling_mlip.data.arguments import DataArguments
from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.formatting import format_table

from .encoders import Encoder, load_encoder, set_merging
from .evaluate_command import EncoderArguments, EvaluationArguments, dataset_of, evaluate_variants, load_evaluation
from .plots import MARKERS, plot_pareto

RESULTS, PICTURE = "benchmark.json", "pareto.png"
MIB = 2**20
PROC_STATUS, PROC_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass
class BenchmarkArguments:
    """What is swept, and how it is timed."""

    output_dir: str | None = field(
        default=None, metadata={"help": f"A folder for {RESULTS} and {PICTURE}; made if it is not there."}
    )
    merge_ratios: list[float] = field(
        default_factory=lambda: [0.0, 0.3, 0.5, 0.7], metadata={"help": "Shares of patch tokens merged away."}
    )
    merge_methods: list[str] = field(
        default_factory=lambda: list(MERGE_METHODS), metadata={"help": f"Any of {', '.join(MERGE_METHODS)}."}
    )
    baseline: str | None = field(
        default=None,
        metadata={
            "help": "A second model, measured in the same rounds: MLIP, a CLIP of transformers, or open_clip:NAME:TAG."
        },
    )
    batch_size: int = field(default=32, metadata={"help": "Images at a time when time and memory are measured."})
    rounds: int = field(default=10, metadata={"help": "How often every setting is timed, in turn."})
    warmup: int = field(default=2, metadata={"help": "Rounds before those, which do not count."})
    templates: list[str] = field(default_factory=list, metadata={"help": "As for mlip evaluate."})
    label_columns: list[str] = field(default_factory=list, metadata={"help": "As for mlip evaluate."})
    class_names: str | None = field(default=None, metadata={"help": "As for mlip evaluate."})
    per_device_eval_batch_size: int = field(default=128, metadata={"help": "Images at a time for accuracy."})
    dataloader_num_workers: int = field(default=0, metadata={"help": "Processes that decode images."})
    skip_budget: float = field(default=0.01, metadata={"help": "Share of broken samples at which it stops."})

    def __post_init__(self):
        for method in self.merge_methods:
            if method not in MERGE_METHODS:
                raise ValueError(f"merge_methods: {method!r} is unknown; choose from {', '.join(MERGE_METHODS)}.")
        for ratio in self.merge_ratios:
            if not 0 <= ratio < 1:
                raise ValueError(f"merge_ratios: {ratio} is not a share of tokens; choose 0 <= ratio < 1.")
        if len(set(self.merge_ratios)) > len(MARKERS):
            raise ValueError(f"Got {len(set(self.merge_ratios))} merge ratios; choose at most {len(MARKERS)}.")
        for name, least in (("rounds", 1), ("warmup", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: choose {least} or more.")


@dataclass
class Setting:
    """A model at one merge ratio by one method: a row of the table.

    Args:
        method: "none" at ratio 0, where all methods are the same; for the baseline its name.
        merge_ratio: `None` for the baseline.
        apply: sets the model to it.
    """

    encoder: Encoder
    method: str
    merge_ratio: float | None
    apply: Callable[[], None]


def settings_of(encoder: Encoder, ratios: Sequence[float], methods: Sequence[str]) -> list[Setting]:
    """Each ratio by each method, ratio 0 once.

    Raises:
        ValueError: for a model that merges no tokens, or a ratio that leaves none of its tokens.
    """
    saved = encoder.merge_ratio, encoder.model.config.merge_method if isinstance(encoder.model, MLIPModel) else None
    wanted = [("none", 0.0)] if 0 in ratios else []
    wanted += [pair for pair in itertools.product(methods, sorted(set(ratios) - {0})) if pair not in wanted]
    settings = []
    for method, ratio in wanted:
        name = None if method == "none" else method
        set_merging(encoder, ratio, name)  # refused here rather than in the middle
        settings.append(Setting(encoder, method, ratio, partial(set_merging, encoder, ratio, name)))
    set_merging(encoder, *saved)
    return settings


# 1. Accuracy


def measure_accuracy(
    settings: Sequence[Setting], data_args: DataArguments, args: EvaluationArguments
) -> tuple[list[dict[str, float]], Tensor, dict[str, Any]]:
    """The metrics of each setting of one model, images `(B, 3, H, W)` of the data, and what was evaluated."""
    evaluation = load_evaluation(settings[0].encoder, data_args, args)
    results = evaluate_variants(
        settings[0].encoder, evaluation, data_args, args, [setting.apply for setting in settings]
    )
    encoded = results[0][1]
    about = {
        "dataset": dataset_of(data_args),
        "split": evaluation.split,
        "images": len(encoded.image_embeds),
        "captions": len(encoded.text_embeds),
        "skipped": len(encoded.skipped),
    }
    return [metrics for metrics, _ in results], first_images(evaluation.dataloader), about


def first_images(dataloader: Any) -> Tensor:
    """The first batch of images that holds any."""
    return next(batch["pixel_values"] for batch in dataloader if len(batch["pixel_values"]))


def drawn_metric(metrics: dict[str, float]) -> str:
    """The one that the picture shows."""
    if "mean_recall" in metrics:
        return "mean_recall"
    return next(name for name in metrics if name.endswith("accuracy@1"))


# 2. Time, FLOPs and memory of the image encoder


def seconds_of(encoder: Encoder, images: Tensor) -> float:
    """How long one batch takes."""
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    encoder.model.get_image_features(pixel_values=images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gflops_of(encoder: Encoder, images: Tensor) -> float:
    """GFLOPs per image as torch counts them: matrix products, convolutions and attention, a multiplication and an
    addition as two. Fourier transforms and sorting are not counted."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation that is not counted
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encoder.model.get_image_features(pixel_values=images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() / len(images) / 1e9


def peak_memory(function: Callable[[], Any], on_gpu: bool) -> float | None:
    """MiB that a call needs at its peak beyond what was held before, `None` where it cannot be measured.

    On a GPU by torch's allocator; on Linux by the growth of the process's resident memory, whose high-water mark the
    kernel keeps and lets a process reset (proc(5), clear_refs), after free memory was given back to it.
    """
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if not os.access(PROC_RESET, os.W_OK):
        return None
    _give_back_free_memory()
    PROC_RESET.write_text("5")
    before = _high_water_mark()
    function()
    return (_high_water_mark() - before) / MIB


def _give_back_free_memory() -> None:
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)


def _high_water_mark() -> int:
    line = next(line for line in PROC_STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@torch.inference_mode()
def measure_cost(
    settings: Sequence[Setting], images: dict[int, Tensor], rounds: int, warmup: int
) -> list[dict[str, float | None]]:
    """Images per second, GFLOPs per image and peak memory of each setting.

    Args:
        images: by `id` of the encoder, each `(B, 3, H, W)`: the same number for all.
    """
    taken: list[list[float]] = [[] for _ in settings]
    costs: list[dict[str, float | None]] = []
    for number in logging.tqdm(range(warmup + rounds), desc="Speed", unit="round"):
        for seconds, setting in zip(taken, settings, strict=True):
            setting.apply()
            found = seconds_of(setting.encoder, images[id(setting.encoder)])
            if number >= warmup:
                seconds.append(found)
    for seconds, setting in zip(taken, settings, strict=True):
        setting.apply()
        own = images[id(setting.encoder)]
        speeds = sorted(len(own) / second for second in seconds)
        low, _, high = statistics.quantiles(speeds, n=4) if len(speeds) > 1 else speeds * 3
        encode = partial(setting.encoder.model.get_image_features, pixel_values=own)
        memory = peak_memory(encode, own.is_cuda)
        costs.append(
            {
                "images_per_second": statistics.median(speeds),
                "images_per_second_low": low,
                "images_per_second_high": high,
                "gflops_per_image": gflops_of(setting.encoder, own),
                "peak_memory_mib": memory,
            }
        )
    return costs


# 3. The command


def table_of(rows: Sequence[dict[str, Any]], metric: str) -> list[dict[str, Any]]:
    """What is printed of each row, with the speed-up against the first."""
    shown = [metric, *(name for name in rows[0] if name.endswith(("recall@1", "accuracy@1")) and name != metric)]
    return [
        {"method": row["method"], "ratio": "" if row["merge_ratio"] is None else f"{row['merge_ratio']:g}"}
        | {f"{name.replace('_', ' ')} (%)": row[name] for name in shown}
        | {
            "images/s": row["images_per_second"],
            "quartiles": f"{row['images_per_second_low']:.1f} to {row['images_per_second_high']:.1f}",
            "speed-up": row["images_per_second"] / rows[0]["images_per_second"],
            "GFLOPs/image": row["gflops_per_image"],
            "peak MiB": row["peak_memory_mib"],
        }
        for row in rows
    ]


def machine(on_gpu: bool) -> str:
    """What it ran on."""
    if on_gpu:
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def benchmark(
    encoder: Encoder,
    baseline: Encoder | None,
    data_args: DataArguments,
    args: BenchmarkArguments,
) -> dict[str, Any]:
    """The whole sweep: `rows`, the `metric` that is drawn, and what it was measured on."""
    evaluation_args = EvaluationArguments(
        label_columns=args.label_columns,
        class_names=args.class_names,
        templates=args.templates,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
        dataloader_num_workers=args.dataloader_num_workers,
        skip_budget=args.skip_budget,
    )
    # Step (1): accuracy, one pass over the data for each model
    groups = [settings_of(encoder, args.merge_ratios, args.merge_methods)]
    if baseline is not None:
        groups.append([Setting(baseline, f"baseline: {Path(baseline.name).name}", None, lambda: None)])
    metrics: list[dict[str, float]] = []
    images: dict[int, Tensor] = {}
    about: dict[str, Any] = {}
    for group in groups:
        found, pixels, data = measure_accuracy(group, data_args, evaluation_args)
        metrics += found
        about = about or data
        repeats = -(-args.batch_size // len(pixels))
        model = group[0].encoder.model
        images[id(group[0].encoder)] = pixels.repeat(repeats, 1, 1, 1)[: args.batch_size].to(model.device, model.dtype)
    # Step (2): cost, all settings of all models in turn
    settings = [setting for group in groups for setting in group]
    costs = measure_cost(settings, images, args.rounds, args.warmup)
    rows = [
        {"method": setting.method, "merge_ratio": setting.merge_ratio, **accuracy, **cost}
        for setting, accuracy, cost in zip(settings, metrics, costs, strict=True)
    ]
    on_gpu = next(iter(images.values())).is_cuda
    return {
        "model": encoder.name,
        "baseline": baseline.name if baseline is not None else None,
        **about,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        "dtype": str(encoder.model.dtype).removeprefix("torch."),
        "machine": machine(on_gpu),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peak_memory": "torch.cuda.max_memory_allocated" if on_gpu else "growth of resident memory (VmHWM)",
        "metric": drawn_metric(metrics[0]),
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        (EncoderArguments, DataArguments, BenchmarkArguments),
        prog="mlip benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    encoder_args, data_args, args = parser.parse_args_into_dataclasses(arguments)
    # Step (1): what is cheap to refuse
    if encoder_args.model_name_or_path is None:
        raise ValueError("Give the model to measure as --model_name_or_path, a folder or a Hub id.")
    if args.output_dir is None:
        raise ValueError(f"Give a folder for {RESULTS} and {PICTURE} as --output_dir.")
    if data_args.streaming:
        raise ValueError(
            "Images that are timed are read again, which a stream does not promise; leave out --streaming."
        )
    folder = Path(args.output_dir)
    if (folder / RESULTS).exists():
        raise ValueError(f"output_dir={folder} holds a {RESULTS} already; choose another.")
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"output_dir={folder} cannot be made in {existing}; choose another.")
    encoder = load_encoder(encoder_args.model_name_or_path, encoder_args.dtype, encoder_args.attn_implementation)
    if not isinstance(encoder.model, MLIPModel):
        raise ValueError(
            f"{encoder.name} is no MLIP model and merges no tokens; give it as --baseline, or convert it first: "
            "mlip convert SOURCE TARGET."
        )
    baseline = None
    if args.baseline is not None:
        baseline = load_encoder(args.baseline, encoder_args.dtype, encoder_args.attn_implementation)
    # Step (2): measure
    results = benchmark(encoder, baseline, data_args, args)
    # Step (3): show and write
    print(format_table(table_of(results["rows"], results["metric"])))
    print(
        f"\n{results['split']} split of {results['dataset']}: {results['images']} images, {results['captions']} "
        f"captions; {results['machine']}, {results['dtype']}, batches of {args.batch_size}, median of {args.rounds} "
        f"rounds.\nPeak memory: {results['peak_memory']}."
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RESULTS, json.dumps(results, indent=2) + "\n")
    plot_pareto(results["rows"], results["metric"], folder / PICTURE)
    print(f"Written to {folder / RESULTS} and {folder / PICTURE}.")


if __name__ == "__main__":
    main()
