# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Results of classification, common to zero-shot classification, linear probes and few shots."""

from collections.abc import Mapping
from typing import Any

from modeling_mlip.hub.results import Result

from ..metrics import ACCURACY_AT


def accuracy_results(
    metrics: Mapping[str, float], *, task: str, prefix: str, setting: Mapping[str, Any], hub_task: str
) -> list[Result]:
    """The results of the metrics that occur among `accuracy@1`, `accuracy@5`, `mean_per_class_accuracy` and
    `accuracy_spread`.

    Args:
        metrics: as `metrics.accuracy_metrics` returns them.
        task, prefix, setting, hub_task: fields of each `Result`.
    """
    keys: list[tuple[str, str, int | None]] = [(f"accuracy@{k}", "accuracy", k) for k in ACCURACY_AT]
    keys += [(metric, metric, None) for metric in ("mean_per_class_accuracy", "accuracy_spread")]
    return [
        Result(task, metric, k, metrics[key], setting=setting, prefix=prefix, hub_task=hub_task)
        for key, metric, k in keys
        if key in metrics
    ]
