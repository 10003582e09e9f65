# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Saving, loading, checkpoints of CLIP, and initialisation."""

import pytest
import torch
from conftest import TEXT, VISION, open_gate, pairs_batch, small_config, small_model
from model_cases import MLIP_PARAMETERS, clip_and_mlip
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    CLIPConfig,
    CLIPModel,
)

from modeling_mlip import (
    MLIPConfig,
    MLIPForImageClassification,
    MLIPModel,
    MLIPTextModel,
    MLIPTextModelWithProjection,
    MLIPVisionModel,
    MLIPVisionModelWithProjection,
)


def test_a_saved_and_reloaded_model_gives_bit_equal_outputs(batch, tmp_path):
    model = open_gate(small_model(vision={"merge_ratio": 0.5}))
    expected = model(**batch, return_loss=True)
    model.save_pretrained(tmp_path)
    for auto_class in (MLIPModel, AutoModel, AutoModelForZeroShotImageClassification):
        loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, MLIPModel)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        outputs = loaded.eval()(**batch, return_loss=True)
        for name in ("loss", "image_embeds", "text_embeds", "frequency_embeds", "token_loss"):
            assert torch.equal(outputs[name], expected[name]), name
    assert AutoModel.from_pretrained(tmp_path, merge_ratio=0.25).config.merge_ratio == 0.25


def test_towers_load_from_the_checkpoint_of_a_whole_model(batch, tmp_path):
    model = open_gate(small_model(vision={"merge_ratio": 0.5}))
    model.save_pretrained(tmp_path)
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    vision_output, text_output = model.vision_model(pixels), model.text_model(ids)
    vision = MLIPVisionModel.from_pretrained(tmp_path).eval()(pixels)
    assert torch.equal(vision.last_hidden_state, vision_output.last_hidden_state)
    text = MLIPTextModel.from_pretrained(tmp_path).eval()(ids)
    assert torch.equal(text.last_hidden_state, text_output.last_hidden_state)
    embeds = MLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()(pixels).image_embeds
    assert torch.equal(embeds, model.get_image_features(pixels).pooler_output)
    embeds = MLIPTextModelWithProjection.from_pretrained(tmp_path).eval()(ids).text_embeds
    assert torch.equal(embeds, model.get_text_features(ids).pooler_output)
    classifier = MLIPForImageClassification.from_pretrained(tmp_path, num_labels=3).eval()
    hidden = classifier.vision_model(pixels).last_hidden_state
    assert torch.equal(hidden, vision_output.last_hidden_state)
    assert classifier(pixels, labels=torch.tensor([0, 1, 2, 0, 1])).loss.isfinite()


def test_clip_weights_load_by_name(tmp_path):
    clip, _ = clip_and_mlip()
    clip.save_pretrained(tmp_path)
    clip_config = CLIPConfig.from_pretrained(tmp_path)
    config = MLIPConfig.from_clip_config(clip_config, merge_ratio=0.0, token_loss_weight=0.1)
    ours, report = MLIPModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert all(any(part in key for part in MLIP_PARAMETERS) for key in report["missing_keys"])
    batch = pairs_batch()
    expected = clip(**batch)
    torch.testing.assert_close(ours.eval()(**batch).logits_per_image, expected.logits_per_image, rtol=0, atol=1e-5)
    ours.start_tokens_from_projections()
    assert torch.equal(ours.token_visual_projection.weight, clip.visual_projection.weight)


def test_an_early_clip_configuration_gets_its_real_eos_token_id():
    early = CLIPConfig(text_config={"eos_token_id": 2, "vocab_size": 49408})
    text = MLIPConfig.from_clip_config(early).text_config
    assert (text.bos_token_id, text.eos_token_id) == (49406, 49407)
    early.text_config.vocab_size = 49500  # tokens added later come after EOS
    assert MLIPConfig.from_clip_config(early).text_config.eos_token_id == 49407


def test_an_early_clip_checkpoint_loads_with_its_real_eos_token_id(batch, tmp_path):
    clip = CLIPModel(
        CLIPConfig(vision_config=VISION, text_config={**TEXT, "eos_token_id": 2, "pad_token_id": 1}, projection_dim=24)
    ).eval()
    clip.save_pretrained(tmp_path)
    expected = clip(**batch)
    outputs = MLIPModel.from_pretrained(tmp_path).eval()(**batch)
    torch.testing.assert_close(outputs.text_embeds, expected.text_embeds, rtol=0, atol=1e-5)
    tower = MLIPTextModel.from_pretrained(tmp_path).eval()(batch["input_ids"], batch["attention_mask"])
    expected = clip.text_model(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(tower.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)


def test_initialisation_sets_every_parameter():
    torch.manual_seed(0)
    model = MLIPModel(small_config(vision={"layer_scale_init_value": 1e-4}))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.abs().max() < 5, name
    torch.manual_seed(0)
    again = MLIPModel(small_config(vision={"layer_scale_init_value": 1e-4}))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert (model.vision_model.frequency.gate == 0).all()
    for scale in model.scalar_parameters().values():
        assert scale.item() == pytest.approx(2.6592)
    width, depth = 32, 4
    layer = model.vision_model.encoder.layers[1]
    joined = small_config(vision={"frequency_embed_weight": 0.5})
    joined_size = joined.vision_config.frequency_hidden_size
    expected = {  # of OpenAI's CLIP
        layer.self_attn.q_proj: width**-0.5,
        layer.self_attn.k_proj: width**-0.5,
        layer.self_attn.v_proj: width**-0.5,
        layer.self_attn.out_proj: width**-0.5 * (2 * depth) ** -0.5,
        layer.mlp.fc1: (2 * width) ** -0.5,
        layer.mlp.fc2: width**-0.5 * (2 * depth) ** -0.5,
        MLIPVisionModelWithProjection(model.config.vision_config).visual_projection: width**-0.5,
        MLIPVisionModelWithProjection(joined.vision_config).frequency_projection: joined_size**-0.5,
        MLIPTextModelWithProjection(model.config.text_config).text_projection: width**-0.5,
        MLIPForImageClassification(small_config(num_labels=50)).classifier: width**-0.5,
    }
    for linear, std in expected.items():
        assert linear.weight.std().item() == pytest.approx(std, rel=0.15)
    ratio = model.token_frequency_projection.weight.std() / model.frequency_projection.weight.std()
    assert ratio.item() == pytest.approx(0.1, rel=0.2)
