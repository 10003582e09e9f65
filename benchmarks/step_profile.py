# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Host synchronisations of a forward pass, phases and operations of a training step, and three forms of attention.

    python benchmarks/step_profile.py --config_name vit-b-16 --batch_size 64

- Synchronisations: each operation for which the host waits for the device, with the line that calls it. On a GPU torch
  reports them (`torch.cuda.set_sync_debug_mode`). On a CPU the operations that pass a tensor's value or a size that
  depends on values to Python are counted instead; a copy from the host to the device is not seen there.
- Phases: seconds of forward pass, losses, backward pass and optimizer, the device waited for after each.
- Operations: those with the largest time on the device by torch's profiler, which also gives the share of the step's
  time in which the device computes. A small share says that the launch of operations limits the speed.
- Towers: seconds of a forward pass in inference, in which the device computes, and the number of operations, for some
  ways of merging.
- Attention: seconds without the sizes of merged tokens, with log(size) as a bias, and with it in one more channel.
"""

import argparse
import json
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPConfig, CLIPModel

from modeling_mlip import MLIPConfig, MLIPModel, MLIPVisionModel
from modeling_mlip.hub.configurations import named_config, override_config
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.modeling_mlip import add_size_channel, log_size_bias

RESULTS = Path(__file__).parent / "results" / "gpu" / "profile.json"
SYNC_WARNING = "called a synchronizing CUDA operation"
# Operations that pass a value, or a size that depends on values, to Python.
READING_OPERATIONS = (
    "aten::_local_scalar_dense",
    "aten::is_nonzero",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::equal",
)
ALL_PARTS = {"merge_ratio": 0.5, "merge_layers": [0, 1, 2], "token_loss_weight": 0.1, "merge_importance_weight": 0.1}
WITHOUT_STAGE = {"frequency_layers": 0, "frequency_loss_weight": 0}
EARLY = {"merge_ratio": 0.5, "merge_layers": [0, 1, 2]}
TOWERS: dict[str, dict[str, Any]] = {
    "no frequency stage, no merging": WITHOUT_STAGE,
    "no merging": {},
    "no frequency stage, 0.5 in layers 0 to 2": {**WITHOUT_STAGE, **EARLY},
    "0.5 in layers 0 to 2": EARLY,
    "no frequency stage, ward at 0.5 in three stages": {**WITHOUT_STAGE, "merge_ratio": 0.5, "merge_method": "ward"},
}
# Operations that compute nothing.
VIEWS = {"view", "expand", "permute", "transpose", "t", "unsqueeze", "squeeze", "slice", "select", "detach", "alias"}
VIEWS |= {"unbind", "split", "as_strided", "view_as_real", "view_as_complex", "unfold", "empty", "split_with_sizes"}
CAPTION_TOKENS = 20
NUM_OPERATIONS = 20


# Synchronisations


class ReadingOperations(TorchDispatchMode):
    """Records the line of code that calls each operation of `READING_OPERATIONS`."""

    def __init__(self):
        super().__init__()
        self.places: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in READING_OPERATIONS:
            frames = [frame for frame in traceback.extract_stack()[:-1] if "/torch/" not in frame.filename]
            self.places.append(f"{Path(frames[-1].filename).name}:{frames[-1].lineno}")
        return function(*args, **(kwargs or {}))


def find_synchronisations(function: Callable[[], Any], device: str) -> list[str]:
    """The places, "file:line", at which a call of `function` waits for the device; one for each time."""
    if device != "cuda":
        with ReadingOperations() as mode:
            function()
        return mode.places
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [f"{Path(each.filename).name}:{each.lineno}" for each in caught if SYNC_WARNING in str(each.message)]


def measure_synchronisations(model: MLIPModel, clip: CLIPModel, batch: dict[str, Any], device: str) -> list[dict]:
    """A row for each kind of forward pass; the first call of each is not counted, because it may fill caches."""
    images, captions = batch["pixel_values"], {name: batch[name] for name in ("input_ids", "attention_mask")}
    without_mask = {"pixel_values": images, "input_ids": batch["input_ids"]}
    passes: dict[str, Callable[[], Any]] = {
        "vision tower": lambda: model.get_image_features(images),
        "text tower": lambda: model.get_text_features(**captions),
        "text tower, no attention mask": lambda: model.get_text_features(batch["input_ids"]),
        "both towers, no attention mask": lambda: model(**without_mask),
        "both towers": lambda: model(**batch),
        "both towers and losses": lambda: model(**batch, return_loss=True),
        "CLIP, both towers": lambda: clip(**batch),
        "CLIP, both towers and loss": lambda: clip(**batch, return_loss=True),
    }
    rows = []
    for name, run in passes.items():
        with autocast_of(device):
            run()
            places = find_synchronisations(run, device)
        rows.append({"pass": name, "synchronisations": len(places), "places": places})
    return rows


# The training step


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def autocast_of(device: str) -> Any:
    return torch.autocast(device, torch.bfloat16) if device == "cuda" else nullcontext()


def training_phases(
    model: MLIPModel, optimizer: torch.optim.Optimizer, batch: dict[str, Any], device: str
) -> dict[str, Callable[[dict[str, Any]], None]]:
    """The phases of a step in their order; each passes values to the next one in the dictionary that it takes."""

    def forward(values: dict[str, Any]) -> None:
        with autocast_of(device):
            values["pairs"] = model(**batch, return_pairs=True).pairs

    def losses(values: dict[str, Any]) -> None:
        with autocast_of(device):
            values["loss"] = model.compute_losses(values["pairs"])["loss"]

    def update(values: dict[str, Any]) -> None:
        optimizer.step()
        optimizer.zero_grad()

    return {
        "forward": forward,
        "losses": losses,
        "backward": lambda values: values["loss"].backward(),
        "optimizer": update,
    }


def time_phases(phases: dict[str, Callable], repetitions: int, device: str) -> dict[str, float]:
    """Median seconds of each phase; a first step is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in phases}
    for _ in range(repetitions + 1):
        values: dict[str, Any] = {}
        for name, run in phases.items():
            synchronise(device)
            start = time.perf_counter()
            run(values)
            synchronise(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: float(torch.tensor(taken[1:]).median()) for name, taken in seconds.items()}


