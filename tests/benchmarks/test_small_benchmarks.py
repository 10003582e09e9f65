# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Each benchmark runs on a tiny setting, writes the documented fields, and one value equals a separate computation.

conversion.py, mini_batch_memory.py, exchange_cost.py, token_loss_memory.py, training_cost.py, draw_method.py and
study/figures.py.
"""

import contextlib
import importlib.util
import io
import json
import statistics
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch

from modeling_mlip import MLIPModel
from modeling_mlip.hub.configurations import named_config

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "study" / "results"


def load_benchmark(name: str) -> ModuleType:
    """Import a benchmark program, which is not part of the package."""
    spec = importlib.util.spec_from_file_location(f"benchmark_{Path(name).stem}", BENCHMARKS / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_conversion_reports_parity_seconds_and_the_size_of_the_checkpoint(tmp_path, monkeypatch):
    from safetensors.torch import load_file

    benchmark = load_benchmark("conversion.py")
    vision = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 16}
    text = {"context_length": 8, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    model_cfg = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: json.loads(json.dumps(model_cfg)))
    benchmark.write_random_checkpoint("small", tmp_path)
    result = benchmark.measure_conversion(tmp_path)
    assert set(result) == {"parity", "worst", "seconds", "peak_bytes", "checkpoint_bytes", "memory"}
    assert result["worst"] <= 1e-4
    state = load_file(tmp_path / "open_clip_model.safetensors")
    assert result["checkpoint_bytes"] == sum(tensor.nbytes for tensor in state.values())
    on_meta = benchmark.measure_on_meta("small")
    assert on_meta["meta"] and on_meta["checkpoint_bytes"] == result["checkpoint_bytes"]
    assert "small" in benchmark.format_row("small", result)


@pytest.mark.skipif(open_clip.__version__[:4] != "3.3.", reason="the table is that of open_clip 3.3")
def test_the_documented_table_of_conversions_is_what_the_command_prints(monkeypatch, capsys):
    benchmark = load_benchmark("conversion.py")
    monkeypatch.setattr(benchmark, "check_configuration", lambda name, full: pytest.fail(f"{name} is not measured"))
    benchmark.main([])
    printed, document = capsys.readouterr().out, (BENCHMARKS.parent / "docs" / "conversion.md").read_text()
    assert f"```\n{printed}```" in document
    num_names = len(benchmark.names())
    assert f"{num_names} of {num_names} agree" in printed
    assert f"These {num_names} configurations of open_clip 3.3" in document
    supported, listed = benchmark.count_supported_tags()
    assert (
        f"{supported} of the {listed} pretrained tags that open_clip lists ({100 * supported / listed:.0f} %)"
        in document
    )


def test_what_was_measured_is_kept_and_full_replaces_rows_of_the_meta_device():
    benchmark = load_benchmark("conversion.py")
    results = {"ViT-S-32": {"worst": 0.0}, "ViT-g-14": {"meta": True}, "ViT-B-32": {"error": "killed"}}
    kept = [[name for name in (*results, "ViT-B-16") if benchmark.is_measured(name, results, full)] for full in (0, 1)]
    assert kept == [["ViT-S-32", "ViT-g-14"], ["ViT-S-32"]]


def test_mini_batch_memory_writes_one_row_for_each_setting(tmp_path, monkeypatch, capsys):
    benchmark = load_benchmark("mini_batch_memory.py")
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "mini_batches.json")

    def measure_here(setup, processes):
        return benchmark.measure_step(**setup | {"folder": str(tmp_path)})

    monkeypatch.setattr(benchmark, "measure_in_processes", measure_here)
    for _ in range(2):  # the second run replaces the rows of the first
        benchmark.main(["--pairs", "4", "--mini_batch_size", "2", "--plain_pairs", "4", "--no_bf16"])
    rows = json.loads(benchmark.RESULTS.read_text())
    committed = json.loads((BENCHMARKS / "results" / "mini_batches.json").read_text())
    assert {(row["pairs"], row["mini_batch_size"]) for row in rows} == {(4, 2), (4, None)}
    for row in rows:
        assert set(row) == set(committed[0])
        assert row["peak_mib"] >= row["before_mib"] > 0 and row["seconds"] > 0
    model = MLIPModel(named_config("tiny"))
    batch = benchmark.random_batch(model, 50)
    ends = (batch["input_ids"] == model.config.text_config.eos_token_id).int().argmax(dim=1)
    assert torch.equal(ends + 1, batch["attention_mask"].sum(dim=1))
    assert 6 <= int(ends.min()) + 1 and int(ends.max()) + 1 <= 16


def test_token_loss_memory_writes_the_size_of_all_similarities(tmp_path, monkeypatch, capsys):
    benchmark = load_benchmark("token_loss_memory.py")
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "token_loss_memory.json")

    def run_here(command, **options):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            benchmark.main(command[2:])
        return SimpleNamespace(stdout=printed.getvalue())

    monkeypatch.setattr(benchmark, "subprocess", SimpleNamespace(run=run_here))
    sizes = ["--pairs", "3", "--image_tokens", "4", "--text_tokens", "5", "--width", "6", "--device", "cpu"]
    benchmark.main([*sizes, "--compare"])
    [row] = json.loads(benchmark.RESULTS.read_text())
    committed = json.loads((BENCHMARKS / "results" / "token_loss_memory.json").read_text())
    assert set(row) == set(committed[0])
    similarities = torch.einsum("imp,tlp->itml", torch.zeros(3, 4, 6), torch.zeros(3, 5, 6))
    assert row["similarities_mib"] == similarities.nbytes / 2**20
    assert all(row[form]["seconds"] > 0 for form in ("chunked", "plain"))


def test_exchange_cost_writes_bytes_and_memory_for_each_part(tmp_path, capsys):
    """tests/training/test_distributed.py compares the bytes with those that processes send."""
    benchmark = load_benchmark("exchange_cost.py")
    R, W, P = 512, 4, 512
    benchmark.main(["--pairs", str(R * W), "--processes", str(W), "--output_file", str(tmp_path / "cost.json")])
    record = json.loads((tmp_path / "cost.json").read_text())
    committed = json.loads((BENCHMARKS / "results" / "exchange_cost.json").read_text())
    assert set(record) == set(committed)
    assert {row["part"] for row in record["rows"]} == {row["part"] for row in committed["rows"]}
    rows = {row["part"]: row for row in record["rows"]}
    score_bytes, embed_bytes = 4 * R * R * W, 4 * R * P
    # InfoNCE: the embeddings of all pairs and their gradients, and at least the targets and log-probabilities.
    assert rows["spatial, InfoNCE"]["peak_bytes"] > 4 * W * embed_bytes + 3 * score_bytes
    # Sigmoid: some blocks of one chunk, its own embeddings and those of a chunk, with gradients.
    assert rows["spatial, sigmoid"]["peak_bytes"] < 8 * score_bytes / W + 10 * embed_bytes
    sent = rows["spatial, sigmoid"]["sent_bytes"]
    assert sent == 3 * 16 * R + 2 * 3 * (embed_bytes + 16 * R) + 4 * embed_bytes  # keys, two rounds, gradients


def test_training_cost_counts_about_the_operations_of_the_linear_layers(monkeypatch):
    benchmark = load_benchmark("training_cost.py")
    monkeypatch.setattr(benchmark, "CAPTION_LENGTH", 32)  # the longest of `tiny`
    config = named_config("tiny")
    half, whole = (benchmark.pair_flops("tiny", ratio) for ratio in (0.5, 0))
    assert half < whole
    # Linear layers of the layers of both towers, without merging: 2 FLOPs for each weight and token.
    linear = sum(
        tower.num_hidden_layers * 12 * tower.hidden_size**2 * 2 * tokens
        for tower, tokens in ((config.vision_config, 1 + 64), (config.text_config, 32))
    )
    assert linear < whole < 1.3 * linear


def test_training_cost_writes_hours_for_each_recipe(tmp_path, monkeypatch, capsys):
    benchmark = load_benchmark("training_cost.py")
    monkeypatch.setattr(benchmark, "pair_flops", lambda name, merge_ratio: 1e9)
    benchmark.main(["--output", str(tmp_path / "cost.json"), "--utilisation", "0.5"])
    record = json.loads((tmp_path / "cost.json").read_text())
    committed = json.loads((BENCHMARKS / "results" / "training_cost.json").read_text())
    assert set(record) == set(committed)
    assert [set(row) for row in record["estimates"]] == [set(row) for row in committed["estimates"]]
    first = record["estimates"][0]  # four passes over 2.9 million pairs in 32 epochs
    assert first["A100 hours"] == pytest.approx(4e9 * 2.9e6 * 32 / (312e12 * 0.5) / 3600)


def test_the_figure_of_the_method_shows_the_spectrum_of_its_image(tmp_path):
    benchmark = load_benchmark("draw_method.py")
    image = benchmark.example_image()
    amplitude = benchmark.amplitude_image(image)
    assert amplitude.shape == (96, 54)
    plain = amplitude[:16, :9]  # the corner patch has one value: no frequency but 0
    spectrum = np.abs(np.fft.rfft2(image[:16, :16]))
    assert np.unravel_index(spectrum.argmax(), spectrum.shape) == (0, 0)
    assert np.unravel_index(plain.argmax(), plain.shape) == (8, 0)  # frequency 0 is in the middle row
    benchmark.draw_method(tmp_path / "method.png")
    assert (tmp_path / "method.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def figures(monkeypatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS / "study"))
    return load_benchmark("study/figures.py")


def test_the_table_of_the_study_holds_the_mean_and_spread_over_seeds(figures):
    record = json.loads((RESULTS / "noto-emoji.json").read_text())
    rows = {row[""]: row for row in figures.metrics_table(record, "steps")}
    values = [run["recall@1"] for run in record["runs"] if run["arm"] == "CLIP" and run["steps"] == 300]
    assert rows["CLIP"]["seeds"] == len(values)
    assert rows["CLIP"]["recall@1"] == f"{np.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def test_figures_are_printed_and_drawn_for_every_result_file(figures, tmp_path, capsys):
    figures.main(["--output_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    for path in RESULTS.glob("*.json"):
        drawn = list(tmp_path.glob(f"study_{path.stem}*.png"))
        assert drawn and all(picture.read_bytes().startswith(b"\x89PNG") for picture in drawn)
        assert f"# {path.stem}" in printed
    assert (tmp_path / "study_flickr8k-nano_curves.png").is_file()


def test_kill_and_resume_compares_contents_and_not_file_names():
    benchmark = load_benchmark("kill_and_resume.py")
    first, second = {"a": torch.arange(3), "b": [1, 2]}, {"b": [1, 2], "a": torch.arange(3)}
    assert benchmark.digest(first) == benchmark.digest(second)
    assert benchmark.digest(first) != benchmark.digest({"a": torch.arange(3), "b": [1, 3]})
    assert "--streaming" in benchmark.command(Path("root"), (True, 2), "run")


def test_long_captions_measures_short_and_long_captions_before_and_after(tmp_path, capsys):
    benchmark = load_benchmark("long_captions.py")
    sizes = ["--train_sets", "2", "--validation_sets", "1", "--steps", "2", "--long_steps", "2"]
    benchmark.main(["--folder", str(tmp_path / "run"), *sizes, "--output_file", str(tmp_path / "long.json")])
    record = json.loads((tmp_path / "long.json").read_text())
    committed = json.loads((BENCHMARKS / "results" / "long_captions.json").read_text())
    assert set(record) == set(committed)
    stages = [(row["model"], row["captions"]) for row in record["rows"]]
    assert stages == [(row["model"], row["captions"]) for row in committed["rows"]]
    for result in (record, committed):
        short, long = result["tokens"]["caption"], result["tokens"]["long_caption"]
        assert short[1] <= 20 and 80 <= long[0] and long[1] <= 248
        before, stretched = (
            {name: value for name, value in row.items() if name != "model"} for row in result["rows"][::2][:2]
        )
        assert before == stretched  # short captions use positions that stay


def test_siglip_speed_counts_the_flops_that_merging_saves(tmp_path, capsys):
    from transformers import SiglipConfig

    tower = {"hidden_size": 64, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 2}
    text = {**tower, "max_position_embeddings": 8, "projection_size": 64}
    config = SiglipConfig(text_config=text, vision_config={**tower, "image_size": 64, "patch_size": 8})
    output = tmp_path / "speed.json"
    flags = "--rounds 1 --turn_seconds 0 --batch_size 2 --merge_ratios 0.5 --output".split()
    load_benchmark("siglip_speed.py").main([*flags, str(output)], config)
    rows = json.loads(output.read_text())["rows"]
    assert [row["method"] for row in rows] == ["SigLIP (transformers)", "MLIP", *["ward", "mlip"] * 2]
    assert rows[1]["flop_ratio"] == pytest.approx(1, abs=0.01)
    assert 1 < rows[3]["flop_ratio"] < rows[5]["flop_ratio"]  # early merging saves more
    assert "layers 0 to 2" in capsys.readouterr().out
