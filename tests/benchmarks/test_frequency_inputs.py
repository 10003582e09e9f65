# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/study/frequency_inputs.py: the other inputs of the frequency stage against scipy, and runs with them."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.fft
import torch

STUDY = Path(__file__).parents[2] / "benchmarks" / "study"
sys.path.insert(0, str(STUDY))
import frequency_inputs  # noqa: E402
from frequency_inputs import INPUTS, VARIANTS, dct, high_pass, low_pass, three_scales, zig_zag  # noqa: E402

from modeling_mlip.frequency import POWER_FLOOR, log_amplitude  # noqa: E402


@pytest.fixture(scope="module")
def pixels():
    return torch.randn(2, 3, 32, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


def test_dct_coefficients_equal_those_of_scipy_in_the_order_of_jpeg(pixels):
    assert zig_zag(8)[:10].tolist() == [0, 1, 8, 16, 9, 2, 3, 10, 17, 24]
    assert sorted(zig_zag(8).tolist()) == list(range(64))
    outputs = dct(pixels, 8).view(2, 4, 2, 3, 64)
    patch = scipy.fft.dctn(pixels[1, 2, 16:24, 8:16].double().numpy(), norm="ortho").flatten()[zig_zag(8).numpy()]
    expected = np.sign(patch) * np.log1p(np.abs(patch) / POWER_FLOOR**0.5)
    np.testing.assert_allclose(outputs[1, 2, 1, 2].numpy(), expected, atol=1e-5)


def test_low_and_high_frequencies_are_the_whole_spectrum_once(pixels):
    whole = log_amplitude(pixels, 8)
    halves = torch.cat([low_pass(pixels, 8), high_pass(pixels, 8)], dim=-1)
    torch.testing.assert_close(halves.sort(dim=-1).values, whole.sort(dim=-1).values)
    cosine = torch.cos(2 * torch.pi * torch.arange(16) / 8).expand(2, 3, 32, 16)  # one period per patch
    assert low_pass(cosine, 8).max() > 1 > 0 > high_pass(cosine, 8).max()


def test_a_larger_block_gives_its_patches_the_same_features(pixels):
    features = three_scales(pixels, 8).unflatten(1, (4, 2))
    block = features[..., 3 * 40 : 3 * 40 + 3 * 144]
    for row in (0, 2):
        torch.testing.assert_close(block[:, row, 0], block[:, row + 1, 1])
    assert not torch.equal(block[:, 0, 0], block[:, 2, 0])


@pytest.fixture
def described_elsewhere(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text((STUDY / "data" / "flickr8k-nano.json").read_text())
    return path


@pytest.mark.parametrize("name", INPUTS)
def test_every_input_is_finite_and_one_row_for_each_patch(pixels, name):
    features = INPUTS[name](pixels, 8)
    assert features.shape[:2] == (2, 8) and features.isfinite().all()
    assert INPUTS[name](torch.zeros(1, 3, 32, 16), 8).isfinite().all()


def test_variants_are_trained_in_processes_and_written_once(tmp_path, monkeypatch, capsys):
    trained = []

    def train_arm(data, arm, seed, steps, bf16, device, objective):
        stage = frequency_inputs.modeling_mlip.MLIPFrequencyStage
        width = stage(frequency_inputs.named_config("nano").vision_config).input_projection.in_features
        trained.append((arm, steps, width, objective is not None))
        return {"arm": arm, "seed": seed, "steps": steps, "cpu_seconds": 1.0, "mean_recall": 5.0}

    def run_in_process(program, arguments):
        def start_run(run):
            frequency_inputs.main([*arguments, "--run", *map(str, run)])
            return json.loads(capsys.readouterr().out.splitlines()[-1])

        return start_run

    monkeypatch.setattr(frequency_inputs, "train_arm", train_arm)
    monkeypatch.setattr(frequency_inputs, "run_in_process", run_in_process)
    flags = ["--steps", "7", "--output_dir", str(tmp_path), "--variants", "pixels", "agreement", "no stage"]
    for _ in range(2):
        frequency_inputs.main([*flags, "--parallel", "1"])
    amplitudes = 3 * 8 * 5
    assert trained == [
        *[("MLIP", 7, 3 * 64, False), ("MLIP", 7, amplitudes, True), ("MLIP but frequency", 7, amplitudes, False)]
    ]
    (path,) = tmp_path.glob("*/flickr8k-nano.json")
    assert [run["variant"] for run in json.loads(path.read_text())["runs"]] == ["pixels", "agreement", "no stage"]
    assert set(VARIANTS) >= {"log-amplitude", "agreement", "no stage"}


def test_runs_with_other_settings_and_a_data_set_without_results_are_refused(described_elsewhere, tmp_path):
    with pytest.raises(SystemExit, match="mine.json does not exist; give --steps"):
        frequency_inputs.main(["--data", str(described_elsewhere)])
    path = tmp_path / "frequency_inputs" / "mine.json"
    path.parent.mkdir()
    same = frequency_inputs.read_study_data(str(described_elsewhere)).record()
    for settings in ({"data": {"batch": 3}}, {"data": same, "device": "cuda"}):
        path.write_text(json.dumps({**settings, "runs": []}))
        with pytest.raises(SystemExit, match="holds runs with other settings"):
            frequency_inputs.main(["--data", str(described_elsewhere), "--steps", "2", "--output_dir", str(tmp_path)])
