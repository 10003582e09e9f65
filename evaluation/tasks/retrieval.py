# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Retrieval: recall@1, @5 and @10 from image to text and from text to image, the latter also by caption length."""

from collections.abc import Mapping
from typing import Any

from modeling_mlip.hub.results import RETRIEVAL_TASK, Result

from ..encoders import Encoder
from ..evaluation_split import EvaluationSplit
from ..metrics import DIRECTIONS, LENGTH_GROUPS, RECALL_AT, retrieval_metrics
from .task import Encodings, Task


class Retrieval(Task):
    """Recall among all images and captions of the split."""

    name = "retrieval"
    needs_captions = True

    def is_requested(self, is_captioned: bool, label_columns: list[str]) -> bool:
        return is_captioned

    def metrics(self, encoder: Encoder, split: EvaluationSplit, encodings: Encodings, encoded: Any) -> list[Result]:
        pairs = encodings.pairs
        metrics = retrieval_metrics(
            pairs.image_embeds,
            pairs.text_embeds,
            pairs.caption_image,
            pairs.caption_ids,
            caption_lengths=pairs.caption_lengths,
        )
        return [*retrieval_results(metrics), *length_results(metrics)]


def retrieval_results(
    metrics: Mapping[str, float],
    *,
    task: str = Retrieval.name,
    key_prefix: str = "",
    name_suffix: str = "",
    setting: Mapping[str, Any] | None = None,
) -> list[Result]:
    """The results of `retrieval_metrics`, or of Trainer's logs of it.

    Args:
        metrics: as `retrieval_metrics` returns it, perhaps with other keys.
        key_prefix: what precedes the keys, such as "eval_" in Trainer's logs.
        name_suffix: added to the first part of the names, such as "_reranked".
        setting: added to the setting of each result.

    Raises:
        KeyError: if a metric is missing.
    """
    results = [
        Result(
            task=task,
            metric="recall",
            k=k,
            value=metrics[f"{key_prefix}{direction}_recall@{k}"],
            setting={"direction": direction, **(setting or {})},
            prefix=f"{direction}{name_suffix}",
            hub_task=RETRIEVAL_TASK,
        )
        for direction in DIRECTIONS
        for k in RECALL_AT
    ]
    mean = Result(
        task=task,
        metric="recall",
        k=None,
        value=metrics[f"{key_prefix}mean_recall"],
        setting={"direction": "mean", **(setting or {})},
        prefix=f"mean{name_suffix}",
        hub_task=RETRIEVAL_TASK,
    )
    return [*results, mean]


def length_results(metrics: Mapping[str, float]) -> list[Result]:
    """The results for groups of captions by length that `retrieval_metrics` returned."""
    return [
        Result(
            task=Retrieval.name,
            metric="recall",
            k=k,
            value=metrics[f"text_to_image_{group}_recall@{k}"],
            setting={"direction": "text_to_image", "caption_length": group},
            prefix=f"text_to_image_{group}",
            hub_task=RETRIEVAL_TASK,
        )
        for group in LENGTH_GROUPS
        if f"text_to_image_{group}_recall@1" in metrics
        for k in RECALL_AT
    ]
