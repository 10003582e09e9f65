# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Models load at another image size, and refused overrides name the reason."""

import pytest
import torch
from conftest import open_gate, pairs_batch, small_model
from transformers import CLIPConfig, CLIPModel

from modeling_mlip.hub.configurations import override_config
from modeling_mlip.hub.loading import load_pretrained


@pytest.mark.parametrize("image_size", [16, 48])
@torch.no_grad()
def test_another_image_size_gives_the_outputs_of_interpolate_pos_encoding(image_size, tmp_path):
    model = open_gate(small_model(vision={"merge_ratio": 0.5, "frequency_embed_weight": 0.3}))
    model.save_pretrained(tmp_path)
    resized = load_pretrained(str(tmp_path), override_config(model.config, {"image_size": image_size})).eval()
    images, ids = torch.randn(2, 3, image_size, image_size), pairs_batch(2)["input_ids"]
    expected = model(input_ids=ids, pixel_values=images, interpolate_pos_encoding=True)
    output = resized(input_ids=ids, pixel_values=images)
    torch.testing.assert_close(output.image_embeds, expected.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.logits_per_image, expected.logits_per_image, atol=1e-5, rtol=0)
    assert resized.config.vision_config.image_size == image_size and resized.config.merge_ratio == 0.5
    resized.save_pretrained(tmp_path / "resized")
    again = load_pretrained(str(tmp_path / "resized")).eval()
    torch.testing.assert_close(again(input_ids=ids, pixel_values=images).image_embeds, output.image_embeds)


def test_a_clip_model_loads_at_another_image_size(tmp_path):
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shared, "vocab_size": 64, "max_position_embeddings": 8, "eos_token_id": 63}
    vision = {**shared, "image_size": 32, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(tmp_path)
    saved = load_pretrained(str(tmp_path))
    changed = override_config(saved.config, {"image_size": 64, "token_loss_weight": 0.1})
    resized = load_pretrained(str(tmp_path), changed)
    assert resized.vision_model.embeddings.position_embedding.weight.shape == (65, 32)
    assert torch.equal(resized.token_visual_projection.weight, saved.visual_projection.weight)


def test_a_changed_size_is_blamed_on_the_configuration_and_not_on_the_folder(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="only image_size can be changed"):
        load_pretrained(str(tmp_path), override_config(model.config, {"hidden_size": 48}))
