# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Tables are aligned, as text and as Markdown."""

import math

from modeling_mlip.hub.formatting import format_table, format_value

ROWS = [
    {"class": "shape", "accuracy": 71.238, "images": 5},
    {"class": "colour | of\nit", "accuracy": 100.0, "rate": 5e-5},
]


def test_plain_table_is_aligned():
    assert format_table(ROWS).splitlines() == [
        "class           accuracy  images   rate",
        "--------------  --------  ------  -----",
        "shape              71.24       5",
        "colour | of it    100.00          5e-05",
    ]
    assert format_table(ROWS, ["images", "class"]).splitlines()[2:] == ["     5  shape", "        colour | of it"]
    assert format_table([], ["metric"]).splitlines() == ["metric", "------"]


def test_markdown_table_is_aligned_and_no_cell_breaks_it():
    lines = format_table(ROWS, markdown=True).splitlines()
    assert lines[1] == "| --------------- | -------: | -----: | ----: |"
    assert lines[3] == r"| colour \| of it |   100.00 |        | 5e-05 |"
    assert len({len(line) for line in lines}) == 1


def test_a_value_that_is_not_finite_is_shown_as_such():
    assert [format_value(value) for value in (math.nan, math.inf, None, 0.0, True)] == [
        "nan",
        "inf",
        "",
        "0.00",
        "True",
    ]
