# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What the runs of recipes/ would cost: an estimate from FLOPs, not a measurement of time.

    python benchmarks/training_cost.py

FLOPs of the forward pass of one pair are counted by torch at 224 pixels and with captions of 77 tokens, as if every one
were of full length; a backward pass counts twice a forward pass, and mini-batches another forward pass. Hours are
FLOPs / (peak of the accelerator * utilisation); the utilisation is assumed.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from modeling_mlip import MLIPModel
from modeling_mlip.hub.configurations import named_config, override_config
from modeling_mlip.hub.formatting import format_table

RESULTS = Path(__file__).parent / "results" / "training_cost.json"
CAPTION_LENGTH = 77
# Recipe -> configuration, its pairs per epoch in millions, epochs, pairs per step, accelerators, with mini-batches.
RUNS = {
    "one_gpu.sh: CC3M": ("vit-b-32", 2.9, 32, 1024, 1, True),
    "eight_gpus.sh: CC12M": ("vit-b-32", 10.9, 32, 4096, 8, False),
    "eight_gpus.sh: CC12M, ViT-B/16": ("vit-b-16", 10.9, 32, 4096, 8, True),
    "several_nodes.sh: YFCC15M, ViT-B/16": ("vit-b-16", 14.8, 32, 8192, 32, False),
}
MERGE_RATIO = 0.5
PEAKS = {"A100": 312e12, "H100": 989e12}  # bfloat16, dense, as NVIDIA's data sheets have them


def pair_flops(name: str, merge_ratio: float) -> float:
    """FLOPs of the forward pass of one pair, without the losses."""
    config = override_config(named_config(name), {"merge_ratio": merge_ratio})
    model = MLIPModel(config).eval()
    size = config.vision_config.image_size
    ids = torch.randint(0, config.text_config.vocab_size - 2, (1, CAPTION_LENGTH))
    ids[:, -1] = config.text_config.eos_token_id
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(pixel_values=torch.zeros(1, 3, size, size), input_ids=ids)
    return counter.get_total_flops()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--utilisation", type=float, default=0.3, help="Share of the peak that training reaches.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    rows = []
    for run, (name, millions, epochs, batch, accelerators, mini_batches) in RUNS.items():
        flops = pair_flops(name, MERGE_RATIO)
        passes = 4 if mini_batches else 3
        total = passes * flops * millions * 1e6 * epochs
        row = {
            "recipe": run,
            "steps": round(millions * 1e6 * epochs / batch),
            "GFLOPs forward": flops / 1e9,
            "EFLOPs in all": total / 1e18,
        }
        for accelerator, peak in PEAKS.items():
            hours = total / (peak * flags.utilisation) / 3600
            row |= {f"{accelerator} hours": hours, f"on {accelerators} {accelerator}": hours / accelerators}
        rows.append(row)
    shown = [{key: value for key, value in row.items() if not key.startswith("on ")} for row in rows]
    print(format_table(shown))
    record = {"merge_ratio": MERGE_RATIO, "utilisation, assumed": flags.utilisation, "estimates": rows}
    flags.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
