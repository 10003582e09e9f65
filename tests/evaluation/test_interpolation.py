# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip interpolate`: the weights at each alpha, the choice between them, and the folder that it writes."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TEXT, VISION, small_config
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from modeling_mlip import MLIPModel
from modeling_mlip.evaluation.interpolate_command import display_names
from modeling_mlip.evaluation.interpolation import choose_alpha, interpolate_weights
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.hub.verification import check_files


def command(start: str, end: str, files: dict[str, str], folder: Path, *more: str) -> list[str]:
    data = ["--validation_file", files["validation"], "--validation_file", files["train"]]
    return ["interpolate", start, end, *data, "--max_eval_samples", "12", "--output_dir", str(folder), *more]


def bits_equal(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.equal(ours.view(torch.int32), theirs.view(torch.int32))


@pytest.fixture(scope="module")
def fine(sources, tmp_path_factory) -> str:
    """A model with other weights than sources["plain"], which lacks its frequency stage in one case below."""
    folder = tmp_path_factory.mktemp("fine") / "fine"
    shutil.copytree(sources["plain"], folder)
    weights = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    weights = {name: t + 0.05 * torch.randn(t.shape, generator=generator) for name, t in weights.items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def test_weights_between_two_models_equal_a_formula_in_float64_and_the_ends_are_copies():
    generator = torch.Generator().manual_seed(0)
    start, end = ({"a": torch.randn(7, 5, generator=generator), "n": torch.tensor(3 + i)} for i in range(2))
    start["a"][0, 0], end["new"] = -0.0, torch.randn(2, generator=generator)
    for alpha in (0.25, 0.9):
        weights = interpolate_weights(start, end, alpha)
        expected = (1 - alpha) * start["a"].double() + alpha * end["a"].double()
        torch.testing.assert_close(weights["a"].double(), expected, rtol=1e-6, atol=1e-7)
        assert torch.equal(weights["new"], end["new"]) and weights["n"] == 4
    assert bits_equal(interpolate_weights(start, end, 0)["a"], start["a"])
    assert bits_equal(interpolate_weights(start, end, 1)["a"], end["a"])


def test_the_alpha_with_most_gain_for_least_loss_is_chosen():
    assert choose_alpha({0.0: (1, 9), 0.5: (8, 7), 1.0: (9, 1)}) == 0.5
    # 3.1 points gained and 27.9 lost; shares of gain and loss: 0.32 and 0.13, 0.86 and 0.59, 1.07 and 0.86.
    measured = {0.0: (1.20, 58.17), 0.25: (2.20, 54.56), 0.5: (3.87, 41.61), 0.75: (4.53, 34.28), 1.0: (4.30, 30.28)}
    assert choose_alpha(measured) == 0.5
    assert choose_alpha({0.0: (1, 9), 0.5: (5, 9), 1.0: (9, 9)}) == 1.0  # nothing is lost
    assert choose_alpha({0.0: (9, 9), 0.5: (8, 7), 1.0: (1, 1)}) == 0.0  # nothing is gained
    assert choose_alpha({0.0: (5, 5)}) == 0.0


def test_of_equal_alphas_the_most_accurate_on_new_data_is_chosen_and_then_the_end():
    # The table of docs/fine-tuning.md: nothing between the ends is better than they are.
    measured = {0.0: (1.53, 45.89), 0.25: (2.27, 44.17), 0.5: (4.03, 42.72), 0.75: (5.83, 41.83), 1.0: (7.40, 40.56)}
    assert choose_alpha(measured) == 1.0
    assert choose_alpha({1.0: (9, 1), 0.0: (1, 9), 0.75: (5, 5)}) == 1.0
    assert choose_alpha({0.0: (9, 1), 0.5: (5, 5), 1.0: (1, 9)}) == 0.0  # fine-tuning lost on the new data
    assert choose_alpha({0.0: (5, 5), 0.5: (5, 5), 1.0: (5, 5)}) == 1.0


def test_files_of_one_name_are_shown_with_their_folders():
    assert display_names(["data/new.csv", "data/old.csv"]) == ["new.csv", "old.csv"]
    assert display_names(["data/new/test.csv", "old/test.csv"]) == ["new/test.csv", "old/test.csv"]


def test_the_command_prints_a_table_and_writes_the_chosen_model(sources, fine, files, tmp_path, capsys):
    out = tmp_path / "out"
    assert mlip(command(sources["plain"], fine, files, out, "--alphas", "0", "0.5", "1")) == 0
    printed = capsys.readouterr().out
    content = json.loads((out / "interpolation.json").read_text())
    means = {r["alpha"]: (r["new"]["mean_recall"], r["old"]["mean_recall"]) for r in content["results"]}
    assert list(means) == [0.0, 0.5, 1.0] and content["alpha"] == choose_alpha(means)
    assert f"alpha {content['alpha']:g}: the largest share of the gain less that of the loss." in printed
    for alpha, (new, old) in means.items():
        row = rf"{alpha:g} +{new:.2f} +{old:.2f} +{(new + old) / 2:.2f}"
        assert any(line.split() == row.replace(" +", " ").split() for line in printed.splitlines()), row
    model, processor = AutoModel.from_pretrained(out), AutoProcessor.from_pretrained(out)
    assert isinstance(model, MLIPModel) and len(processor.tokenizer) == model.config.text_config.vocab_size
    start, end = (load_file(Path(folder) / "model.safetensors") for folder in (sources["plain"], fine))
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, torch.lerp(start[name], end[name], content["alpha"]))
    card = (out / "README.md").read_text()
    assert "## Interpolation" in card and "(1 - alpha) * plain + alpha * fine" in card and "# out" in card
    assert "validation.parquet" in card and "model-index" in card and "name: out" in card
    assert (out / "interpolation.png").read_bytes()[:4] == b"\x89PNG"
    check_files(out)  # no path of this machine, no pickle: it can be pushed


@pytest.mark.parametrize("alpha", ["0", "1"])
def test_alpha_0_and_1_write_the_weights_of_start_and_end_to_the_bit(alpha, sources, fine, files, tmp_path, capsys):
    out = tmp_path / "out"
    assert mlip(command(sources["plain"], fine, files, out, "--alphas", alpha, "--alpha", alpha)) == 0
    assert f"alpha {alpha}: given by --alpha" in capsys.readouterr().out
    expected = load_file(Path(sources["plain"] if alpha == "0" else fine) / "model.safetensors")
    ours = load_file(out / "model.safetensors")
    assert ours.keys() == expected.keys()
    assert all(bits_equal(ours[name], tensor) for name, tensor in expected.items())


def test_parameters_that_a_clip_model_lacks_are_those_of_end(sources, fine, files, tmp_path, capsys):
    out = tmp_path / "out"
    assert mlip(command(sources["clip"], fine, files, out, "--alphas", "0", "--alpha", "0")) == 0
    assert "Note: START lacks frequency_" in capsys.readouterr().out
    ours, end = load_file(out / "model.safetensors"), load_file(Path(fine) / "model.safetensors")
    start = load_file(Path(sources["clip"]) / "model.safetensors")
    name = "vision_model.frequency.gate"
    assert name not in start and torch.equal(ours[name], end[name])
    assert torch.equal(ours["text_projection.weight"], start["text_projection.weight"])


def test_models_and_flags_that_do_not_fit_are_refused_in_one_line(sources, fine, files, tmp_path, capsys):
    small = tmp_path / "small"
    text = {**TEXT, "vocab_size": 300}
    torch.manual_seed(0)
    MLIPModel(small_config(text=text, vision=VISION, token_loss_weight=0)).save_pretrained(small)
    exists = tmp_path / "exists"
    exists.mkdir()
    one_file = ["interpolate", fine, fine, "--validation_file", files["train"], "--output_dir", str(tmp_path / "x")]
    for flags, message in (
        (
            command(str(small), fine, files, tmp_path / "x"),
            "text_model.embeddings.token_embedding.weight has the shape",
        ),
        (command(fine, fine, files, exists), "exists: choose another folder"),
        (command(fine, fine, files, tmp_path / "x", "--alphas", "0", "1.5"), "alpha=1.5: choose 0 (START) to 1 (END)"),
        (one_file, "Got 1 validation files: give --validation_file twice"),
    ):
        assert mlip(flags) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists() and not list(exists.iterdir())
