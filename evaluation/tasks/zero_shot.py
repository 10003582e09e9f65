# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Zero-shot classification: the class whose averaged prompts are nearest to the image."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from modeling_mlip.hub.results import ZERO_SHOT_TASK, Result

from ..embedding import class_embeddings
from ..encoders import Encoder
from ..evaluation_split import EvaluationSplit
from ..metrics import zero_shot_metrics
from ..templates import DEFAULT_TEMPLATES, read_templates
from .accuracy import accuracy_results
from .task import Encodings, Task


@dataclass
class ZeroShotOptions:
    """Zero-shot classification."""

    templates: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Prompts with {} for the class, files with one prompt per line, or lists: default, openai, simple "
            "(openai and simple need open_clip). One for each label column, or any number for the only column."
        },
    )


class ZeroShot(Task):
    """Accuracy for each label column."""

    name = "zero_shot"
    Options = ZeroShotOptions
    needs_labels = True

    def is_requested(self, is_captioned: bool, label_columns: list[str]) -> bool:
        return bool(label_columns) or not is_captioned

    def prepare(self, encoder: Encoder, split: EvaluationSplit) -> None:
        """Raises ValueError for templates that cannot be read or do not fit the label columns."""
        templates_of_columns(split.label_columns, self.options.templates)

    def encode(self, encoder: Encoder, split: EvaluationSplit) -> list[Tensor]:
        """The class embeddings `(C, D)` of each label column."""
        templates = templates_of_columns(split.label_columns, self.options.templates)
        return [
            class_embeddings(
                encoder.model,
                encoder.tokenizer,
                classes.names,
                templates[classes.column],
                encoder.model.device,
                split.max_seq_length,
            )
            for classes in split.classes
        ]

    def metrics(
        self, encoder: Encoder, split: EvaluationSplit, encodings: Encodings, encoded: list[Tensor]
    ) -> list[Result]:
        results = []
        for classes, labels, embeds in zip(split.classes, encodings.labels, encoded, strict=True):
            metrics = zero_shot_metrics(encodings.pairs.image_embeds, labels, embeds, classes.name_ids)
            results += accuracy_results(
                metrics,
                task=self.name,
                prefix=f"zero_shot_{classes.column}",
                setting={"column": classes.column},
                hub_task=ZERO_SHOT_TASK,
            )
        return results


def templates_of_columns(columns: Sequence[str], templates: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The prompt templates of each label column.

    Args:
        templates: one value of `read_templates` for each column, one for all columns, or any number for one column;
            `DEFAULT_TEMPLATES` if empty.

    Raises:
        ValueError: if their numbers do not fit, or as `read_templates`.
    """
    if not templates:
        return dict.fromkeys(columns, DEFAULT_TEMPLATES)
    lists = [read_templates(value) for value in templates]
    if len(columns) <= 1:
        return {column: tuple(template for group in lists for template in group) for column in columns}
    if len(lists) == 1:
        return dict.fromkeys(columns, lists[0])
    if len(columns) != len(lists):
        raise ValueError(
            f"Got {len(lists)} templates for {len(columns)} label columns ({', '.join(columns)}); give one for each, "
            "in the same order, or one for all."
        )
    return dict(zip(columns, lists, strict=True))
