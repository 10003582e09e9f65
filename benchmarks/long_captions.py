# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Retrieval by short and by long captions: before, after stretching the context from 77 to 248, and after fine-tuning.

    python benchmarks/long_captions.py --folder runs/long_captions

A small model is trained from scratch on drawn shapes with short captions ("a red shape on the left") at a context of 77
tokens. It is then fine-tuned with `mlip train --max_seq_length 248 --long_caption_column long_caption`, on captions of
80 to 110 other words and the short caption behind them. So the answer stands only after token 77. Images and captions
are compared in sets of 54, which hold each colour at each place once; chance is 1.9 %.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, List, Value
from PIL import Image as PILImage
from transformers import CLIPProcessor

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.data.collators import tokenize
from modeling_mlip.data.images import image_transform
from modeling_mlip.data.shapes import ATTRIBUTES, PLACES, draw
from modeling_mlip.evaluation.metrics import retrieval_metrics
from modeling_mlip.hub.cli import main as run_mlip
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.hub.loading import load_pretrained, load_processor
from modeling_mlip.hub.text_context import stretch_text_context

RESULTS = Path(__file__).parent / "results" / "long_captions.json"
CONTEXT, LONG_CONTEXT = 77, 248
SET_SIZE = len(ATTRIBUTES["colour"]) * len(PLACES)
WORDINGS = ("a {colour} shape {place}", "{place} a {colour} shape")
OTHER_WORDS = (
    *("this", "picture", "shows", "something", "that", "someone", "drew", "by", "program", "with", "noise", "and"),
    *("grey", "background", "it", "has", "stripes", "which", "are", "fine", "or", "coarse", "nothing", "else"),
)
OTHER_WORDS_COUNT = (80, 110)  # fewest and most


def caption_rows(num_sets: int, rng: np.random.Generator) -> dict[str, list[Any]]:
    """Images with a short and a long caption, in sets of `SET_SIZE`."""
    colour, place = (index.ravel() for index in np.meshgrid(range(len(ATTRIBUTES["colour"])), range(len(PLACES))))
    columns: dict[str, list[Any]] = {"image": [], "caption": [], "long_caption": []}
    for _ in range(num_sets):
        order = rng.permutation(SET_SIZE)
        shape, texture, size = (rng.integers(count, size=SET_SIZE) for count in (6, 3, 2))
        pixels = draw(shape, colour[order], texture, size, place[order], 64, rng)
        columns["image"] += [PILImage.fromarray(image) for image in pixels]
        for index in order:
            words = {"colour": ATTRIBUTES["colour"][colour[index]], "place": PLACES[place[index]]}
            caption = WORDINGS[rng.integers(len(WORDINGS))].format(**words)
            others = rng.choice(OTHER_WORDS, rng.integers(OTHER_WORDS_COUNT[0], OTHER_WORDS_COUNT[1] + 1))
            columns["caption"].append(caption)
            columns["long_caption"].append(f"{' '.join(others)} {caption}")
    return columns


def write_first_set(rows: dict[str, list[Any]], path: Path) -> None:
    """Writes the images of one set with both captions of each in one column, for `mlip evaluate`."""
    captions = [list(texts) for texts in zip(rows["caption"], rows["long_caption"], strict=True)]
    columns = {"image": rows["image"][:SET_SIZE], "captions": captions[:SET_SIZE]}
    features = Features({"image": Image(), "captions": List(Value("string"))})
    Dataset.from_dict(columns, features=features).to_parquet(str(path))


def small_configuration() -> MLIPConfig:
    """CLIP of width 64 with images of 32 pixels."""
    tower = dict(hidden_size=64, intermediate_size=256, num_attention_heads=4, hidden_act="gelu", projection_dim=64)
    return MLIPConfig(
        vision_config={**tower, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8, "frequency_layers": 0},
        text_config={**tower, "num_hidden_layers": 2, "max_position_embeddings": CONTEXT},
        projection_dim=64,
        frequency_loss_weight=0,
    )


@torch.inference_mode()
def measure_recall(
    model: MLIPModel, processor: CLIPProcessor, rows: dict[str, list[Any]], context: int
) -> dict[str, dict[str, float]]:
    """Mean recall@1 over the sets, by column of captions and direction, in percent."""
    model.eval()
    transform = image_transform(processor.image_processor)
    images = torch.stack([transform(image) for image in rows["image"]])
    image_sets = model.get_image_features(images).pooler_output.split(SET_SIZE)
    recall = {}
    for column in ("caption", "long_caption"):
        sets = []
        for number, image_embeds in enumerate(image_sets):
            texts = rows[column][number * SET_SIZE : (number + 1) * SET_SIZE]
            input_ids, attention_mask, _ = tokenize(processor.tokenizer, texts, context)
            text_embeds = model.get_text_features(input_ids, attention_mask).pooler_output
            sets.append(retrieval_metrics(image_embeds, text_embeds, torch.arange(SET_SIZE)))
        names = ("text_to_image_recall@1", "image_to_text_recall@1")
        recall[column] = {name: sum(metrics[name] for metrics in sets) / len(sets) for name in names}
    return recall


