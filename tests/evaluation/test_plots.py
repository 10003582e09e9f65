# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Pictures of retrieved images show what they claim."""

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_mlip.evaluation.plots import plot_retrieved_images


@pytest.mark.parametrize("num_images", [3, 20])
def test_right_images_are_framed_where_they_rank(tmp_path, num_images):
    embeds = torch.nn.functional.normalize(
        torch.randn(num_images, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    images = [Image.new("RGB", (20, 20)) if n % 2 else np.zeros((20, 20, 3), np.uint8) for n in range(num_images)]
    captions = [f"costs {n}$ or {n + 1}$_" for n in range(num_images)]
    plot_retrieved_images(tmp_path / "right.png", images, captions, embeds, embeds, num_queries=2)
    red, green, blue = np.asarray(Image.open(tmp_path / "right.png").convert("RGB")).astype(int).transpose(2, 0, 1)
    columns = np.flatnonzero(((green > red + 80) & (green > blue + 80)).any(axis=0))
    second_place = 2.7 / (1.5 + min(5, num_images)) * green.shape[1]  # the caption is 1.5 images wide
    assert len(columns) and columns.max() < second_place
    plot_retrieved_images(tmp_path / "wrong.png", images, captions, embeds, -embeds, num_queries=2, top=2)
    red, green, blue = np.asarray(Image.open(tmp_path / "wrong.png").convert("RGB")).astype(int).transpose(2, 0, 1)
    assert not ((green > red + 80) & (green > blue + 80)).any()
