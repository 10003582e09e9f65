# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A result has one name, and its forms for the terminal, JSON and the Hub hold the same figure."""

import json
import math

import pytest

from modeling_mlip.hub.results import (
    CLASSIFICATION_TASK,
    RETRIEVAL_TASK,
    Result,
    hub_results,
    results_by_merge_ratio,
    results_list,
    results_table,
    values_by_name,
)

RESULTS = [
    Result("retrieval", "recall", 1, 61.234, "test", {"merge_ratio": 0.5}, "text_to_image", RETRIEVAL_TASK),
    Result("retrieval", "recall", 5, 80.0, "test", {"merge_ratio": 0.5}, "text_to_image", RETRIEVAL_TASK),
    Result("retrieval", "recall", None, 70.0, "test", {"merge_ratio": 0.5}, "mean", RETRIEVAL_TASK),
    Result("zero_shot", "accuracy", 1, 12.5, "test", {"column": "label", "merge_ratio": 0.5}, "zero_shot_label"),
    Result("zero_shot", "mean_per_class_accuracy", None, 10.0, "test", {"merge_ratio": 0.5}, "zero_shot_label"),
    Result("few_shots", "accuracy", 1, 30.0, "test", {"shots": 4}, "few_shot_label_4_shots", CLASSIFICATION_TASK),
    Result("few_shots", "accuracy_spread", None, 2.0, None, {}, "few_shot_label_4_shots", CLASSIFICATION_TASK),
    Result("toy", "distance", None, 3.0),
]
NAMES = [
    "text_to_image_recall@1",
    "text_to_image_recall@5",
    "mean_recall",
    "zero_shot_label_accuracy@1",
    "zero_shot_label_mean_per_class_accuracy",
    "few_shot_label_4_shots_accuracy@1",
    "few_shot_label_4_shots_accuracy_spread",
    "toy_distance",
]


def test_names_are_the_keys_of_logs_and_best_model_selection():
    assert [result.name for result in RESULTS] == NAMES
    assert values_by_name(RESULTS) == dict(zip(NAMES, (result.value for result in RESULTS), strict=True))


def test_the_terminal_table_has_a_row_per_series():
    assert results_table(RESULTS) == [
        {"metric": "text to image recall", "@1": 61.234, "@5": 80.0},
        {"metric": "zero shot label accuracy", "@1": 12.5, "mean per class": 10.0},
        {"metric": "few shot label 4 shots accuracy", "@1": 30.0, "±": 2.0},
        {"metric": "toy distance", "value": 3.0},
    ]


def test_every_result_is_in_the_json_and_in_the_card():
    records = json.loads(json.dumps([result.to_dict() for result in RESULTS]))
    assert [record["name"] for record in records] == NAMES
    assert records[3] == {
        "name": "zero_shot_label_accuracy@1",
        "task": "zero_shot",
        "metric": "accuracy",
        "k": 1,
        "value": 12.5,
        "split": "test",
        "setting": {"column": "label", "merge_ratio": 0.5},
    }
    assert [row["metric"] for row in results_list(RESULTS)] == NAMES


def test_hub_metadata_name_the_task_the_metric_and_the_merge_ratio():
    found = hub_results(RESULTS, "owner/pets")
    assert [(entry.task_type, entry.metric_type, entry.metric_name, entry.metric_value) for entry in found[:5:2]] == [
        ("image-text-retrieval", "recall", "text to image recall@1 (%) at merge ratio 0.5", 61.23),
        ("image-text-retrieval", "recall", "mean recall (%) at merge ratio 0.5", 70.0),
        (
            "zero-shot-image-classification",
            "accuracy",
            "zero shot label mean per class accuracy (%) at merge ratio 0.5",
            10.0,
        ),
    ]
    spread = found[6]
    assert spread.metric_type == "accuracy_spread"  # not an accuracy of the model


def test_results_at_several_merge_ratios_are_a_row_each():
    results = [
        Result("retrieval", "recall", 1, 60 - 10 * ratio, None, {"merge_ratio": ratio, "patch_tokens": 64}, way)
        for ratio in (0, 0.5)
        for way in ("text_to_image", "image_to_text")
    ]
    first, second = results_by_merge_ratio(results)
    assert first == {
        "merge ratio": 0,
        "patch tokens left": 64,
        "text to image recall@1 (%)": 60,
        "image to text recall@1 (%)": 60,
    }
    assert (second["merge ratio"], second["text to image recall@1 (%)"]) == (0.5, 55)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    with pytest.raises(ValueError, match="text_to_image_recall@1 is .*must be finite"):
        Result("retrieval", "recall", 1, value, prefix="text_to_image")
