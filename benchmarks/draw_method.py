# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Draws the figure of docs/method.md: the parts of the model and the tensors between them.

python benchmarks/draw_method.py --output docs/images/method.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from modeling_mlip.frequency import half_spectrum_shape, log_amplitude

GRID, PATCH = 6, 16  # patches in a row, pixels in a row of a patch
SPATIAL, FREQUENCY, TEXT, LOSS, PLAIN = "#cfe0f5", "#fbdcc4", "#d9ecd0", "#f3d3de", "#eeeeee"
HEIGHT = 0.95  # of a box


def example_image() -> np.ndarray:
    """`(96, 96)` values from 0 to 1: a striped disc on a plain ground."""
    y, x = np.mgrid[: GRID * PATCH, : GRID * PATCH] / (GRID * PATCH) - 0.5
    stripes = 0.5 + 0.45 * np.sin(2 * np.pi * 15 * (x + 0.6 * y))
    return np.where(np.hypot(x + 0.02, y) < 0.36, stripes, 0.75)


def amplitude_image(image: np.ndarray) -> np.ndarray:
    """`(96, 54)`: the log-amplitude spectrum of every patch in the place of the patch, frequency 0 at the left."""
    pixel_values = torch.from_numpy(image).float()[None, None] * 4 - 2  # about as an image processor normalises
    amplitude = log_amplitude(pixel_values, PATCH)[0].unflatten(0, (GRID, GRID))
    amplitude = amplitude.unflatten(2, half_spectrum_shape(PATCH, PATCH)).roll(PATCH // 2, dims=2)
    return amplitude.permute(0, 2, 1, 3).flatten(2).flatten(0, 1).numpy()


def add_picture(axes: Axes, picture: np.ndarray, x: float, y: float, title: str) -> None:
    """A picture with its patch grid, of side 1.7, centred at (x, y)."""
    left, right, bottom, top = x - 0.85, x + 0.85, y - 0.85, y + 0.85
    axes.imshow(picture, cmap="gray", extent=(left, right, bottom, top), zorder=2, aspect="auto")
    for line in np.linspace(0, 1.7, GRID + 1):
        axes.plot([left + line, left + line], [bottom, top], color="white", linewidth=0.8, zorder=3)
        axes.plot([left, right], [bottom + line, bottom + line], color="white", linewidth=0.8, zorder=3)
    axes.text(x, top + 0.1, title, ha="center", va="bottom", fontsize=9)


def add_box(axes: Axes, x: float, y: float, width: float, text: str, colour: str, height: float = HEIGHT) -> None:
    """A rounded box with centred text, its left edge at `x` and its centre at height `y`."""
    style = "round,pad=0,rounding_size=0.1"
    box = FancyBboxPatch((x, y - height / 2), width, height, boxstyle=style, facecolor=colour, edgecolor="#555555")
    axes.add_patch(box)
    axes.text(x + width / 2, y, text, ha="center", va="center", fontsize=9, linespacing=1.35)


def add_arrow(axes: Axes, *points: tuple[float, float], label: str = "") -> None:
    """An arrow along straight lines from the first point to the last, with a label above its first line."""
    for start, end in zip(points[:-2], points[1:-1], strict=True):
        axes.plot(*zip(start, end, strict=True), color="#333333", linewidth=1.1, solid_capstyle="round")
    arrow = {"arrowstyle": "-|>", "color": "#333333", "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", xy=points[-1], xytext=points[-2], arrowprops=arrow)
    if label:
        (x1, y1), (x2, _) = points[:2]
        axes.text((x1 + x2) / 2, y1 + 0.07, label, ha="center", va="bottom", fontsize=8, color="#333333")


def draw_image_side(axes: Axes, image: np.ndarray) -> None:
    add_picture(axes, image, 1.0, 6.0, "pixels, in patches")
    add_picture(axes, amplitude_image(image), 1.0, 2.9, "log-amplitude of each patch")
    add_arrow(axes, (1.0, 5.1), (1.0, 4.1))
    # Spatial stream
    add_box(axes, 2.7, 6.0, 1.5, "patch\nembedding", SPATIAL)
    add_box(axes, 5.0, 6.0, 3.7, "", PLAIN, height=1.7)
    for x, text, colour in ((5.1, "attention", SPATIAL), (6.35, "merge\ntokens", FREQUENCY), (7.6, "MLP", SPATIAL)):
        add_box(axes, x, 5.85, 1.0, text, colour, height=0.9)
    add_arrow(axes, (6.1, 5.85), (6.35, 5.85))
    add_arrow(axes, (7.35, 5.85), (7.6, 5.85))
    axes.text(6.85, 6.6, "each encoder layer; merging in some", ha="center", va="center", fontsize=8.5)
    add_arrow(axes, (1.85, 6.0), (2.7, 6.0))
    add_arrow(axes, (4.2, 6.0), (5.0, 6.0), label=r"$N$")
    add_box(axes, 9.6, 6.0, 1.5, "pooling and\nprojection", SPATIAL)
    add_arrow(axes, (8.7, 6.0), (9.6, 6.0), label=r"$M$")
    # Frequency stage
    block = "frequency blocks\n" + r"$F + \mathrm{irfft}(K \cdot \mathrm{rfft}(\mathrm{LN}\,F))$, MLP"
    add_box(axes, 2.7, 2.9, 1.5, "normalise,\nproject", FREQUENCY)
    add_box(axes, 5.0, 2.9, 3.7, block, FREQUENCY)
    add_box(axes, 9.6, 2.9, 1.5, "pooling and\nprojection", FREQUENCY)
    add_arrow(axes, (1.85, 2.9), (2.7, 2.9))
    add_arrow(axes, (4.2, 2.9), (5.0, 2.9))
    add_arrow(axes, (8.7, 2.9), (9.6, 2.9), label=r"$f$")
    add_arrow(axes, (5.35, 3.38), (5.35, 4.35), (4.6, 4.35), (4.6, 5.95))
    axes.text(4.5, 4.75, "gate,\nzero at the start", ha="right", va="center", fontsize=8.5)
    add_arrow(axes, (6.85, 3.38), (6.85, 5.4))
    axes.text(6.95, 4.35, "similarity and\nimportance", ha="left", va="center", fontsize=8.5)


def draw_losses(axes: Axes) -> None:
    add_arrow(axes, (11.1, 6.0), (11.9, 6.0), label=r"$v$")
    add_arrow(axes, (11.1, 2.9), (11.9, 2.9), label=r"$g$")
    add_arrow(axes, (8.95, 6.0), (8.95, 4.45), (11.9, 4.45), label="")
    axes.text(10.35, 4.52, "tokens and their sizes", ha="center", va="bottom", fontsize=8.5)
    for y, text in ((6.0, "spatial\nloss"), (4.45, "token\nloss"), (2.9, "frequency\nloss")):
        add_box(axes, 11.9, y, 1.3, text, LOSS)
    # Captions
    add_box(axes, 14.2, 4.45, 1.5, "text tower\n(CLIP's)", TEXT)
    axes.text(15.0, 2.25, "caption:\n\u201ca striped ball\u201d", ha="center", va="center", fontsize=9)
    add_arrow(axes, (15.4, 2.6), (15.4, 3.97))
    add_arrow(axes, (14.2, 4.45), (13.2, 4.45), label="tokens")
    for y, side in ((6.0, 4.93), (2.9, 3.97)):
        add_arrow(axes, (14.6, side), (14.6, y), (13.2, y))
        axes.text(13.9, y + 0.07, r"$u$", ha="center", va="bottom", fontsize=8)
    embedding = r"image embedding $= v + w\,\Vert v\Vert\, g$"
    loss = r"loss = spatial + $\lambda_F\cdot$frequency + $\lambda_T\cdot$token"
    axes.text(8.0, 1.35, f"{embedding}          {loss}", ha="center", va="center", fontsize=10)


def draw_method(output: Path) -> None:
    """Writes the figure to `output`, in the format of its suffix."""
    figure, axes = plt.subplots(figsize=(12.6, 5.2))
    draw_image_side(axes, example_image())
    draw_losses(axes)
    axes.set(xlim=(0, 16), ylim=(1.0, 7.4))
    axes.axis("off")
    figure.savefig(output, dpi=130, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("docs/images/method.png"), help="file to write")
    draw_method(parser.parse_args().output)
