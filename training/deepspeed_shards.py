# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What DeepSpeed's ZeRO-2, which partitions optimizer state and gradients, needs beside transformers' Trainer.

DeepSpeed is imported only where one of its engines exists.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def check_deepspeed_config(config: dict[str, Any], has_objective_parameters: bool = False) -> None:
    """Checks a DeepSpeed file whose "auto" values are filled in.

    Args:
        has_objective_parameters: whether the objective has trained parameters of its own.

    Raises:
        ValueError: if a setting does not work with `MLIPTrainer`.
    """
    for name, flags in (("optimizer", "optim, learning_rate and weight_decay"), ("scheduler", "lr_scheduler_type")):
        if name in config:
            raise ValueError(
                f"deepspeed: the file sets {name!r}, and MLIPTrainer creates it itself. Remove it from the file, and "
                f"set {flags}."
            )
    if config.get("zero_optimization", {}).get("stage") == 3:
        raise ValueError(
            "deepspeed: ZeRO-3 does not save models with scalar parameters, such as the temperatures (DeepSpeed 0.19.8 "
            "sends parameters as bytes, which torch refuses for tensors without axes). Use stage 2, or FSDP2."
        )
    if has_objective_parameters and config.get("fp16", {}).get("enabled") is True:
        raise ValueError(
            "deepspeed: fp16 scales the gradients of the objective's own parameters too. Use bf16, or DDP or FSDP."
        )


@contextmanager
def broadcasting_scalars() -> Iterator[None]:
    """Inside the context DeepSpeed can start an engine of a model with scalar parameters.

    It sends the parameters of the first process to the others as bytes, and torch cannot view a tensor without axes as
    bytes (DeepSpeed 0.19.8). Here scalars have one axis meanwhile.
    """
    from deepspeed.runtime.engine import DeepSpeedEngine

    broadcast = DeepSpeedEngine._broadcast_model

    def broadcast_with_scalars(engine: Any) -> None:
        scalars = [parameter for parameter in engine.module.parameters() if parameter.ndim == 0]
        for scalar in scalars:
            scalar.data = scalar.data.view(1)
        broadcast(engine)
        for scalar in scalars:
            scalar.data = scalar.data.view(())

    DeepSpeedEngine._broadcast_model = broadcast_with_scalars
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = broadcast


@contextmanager
def updating_master_scalars(model: nn.Module) -> Iterator[None]:
    """Changes of a model's scalar parameters inside the context also change the copies that DeepSpeed optimises.

    Otherwise the next step would undo the limit of a temperature: it updates these float32 copies, and then overwrites
    the model's parameters with them.
    """
    from deepspeed.utils import safe_set_full_fp32_param

    scalars = [parameter for parameter in model.parameters(recurse=False) if parameter.numel() == 1]
    before = [scalar.detach().clone() for scalar in scalars]
    yield
    for scalar, value in zip(scalars, before, strict=True):
        if not torch.equal(scalar.detach(), value):
            safe_set_full_fp32_param(scalar, scalar.detach().float().flatten())
