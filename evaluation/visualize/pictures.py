# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The pictures of `mlip visualize`: arrays in, PNG files out.

Regions are drawn as in figure 4 of ToMe (Bolya et al. 2023, arXiv 2210.09461): filled with their mean colour, bordered.
Axes: a grid of H x W patches; pictures of height x width pixels; points as (x, y).
"""

import colorsys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator

DPI = 110
COLUMNS = 4
PANEL = 2.3  # inches
MAPS = "viridis"  # perceptually uniform
MAX_Z = 3.0  # standard deviations; without a limit, one outlier gives all other tokens the same colour
NUM_CHANNELS = 6
LABELS: dict[str, Any] = dict(fontsize=11, parse_math=False)


# Regions


def fill_regions(image: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Fills each region of `labels` `(H, W)` with the mean colour of its pixels; `(height, width, 3)` uint8."""
    rows, columns = image.shape[0] // labels.shape[0], image.shape[1] // labels.shape[1]
    pixels = labels.repeat(rows, axis=0).repeat(columns, axis=1)  # (height, width)
    counts = np.bincount(pixels.ravel())
    sums = [np.bincount(pixels.ravel(), weights=image[..., channel].ravel()) for channel in range(3)]
    means = np.stack(sums, axis=1) / counts[:, None]  # (regions, 3)
    return means.round().astype(np.uint8)[pixels]


def region_borders(labels: np.ndarray) -> np.ndarray:
    """The borders between neighbouring patches of different regions: `(borders, 2, 2)`, from (x, y) to (x, y), in
    patches."""
    y, x = np.nonzero(labels[:, 1:] != labels[:, :-1])
    upright = np.stack([np.stack([x + 1, y], axis=1), np.stack([x + 1, y + 1], axis=1)], axis=1)
    y, x = np.nonzero(labels[1:] != labels[:-1])
    level = np.stack([np.stack([x, y + 1], axis=1), np.stack([x + 1, y + 1], axis=1)], axis=1)
    return np.concatenate([upright, level]).reshape(-1, 2, 2)


def tint_regions(labels: np.ndarray) -> np.ndarray:
    """`(H, W, 4)` colours with opacity: one hue per region of several patches, transparent for a single patch."""
    merged = np.flatnonzero(np.bincount(labels.ravel()) > 1)
    colours = np.zeros((labels.max() + 1, 4))
    for n, region in enumerate(merged):
        # Steps of the golden ratio around the hue circle: regions with near numbers get distant hues.
        colours[region] = (*colorsys.hsv_to_rgb(n * 0.618034 % 1, 0.9, 1 if n % 2 else 0.75), 0.5)
    return colours[labels]


def draw_regions(path: Path, image: np.ndarray, stages: Sequence[tuple[str, np.ndarray]]) -> None:
    """Draws the image beside its regions after each stage: filled above, tinted below.

    Args:
        image: `(height, width, 3)` uint8.
        stages: a name, and the token of each patch, `(H, W)`.
    """
    H, W = stages[0][1].shape
    patches = np.arange(H * W).reshape(H, W)
    chunks = [stages[start : start + COLUMNS - 1] for start in range(0, len(stages), COLUMNS - 1)]
    columns = 1 + len(chunks[0])
    figure, grid = _panels(2 * len(chunks), columns, (H, W))
    for axes in grid.flat:
        axes.axis("off")
    for n, chunk in enumerate(chunks):
        above, below = grid[2 * n], grid[2 * n + 1]
        if n == 0:
            _picture(above[0], image, (H, W), "model input")
            _picture(below[0], image, (H, W), f"its {H * W} patches")
            _borders(below[0], patches)
        for first, second, (name, labels) in zip(above[1:], below[1:], chunk, strict=False):
            _picture(first, fill_regions(image, labels), (H, W), f"{name}: {len(np.unique(labels))}")
            _picture(second, image, (H, W), "")
            second.imshow(tint_regions(labels), extent=(0, W, H, 0), interpolation="nearest")
            for axes in (first, second):
                _borders(axes, labels)
    _save(figure, path)


# Heat maps