def profile_operations(phases: dict[str, Callable], device: str) -> dict[str, Any]:
    """One step in torch's profiler: seconds by the clock and on the device, and the most expensive operations."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device == "cuda" else [])
    with profile(activities=activities) as profiler:
        start, values = time.perf_counter(), {}
        for run in phases.values():
            run(values)
        synchronise(device)
        seconds = time.perf_counter() - start
    field = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"  # microseconds
    events = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
    events.sort(key=lambda event: getattr(event, field), reverse=True)
    on_device = sum(getattr(event, field) for event in events) / 1e6
    operations = [
        {"operation": event.key, "calls": event.count, "share": getattr(event, field) / 1e6 / max(on_device, 1e-9)}
        for event in events[:NUM_OPERATIONS]
    ]
    calls = sum(event.count for event in events)
    return {"seconds": seconds, "device_seconds": on_device, "calls": calls, "operations": operations}


# Attention


def attention_forms(config: MLIPConfig, batch_size: int, device: str) -> dict[str, Callable[[], torch.Tensor]]:
    """Attention of a layer of the tower after half of its tokens have merged."""
    vision = config.vision_config
    num_patches = (vision.image_size // vision.patch_size) ** 2 // 2
    heads, width = vision.num_attention_heads, vision.hidden_size // vision.num_attention_heads
    shape = (3, batch_size, heads, num_patches + 1, width)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    queries, keys, values = torch.randn(shape, device=device, dtype=dtype).requires_grad_().unbind()
    sizes = torch.randint(1, 5, (batch_size, num_patches), device=device).float()
    bias, scale = log_size_bias(sizes, 1, dtype), width**-0.5

    def in_a_channel() -> torch.Tensor:
        inputs = add_size_channel(queries, keys, values, bias, scale)
        return scaled_dot_product_attention(*inputs, scale=scale)[..., :width]

    return {
        "without sizes": lambda: scaled_dot_product_attention(queries, keys, values, scale=scale),
        "sizes as a bias": lambda: scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=scale),
        "sizes in a channel": in_a_channel,
    }


def time_attention(forms: dict[str, Callable], repetitions: int, device: str) -> list[dict[str, Any]]:
    """Median seconds of the forward pass, and of forward and backward pass."""

    def forward_and_backward(run: Callable[[], torch.Tensor]) -> None:
        run().float().square().sum().backward()

    rows = []
    for name, run in forms.items():
        with torch.no_grad():
            forward = time_phases({"": lambda values, run=run: run()}, repetitions, device)[""]
        both = time_phases({"": lambda values, run=run: forward_and_backward(run)}, repetitions, device)[""]
        rows.append({"attention": name, "forward_seconds": forward, "forward_backward_seconds": both})
    return rows


# Towers


class CountedOperations(TorchDispatchMode):
    """Counts the operations that compute something."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += function._schema.name.split("::")[-1].strip("_") not in VIEWS
        return function(*args, **(kwargs or {}))


