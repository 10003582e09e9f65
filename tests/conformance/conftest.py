# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Puts transformers' own tests on the path, and prints the counts of each class beside CLIP's."""

import sys
from collections import Counter, defaultdict

import pytest
from source import transformers_tests
from transformers.models.auto import modeling_auto

try:
    sys.path.insert(0, str(transformers_tests()))
except RuntimeError as error:
    raise pytest.UsageError(str(error)) from None

# The tests know by these names what a class is for, and treat it accordingly; upstream, MLIP would stand here too.
modeling_auto.MODEL_MAPPING_NAMES |= {
    "mlip": "MLIPModel",
    "mlip_text_model": "MLIPTextModel",
    "mlip_vision_model": "MLIPVisionModel",
}
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["mlip"] = "MLIPForImageClassification"


def pytest_configure(config):
    config.addinivalue_line("filterwarnings", "ignore::pytest.PytestUnknownMarkWarning")  # transformers' own marks


def pytest_terminal_summary(terminalreporter):
    """One line for each test class: passed, failed, skipped."""
    counts = defaultdict(Counter)
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, []):
            counts[report.nodeid.split("::")[1]][outcome] += 1
    terminalreporter.section("passed / failed / skipped")
    for name, count in counts.items():
        terminalreporter.write_line(f"{name:32} {count['passed']:4} / {count['failed']} / {count['skipped']}")
