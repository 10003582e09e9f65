# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`make demo`: train MLIP and CLIP for the same processor time, evaluate, save and load them in minutes on a CPU.

It draws framed shapes, trains `nano` with half of the patch tokens merged, evaluates on combinations of shape, colour
and texture that are not in the training data, and writes a report. CLIP trains at the same time in another process.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModel, AutoProcessor, TrainerCallback, pipeline

from modeling_mlip.data.data_arguments import TrainingDataArguments
from modeling_mlip.data.shapes import ATTRIBUTES, PROMPTS
from modeling_mlip.data.sources import load_pairs
from modeling_mlip.evaluation import Retrieval, ZeroShot
from modeling_mlip.evaluation.encoders import make_encoder, set_merging
from modeling_mlip.evaluation.html_page import Section, write_page
from modeling_mlip.evaluation.plots import plot_retrieved_images
from modeling_mlip.evaluation.runner import prepare_tasks, run_tasks
from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.hub.results import values_by_name

from .arguments import MLIPTrainingArguments, ModelArguments
from .run_summary import DIRECTIONS
from .starting_point import build_config
from .train import CURVES, build_trainer, train

MERGE_RATIOS = (0.0, 0.3, 0.5, 0.7)
PICTURE = "retrieval.png"
RESULTS = "results.json"
MODELS = ("mlip", "clip")
CLIP = {"merge_ratio": 0.0, "frequency_layers": 0, "frequency_loss_weight": 0.0, "frequency_embed_weight": 0.0}
MEASURED_STEPS = 12


def bfloat16_is_faster() -> bool:
    """Whether this machine multiplies matrices faster in bfloat16; some CPUs emulate it."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        x, y = torch.randn(512, 192, dtype=dtype), torch.randn(192, 768, dtype=dtype)
        x @ y
        start = time.perf_counter()
        for _ in range(10):
            x @ y
        seconds.append(time.perf_counter() - start)
    return seconds[0] < seconds[1]


def overrides_of(model: str, merge_ratio: float) -> dict[str, Any]:
    """The configuration keys of "mlip" or "clip"."""
    return CLIP if model == "clip" else {"merge_ratio": merge_ratio}


def job_arguments(
    folder: Path, model: str, max_steps: int, merge_ratio: float, seed: int, bf16: bool
) -> tuple[ModelArguments, TrainingDataArguments, MLIPTrainingArguments]:
    """The arguments of `mlip train` for one model."""
    training_args = MLIPTrainingArguments(
        output_dir=str(folder),
        max_steps=max_steps,
        per_device_train_batch_size=64,
        learning_rate=2e-3,
        start_merge_ratio=max(0.9, merge_ratio) if model == "mlip" else None,
        seed=seed,
        bf16=bf16,
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        logging_steps=20,
        sweep=False,  # `evaluate_model` does it, with zero-shot classification
    )
    model_args = ModelArguments(config_name="nano", attn_implementation="eager")
    data_args = TrainingDataArguments(
        dataset_name="framed-shapes", augment=False, caption_policy="first", keep_in_memory=True
    )
    return model_args, data_args, training_args


class StepClock(TrainerCallback):
    """Measures the processor time of each step."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.process_time())


