# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`Task`: the base class of evaluation tasks, and the encodings that tasks share."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from modeling_mlip.hub.results import Result

from ..embedding import EncodedPairs
from ..encoders import Encoder
from ..evaluation_split import EvaluationSplit


@dataclass
class NoOptions:
    """The options of a task that has none."""


@dataclass(frozen=True)
class TrainFeatures:
    """Features of the train split, for classifiers.

    Args:
        image_embeds: (R, D), normalised.
        labels: (R, C) long, one for each label column.
        rows: (R,) long, the row of each image in the train split.
    """

    image_embeds: Tensor
    labels: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Encodings:
    """What tasks share of one model setting; each is computed once, however many tasks use it.

    Args:
        pairs: the evaluated split, with tokens if a task needs them.
        labels: (I,) long for each label column.
        train: only if a task trains classifiers.
    """

    pairs: EncodedPairs
    labels: list[Tensor]
    train: TrainFeatures | None = None


class Task:
    """One kind of evaluation.

    A new task is a subclass in a file of its own, and an entry in `TASKS`. The runner (1) calls `prepare` of every
    task, (2) encodes what the tasks share, (3) calls `encode` once, and (4) calls `metrics` for each setting of the
    model.

    Class attributes:
        name: name in `evaluate(tasks=...)`, in results and in messages.
        Options: a dataclass; each field is a keyword argument of the task and a flag of `mlip evaluate`, so field names
            are unique among tasks and have a `help` in their metadata. Its `__post_init__` refuses values out of range.
        needs_captions, needs_labels, needs_tokens, needs_train_split: what the runner reads and encodes for the task.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    needs_captions: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    needs_tokens: ClassVar[bool] = False
    needs_train_split: ClassVar[bool] = False

    def __init__(self, **options: Any):
        known = [field.name for field in fields(self.Options)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"{self.name} has no option {unknown[0]!r}; it has {', '.join(known) or 'none'}.")
        self.options = self.Options(**options)

    def is_requested(self, is_captioned: bool, label_columns: list[str]) -> bool:
        """Whether `mlip evaluate` runs the task, by its options and the data set.

        Args:
            is_captioned: whether the data set has a column of captions.
            label_columns: the columns of class labels that the user named.
        """
        raise NotImplementedError

    def prepare(self, encoder: Encoder, split: EvaluationSplit) -> None:
        """Raises ValueError for everything that can be refused before data are encoded."""

    def train_rows(self, split: EvaluationSplit) -> Tensor | None:
        """(R,) long, the rows of the train split whose features the task needs; `None` for no row."""
        return None

    def encode(self, encoder: Encoder, split: EvaluationSplit) -> Any:
        """What the task encodes beside the shared encodings; called once, for all settings of the vision tower."""
        return None

    def metrics(self, encoder: Encoder, split: EvaluationSplit, encodings: Encodings, encoded: Any) -> list[Result]:
        """The results. The runner adds the split and the merge ratio.

        Args:
            encodings: the shared encodings of one setting of the model.
            encoded: what `encode` returned.
        """
        raise NotImplementedError
