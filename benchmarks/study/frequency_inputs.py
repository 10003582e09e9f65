# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Other inputs of the frequency stage than the log-amplitude of each patch, and other uses of its embedding.

    python benchmarks/study/frequency_inputs.py --data flickr8k-nano --train_file train.parquet \
        --validation_file validation.parquet

Every variant is the arm "MLIP" with the same number of steps: the number that the result file of the study gives MLIP
for CLIP's compute, or `--steps`. "pixels" is a control: the stage sees the pixels of a patch, so it is a second small
tower without a frequency domain. "no stage" is the arm "MLIP but frequency". "agreement" adds a loss that brings the
spatial and the frequency embedding of an image together, as SLIP does with two views (Mu et al., arXiv 2112.12750).
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from run import RESULTS, describe_gpu, describe_processor, do_runs, run_in_process, steps_of, train_arm
from study_data import StudyData, read_study_data
from torch import nn

from modeling_mlip import modeling_mlip
from modeling_mlip.frequency import POWER_FLOOR, log_amplitude
from modeling_mlip.hub.configurations import named_config
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.losses import info_nce, temperature
from modeling_mlip.training import ModelLosses, Objective, ObjectivePart

ZIG_ZAG = 16  # coefficients per channel that the first DCT variant keeps
AGREEMENT_WEIGHT = 0.5

# Inputs: (B, 3, height, width) and the side of a patch -> (B, N, F)


