# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Long and short captions of an image train together as in Long-CLIP. test_distributed.py has the gradients over
processes and mini-batches."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from conftest import pairs_batch, small_model
from data_cases import encoded, image_dataset, pairs, picture
from torch.nn.functional import cross_entropy, logsigmoid, normalize
from train_command_cases import error_of, train_flags
from training_cases import make_processor
from transformers import AutoModel, AutoProcessor

from modeling_mlip.data.collators import PairCollator
from modeling_mlip.data.items import build_pairs
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.training.arguments import MLIPTrainingArguments
from modeling_mlip.training.distributed import Exchange
from modeling_mlip.training.objective import ModelLosses, Objective
from modeling_mlip.training.short_caption_loss import (
    ShortCaptionLoss,
    principal_components,
    rebuild_from_components,
)


def long_clip_pca(embeds: torch.Tensor, num_components: int) -> torch.Tensor:
    """Long-CLIP's `PCA`, by the singular value decomposition."""
    mean = embeds.mean(dim=0)
    centred = embeds - mean
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    components = directions.T[:, :num_components]
    return centred @ components @ components.T + mean


def rebuilt(embeds: torch.Tensor, num_components: int) -> torch.Tensor:
    return rebuild_from_components(embeds, embeds.mean(dim=0), principal_components(embeds, num_components))


def test_rebuilt_embeddings_are_those_of_long_clip():
    embeds = normalize(torch.randn(20, 12, dtype=torch.float64), dim=-1)
    for num_components in (1, 5, 11):
        expected = long_clip_pca(embeds, num_components)
        torch.testing.assert_close(rebuilt(embeds, num_components), expected, rtol=0, atol=1e-12)
        assert (expected - embeds).abs().max() > 1e-3


