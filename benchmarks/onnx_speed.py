# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Speed of the files of `mlip export` in onnxruntime, in float32 and int8, as ratios to the model in eager mode.

    OMP_NUM_THREADS=1 python benchmarks/onnx_speed.py --model runs/mine

Speed: a model with random weights (`--config_name`), because speed does not depend on them. One thread; the programs
take turns in random order, a ratio is taken within a round, and the median and the range over rounds are shown.
Seconds are those of the processor that this process gets. Accuracy: the cosine similarity of the embeddings of the int8
files to those of the model on drawn images, and recall@1 of both, for the trained model that `--model` names. Without
`--model`, accuracy is left out.
"""

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from modeling_mlip import MLIPModel
from modeling_mlip.conversion.onnx_export import (
    BATCH_SIZES,
    IMAGE_FILE,
    TEXT_FILE,
    ImageEncoder,
    TextEncoder,
    example_captions,
    example_images,
    export_encoder,
    export_onnx,
    quantize_encoder,
)
from modeling_mlip.data.framed_shapes import framed_shapes_dataset
from modeling_mlip.evaluation.metrics import retrieval_metrics
from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.configurations import named_config
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.hub.loading import load_pretrained, load_processor

RESULTS = Path(__file__).parent / "results" / "onnx_speed.json"
EAGER, FLOAT, INT8 = "eager", "onnxruntime", "onnxruntime, int8"
ROUNDS = {1: 9, 32: 2}  # by batch size


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_name", default="vit-b-32", help="The model whose speed is measured.")
    parser.add_argument("--merge_ratio", type=float, default=0.5, help="Fraction of patch tokens that merge.")
    parser.add_argument("--model", help="A folder of a model that was trained on framed-shapes, as by `make demo`.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)
    record: dict[str, Any] = {
        "machine": f"{platform.machine()}, 1 thread; torch {torch.__version__}, onnxruntime {onnxruntime.__version__}",
        "config_name": flags.config_name,
        "merge_ratio": flags.merge_ratio,
        "accuracy": measure_int8_accuracy(flags.model) if flags.model else None,
        "speed": measure_speeds(flags.config_name, flags.merge_ratio),
    }
    write_atomically(flags.output, json.dumps(record, indent=2) + "\n")
    print(format_table(record["speed"]))
    print(json.dumps(record["accuracy"], indent=2))


# Speed


@torch.inference_mode()
def measure_speeds(config_name: str, merge_ratio: float) -> list[dict[str, Any]]:
    """A row for each tower and batch size: rows per second of eager mode, and ratios to it."""
    torch.manual_seed(0)
    model = MLIPModel(named_config(config_name)).eval()
    model.set_merge_ratio(merge_ratio)
    images = measure_encoder(ImageEncoder(model), partial(example_images, model))
    texts = measure_encoder(TextEncoder(model), partial(example_captions, model))
    return [{"tower": tower} | row for tower, rows in (("image", images), ("text", texts)) for row in rows]


def measure_encoder(encoder: torch.nn.Module, make_inputs: Callable[[int], dict[str, Tensor]]) -> list[dict[str, Any]]:
    """A row for each batch size of `ROUNDS`; `make_inputs` returns the inputs for a batch size."""
    with tempfile.TemporaryDirectory() as folder:
        paths = {FLOAT: Path(folder, "float.onnx"), INT8: Path(folder, "int8.onnx")}
        export_encoder(encoder, [make_inputs(size) for size in BATCH_SIZES], "embeds", paths[FLOAT])
        quantize_encoder(paths[FLOAT], paths[INT8])
        sessions = {name: open_session(path) for name, path in paths.items()}
    rows = []
    for size in ROUNDS:
        inputs = make_inputs(size)
        feeds = {name: value.numpy() for name, value in inputs.items()}
        runners: dict[str, Callable[[], Any]] = {EAGER: lambda inputs=inputs: encoder(**inputs)}
        for name, session in sessions.items():
            runners[name] = lambda session=session, feeds=feeds: session.run(None, feeds)
        rows.append({"batch_size": size} | compare_speed(runners, size, ROUNDS[size]))
    return rows


def open_session(path: Path) -> onnxruntime.InferenceSession:
    """A session with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def compare_speed(runners: dict[str, Callable[[], Any]], batch_size: int, rounds: int) -> dict[str, Any]:
    """Rows per second of eager mode, and for each other runner the median ratio of speeds and the range over rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for number in range(-1, rounds):  # the first round warms up
        for name in random.sample(sorted(runners), len(runners)):
            start = time.process_time()
            runners[name]()
            if number >= 0:
                seconds[name].append(time.process_time() - start)
    row: dict[str, Any] = {"rows_per_second": round(batch_size / statistics.median(seconds[EAGER]), 1)}
    for name in runners:
        if name != EAGER:
            ratios = [eager / own for eager, own in zip(seconds[EAGER], seconds[name], strict=True)]
            row[name] = round(statistics.median(ratios), 2)
            row[f"{name}, range"] = [round(min(ratios), 2), round(max(ratios), 2)]
    return row


# Accuracy


@torch.inference_mode()
def measure_int8_accuracy(folder: str) -> dict[str, Any]:
    """Cosine similarity of int8 embeddings to those of the model, and recall@1 of both, on drawn images."""
    model, processor = load_pretrained(folder).float().eval(), load_processor(folder)
    rows = framed_shapes_dataset(1)["validation"]
    inputs = processor(
        text=list(rows["caption"]),
        images=list(rows["image"]),
        padding="max_length",
        max_length=model.config.text_config.max_position_embeddings,
        truncation=True,
        return_tensors="pt",
    )
    texts = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    exact = {
        IMAGE_FILE: model.get_image_features(inputs["pixel_values"]).pooler_output,
        TEXT_FILE: model.get_text_features(**texts).pooler_output,
    }
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch, "int8")
        export_onnx(folder, target, dtype="int8")
        int8 = {}
        for file, feeds in ((IMAGE_FILE, {"pixel_values": inputs["pixel_values"]}), (TEXT_FILE, texts)):
            [embeds] = open_session(target / file).run(None, {name: value.numpy() for name, value in feeds.items()})
            int8[file] = torch.from_numpy(embeds)
    return {
        "images": len(rows),
        "merge_ratio": model.config.vision_config.merge_ratio,
        "image": describe_cosines(int8[IMAGE_FILE], exact[IMAGE_FILE]),
        "text": describe_cosines(int8[TEXT_FILE], exact[TEXT_FILE]),
        "recall@1, float32": recall_at_1(exact),
        "recall@1, int8": recall_at_1(int8),
    }


def describe_cosines(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Mean and smallest cosine similarity of corresponding rows."""
    cosines = torch.cosine_similarity(ours, theirs)
    return {"mean": round(float(cosines.mean()), 4), "smallest": round(float(cosines.min()), 4)}


def recall_at_1(embeds: dict[str, Tensor]) -> float:
    """Text-to-image recall@1 in percent; image i has caption i."""
    images, texts = embeds[IMAGE_FILE], embeds[TEXT_FILE]
    return round(retrieval_metrics(images, texts, torch.arange(len(images)))["text_to_image_recall@1"], 1)


if __name__ == "__main__":
    main()
