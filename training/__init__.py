# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Training and evaluation: `MLIPTrainer` and what `mlip train` and `mlip evaluate` are made of."""

from modeling_mlip.hub.extras import require_modules

require_modules("Training", "train")  # before the imports that would fail

from .arguments import MLIPTrainingArguments  # noqa: E402
from .objective import ModelLosses, Objective, ObjectivePart  # noqa: E402
from .trainer import MLIPTrainer  # noqa: E402

__all__ = ["MLIPTrainer", "MLIPTrainingArguments", "ModelLosses", "Objective", "ObjectivePart"]
