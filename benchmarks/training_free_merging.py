# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""How far merging moves the embeddings of a pretrained tower that was trained without merging.

    python benchmarks/training_free_merging.py --tower dinov2-small --images photographs.parquet

The tower is a `Dinov2Model` folder (a ViT with LayerScale and a class token), loaded into `MLIPVisionModel` without a
frequency stage, or a saved `MLIPModel` or `MLIPVisionModel`. The images are a parquet file with a column `image`. For
each method, placement and merge ratio the benchmark prints and writes:

- damage: mean of 1 - cosine of merged and unmerged embedding, and its standard error over the images;
- neighbours: percentage of images whose nearest other image stays the same;
- speed-up: ratio of the FLOPs without and with merging.

A second table has equal speed-ups in place of ratios, by default with `merge_method="ward"`; `mlip convert --speedup`
follows it. `--tome_code` and `--pitome_code` add the code of the authors (`original_merging.py`). Rows that the output
file already contains are not measured again.
"""

import argparse
import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from original_merging import OriginalMatching, merge_product_flops, merging_by, pitome_matchings, tome_matchings
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import interpolate, normalize
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm
from transformers import AutoImageProcessor, Dinov2Model, PreTrainedConfig

from modeling_mlip import MLIPModel, MLIPVisionConfig, MLIPVisionModel
from modeling_mlip.conversion.speedup import find_merge_ratio, search_merge_ratio
from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.hub.loading import load_saved

RESULTS = Path(__file__).parent / "results" / "training_free_merging.json"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, as DINOv2 was trained
# Layers of 12; scaled to the depth of the tower.
PLACEMENTS = [[3, 6, 9], [6, 7, 8], [2, 5, 8], [1, 3, 5], [0, 1, 2]]
RATIOS = [0.3, 0.5, 0.7]
SPEEDUPS = [1.25, 1.5, 1.75, 2.0, 2.5]
PLACEMENTS_AT_SPEEDUP = [[3, 6, 9], [2, 5, 8], [1, 4, 7], [0, 3, 6], [1, 3, 5], [0, 1, 2], [1, 3, 5, 7, 9]]
PLACEMENT_DEPTH = 12
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


@dataclass(frozen=True)
class Method:
    """How tokens are chosen: the values of `merge_method` and `merge_importance_weight`, or an original matching."""

    merge_method: str = "tome"
    importance_weight: float = 0.0
    original: OriginalMatching | None = None


METHODS = {
    "mlip": Method("mlip"),
    "mlip, guide 0.1": Method("mlip", 0.1),
    "ward": Method("ward"),
    "tome": Method("tome"),
    "elip": Method("elip"),
}


def load_measured_model(folder: str, image_size: int | None) -> tuple[MLIPModel | MLIPVisionModel, int, tuple, tuple]:
    """The model in evaluation mode, its image size, and the mean and standard deviation of its pixel values.

    Args:
        folder: a `Dinov2Model`, or a saved `MLIPModel` or `MLIPVisionModel` with its processor.
        image_size: side in pixels; `None`: 224 for a `Dinov2Model`, and that of a saved model, which cannot change.

    Raises:
        ValueError: if it is another kind of model, or `image_size` is not that of a saved model.
    """
    if PreTrainedConfig.get_config_dict(folder)[0].get("model_type") == "dinov2":
        image_size = image_size or 224
        return load_tower(folder, image_size), image_size, MEAN, STD
    model = load_saved(folder).float().eval()
    if not isinstance(model, MLIPModel | MLIPVisionModel):
        raise ValueError(f"{folder} holds {type(model).__name__}; give a Dinov2Model, MLIPModel or MLIPVisionModel.")
    own_size = tower_of(model).config.image_size
    if image_size not in (None, own_size):
        raise ValueError(f"image_size={image_size}: the model in {folder} takes {own_size}; leave the flag out.")
    processor = AutoImageProcessor.from_pretrained(folder)
    return model, own_size, tuple(processor.image_mean), tuple(processor.image_std)


def tower_of(model: MLIPModel | MLIPVisionModel) -> MLIPVisionModel:
    return model.vision_model if isinstance(model, MLIPModel) else model


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


def load_images(path: str, count: int, image_size: int, mean: tuple = MEAN, std: tuple = STD) -> torch.Tensor:
    """Pixel values `(count, 3, S, S)` of randomly chosen images of a parquet file."""
    rows = datasets.load_dataset("parquet", data_files=path, split="train").select_columns(["image"])
    chosen = np.random.default_rng(0).permutation(len(rows))[:count].tolist()
    steps = [v2.Resize((image_size, image_size), v2.InterpolationMode.BICUBIC), v2.ToImage(),
             v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]  # fmt: skip
    transform = v2.Compose(steps)
    return torch.stack([transform(rows[n]["image"].convert("RGB")) for n in chosen])


def image_embeds_of(model: MLIPModel | MLIPVisionModel, pixel_values: torch.Tensor) -> torch.Tensor:
    """Image embeddings `(B, D)`, not normalised."""
    output = model.get_image_features(pixel_values) if isinstance(model, MLIPModel) else model(pixel_values)
    return output.pooler_output


@torch.inference_mode()
def embed(model: MLIPModel | MLIPVisionModel, pixel_values: torch.Tensor, batch_size: int = 20) -> torch.Tensor:
    """Normalised embeddings `(B, D)`."""
    return normalize(torch.cat([image_embeds_of(model, images) for images in pixel_values.split(batch_size)]), dim=-1)


@torch.inference_mode()
def count_gflops(model: MLIPModel | MLIPVisionModel, pixel_values: torch.Tensor) -> float:
    """GFLOPs for one image; a multiplication and an addition are two. The counter does not know fused attention."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        image_embeds_of(model, pixel_values[:1])
    return counter.get_total_flops() / 1e9


