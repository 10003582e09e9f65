# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""An exponential moving average (EMA) of the weights. Evaluation and saving use it instead of the trained weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

TRAINED_WEIGHTS = "trained_weights.pt"


class WeightAverage(TrainerCallback):
    """The EMA of a run. It begins with the starting weights: W_0, then decay * EMA + (1 - decay) * W after each step.

    The trainer's model contains either the trained weights or their average, and this object the other ones:
    `use_trained` and `use_average` exchange them. So the weights in a checkpoint are the average, as evaluated; the
    trained weights lie beside them, in the file `TRAINED_WEIGHTS`.

    Args:
        decay: of the average, between 0 and 1.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self._model: Any = None
        self._other: AveragedModel | None = None  # during a run
        self._uses_average = False

    def begin(self, model: nn.Module, checkpoint: str | None = None, device: torch.device | str = "cpu") -> None:
        """Starts the average of a run.

        Args:
            model: the model of the trainer, without a wrapper; in a resumed run with the weights of the checkpoint.
            checkpoint: the folder that the run is resumed from.
            device: of the model.

        Raises:
            ValueError: if the checkpoint belongs to a run without an average.
        """
        self._model = model
        self._other = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(self.decay))
        self._other.update_parameters(model)  # the first call copies
        self._uses_average = checkpoint is not None
        if checkpoint is not None:
            path = Path(checkpoint) / TRAINED_WEIGHTS
            if not path.is_file():
                raise ValueError(
                    f"{checkpoint} has no {TRAINED_WEIGHTS}: it was saved without ema_decay. Leave out "
                    f"ema_decay={self.decay}, or start a new run from its weights."
                )
            self._load(torch.load(path, map_location=device, weights_only=True), checkpoint)

    def update(self) -> None:
        """Adds the weights after an optimizer step to the average."""
        if self._other is not None:
            self._other.update_parameters(self._model)

    def use_trained(self) -> None:
        """The model gets the trained weights."""
        if self._uses_average:
            self._exchange()

    def use_average(self) -> None:
        """The model gets the average."""
        if self._other is not None and not self._uses_average:
            self._exchange()

    @torch.no_grad()
    def _load(self, saved: dict[str, torch.Tensor], checkpoint: str) -> None:
        trained = self._other_parameters()
        if trained.keys() != saved.keys():
            name = min(trained.keys() ^ saved.keys())
            raise ValueError(
                f"{checkpoint}: this run trains other parameters than the one that saved it, such as {name}; resume "
                "with the same flags."
            )
        for name, parameter in trained.items():
            parameter.copy_(saved[name])

    def _other_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are not in use and that training changes."""
        assert self._other is not None
        return {name: p for name, p in self._other.module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def _exchange(self) -> None:
        others = self._other_parameters()
        for name, ours in self._model.named_parameters():
            if name in others:
                saved = ours.clone()
                ours.copy_(others[name])
                others[name].copy_(saved)
        self._uses_average = not self._uses_average

    def save(self, folder: str) -> None:
        """Writes the trained weights beside a checkpoint, whose weights are the average."""
        assert self._uses_average
        weights = {name: parameter.detach() for name, parameter in self._other_parameters().items()}
        torch.save(weights, Path(folder) / TRAINED_WEIGHTS)

    def on_epoch_end(self, args, state, control, **kwargs):
        # At the end of training, Trainer loads the best checkpoint after this event; the model must keep its weights.
        self.use_average()

    def on_train_end(self, args, state, control, **kwargs):
        self.use_average()
        self._model, self._other, self._uses_average = None, None, False


def check_no_average(checkpoint: str) -> None:
    """Raises ValueError if a checkpoint contains an average, which a run without one would continue from."""
    if (Path(checkpoint) / TRAINED_WEIGHTS).is_file():
        raise ValueError(
            f"{checkpoint} was saved with ema_decay: its weights are an average. Resume with the same ema_decay."
        )
