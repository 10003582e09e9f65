# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A stretched text tower has Long-CLIP's positions, keeps short captions, and loads and encodes long ones."""

import pytest
import torch
from conftest import small_config, small_model
from training_cases import make_processor
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel

from modeling_mlip.hub.loading import load_pretrained
from modeling_mlip.hub.text_context import check_stretchable, stretch_positions, stretch_text_context
from modeling_mlip.training.starting_point import build_config, build_model, build_processor


def long_clip_positions(weight: torch.Tensor) -> torch.Tensor:
    """The loops of Long-CLIP's `load_from_clip`, which keep 20 positions and multiply the others by four."""
    length, keep = len(weight), 20
    stretched = torch.zeros(4 * length - 3 * keep, weight.shape[1], dtype=weight.dtype)
    stretched[:keep] = weight[:keep]
    for i in range(keep, length - 1):
        for quarter in range(4):
            mixed = (4 - quarter) * weight[i] / 4 + quarter * weight[i + 1] / 4
            stretched[4 * (i - keep) + quarter + keep] = mixed
    for quarter in range(4):
        stretched[quarter - 4] = weight[-1] + quarter * (weight[-1] - weight[-2]) / 4
    return stretched


@pytest.mark.parametrize("context", [77, 30])
def test_positions_are_those_of_long_clip_at_four_times_the_length(context):
    weight = torch.randn(context, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = long_clip_positions(weight)
    stretched = stretch_positions(weight, len(expected))
    torch.testing.assert_close(stretched, expected, rtol=0, atol=1e-14)
    assert torch.equal(stretched[:20], weight[:20]) and torch.equal(stretched[20::4], weight[20:])


@pytest.mark.parametrize("length", [78, 100, 512])
def test_positions_on_a_line_stay_on_a_line_at_any_length(length):
    line = torch.arange(77, dtype=torch.float64)[:, None]
    steps = stretch_positions(line, length).diff(dim=0)[:, 0]
    torch.testing.assert_close(steps[:20], torch.ones(20, dtype=torch.float64))
    torch.testing.assert_close(steps[20:], torch.full((length - 21,), 57 / (length - 20), dtype=torch.float64))


def test_positions_in_bfloat16_are_the_rounded_ones_of_float32():
    weight = torch.randn(77, 8).bfloat16()
    assert torch.equal(stretch_positions(weight, 248), stretch_positions(weight.float(), 248).bfloat16())


@pytest.mark.parametrize(
    "length, keep, message", [(77, 20, "length=77.*more than the 77"), (248, 76, "keep=76.*0 to 75")]
)
def test_positions_that_cannot_be_stretched_are_refused(length, keep, message):
    with pytest.raises(ValueError, match=message):
        stretch_positions(torch.zeros(77, 4), length, keep)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> str:
    """A CLIP model of transformers with a context of 30 tokens, and its processor."""
    folder = tmp_path_factory.mktemp("clip")
    processor = make_processor(length=30)
    tokenizer = processor.tokenizer
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    config = small_config(text={**ids, "vocab_size": len(tokenizer), "max_position_embeddings": 30})
    torch.manual_seed(0)
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("image_size", [32, 48])
def test_a_run_on_longer_captions_saves_a_model_that_loads_in_one_line_and_encodes_them(saved, image_size, tmp_path):
    overrides = {"image_size": image_size, "merge_ratio": 0.5, "patch_size": 4}
    config = build_config(model_name_or_path=saved, overrides=overrides, max_seq_length=70)
    processor = build_processor(config, model_name_or_path=saved)
    model, _ = build_model(config, processor.tokenizer, model_name_or_path=saved)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)

    loaded, processor = AutoModel.from_pretrained(tmp_path), AutoProcessor.from_pretrained(tmp_path)
    assert loaded.config.text_config.max_position_embeddings == processor.tokenizer.model_max_length == 70
    assert loaded.config.vision_config.merge_ratio == 0.5
    captions = ["a red square", "a small green star " * 40]
    inputs = processor(text=captions, padding=True, truncation=True, return_tensors="pt")
    assert inputs["input_ids"].shape == (2, 70)
    with torch.inference_mode():
        ours = loaded.get_text_features(**inputs).pooler_output
        short = {name: tensor[:1, :20] for name, tensor in inputs.items()}
        theirs = CLIPModel.from_pretrained(saved).get_text_features(**short)
    assert inputs["attention_mask"][0].sum() <= 20
    torch.testing.assert_close(ours[:1], theirs.pooler_output, rtol=0, atol=1e-5)
    changed = inputs["input_ids"].clone()
    changed[1, 65] = changed[1, 64]
    with torch.inference_mode():
        assert not torch.equal(loaded.get_text_features(changed).pooler_output[1], ours[1])


def test_a_shorter_length_leaves_model_and_processor_as_they_are(saved):
    config = build_config(model_name_or_path=saved, max_seq_length=10)
    assert config.text_config.max_position_embeddings == 30
    assert build_processor(config, model_name_or_path=saved).tokenizer.model_max_length == 30


def test_a_configuration_is_trained_from_scratch_with_the_context_asked_for():
    config = build_config(config_name="tiny", max_seq_length=100)
    processor = build_processor(config, captions=["a red square"] * 3)
    assert processor.tokenizer.model_max_length == 100
    model, _ = build_model(config, processor.tokenizer)
    assert len(model.text_model.embeddings.position_embedding.weight) == 100


def test_stretching_keeps_the_weights_that_it_does_not_change():
    model = small_model(text={"max_position_embeddings": 30})
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    stretch_text_context(model.bfloat16(), 50)
    name = "text_model.embeddings.position_embedding.weight"
    after = model.state_dict()
    assert after.pop(name).shape == (50, 32) and before.pop(name).shape == (30, 32)
    assert all(torch.equal(tensor, before[other].bfloat16()) for other, tensor in after.items())
    assert model.text_model.config.max_position_embeddings == 50 and model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "text, message",
    [
        ({"pooling": "last", "pad_token_id": 1}, "reads the padding .*Choose at most 30"),
        ({"use_causal_mask": False}, "use_causal_mask=False"),
        ({"max_position_embeddings": 21}, "context of 21 tokens is too short"),
    ],
)
def test_a_text_tower_that_a_longer_context_would_change_is_refused(text, message, tmp_path):
    model = small_model(text={"max_position_embeddings": 30, **text})
    with pytest.raises(ValueError, match=f"max_seq_length=50: .*{message}"):
        check_stretchable(model.config.text_config, 50)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        build_config(model_name_or_path=str(tmp_path), max_seq_length=50)
    config = model.config
    config.text_config.max_position_embeddings = 50
    with pytest.raises(ValueError, match=message):
        load_pretrained(str(tmp_path), config=config)
