# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A vision tower without a class token, against transformers' SigLIP and against references."""

import pytest
import torch
from conftest import VISION, open_gate, small_model
from model_cases import WITHOUT_CLASS_TOKEN, assert_every_parameter_has_a_gradient, assert_same_gradient
from transformers import (
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_mlip import (
    MLIPForImageClassification,
    MLIPModel,
    MLIPVisionConfig,
    MLIPVisionModel,
)


def siglip_and_mlip(**vision) -> tuple[SiglipVisionModel, MLIPVisionModel]:
    """A random SigLIP vision tower of transformers without its pooling head, and an MLIP tower with its weights."""
    torch.manual_seed(0)
    theirs = SiglipVisionModel(SiglipVisionConfig(**VISION, vision_use_head=False)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    keys = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "use_pre_layernorm": False}
    ours = MLIPVisionModel(MLIPVisionConfig(**VISION, **keys, **WITHOUT_CLASS_TOKEN, **vision)).eval()
    missing, unexpected = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("frequency.") for name in missing)
    return theirs, ours


@pytest.mark.parametrize("frequency_layers", [0, 2])
@pytest.mark.parametrize("size", [32, 48])
def test_without_a_class_token_the_tower_equals_siglip_in_outputs_and_gradients(frequency_layers, size):
    theirs, ours = siglip_and_mlip(frequency_layers=frequency_layers)
    pixel_values = torch.randn(3, 3, size, size)
    expected = theirs(pixel_values, interpolate_pos_encoding=True).last_hidden_state
    outputs = ours(pixel_values, interpolate_pos_encoding=True)
    patches = ours.post_layernorm(outputs.last_hidden_state)
    torch.testing.assert_close(patches, expected, rtol=0, atol=1e-5)
    pooled = ours.post_layernorm(outputs.last_hidden_state.mean(dim=1))
    torch.testing.assert_close(outputs.pooler_output, pooled, rtol=0, atol=1e-5)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (patches * weights).sum().backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert_same_gradient(gradients[name].grad, parameter.grad, name)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("merge_method", ["mlip", "ward", "tome", "elip"])
def test_a_model_without_a_class_token_merges_and_trains(batch, merge_method, attention, tmp_path):
    model = open_gate(
        small_model(vision={**WITHOUT_CLASS_TOKEN, "merge_ratio": 0.5, "merge_method": merge_method})
    ).train()
    model.set_attn_implementation(attention)
    outputs = model(**batch, return_loss=True, output_token_map=True)
    assert outputs.vision_model_output.last_hidden_state.shape == (5, 32, 32)
    assert (outputs.vision_model_output.token_sizes.sum(dim=1) == 64).all()
    outputs.loss.backward()
    assert_every_parameter_has_a_gradient(model)
    model.eval().save_pretrained(tmp_path)
    loaded = MLIPModel.from_pretrained(tmp_path).eval()
    loaded.set_attn_implementation(attention)
    assert torch.equal(loaded(**batch).image_embeds, model(**batch).image_embeds)
    assert MLIPForImageClassification.from_pretrained(tmp_path)(batch["pixel_values"]).logits.isfinite().all()


def test_without_a_class_token_importance_is_the_attention_that_a_token_receives(batch):
    vision = {"merge_ratio": 0.25, "merge_importance_weight": 1e4, "merge_layers": [1], "frequency_layers": 0}
    model = small_model(vision=vision | WITHOUT_CLASS_TOKEN)
    model.set_attn_implementation("eager")
    outputs = model.vision_model(batch["pixel_values"], output_token_map=True, output_attentions=True)
    received = outputs.attentions[1].mean(dim=(1, 2))  # (B, h, N, N) -> (B, N), over heads and queries
    for index in range(5):
        proposers = torch.arange(1, 64, 2)
        gone = proposers[received[index, proposers].argsort()[:16]]
        survivors = torch.tensor([patch for patch in range(64) if patch not in gone])
        assert outputs.token_map[index, survivors].tolist() == list(range(48))


def test_merging_equal_patches_changes_no_embedding_without_a_class_token():
    model = small_model(vision={**WITHOUT_CLASS_TOKEN, "frequency_layers": 0, "merge_layers": [0]})
    with torch.no_grad():  # without position embeddings, all patches of a uniform image are equal
        model.vision_model.embeddings.position_embedding.weight.zero_()
    plain = torch.randn(2, 3, 1, 1).expand(2, 3, 32, 32)
    unmerged = model.get_image_features(plain).pooler_output
    model.set_merge_ratio(0.9)
    merged = model.get_image_features(plain)
    assert merged.last_hidden_state.shape[1] == 6
    torch.testing.assert_close(merged.pooler_output, unmerged, rtol=0, atol=1e-5)


def test_pooling_at_the_class_token_needs_one():
    with pytest.raises(Exception, match="pooling='class' needs use_class_token=True; choose pooling='mean'"):
        MLIPVisionConfig(**VISION, use_class_token=False)
