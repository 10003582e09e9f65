# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Chooses where and how much a converted image tower merges, for a wanted speed-up."""

import copy
import math
from collections.abc import Callable

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_mlip import MLIPVisionConfig, MLIPVisionModel

# Placements as fractions of the depth, and the highest speed-up up to which each moves the embeddings least
# (benchmarks/results/training_free_merging.json, "speedups").
PLACEMENTS = ((1.65, (0.25, 0.5, 0.75)), (math.inf, (0.0, 0.25, 0.5)))
HIGHEST_RATIO = 0.95
TOLERANCE = 0.003  # of the FLOPs


def place_layers(fractions: tuple[float, ...], num_layers: int) -> list[int]:
    """The layers at these fractions of the depth, each once."""
    return sorted({int(num_layers * fraction) for fraction in fractions})


def build_without_memory(config: MLIPVisionConfig) -> MLIPVisionModel:
    """The tower on the meta device, which computes shapes only."""
    with torch.device("meta"):
        return MLIPVisionModel._from_config(config, attn_implementation="eager").eval()


@torch.no_grad()
def count_flops(tower: MLIPVisionModel) -> int:
    """FLOPs of a tower on the meta device for one image: matrix products, convolutions and attention."""
    config = tower.config
    pixel_values = torch.empty(1, config.num_channels, config.image_size, config.image_size, device="meta")
    with FlopCounterMode(display=False) as counter:
        tower(pixel_values)
    return counter.get_total_flops()


def choose_merging(config: MLIPVisionConfig, speedup: float) -> dict[str, float | list[int]]:
    """The merge layers and the merge ratio with which the tower needs 1 / `speedup` of its FLOPs.

    Args:
        config: the tower; its own merge settings are ignored.
        speedup: FLOPs without merging divided by FLOPs with merging, above 1. On hardware that is busy with matrix
            products, the tower becomes faster by nearly this factor.

    Returns:
        `merge_layers` and `merge_ratio`, rounded to three digits.

    Raises:
        ValueError: if `speedup` is not above 1, or if the tower does not reach it at a merge ratio of 0.95.
    """
    if not 1 < speedup < math.inf:
        raise ValueError(f"speedup={speedup}: choose a factor above 1, for example 1.5, or merge_ratio=0.")
    fractions = next(fractions for highest, fractions in PLACEMENTS if speedup <= highest)
    layers = place_layers(fractions, config.num_hidden_layers)
    return {"merge_layers": layers, "merge_ratio": find_merge_ratio(config, layers, speedup)}


def find_merge_ratio(config: MLIPVisionConfig, merge_layers: list[int], speedup: float) -> float:
    """The merge ratio, rounded to three digits, with which a tower that merges in these layers reaches a speed-up.

    Raises:
        ValueError: if the tower does not reach it at a merge ratio of 0.95.
    """
    config = copy.deepcopy(config)
    config.merge_layers, config.merge_ratio = merge_layers, 0.0
    tower = build_without_memory(config)
    num_patches = (config.image_size // config.patch_size) ** 2
    wanted = count_flops(tower) / speedup

    def excess(merge_ratio: float) -> float:
        """FLOPs above the wanted number, as a fraction of it."""
        tower.set_merge_ratio(merge_ratio)
        return count_flops(tower) / wanted - 1

    high = min(HIGHEST_RATIO, 1 - 1 / num_patches)
    if (at_high := excess(high)) > 0:
        most = speedup / (1 + at_high)
        raise ValueError(
            f"speedup={speedup}: this tower reaches at most {most:.2f}, at a merge ratio of {high:.2f}; choose less."
        )
    return search_merge_ratio(excess, speedup - 1, high, at_high)


def search_merge_ratio(excess: Callable[[float], float], at_zero: float, high: float, at_high: float) -> float:
    """The merge ratio, rounded to three digits, at which `excess` is 0 within `TOLERANCE`.

    FLOPs fall nearly linearly with the ratio, so a few steps of linear interpolation suffice.

    Args:
        excess: FLOPs above the wanted number at a merge ratio, as a fraction of that number.
        at_zero, at_high: its values at 0 and at the merge ratio `high`; 0 or more, and 0 or less.
    """
    low, at_low = 0.0, at_zero
    for _ in range(8):
        middle = low + (high - low) * at_low / (at_low - at_high)
        at_middle = excess(middle)
        if abs(at_middle) < TOLERANCE:
            break
        low, at_low, high, at_high = (
            (middle, at_middle, high, at_high) if at_middle > 0 else (low, at_low, middle, at_middle)
        )
    return round(middle, 3)
