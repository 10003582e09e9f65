# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip benchmark`: accuracy, speed, FLOPs and memory of a model at each merge ratio and merge method.

    mlip benchmark --model_name_or_path runs/mine --output_dir speed
    mlip benchmark --model_name_or_path runs/mine --validation_file test.parquet --output_dir bench
    mlip benchmark --model_name_or_path runs/mine --dataset_name cifar10 --output_dir bench \
        --merge_ratios 0 0.3 0.5 0.7 --merge_methods mlip tome elip --baseline openai/clip-vit-base-patch32

Accuracy is the mean recall of retrieval if the data set has captions, else zero-shot accuracy. Speed is the speed of
the image encoder on one batch of the data. Each round times every setting once, so a machine that slows down affects
all settings alike. The command prints a table and writes benchmark.json and pareto.png.

Without a data set only speed, FLOPs and memory are measured, on random images, and there is no picture.
"""

import itertools
import json
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import HfArgumentParser
from transformers.utils import logging

from modeling_mlip import MLIPModel
from modeling_mlip.configuration_mlip import MERGE_METHODS
from modeling_mlip.data.data_arguments import DataArguments
from modeling_mlip.hub.atomic_files import check_folder_is_writable, write_atomically
from modeling_mlip.hub.flag_help import FlagHelpFormatter, group_dataclasses
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.hub.results import Result

from .cost import Cost, gflops_of, measure_peak_memory, seconds_of
from .encoders import Encoder, load_encoder, set_merging
from .evaluate_command import (
    EncoderArguments,
    LabelArguments,
    dataset_name,
    has_captions,
    load_data,
    prepare_from_flags,
)
from .evaluation_split import EvaluationSplit, Rows
from .plots import MARKERS, ParetoPoint, plot_pareto
from .runner import Evaluation, run_tasks
from .tasks import Retrieval, Task, ZeroShot
from .tasks.zero_shot import ZeroShotOptions

RESULTS_FILE, PICTURE_FILE = "benchmark.json", "pareto.png"


@dataclass
class BenchmarkArguments:
    """The settings that are measured, and how they are timed."""

    output_dir: str | None = field(
        default=None, metadata={"help": f"A folder for {RESULTS_FILE} and {PICTURE_FILE}; created if missing."}
    )
    merge_ratios: list[float] = field(
        default_factory=lambda: [0.0, 0.3, 0.5, 0.7], metadata={"help": "Shares of patch tokens to merge away."}
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
    batch_size: int = field(default=32, metadata={"help": "Images per batch for time and memory."})
    rounds: int = field(default=10, metadata={"help": "Number of rounds; each times every setting once."})
    warmup: int = field(default=2, metadata={"help": "Number of rounds before those, which do not count."})

    def __post_init__(self):
        for name in ("merge_ratios", "merge_methods"):
            if not getattr(self, name):
                raise ValueError(f"{name}=[]: give at least one.")
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
    """A model with one merge ratio and one merge method: a row of the table.

    Args:
        method: "none" for merge ratio 0, at which all methods are equal; for the baseline its name.
        merge_ratio: `None` for the baseline.
        apply: sets the model to the merge ratio and the method.
    """

    encoder: Encoder
    method: str
    merge_ratio: float | None
    apply: Callable[[], None]


@dataclass(frozen=True)
class BenchmarkRow:
    """What was measured of one setting."""

    method: str
    merge_ratio: float | None
    results: list[Result]
    cost: Cost

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "method": self.method,
            "merge_ratio": self.merge_ratio,
            "results": [result.to_dict() for result in self.results],
            **vars(self.cost),
        }


def benchmark_settings(encoder: Encoder, ratios: Sequence[float], methods: Sequence[str]) -> list[Setting]:
    """A setting for each ratio and each method; ratio 0 once. The model keeps its own setting.

    Raises:
        ValueError: for a model that merges no tokens, or a ratio that leaves no token.
    """
    saved = encoder.merge_ratio, encoder.model.config.merge_method if isinstance(encoder.model, MLIPModel) else None
    pairs = [("none", 0.0)] if 0 in ratios else []
    pairs += [pair for pair in itertools.product(methods, sorted(set(ratios) - {0})) if pair not in pairs]
    settings = []
    try:
        for method, ratio in dict.fromkeys(pairs):
            name = None if method == "none" else method
            set_merging(encoder, ratio, name)  # refuses a ratio here rather than in the middle of the measurement
            settings.append(Setting(encoder, method, ratio, partial(set_merging, encoder, ratio, name)))
    finally:
        set_merging(encoder, *saved)
    return settings


# 1. Accuracy


@dataclass(frozen=True)
class Accuracy:
    """The evaluation of each setting of one model, and images `(B, 3, H, W)` of the data to time it on."""

    split: EvaluationSplit
    evaluations: list[Evaluation]
    images: Tensor


def has_source(data_args: DataArguments) -> bool:
    """Whether the flags name a data set."""
    return any((data_args.dataset_name, data_args.data_dir, data_args.train_file, data_args.validation_file))


def measure_accuracies(
    groups: Sequence[Sequence[Setting]],
    data_args: DataArguments,
    label_args: LabelArguments,
    zero_shot: ZeroShotOptions,
) -> list[Accuracy]:
    """Evaluates the settings of each model in one pass over the data.

    Raises:
        ValueError, OSError: for data, labels or templates that do not fit.
    """
    splits = load_data(data_args)
    tasks: list[Task] = [Retrieval()] if has_captions(splits, data_args) else []
    if label_args.label_columns or not tasks:
        tasks.append(ZeroShot(templates=zero_shot.templates))
    elif zero_shot.templates:
        raise ValueError(
            f"templates={zero_shot.templates} has no effect: choose the columns to classify by with label_columns=NAME."
        )
    return [measure_accuracy(group, splits, tasks, data_args, label_args) for group in groups]


def measure_accuracy(
    settings: Sequence[Setting],
    splits: Mapping[str, Rows],
    tasks: Sequence[Task],
    data_args: DataArguments,
    label_args: LabelArguments,
) -> Accuracy:
    """Evaluates all settings of one model in one pass over the data."""
    encoder = settings[0].encoder
    split = prepare_from_flags(encoder, splits, tasks, data_args, label_args)
    evaluations = run_tasks(encoder, split, tasks, [setting.apply for setting in settings])
    return Accuracy(split, evaluations, first_images(split.dataloader))


def first_images(dataloader: Any) -> Tensor:
    """The images of the first batch that holds any."""
    return next(batch["pixel_values"] for batch in dataloader if len(batch["pixel_values"]))


def main_result(results: Sequence[Result]) -> Result:
    """The figure of the picture: the mean recall of retrieval, else the first accuracy@1."""
    means = [result for result in results if result.task == Retrieval.name and result.k is None]
    return (means or [result for result in results if result.k == 1])[0]


# 2. Cost


@torch.inference_mode()
def measure_cost(settings: Sequence[Setting], images: Mapping[int, Tensor], rounds: int, warmup: int) -> list[Cost]:
    """The cost of each setting.

    Args:
        images: by `id` of the encoder, each `(B, 3, H, W)` with the same B.
    """
    seconds_by_setting: list[list[float]] = [[] for _ in settings]
    for number in logging.tqdm(range(warmup + rounds), desc="Speed", unit="round"):
        for all_seconds, setting in zip(seconds_by_setting, settings, strict=True):
            setting.apply()
            seconds = seconds_of(setting.encoder, images[id(setting.encoder)])
            if number >= warmup:
                all_seconds.append(seconds)
    costs = []
    for all_seconds, setting in zip(seconds_by_setting, settings, strict=True):
        setting.apply()
        batch = images[id(setting.encoder)]
        speeds = sorted(len(batch) / seconds for seconds in all_seconds)
        # "inclusive" quartiles stay within the measured speeds.
        low, _, high = statistics.quantiles(speeds, n=4, method="inclusive") if len(speeds) > 1 else speeds * 3
        encode = partial(setting.encoder.model.get_image_features, pixel_values=batch)
        memory = measure_peak_memory(encode, batch.is_cuda)
        costs.append(Cost(statistics.median(speeds), low, high, gflops_of(setting.encoder, batch), memory))
    return costs


# 3. The whole benchmark


@dataclass(frozen=True)
class Benchmark:
    """All rows, and what they were measured on."""

    rows: list[BenchmarkRow]
    about: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """The JSON form; `metric` is the name of the result that the picture shows."""
        results = self.rows[0].results
        metric = main_result(results).name if results else None
        return {**self.about, "metric": metric, "rows": [row.to_dict() for row in self.rows]}


def run_benchmark(
    encoder: Encoder,
    baseline: Encoder | None,
    data_args: DataArguments,
    label_args: LabelArguments,
    zero_shot: ZeroShotOptions,
    args: BenchmarkArguments,
) -> Benchmark:
    """Measures all settings of the model, and the baseline.

    Raises:
        ValueError, OSError: for data, labels or ratios that do not fit, or a measurement that is not finite.
    """
    groups = [benchmark_settings(encoder, args.merge_ratios, args.merge_methods)]
    if baseline is not None:
        groups.append([Setting(baseline, f"baseline: {Path(baseline.name).name}", None, lambda: None)])
    encoders = [group[0].encoder for group in groups]
    # Step (1): accuracy
    if has_source(data_args):
        accuracies = measure_accuracies(groups, data_args, label_args, zero_shot)
        images = [accuracy.images for accuracy in accuracies]
        results = [evaluation.results for accuracy in accuracies for evaluation in accuracy.evaluations]
        data = {"dataset": dataset_name(data_args), **describe_data(accuracies[0])}
    else:
        images = [random_images(encoder) for encoder in encoders]
        results = [[] for group in groups for _ in group]
        data = {"dataset": None}
    # Step (2): cost, all settings of all models in turn
    settings = [setting for group in groups for setting in group]
    batches = {
        id(encoder): batch_of(source, encoder, args.batch_size)
        for encoder, source in zip(encoders, images, strict=True)
    }
    costs = measure_cost(settings, batches, args.rounds, args.warmup)
    rows = [
        BenchmarkRow(setting.method, setting.merge_ratio, figures, cost)
        for setting, figures, cost in zip(settings, results, costs, strict=True)
    ]
    about = {
        "model": encoder.name,
        "baseline": baseline.name if baseline is not None else None,
        **data,
        "batch_size": args.batch_size,
        "rounds": args.rounds,
        **describe_device(encoder),
    }
    return Benchmark(rows, about)


def random_images(encoder: Encoder) -> Tensor:
    """`(4, 3, H, W)`: noise as the model's own transform prepares it."""
    noise = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    return torch.stack([encoder.transform(Image.fromarray(pixels)) for pixels in noise])