def measure_training_step(model: str, merge_ratio: float, bf16: bool) -> float:
    """Processor seconds of a training step, the mean of a short run with the schedule of the whole.

    Preparing an image, which happens once, is not part of it.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        model_args, data_args, training_args = job_arguments(
            Path(folder), model, MEASURED_STEPS, merge_ratio, seed=0, bf16=bf16
        )
        training_args.disable_tqdm, training_args.report_to = True, []
        config = build_config(config_name=model_args.config_name, overrides=overrides_of(model, merge_ratio))
        data_args.max_train_samples = 4 * training_args.per_device_train_batch_size
        splits = load_pairs(**data_args.source(), **data_args.columns())
        trainer = build_trainer(model_args, data_args, training_args, config, splits)
        clock = StepClock()
        trainer.add_callback(clock)
        trainer.train()
    ends = clock.ends[4:]  # the first pass prepares the images
    return statistics.mean(later - earlier for earlier, later in zip(ends[:-1], ends[1:], strict=True))


def train_model(folder: Path, model: str, max_steps: int, merge_ratio: float, seed: int, bf16: bool) -> None:
    """Train "mlip" or "clip" on the drawn pairs with one thread, and save it to `folder`; prints recall."""
    torch.set_num_threads(1)
    model_args, data_args, training_args = job_arguments(folder, model, max_steps, merge_ratio, seed, bf16)
    train(model_args, data_args, training_args, overrides_of(model, merge_ratio))


def train_quietly(log: Path, *arguments: Any) -> None:
    """`train_model` with its output in a file, for a second process."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = log.open("w", buffering=1)
    sys.stdout = sys.stderr = file
    for stream in (1, 2):  # for what other libraries print
        os.dup2(file.fileno(), stream)
    train_model(*arguments)


def train_models(folder: Path, models: list[str], max_steps: int, merge_ratio: float, seed: int) -> None:
    """Train the models, each with one thread: the first in this process, the second in another at the same time.

    The first takes `max_steps`, the second as many as take the same processor time.

    Raises:
        RuntimeError: if the second process fails.
    """
    torch.set_num_threads(1)  # two processes with several threads each slow one another down
    bf16 = bfloat16_is_faster()  # decided once, so that all models train in one dtype
    seconds = {model: measure_training_step(model, merge_ratio, bf16) for model in models}
    steps = {model: max(round(max_steps * seconds[models[0]] / seconds[model]), 1) for model in models}
    told = ", ".join(f"{name}: {steps[name]} steps of {1000 * seconds[name]:.0f} ms" for name in models)
    cores = min(len(models), os.cpu_count() or 1)
    minutes = len(models) / cores * max_steps * seconds[models[0]] / 60
    print(f"{told}. Training will take about {minutes:.1f} minutes with one thread for each model.", flush=True)
    others = []
    for name in models[1:]:
        log = folder / f"{name}.log"
        others.append((log, start_process(log, folder / name, name, steps[name], merge_ratio, seed, bf16)))
    train_model(folder / models[0], models[0], steps[models[0]], merge_ratio, seed, bf16)
    for log, process in others:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"training ended with status {process.exitcode}; its output is in {log}.")


def start_process(log: Path, *arguments: Any) -> Any:
    """Starts `train_model` in a process of its own, with its output in a file."""
    process = multiprocessing.get_context("spawn").Process(target=train_quietly, args=(log, *arguments))
    process.start()
    return process


def evaluate_model(
    folder: Path, model_name: str, held_out: Dataset, picture: Path, merge_ratio: float
) -> list[dict[str, Any]]:
    """Evaluate a saved model, "mlip" at several merge ratios.

    Draws the images with the highest scores for some captions, at `merge_ratio`.

    Returns:
        One row per ratio, in percent.
    """
    ratios = MERGE_RATIOS if model_name == "mlip" else (0.0,)
    if model_name == "clip":
        merge_ratio = 0.0
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    encoder, rows = make_encoder(str(folder), model, processor), []
    tasks = [Retrieval(), ZeroShot(templates=list(PROMPTS.values()))]
    split = prepare_tasks(encoder, held_out, tasks, label_columns=list(PROMPTS))
    settings = [partial(set_merging, encoder, ratio) for ratio in ratios]
    for ratio, evaluation in zip(ratios, run_tasks(encoder, split, tasks, settings), strict=True):
        metrics, pairs = values_by_name(evaluation.results), evaluation.pairs
        accuracies = {f"{name} accuracy": metrics[f"zero_shot_{name}_accuracy@1"] for name in PROMPTS}
        recalls = {f"{way} recall@1": metrics[f"{way.replace(' ', '_')}_recall@1"] for way in DIRECTIONS}
        rows.append({"model": model_name.upper(), "merge ratio": f"{ratio:g}", **accuracies, **recalls})
        if ratio == merge_ratio:
            plot_retrieved_images(
                picture, held_out["image"], held_out["caption"], pairs.image_embeds, pairs.text_embeds
            )
    return rows