def draw_importance(path: Path, stages: Sequence[tuple[str, dict[str, np.ndarray]]]) -> None:
    """Draws a row per stage and a column per kind of importance, with one scale for all.

    Args:
        stages: a name, and z-scores by kind, each `(H, W)`.
    """
    kinds = list(stages[0][1])
    highest = max(np.abs(scores).max() for _, maps in stages for scores in maps.values())
    limit = min(max(float(highest), 1e-6), MAX_Z)
    shape = stages[0][1][kinds[0]].shape
    figure, grid = _panels(len(stages), len(kinds), shape, extra=2.3)
    for axes, kind in zip(grid[0], kinds, strict=True):
        axes.set_title(kind, **LABELS)
    for line, (name, maps) in zip(grid, stages, strict=True):
        for axes, kind in zip(line, kinds, strict=True):
            drawn = axes.imshow(maps[kind], cmap=MAPS, vmin=-limit, vmax=limit, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        line[0].set_ylabel(name, rotation="horizontal", ha="right", va="center", labelpad=10, **LABELS)
    bar = figure.colorbar(drawn, ax=grid, extend="both" if highest > limit else "neither", aspect=12 * len(stages))
    bar.set_label("standard deviations", **LABELS)
    _save(figure, path)


def draw_words(path: Path, image: np.ndarray, words: Sequence[tuple[str, np.ndarray]]) -> None:
    """Draws the image, and a panel per word with its similarity `(H, W)` over the image; one scale for all.

    Args:
        image: `(height, width, 3)` uint8.
        words: a word, and its similarity `(H, W)`.
    """
    H, W = words[0][1].shape
    lowest = float(min(scores.min() for _, scores in words))
    highest = float(max(scores.max() for _, scores in words))
    columns = min(COLUMNS, len(words) + 1)
    figure, grid = _panels(-(-(len(words) + 1) // columns), columns, (H, W), extra=1.3)
    grey = image.mean(axis=2)
    for axes in grid.flat:
        axes.axis("off")
    _picture(grid.flat[0], image, (H, W), "model input")
    for n, (axes, (word, scores)) in enumerate(zip(grid.flat[1:], words, strict=False)):
        _picture(axes, grey, (H, W), f"{drawable(word, n)}  {scores.max():.2f}")
        heat = dict(cmap=MAPS, vmin=lowest, vmax=max(highest, lowest + 1e-6), extent=(0, W, H, 0))
        drawn = axes.imshow(scores, alpha=0.65, interpolation="nearest", **heat)
    bar = figure.colorbar(drawn, ax=grid, aspect=12 * len(grid))
    bar.set_label("cosine similarity", **LABELS)
    _save(figure, path)


def drawable(word: str, index: int) -> str:
    """The word, shortened; or its number if the font of the pictures lacks one of its letters."""
    font = get_font(findfont(FontProperties()))
    if not all(font.get_char_index(ord(letter)) for letter in word):
        return f"word {index + 1}"
    return word if len(word) <= 14 else word[:13] + "…"


# Filters


def draw_filters(path: Path, magnitudes: Sequence[np.ndarray]) -> None:
    """Draws a row per block: the mean over channels, and the channels that vary most over frequencies.

    Args:
        magnitudes: `(H, W, channels)` each, frequency 0 at `[H // 2, W // 2]`.
    """
    figure = Figure(figsize=(9.2, 4.4 * len(magnitudes)), layout="constrained")
    blocks: Any = figure.subfigures(len(magnitudes), 1, squeeze=False)[:, 0]
    for n, (block, magnitude) in enumerate(zip(blocks, magnitudes, strict=True)):
        H, W, _ = magnitude.shape
        # Cycles per image, each cell around its frequency; positive frequencies are up and to the right.
        extent = (-(W // 2) - 0.5, W - W // 2 - 0.5, -(H // 2) - 0.5, H - H // 2 - 0.5)
        left, right = block.subfigures(1, 2, width_ratios=[1, 1.75])
        block.suptitle(f"block {n}", fontsize=13)
        spectrum: dict[str, Any] = dict(cmap=MAPS, extent=extent, origin="lower", interpolation="nearest")
        _draw_mean_filter(left, magnitude, spectrum)
        _draw_channels(right, magnitude, spectrum)
    _save(figure, path)


def _draw_mean_filter(figure: Any, magnitude: np.ndarray, spectrum: dict[str, Any]) -> None:
    axes = figure.subplots()
    drawn = axes.imshow(magnitude.mean(axis=2), **spectrum)
    axes.set_title(f"mean of {magnitude.shape[2]} channels", **LABELS)
    axes.set_xlabel("horizontal, cycles per image", **LABELS)
    axes.set_ylabel("vertical, cycles per image", **LABELS)
    _whole_ticks(axes)
    figure.colorbar(drawn, ax=axes, location="bottom", aspect=25).set_label("|K|", **LABELS)


def _draw_channels(figure: Any, magnitude: np.ndarray, spectrum: dict[str, Any]) -> None:
    """The channels that vary most, with one scale."""
    channels = magnitude.shape[2]
    chosen = np.argsort(-magnitude.reshape(-1, channels).std(axis=0), kind="stable")[:NUM_CHANNELS]
    lowest, highest = magnitude[..., chosen].min(), magnitude[..., chosen].max()
    columns = min(3, len(chosen))
    grid = figure.subplots(-(-len(chosen) // columns), columns, squeeze=False, sharex=True, sharey=True)
    for axes in grid.flat[len(chosen) :]:
        axes.axis("off")
    for axes, channel in zip(grid.flat, chosen, strict=False):
        drawn = axes.imshow(magnitude[..., channel], vmin=lowest, vmax=highest, **spectrum)
        axes.set_title(f"channel {channel}", **LABELS)
        _whole_ticks(axes)
    figure.supxlabel("horizontal, cycles per image", fontsize=11)
    figure.colorbar(drawn, ax=grid, aspect=25).set_label("|K|", **LABELS)


# Panels


def _panels(rows: int, columns: int, shape: tuple[int, ...], extra: float = 0) -> tuple[Figure, np.ndarray]:
    """A figure with `(rows, columns)` axes for pictures of a shape (H, W), and `extra` inches beside them."""
    height = PANEL * shape[0] / shape[1] + 0.3
    figure = Figure(figsize=(PANEL * columns + extra, height * rows + 0.2), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _whole_ticks(axes: Axes) -> None:
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))


def _picture(axes: Axes, image: np.ndarray, shape: tuple[int, int], title: str) -> None:
    axes.imshow(image, cmap="gray", vmin=0, vmax=255, extent=(0, shape[1], shape[0], 0), interpolation="nearest")
    axes.set_title(title, **LABELS)
    axes.axis("off")


def _borders(axes: Axes, labels: np.ndarray) -> None:
    """Draws the borders as a thin dark line within a wider light one, visible on any colour."""
    borders = region_borders(labels)
    for colour, width in (("white", 1.6), ("black", 0.7)):
        axes.add_collection(LineCollection(list(borders), colors=colour, linewidths=width, capstyle="projecting"))


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, format="png", dpi=DPI, pil_kwargs={"optimize": True})
