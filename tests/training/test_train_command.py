# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The files that `mlip train` writes, what loads them, and input that it refuses."""

import json
import os
import shutil

import datasets
import numpy as np
import pytest
import torch
from conftest import TEXT
from PIL import Image
from safetensors.torch import load_file
from train_command_cases import error_of, train_flags
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, CLIPProcessor, pipeline

from modeling_mlip import MLIPModel
from modeling_mlip.data.images import image_transform
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.hub.configurations import pretrained_config
from modeling_mlip.training.starting_point import build_config
from modeling_mlip.training.train import check_kept_configuration


def test_a_run_writes_the_files_that_it_lists(trained, capsys):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "modeling_mlip.py"):
        assert os.path.isfile(os.path.join(trained, name)), name
    card = open(os.path.join(trained, "README.md")).read()
    metrics = json.load(open(os.path.join(trained, "all_results.json")))
    assert f"{metrics['eval_text_to_image_recall@1']:.2f}" in card
    assert Image.open(os.path.join(trained, "learning_curves.png")).size[0] > 300
    assert any("tfevents" in name for _, _, names in os.walk(trained) for name in names)
    history = json.load(open(os.path.join(trained, "trainer_state.json")))["log_history"]
    for part in ("loss", "spatial_loss", "frequency_loss", "token_loss", "logit_scale", "token_logit_scale"):
        assert sum(part in entry for entry in history) == 4, part
    first = history[0]
    weights = json.load(open(os.path.join(trained, "config.json")))
    total = first["spatial_loss"] + sum(
        weights[f"{part}_weight"] * first[part] for part in ("frequency_loss", "token_loss")
    )
    assert first["loss"] > first["spatial_loss"] + 0.05
    assert first["loss"] == pytest.approx(total, rel=1e-4)


