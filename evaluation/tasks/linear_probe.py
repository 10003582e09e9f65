# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Linear probe: logistic regression on the frozen features of the whole train split."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modeling_mlip.hub.results import CLASSIFICATION_TASK, Result

from ..classifiers import linear_probe_accuracy, require_sklearn
from ..encoders import Encoder
from ..evaluation_split import EvaluationSplit
from .accuracy import accuracy_results
from .task import Encodings, Task


@dataclass
class LinearProbeOptions:
    """The linear probe."""

    linear_probe: bool = field(
        default=False,
        metadata={"help": "Logistic regression on frozen features of the train split; needs scikit-learn."},
    )


class LinearProbe(Task):
    """Accuracy of a linear classifier for each label column."""

    name = "linear_probe"
    Options = LinearProbeOptions
    needs_labels = True
    needs_train_split = True

    def is_requested(self, is_captioned: bool, label_columns: list[str]) -> bool:
        return self.options.linear_probe

    def prepare(self, encoder: Encoder, split: EvaluationSplit) -> None:
        """Raises ImportError without scikit-learn."""
        require_sklearn()

    def train_rows(self, split: EvaluationSplit) -> Tensor:
        """All rows of the train split."""
        return torch.arange(len(split.train_table))

    def metrics(self, encoder: Encoder, split: EvaluationSplit, encodings: Encodings, encoded: Any) -> list[Result]:
        results = []
        train = encodings.train
        for number, (classes, labels) in enumerate(zip(split.classes, encodings.labels, strict=True)):
            metrics = linear_probe_accuracy(
                train.image_embeds, train.labels[:, number], encodings.pairs.image_embeds, labels, len(classes.names)
            )
            results += accuracy_results(
                metrics,
                task=self.name,
                prefix=f"linear_probe_{classes.column}",
                setting={"column": classes.column, "C": metrics["C"]},
                hub_task=CLASSIFICATION_TASK,
            )
        return results
