# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`make demo`: an MLIP model from nothing in a few minutes on a CPU.

Draws textured shapes, trains `tiny` with half of the patch tokens merged away, evaluates it on combinations of shape,
colour and texture that it has never seen, saves it, loads it back by the two lines that anyone would use, and leaves a
report.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModel, AutoProcessor, pipeline

from modeling_mlip.data.arguments import DataArguments
from modeling_mlip.data.shapes import ATTRIBUTES, PROMPTS
from modeling_mlip.data.sources import load_pairs
from modeling_mlip.evaluation.encoders import make_encoder
from modeling_mlip.evaluation.evaluate_command import EvaluationArguments, evaluate_model
from modeling_mlip.evaluation.html_page import write_report
from modeling_mlip.evaluation.plots import retrieval_picture
from modeling_mlip.hub.formatting import format_table

from .arguments import MLIPTrainingArguments, ModelArguments
from .train import CURVES, train

MERGE_RATIOS = (0.0, 0.3, 0.5, 0.7)
PICTURE = "retrieval.png"


def bfloat16_is_faster() -> bool:
    """Whether this machine multiplies matrices faster in bfloat16: a CPU may know it only slowly."""
    if torch.accelerator.is_available():
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    seconds = []
    for dtype in (torch.bfloat16, torch.float32):
        x, y = torch.randn(4096, 192, dtype=dtype), torch.randn(192, 768, dtype=dtype)
        x @ y
        start = time.perf_counter()
        for _ in range(10):
            x @ y
        seconds.append(time.perf_counter() - start)
    return seconds[0] < seconds[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="runs/demo", help="Where the model and the report go.")
    parser.add_argument("--num_train_epochs", type=float, default=12, help="Passes over the 6,000 drawn pairs.")
    parser.add_argument("--merge_ratio", type=float, default=0.5, help="Share of patch tokens merged away.")
    flags = parser.parse_args(arguments)
    folder = Path(flags.output_dir) / time.strftime("%Y%m%d-%H%M%S")  # no demo writes over another

    # Step (1): train
    print(f"Drawing the data and training; all of it goes to {folder}.")
    data_args = DataArguments(dataset_name="shapes", augment=False)
    training_args = MLIPTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=flags.num_train_epochs,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        start_merge_ratio=max(0.9, flags.merge_ratio),
        bf16=bfloat16_is_faster(),
        use_cpu=not torch.accelerator.is_available(),
        save_strategy="no",
        sweep=False,  # step (3) does it, with zero-shot classification
    )
    training_args.do_train = True
    train(
        ModelArguments(config_name="tiny", attn_implementation="eager"),
        data_args,
        training_args,
        {"merge_ratio": flags.merge_ratio},
    )

    # Step (2): load it as anyone would
    model = AutoModel.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)

    # Step (3): evaluate on combinations that training never showed, at several merge ratios
    held_out = load_pairs(**data_args.source(), **data_args.columns())["validation"]
    args = EvaluationArguments(label_columns=list(PROMPTS), templates=list(PROMPTS.values()))
    encoder, rows = make_encoder(str(folder), model, processor), []
    for merge_ratio in MERGE_RATIOS:
        model.set_merge_ratio(merge_ratio)
        metrics, encoded = evaluate_model(encoder, held_out, data_args, args)
        rows.append(
            {
                "merge_ratio": f"{merge_ratio:g}",
                **{f"{name} accuracy": metrics[f"zero_shot_{name}_accuracy@1"] for name in PROMPTS},
                "text to image recall@1": metrics["text_to_image_recall@1"],
                "image to text recall@1": metrics["image_to_text_recall@1"],
            }
        )
        if merge_ratio == flags.merge_ratio:
            retrieval_picture(
                folder / PICTURE, held_out["image"], held_out["caption"], encoded.image_embeds, encoded.text_embeds
            )
    chance = {f"{name} accuracy": 100 / len(ATTRIBUTES[name]) for name in PROMPTS}
    recall = 100 / len(held_out)
    rows.append({"merge_ratio": "chance", **chance, "text to image recall@1": recall, "image to text recall@1": recall})
    print(f"\nHeld-out combinations, {len(held_out)} images, in percent (trained at {flags.merge_ratio:g}):\n")
    print(format_table(rows))

    # Step (4): the pipeline that others will use
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    labels = [PROMPTS["colour"].format(colour) for colour in ATTRIBUTES["colour"]]
    with torch.inference_mode():
        best = classify(held_out[0]["image"], candidate_labels=labels, hypothesis_template="{}")[0]
    print(f"\npipeline: {held_out[0]['caption']!r} -> {best['label']!r} ({best['score']:.2f})")

    # Step (5): the report
    pictures = [("Captions and the images found for them", folder / PICTURE), ("Learning curves", folder / CURVES)]
    report = write_report(
        folder,
        "MLIP on textured shapes",
        [("Combinations of shape, colour and texture that training never showed, in percent", rows)],
        [(caption, path) for caption, path in pictures if path.is_file()],
    )
    print(f"Report: {report.resolve()}")


if __name__ == "__main__":
    main()
