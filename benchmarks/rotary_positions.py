# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Which position a merged token should have in a tower with rotary positions, measured on small trained towers.

    python benchmarks/rotary_positions.py

It trains towers with the layers of EVA-02 on drawn shapes, without merging, to tell shape, colour, texture, size and
place apart: one tower with position embeddings and rotary positions, as EVA-02, and one with rotary positions only.
Then it merges tokens without further training and compares the embeddings, and how often the five answers are right,
with those of all tokens. It takes about seven minutes of one core.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from modeling_mlip import MLIPVisionConfig, MLIPVisionModel
from modeling_mlip.data.shapes import ATTRIBUTES, PLACES, SIZES, draw
from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.formatting import format_table

RESULTS = Path(__file__).parent / "results" / "rotary_positions.json"
NUM_VALUES = [*map(len, ATTRIBUTES.values()), len(SIZES), len(PLACES)]
METHODS = ("ward", "mlip", "tome")
RATIOS = (0.3, 0.5, 0.7)
POSITIONS = ("mean", "largest")
IMAGE_SIZE, PATCH_SIZE = 64, 8


def build_tower(has_position_embeddings: bool) -> MLIPVisionModel:
    """A random tower with the layers of EVA-02; without position embeddings they are zero and not trained."""
    tower = MLIPVisionModel(
        MLIPVisionConfig(
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=3,
            hidden_act="silu",
            use_pre_layernorm=False,
            use_patch_bias=True,
            use_key_bias=False,
            use_gated_mlp=True,
            use_sub_layernorm=True,
            rotary_grid_size=IMAGE_SIZE // PATCH_SIZE,
            frequency_layers=0,
        )
    )
    if not has_position_embeddings:
        nn.init.zeros_(tower.embeddings.position_embedding.weight).requires_grad_(False)
    return tower


def draw_batch(count: int, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values `(count, 3, S, S)`, and the index of each attribute `(count, 5)`."""
    indices = [rng.integers(num_values, size=count) for num_values in NUM_VALUES]
    images = draw(*indices, IMAGE_SIZE, rng)
    pixel_values = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixel_values, torch.from_numpy(np.stack(indices, axis=1))


def train_tower(tower: MLIPVisionModel, classifier: nn.Linear, steps: int, batch_size: int) -> None:
    """Trains the tower and one linear classifier for all attributes."""
    rng = np.random.default_rng(1)
    parameters = [*filter(lambda parameter: parameter.requires_grad, tower.parameters()), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(steps):
        pixel_values, answers = draw_batch(batch_size, rng)
        logits = classifier(tower(pixel_values).pooler_output).split(NUM_VALUES, dim=1)
        loss = sum(cross_entropy(part, answers[:, index]) for index, part in enumerate(logits))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()


@torch.inference_mode()
def count_right(pooled: torch.Tensor, classifier: nn.Linear, answers: torch.Tensor) -> float:
    """The fraction of right answers over all attributes."""
    chosen = [logits.argmax(dim=1) for logits in classifier(pooled).split(NUM_VALUES, dim=1)]
    return (torch.stack(chosen, dim=1) == answers).float().mean().item()


@torch.inference_mode()
def measure_positions(tower: MLIPVisionModel, classifier: nn.Linear, num_images: int = 512) -> list[dict]:
    """For each method, ratio and position: 1 - cosine to the unmerged embedding, and the fraction of right answers.

    "standard error" is that of the difference between both positions.
    """
    pixel_values, answers = draw_batch(num_images, np.random.default_rng(2))
    tower.eval().set_merge_ratio(0)
    unmerged = tower(pixel_values).pooler_output
    rows = [{"method": "none", "merge_ratio": 0.0, "right": round(count_right(unmerged, classifier, answers), 4)}]
    for method in METHODS:
        for ratio in RATIOS:
            row, distances = {"method": method, "merge_ratio": ratio}, {}
            for position in POSITIONS:
                tower.config.merge_method, tower.config.rotary_merged_position = method, position
                tower.set_merge_ratio(ratio)
                pooled = tower(pixel_values).pooler_output
                distances[position] = 1 - (normalize(pooled, dim=1) * normalize(unmerged, dim=1)).sum(dim=1)
                row[position] = round(distances[position].mean().item(), 5)
                row[f"right, {position}"] = round(count_right(pooled, classifier, answers), 4)
            difference = distances["largest"] - distances["mean"]
            row["standard error"] = round((difference.std() / len(difference) ** 0.5).item(), 5)
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each tower")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = {}
    for name, has_position_embeddings in (("position embeddings and rotary", True), ("rotary only", False)):
        torch.manual_seed(0)
        tower, started = build_tower(has_position_embeddings), time.perf_counter()
        classifier = nn.Linear(tower.config.hidden_size, sum(NUM_VALUES))
        train_tower(tower.train(), classifier, arguments.steps, arguments.batch_size)
        rows = results[name] = measure_positions(tower, classifier)
        print(f"{name}: {time.perf_counter() - started:.0f} s, {rows[0]['right']:.1%} right without merging")
        print(format_table(rows[1:]), flush=True)
    write_atomically(arguments.output, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
