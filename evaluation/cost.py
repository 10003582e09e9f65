# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Cost of an image encoder: seconds, FLOPs and peak memory of one batch."""

import gc
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .encoders import Encoder

MIB = 2**20
PROC_STATUS, PROC_RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Cost:
    """Cost of the image encoder.

    Args:
        images_per_second: the median over rounds; `_low` and `_high` are the quartiles.
        peak_memory_mib: `None` if it cannot be measured.
    """

    images_per_second: float
    images_per_second_low: float
    images_per_second_high: float
    gflops_per_image: float
    peak_memory_mib: float | None

    def __post_init__(self):
        for name in ("images_per_second", "images_per_second_low", "images_per_second_high", "gflops_per_image"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value}: the measurement failed; it must be finite and above 0.")


def seconds_of(encoder: Encoder, images: Tensor) -> float:
    """Seconds that the image encoder takes for one batch."""
    if images.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    encoder.model.get_image_features(pixel_values=images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gflops_of(encoder: Encoder, images: Tensor) -> float:
    """GFLOPs per image, as torch counts them: matrix products, convolutions and attention.

    A multiplication with its addition counts as two. Fourier transforms and sorting are not counted.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # a fused operation that torch does not count
    try:
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            encoder.model.get_image_features(pixel_values=images)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return counter.get_total_flops() / len(images) / 1e9


def measure_peak_memory(function: Callable[[], Any], on_gpu: bool) -> float | None:
    """Peak memory of a call in MiB beyond the memory in use before it; `None` if it cannot be measured.

    On a GPU, torch's allocator reports it. On Linux it is the growth of the process's resident memory: the kernel keeps
    its high-water mark, which a process can reset (proc(5), clear_refs). Free memory is returned to the kernel first.
    """
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / MIB
    if not os.access(PROC_RESET, os.W_OK):
        return None
    _return_free_memory()
    PROC_RESET.write_text("5")
    before = _high_water_mark()
    function()
    return (_high_water_mark() - before) / MIB


def _return_free_memory() -> None:
    """Returns free memory of the C library to the kernel."""
    import ctypes

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
    if trim is not None:
        trim(0)


def _high_water_mark() -> int:
    """The highest resident memory of the process since the last reset, in bytes."""
    line = next(line for line in PROC_STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
