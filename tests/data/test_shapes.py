# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The drawn data set matches its captions, only stripes show the texture, and combinations are held out."""

import numpy as np
import pytest

from modeling_mlip.data.shapes import (
    ATTRIBUTES,
    FULL_WORDINGS,
    PERIODS,
    PLACES,
    PROMPTS,
    SHORT_WORDINGS,
    draw,
    held_out,
    shapes_dataset,
)


@pytest.fixture(scope="module")
def shapes():
    return shapes_dataset(num_train=1620, num_validation=324, seed=3)


def combinations(split) -> set[tuple[int, int, int]]:
    return set(zip(split["shape"], split["colour"], split["texture"], strict=True))


def drawn(num: int, texture: int, seed: int, shape: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Large, centred squares of one texture: all pixels (B, 64, 64, 3) in 0..1, and those that surely lie within."""
    fixed = [np.full(num, value) for value in (shape, 0, texture, 1, PLACES.index("in the centre"))]
    pixels = draw(*fixed, 64, np.random.default_rng(seed)) / 255
    return pixels, pixels[:, 25:39, 25:39]


def test_held_out_combinations_are_disjoint_and_cover_every_value(shapes):
    train, validation = combinations(shapes["train"]), combinations(shapes["validation"])
    assert len(train) == 90 and len(validation) == 18
    assert not train & validation
    for axis, values in enumerate(ATTRIBUTES.values()):
        assert {combination[axis] for combination in train} == set(range(len(values)))
        assert {combination[axis] for combination in validation} == set(range(len(values)))


def test_the_train_split_has_every_pair_of_values():
    grid = np.stack(np.meshgrid(range(6), range(6), range(3), indexing="ij"), -1).reshape(-1, 3)
    seen = grid[~held_out(*grid.T)]
    for first, second, num in ((0, 1, 36), (0, 2, 18), (1, 2, 18)):
        assert len({tuple(row) for row in seen[:, [first, second]]}) == num


def test_captions_name_the_labels_and_validation_captions_name_all(shapes):
    full = 0
    for split in ("train", "validation"):
        for row in shapes[split].remove_columns("image"):
            said = {name: values[row[name]] for name, values in ATTRIBUTES.items()}
            words = row["caption"].replace(",", "").split()
            complete = all(value in words for value in said.values())
            full += complete
            assert complete or (split == "train" and any(value in words for value in said.values()))
            for name, values in ATTRIBUTES.items():
                assert not set(values) - {said[name]} & set(words)
    assert len(shapes["validation"]) < full < len(shapes["train"]) + len(shapes["validation"])


def test_validation_captions_have_different_meanings(shapes):
    meanings = {tuple(sorted(caption.replace(",", "").split())) for caption in shapes["validation"]["caption"]}
    # Captions that differ only in an "a" have the same meaning.
    meanings = {tuple(word for word in meaning if word != "a") for meaning in meanings}
    assert len(meanings) == len(shapes["validation"]) == 324


def test_prompts_are_captions_of_the_train_split():
    assert len(FULL_WORDINGS) == len(SHORT_WORDINGS) == 3
    assert {prompt.format("{" + name + "}") for name, prompt in PROMPTS.items()} == set(SHORT_WORDINGS)


def test_equal_seeds_draw_equal_images_and_other_seeds_do_not():
    first, again, other = (shapes_dataset(num_train=5, num_validation=3, seed=seed) for seed in (1, 1, 2))
    for split in ("train", "validation"):
        assert first[split]["caption"] == again[split]["caption"]
        pixels = [[np.array(image) for image in data[split]["image"]] for data in (first, again, other)]
        assert np.array_equal(pixels[0], pixels[1])
        assert not np.array_equal(pixels[0], pixels[2])


def test_mean_colour_and_contrast_do_not_depend_on_the_texture():
    # The mean and the spread of a whole shape's pixels.
    moments = []
    for texture in range(3):
        pixels, _ = drawn(200, texture, seed=texture, shape=0)
        reds = pixels[..., 0] - pixels[..., 1] > 0.25  # the red circle; the background is grey
        assert reds.sum(axis=(1, 2)).min() > 400
        values = [image[mask] for image, mask in zip(pixels, reds, strict=True)]
        moments.append([[*value.mean(axis=0), *value.std(axis=0)] for value in values])
    moments = np.array(moments)  # (texture, image, moment)
    assert np.ptp(moments.mean(axis=1), axis=0).max() < 0.004
    assert moments.std(axis=1).max() < 0.006  # nor do those of one image

    # The check can fail: half the contrast of the stripes is more than this tolerance.
    assert moments[..., 3:].mean() > 0.1


def test_textures_differ_in_spatial_frequency():
    peaks = []
    for texture in range(3):
        _, inner = drawn(100, texture, seed=9)
        wave = inner.mean(axis=-1) - inner.mean(axis=(1, 2, 3))[:, None, None]
        spectrum = abs(np.fft.fft2(wave, s=(128, 128))) ** 2
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(128), np.fft.fftfreq(128)))
        peaks.append((spectrum * frequency).sum(axis=(1, 2)) / spectrum.sum(axis=(1, 2)))
    coarse, medium, fine = np.array(peaks)
    assert coarse.max() < medium.min() and medium.max() < fine.min()
    assert np.median(fine) == pytest.approx(1 / (64 * PERIODS[2]), rel=0.15)


def test_shapes_are_at_the_place_in_the_caption():
    num = len(PLACES)
    fixed = [np.full(num, value) for value in (0, 0, 1, 0)]
    pixels = draw(*fixed, np.arange(num), 64, np.random.default_rng(0)).astype(int)
    for place, image in zip(PLACES, pixels, strict=True):
        rows, columns = np.nonzero(image[..., 0] - image[..., 1] > 60)
        assert len(rows) > 100
        vertical = "top" if rows.mean() < 25 else "bottom" if rows.mean() > 39 else ""
        horizontal = "left" if columns.mean() < 25 else "right" if columns.mean() > 39 else ""
        assert (vertical in place and horizontal in place) and (vertical or horizontal or place == "in the centre")
        assert ("left" in place) == (horizontal == "left") and ("top" in place) == (vertical == "top")


def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match=r"image_size=32.*64"):
        shapes_dataset(image_size=32)
