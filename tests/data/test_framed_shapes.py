# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The framed shapes match their captions and hold out the combinations of `shapes`."""

import numpy as np
import pytest

from modeling_mlip.data.framed_shapes import FRAME_WIDTHS, FRAMES, PERIODS, draw_framed, framed_shapes_dataset
from modeling_mlip.data.shapes import ATTRIBUTES, SHORT_WORDINGS, held_out


@pytest.fixture(scope="module")
def framed():
    return framed_shapes_dataset(num_train=60, num_validation=108, seed=3)


def test_the_validation_split_holds_every_scene_of_the_held_out_combinations_once(framed):
    labels = [np.array(framed["validation"][name]) for name in ATTRIBUTES]
    assert held_out(*labels).all()
    assert not held_out(*(np.array(framed["train"][name]) for name in ATTRIBUTES)).any()
    words = {frozenset(caption.replace(",", "").split()) - {"a"} for caption in framed["validation"]["caption"]}
    assert len(words) == 108


def test_captions_name_what_the_labels_say(framed):
    for row in framed["validation"].remove_columns("image"):
        assert all(values[row[name]] in row["caption"].split() for name, values in ATTRIBUTES.items() if name != "size")
    short = [caption for caption in framed["train"]["caption"] if "frame" not in caption]
    assert 15 < len(short) < 45 and all(caption.startswith("a ") for caption in short)
    assert len(SHORT_WORDINGS) == 3


def test_frames_have_the_width_in_the_caption(framed):
    for row in framed["validation"]:
        [frame] = [place for place, name in enumerate(FRAMES) if name in row["caption"]]
        profile = np.array(row["image"])[:, 0].min(axis=-1)  # the left column is white within a frame
        line = np.array(row["image"])[24].min(axis=-1) > 200
        assert (profile > 200).all() == (frame > 0)
        assert line[:6].sum() == round(48 * FRAME_WIDTHS[frame])


def test_stripes_have_the_period_of_their_texture():
    num, middles = 60, []
    for texture in range(3):
        fixed = [np.full(num, value) for value in (1, 0, texture, 1, 0)]
        pixels = draw_framed(*fixed, 48, np.random.default_rng(5)) / 255
        inner = pixels[:, 12:36, 12:36].mean(axis=-1)
        spectrum = abs(np.fft.fft2(inner - inner.mean(axis=(1, 2), keepdims=True), s=(96, 96))) ** 2
        frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(96), np.fft.fftfreq(96)))
        middles.append((spectrum * frequency).sum(axis=(1, 2)) / spectrum.sum(axis=(1, 2)))
    coarse, medium, fine = np.array(middles)
    assert np.quantile(coarse, 0.9) < np.quantile(medium, 0.1) and np.quantile(medium, 0.9) < np.quantile(fine, 0.1)
    assert np.median(fine) == pytest.approx(1 / (48 * PERIODS[2]), rel=0.2)


def test_too_small_images_are_refused():
    with pytest.raises(ValueError, match=r"image_size=32.*48"):
        framed_shapes_dataset(image_size=32)
