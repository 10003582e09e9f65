# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip benchmark`: its figures against independent ones, its files, its refusals."""

import json

import numpy as np
import pytest
import torch
from evaluation_cases import run_evaluate
from PIL import Image

from modeling_mlip import MLIPModel
from modeling_mlip.data.sources import load_splits
from modeling_mlip.evaluation import ZeroShot, evaluate
from modeling_mlip.evaluation.benchmark import benchmark_settings
from modeling_mlip.evaluation.cost import PROC_RESET, Cost, gflops_of, measure_peak_memory
from modeling_mlip.evaluation.encoders import load_encoder, set_merging
from modeling_mlip.evaluation.plots import ParetoPoint, plot_pareto
from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.hub.loading import load_processor


def run(sources, output, *flags: str) -> int:
    quick = ["--rounds", "2", "--warmup", "1", "--batch_size", "8", "--output_dir", str(output)]
    return mlip(["benchmark", "--model_name_or_path", sources["mlip"], *quick, *flags])


def read_rows(output) -> tuple[dict, list[dict]]:
    """The content of benchmark.json, and its rows with the results as name -> value."""
    content = json.loads((output / "benchmark.json").read_text())
    return content, [row | {result["name"]: result["value"] for result in row["results"]} for row in content["rows"]]


def test_the_sweep_gives_the_accuracy_of_evaluate_and_cheaper_settings_for_more_merging(
    sources,
    files,
    tmp_path,
    capsys,
):
    output = tmp_path / "bench"
    flags = ["--validation_file", files["validation"], "--merge_ratios", "0", "0.5", "0.7"]
    assert run(sources, output, *flags, "--merge_methods", "mlip", "tome", "--baseline", sources["clip"]) == 0
    results, rows = read_rows(output)
    assert [(row["method"], row["merge_ratio"]) for row in rows] == [
        *(("none", 0.0), ("mlip", 0.5), ("mlip", 0.7), ("tome", 0.5), ("tome", 0.7), ("baseline: clip", None))
    ]
    alone = run_evaluate(sources["mlip"], tmp_path, *flags[:2], "--merge_ratio", "0.7")
    assert rows[2]["mean_recall"] == pytest.approx(alone["mean_recall"])
    theirs = run_evaluate(sources["clip"], tmp_path, *flags[:2])
    assert rows[-1]["text_to_image_recall@5"] == pytest.approx(theirs["text_to_image_recall@5"])
    assert rows[0]["gflops_per_image"] > rows[1]["gflops_per_image"] > rows[2]["gflops_per_image"] > 0
    for row in rows:
        assert row["images_per_second_low"] <= row["images_per_second"] <= row["images_per_second_high"]
    assert results["metric"] == "mean_recall" and (results["images"], results["captions"]) == (40, 40)
    assert Image.open(output / "pareto.png").size == (1000, 480)
    printed = capsys.readouterr().out
    assert "baseline: clip" in printed and "GFLOPs/image" in printed
    assert run(sources, output, *flags) == 1
    assert "holds a benchmark.json already" in capsys.readouterr().err


def test_a_classification_set_is_swept_by_zero_shot_accuracy(sources, files, tmp_path):
    flags = ["--data_dir", files["images"], "--merge_ratios", "0.5", "--merge_methods", "elip", "--templates", "a {}"]
    assert run(sources, tmp_path / "bench", *flags) == 0
    results, [row] = read_rows(tmp_path / "bench")
    assert results["metric"] == "zero_shot_label_accuracy@1"
    assert (row["method"], row["merge_ratio"]) == ("elip", 0.5)
    model = MLIPModel.from_pretrained(sources["mlip"], merge_method="elip", merge_ratio=0.5).eval()
    found = evaluate(
        model,
        load_processor(sources["mlip"]),
        load_splits(data_dir=files["images"]),
        [ZeroShot(templates=["a {}"])],
    )
    assert row["zero_shot_label_accuracy@1"] == found[0].value


def test_without_a_data_set_speed_is_measured_alone(sources, tmp_path, capsys):
    output = tmp_path / "bench"
    flags = ["--merge_ratios", "0", "0.5", "--merge_methods", "mlip", "--baseline", sources["open_clip"]]
    assert run(sources, output, *flags) == 0
    content, rows = read_rows(output)
    assert (content["dataset"], content["metric"]) == (None, None)
    assert [(row["method"], row["merge_ratio"], row["results"]) for row in rows][:2] == [
        ("none", 0, []),
        ("mlip", 0.5, []),
    ]
    assert len(rows) == 3 and rows[0]["gflops_per_image"] > rows[1]["gflops_per_image"] > 0
    assert [path.name for path in output.iterdir()] == ["benchmark.json"]
    assert "no accuracy without a data set" in capsys.readouterr().out


