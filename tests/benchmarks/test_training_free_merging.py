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
from transformers import CLIPImageProcessor, Dinov2Config, Dinov2Model
from transformers.image_utils import OPENAI_CLIP_STD

from modeling_mlip import MLIPConfig, MLIPModel

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import training_free_merging as benchmark  # noqa: E402
from test_original_merging import STAND_IN  # noqa: E402


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
    monkeypatch.setattr(benchmark, "PLACEMENTS", [[0, 3], [1, 5]])  # of 12 layers: 0, 1 and 0, 1 of 4
    monkeypatch.setattr(benchmark, "PLACEMENTS_AT_SPEEDUP", [[3], [9]])
    monkeypatch.setattr(benchmark, "SPEEDUPS", [1.5])
    output = tmp_path / "out.json"
    flags = ["--tower", str(folder), "--images", str(folder / "images.parquet"), "--output", str(output)]
    benchmark.main([*flags, "--num_images", "4", "--image_size", "56", "--merge_ratios", "0.3", "0.5"])
    record = json.loads(output.read_text())
    rows = record["rows"]
    assert len(rows) == 2 * 5
    assert {row["method"] for row in rows} == {"mlip", "mlip, guide 0.1", "ward", "tome", "elip"}
    assert all(row["layers"] == [0, 1] for row in rows)
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


def test_an_original_reaches_the_wanted_speedup_and_measured_rows_are_kept(folder, tmp_path):
    (tmp_path / "tome").mkdir()
    (tmp_path / "tome" / "merge.py").write_text(STAND_IN)
    output = tmp_path / "out.json"
    flags = ["--tower", str(folder), "--images", str(folder / "images.parquet"), "--output", str(output)]
    flags += ["--num_images", "2", "--image_size", "56", "--tome_code", str(tmp_path), "--methods", "tome (own code)"]
    flags += ["--merge_ratios", "--placements", "0,1,2", "--speedups", "1.4"]
    benchmark.main(flags)
    (row,) = json.loads(output.read_text())["speedups"]
    tower = benchmark.load_tower(str(folder), 56)
    method = benchmark.Method(original=benchmark.tome_matchings(tmp_path)["tome (own code)"])
    images = torch.zeros(1, 3, 56, 56)
    gflops = benchmark.count_merged_gflops(tower, images, method, [0, 1, 2], row["merge_ratio"])
    assert benchmark.count_gflops(tower, images) / gflops == pytest.approx(1.4, abs=0.06)  # 1 of 16 tokens: 0.06
    record = json.loads(output.read_text())
    record["speedups"][0]["damage"] = 7.0
    output.write_text(json.dumps(record))
    benchmark.main(flags)
    assert json.loads(output.read_text()) == record
    with pytest.raises(ValueError, match="speedup=9 is not reached"):
        benchmark.Meter(tower, images).find_ratio(method, [0, 1, 2], 9)


def test_saved_models_are_measured_by_their_image_embeddings(folder, tmp_path, capsys):
    vision = dict(image_size=32, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=64)
    model = MLIPModel(MLIPConfig(vision_config=vision, text_config=text, frequency_embed_weight=0.5)).eval()
    model.save_pretrained(tmp_path / "model")
    CLIPImageProcessor(image_mean=[0.1, 0.2, 0.3]).save_pretrained(tmp_path / "model")
    flags = ["--tower", str(tmp_path / "model"), "--images", str(folder / "images.parquet"), "--num_images", "4"]
    flags += ["--output", str(tmp_path / "out.json"), "--methods", "ward", "--placements", "0", "--speedups"]
    benchmark.main([*flags, "--merge_ratios", "0.5"])
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    images = benchmark.load_images(str(folder / "images.parquet"), 4, 32, mean=(0.1, 0.2, 0.3), std=OPENAI_CLIP_STD)
    with torch.inference_mode():
        unmerged = model.get_image_features(images).pooler_output
        model.vision_model.config.merge_layers, model.vision_model.config.merge_method = [0], "ward"
        model.set_merge_ratio(0.5)
        merged = model.get_image_features(images).pooler_output
    damage = 1 - torch.nn.functional.cosine_similarity(merged, unmerged)
    assert row["damage"] == pytest.approx(damage.mean().item(), abs=1e-6)
    with pytest.raises(ValueError, match="image_size=64: the model in .* takes 32"):
        benchmark.load_measured_model(str(tmp_path / "model"), 64)
    with pytest.raises(SystemExit):
        benchmark.main([*flags, "--methods", "pitome"])
    assert "--methods 'pitome': choose from 'mlip'" in capsys.readouterr().err


def test_positions_of_the_same_size_stay_the_same():
    positions = torch.randn(1 + 16, 8)
    torch.testing.assert_close(benchmark.resize_positions(positions, 4), positions)
