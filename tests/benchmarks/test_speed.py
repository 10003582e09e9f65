# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/speed.py on `tiny`: that it runs, and that what it compares is comparable. Nothing here asserts a time."""

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

SOURCE = Path(__file__).parents[2] / "benchmarks" / "speed.py"


@pytest.fixture(scope="module")
def speed():
    spec = importlib.util.spec_from_file_location("speed_benchmark", SOURCE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def run(speed, folder: Path, *flags: str) -> dict:
    """The only entry that a run on `tiny` writes."""
    target = folder / "speed.json"
    quick = ["--config_name", "tiny", "--batch_size", "2", "--rounds", "2", "--turn_seconds", "0"]
    speed.main([*quick, "--merge_ratios", "0.5", "--device", "cpu", "--output", str(target), *flags])
    (entry,) = json.loads(target.read_text())
    return entry


def test_towers_without_merging_have_the_flops_of_clip_and_merging_ones_fewer(speed, tmp_path):
    entry = run(speed, tmp_path, "--placements", "early")
    rows = {row["method"]: row for row in entry["rows"] if row["merge_ratio"] == 0}
    assert {speed.CLIP, speed.OPEN_CLIP, speed.TIMM, speed.PLAIN, speed.MLIP} == set(rows)
    for method in (speed.OPEN_CLIP, speed.TIMM, speed.PLAIN):
        assert rows[method]["flop_ratio"] == pytest.approx(1, abs=0.01), method
    assert 0.9 < rows[speed.MLIP]["flop_ratio"] < 1  # the frequency stage
    merging = {row["method"]: row for row in entry["rows"] if row["merge_ratio"] == 0.5}
    assert {speed.MLIP, speed.ELIP} <= set(merging)
    assert all(row["flop_ratio"] > 1.3 and row["placement"] == "early" for row in merging.values())
    for row in entry["rows"]:
        assert 0 < row["speed_up"]["low"] <= row["speed_up"]["median"] <= row["speed_up"]["high"]
    assert rows[speed.CLIP]["speed_up"] == {"median": 1, "low": 1, "high": 1}
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_step_is_timed_with_the_memory_that_its_own_process_took(speed, tmp_path, monkeypatch):
    monkeypatch.setattr(
        speed, "peak_memory", lambda everyone, flags: {one: 100 / (n + 1) for n, one in enumerate(everyone)}
    )
    entry = run(speed, tmp_path, "--training", "--placements", "three", "--methods", speed.OPEN_CLIP, speed.MLIP)
    assert [row["memory_ratio"] for row in entry["rows"]] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert entry["settings"]["caption_padding"] == "max_length"
    clip, open_clip, *_ = entry["rows"]
    assert open_clip["gflops_per_image"] == pytest.approx(clip["gflops_per_image"], rel=0.01)


def test_parts_of_the_tower_add_up_to_it(speed, tmp_path):
    entry = run(speed, tmp_path, "--parts", "--placements", "three", "--rounds", "1")
    tower = {row["part"]: row["share"]["median"] for row in entry["rows"] if row["of"].startswith("vision tower")}
    by_difference = [part for part in tower if part.startswith("size term")]
    assert sum(share for part, share in tower.items() if part not in by_difference) == pytest.approx(1)
    assert all(tower[part] > 0 for part in ("frequency stage", "attention", "matching", "merging", "log of sizes"))
    assert {row["part"] for row in entry["rows"]} >= {"spatial loss", "frequency loss", "token loss", "text tower"}


def test_a_mode_of_compilation_needs_compilation(speed, capsys):
    with pytest.raises(SystemExit):
        speed.parse_flags(["--compile_mode", "reduce-overhead"])
    assert "--compile_mode reduce-overhead needs --compile" in capsys.readouterr().err
    assert speed.parse_flags(["--compile", "--compile_mode", "reduce-overhead"]).compile


def test_a_part_does_not_count_what_is_called_from_it(speed, monkeypatch):
    ticks = iter([0, 2, 5, 10])  # outer starts, inner starts, inner ends, outer ends
    monkeypatch.setattr(speed, "read_clock", lambda flags: next(ticks))
    timer = speed.PartTimer(None)
    inner = timer.wrap(lambda: None, "inner")
    timer.wrap(inner, "outer")()
    assert timer.seconds == {"inner": 3, "outer": 7}


def test_contestants_of_one_method_share_weights_and_not_settings(speed):
    flags = speed.parse_flags(["--device", "cpu"])
    flags.config_name, flags.batch_size = "tiny", 1
    bench = speed.Bench(flags)
    plain, merging = (bench.model(speed.Contestant(speed.MLIP, ratio, "every")) for ratio in (0, 0.7))
    assert [p.data_ptr() for p in plain.parameters()] == [p.data_ptr() for p in merging.parameters()]
    assert (plain.config.merge_ratio, merging.config.merge_ratio) == (0, 0.7)
    with torch.inference_mode():
        assert plain(bench.pixels).token_sizes.shape[1] == 64
        assert merging(bench.pixels).token_sizes.shape[1] == round(64 * 0.3)


def test_elip_of_its_authors_prunes_after_the_same_layers_to_as_many_tokens(speed, monkeypatch):
    made = {}

    class VisionTransformer(torch.nn.Module):
        def __init__(self, **settings):
            super().__init__()
            made.update(settings)

        def forward(self, pixels, text_cls=None):
            assert text_cls.shape == (1, 768)

    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.vit", types.SimpleNamespace(VisionTransformer=VisionTransformer))
    flags = speed.parse_flags(["--device", "cpu", "--methods", speed.AUTHORS_ELIP, "--merge_ratios", "0.5"])
    flags.config_name, flags.batch_size = "vit-b-16", 1
    _, own = speed.contestants(flags)
    assert own == speed.Contestant(speed.AUTHORS_ELIP, 0.5, "three")
    bench = speed.Bench(flags)
    bench.model(own)(bench.pixels)
    assert made["prune_state"] == {
        "begin_layer": [4, 7, 10],
        "num_act_layers": [3, 3, 2],  # up to the next stage, and to the end
        "num_keep_tokens": [155, 122, 97],  # beside the fused one, of 196 at first
    }
    assert (made["patch_size"], made["depth"], made["num_heads"]) == (16, 12, 12)


def test_captions_have_ten_to_twenty_tokens_and_are_padded_as_asked(speed):
    flags = speed.parse_flags(["--device", "cpu", "--training"])
    flags.config_name, flags.batch_size = "tiny", 64
    captions = speed.Bench(flags).captions
    assert captions["input_ids"].shape[1] == 32
    lengths = captions["attention_mask"].sum(dim=1)
    assert lengths.min() >= 10 and lengths.max() <= 20
    text = speed.named_config("tiny").text_config
    assert (captions["input_ids"].gather(1, lengths[:, None] - 1) == text.eos_token_id).all()
    assert ((captions["input_ids"] == text.eos_token_id).int().argmax(dim=1) == lengths - 1).all()
    flags.caption_padding = "longest"
    assert speed.Bench(flags).captions["input_ids"].shape[1] == lengths.max()


def test_a_run_replaces_the_one_of_the_same_settings_and_keeps_others(speed, tmp_path):
    target = tmp_path / "speed.json"
    for batch_size, rounds in ((8, 1), (1, 1), (8, 2)):
        speed.save({"settings": {"task": "parts", "batch_size": batch_size}, "rounds": rounds, "rows": [{}]}, target)
    kept = [(entry["settings"]["batch_size"], entry["rounds"]) for entry in json.loads(target.read_text())]
    assert kept == [(1, 1), (8, 2)]
