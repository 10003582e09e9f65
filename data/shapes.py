# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The built-in data set: drawn shapes with textures and captions, for the demo and the tests.

Each image shows one shape on a grey, noisy background. Low frequencies show its shape, colour, size and place. Only the
spatial frequency shows its texture (coarse, medium or fine stripes): within each shape the stripes have mean 0 and one
contrast, so neither the mean colour nor the contrast depends on the texture.

The validation split holds combinations of shape, colour and texture that the train split does not contain. The train
split contains each pair of values of two of these attributes.
"""

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "shape": ("circle", "square", "triangle", "star", "cross", "ring"),
    "colour": ("red", "green", "blue", "yellow", "purple", "turquoise"),
    "texture": ("coarse", "medium", "fine"),
}
PROMPTS: dict[str, str] = {
    "shape": "a {} with stripes",
    "colour": "a {} shape with stripes",
    "texture": "a shape with {} stripes",
}

# No channel is close to 0 or 1, so that stripes and noise are not clipped.
COLOURS = np.array(
    [[0.75, 0.3, 0.3], [0.3, 0.65, 0.3], [0.3, 0.35, 0.75], [0.72, 0.68, 0.3], [0.6, 0.3, 0.68], [0.3, 0.68, 0.68]],
    dtype=np.float32,
)
# Periods of the stripes as fractions of the image side, in the order of ATTRIBUTES["texture"].
PERIODS = np.array([0.2, 0.1, 0.05], dtype=np.float32)
STRIPE_CONTRAST = 0.12  # standard deviation of the stripes within the shape
NOISE = 0.02

SIZES = ("small", "large")
RADII = np.array([[0.18, 0.21], [0.27, 0.31]])  # smallest and largest, as fractions of the image side
PLACES = (
    *("at the top left", "at the top", "at the top right"),
    *("on the left", "in the centre", "on the right"),
    *("at the bottom left", "at the bottom", "at the bottom right"),
)
FULL_WORDINGS = (
    "a {size} {colour} {shape} with {texture} stripes {place}",
    "{place} a {size} {colour} {shape} with {texture} stripes",
    "a {colour} {shape} with {texture} stripes, {size}, {place}",
)
# Only the train split has these captions. They contain the words of PROMPTS. They also make shape and texture matter,
# since full captions mostly differ in colour, size or place.
SHORT_WORDINGS = ("a {shape} with stripes", "a {colour} shape with stripes", "a shape with {texture} stripes")
SHORT_SHARE = 0.5


def held_out(shape: np.ndarray, colour: np.ndarray, texture: np.ndarray) -> np.ndarray:
    """Whether a combination is in the validation split: one colour of six for each shape and texture."""
    return (shape + colour + 2 * texture) % 6 == 0


def shapes_dataset(
    num_train: int = 6000, num_validation: int = 300, image_size: int = 64, seed: int = 0
) -> DatasetDict:
    """Draw the data set.

    There are 324 different scenes (combination, size and place) for the validation split and 1620 for the train split.
    A split repeats a scene only after it holds all of them, so retrieval among up to 324 validation images has one
    right answer.

    Args:
        num_train: number of training images.
        num_validation: number of validation images.
        image_size: side of the images in pixels.
        seed: seed of all random choices.

    Returns:
        Splits `train` and `validation` with the columns image, caption, shape, colour, texture.

    Raises:
        ValueError: if `image_size` is less than 64.
    """
    if image_size < 64:
        raise ValueError(
            f"image_size={image_size}: choose at least 64, because smaller images cannot show the fine stripes."
        )
    return draw_splits(SHAPES, num_train, num_validation, image_size, seed)


@dataclass(frozen=True)
class Scenes:
    """What a data set varies besides shape, colour and texture.

    Args:
        attributes: two further attributes by name, with their values.
        wordings: full captions, with the name of each attribute in braces.
        draw: images (B, S, S, 3) from the indices of shape, colour, texture and both attributes, each (B,), the image
            size S and a random generator.
    """

    attributes: dict[str, tuple[str, ...]]
    wordings: tuple[str, ...]
    draw: Callable[..., np.ndarray]


def draw_splits(scenes: Scenes, num_train: int, num_validation: int, image_size: int, seed: int) -> DatasetDict:
    """Draw the train and the validation split; see `shapes_dataset`."""
    grid = np.meshgrid(*(np.arange(len(ATTRIBUTES[name])) for name in ATTRIBUTES), indexing="ij")
    combinations = np.stack(grid, axis=-1).reshape(-1, 3)
    unseen = held_out(*combinations.T)
    rng = np.random.default_rng(seed)
    return DatasetDict(
        train=_split(scenes, num_train, combinations[~unseen], image_size, rng, short_share=SHORT_SHARE),
        validation=_split(scenes, num_validation, combinations[unseen], image_size, rng, short_share=0.0),
    )


def _split(
    scenes: Scenes, num: int, combinations: np.ndarray, image_size: int, rng: np.random.Generator, short_share: float
) -> Dataset:
    # All scenes in random order, then all of them in another order, and so on.
    values = {**ATTRIBUTES, **scenes.attributes}
    sizes = (len(combinations), *map(len, scenes.attributes.values()))
    num_scenes = math.prod(sizes)
    rounds = [rng.permutation(num_scenes) for _ in range(-(-num // num_scenes))]
    scene = np.concatenate([*rounds, np.zeros(0, int)])[:num]
    combination, *others = np.unravel_index(scene, sizes)
    indices = dict(zip(values, [*combinations[combination].T, *others], strict=True))
    short = rng.random(num) < short_share
    wording = rng.integers(3, size=num)

    captions = [
        (SHORT_WORDINGS if short[i] else scenes.wordings)[wording[i]].format(
            **{name: values[name][index[i]] for name, index in indices.items()}
        )
        for i in range(num)
    ]
    images = []
    for start in range(0, num, 256):
        part = [index[start : start + 256] for index in indices.values()]
        images += [{"bytes": _png(image), "path": None} for image in scenes.draw(*part, image_size, rng)]

    features = {"image": Image(), "caption": Value("string")}
    features |= {name: ClassLabel(names=list(names)) for name, names in ATTRIBUTES.items()}
    columns = {"image": images, "caption": captions} | {name: indices[name] for name in ATTRIBUTES}
    return Dataset.from_dict(columns, features=Features(features))


def draw(
    shape: np.ndarray,
    colour: np.ndarray,
    texture: np.ndarray,
    size: np.ndarray,
    place: np.ndarray,
    image_size: int,
    rng: np.random.Generator,
) -> np.ndarray:
    """Draw B images, uint8 (B, S, S, 3), from indices (B,) into the tables at the top of this file."""
    row, column = np.divmod(place, 3)
    offsets = 0.21 * (np.stack([column, row], axis=-1) - 1)
    return draw_shapes(shape, colour, PERIODS[texture], RADII[size], offsets, (0.2, 0.9), image_size, rng)


def draw_shapes(
    shape: np.ndarray,
    colour: np.ndarray,
    periods: np.ndarray,
    radii: np.ndarray,
    offsets: np.ndarray,
    greys: tuple[float, float],
    image_size: int,
    rng: np.random.Generator,
    contrast: float = STRIPE_CONTRAST,
) -> np.ndarray:
    """Draw B striped shapes on grey backgrounds.

    Args:
        shape, colour: (B,), indices into `ATTRIBUTES`.
        periods: (B,), of the stripes. All lengths are fractions of the image side.
        radii: (B, 2), smallest and largest radius.
        offsets: (B, 2), to the right and down, from the centre of the image to that of the shape.
        greys: darkest and lightest background, from 0 to 1.
        image_size: side S in pixels.
        contrast: standard deviation of the stripes within the shape.

    Returns:
        uint8 (B, S, S, 3).
    """
    B, S = len(shape), image_size

    def uniform(low, high) -> np.ndarray:
        return rng.uniform(low, high, B).astype(np.float32)[:, None, None]

    axis = (np.arange(S, dtype=np.float32) + 0.5) / S
    radius = uniform(*radii.T)
    right, down = offsets.astype(np.float32).T[..., None, None]  # (B, 1, 1) each
    x = axis - uniform(0.47, 0.53) - right  # (B, 1, S)
    y = axis[:, None] - uniform(0.47, 0.53) - down  # (B, S, 1)

    turn = uniform(-0.2, 0.2)
    u = (x * np.cos(turn) + y * np.sin(turn)) / radius  # (B, S, S)
    v = (y * np.cos(turn) - x * np.sin(turn)) / radius
    inside = np.empty((B, S, S), dtype=bool)
    for index, contains in enumerate((_circle, _is_square, _triangle, _star, _cross, _ring)):
        chosen = shape == index
        inside[chosen] = contains(u[chosen], v[chosen])

    direction, phase = uniform(0, np.pi), uniform(0, 2 * np.pi)
    distance = x * np.cos(direction) + y * np.sin(direction)
    wave = np.sin(2 * np.pi * distance / periods[:, None, None] + phase)
    area = inside.sum(axis=(1, 2), keepdims=True)
    wave -= (wave * inside).sum(axis=(1, 2), keepdims=True) / area
    wave /= np.sqrt((wave**2 * inside).sum(axis=(1, 2), keepdims=True) / area)

    striped = COLOURS[colour][:, None, None, :] + contrast * wave[..., None]
    grey = uniform(*greys)[..., None]
    pixels = np.where(inside[..., None], striped, grey)
    pixels += NOISE * rng.standard_normal(pixels.shape, dtype=np.float32)
    return (pixels * 255 + 0.5).clip(0, 255).astype(np.uint8)


SHAPES = Scenes({"size": SIZES, "place": PLACES}, FULL_WORDINGS, draw)


# Whether points (u, v) lie inside a shape of radius 1; v points down.


def _circle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return u**2 + v**2 < 1


def _is_square(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(abs(u), abs(v)) < 0.8


def _triangle(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return np.maximum(v, abs(u) * np.sqrt(0.75) - v / 2) < 0.55


def _star(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    # By symmetry, each point maps to the wedge between a tip, at (1, 0), and the notch next to it. It has one edge.
    half = np.pi / 5
    angle = np.arctan2(u, -v) % (2 * half)
    angle = np.minimum(angle, 2 * half - angle)
    along, across = np.hypot(u, v) * np.cos(angle), np.hypot(u, v) * np.sin(angle)
    notch_along, notch_across = 0.5 * np.cos(half), 0.5 * np.sin(half)
    return (along - 1) * notch_across + across * (1 - notch_along) < 0


def _cross(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return (np.minimum(abs(u), abs(v)) < 0.35) & (np.maximum(abs(u), abs(v)) < 0.95)


def _ring(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    return abs(np.hypot(u, v) - 0.77) < 0.23


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