def chance_row(num_images: int) -> dict[str, Any]:
    """The percentages of a model that guesses."""
    chance = {f"{name} accuracy": 100 / len(ATTRIBUTES[name]) for name in PROMPTS}
    chance |= {f"{way} recall@1": 100 / num_images for way in DIRECTIONS}
    return {"model": "chance", "merge ratio": "", **chance}


def classify_image(folder: Path, row: dict[str, Any]) -> None:
    """Print the colour that the pipeline of transformers gives the image of a row."""
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    labels = [PROMPTS["colour"].format(colour) for colour in ATTRIBUTES["colour"]]
    with torch.inference_mode():
        best = classify(row["image"], candidate_labels=labels, hypothesis_template="{}")[0]
    print(f"\npipeline: {row['caption']!r} -> {best['label']!r} ({best['score']:.2f})")


def write_report(folder: Path, models: list[str], rows: list[dict[str, Any]]) -> Path:
    """Write report.html: pictures of retrieved images, the table, and learning curves."""
    title = "Combinations of shape, colour and texture that are not in the training data, in percent"
    retrieved = "{}: captions and the images with the highest scores; a green frame marks the right image"
    pictures = [(retrieved.format(name.upper()), f"{name}-{PICTURE}") for name in models]
    curves = [(f"{name.upper()}: learning curves", f"{name}/{CURVES}") for name in models]
    sections = [Section(title, picture=folder / name) for title, name in pictures]
    sections.insert(1, Section(title, rows=rows))
    sections += [Section(title, picture=folder / name) for title, name in curves if (folder / name).is_file()]
    return write_page(folder / "report.html", "MLIP on drawn shapes", sections)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/demo", help="Folder of the models and the report.")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=MODELS,
        default=list(MODELS),
        help="Models to train. The first takes --max_steps, the second as many steps as take the same time.",
    )
    parser.add_argument("--max_steps", type=int, default=1500, help="Training steps of 64 pairs.")
    parser.add_argument("--merge_ratio", type=float, default=0.5, help="Fraction of MLIP's patch tokens merged.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of weights and batches.")
    flags = parser.parse_args(arguments)
    if flags.max_steps < 1:
        parser.error(f"--max_steps {flags.max_steps}: choose 1 or more.")
    if not 0 <= flags.merge_ratio < 1:
        parser.error(f"--merge_ratio {flags.merge_ratio:g}: choose 0 or more and less than 1.")
    models = list(dict.fromkeys(flags.models))
    folder = Path(flags.output_dir) / time.strftime("%Y%m%d-%H%M%S")  # each demo has a folder of its own

    # Step (1): train
    print(f"Drawing the data and measuring a step; output goes to {folder}.", flush=True)
    train_models(folder, models, flags.max_steps, flags.merge_ratio, flags.seed)
    # Step (2): evaluate the saved models
    held_out = load_pairs(dataset_name="framed-shapes")["validation"]
    rows = []
    for name in models:
        rows += evaluate_model(folder / name, name, held_out, folder / f"{name}-{PICTURE}", flags.merge_ratio)
    rows.append(chance_row(len(held_out)))
    print(f"\nHeld-out combinations, {len(held_out)} images, in percent (MLIP trained at {flags.merge_ratio:g}):\n")
    print(format_table(rows))
    # Step (3): use one in a pipeline, and write the report
    classify_image(folder / models[0], held_out[0])
    write_atomically(folder / RESULTS, json.dumps({"seed": flags.seed, "rows": rows}, indent=1) + "\n")
    print(f"Report: {write_report(folder, models, rows).resolve()}")


if __name__ == "__main__":
    main()
