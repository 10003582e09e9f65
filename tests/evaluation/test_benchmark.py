# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip benchmark`: its figures against independent ones, its files, its refusals."""

import json

import numpy as np
import pytest
import torch
from evaluation_cases import evaluate
from huggingface_hub.errors import StrictDataclassError
from PIL import Image

from modeling_mlip.evaluation import benchmark
from modeling_mlip.evaluation.benchmark import gflops_of, peak_memory, settings_of
from modeling_mlip.evaluation.encoders import load_encoder, set_merging
from modeling_mlip.evaluation.plots import plot_pareto
from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.cli import main as mlip


def run(sources, output, *flags: str) -> int:
    quick = ["--rounds", "2", "--warmup", "1", "--batch_size", "8", "--output_dir", str(output)]
    return mlip(["benchmark", "--model_name_or_path", sources["mlip"], *quick, *flags])


def test_the_sweep_gives_the_accuracy_of_evaluate_and_cheaper_settings_for_more_merging(
    sources,
    files,
    tmp_path,
    capsys,
):
    output = tmp_path / "bench"
    flags = ["--validation_file", files["validation"], "--merge_ratios", "0", "0.5", "0.7"]
    assert run(sources, output, *flags, "--merge_methods", "mlip", "tome", "--baseline", sources["clip"]) == 0
    results = json.loads((output / "benchmark.json").read_text())
    rows = results["rows"]
    assert [(row["method"], row["merge_ratio"]) for row in rows] == [
        *(("none", 0.0), ("mlip", 0.5), ("mlip", 0.7), ("tome", 0.5), ("tome", 0.7), ("baseline: clip", None))
    ]
    alone = evaluate(sources["mlip"], tmp_path, *flags[:2], "--merge_ratio", "0.7")
    assert rows[2]["mean_recall"] == pytest.approx(alone["mean_recall"])
    theirs = evaluate(sources["clip"], tmp_path, *flags[:2])
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
    results = json.loads((tmp_path / "bench" / "benchmark.json").read_text())
    assert results["metric"] == "zero_shot_label_accuracy@1"
    alone = load_encoder(sources["mlip"])
    set_merging(alone, 0.5, "elip")
    assert len(results["rows"]) == 1 and results["rows"][0]["method"] == "elip"


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


@pytest.mark.skipif(not benchmark.PROC_RESET.exists(), reason="the kernel's high-water mark is Linux's")
def test_peak_memory_is_what_a_call_holds_at_once_though_malloc_kept_what_the_last_one_freed():
    for blocks in (2, 1, 3, 1):
        found = peak_memory(lambda: [torch.empty(6 * 2**20).fill_(1) for _ in range(blocks)], on_gpu=False)  # noqa: B023
        assert found == pytest.approx(24 * blocks, abs=4)  # MiB


def test_settings_leave_the_model_as_it_was_and_name_ratio_zero_once(sources):
    encoder = load_encoder(sources["mlip"])
    settings = settings_of(encoder, [0.5, 0, 0.5], ["mlip", "tome"])
    assert encoder.model.config.merge_method == "mlip"
    settings = settings_of(encoder, [0.5, 0, 0.5], ["tome", "mlip"])
    assert [(s.method, s.merge_ratio) for s in settings] == [("none", 0.0), ("tome", 0.5), ("mlip", 0.5)]
    assert encoder.merge_ratio == 0.5
    settings[1].apply()
    assert encoder.model.vision_model.config.merge_method == "tome"
    with pytest.raises(StrictDataclassError, match="leaves none of 64 patch tokens"):
        settings_of(encoder, [0.999], ["mlip"])


def test_bad_input_is_refused_before_anything_is_measured(sources, files, tmp_path, capsys):
    pairs = ["--validation_file", files["validation"]]
    cases = [
        ([*pairs, "--merge_methods", "prune"], "'prune' is unknown; choose from mlip, tome"),
        ([*pairs, "--merge_ratios", "1.5"], "1.5 is not a share of tokens"),
        ([*pairs, "--rounds", "0"], "rounds=0: choose 1 or more"),
        ([*pairs, "--model_name_or_path", sources["clip"]], "merges no tokens; give it as --baseline"),
        ([*pairs, "--baseline", str(tmp_path)], "holds no config.json"),
        ([*pairs, "--streaming"], "leave out --streaming"),
    ]
    for flags, message in cases:
        assert run(sources, tmp_path / "bench", *flags) == 1, flags
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("mlip benchmark: error:") and message in line, (flags, line)
        assert not (tmp_path / "bench").exists()


def test_the_picture_has_a_line_for_each_method(tmp_path):
    def row(method, ratio, speed, gflops, accuracy):
        spread = {"images_per_second_low": speed - 5, "images_per_second_high": speed + 5}
        return {"method": method, "merge_ratio": ratio, "images_per_second": speed, **spread} | {
            "gflops_per_image": gflops,
            "mean_recall": accuracy,
        }

    rows = [row("none", 0.0, 100, 4.0, 60.0), row("mlip", 0.5, 150, 2.5, 58.0), row("tome", 0.5, 160, 2.5, 52.0)]
    plot_pareto(rows, "mean_recall", tmp_path / "two.png")
    plot_pareto(rows[:2], "mean_recall", tmp_path / "one.png")

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