def test_flops_are_those_of_the_formula_for_clip(sources):
    encoder = load_encoder(sources["clip"])
    config = encoder.model.config.vision_config
    N, D, M = (config.image_size // config.patch_size) ** 2 + 1, config.hidden_size, config.intermediate_size
    layer = 2 * N * D * (4 * D + 2 * M) + 4 * N * N * D  # projections and MLP; scores and their weighted sum
    patches = 2 * (N - 1) * D * 3 * config.patch_size**2
    expected = config.num_hidden_layers * layer + patches + 2 * D * encoder.model.config.projection_dim
    with torch.inference_mode():
        found = gflops_of(encoder, torch.randn(2, 3, config.image_size, config.image_size))
    assert found == pytest.approx(expected / 1e9, rel=1e-6)


@torch.inference_mode()
def test_flops_of_open_clip_are_counted_in_its_fast_path_too(sources):
    encoder = load_encoder(sources["open_clip"])
    N, D = 17, 64
    layer = 2 * N * D * 12 * D + 4 * N * N * D
    found = gflops_of(encoder, torch.randn(1, 3, 32, 32))
    assert found == pytest.approx((2 * layer + 2 * 16 * D * 3 * 64 + 2 * D * 24) / 1e9, rel=1e-6)


@pytest.mark.skipif(not PROC_RESET.exists(), reason="the kernel's high-water mark is Linux's")
def test_peak_memory_is_what_a_call_holds_at_once_though_malloc_kept_what_the_last_one_freed():
    for blocks in (2, 1, 3, 1):
        found = measure_peak_memory(lambda: [torch.empty(6 * 2**20).fill_(1) for _ in range(blocks)], on_gpu=False)  # noqa: B023
        assert found == pytest.approx(24 * blocks, abs=4)  # MiB


def test_settings_leave_the_model_as_it_was_and_name_ratio_zero_once(sources):
    encoder = load_encoder(sources["mlip"])
    settings = benchmark_settings(encoder, [0.5, 0, 0.5], ["mlip", "tome"])
    assert encoder.model.config.merge_method == "mlip"
    settings = benchmark_settings(encoder, [0.5, 0, 0.5], ["tome", "mlip"])
    assert [(s.method, s.merge_ratio) for s in settings] == [("none", 0.0), ("tome", 0.5), ("mlip", 0.5)]
    assert encoder.merge_ratio == 0.5
    settings[1].apply()
    assert encoder.model.vision_model.config.merge_method == "tome"
    before = encoder.merge_ratio, encoder.model.config.merge_method
    with pytest.raises(ValueError, match="^merge_ratio=0.999 leaves none of the 64 patch tokens"):
        benchmark_settings(encoder, [0.999], ["mlip", "elip"])
    assert (encoder.merge_ratio, encoder.model.config.merge_method) == before
    with pytest.raises(ValueError, match="merge_method='prune': choose one of mlip, tome, elip"):
        set_merging(encoder, 0.5, "prune")


def test_bad_input_is_refused_before_anything_is_measured(sources, files, tmp_path, capsys):
    pairs = ["--validation_file", files["validation"]]
    cases = [
        ([*pairs, "--merge_methods", "prune"], "'prune' is unknown; choose from mlip, tome"),
        ([*pairs, "--merge_ratios", "1.5"], "1.5 is not a share of tokens"),
        ([*pairs, "--merge_ratios", "nan"], "nan is not a share of tokens"),
        ([*pairs, "--rounds", "0"], "rounds=0: choose 1 or more"),
        ([*pairs, "--templates", "a {}"], "has no effect: choose the columns to classify by"),
        ([*pairs, "--model_name_or_path", sources["clip"]], "merges no tokens; give it as --baseline"),
        ([*pairs, "--baseline", str(tmp_path)], "holds no config.json"),
        ([*pairs, "--streaming"], "leave out --streaming"),
        ([*pairs, "--no_augment"], "--no_augment"),
        (["--label_columns", "shape"], "--label_columns without a data set"),
    ]
    for flags, message in cases:
        assert run(sources, tmp_path / "bench", *flags) == 1, flags
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("mlip benchmark: error:") and message in line, (flags, line)
        assert not (tmp_path / "bench").exists()


def test_the_picture_has_a_line_for_each_method(tmp_path):
    def point(method, ratio, speed, gflops, accuracy):
        return ParetoPoint(method, ratio, accuracy, speed, speed - 5, speed + 5, gflops)

    points = [
        point("none", 0.0, 100, 4.0, 60.0),
        point("mlip", 0.5, 150, 2.5, 58.0),
        point("tome", 0.5, 160, 2.5, 52.0),
    ]
    plot_pareto(points, "mean recall (%)", tmp_path / "two.png")
    plot_pareto(points[:2], "mean recall (%)", tmp_path / "one.png")

    def orange(name):  # the colour of the second line
        red, green, blue = np.asarray(Image.open(tmp_path / name).convert("RGB")).astype(int).transpose(2, 0, 1)
        return ((red > 240) & (abs(green - 127) < 12) & (blue < 40)).sum()

    assert orange("two.png") > 300 and orange("one.png") == 0


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")
    monkeypatch.setattr("os.replace", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_text() == "old" and [file.name for file in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_a_cost_that_was_not_measured_is_refused(value):
    with pytest.raises(ValueError, match="images_per_second_low=.*must be finite and above 0"):
        Cost(2.0, value, 3.0, 1.0, None)
