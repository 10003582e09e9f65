# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`make demo`: train, evaluate, save and load a small MLIP model in a few minutes on a CPU.

It draws textured shapes, trains `tiny` with half of the patch tokens merged, evaluates the model on combinations of
shape, colour and texture that are not in the training data, and writes a report.
"""

import argparse
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModel, AutoProcessor, pipeline

from modeling_mlip.data.data_arguments import DataArguments
from modeling_mlip.data.shapes import ATTRIBUTES, PROMPTS
from modeling_mlip.data.sources import load_pairs
from modeling_mlip.evaluation import Retrieval, ZeroShot
from modeling_mlip.evaluation.encoders import make_encoder, set_merging
from modeling_mlip.evaluation.html_page import Section, write_page
from modeling_mlip.evaluation.plots import plot_retrieved_images
from modeling_mlip.evaluation.runner import prepare_tasks, run_tasks
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.hub.results import values_by_name

from .arguments import MLIPTrainingArguments, ModelArguments
from .run_summary import DIRECTIONS
from .train import CURVES, train

MERGE_RATIOS = (0.0, 0.3, 0.5, 0.7)
PICTURE = "retrieval.png"


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


def train_model(folder: Path, data_args: DataArguments, num_train_epochs: float, merge_ratio: float) -> None:
    """Train on the drawn pairs and save to `folder`; prints recall on the validation split."""
    training_args = MLIPTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=num_train_epochs,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        start_merge_ratio=max(0.9, merge_ratio),
        bf16=bfloat16_is_faster(),
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        sweep=False,  # `evaluate_model` does it, with zero-shot classification
    )
    model_args = ModelArguments(config_name="tiny", attn_implementation="eager")
    train(model_args, data_args, training_args, {"merge_ratio": merge_ratio})


def evaluate_model(folder: Path, held_out: Dataset, merge_ratio: float) -> list[dict[str, Any]]:
    """Evaluate the saved model at several merge ratios.

    Draws the images with the highest scores for some captions, at `merge_ratio`.

    Returns:
        One row per ratio in percent, and one for chance.
    """
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    encoder, rows = make_encoder(str(folder), model, processor), []
    tasks = [Retrieval(), ZeroShot(templates=list(PROMPTS.values()))]
    split = prepare_tasks(encoder, held_out, tasks, label_columns=list(PROMPTS))
    settings = [partial(set_merging, encoder, ratio) for ratio in MERGE_RATIOS]
    for ratio, evaluation in zip(MERGE_RATIOS, run_tasks(encoder, split, tasks, settings), strict=True):
        metrics, pairs = values_by_name(evaluation.results), evaluation.pairs
        accuracies = {f"{name} accuracy": metrics[f"zero_shot_{name}_accuracy@1"] for name in PROMPTS}
        recalls = {f"{way} recall@1": metrics[f"{way.replace(' ', '_')}_recall@1"] for way in DIRECTIONS}
        rows.append({"merge_ratio": f"{ratio:g}", **accuracies, **recalls})
        if ratio == merge_ratio:
            plot_retrieved_images(
                folder / PICTURE, held_out["image"], held_out["caption"], pairs.image_embeds, pairs.text_embeds
            )
    chance = {f"{name} accuracy": 100 / len(ATTRIBUTES[name]) for name in PROMPTS}
    chance |= {f"{way} recall@1": 100 / len(held_out) for way in DIRECTIONS}
    return [*rows, {"merge_ratio": "chance", **chance}]


def classify_image(folder: Path, row: dict[str, Any]) -> None:
    """Print the colour that the pipeline of transformers gives the image of a row."""
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    labels = [PROMPTS["colour"].format(colour) for colour in ATTRIBUTES["colour"]]
    with torch.inference_mode():
        best = classify(row["image"], candidate_labels=labels, hypothesis_template="{}")[0]
    print(f"\npipeline: {row['caption']!r} -> {best['label']!r} ({best['score']:.2f})")


def write_report(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """Write report.html with the table and the pictures of the folder."""
    title = "Combinations of shape, colour and texture that are not in the training data, in percent"
    pictures = {"Captions and the images with the highest scores": PICTURE, "Learning curves": CURVES}
    sections = [Section(title, rows=rows)]
    sections += [Section(title, picture=folder / name) for title, name in pictures.items() if (folder / name).is_file()]
    return write_page(folder / "report.html", "MLIP on textured shapes", sections)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/demo", help="Folder of the model and the report.")
    parser.add_argument("--num_train_epochs", type=float, default=12, help="Passes over the 6,000 drawn pairs.")
    parser.add_argument("--merge_ratio", type=float, default=0.5, help="Fraction of patch tokens merged.")
    flags = parser.parse_args(arguments)
    folder = Path(flags.output_dir) / time.strftime("%Y%m%d-%H%M%S")  # each demo has a folder of its own

    # Step (1): train
    print(f"Drawing the data and training; output goes to {folder}.")
    data_args = DataArguments(dataset_name="shapes", augment=False)
    train_model(folder, data_args, flags.num_train_epochs, flags.merge_ratio)
    # Step (2): evaluate the saved model
    held_out = load_pairs(**data_args.source(), **data_args.columns())["validation"]
    rows = evaluate_model(folder, held_out, flags.merge_ratio)
    print(f"\nHeld-out combinations, {len(held_out)} images, in percent (trained at {flags.merge_ratio:g}):\n")
    print(format_table(rows))
    # Step (3): use it in a pipeline, and write the report
    classify_image(folder, held_out[0])
    print(f"Report: {write_report(folder, rows).resolve()}")


if __name__ == "__main__":
    main()
