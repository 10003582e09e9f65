# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from modeling_mlip.hub.atomic_files import write_atomically

# Markers of the points of `plot_pareto`, one for each merge ratio.
MARKERS = "osD^vPXhp<>d"


BASELINE_MARKER = "*"


def plot_pareto(rows: list[dict[str, Any]], metric: str, path: str | Path) -> None:
    """Draws accuracy over images per second and over FLOPs as a PNG: a line for each method, a marker for each ratio.

    Args:
        rows: of `mlip benchmark`: `method`, `merge_ratio` (`None` for a model that is a single point),
            `images_per_second` with its quartiles `images_per_second_low` and `_high`, `gflops_per_image`, and the
            metric. A row of ratio 0 with method "none" belongs to every line.
        metric: the key of the rows that is drawn, in percent.
    """
    ratios = sorted({row["merge_ratio"] for row in rows if row["merge_ratio"] is not None})
    marker_of = dict(zip(ratios, MARKERS, strict=False))
    start = [row for row in rows if row["method"] == "none"]
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "none")) or ["none"]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    all_axes = figure.subplots(1, 2, sharey=True)
    handles = []
    for number, method in enumerate(methods):
        color = f"C{number}"
        own = [row for row in rows if row["method"] == method]
        single = own[0]["merge_ratio"] is None
        line = own if single or method == "none" else sorted(start + own, key=lambda row: row["merge_ratio"])
        for axes, key in zip(all_axes, ("images_per_second", "gflops_per_image"), strict=True):
            x, y = [row[key] for row in line], [row[metric] for row in line]
            axes.plot(x, y, color=color, linewidth=1.5, zorder=2)
            for row in line:
                style = {"color": "#444444" if row["method"] == "none" else color, "markeredgecolor": "white"}
                marker = BASELINE_MARKER if single else marker_of[row["merge_ratio"]]
                size = 15 if single else 12 - 2.5 * number  # of points in one place each shows its rim
                axes.plot(row[key], row[metric], marker=marker, markersize=max(size, 5), zorder=3 + number, **style)
            if key == "images_per_second":
                spread = [
                    [row[key] - row[f"{key}_low"] for row in line],
                    [row[f"{key}_high"] - row[key] for row in line],
                ]
                axes.errorbar(x, y, xerr=spread, fmt="none", ecolor=color, alpha=0.5, capsize=2, zorder=1)
        handles.append(Line2D([], [], color=color, marker=BASELINE_MARKER if single else None, label=method))
    for ratio in ratios:
        handles.append(
            Line2D([], [], color="#444444", linestyle="none", marker=marker_of[ratio], label=f"merge ratio {ratio:g}")
        )
    for axes, label in zip(
        all_axes, ("images per second (bars: quartiles)", "GFLOPs per image, fewer to the right"), strict=True
    ):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.margins(0.08)
    all_axes[0].set_ylabel(f"{metric.replace('_', ' ')} (%)")
    all_axes[1].invert_xaxis()  # cheaper to the right, as in the panel beside it
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())


def retrieval_picture(
    path: str | Path,
    images: Sequence[Image.Image | np.ndarray],
    captions: Sequence[str],
    image_embeds: Tensor,
    text_embeds: Tensor,
    num_queries: int = 6,
    top: int = 5,
) -> None:
    """Draws, for captions spread evenly over the data, the images that score highest; the right ones framed green.

    Args:
        images: N pictures.
        captions: N, each of the image in the same place; images of equal captions are all right.
        image_embeds: (N, D), normalised.
        text_embeds: (N, D), normalised.
    """
    queries = np.linspace(0, len(captions) - 1, min(num_queries, len(captions))).round().astype(int).tolist()
    found = (text_embeds[queries] @ image_embeds.T).topk(min(top, len(images)), dim=1).indices.tolist()  # (Q, top)

    rows, columns = len(found), 1 + len(found[0])
    figure = Figure(figsize=(1.7 * columns + 0.8, 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": [1.5] + [1] * (columns - 1)})
    for line, query, ranked in zip(grid, queries, found, strict=True):
        caption = textwrap.shorten(captions[query], 120, placeholder=" ...")
        line[0].text(0, 0.5, textwrap.fill(caption, 24), va="center", fontsize=11, parse_math=False)
        line[0].axis("off")
        for axes, index in zip(line[1:], ranked, strict=True):
            picture = images[index]
            axes.imshow(picture.convert("RGB") if isinstance(picture, Image.Image) else picture, cmap="gray")
            axes.set(xticks=[], yticks=[])
            right = captions[index] == captions[query]
            for spine in axes.spines.values():
                spine.set(color="#15a03c" if right else "#cccccc", linewidth=5 if right else 1)
    figure.savefig(path, format="png", dpi=100)