def run_training(folder: Path, name: str, *flags: str) -> Path:
    """Runs `mlip train` on the rows in `folder`; returns the folder of the model.

    Raises:
        RuntimeError: if the command fails.
    """
    common = ["--train_file", str(folder / "train.parquet"), "--output_dir", str(folder / name), "--use_cpu"]
    common += ["--per_device_train_batch_size", str(SET_SIZE), "--augment", "false", "--report_to", "none"]
    common += ["--save_strategy", "no", "--logging_steps", "50"]
    if run_mlip(["train", *common, *flags]) != 0:
        raise RuntimeError(f"mlip train {' '.join(flags)} failed; its message is above.")
    return folder / name


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="For the data and the models; must not exist.")
    parser.add_argument("--train_sets", type=int, default=40, help=f"Sets of {SET_SIZE} training pairs.")
    parser.add_argument("--validation_sets", type=int, default=20)
    parser.add_argument("--steps", type=int, default=800, help="Steps on short captions.")
    parser.add_argument("--long_steps", type=int, default=240, help="Steps on long and short captions.")
    parser.add_argument("--output_file", default=str(RESULTS))
    flags = parser.parse_args(arguments)
    folder, start = Path(flags.folder), time.process_time()
    folder.mkdir(parents=True)
    # Step (1): the data, the tokenizer of all captions, and the configuration
    rng = np.random.default_rng(0)
    train, validation = caption_rows(flags.train_sets, rng), caption_rows(flags.validation_sets, rng)
    features = Features({"image": Image(), "caption": Value("string"), "long_caption": Value("string")})
    Dataset.from_dict(train, features=features).to_parquet(str(folder / "train.parquet"))
    write_first_set(validation, folder / "validation.parquet")
    tokenizer = train_tokenizer([*train["caption"], *train["long_caption"]], max_seq_length=CONTEXT, vocab_size=1024)
    tokenizer.save_pretrained(folder / "tokenizer")
    small_configuration().save_pretrained(folder / "configuration")
    lengths = {name: tokenize(tokenizer, train[name], LONG_CONTEXT)[2] for name in ("caption", "long_caption")}
    # Step (2): a model of short captions
    begin = ["--config_name", str(folder / "configuration"), "--tokenizer_name", str(folder / "tokenizer")]
    short = run_training(folder, "short", *begin, "--max_steps", str(flags.steps), "--learning_rate", "1e-3")
    model, processor = load_pretrained(str(short)), load_processor(short)
    recall = {"before": measure_recall(model, processor, validation, CONTEXT)}
    # Step (3): the same with a longer context
    stretch_text_context(model, LONG_CONTEXT)
    recall["stretched"] = measure_recall(model, processor, validation, LONG_CONTEXT)
    # Step (4): the same, fine-tuned on long and short captions
    fine_tuning = ["--model_name_or_path", str(short), "--max_seq_length", str(LONG_CONTEXT)]
    fine_tuning += ["--long_caption_column", "long_caption", "--max_steps", str(flags.long_steps)]
    long = run_training(folder, "long", *fine_tuning, "--learning_rate", "1e-3")
    model, processor = load_pretrained(str(long)), load_processor(long)
    recall["fine-tuned"] = measure_recall(model, processor, validation, LONG_CONTEXT)
    # Step (5): results
    rows = [
        {"model": stage, "captions": column, **{name: round(value, 2) for name, value in values.items()}}
        for stage, columns in recall.items()
        for column, values in columns.items()
    ]
    record = {
        "rows": rows,
        "chance": round(100 / SET_SIZE, 2),
        "tokens": {name: [int(values.min()), int(values.max())] for name, values in lengths.items()},
        "settings": {name: value for name, value in vars(flags).items() if name not in ("folder", "output_file")},
        "processor_seconds": round(time.process_time() - start, 1),
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)",
        "torch": torch.__version__,
    }
    Path(flags.output_file).write_text(json.dumps(record, indent=2) + "\n")
    print(format_table(rows))
    print(f"written to {flags.output_file}")


if __name__ == "__main__":
    main()