def patches_of(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """`(B, C, H * side, W * side)` -> `(B, H, W, C, side, side)`."""
    return pixels.unflatten(3, (-1, side)).unflatten(2, (-1, side)).permute(0, 2, 4, 1, 3, 5)


def flatten_patches(features: torch.Tensor) -> torch.Tensor:
    """`(B, H, W, ...)` -> `(B, H * W, F)`."""
    return features.flatten(3).flatten(1, 2)


def raw_pixels(pixels: torch.Tensor, side: int) -> torch.Tensor:
    return flatten_patches(patches_of(pixels, side))


def amplitude_and_phase(pixels: torch.Tensor, side: int) -> torch.Tensor:
    spectrum = torch.fft.rfft2(patches_of(pixels, side), norm="ortho")
    amplitude = (spectrum.abs().square() + POWER_FLOOR).sqrt()
    phases = torch.view_as_real(spectrum / amplitude)
    return torch.cat([flatten_patches(amplitude.log()), flatten_patches(phases)], dim=-1)


def dct_matrix(side: int) -> torch.Tensor:
    """The orthonormal DCT-II, `(side, side)`: row k holds frequency k."""
    position, frequency = torch.arange(side)[None, :], torch.arange(side)[:, None]
    matrix = torch.cos(torch.pi * (position + 0.5) * frequency / side) * (2 / side) ** 0.5
    matrix[0] /= 2**0.5
    return matrix


def zig_zag(side: int) -> torch.Tensor:
    """The indices of `side * side` coefficients in JPEG's order (ITU-T T.81, figure 5)."""
    cells = [(row, column) for row in range(side) for column in range(side)]
    cells.sort(key=lambda cell: (sum(cell), cell[1] if sum(cell) % 2 == 0 else cell[0]))
    return torch.tensor([row * side + column for row, column in cells])


def dct(pixels: torch.Tensor, side: int, num_kept: int | None = None) -> torch.Tensor:
    """Signed DCT coefficients in zig-zag order, compressed: sign(c) log(1 + |c| / 0.1)."""
    matrix = dct_matrix(side).to(pixels.device)
    coefficients = (matrix @ patches_of(pixels, side) @ matrix.T).flatten(4)[..., zig_zag(side)[:num_kept]]
    return flatten_patches(coefficients.sign() * (coefficients.abs() / POWER_FLOOR**0.5).log1p())


def first_dct(pixels: torch.Tensor, side: int) -> torch.Tensor:
    return dct(pixels, side, ZIG_ZAG)


def half_of_the_spectrum(pixels: torch.Tensor, side: int, is_high: bool) -> torch.Tensor:
    """The log-amplitudes of the frequencies above, or up to, a quarter of the sampling rate's half in either axis."""
    rows = torch.fft.fftfreq(side).abs()[:, None].expand(-1, side // 2 + 1)
    columns = torch.fft.rfftfreq(side)[None, :].expand(side, -1)
    chosen = (torch.maximum(rows, columns) > 0.125) == is_high
    amplitudes = log_amplitude(pixels, side).unflatten(2, (pixels.shape[1], *chosen.shape))
    return amplitudes[..., chosen].flatten(2)


def low_pass(pixels: torch.Tensor, side: int) -> torch.Tensor:
    return half_of_the_spectrum(pixels, side, is_high=False)


def high_pass(pixels: torch.Tensor, side: int) -> torch.Tensor:
    return half_of_the_spectrum(pixels, side, is_high=True)


def both_passes(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """Both halves, each normalised by itself."""
    halves = low_pass(pixels, side), high_pass(pixels, side)
    return torch.cat([nn.functional.layer_norm(half, half.shape[-1:]) for half in halves], dim=-1)


def three_scales(pixels: torch.Tensor, side: int) -> torch.Tensor:
    """The log-amplitudes of each patch, of the 2 x 2 patches around it, and of the image's lowest frequencies."""
    H, W = pixels.shape[2] // side, pixels.shape[3] // side
    patch = log_amplitude(pixels, side)
    block = log_amplitude(pixels, 2 * side).unflatten(1, (H // 2, W // 2))
    block = block.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flatten(1, 2)
    spectrum = torch.fft.rfft2(pixels, norm="ortho").abs()
    lowest = torch.cat([spectrum[:, :, : side // 2], spectrum[:, :, -(side // 2) :]], dim=2)[..., : side // 2]
    image = (lowest.square() + POWER_FLOOR).log().flatten(1)[:, None].expand(-1, H * W, -1) / 2
    return torch.cat([nn.functional.layer_norm(each, each.shape[-1:]) for each in (patch, block, image)], dim=-1)


INPUTS: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "log-amplitude": log_amplitude,
    "pixels": raw_pixels,
    "amplitude and phase": amplitude_and_phase,
    "DCT": dct,
    f"DCT, first {ZIG_ZAG}": first_dct,
    "low-pass": low_pass,
    "high-pass": high_pass,
    "low-pass and high-pass": both_passes,
    "three scales": three_scales,
}
VARIANTS = (*INPUTS, "agreement", "no stage")


class Agreement(ObjectivePart):
    """InfoNCE between the spatial and the frequency embeddings of the images of a batch."""

    name = "agreement"

    def rows(self, model, outputs, inputs):
        return outputs.pairs.image_embeds, outputs.pairs.frequency_embeds

    def forward(self, model, rows, columns):
        targets = torch.eye(len(rows[0]), device=rows[0].device)
        losses = [
            info_nce(temperature(model.logit_scale) * this @ other.t(), targets)
            for this, other in ((rows[0], columns[1]), (rows[1], columns[0]))
        ]
        return {"agreement_loss": sum(losses) / 2}


def wide_stage(width: int) -> type[modeling_mlip.MLIPFrequencyStage]:
    """The frequency stage with an input of another width."""

    class WideStage(modeling_mlip.MLIPFrequencyStage):
        def __init__(self, config):
            super().__init__(config)
            self.input_projection = nn.Linear(width, config.frequency_hidden_size)

    return WideStage


def train_variant(data: StudyData, variant: str, seed: int, steps: int, device: str = "cpu") -> dict[str, Any]:
    """Train and evaluate one variant; return its entry of the result file."""
    arm = "MLIP but frequency" if variant == "no stage" else "MLIP"
    features = INPUTS.get(variant, log_amplitude)
    patch_size = data.model.get("patch_size", named_config(data.config).vision_config.patch_size)
    width = features(torch.zeros(1, 3, data.image_size, data.image_size), patch_size).shape[-1]
    objective = Objective([ModelLosses(), Agreement(weight=AGREEMENT_WEIGHT)]) if variant == "agreement" else None
    with (
        mock.patch.object(modeling_mlip, "log_amplitude", features),
        mock.patch.object(modeling_mlip, "MLIPFrequencyStage", wide_stage(width)),
        mock.patch("run.ARMS_AT_ALL_RATIOS", ()),
    ):
        run = train_arm(data, arm, seed, steps, bf16=False, device=device, objective=objective)
    return {"variant": variant, "width": width, **run}


def variants_table(record: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """The metric of each run at several weights of the frequency embedding."""
    return [
        {
            **{"": run["variant"], "seed": run["seed"], "steps": run["steps"]},
            **({"CPU seconds": run["cpu_seconds"]} if "cpu_seconds" in run else {}),
            metric.replace("_", " "): run[metric],
            **{f"weight {w}": values[metric] for w, values in run.get("at_embed_weight", {}).items()},
        }
        for run in record["runs"]
    ]


def parse_variant_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="flickr8k-nano", help="As --data of run.py.")
    parser.add_argument("--train_file", help="Pairs to train on, instead of the source of the data set.")
    parser.add_argument("--validation_file", help="Pairs to evaluate on, instead of the source of the data set.")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, help="Of every variant.")
    parser.add_argument("--parallel", type=int, default=max(os.cpu_count() or 1, 1), help="Number of runs at a time.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--run", nargs=3, metavar=("VARIANT", "SEED", "STEPS"), help="Do one run and print it as JSON.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="Folder of the result file.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = parse_variant_flags(arguments)
    try:
        data = read_study_data(flags.data, flags.train_file, flags.validation_file)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    if flags.run:
        variant, seed, steps = flags.run
        print(json.dumps(train_variant(data, variant, int(seed), int(steps), flags.device)))
        return
    study = RESULTS / f"{data.name}.json"
    if flags.steps is None and not study.is_file():
        raise SystemExit(f"error: {study} does not exist; give --steps, or run the study on {data.name} first.")
    steps = flags.steps or steps_of(json.loads(study.read_text()), "MLIP", "compute")
    path = flags.output_dir / "frequency_inputs" / f"{data.name}.json"
    machine = describe_processor() if flags.device == "cpu" else describe_gpu()
    new_record = {"machine": machine, "device": flags.device, "data": data.record(), "runs": []}
    record = json.loads(path.read_text()) if path.exists() else new_record
    if record["data"] != data.record() or record.get("device", "cpu") != flags.device:
        raise SystemExit(f"{path} holds runs with other settings; move it to another folder to start again.")
    finished = {(run["variant"], run["seed"], run["steps"]) for run in record["runs"]}
    runs = [(variant, seed, steps) for seed in flags.seeds for variant in flags.variants]
    runs = [run for run in runs if run not in finished]
    do_runs(run_in_process(__file__, arguments), runs, flags.parallel, record, path)
    print(format_table(variants_table(record, data.metric)))


if __name__ == "__main__":
    main()
