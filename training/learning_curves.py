# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Learning curves of a training run, drawn from the log of the Trainer."""

import re
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

# Title of each panel, and a pattern of the log keys that it shows.
PANELS = (
    ("Loss", r"(eval_)?loss|(spatial|frequency|token)_loss"),
    ("Learning rate", r"learning_rate"),
    ("Logit scale", r"(frequency_|token_)?logit_scale"),
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
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, curves) in zip(all_axes, panels, strict=False):
        for key, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=key, marker="o" if len(points) < 30 else None, markersize=3)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in all_axes:  # the last cell of an odd number of panels
        axes.axis("off")
    figure.savefig(path, format="png", dpi=100)
