# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Accuracies become records, each with its own metric, k and setting."""

from modeling_mlip.evaluation.tasks.accuracy import accuracy_results


def test_each_metric_that_was_measured_becomes_one_record():
    metrics = {"accuracy@1": 50.0, "mean_per_class_accuracy": 40.0, "other": 1.0}
    setting = {"label_column": "colour"}
    first, second = accuracy_results(
        metrics,
        task="zero_shot",
        prefix="zero_shot_colour",
        setting=setting,
        hub_task="zero-shot-image-classification",
    )
    assert (first.metric, first.k, first.value) == ("accuracy", 1, 50.0)
    assert (second.metric, second.k, second.value) == ("mean_per_class_accuracy", None, 40.0)
    assert first.name == "zero_shot_colour_accuracy@1" and first.setting == setting
