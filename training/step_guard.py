# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Skips optimizer steps whose loss or gradient is not finite, and ends a run with too many of them in a row."""

from typing import Any

import torch
from transformers.utils import logging

from .distributed import gather_numbers, gather_strings
from .mini_batches import floating_tensors

logger = logging.get_logger(__name__)

MAX_LISTED_SAMPLES = 16


class StepGuard:
    """Decides for each optimizer step, equally in all processes, whether it is skipped.

    Args:
        max_nonfinite_steps: number of skipped steps in a row that ends the run.
    """

    def __init__(self, max_nonfinite_steps: int):
        self.max_nonfinite_steps = max_nonfinite_steps
        self.skipped_steps = 0
        self._skipped_in_a_row = 0
        self._suspects: list[str] = []  # samples of the skipped steps since the last good step
        self._batches: list[tuple[torch.Tensor, list[str], torch.Tensor]] = []  # since the last step

    def add_batch(self, loss: torch.Tensor, names: list[str], rows: Any) -> None:
        """Records one batch of the next step, without waiting for the device.

        Args:
            loss: scalar.
            names: names of the R samples.
            rows: nested structure of tensors `(R, ...)` that the loss was computed from.
        """
        rows_finite = torch.ones(len(names), dtype=torch.bool, device=loss.device)
        for tensor in floating_tensors(rows):
            rows_finite &= tensor.detach().isfinite().reshape(len(tensor), -1).all(dim=1).to(loss.device)
        self._batches.append((loss.detach().isfinite(), names, rows_finite))

    def should_skip(self, is_gradient_finite: bool, step: int, max_steps: int) -> bool:
        """Whether the step of the batches added since the last call is skipped.

        Args:
            is_gradient_finite: of the gradients in this process.
            step: number of steps done before.
            max_steps: number of steps of the run. A run whose steps were all skipped fails, however short it is.

        Raises:
            ValueError: if this step and the `max_nonfinite_steps - 1` before it are skipped. It names the samples.
        """
        batches, self._batches = self._batches, []
        device = batches[0][0].device if batches else "cpu"
        is_finite = is_gradient_finite and all(bool(is_loss_finite) for is_loss_finite, _, _ in batches)
        if all(count for (count,) in gather_numbers(int(is_finite), device=device)):
            self._skipped_in_a_row, self._suspects = 0, []
            return False

        broken = [name for _, names, rows in batches for name, ok in zip(names, rows.tolist(), strict=True) if not ok]
        suspects = gather_strings(broken) or gather_strings([name for _, names, _ in batches for name in names])
        self.skipped_steps += 1
        self._skipped_in_a_row += 1
        self._suspects += [name for name in suspects if name not in self._suspects]
        samples = ", ".join(self._suspects[:MAX_LISTED_SAMPLES])
        samples += " ..." if len(self._suspects) > MAX_LISTED_SAMPLES else ""
        if self._skipped_in_a_row >= min(self.max_nonfinite_steps, max_steps):
            raise ValueError(
                f"The loss or its gradient is not finite at step {step}, for {self._skipped_in_a_row} steps in a row. "
                f"These steps did not change the weights. Samples: {samples}. Check them, lower learning_rate, or "
                "train in float32 or bfloat16. max_nonfinite_steps sets how many such steps in a row end a run."
            )
        logger.warning(f"The loss or its gradient is not finite at step {step}: step skipped. Samples: {samples}")
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "skipped_steps": self.skipped_steps,
            "skipped_in_a_row": self._skipped_in_a_row,
            "suspects": self._suspects,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped_steps, self._skipped_in_a_row = state["skipped_steps"], state["skipped_in_a_row"]
        self._suspects = list(state["suspects"])