def batch_of(images: Tensor, encoder: Encoder, batch_size: int) -> Tensor:
    """`(batch_size, 3, H, W)` on the device of the model: the images, repeated or cut."""
    repeats = -(-batch_size // len(images))
    return images.repeat(repeats, 1, 1, 1)[:batch_size].to(encoder.model.device, encoder.model.dtype)


def describe_data(accuracy: Accuracy) -> dict[str, Any]:
    """The split that was evaluated, and its size."""
    pairs = accuracy.evaluations[0].pairs
    return {
        "split": accuracy.split.name,
        "images": len(pairs.image_embeds),
        "captions": len(pairs.text_embeds),
        "skipped": len(pairs.skipped),
    }


def describe_device(encoder: Encoder) -> dict[str, Any]:
    """The device, the precision and the versions; no name of the host."""
    on_gpu = encoder.model.device.type == "cuda"
    cpu = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    return {
        "dtype": str(encoder.model.dtype).removeprefix("torch."),
        "machine": torch.cuda.get_device_name() if on_gpu else cpu,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peak_memory": "torch.cuda.max_memory_allocated" if on_gpu else "growth of resident memory (VmHWM)",
    }


def benchmark_table(rows: Sequence[BenchmarkRow]) -> list[dict[str, Any]]:
    """The rows to print, with the speed-up against the first row."""
    table: list[dict[str, Any]] = []
    for row in rows:
        cost, results = row.cost, row.results
        shown = [main_result(results)] if results else []
        shown += [
            result
            for result in results
            if result.k == 1 and result not in shown and "caption_length" not in result.setting
        ]
        table.append(
            {"method": row.method, "ratio": "" if row.merge_ratio is None else f"{row.merge_ratio:g}"}
            | {f"{result.title} (%)": result.value for result in shown}
            | {
                "images/s": cost.images_per_second,
                "quartiles": f"{cost.images_per_second_low:.1f} to {cost.images_per_second_high:.1f}",
                "speed-up": cost.images_per_second / rows[0].cost.images_per_second,
                "GFLOPs/image": cost.gflops_per_image,
                "peak MiB": cost.peak_memory_mib,
            }
        )
    return table


def pareto_points(rows: Sequence[BenchmarkRow]) -> list[ParetoPoint]:
    """The points of the picture."""
    return [
        ParetoPoint(
            row.method,
            row.merge_ratio,
            main_result(row.results).value,
            row.cost.images_per_second,
            row.cost.images_per_second_low,
            row.cost.images_per_second_high,
            row.cost.gflops_per_image,
        )
        for row in rows
    ]


# 4. The command


def check_benchmark_flags(
    encoder_args: EncoderArguments,
    data_args: DataArguments,
    label_args: LabelArguments,
    zero_shot: ZeroShotOptions,
    args: BenchmarkArguments,
) -> None:
    """Raises ValueError and OSError for what can be refused before a model is loaded."""
    if encoder_args.model_name_or_path is None:
        raise ValueError("Give the model to measure as --model_name_or_path, a folder or a Hub id.")
    if args.output_dir is None:
        raise ValueError(f"Give a folder for {RESULTS_FILE} and {PICTURE_FILE} as --output_dir.")
    if not has_source(data_args):
        names = ["label_columns", "class_names", "templates"]
        values = [label_args.label_columns, label_args.class_names, zero_shot.templates]
        given = [f"--{name}" for name, value in zip(names, values, strict=True) if value]
        if given:
            raise ValueError(f"{', '.join(given)} without a data set: give one as --validation_file or --data_dir.")
    if data_args.streaming:
        raise ValueError("The benchmark reads images twice, and a stream may change: leave out --streaming.")
    folder = Path(args.output_dir)
    if (folder / RESULTS_FILE).exists():
        raise ValueError(f"--output_dir {folder} holds a {RESULTS_FILE} already; choose another folder.")
    check_folder_is_writable(folder)


def main(arguments: list[str] | None = None) -> None:
    """Raises ValueError, OSError and ImportError in one line that says what to do."""
    parser = HfArgumentParser(
        (EncoderArguments, DataArguments, LabelArguments, ZeroShotOptions, BenchmarkArguments),
        prog="mlip benchmark",
        usage="mlip benchmark --model_name_or_path MODEL --output_dir FOLDER [--FLAG VALUE ...]",
        description=__doc__,
        formatter_class=FlagHelpFormatter,
        allow_abbrev=False,
    )
    group_dataclasses(
        parser,
        {
            "model": [EncoderArguments],
            "benchmark": [BenchmarkArguments],
            "data": [DataArguments],
            "labels and loading": [LabelArguments, ZeroShotOptions],
        },
    )
    encoder_args, data_args, label_args, zero_shot, args = parser.parse_args_into_dataclasses(arguments)
    # Step (1): what is cheap to refuse
    check_benchmark_flags(encoder_args, data_args, label_args, zero_shot, args)
    encoder = load_encoder(encoder_args.model_name_or_path, encoder_args.dtype, encoder_args.attn_implementation)
    if not isinstance(encoder.model, MLIPModel):
        raise ValueError(
            f"{encoder.name} is not an MLIP model and merges no tokens; give it as --baseline, or convert it first: "
            "mlip convert SOURCE TARGET."
        )
    baseline = None
    if args.baseline is not None:
        baseline = load_encoder(args.baseline, encoder_args.dtype, encoder_args.attn_implementation)
    # Step (2): measure
    benchmark = run_benchmark(encoder, baseline, data_args, label_args, zero_shot, args)
    # Step (3): show and write
    about, folder = benchmark.about, Path(args.output_dir)
    print(format_table(benchmark_table(benchmark.rows)))
    data = "Random images; no accuracy without a data set"
    if about["dataset"] is not None:
        data = f"{about['split']} split of {about['dataset']}: {about['images']} images, {about['captions']} captions"
    print(
        f"\n{data}; {about['machine']}, {about['dtype']}, batches of {args.batch_size}, median of {args.rounds} "
        f"rounds.\nPeak memory: {about['peak_memory']}."
    )
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / RESULTS_FILE, json.dumps(benchmark.to_dict(), indent=2, allow_nan=False) + "\n")
    written = [folder / RESULTS_FILE]
    if about["dataset"] is not None:
        label = f"{main_result(benchmark.rows[0].results).title} (%)"
        plot_pareto(pareto_points(benchmark.rows), label, folder / PICTURE_FILE)
        written.append(folder / PICTURE_FILE)
    print(f"Written to {' and '.join(map(str, written))}.")


if __name__ == "__main__":
    main()
