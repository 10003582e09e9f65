# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Pictures of evaluation: accuracy over cost, and retrieved images."""

import io
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from modeling_mlip.hub.atomic_files import write_atomically

MARKERS = "osD^vPXhp<>d"  # one for each merge ratio
BASELINE_MARKER = "*"
UNMERGED_COLOR = "#444444"


@dataclass(frozen=True)
class ParetoPoint:
    """Accuracy and cost of one setting of a model.

    Args:
        method: the merge method; "none" for merge ratio 0, whose point belongs to the line of every method.
        merge_ratio: `None` for a model that is a single point.
        accuracy: in percent.
        images_per_second: the median; `_low` and `_high` are the quartiles.
    """

    method: str
    merge_ratio: float | None
    accuracy: float
    images_per_second: float
    images_per_second_low: float
    images_per_second_high: float
    gflops_per_image: float


def plot_pareto(points: Sequence[ParetoPoint], accuracy_label: str, path: str | Path) -> None:
    """Draws accuracy over images per second and over FLOPs as a PNG: a line per method, a marker per merge ratio."""
    ratios = sorted({point.merge_ratio for point in points if point.merge_ratio is not None})
    marker_of = dict(zip(ratios, MARKERS, strict=False))
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    speed_axes, cost_axes = figure.subplots(1, 2, sharey=True)
    handles = []
    for number, (method, line) in enumerate(_lines(points).items()):
        color = f"C{number}"
        _draw_line(speed_axes, [point.images_per_second for point in line], line, number, marker_of)
        _draw_line(cost_axes, [point.gflops_per_image for point in line], line, number, marker_of)
        _draw_quartiles(speed_axes, line, color)
        is_single = line[0].merge_ratio is None
        handles.append(Line2D([], [], color=color, marker=BASELINE_MARKER if is_single else None, label=method))
    for ratio in ratios:
        label = f"merge ratio {ratio:g}"
        handles.append(Line2D([], [], color=UNMERGED_COLOR, linestyle="none", marker=marker_of[ratio], label=label))
    speed_axes.set_xlabel("images per second (bars: quartiles)")
    cost_axes.set_xlabel("GFLOPs per image, fewer to the right")
    for axes in (speed_axes, cost_axes):
        axes.grid(alpha=0.3)
        axes.margins(0.08)
    speed_axes.set_ylabel(accuracy_label)
    cost_axes.invert_xaxis()  # cheaper to the right, as in the other panel
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())


def _lines(points: Sequence[ParetoPoint]) -> dict[str, list[ParetoPoint]]:
    """The points of each method by merge ratio, with the unmerged point where the method has a merge ratio."""
    unmerged = [point for point in points if point.method == "none"]
    methods = list(dict.fromkeys(point.method for point in points if point.method != "none")) or ["none"]
    lines = {}
    for method in methods:
        line = [point for point in points if point.method == method]
        if method != "none" and line[0].merge_ratio is not None:
            line = sorted(unmerged + line, key=lambda point: point.merge_ratio or 0.0)
        lines[method] = line
    return lines


def _draw_line(
    axes: Axes, x: list[float], line: Sequence[ParetoPoint], number: int, marker_of: dict[float, str]
) -> None:
    color = f"C{number}"
    axes.plot(x, [point.accuracy for point in line], color=color, linewidth=1.5, zorder=2)
    for x_value, point in zip(x, line, strict=True):
        marker = BASELINE_MARKER if point.merge_ratio is None else marker_of[point.merge_ratio]
        size = 15 if point.merge_ratio is None else 12 - 2.5 * number  # so that equal points all show
        axes.plot(
            x_value,
            point.accuracy,
            marker=marker,
            markersize=max(size, 5),
            zorder=3 + number,
            color=UNMERGED_COLOR if point.method == "none" else color,
            markeredgecolor="white",
        )


def _draw_quartiles(axes: Axes, line: Sequence[ParetoPoint], color: str) -> None:
    x, y = [point.images_per_second for point in line], [point.accuracy for point in line]
    spread = [
        [point.images_per_second - point.images_per_second_low for point in line],
        [point.images_per_second_high - point.images_per_second for point in line],
    ]
    axes.errorbar(x, y, xerr=spread, fmt="none", ecolor=color, alpha=0.5, capsize=2, zorder=1)


def plot_interpolation(
    accuracies: Mapping[float, tuple[float, float]], chosen: float, names: Sequence[str], path: str | Path
) -> None:
    """Draws accuracy on new data over accuracy on old data as a PNG: a line through the interpolated weights.

    Args:
        accuracies: alpha -> accuracy on the new data, accuracy on the old data, in percent.
        chosen: the alpha that is marked.
        names: of the new and of the old data.
    """
    figure = Figure(figsize=(5.6, 4.8), layout="constrained")
    axes = figure.subplots()
    new, old = zip(*accuracies.values(), strict=True)
    axes.plot(old, new, marker="o", color="C0")
    axes.plot(*reversed(accuracies[chosen]), marker="*", markersize=16, color="C1", label=f"chosen: alpha {chosen:g}")
    for alpha, (new_accuracy, old_accuracy) in accuracies.items():
        axes.annotate(f"{alpha:g}", (old_accuracy, new_accuracy), xytext=(6, 6), textcoords="offset points")
    axes.set_xlabel(f"mean recall on {names[1]} (old data, %)", parse_math=False)
    axes.set_ylabel(f"mean recall on {names[0]} (new data, %)", parse_math=False)
    axes.grid(alpha=0.3)
    axes.margins(0.12)
    axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())


def plot_retrieved_images(
    path: str | Path,
    images: Sequence[Image.Image | np.ndarray],
    captions: Sequence[str],
    image_embeds: Tensor,
    text_embeds: Tensor,
    num_queries: int = 6,
    top: int = 5,
) -> None:
    """Draws the images with the highest scores for captions spread evenly over the data; right images have a green
    frame.

    Args:
        images: N pictures.
        captions: N, each of the image in the same place; images with equal captions are all right.
        image_embeds: (N, D), normalised.
        text_embeds: (N, D), normalised.
    """
    queries = np.linspace(0, len(captions) - 1, min(num_queries, len(captions))).round().astype(int).tolist()
    scores = text_embeds[queries] @ image_embeds.T  # (Q, N)
    ranked_images = scores.topk(min(top, len(images)), dim=1).indices.tolist()  # (Q, top)

    rows, columns = len(ranked_images), 1 + len(ranked_images[0])
    figure = Figure(figsize=(1.7 * columns + 0.8, 1.75 * rows), layout="constrained")
    grid: Any = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": [1.5] + [1] * (columns - 1)})
    for line, query, ranked in zip(grid, queries, ranked_images, strict=True):
        caption = textwrap.shorten(captions[query], 120, placeholder=" ...")
        line[0].text(0, 0.5, textwrap.fill(caption, 24), va="center", fontsize=11, parse_math=False)
        line[0].axis("off")
        for axes, index in zip(line[1:], ranked, strict=True):
            picture = images[index]
            axes.imshow(picture.convert("RGB") if isinstance(picture, Image.Image) else picture, cmap="gray")
            axes.set(xticks=[], yticks=[])
            is_right = captions[index] == captions[query]
            for spine in axes.spines.values():
                spine.set(color="#15a03c" if is_right else "#cccccc", linewidth=5 if is_right else 1)
    figure.savefig(path, format="png", dpi=100)
