# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Training and evaluation: `MLIPTrainer` and what `mlip train` and `mlip evaluate` are made of."""

from .arguments import MLIPTrainingArguments
from .objective import ModelLosses, Objective, ObjectivePart
from .trainer import MLIPTrainer

__all__ = ["MLIPTrainer", "MLIPTrainingArguments", "ModelLosses", "Objective", "ObjectivePart"]