def test_what_was_trained_loads_with_one_line_and_serves_a_pipeline(trained, drawn):
    model, processor = AutoModel.from_pretrained(trained), AutoProcessor.from_pretrained(trained)
    assert isinstance(model, MLIPModel) and isinstance(processor, CLIPProcessor)
    assert model.config.merge_ratio == 0.5
    row = datasets.load_dataset("parquet", data_files=drawn[1])["train"][0]
    labels = [row["caption"], "a blue ring with stripes"]
    inputs = processor(text=labels, images=row["image"], padding=True, return_tensors="pt")
    expected = model.eval()(**inputs).logits_per_image.softmax(dim=1)[0]
    classify = pipeline("zero-shot-image-classification", model=trained)
    found = classify(row["image"], candidate_labels=labels, hypothesis_template="{}")
    scores = {entry["label"]: entry["score"] for entry in found}
    assert [scores[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)


def test_evaluate_gives_the_metrics_of_the_run_for_every_batch_size(trained, drawn, tmp_path, capsys):
    expected = json.load(open(os.path.join(trained, "all_results.json")))
    for batch_size in ("5", "24"):
        output = tmp_path / f"{batch_size}.json"
        flags = ["--model_name_or_path", trained, "--validation_file", drawn[1], "--output_file", str(output)]
        labels = ["--label_columns", "shape", "texture", "--templates", "a {} with stripes", "a shape with {} stripes"]
        assert mlip(["evaluate", *flags, *labels, "--per_device_eval_batch_size", batch_size]) == 0
        metrics = {entry["name"]: entry["value"] for entry in json.loads(output.read_text())["results"]}
        for way in ("text_to_image", "image_to_text"):
            assert metrics[f"{way}_recall@5"] == pytest.approx(expected[f"eval_{way}_recall@5"])
        assert 0 <= metrics["zero_shot_texture_accuracy@1"] <= 100
    assert "24 images" in capsys.readouterr().out


def test_fine_tuning_starts_from_the_saved_weights(trained, drawn, tmp_path):
    folder = str(tmp_path / "second")
    flags = ("--model_name_or_path", trained, "--learning_rate", "0", "--token_loss_weight", "0.25")
    assert mlip(train_flags(drawn, folder, *flags)) == 0
    before, after = (load_file(os.path.join(path, "model.safetensors")) for path in (trained, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert AutoModel.from_pretrained(folder).config.token_loss_weight == 0.25


def test_training_starts_from_a_clip_folder_of_transformers(trained, drawn, tmp_path):
    processor = CLIPProcessor.from_pretrained(trained)
    text = {**TEXT, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 32}
    text |= {"bos_token_id": processor.tokenizer.bos_token_id, "eos_token_id": processor.tokenizer.eos_token_id}
    vision = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24))
    clip.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    folder = str(tmp_path / "mlip")
    flags = ("--model_name_or_path", str(tmp_path / "clip"), "--learning_rate", "0", "--merge_ratio", "0.3")
    new = ("--new_parameters_learning_rate", "0")  # refused if nothing is new
    assert mlip(train_flags(drawn, folder, *flags, *new, "--token_loss_weight", "0.1")) == 0
    ours = load_file(os.path.join(folder, "model.safetensors"))
    for name, weight in clip.state_dict().items():
        assert torch.equal(ours[name], weight), name
    assert torch.equal(ours["token_visual_projection.weight"], clip.visual_projection.weight)


def test_an_interrupted_run_resumes_to_the_same_weights(drawn, tmp_path):
    whole, part = str(tmp_path / "whole"), str(tmp_path / "part")
    assert mlip(train_flags(drawn, whole, "--save_steps", "2")) == 0
    shutil.copytree(whole, part)
    for name in ("model.safetensors", "config.json"):
        os.remove(os.path.join(part, name))
    resumed = ("--resume_from_checkpoint", os.path.join(part, "checkpoint-2"))
    assert mlip(train_flags(drawn, part, *resumed)) == 0
    expected, found = (load_file(os.path.join(path, "model.safetensors")) for path in (whole, part))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def bad_inputs(drawn) -> dict[str, tuple[list[str], str]]:
    return {
        "no such file": (["--train_file", "nowhere.parquet"], "nowhere.parquet"),
        "no such column": (["--caption_column", "words"], "words"),
        "ratio of 1": (["--merge_ratio", "1"], "merge_ratio=1"),
        "ratio as a word": (["--merge_ratio", "half"], "half"),
        "layer beyond the depth": (["--merge_layers", "[7]"], "layer 7 does not exist"),
        "no token left": (["--merge_ratio", "0.99"], "leaves none of the 16"),
        "patch does not divide": (["--patch_size", "7"], "image_size=64 is not divisible by patch_size=7"),
        "fine-tuning from scratch": (["--lora_rank", "2"], "these flags fine-tune a model: --lora_rank"),
        "one pair": (["--per_device_train_batch_size", "1"], "per_device_train_batch_size=1"),
        "unknown name": (["--config_name", "huge"], "config_name='huge'"),
        "two starts": (["--model_name_or_path", "x", "--config_name", "tiny"], "give one of them"),
        "no room for a token": (["--max_seq_length", "2"], "--max_seq_length 2"),
        "no such model": (["--model_name_or_path", "nowhere/here/there"], "There is no folder nowhere/here/there"),
    }


@pytest.mark.parametrize("case", bad_inputs(("", "")))
def test_bad_input_is_one_line_and_leaves_nothing(case, drawn, tmp_path, capfd):
    flags, message = bad_inputs(drawn)[case]
    folder = tmp_path / "out"
    assert mlip(train_flags(drawn, str(folder), *flags)) == 1
    assert message in error_of(capfd.readouterr().err)
    assert not folder.exists() or not any(folder.iterdir())


def test_broken_images_are_skipped_and_counted_within_the_budget(drawn, tmp_path, capfd):
    rows = datasets.load_dataset("parquet", data_files=drawn[0])["train"].cast_column("image", datasets.Image(False))
    broken = rows.map(
        lambda row, index: {"image": {"bytes": b"no image", "path": None} if index == 3 else row["image"]},
        with_indices=True,
    )
    path = str(tmp_path / "broken.parquet")
    broken.to_parquet(path)
    # The first epoch of 3 steps sees every row.
    assert mlip(train_flags((path, drawn[1]), str(tmp_path / "within"), "--skip_budget", "0.05")) == 0
    results = json.load(open(tmp_path / "within" / "trainer_state.json"))["log_history"]
    assert max(entry.get("skipped_samples", 0) for entry in results) == 1
    assert mlip(train_flags((path, drawn[1]), str(tmp_path / "beyond"), "--skip_budget", "0")) == 1
    error = capfd.readouterr().err
    assert "row 3: this is not an image" in error
    assert not (tmp_path / "beyond" / "config.json").exists()


def test_captions_beyond_the_context_are_cut_with_eos_kept_and_counted(drawn, tmp_path):
    folder = tmp_path / "short"
    assert mlip(train_flags(drawn, str(folder), "--max_seq_length", "5")) == 0
    history = json.load(open(folder / "trainer_state.json"))["log_history"]
    assert max(entry.get("truncated_captions", 0) for entry in history) > 0


def test_the_saved_processor_gives_the_pixels_of_training(trained):
    processor = AutoProcessor.from_pretrained(trained)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    seen = image_transform(processor.image_processor)(image)
    assert torch.equal(seen, processor(images=image, return_tensors="pt")["pixel_values"][0])


@pytest.mark.parametrize(
    ("overrides", "max_seq_length", "named"),
    [({"merge_ratio": 0.7}, None, "merge_ratio"), ({}, 99, "max_position_embeddings")],
)
def test_a_kept_adapter_admits_no_change_of_the_configuration(trained, overrides, max_seq_length, named):
    starting = pretrained_config(trained)
    check_kept_configuration(build_config(model_name_or_path=trained), starting)
    config = build_config(model_name_or_path=trained, overrides=overrides, max_seq_length=max_seq_length)
    with pytest.raises(ValueError, match=f"--keep_adapter: .* changes {named} of the starting model"):
        check_kept_configuration(config, starting)
