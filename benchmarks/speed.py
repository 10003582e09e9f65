# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Images per second of the vision tower at several merge ratios, as ratios against transformers' CLIP in the same run.

    python benchmarks/speed.py --config_name vit-b-16 --batch_size 8

All models take turns, round after round, so that a machine that slows down slows all of them; a ratio is taken within a
round, and the median and the range over rounds are shown. FLOPs are counted by torch. Random weights: speed does not
depend on them.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPVisionConfig, CLIPVisionModel

from modeling_mlip import MLIPVisionModel
from modeling_mlip.training.configs import named_config, override_config
from modeling_mlip.training.report import format_table

RESULTS = Path(__file__).parent / "results" / "speed.json"


def build(flags: argparse.Namespace) -> dict[str, torch.nn.Module]:
    """The towers by name: CLIP, MLIP at each ratio, and MLIP without the frequency stage at ratio 0."""
    config = named_config(flags.config_name)
    keys = config.vision_config.to_dict()
    keys.pop("model_type")
    clip = CLIPVisionConfig(**{name: value for name, value in keys.items() if hasattr(CLIPVisionConfig(), name)})
    towers: dict[str, torch.nn.Module] = {"transformers CLIP": CLIPVisionModel(clip)}
    plain = override_config(config, {"frequency_layers": 0}).vision_config
    towers["MLIP 0, no frequency stage"] = MLIPVisionModel(plain)
    for ratio in flags.merge_ratios:
        overrides: dict[str, Any] = {"merge_ratio": ratio}
        if flags.merge_layers:
            overrides["merge_layers"] = flags.merge_layers
        towers[f"MLIP {ratio:g}"] = MLIPVisionModel(override_config(config, overrides).vision_config)
    dtype = torch.bfloat16 if flags.bf16 else torch.float32
    return {name: tower.eval().to(flags.device, dtype) for name, tower in towers.items()}


def seconds_of(tower: torch.nn.Module, pixels: torch.Tensor, device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    tower(pixels)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def measure(flags: argparse.Namespace) -> list[dict[str, Any]]:
    towers = build(flags)
    size = next(iter(towers.values())).config.image_size
    dtype = torch.bfloat16 if flags.bf16 else torch.float32
    pixels = torch.randn(flags.batch_size, 3, size, size, device=flags.device, dtype=dtype)
    flops = {}
    for name, tower in towers.items():
        with FlopCounterMode(display=False) as counter:
            tower(pixels)  # a warm-up too
        flops[name] = counter.get_total_flops()
    taken: dict[str, list[float]] = {name: [] for name in towers}
    for _ in tqdm(range(flags.rounds), desc="rounds"):
        for name, tower in towers.items():
            taken[name].append(seconds_of(tower, pixels, flags.device))
    reference, *_ = towers
    rows = []
    for name, seconds in taken.items():
        ratios = sorted(clip / mine for clip, mine in zip(taken[reference], seconds, strict=True))
        flop_ratio = flops[reference] / flops[name]
        rows.append(
            {
                "vision tower": name,
                "GFLOPs per image": flops[name] / flags.batch_size / 1e9,
                "images/s": flags.batch_size / statistics.median(seconds),
                "speed-up": statistics.median(ratios),
                "range": f"{ratios[0]:.2f} to {ratios[-1]:.2f}",
                "FLOP ratio": flop_ratio,
                "speed-up / FLOP ratio": statistics.median(ratios) / flop_ratio,
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_name", default="vit-b-16", help="tiny, vit-b-32, vit-b-16 or vit-l-14.")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--merge_ratios", type=float, nargs="+", default=[0.0, 0.3, 0.5, 0.7])
    parser.add_argument("--merge_layers", type=int, nargs="+", help="Where; three stages over the depth if not given.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    flags = parser.parse_args()
    rows = measure(flags)
    print(format_table(rows))
    device = torch.cuda.get_device_name() if flags.device == "cuda" else f"{platform.machine()}, {os.cpu_count()} cores"
    RESULTS.parent.mkdir(exist_ok=True)
    history = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    settings = {**vars(flags), "machine": device, "torch": torch.__version__}
    history = [entry for entry in history if entry["settings"] != settings]
    RESULTS.write_text(json.dumps([*history, {"settings": settings, "rows": rows}], indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