@torch.inference_mode()
def measure_towers(config_name: str, batch_size: int, device: str, repetitions: int) -> list[dict[str, Any]]:
    """A row for each entry of `TOWERS`: seconds of a forward pass, seconds in which the device computes, operations."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    rows = []
    for name, overrides in TOWERS.items():
        config = override_config(named_config(config_name), overrides).vision_config
        with torch.device(device):
            tower = MLIPVisionModel(config).to(dtype).eval()
            pixels = torch.randn(batch_size, 3, config.image_size, config.image_size, dtype=dtype)
        tower(pixels)  # warm-up
        with CountedOperations() as operations:
            tower(pixels)
        synchronise(device)
        start = time.perf_counter()
        for _ in range(repetitions):
            tower(pixels)
        synchronise(device)
        seconds = (time.perf_counter() - start) / repetitions
        with profile(activities=activities) as profiler:
            tower(pixels)
            synchronise(device)
        kernels = [each for each in profiler.key_averages() if each.device_type == DeviceType.CUDA]
        on_device = sum(each.self_device_time_total for each in kernels) / 1e6 if device == "cuda" else None
        row = {"tower": name, "seconds": seconds, "device_seconds": on_device, "operations": operations.number}
        rows.append({"batch_size": batch_size, **row})
    return rows


# All of it


def random_pairs(config: MLIPConfig, batch_size: int, device: str) -> dict[str, torch.Tensor]:
    """Random images, and captions of different lengths padded with EOS."""
    text, size = config.text_config, config.vision_config.image_size
    lengths = torch.randint(CAPTION_TOKENS // 2, CAPTION_TOKENS + 1, (batch_size, 1))
    position = torch.arange(CAPTION_TOKENS)
    input_ids = torch.randint(0, min(text.bos_token_id, text.eos_token_id), (batch_size, CAPTION_TOKENS))
    input_ids[:, 0] = text.bos_token_id
    input_ids = torch.where(position < lengths - 1, input_ids, text.eos_token_id)
    batch = {"pixel_values": torch.randn(batch_size, 3, size, size), "input_ids": input_ids}
    batch["attention_mask"] = (position < lengths).long()
    return {name: values.to(device) for name, values in batch.items()}


def clip_like(config: MLIPConfig) -> CLIPModel:
    """transformers' CLIP with the sizes of both towers."""
    known, towers = CLIPConfig(), {}
    for name in ("text_config", "vision_config"):
        values = getattr(config, name).to_dict()
        values.pop("model_type")
        towers[name] = {key: value for key, value in values.items() if hasattr(getattr(known, name), key)}
    return CLIPModel(CLIPConfig(**towers, projection_dim=config.projection_dim))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_name", default="vit-b-16")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    repetitions = 10 if flags.device == "cuda" else 1
    torch.manual_seed(0)
    config = override_config(named_config(flags.config_name), ALL_PARTS)
    model = MLIPModel(config).to(flags.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    batch = random_pairs(config, flags.batch_size, flags.device)
    record: dict[str, Any] = {"config_name": flags.config_name, "batch_size": flags.batch_size, "device": flags.device}
    record["torch"] = torch.__version__

    def add(name: str, value: Any) -> None:
        record[name] = value
        flags.output.parent.mkdir(parents=True, exist_ok=True)
        flags.output.write_text(json.dumps(record, indent=1) + "\n")

    clip: nn.Module = clip_like(config).to(flags.device)
    add("synchronisations", measure_synchronisations(model, clip, batch, flags.device))
    phases = training_phases(model, optimizer, batch, flags.device)
    add("phase_seconds", time_phases(phases, repetitions, flags.device))
    add("profile", profile_operations(phases, flags.device))
    forms = attention_forms(config, flags.batch_size, flags.device)
    add("towers", measure_towers(flags.config_name, flags.batch_size, flags.device, repetitions))
    add("attention", time_attention(forms, repetitions, flags.device))
    print(format_table(record["synchronisations"]))
    print(format_table(record["towers"]))
    print(format_table(record["attention"]))
    print(format_table(record["profile"]["operations"]))
    print(f"written to {flags.output}")


if __name__ == "__main__":
    main()
