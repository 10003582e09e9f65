# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Rows, images and fixtures that the tests of the data room share."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset
from PIL import Image
from transformers import CLIPImageProcessor

from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.data.images import ImageTransform
from modeling_mlip.data.items import PairDataset


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """An empty cache of datasets."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red square", "a green square"] * 2, max_seq_length=8)


@pytest.fixture(scope="module")
def transform():
    return ImageTransform(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}))


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_dataset(images: list[bytes | str | None], captions: list) -> Dataset:
    cells = [{"bytes": None, "path": image} if isinstance(image, str) else {"bytes": image} for image in images]
    cells = [None if image is None else {"path": None} | cell for image, cell in zip(images, cells, strict=True)]
    dataset = Dataset.from_dict({"image": cells, "caption": captions})
    return dataset.cast_column("image", datasets.Image())


def pairs(dataset: Dataset, transform, training: bool = False, **options) -> PairDataset:
    return PairDataset(dataset, "image", "caption", transform, training=training, seed=0, **options)


def write_tar(path: Path, files: list[tuple[str, bytes]]) -> None:
    """Write files, by name and content, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
