# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The benchmark of training-free merging loads a tower exactly and reports damage relative to ToMe."""

import json
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import training_free_merging as benchmark  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14)
    model = Dinov2Model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    path = tmp_path_factory.mktemp("tower")
    model.save_pretrained(path)
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (5, 60, 70, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image()})
    rows = datasets.Dataset.from_dict({"image": [Image.fromarray(image) for image in pixels]}, features=features)
    rows.to_parquet(path / "images.parquet")
    return path


def test_the_tower_equals_the_original(folder):
    theirs, ours = Dinov2Model.from_pretrained(folder).eval(), benchmark.load_tower(str(folder), 56)
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        torch.testing.assert_close(ours(images).pooler_output, theirs(images).pooler_output, rtol=0, atol=1e-5)


def test_the_benchmark_writes_a_row_for_each_setting(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "PLACEMENTS", [[0, 1], [3, 9]])  # the second is deeper than the tower
    monkeypatch.setattr(benchmark, "PLACEMENTS_AT_SPEEDUP", [[1], [3], [9]])
    monkeypatch.setattr(benchmark, "SPEEDUPS", [1.5])
    output = tmp_path / "out.json"
    flags = ["--tower", str(folder), "--images", str(folder / "images.parquet"), "--output", str(output)]
    benchmark.main([*flags, "--num_images", "4", "--image_size", "56"])
    record = json.loads(output.read_text())
    rows = record["rows"]
    assert len(rows) == 3 * 4 and {row["method"] for row in rows} == {"mlip", "ward", "tome", "elip"}
    assert all(row["of_tome"] == 1 for row in rows if row["method"] == "tome")
    assert all(row["damage"] > 0 and row["speed_up"] > 1 for row in rows)
    assert [row["layers"] for row in record["speedups"]] == [[1]]  # merging in the last layer alone saves too little
    assert str(folder.parent) not in output.read_text()
    tower = benchmark.load_tower(str(folder), 56)
    images = benchmark.load_images(str(folder / "images.parquet"), 4, 56)
    unmerged = benchmark.embed(tower, images)
    tower.config.merge_layers, tower.config.merge_method = [0, 1], "ward"
    tower.set_merge_ratio(0.5)
    damage = 1 - torch.nn.functional.cosine_similarity(benchmark.embed(tower, images), unmerged)
    row = next(row for row in rows if row["method"] == "ward" and row["merge_ratio"] == 0.5)
    assert row["damage"] == pytest.approx(damage.mean().item(), abs=1e-6)


def test_positions_of_the_same_size_stay_the_same():
    positions = torch.randn(1 + 16, 8)
    torch.testing.assert_close(benchmark.resize_positions(positions, 4), positions)
