# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Learning curves of a training run, drawn from the log of the Trainer."""

import re
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Title of each panel, and a pattern of the log keys that it shows.
PANELS = (
    ("Loss", r"(eval_)?loss|(spatial|frequency|token)_loss"),
    ("Learning rate", r"learning_rate"),
    ("Logit scale", r"(frequency_|token_)?logit_scale"),
    ("Logit bias", r"(frequency_)?logit_bias"),
    ("Retrieval recall (%)", r"eval_.*recall.*"),
    ("Zero-shot accuracy (%)", r"eval_.*accuracy.*"),
)


def plot_learning_curves(log_history: list[dict[str, Any]], path: str | Path) -> None:
    """Draw the values of the Trainer's `log_history` over the steps.

    Args:
        path: the PNG to write. Nothing is written if no panel has a value.
    """
    panels = []
    for title, pattern in PANELS:
        curves: dict[str, list[tuple[int, float]]] = {}
        for entry in log_history:
            for key in filter(re.compile(pattern).fullmatch, entry):
                curves.setdefault(key, []).append((entry["step"], entry[key]))
        if curves:
            panels.append((title, curves))
    if not panels:
        return

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 4 * rows), layout="constrained")
    grid = figure.add_gridspec(rows, columns)
    for number, (title, curves) in enumerate(panels):
        row, column = divmod(number, columns)
        is_alone = number == len(panels) - 1 and column == 0  # the last one of an odd number fills its row
        axes = figure.add_subplot(grid[row, :] if is_alone else grid[row, column])
        axes.set_title(title)
        if all(len(points) == 1 for points in curves.values()):
            _draw_bars(axes, {key: points[0] for key, points in curves.items()})
        else:
            _draw_curves(axes, curves)
    figure.savefig(path, format="png", dpi=100)


def _draw_curves(axes: Axes, curves: dict[str, list[tuple[int, float]]]) -> None:
    for key, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=key, marker="o" if len(points) < 30 else None, markersize=3)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _draw_bars(axes: Axes, values: dict[str, tuple[int, float]]) -> None:
    """Draws values that were logged once as bars with their numbers: a curve of one point shows nothing."""
    steps = sorted({step for step, _ in values.values()})
    bars = axes.barh(list(values), [value for _, value in values.values()], color="C0")
    axes.bar_label(bars, fmt="%.4g", padding=3)
    axes.margins(x=0.15)
    axes.invert_yaxis()  # the first key on top
    axes.set_xlabel(f"logged once, in step {', '.join(map(str, steps))}")
