# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Keeps the optimizer from steps whose loss or gradient is not finite, and ends a run that has too many in a row."""

import math
from typing import Any

import torch
from transformers.utils import logging

from modeling_mlip.losses import PairEmbeddings

from .distributed import gather_numbers, gather_strings

logger = logging.get_logger(__name__)

MAX_NAMES = 16


class StepGuard:
    """Judges each step of the optimizer, alike in all processes, and remembers what the refused ones have in common.

    Args:
        max_nonfinite_steps: so many refused steps in a row end the run.
    """

    def __init__(self, max_nonfinite_steps: int):
        self.max_nonfinite_steps = max_nonfinite_steps
        self.skipped_steps = 0
        self._in_a_row = 0
        self._suspects: list[str] = []  # of the refused steps since the last good one
        self._batches: list[tuple[torch.Tensor, list[str], torch.Tensor]] = []  # since the last step

    def watch(self, loss: torch.Tensor, names: list[str], pairs: PairEmbeddings) -> None:
        """Notes one batch of the coming step; nothing waits for the device here.

        Args:
            loss: a scalar.
            names: what its R samples are called.
            pairs: their embeddings.
        """
        with torch.no_grad():
            rows = pairs.image_embeds.sum(dim=1) + pairs.text_embeds.sum(dim=1)  # (R,), finite if all parts are
        self._batches.append((loss.detach().isfinite(), names, rows.isfinite()))

    def refuses(self, grad_norm: torch.Tensor | float, step: int, max_steps: int) -> bool:
        """Whether to skip the step that the batches watched since the last one lead to.

        Args:
            grad_norm: of the whole model, the same in all processes.
            step: steps done before.
            max_steps: steps of the run; a run of which not one step was done fails, however short it is.

        Raises:
            ValueError: if it is to be skipped and so were the `max_nonfinite_steps - 1` before; it names the samples.
        """
        batches, self._batches = self._batches, []
        device = batches[0][0].device if batches else "cpu"
        finite = math.isfinite(grad_norm) and all(bool(loss_is_finite) for loss_is_finite, _, _ in batches)
        if all(count for (count,) in gather_numbers(int(finite), device=device)):
            self._in_a_row, self._suspects = 0, []
            return False

        broken = [name for _, names, rows in batches for name, ok in zip(names, rows.tolist(), strict=True) if not ok]
        suspects = gather_strings(broken) or gather_strings([name for _, names, _ in batches for name in names])
        self.skipped_steps += 1
        self._in_a_row += 1
        self._suspects += [name for name in suspects if name not in self._suspects]
        named = ", ".join(self._suspects[:MAX_NAMES]) + (" ..." if len(self._suspects) > MAX_NAMES else "")
        if self._in_a_row >= min(self.max_nonfinite_steps, max_steps):
            raise ValueError(
                f"The loss or its gradient is not finite at step {step}, {self._in_a_row} in a row; none of these "
                f"steps changed the weights. The samples: {named}. Look at these, lower --learning_rate, or train in "
                "float32 or bfloat16; --max_nonfinite_steps sets how many such steps in a row end a run. "
                "The last checkpoint is whole."
            )
        logger.warning(f"The loss or its gradient is not finite at step {step}, which is skipped. The samples: {named}")
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"skipped_steps": self.skipped_steps, "in_a_row": self._in_a_row, "suspects": self._suspects}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.skipped_steps, self._in_a_row = state["skipped_steps"], state["in_a_row"]
        self._suspects = list(state["suspects"])
