# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The built-in data set of the demo: like `shapes`, but the shapes fill small images, so that a small model learns them
within minutes.

The background is dark, and some images have a white frame. The shapes, colours and held-out combinations are those of
`shapes`.
"""

import numpy as np
from datasets import DatasetDict

from .shapes import Scenes, draw_shapes, draw_splits

SIZES = ("small", "large")
RADII = np.array([[0.27, 0.31], [0.38, 0.42]])  # smallest and largest, as fractions of the image side
PERIODS = np.array([0.25, 0.11, 0.0625], dtype=np.float32)  # of the stripes: 12, 5.3 and 3 pixels of 48
CONTRAST = 0.16  # of the stripes
FRAMES = ("without a frame", "in a thin frame", "in a thick frame")
FRAME_WIDTHS = np.array([0, 0.04, 0.08])  # fractions of the image side
FRAME_GREY = 230
BACKGROUND_GREYS = (0.03, 0.08)
WORDINGS = (
    "a {size} {colour} {shape} with {texture} stripes {frame}",
    "{frame} a {size} {colour} {shape} with {texture} stripes",
    "a {colour} {shape} with {texture} stripes, {size}, {frame}",
)


def framed_shapes_dataset(
    num_train: int = 8000, num_validation: int = 108, image_size: int = 48, seed: int = 0
) -> DatasetDict:
    """Draw the data set; arguments and columns are those of `shapes.shapes_dataset`.

    There are 108 different scenes (combination, size and frame) for the validation split and 540 for the train split.

    Raises:
        ValueError: if `image_size` is less than 48.
    """
    if image_size < 48:
        raise ValueError(
            f"image_size={image_size}: choose at least 48, because smaller images cannot show the fine stripes."
        )
    return draw_splits(FRAMED_SHAPES, num_train, num_validation, image_size, seed)


def draw_framed(
    shape: np.ndarray,
    colour: np.ndarray,
    texture: np.ndarray,
    size: np.ndarray,
    frame: np.ndarray,
    image_size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw B images, uint8 (B, S, S, 3), from indices (B,) into the tables of this file and of `shapes`."""
    centred = np.zeros((len(shape), 2))
    periods, radii = PERIODS[texture], RADII[size]
    pixels = draw_shapes(shape, colour, periods, radii, centred, BACKGROUND_GREYS, image_size, rng, CONTRAST)
    place = np.arange(image_size)
    to_edge = np.minimum(place, image_size - 1 - place)
    to_edge = np.minimum(to_edge, to_edge[:, None])  # (S, S), pixels to the nearest edge
    widths = (FRAME_WIDTHS[frame] * image_size).round()
    pixels[to_edge < widths[:, None, None]] = FRAME_GREY
    return pixels


FRAMED_SHAPES = Scenes({"size": SIZES, "frame": FRAMES}, WORDINGS, draw_framed)
