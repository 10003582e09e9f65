# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""How far merging moves the embeddings of a pretrained tower that was trained without merging.

    python benchmarks/training_free_merging.py --tower dinov2-small --images photographs.parquet

The tower is a `Dinov2Model` folder (a ViT with LayerScale and a class token), loaded into `MLIPVisionModel` without a
frequency stage. The images are a parquet file with a column `image`. For each method, placement and merge ratio the
benchmark prints and writes:

- damage: mean of 1 - cosine of merged and unmerged embedding, and its standard error over the images;
- neighbours: percentage of images whose nearest other image stays the same;
- speed-up: ratio of the FLOPs without and with merging.

A second table compares placements at equal speed-up, with `merge_method="ward"`. `mlip convert --speedup` follows it.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate, normalize
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import Dinov2Model

from modeling_mlip import MLIPVisionConfig, MLIPVisionModel
from modeling_mlip.configuration_mlip import MERGE_METHODS
from modeling_mlip.conversion.speedup import find_merge_ratio
from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.formatting import format_table

RESULTS = Path(__file__).parent / "results" / "training_free_merging.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained
PLACEMENTS = [[3, 6, 9], [6, 7, 8], [2, 5, 8], [1, 3, 5], [0, 1, 2]]
RATIOS = [0.3, 0.5, 0.7]
SPEEDUPS = [1.25, 1.5, 1.75, 2.0, 2.5]
PLACEMENTS_AT_SPEEDUP = [[3, 6, 9], [2, 5, 8], [1, 4, 7], [0, 3, 6], [1, 3, 5], [0, 1, 2], [1, 3, 5, 7, 9]]
# The parameters of a layer: Dinov2's name -> CLIP's name.
LAYER_NAMES = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.out_proj",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def load_tower(folder: str, image_size: int) -> MLIPVisionModel:
    """A `Dinov2Model` as an `MLIPVisionModel` with the same embeddings. The patch bias becomes part of the positions.

    Raises:
        ValueError: if a weight is left over or missing.
    """
    source = Dinov2Model.from_pretrained(folder, dtype=torch.float32)
    config, state = source.config, source.state_dict()
    tower = MLIPVisionModel(
        MLIPVisionConfig(
            image_size=image_size,
            patch_size=config.patch_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.hidden_size * config.mlp_ratio,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            hidden_act="gelu",
            layer_norm_eps=config.layer_norm_eps,
            use_pre_layernorm=False,
            layer_scale_init_value=1.0,
            frequency_layers=0,
        )
    )
    bias = state["embeddings.patch_embeddings.projection.bias"]
    positions = resize_positions(state["embeddings.position_embeddings"][0], image_size // config.patch_size)
    weights = {
        "embeddings.class_embedding": state["embeddings.cls_token"].flatten(),
        "embeddings.patch_embedding.weight": state["embeddings.patch_embeddings.projection.weight"],
        "embeddings.position_embedding.weight": torch.cat([positions[:1], positions[1:] + bias]),
        "post_layernorm.weight": state["layernorm.weight"],
        "post_layernorm.bias": state["layernorm.bias"],
    }
    for n in range(config.num_hidden_layers):
        for theirs, ours in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                weights[f"encoder.layers.{n}.{ours}.{kind}"] = state[f"encoder.layer.{n}.{theirs}.{kind}"]
        for k in (1, 2):
            weights[f"encoder.layers.{n}.layer_scale{k}"] = state[f"encoder.layer.{n}.layer_scale{k}.lambda1"]
    missing, unexpected = tower.load_state_dict(weights, strict=False)
    missing = [name for name in missing if "position_ids" not in name]
    if missing or unexpected:
        raise ValueError(f"{folder}: missing {missing[:3]}, unexpected {unexpected[:3]}; give a Dinov2Model folder.")
    return tower.eval()


def resize_positions(positions: torch.Tensor, side: int) -> torch.Tensor:
    """`(1 + n * n, D)` position embeddings -> `(1 + side * side, D)`, bicubic; the first belongs to the class token."""
    old_side = round((len(positions) - 1) ** 0.5)
    grid = positions[1:].T.view(1, -1, old_side, old_side)
    grid = interpolate(grid, size=(side, side), mode="bicubic", align_corners=False)[0].flatten(1).T
    return torch.cat([positions[:1], grid])


def load_images(path: str, count: int, image_size: int) -> torch.Tensor:
    """Pixel values `(count, 3, S, S)` of randomly chosen images of a parquet file."""
    rows = datasets.load_dataset("parquet", data_files=path, split="train").select_columns(["image"])
    chosen = np.random.default_rng(0).permutation(len(rows))[:count].tolist()
    steps = [v2.Resize((image_size, image_size), v2.InterpolationMode.BICUBIC), v2.ToImage(),
             v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]  # fmt: skip
    transform = v2.Compose(steps)
    return torch.stack([transform(rows[n]["image"].convert("RGB")) for n in chosen])


@torch.inference_mode()
def embed(tower: MLIPVisionModel, pixel_values: torch.Tensor, batch_size: int = 20) -> torch.Tensor:
    """Normalised embeddings `(B, D)`."""
    pooled = [tower(images).pooler_output for images in pixel_values.split(batch_size)]
    return normalize(torch.cat(pooled), dim=-1)


@torch.inference_mode()
def count_gflops(tower: MLIPVisionModel, pixel_values: torch.Tensor) -> float:
    """GFLOPs for one image; a multiplication and an addition are two. The counter does not know fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(pixel_values[:1])
    return counter.get_total_flops() / 1e9


def nearest_neighbours(embeds: torch.Tensor) -> torch.Tensor:
    """`(B,)`: the index of the most similar other image."""
    return (embeds @ embeds.T).fill_diagonal_(-torch.inf).argmax(dim=1)


def measure(tower: MLIPVisionModel, pixel_values: torch.Tensor) -> list[dict[str, Any]]:
    """A row for each placement, ratio and method."""
    unmerged, gflops = embed(tower, pixel_values), count_gflops(tower, pixel_values)
    neighbours = nearest_neighbours(unmerged)
    depth = tower.config.num_hidden_layers
    settings = [
        (layers, ratio, method)
        for layers in PLACEMENTS
        if max(layers) < depth
        for ratio in RATIOS
        for method in MERGE_METHODS
    ]
    rows = []
    for layers, ratio, method in tqdm(settings, desc="settings"):
        tower.config.merge_layers, tower.config.merge_method = layers, method
        tower.set_merge_ratio(ratio)
        merged = embed(tower, pixel_values)
        damage = 1 - (merged * unmerged).sum(dim=1)
        rows.append(
            {
                "layers": layers,
                "merge_ratio": ratio,
                "method": method,
                "damage": damage.mean().item(),
                "standard_error": (damage.std() / len(damage) ** 0.5).item(),
                "neighbours": 100 * (nearest_neighbours(merged) == neighbours).double().mean().item(),
                "speed_up": gflops / count_gflops(tower, pixel_values),
            }
        )
    for row in rows:
        tome = next(r for r in rows if r["method"] == "tome" and all(r[k] == row[k] for k in ("layers", "merge_ratio")))
        row["of_tome"] = row["damage"] / tome["damage"]
    tower.set_merge_ratio(0)
    return rows


def measure_at_speedup(tower: MLIPVisionModel, pixel_values: torch.Tensor) -> list[dict[str, Any]]:
    """A row for each speed-up and placement that reaches it, with `merge_method="ward"`."""
    unmerged = embed(tower, pixel_values)
    depth = tower.config.num_hidden_layers
    rows = []
    for speedup in tqdm(SPEEDUPS, desc="speed-ups"):
        for layers in PLACEMENTS_AT_SPEEDUP:
            if max(layers) >= depth:
                continue
            tower.config.merge_layers, tower.config.merge_method = layers, "ward"
            try:
                merge_ratio = find_merge_ratio(tower.config, layers, speedup)
            except ValueError:
                continue
            tower.set_merge_ratio(merge_ratio)
            damage = 1 - (embed(tower, pixel_values) * unmerged).sum(dim=1)
            tower.set_merge_ratio(0)
            error = (damage.std() / len(damage) ** 0.5).item()
            row = {"speed_up": speedup, "layers": layers, "merge_ratio": merge_ratio}
            rows.append({**row, "damage": damage.mean().item(), "standard_error": error})
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", required=True, help="Folder or Hub id of a Dinov2Model.")
    parser.add_argument("--images", required=True, help="Parquet file with a column of images.")
    parser.add_argument("--num_images", type=int, default=60, help="How many of them are used.")
    parser.add_argument("--image_size", type=int, default=224, help="Side in pixels.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write.")
    flags = parser.parse_args(arguments)
    if flags.num_images < 2:
        parser.error(f"--num_images {flags.num_images}: give 2 or more, each needs a nearest neighbour.")
    tower = load_tower(flags.tower, flags.image_size)
    pixel_values = load_images(flags.images, flags.num_images, flags.image_size)
    rows, at_speedup = measure(tower, pixel_values), measure_at_speedup(tower, pixel_values)
    record = {
        "tower": Path(flags.tower).name,
        "images": f"{flags.num_images} of {Path(flags.images).parent.name}/{Path(flags.images).name}",
        "image_size": flags.image_size,
        "machine": f"{platform.machine()}, torch {torch.__version__}",
        "rows": rows,
        "speedups": at_speedup,
    }
    write_atomically(flags.output, json.dumps(record, indent=1) + "\n")
    for table in (rows, at_speedup):
        print(format_table([{**row, "layers": str(row["layers"])} for row in table]))


if __name__ == "__main__":
    main()
