# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What a run logs between two log events: losses by name, pairs, speed, and the tokens of each layer."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator

from .distributed import gather_numbers


class TrainingLog:
    """Accumulates the figures of training steps. Time spent in `paused` contexts does not count.

    Attributes:
        num_truncated: captions of this process that were cut, over the whole run.
        total_pairs: pairs of this process, over the whole run since it was started or resumed.
    """

    def __init__(self, device: torch.device | str):
        self.device = device
        self.num_truncated = 0
        self.total_pairs = 0
        self._started_at: float | None = None
        self._tokens_by_layer: list[int] = []
        self._reset()

    def _reset(self) -> None:
        self._loss_sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        self._num_steps = torch.zeros((), device=self.device)
        self._num_pairs = 0

    @property
    def is_empty(self) -> bool:
        return self._num_pairs == 0

    def add_batch(self, num_pairs: int, num_truncated: int) -> None:
        """Counts the pairs of one batch and those of its captions that were cut."""
        self._started_at = time.perf_counter() if self._started_at is None else self._started_at
        self._num_pairs += num_pairs
        self.total_pairs += num_pairs
        self.num_truncated += num_truncated

    def add_losses(self, losses: dict[str, torch.Tensor]) -> None:
        """Adds the named losses of one batch, if the total is finite."""
        is_finite = losses["loss"].detach().isfinite()
        for name, loss in losses.items():
            if name != "loss":
                self._loss_sums[name] += loss.detach().where(is_finite, 0.0)
        self._num_steps += is_finite

    def set_tokens(self, num_patches: int, tokens_removed: list[int]) -> None:
        """Records the patch tokens of the current step, before and after each layer."""
        self._tokens_by_layer = []
        for removed in tokens_removed:
            num_patches -= removed
            self._tokens_by_layer.append(num_patches)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Excludes the time inside the context from the speed."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._started_at is not None:
                self._started_at += time.perf_counter() - start

    def summarize(self, accelerator: Accelerator) -> dict[str, float]:
        """Means and sums over all processes since the last call: named losses, `images_per_second`,
        `truncated_captions` of the whole run and `vision_tokens_layer_N`."""
        num_steps = accelerator.reduce(self._num_steps, "mean")
        sums = {name: accelerator.reduce(total, "mean") for name, total in self._loss_sums.items()}
        logs = {name: (total / num_steps).item() for name, total in sums.items()} if num_steps else {}
        by_process = gather_numbers(self._num_pairs, self.num_truncated, device=self.device)
        num_pairs, num_truncated = (float(sum(numbers)) for numbers in zip(*by_process, strict=True))
        now = time.perf_counter()
        logs["images_per_second"] = num_pairs / (now - (self._started_at or now))
        logs["truncated_captions"] = num_truncated
        logs |= {f"vision_tokens_layer_{n}": float(count) for n, count in enumerate(self._tokens_by_layer)}
        self._reset()
        self._started_at = now
        return logs