def test_embeddings_of_a_batch_with_no_more_components_stay_and_keep_their_gradient():
    embeds = torch.randn(6, 12, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(6, 12, dtype=torch.float64)
    out = rebuilt(embeds, num_components=5)
    torch.testing.assert_close(out, embeds, rtol=0, atol=1e-12)
    (out * weights).sum().backward()
    torch.testing.assert_close(embeds.grad, weights, rtol=0, atol=1e-12)


def test_equal_embeddings_have_no_arbitrary_components():
    embeds = torch.randn(3, 12, dtype=torch.float64).repeat(8, 1)  # two components
    components = principal_components(embeds, 4)
    assert components.shape == (12, 4) and int((components.norm(dim=0) > 0).sum()) == 2
    torch.testing.assert_close(rebuilt(embeds, 4), embeds, rtol=0, atol=1e-12)


@pytest.fixture
def short_batch() -> dict[str, torch.Tensor]:
    long, short = pairs_batch(8), pairs_batch(8, length=6, seed=1)
    return {**long, "short_input_ids": short["input_ids"], "short_attention_mask": short["attention_mask"]}


@pytest.mark.parametrize("instance_loss", ["info_nce", "sigmoid"])
def test_the_losses_are_long_captions_against_images_and_short_ones_against_principal_components(
    instance_loss, short_batch
):
    model = small_model(token_loss_weight=0, frequency_loss_weight=0, instance_loss=instance_loss).double()
    short_batch["pixel_values"] = short_batch["pixel_values"].double()
    objective = Objective([ModelLosses(), ShortCaptionLoss(weight=0.3, num_components=3)])
    _, rows = objective.compute_rows(model, short_batch)
    found = objective(model, rows, Exchange(8))

    images = normalize(model.get_image_features(short_batch["pixel_values"]).pooler_output, dim=-1)
    long = normalize(model.get_text_features(short_batch["input_ids"]).pooler_output, dim=-1)
    short = normalize(model.get_text_features(short_batch["short_input_ids"]).pooler_output, dim=-1)

    def loss(images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        logits, own = model.logit_scale.exp() * images @ texts.T, torch.arange(8)
        if instance_loss == "info_nce":
            return (cross_entropy(logits, own) + cross_entropy(logits.T, own)) / 2
        return -logsigmoid((logits + model.logit_bias) * (2 * torch.eye(8) - 1)).sum() / 8

    expected_long, expected_short = loss(images, long), loss(long_clip_pca(images, 3), short)
    torch.testing.assert_close(found["spatial_loss"], expected_long, rtol=0, atol=1e-9)
    torch.testing.assert_close(found["short_caption_loss"], expected_short, rtol=0, atol=1e-9)
    torch.testing.assert_close(found["loss"], expected_long + 0.3 * expected_short, rtol=0, atol=1e-9)


def test_equal_short_captions_of_different_images_are_positives(short_batch):
    model = small_model()
    short_batch["short_input_ids"][:] = short_batch["short_input_ids"][0]
    short_batch["short_attention_mask"][:] = short_batch["short_attention_mask"][0]
    part = ShortCaptionLoss()
    _, rows = Objective([ModelLosses(), part]).compute_rows(model, short_batch)
    loss = part(model, rows["short_caption"], rows["short_caption"])["short_caption_loss"]
    image_half = torch.tensor(8.0).log()  # every caption is right for every image
    scores = model.logit_scale.exp() * rows["short_caption"]["texts"] @ rows["short_caption"]["images"].T
    text_half = -scores.log_softmax(dim=1).mean()
    torch.testing.assert_close(loss, (image_half + text_half) / 2)


def test_captions_alone_have_the_embeddings_that_they_have_beside_images(short_batch):
    model = small_model()
    texts = {name: short_batch[name] for name in ("input_ids", "attention_mask")}
    both = model(**texts, pixel_values=short_batch["pixel_values"])
    alone = model(**texts)
    assert torch.equal(alone.text_embeds, both.text_embeds) and alone.image_embeds is None


# Data


def two_columns(short: list, long: list) -> datasets.Dataset:
    rows = image_dataset([encoded(picture(n)) for n in range(len(short))], short)
    return rows.add_column("long", long)


def test_a_batch_holds_the_long_and_the_short_caption_of_each_image(transform, tokenizer):
    rows = two_columns(["a", "red", "lost", "square"], ["a red square", "a green square a", "", "a red red square"])
    items = list(pairs(rows, transform, training=True, long_caption_column="long"))
    batch = PairCollator(tokenizer, 5)(items)
    long = tokenizer(["a red square", "a green square a", "a red red square"], truncation=True, max_length=5)
    assert batch["input_ids"].tolist() == long["input_ids"]
    short = tokenizer(["a", "red", "square"], padding=True)
    assert batch["short_input_ids"].tolist() == short["input_ids"]
    assert batch["short_attention_mask"].tolist() == short["attention_mask"]
    assert batch["skipped"] == ["row 2: the long caption is empty"] and batch["num_truncated"] == 2


@pytest.mark.parametrize(
    "policy, expected", [("first", [["a"]]), ("all", [["a", "b", "a"]]), ("random", [["a"], ["b"]])]
)
def test_a_long_caption_is_chosen_for_each_short_one(policy, expected, transform):
    rows = two_columns([["x", "y", "z"]] * 12, [["a", "b"]] * 12)
    items = list(pairs(rows, transform, training=True, long_caption_column="long", caption_policy=policy))
    assert sorted({tuple(item["long_captions"]) for item in items}) == [tuple(texts) for texts in expected]
    assert all(len(item["captions"]) == len(item["long_captions"]) for item in items)


def test_a_column_that_is_missing_or_holds_no_text_is_named(tokenizer):
    rows = image_dataset([encoded(picture())], ["a"]).add_column("n", [1])
    with pytest.raises(ValueError, match="long_caption_column=long: no such column"):
        build_pairs(rows, make_processor(), training=True, long_caption_column="long")
    with pytest.raises(ValueError, match="The caption column n holds .*long_caption_column=NAME"):
        build_pairs(rows, make_processor(), training=True, long_caption_column="n")


# The command


def test_a_saved_model_trains_on_long_and_short_captions(drawn, trained, tmp_path, capfd):
    rows = datasets.load_dataset("parquet", data_files=drawn[0])["train"]
    long = [f"{'on grey noise ' * 12}{caption}" for caption in rows["caption"]]
    path, folder = str(tmp_path / "long.parquet"), str(tmp_path / "run")
    rows.add_column("long", long).to_parquet(path)
    flags = ["--model_name_or_path", trained, "--max_seq_length", "90", "--short_caption_weight", "0.5"]
    flags += ["--mini_batch_size", "8"]
    assert mlip(train_flags((path, drawn[1]), folder, *flags, "--long_caption_column", "lang")) == 1
    assert "long_caption_column=lang: no such column" in error_of(capfd.readouterr().err)
    assert mlip(train_flags((path, drawn[1]), folder, *flags, "--long_caption_column", "long")) == 0
    logs = json.loads((Path(folder) / "trainer_state.json").read_text())["log_history"]
    losses = [entry for entry in logs if "short_caption_loss" in entry]
    assert len(losses) == 4
    for entry in losses:
        expected = entry["spatial_loss"] + entry["frequency_loss"] + 0.1 * entry["token_loss"]
        assert entry["loss"] == pytest.approx(expected + 0.5 * entry["short_caption_loss"], abs=1e-3)
    assert max(entry.get("truncated_captions", 0) for entry in logs) == 0
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    assert model.config.text_config.max_position_embeddings == processor.tokenizer.model_max_length == 90
    inputs = processor(text=long[:2], padding=True, truncation=True, return_tensors="pt")
    assert 32 < inputs["input_ids"].shape[1] <= 90 and torch.isfinite(model(**inputs).text_embeds).all()


def test_a_negative_weight_is_refused(tmp_path):
    with pytest.raises(ValueError, match="short_caption_weight=-1"):
        MLIPTrainingArguments(str(tmp_path), short_caption_weight=-1)
