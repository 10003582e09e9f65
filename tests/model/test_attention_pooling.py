# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""SigLIP's attention pooling, towers without a projection, and cropped patches, against transformers' SigLIP."""

import pytest
import torch
from conftest import TEXT, VISION, open_gate
from model_cases import assert_every_parameter_has_a_gradient, assert_same_gradient
from torch import nn
from transformers import SiglipConfig, SiglipForImageClassification, SiglipVisionConfig, SiglipVisionModel

from modeling_mlip import (
    MLIPConfig,
    MLIPForImageClassification,
    MLIPModel,
    MLIPTextModelWithProjection,
    MLIPVisionConfig,
    MLIPVisionModel,
    MLIPVisionModelWithProjection,
)
from modeling_mlip.modeling_mlip import MLIPAttentionPoolingHead, log_size_bias

SIGLIP = {"use_class_token": False, "pooling": "attention", "use_pre_layernorm": False, "use_visual_projection": False,
          "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "projection_dim": 32}  # fmt: skip
SIGLIP_TEXT = {"pooling": "last", "use_causal_mask": False, "text_projection_bias": True, "projection_dim": 32}
TOWER = {key: value for key, value in VISION.items() if key != "projection_dim"}


def siglip_model(seed: int = 0, **vision) -> MLIPModel:
    """A random model with the parts of SigLIP."""
    torch.manual_seed(seed)
    towers = {"vision_config": {**VISION, **SIGLIP, **vision}, "text_config": {**TEXT, **SIGLIP_TEXT}}
    losses = {"instance_loss": "sigmoid", "token_loss_weight": 0.1, "token_loss_frequency": True}
    model = MLIPModel(MLIPConfig(**towers, **losses, projection_dim=32)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit" not in name and "gate" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def split_head(state: dict[str, torch.Tensor], prefix: str = "") -> dict[str, torch.Tensor]:
    """The names of `SiglipVisionModel` to MLIP's: `nn.MultiheadAttention` keeps three projections in one."""
    state = dict(state)
    for kind in ("weight", "bias"):
        joined = state.pop(f"{prefix}head.attention.in_proj_{kind}").chunk(3)
        state |= {f"{prefix}head.{part}_proj.{kind}": tensor for part, tensor in zip("qkv", joined, strict=True)}
        state[f"{prefix}head.out_proj.{kind}"] = state.pop(f"{prefix}head.attention.out_proj.{kind}")
    return state


def siglip_and_mlip(**keys) -> tuple[SiglipVisionModel, MLIPVisionModel]:
    torch.manual_seed(0)
    theirs = SiglipVisionModel(SiglipVisionConfig(**{**TOWER, **keys})).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    crop = {"crop_to_patches": True} if keys else {}
    ours = MLIPVisionModel(MLIPVisionConfig(**{**VISION, **SIGLIP, **keys, **crop})).eval()
    missing, unexpected = ours.load_state_dict(split_head(theirs.state_dict()), strict=False)
    assert not unexpected and all(name.startswith("frequency.") for name in missing)
    return theirs, ours


@pytest.mark.parametrize("size", [32, 48])
def test_the_tower_equals_siglip_in_outputs_and_gradients(size):
    theirs, ours = siglip_and_mlip()
    pixel_values = torch.randn(3, 3, size, size)
    expected = theirs(pixel_values, interpolate_pos_encoding=True).pooler_output
    pooled = ours(pixel_values, interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(pooled, expected, rtol=0, atol=1e-5)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (pooled * weights).sum().backward()
    gradients = dict(ours.named_parameters())
    for name, gradient in split_head({name: p.grad for name, p in theirs.named_parameters()}).items():
        assert_same_gradient(gradients[name].grad, gradient, name)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_pooling_merged_tokens_equals_pooling_repeated_tokens(num_prefix_tokens):
    torch.manual_seed(0)
    head = MLIPAttentionPoolingHead(MLIPVisionConfig(**{**VISION, **SIGLIP})).double()
    nn.init.normal_(head.probe)
    tokens, sizes = torch.randn(2, num_prefix_tokens + 5, 32).double(), torch.tensor([[1, 4, 2, 1, 8], [3, 3, 5, 4, 1]])
    merged = head(tokens, log_size_bias(sizes.double(), num_prefix_tokens, torch.float64))
    repeats = nn.functional.pad(sizes, (num_prefix_tokens, 0), value=1)
    repeated = torch.stack([tokens[row].repeat_interleave(repeats[row], dim=0) for row in range(2)])
    torch.testing.assert_close(merged, head(repeated, None), rtol=0, atol=1e-12)
    assert (merged - head(tokens, None)).abs().max() > 1e-3


def test_merging_equal_patches_changes_no_embedding():
    model = siglip_model(frequency_layers=0, merge_layers=[0])
    with torch.no_grad():  # without position embeddings, all patches of an image with two halves are of two kinds
        model.vision_model.embeddings.position_embedding.weight.zero_()
    halves = torch.randn(2, 3, 2, 1).repeat_interleave(torch.tensor([4, 28]), dim=2).expand(2, 3, 32, 32)
    unmerged = model.get_image_features(halves).pooler_output
    model.set_merge_ratio(0.5)
    merged = model.get_image_features(halves)
    assert merged.last_hidden_state.shape[1] == 32
    torch.testing.assert_close(merged.pooler_output, unmerged, rtol=0, atol=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("merge_method", ["mlip", "ward", "tome", "elip"])
def test_a_model_like_siglip_merges_trains_and_loads(batch, merge_method, attention, tmp_path):
    model = open_gate(siglip_model(merge_ratio=0.5, merge_method=merge_method)).train()
    model.set_attn_implementation(attention)
    outputs = model(**batch, return_loss=True, output_token_map=True)
    assert outputs.vision_model_output.last_hidden_state.shape == (5, 32, 32)
    outputs.loss.backward()
    assert_every_parameter_has_a_gradient(model)
    model.eval().save_pretrained(tmp_path)
    loaded = MLIPModel.from_pretrained(tmp_path).eval()
    loaded.set_attn_implementation(attention)
    torch.testing.assert_close(loaded(**batch).image_embeds, model(**batch).image_embeds, rtol=0, atol=1e-6)


def test_the_embedding_is_the_pooled_state_and_no_projection_is_trained(batch, tmp_path):
    model = siglip_model()
    assert not [name for name, _ in model.named_parameters() if name.startswith("visual_projection")]
    features = model.get_image_features(batch["pixel_values"])
    assert torch.equal(features.pooler_output, model.vision_model(batch["pixel_values"]).pooler_output)
    model.save_pretrained(tmp_path)
    tower = MLIPVisionModelWithProjection.from_pretrained(tmp_path, config=model.config.vision_config)
    embeds = tower(batch["pixel_values"]).image_embeds
    torch.testing.assert_close(embeds, features.pooler_output, rtol=0, atol=1e-6)
    text = MLIPTextModelWithProjection.from_pretrained(tmp_path, config=model.config.text_config)
    assert torch.equal(text(batch["input_ids"]).text_embeds, model.get_text_features(batch["input_ids"]).pooler_output)
    assert text.text_projection.bias.abs().sum() > 0


def test_image_classification_equals_siglip():
    torch.manual_seed(0)
    theirs = SiglipForImageClassification(SiglipConfig(vision_config=TOWER, text_config=TEXT, num_labels=3)).eval()
    config = MLIPConfig(vision_config={**VISION, **SIGLIP}, text_config=TEXT, projection_dim=32, num_labels=3)
    ours = MLIPForImageClassification(config).eval()
    missing, unexpected = ours.load_state_dict(split_head(theirs.state_dict(), "vision_model."), strict=False)
    assert not unexpected and all(name.startswith("vision_model.frequency.") for name in missing)
    pixel_values = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours(pixel_values).logits, theirs(pixel_values).logits, rtol=0, atol=1e-5)
    ours.set_merge_ratio(0.5)
    assert ours(pixel_values).logits.isfinite().all()


@pytest.mark.parametrize("image_size", [30, 35])
def test_an_image_size_that_patches_do_not_divide_equals_siglip(image_size):
    theirs, ours = siglip_and_mlip(image_size=image_size)
    pixel_values = torch.randn(2, 3, image_size, image_size)
    outputs = ours(pixel_values, output_token_map=True)
    torch.testing.assert_close(outputs.pooler_output, theirs(pixel_values).pooler_output, rtol=0, atol=1e-5)
    assert outputs.token_map.shape[1] == outputs.frequency_hidden_state.shape[1] == (image_size // 4) ** 2
    with pytest.raises(Exception, match=f"image_size={image_size} is not divisible"):
        MLIPVisionConfig(**{**VISION, **SIGLIP, "image_size": image_size})


@torch.no_grad()
def test_the_token_level_starts_from_the_linear_part_of_the_pooling_head():
    """With one token, attention is 1, so the head without its MLP is affine in the token."""
    model = siglip_model()
    head = model.vision_model.head
    head.mlp.fc2.weight.zero_()
    head.mlp.fc2.bias.zero_()
    model.start_tokens_from_projections()
    token = torch.randn(1, 1, 32)
    expected = head(token, None) - head(torch.zeros(1, 1, 32), None)
    torch.testing.assert_close(model.token_visual_projection(token)[:, 0], expected, rtol=0, atol=1e-5)
    assert torch.equal(model.token_text_projection.weight, model.text_projection.weight)


def test_a_text_tower_without_a_projection_starts_its_token_level_from_the_identity(batch):
    text = {**SIGLIP_TEXT, "text_projection_bias": False, "use_text_projection": False}
    towers = {"vision_config": {**VISION, **SIGLIP}, "text_config": {**TEXT, **text}}
    model = MLIPModel(MLIPConfig(**towers, projection_dim=32, token_loss_weight=0.1))
    model.start_tokens_from_projections()
    assert torch.equal(model.token_text_projection.weight, torch.eye(32))
    features = model.eval().get_text_features(batch["input_ids"]).pooler_output
    assert torch.equal(features, model.text_model(batch["input_ids"]).pooler_output)


def test_a_tower_without_projection_needs_the_width_of_the_embedding():
    with pytest.raises(Exception, match="use_visual_projection=False needs hidden_size=32 .* projection_dim=24"):
        MLIPConfig(vision_config={**VISION, **SIGLIP}, text_config=TEXT, projection_dim=24)
    with pytest.raises(Exception, match="text_projection_bias=True needs use_text_projection=True"):
        MLIPConfig(text_config={**TEXT, "use_text_projection": False, "text_projection_bias": True})


def test_torch_export_works_with_any_batch_size():
    vision = {"merge_ratio": 0.5, "merge_layers": [0], "num_hidden_layers": 1, "frequency_layers": 0}
    tower = MLIPVisionModelWithProjection(MLIPVisionConfig(**{**VISION, **SIGLIP, **vision})).eval()
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(tower, (), {"pixel_values": torch.randn(3, 3, 32, 32)}, dynamic_shapes=shapes)
    images = torch.randn(5, 3, 32, 32)
    exported = program.module()(pixel_values=images).image_embeds
    torch.testing.assert_close(exported, tower(images).image_embeds, rtol=0, atol=1e-5)