def nearest_neighbours(embeds: torch.Tensor) -> torch.Tensor:
    """`(B,)`: the index of the most similar other image."""
    return (embeds @ embeds.T).fill_diagonal_(-torch.inf).argmax(dim=1)


@contextmanager
def merging(
    model: MLIPModel | MLIPVisionModel, method: Method, layers: list[int], merge_ratio: float
) -> Iterator[None]:
    """Within this context, the model merges by `method`; after it, not at all."""
    tower = tower_of(model)
    tower.config.merge_layers, tower.config.merge_method = layers, method.merge_method
    tower.config.merge_importance_weight = method.importance_weight
    tower.set_merge_ratio(merge_ratio)
    try:
        if method.original is None:
            yield
        else:
            with merging_by(tower, method.original):
                yield
    finally:
        tower.set_merge_ratio(0)


def count_merged_gflops(
    model: MLIPModel | MLIPVisionModel, pixel_values: torch.Tensor, method: Method, layers: list[int], ratio: float
) -> float:
    """GFLOPs for one image with merging; those of an original without the matrix products that replace its indexing."""
    tower = tower_of(model)
    with merging(model, method, layers, ratio):
        gflops = count_gflops(model, pixel_values)
        if method.original is not None:
            gflops -= merge_product_flops(tower, (tower.config.image_size // tower.config.patch_size) ** 2) / 1e9
    return gflops


class Meter:
    """Measures settings of one model on the same images."""

    def __init__(self, model: MLIPModel | MLIPVisionModel, pixel_values: torch.Tensor):
        self.model, self.pixel_values = model, pixel_values
        with merging(model, Method(), [0], 0.0):
            self.unmerged, self.gflops = embed(model, pixel_values), count_gflops(model, pixel_values)
        self.neighbours = nearest_neighbours(self.unmerged)

    def measure(self, method: Method, layers: list[int], merge_ratio: float) -> dict[str, float]:
        """Damage, its standard error, neighbours and speed-up."""
        with merging(self.model, method, layers, merge_ratio):
            merged = embed(self.model, self.pixel_values)
        damage = 1 - (merged * self.unmerged).sum(dim=1)
        return {
            "damage": damage.mean().item(),
            "standard_error": (damage.std() / len(damage) ** 0.5).item(),
            "neighbours": 100 * (nearest_neighbours(merged) == self.neighbours).double().mean().item(),
            "speed_up": self.gflops / count_merged_gflops(self.model, self.pixel_values, method, layers, merge_ratio),
        }

    def measure_at_speedup(self, method: Method, layers: list[int], speedup: float) -> dict[str, float]:
        """`measure` at the merge ratio that reaches a speed-up; raises ValueError if none does."""
        merge_ratio = self.find_ratio(method, layers, speedup)
        return {"merge_ratio": merge_ratio, **self.measure(method, layers, merge_ratio), "speed_up": speedup}

    def find_ratio(self, method: Method, layers: list[int], speedup: float) -> float:
        """The merge ratio with which the tower reaches a speed-up, with the tolerance of `find_merge_ratio`.

        Raises:
            ValueError: if it is not reached; an original removes at most half of the tokens in a layer.
        """
        if method.original is None:
            config = tower_of(self.model).config
            config.merge_method, config.merge_importance_weight = method.merge_method, method.importance_weight
            return find_merge_ratio(config, layers, speedup)

        def excess(merge_ratio: float) -> float:
            """FLOPs above the wanted number, as a fraction of it."""
            gflops = count_merged_gflops(self.model, self.pixel_values, method, layers, merge_ratio)
            return gflops * speedup / self.gflops - 1

        high = min(1 - 0.51 ** len(layers), 0.95)
        if (at_high := excess(high)) > 0:
            raise ValueError(f"speedup={speedup} is not reached in layers {layers} at a merge ratio of {high:.2f}.")
        return search_merge_ratio(excess, speedup - 1, high, at_high)


def scale_placements(placements: list[list[int]], depth: int) -> list[list[int]]:
    """Layers of 12 -> layers of `depth`, each placement once."""
    scaled = [tuple(sorted({layer * depth // PLACEMENT_DEPTH for layer in layers})) for layers in placements]
    return [list(layers) for layers in dict.fromkeys(scaled)]


def add_ratios_to_tome(rows: list[dict[str, Any]]) -> None:
    """Adds `of_tome`, the damage divided by that of `tome` in the same setting, where that was measured."""
    tome = {(*row["layers"], row["merge_ratio"]): row["damage"] for row in rows if row["method"] == "tome"}
    for row in rows:
        if (*row["layers"], row["merge_ratio"]) in tome:
            row["of_tome"] = row["damage"] / tome[(*row["layers"], row["merge_ratio"])]


def resume_record(flags: argparse.Namespace, image_size: int) -> dict[str, Any]:
    """The record of the output file if it is of the same tower and images, or an empty one."""
    head = {
        "tower": Path(flags.tower).name,
        "images": f"{flags.num_images} of {Path(flags.images).parent.name}/{Path(flags.images).name}",
        "image_size": image_size,
    }
    if flags.output.is_file():
        record = json.loads(flags.output.read_text())
        if all(record.get(key) == value for key, value in head.items()):
            return record
    return {**head, "machine": f"{platform.machine()}, torch {torch.__version__}", "rows": [], "speedups": []}


def parse_layers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse_merging_flags(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", required=True, help="Folder of a Dinov2Model, MLIPModel or MLIPVisionModel.")
    parser.add_argument("--images", required=True, help="Parquet file with a column of images.")
    parser.add_argument("--num_images", type=int, default=60, help="How many of them are used.")
    parser.add_argument("--image_size", type=int, help="Side in pixels; 224 by default for a Dinov2Model.")
    parser.add_argument("--tome_code", help="Folder of a clone of facebookresearch/ToMe.")
    parser.add_argument("--pitome_code", help="Folder of a clone of hchautran/PiToMe.")
    parser.add_argument("--methods", nargs="+", help="Names as the tables print them; all by default.")
    parser.add_argument(
        "--placements", nargs="+", type=parse_layers, help="Merge layers, such as 3,6,9 6,7,8; by default as scaled."
    )
    parser.add_argument("--merge_ratios", nargs="*", type=float, default=RATIOS, help="Of the first table.")
    parser.add_argument("--speedups", nargs="*", type=float, default=SPEEDUPS, help="Of the second table.")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file to write.")
    flags = parser.parse_args(arguments)
    if flags.num_images < 2:
        parser.error(f"--num_images {flags.num_images}: give 2 or more, each needs a nearest neighbour.")
    flags.choices = dict(METHODS)
    for folder, matchings in ((flags.tome_code, tome_matchings), (flags.pitome_code, pitome_matchings)):
        if folder:
            flags.choices |= {name: Method(original=matching) for name, matching in matchings(folder).items()}
    for name in flags.methods or []:
        if name not in flags.choices:
            parser.error(f"--methods {name!r}: choose from {', '.join(map(repr, flags.choices))}.")
    return flags


def main(arguments: list[str] | None = None) -> None:
    flags = parse_merging_flags(arguments)
    model, image_size, mean, std = load_measured_model(flags.tower, flags.image_size)
    record = resume_record(flags, image_size)
    meter = Meter(model, load_images(flags.images, flags.num_images, image_size, mean, std))
    depth = tower_of(model).config.num_hidden_layers
    placements = flags.placements or scale_placements(PLACEMENTS, depth)
    at_speedup = flags.placements or scale_placements(PLACEMENTS_AT_SPEEDUP, depth)
    settings = [
        *(("rows", *setting) for setting in product(placements, flags.merge_ratios, flags.methods or flags.choices)),
        *(("speedups", *setting) for setting in product(at_speedup, flags.speedups, flags.methods or ["ward"])),
    ]
    for table, layers, number, name in tqdm(settings, desc="settings"):
        key = {"layers": layers, "method": name, {"rows": "merge_ratio", "speedups": "speed_up"}[table]: number}
        if any(all(row[k] == key[k] for k in key) for row in record[table]):
            continue
        measure = meter.measure if table == "rows" else meter.measure_at_speedup
        try:
            record[table].append({**key, **measure(flags.choices[name], layers, number)})
        except ValueError as error:
            print(f"{name}, {layers}, left out: {error}")
            continue
        add_ratios_to_tome(record["rows"])
        write_atomically(flags.output, json.dumps(record, indent=1) + "\n")
    for rows in (record["rows"], record["speedups"]):
        print(format_table([{**row, "layers": str(row["layers"])} for row in rows]))


if __name__ == "__main__":
    main()
