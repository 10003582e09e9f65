# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A small processor and captioned images that the training tests share."""

import datasets
import numpy as np
from PIL import Image
from transformers import CLIPImageProcessor, CLIPProcessor

from modeling_mlip.data.caption_tokenizer import train_tokenizer

WORDS = ("red", "green", "blue", "small", "large", "circle", "square", "star", "bright", "dark", "left", "right")


def make_captions(count: int) -> list[str]:
    return [f"a {WORDS[n % 5]} {WORDS[5 + n % 3]} {WORDS[8 + n % 4]} {n}" for n in range(count)]


def make_processor(image_size: int = 32, length: int = 12) -> CLIPProcessor:
    tokenizer = train_tokenizer(make_captions(40), max_seq_length=length, vocab_size=600)
    size = {"height": image_size, "width": image_size}
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=size), tokenizer)


def make_rows(count: int, image_size: int = 32) -> datasets.Dataset:
    """Images of random pixels with captions that all differ."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, image_size, image_size, 3), dtype=np.uint8)
    images = [Image.fromarray(image) for image in pixels]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    return datasets.Dataset.from_dict({"image": images, "caption": make_captions(count)}, features=features)
