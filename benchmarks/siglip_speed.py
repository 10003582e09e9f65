# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Images per second of a SigLIP vision tower as MLIP merges its tokens, as ratios to transformers' SigLIP in one run.

    python benchmarks/siglip_speed.py --batch_size 8

Both towers have the geometry of SigLIP B/16 at 224 pixels (196 patches, no class token, attention pooling), eager or
sdpa attention and random weights, on which speed does not depend. `ward` is the merge method that `mlip convert` sets.
Clock, rounds and ratios are those of speed.py.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipConfig, SiglipVisionModel

from modeling_mlip import MLIPConfig, MLIPVisionModel
from modeling_mlip.conversion.transformers_configurations import mlip_config_of_siglip
from modeling_mlip.hub.formatting import format_table

sys.path.insert(0, str(Path(__file__).parent))
from speed import describe_machine, quotient, rounds_of  # noqa: E402

RESULT_FILE = Path(__file__).parent / "results" / "siglip_speed.json"
PLACEMENTS: dict[str, list[int] | None] = {"three stages": None, "layers 0 to 2": [0, 1, 2]}
SIGLIP = "SigLIP (transformers)"


def build_towers(flags: argparse.Namespace, config: SiglipConfig) -> dict[tuple[str, float, str], torch.nn.Module]:
    """(method, ratio, placement) -> tower: that of transformers, and those of MLIP."""
    torch.manual_seed(0)
    attention = {"attn_implementation": flags.attn_implementation}
    towers = {(SIGLIP, 0.0, ""): SiglipVisionModel._from_config(config.vision_config, **attention)}
    settings = [("MLIP", 0.0, "")]
    settings += [(m, r, p) for p in PLACEMENTS for m in flags.merge_methods for r in flags.merge_ratios if r > 0]
    for method, ratio, placement in settings:
        merging = {"merge_ratio": ratio, "merge_layers": PLACEMENTS.get(placement)}
        if ratio > 0:
            merging["merge_method"] = method
        keys = MLIPConfig(**{**mlip_config_of_siglip(config), "frequency_layers": 0, **merging})
        towers[method, ratio, placement] = MLIPVisionModel._from_config(keys.vision_config, **attention)
    return {key: tower.eval().requires_grad_(False) for key, tower in towers.items()}


def measure_siglip(flags: argparse.Namespace, config: SiglipConfig) -> list[dict[str, Any]]:
    """A row for each tower: speed-up over transformers' SigLIP within a round (median and range), and FLOP ratio."""
    towers = build_towers(flags, config)
    size = config.vision_config.image_size
    pixel_values = torch.randn(flags.batch_size, 3, size, size)
    runners: dict[tuple[str, float, str], Callable[[], Any]] = {}
    flops = {}
    for key, tower in towers.items():
        runners[key] = torch.inference_mode()(lambda tower=tower: tower(pixel_values))
        with FlopCounterMode(display=False) as counter:
            runners[key]()
        flops[key] = counter.get_total_flops()
    taken = rounds_of(runners, flags)
    reference = next(iter(towers))
    rows = []
    for key in towers:
        speed_up, flop_ratio = quotient(taken[reference], taken[key]), flops[reference] / flops[key]
        names = dict(zip(("method", "merge_ratio", "placement"), key, strict=True))
        rows.append({**names, "speed_up": speed_up, "flop_ratio": flop_ratio, "share": speed_up["median"] / flop_ratio})
    return rows


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as a table; the speed-up with its range."""
    ranges = ("{median:.2f} ({low:.2f} to {high:.2f})".format(**row["speed_up"]) for row in rows)
    return format_table([{**row, "speed_up": text} for row, text in zip(rows, ranges, strict=True)])


def parse_siglip_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--merge_ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--merge_methods", nargs="+", choices=("ward", "mlip", "tome"), default=["ward", "mlip"])
    parser.add_argument("--attn_implementation", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turn_seconds", type=float, default=0.5, help="A turn repeats short runs for this long.")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--output", type=Path, default=RESULT_FILE)
    return parser.parse_args(arguments, argparse.Namespace(device="cpu"))


def main(arguments: list[str] | None = None, config: SiglipConfig | None = None) -> None:
    flags = parse_siglip_flags(arguments)
    start = os.getloadavg()[0]
    rows = measure_siglip(flags, SiglipConfig() if config is None else config)
    print(format_rows(rows))
    settings = {name: value for name, value in vars(flags).items() if name not in ("output", "device")}
    load = {"start": start, "end": os.getloadavg()[0]}
    record = {"machine": describe_machine(flags), "settings": settings, "load_average": load, "rows": rows}
    flags.output.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {flags.output}")


if __name__ == "__main__":
    main()
