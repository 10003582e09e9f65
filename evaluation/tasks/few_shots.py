# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Few shots: logistic regression on the frozen features of a few random images of each class."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modeling_mlip.hub.results import CLASSIFICATION_TASK, Result

from ..classifiers import SPARE_SHOTS, draw_shots, few_shot_accuracy, require_sklearn
from ..encoders import Encoder
from ..evaluation_split import EvaluationSplit
from ..labels import labels_of
from .accuracy import accuracy_results
from .task import Encodings, Task


@dataclass
class FewShotsOptions:
    """Few-shot classification."""

    shots: list[int] = field(
        default_factory=list,
        metadata={"help": "Numbers of images of each class of the train split to train a classifier on, e.g. 1 4 16."},
    )
    seeds: int = field(default=5, metadata={"help": "Number of random draws of the images of --shots."})

    def __post_init__(self):
        if any(shots < 1 for shots in self.shots):
            raise ValueError(f"shots={list(self.shots)}: choose 1 or more images of each class.")
        if self.seeds < 1:
            raise ValueError(f"seeds={self.seeds}: choose 1 or more.")


class FewShots(Task):
    """Mean accuracy and its standard deviation over random draws, for each label column and number of shots."""

    name = "few_shots"
    Options = FewShotsOptions
    needs_labels = True
    needs_train_split = True

    def is_requested(self, is_captioned: bool, label_columns: list[str]) -> bool:
        return bool(self.options.shots)

    def prepare(self, encoder: Encoder, split: EvaluationSplit) -> None:
        """Raises ImportError without scikit-learn, and ValueError for a class with fewer images than the shots."""
        require_sklearn()
        if not self.options.shots:
            raise ValueError("shots=[]: choose one or more numbers of images of each class, such as [1, 4, 16].")
        self.train_rows(split)

    def train_rows(self, split: EvaluationSplit) -> Tensor:
        """The rows that some draw takes, with spare ones, which replace images that cannot be read."""
        every_row = torch.arange(len(split.train_table))
        draws = [
            draw_shots(labels, max(self.options.shots), seed, classes.names, spare=SPARE_SHOTS)
            for classes in split.classes
            for labels in [labels_of(split.train_table, classes, every_row)]
            for seed in range(self.options.seeds)
        ]
        return torch.cat(draws).unique()

    def metrics(self, encoder: Encoder, split: EvaluationSplit, encodings: Encodings, encoded: Any) -> list[Result]:
        results = []
        train = encodings.train
        for number, (classes, labels) in enumerate(zip(split.classes, encodings.labels, strict=True)):
            for shots in self.options.shots:
                metrics = few_shot_accuracy(
                    train.image_embeds,
                    train.labels[:, number],
                    encodings.pairs.image_embeds,
                    labels,
                    len(classes.names),
                    shots=shots,
                    seeds=self.options.seeds,
                    rows=train.rows,
                    names=classes.names,
                )
                results += accuracy_results(
                    metrics,
                    task=self.name,
                    prefix=f"few_shot_{classes.column}_{shots}_shots",
                    setting={"column": classes.column, "shots": shots, "seeds": self.options.seeds},
                    hub_task=CLASSIFICATION_TASK,
                )
        return results
