# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`Result`: one measured figure, and its forms for the terminal, for JSON, for a model card and for the Hub."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from huggingface_hub import EvalResult

# Task types of the Hub.
RETRIEVAL_TASK = "image-text-retrieval"
ZERO_SHOT_TASK = "zero-shot-image-classification"
CLASSIFICATION_TASK = "image-classification"

# Metrics that summarise another one: metric -> (the metric that it summarises, its column in `results_table`).
SUMMARIES = {
    "mean_per_class_accuracy": ("accuracy", "mean per class"),
    "accuracy_spread": ("accuracy", "±"),
}
# Type of a metric in the Hub's metadata, where it differs from the metric.
HUB_METRIC_TYPES = {"mean_per_class_accuracy": "accuracy"}


@dataclass(frozen=True)
class Result:
    """One measured figure.

    Args:
        task: name of the evaluation task, such as "retrieval" or "zero_shot".
        metric: such as "recall", "accuracy", "mean_per_class_accuracy" or "accuracy_spread".
        k: the metric counts a hit among the first k answers; `None` for a metric without k, such as a mean.
        value: in percent.
        split: name of the split that was evaluated, if known.
        setting: the conditions, such as {"direction": "text_to_image"}, {"column": "label", "shots": 4} or
            {"merge_ratio": 0.5}.
        prefix: first part of `name`; the task if not given.
        hub_task: task type in the Hub's metadata.

    Raises:
        ValueError: if the value is not finite.
    """

    task: str
    metric: str
    k: int | None
    value: float
    split: str | None = None
    setting: Mapping[str, Any] = field(default_factory=dict, hash=False)
    prefix: str = ""
    hub_task: str = ZERO_SHOT_TASK

    def __post_init__(self):
        if not math.isfinite(self.value):
            raise ValueError(
                f"{self.name} is {self.value}: a result must be finite. Check the weights and the inputs for NaN."
            )

    @property
    def name(self) -> str:
        """The flat key of logs and of `metric_for_best_model`, such as "text_to_image_recall@1"."""
        suffix = "" if self.k is None else f"@{self.k}"
        return f"{self.prefix or self.task}_{self.metric}{suffix}"

    @property
    def title(self) -> str:
        """`name` in words, for tables and for the Hub."""
        return self.name.replace("_", " ")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "name": self.name,
            "task": self.task,
            "metric": self.metric,
            "k": self.k,
            "value": self.value,
            "split": self.split,
            "setting": dict(self.setting),
        }


def values_by_name(results: Iterable[Result]) -> dict[str, float]:
    """The flat form: `name` -> value."""
    return {result.name: result.value for result in results}


def results_table(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Rows for the terminal: one for each series of figures, with its values at each k and their summaries as columns.

    The mean over k and directions of retrieval is left out: it summarises several rows.
    """
    rows: dict[str, dict[str, Any]] = {}
    for result in results:
        if result.metric == "recall" and result.k is None:
            continue
        metric, column = SUMMARIES.get(result.metric, (result.metric, "value"))
        if result.k is not None:
            column = f"@{result.k}"
        title = f"{result.prefix or result.task}_{metric}".replace("_", " ")
        rows.setdefault(title, {"metric": title})[column] = result.value
    return list(rows.values())


def results_list(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Rows for a model card: the name and the value of each figure."""
    return [{"metric": result.name, "%": round(float(result.value), 2)} for result in results]


def results_by_merge_ratio(results: Iterable[Result]) -> list[dict[str, Any]]:
    """Rows for a model card: one for each merge ratio, with a column for each figure.

    Args:
        results: each has "merge_ratio" in its setting, and may have "patch_tokens", the number left after the last
            layer.
    """
    rows: dict[float, dict[str, Any]] = {}
    for result in results:
        row = rows.setdefault(result.setting["merge_ratio"], {"merge ratio": result.setting["merge_ratio"]})
        if "patch_tokens" in result.setting:
            row["patch tokens left"] = result.setting["patch_tokens"]
        row[f"{result.title} (%)"] = result.value
    return list(rows.values())


def hub_results(results: Sequence[Result], dataset: str) -> list[EvalResult]:
    """The Hub's metadata of each figure, in percent with two decimals.

    Args:
        dataset: the name that is shown, or a Hub id.
    """
    return [
        EvalResult(
            task_type=result.hub_task,
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=result.split,
            metric_type=HUB_METRIC_TYPES.get(result.metric, result.metric),
            metric_name=f"{result.title} (%){_merge_ratio_suffix(result)}",
            metric_value=round(float(result.value), 2),
        )
        for result in results
    ]


def _merge_ratio_suffix(result: Result) -> str:
    ratio = result.setting.get("merge_ratio")
    return "" if ratio is None else f" at merge ratio {ratio:g}"
