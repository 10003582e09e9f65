# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The text tower: padding, pooling, masks and token embeddings."""

import warnings

import pytest
import torch
from conftest import TEXT, small_config, small_model
from model_cases import clip_and_mlip

from modeling_mlip import (
    MLIPForImageClassification,
    MLIPModel,
    MLIPTextModel,
    MLIPTextModelWithProjection,
    MLIPVisionModel,
    MLIPVisionModelWithProjection,
)

# Captions


def test_padding_and_bos_change_no_loss(batch):
    model = small_model()
    with torch.no_grad():
        pairs = model(**batch, return_pairs=True).pairs
    eos = (batch["input_ids"] == TEXT["eos_token_id"]).int().argmax(dim=1)
    for mask, last in zip(pairs.tokens.text_mask, eos.tolist(), strict=True):
        assert mask.tolist() == [False] + [True] * last + [False] * (7 - last)
    # Longer padding, with or without a mask, gives the same loss.
    longer = torch.nn.functional.pad(batch["input_ids"], (0, 4), value=TEXT["pad_token_id"])
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 4))
    loss = model(**batch, return_loss=True).loss
    for extra in ({"attention_mask": mask}, {"attention_mask": None}):
        other = model(pixel_values=batch["pixel_values"], input_ids=longer, return_loss=True, **extra).loss
        torch.testing.assert_close(other, loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("images, captions", [(1, 5), (5, 1), (3, 5)])
def test_losses_refuse_different_numbers_of_images_and_captions(batch, images, captions):
    inputs = {"pixel_values": batch["pixel_values"][:images], "input_ids": batch["input_ids"][:captions]}
    model = small_model()
    message = f"'pixel_values': {images}, 'input_ids': {captions}.*repeat an image for each of its captions"
    with pytest.raises(ValueError, match=message):
        model(**inputs, return_loss=True)
    with pytest.raises(ValueError, match="'image_ids': 4"):
        model(**batch, image_ids=torch.arange(4), return_loss=True)
    assert model(**inputs).logits_per_image.shape == (images, captions)


def test_equal_captions_and_images_are_positives_in_the_model(batch):
    model = small_model()
    batch["input_ids"][1], batch["attention_mask"][1] = batch["input_ids"][0], batch["attention_mask"][0]
    outputs = model(**batch, return_loss=True, return_pairs=True)
    assert outputs.pairs.caption_keys[0] == outputs.pairs.caption_keys[1]
    assert len(outputs.pairs.caption_keys.unique()) == 4
    with_ids = model(**batch, image_ids=torch.tensor([1, 2, 3, 3, 4]), return_loss=True)
    assert not torch.allclose(with_ids.loss, outputs.loss)


def test_a_non_causal_tower_pooled_at_the_last_position_attends_to_all_positions(batch):
    text = {"pooling": "last", "use_causal_mask": False, "pad_token_id": 0}
    model = small_model(text=text)
    ids = batch["input_ids"][:, :6]
    padded = torch.nn.functional.pad(ids, (0, 6), value=0)
    short, whole = model.text_model(ids), model.text_model(padded)
    torch.testing.assert_close(short.pooler_output, whole.pooler_output, rtol=0, atol=0)
    assert torch.equal(whole.pooler_output, whole.last_hidden_state[:, -1])
    changed = ids.clone()
    changed[:, 5] = 7
    first = model.text_model(changed).last_hidden_state[:, 0]
    assert not torch.allclose(first, short.last_hidden_state[:, 0])  # the first position sees the last
    assert torch.isfinite(model(pixel_values=batch["pixel_values"], input_ids=ids, return_loss=True).loss)


@pytest.mark.parametrize("position", [0, 1])
def test_a_caption_ends_at_its_first_end_token_as_in_clip(batch, position):
    """Text after it does not count: such a caption equals the empty one, in the embeddings and in the losses."""
    clip, ours = clip_and_mlip()
    ids, mask = batch["input_ids"].clone(), torch.ones_like(batch["input_ids"])
    ids[:, position] = TEXT["eos_token_id"]
    ids[:, -1] = TEXT["eos_token_id"]
    expected = clip.get_text_features(ids, attention_mask=mask).pooler_output
    embeds = ours.get_text_features(ids, attention_mask=mask).pooler_output
    torch.testing.assert_close(embeds, expected, rtol=0, atol=1e-5)
    empty = ours.get_text_features(ids[:, : position + 1]).pooler_output
    torch.testing.assert_close(embeds, empty, rtol=0, atol=1e-5)
    pairs = ours(pixel_values=batch["pixel_values"], input_ids=ids, attention_mask=mask, return_pairs=True).pairs
    assert len(pairs.caption_keys.unique()) == 1
    assert (pairs.tokens.text_mask.sum(dim=1) == 1).all()  # the end token alone


def test_the_text_tower_raises_no_deprecation_warning(batch):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        small_model().get_text_features(batch["input_ids"], attention_mask=batch["attention_mask"])


def test_a_tower_pooled_at_the_last_position_refuses_long_captions_and_position_ids(batch):
    model = small_model(text={"pooling": "last"})
    with pytest.raises(ValueError, match=r"15 tokens.*max_position_embeddings=12"):
        model.text_model(torch.randint(0, 62, (2, 15)))
    with pytest.raises(ValueError, match="position_ids"):
        model.text_model(batch["input_ids"], position_ids=torch.arange(8)[None])


def test_a_prepared_4d_mask_is_used_unchanged(batch):
    clip, ours = clip_and_mlip()
    mask = torch.full((8, 8), -torch.inf).triu(1)[None, None].expand(5, 1, -1, -1)
    outputs, expected = (model.text_model(batch["input_ids"], attention_mask=mask) for model in (ours, clip))
    torch.testing.assert_close(outputs.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-5)


# Token embeddings


def test_resizing_the_token_embeddings_changes_no_caption_without_new_tokens(batch, tmp_path):
    for model_class in (MLIPModel, MLIPTextModel, MLIPTextModelWithProjection):
        model = model_class(small_config() if model_class is MLIPModel else small_config().text_config).eval()
        tower = getattr(model, "text_model", model)
        expected = tower(batch["input_ids"], batch["attention_mask"]).pooler_output
        embeddings = model.resize_token_embeddings(70)
        assert model.get_input_embeddings() is embeddings is tower.embeddings.token_embedding
        text_config = model.config.get_text_config()
        assert tower.config.vocab_size == text_config.vocab_size == embeddings.num_embeddings == 70
        assert (text_config.bos_token_id, text_config.eos_token_id, text_config.pad_token_id) == (62, 63, 63)
        assert torch.equal(tower(batch["input_ids"], batch["attention_mask"]).pooler_output, expected)
        with torch.no_grad():
            embeddings.weight[64:] += 1  # so that a lost row shows
        new = batch["input_ids"].clone()
        new[:, 1] = 69
        added = tower(new).pooler_output
        assert not torch.allclose(added, expected)
        model.save_pretrained(tmp_path / model_class.__name__)
        loaded = model_class.from_pretrained(tmp_path / model_class.__name__).eval()
        loaded_config = loaded.config.get_text_config()
        for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id"):
            assert getattr(loaded_config, key) == getattr(text_config, key)
        assert torch.equal(getattr(loaded, "text_model", loaded)(new).pooler_output, added)


def test_setting_the_input_embeddings_replaces_those_of_the_text_tower():
    for model in (
        MLIPModel(small_config()),
        MLIPTextModel(small_config().text_config),
        MLIPTextModelWithProjection(small_config().text_config),
    ):
        embeddings = torch.nn.Embedding(64, 32)
        model.set_input_embeddings(embeddings)
        tower = getattr(model, "text_model", model)
        assert model.get_input_embeddings() is tower.embeddings.token_embedding is embeddings


def test_input_embeddings_of_vision_models_are_the_patch_embedding():
    config = small_config()
    for model in (
        MLIPVisionModel(config.vision_config),
        MLIPVisionModelWithProjection(config.vision_config),
        MLIPForImageClassification(config),
    ):
        tower = getattr(model, "vision_model", model)
        assert model.get_input_embeddings() is tower.embeddings.patch_embedding
