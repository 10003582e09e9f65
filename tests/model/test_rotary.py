# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Rotary positions, SwiGLU, sub-LayerNorm and post-norm: against timm's Eva, and under token merging."""

import pytest
import torch
from conftest import TEXT, VISION, open_gate
from model_cases import assert_every_parameter_has_a_gradient
from timm.layers import apply_rot_embed_cat
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.eva import Eva
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_mlip import (
    MLIPConfig,
    MLIPForImageClassification,
    MLIPModel,
    MLIPVisionConfig,
    MLIPVisionModel,
    MLIPVisionModelWithProjection,
)
from modeling_mlip.configuration_mlip import MERGE_METHODS
from modeling_mlip.conversion.tables import TIMM_GATED_MLP, TIMM_SEPARATE_QKV, TIMM_VISION, to_mlip
from modeling_mlip.rotary import patch_positions, rotate, rotation_of

EVA02 = {"use_pre_layernorm": False, "use_patch_bias": True, "use_key_bias": False, "use_gated_mlp": True,
         "use_sub_layernorm": True, "hidden_act": "silu", "visual_projection_bias": True, "rotary_grid_size": 7,
         "layer_norm_eps": 1e-6}  # fmt: skip
POST_NORM = {"use_pre_layernorm": False, "use_residual_post_norm": True}
PERCEPTION = {"rotary_grid_size": 8, "rotary_axes": "xy", "rotary_offset": 1.0, "pooling": "attention",
              "pooling_num_heads": 2, "pooling_intermediate_size": 40, "use_class_token": False,
              "use_patch_bias": False}  # fmt: skip


def model_like(vision: dict, **keys) -> MLIPModel:
    """A random model in which every parameter matters."""
    torch.manual_seed(0)
    losses = {"token_loss_weight": 0.1, "token_loss_frequency": keys.get("frequency_layers") != 0}
    config = MLIPConfig(vision_config={**VISION, **vision, **keys}, text_config=TEXT, projection_dim=24, **losses)
    model = MLIPModel(config).eval()
    if config.vision_config.frequency_layers > 0:
        open_gate(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_scale" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def recorded_positions(tower: MLIPVisionModel, monkeypatch) -> list[torch.Tensor]:
    """The positions before the first layer and after each merge, filled by the next forward call."""
    positions, rotation_at = [], tower.encoder._rotation_of
    monkeypatch.setattr(tower.encoder, "_rotation_of", lambda at: positions.append(at) or rotation_at(at))
    return positions


@pytest.mark.parametrize(("axes", "indexing"), [("yx", "ij"), ("xy", "xy")])
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("grid", [(4, 4), (3, 5)])
def test_the_rotation_equals_timm(axes, indexing, offset, grid):
    theirs = RotaryEmbeddingCat(16, in_pixels=False, feat_shape=list(grid), ref_feat_shape=[6, 6], grid_offset=offset,
                                grid_indexing=indexing)  # fmt: skip
    states = torch.randn(2, 3, 1 + grid[0] * grid[1], 16)
    expected = torch.cat([states[:, :, :1], apply_rot_embed_cat(states[:, :, 1:], theirs.get_embed())], dim=2)
    rotation = rotation_of(patch_positions(grid, 6, offset, axes == "xy")[None], 1, 16)
    torch.testing.assert_close(rotate(states, rotation), expected, rtol=0, atol=1e-6)


def test_rotated_products_depend_on_differences_of_positions_only():
    queries, keys, positions = torch.randn(2, 1, 1, 6, 16).double(), torch.randn(1, 1, 6, 16).double(), torch.rand(6, 2)
    products = [
        rotate(queries[0], rotation_of(moved[None], 0, 16)) @ rotate(keys, rotation_of(moved[None], 0, 16)).mT
        for moved in (positions, positions + torch.tensor([3.0, 5.0]))
    ]
    torch.testing.assert_close(*products, rtol=0, atol=1e-4)  # angles are computed in float32
    assert (products[0] - queries[0] @ keys.mT).abs().max() > 0.1


@torch.no_grad()
def test_images_of_another_size_equal_timm():
    keys = dict(img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=4, num_classes=24, global_pool="token",
                mlp_ratio=2)  # fmt: skip
    torch.manual_seed(0)
    theirs = Eva(**keys, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, scale_attn_inner=True, use_rot_pos_emb=True,
                 ref_feat_shape=(7, 7)).eval()  # fmt: skip
    for parameter in theirs.parameters():
        parameter += torch.randn_like(parameter) * 0.2
    theirs.pos_embed.zero_()  # both libraries interpolate position embeddings, in different ways
    config = MLIPVisionConfig(**{**VISION, **EVA02, "frequency_layers": 0})
    ours = MLIPVisionModelWithProjection(config).eval()
    state = {f"visual.trunk.{name}": tensor for name, tensor in theirs.state_dict().items()}
    shapes = {name: tensor.shape for name, tensor in ours.state_dict().items()}
    ours.load_state_dict(to_mlip(state, {**TIMM_VISION, **TIMM_SEPARATE_QKV, **TIMM_GATED_MLP}, shapes))
    theirs.set_input_size((48, 40))
    images = torch.randn(2, 3, 48, 40)
    embeds = ours(images, interpolate_pos_encoding=True).image_embeds
    torch.testing.assert_close(embeds, theirs(images), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("vision", "merge_method"),
    [*((EVA02, method) for method in MERGE_METHODS), (POST_NORM, "elip"), (PERCEPTION, "mlip"), (PERCEPTION, "ward")],
)
def test_a_model_like_eva_and_perception_encoder_merges_trains_and_loads(batch, vision, merge_method, tmp_path):
    model = model_like(vision, merge_ratio=0.5, merge_method=merge_method).train()
    outputs = model(**batch, return_loss=True)
    assert outputs.vision_model_output.token_sizes.shape == (5, 32)
    assert (outputs.vision_model_output.token_sizes.sum(dim=1) == 64).all()
    outputs.loss.backward()
    assert_every_parameter_has_a_gradient(model)
    model.eval().save_pretrained(tmp_path)
    loaded = MLIPModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**batch).image_embeds, model(**batch).image_embeds, rtol=0, atol=1e-6)
    loaded.set_attn_implementation("eager")
    torch.testing.assert_close(loaded(**batch).image_embeds, model(**batch).image_embeds, rtol=0, atol=1e-5)
    assert MLIPForImageClassification.from_pretrained(tmp_path)(batch["pixel_values"]).logits.isfinite().all()


@torch.no_grad()
def test_a_merged_token_can_have_the_mean_position_of_its_patches(batch, monkeypatch):
    keys = {"merge_ratio": 0.7, "merge_method": "ward", "rotary_merged_position": "mean"}
    tower = model_like(EVA02, **keys).vision_model
    positions = recorded_positions(tower, monkeypatch)
    token_map = tower(batch["pixel_values"], output_token_map=True).token_map
    first, last = positions[0], positions[-1]
    assert [at.shape[1] for at in positions] == [64, 43, 29, 19]
    for image in range(5):
        for token in range(19):
            members = first[image, token_map[image] == token]
            torch.testing.assert_close(last[image, token], members.mean(dim=0), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_merged_token_has_the_position_of_its_largest_token():
    encoder = model_like(EVA02).vision_model.encoder
    positions = torch.arange(12.0).view(1, 6, 2)
    assignment, sizes = torch.tensor([[0, 1, 0, 1, 1, 2]]), torch.tensor([[2.0, 1, 2, 3, 1, 1]])
    merged = encoder._merge_positions(positions, assignment, sizes, 3)
    assert torch.equal(merged, positions[:, [0, 3, 5]])  # 0 and 2 are equally large


@torch.no_grad()
def test_dropped_patches_leave_the_positions_of_the_others(batch, monkeypatch):
    tower = model_like(EVA02, patch_dropout=0.5).vision_model.train()
    kept = torch.stack([torch.randperm(64)[:32].sort().values for _ in range(5)])
    monkeypatch.setattr(tower, "_kept_patches", lambda hidden_states: kept)
    positions = recorded_positions(tower, monkeypatch)
    tower(batch["pixel_values"])
    row, column = kept // 8, kept % 8
    torch.testing.assert_close(positions[0], torch.stack([row, column], dim=-1) * 7 / 8, rtol=0, atol=1e-6)


@torch.no_grad()
def test_cropped_edges_change_no_position(batch):
    tower = model_like(EVA02, crop_to_patches=True, image_size=35, frequency_layers=0).vision_model
    images = torch.nn.functional.pad(batch["pixel_values"], (0, 3, 0, 3), value=5.0)
    whole = tower(images, interpolate_pos_encoding=False).pooler_output
    cropped = tower(batch["pixel_values"], interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(whole, cropped, rtol=0, atol=1e-5)


@torch.no_grad()
def test_importance_is_the_attention_with_rotary_positions(batch):
    """Importance is computed outside the attention backend; it must be what the eager backend attends."""
    tower = model_like(PERCEPTION, merge_ratio=0.25, merge_layers=[1], merge_method="elip").vision_model
    tower.set_attn_implementation("eager")
    outputs = tower(batch["pixel_values"], output_token_map=True, output_attentions=True)
    received = outputs.attentions[1].mean(dim=(1, 2))  # over heads and queries
    kept = received.argsort(dim=1, descending=True)[:, :47].sort(dim=1).values
    assert torch.equal(outputs.token_map.gather(1, kept), torch.arange(47).expand(5, -1))


@torch.no_grad()
def test_a_kernel_that_takes_no_bias_rotates_before_it_adds_the_sizes(batch, monkeypatch):
    def attend_without_bias(module, queries, keys, values, attention_mask, scaling, dropout=0.0, **kwargs):
        assert attention_mask is None
        return ((queries @ keys.mT * scaling).softmax(dim=-1) @ values).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_stand_in", attend_without_bias)
    tower = model_like(EVA02, merge_ratio=0.5).vision_model
    expected = tower(batch["pixel_values"]).pooler_output
    tower.config._attn_implementation_internal = "flash_stand_in"
    torch.testing.assert_close(tower(batch["pixel_values"]).pooler_output, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_half_precision_keeps_positions_in_float32(batch, monkeypatch):
    tower = model_like(EVA02, merge_ratio=0.5).vision_model.to(torch.bfloat16)
    positions = recorded_positions(tower, monkeypatch)
    tower(batch["pixel_values"].bfloat16())
    assert {at.dtype for at in positions} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        tower.float()(batch["pixel_values"])
    assert {at.dtype for at in positions} == {torch.float32}


def test_gradient_checkpointing_gives_the_same_gradients(batch):
    gradients = []
    for checkpoints in (False, True):
        model = model_like(EVA02, merge_ratio=0.5).train()
        if checkpoints:
            model.gradient_checkpointing_enable()
        model(**batch, return_loss=True).loss.backward()
        gradients.append(model.vision_model.encoder.layers[1].self_attn.q_proj.weight.grad)
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-6)


def test_torch_export_works_with_any_batch_size():
    keys = {"merge_ratio": 0.25, "merge_layers": [0], "num_hidden_layers": 2, "frequency_layers": 0}
    tower = MLIPVisionModelWithProjection(MLIPVisionConfig(**{**VISION, **EVA02, **keys})).eval()
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(tower, (), {"pixel_values": torch.randn(3, 3, 32, 32)}, dynamic_shapes=shapes)
    images = torch.randn(5, 3, 32, 32)
    exported = program.module()(pixel_values=images).image_embeds
    torch.testing.assert_close(exported, tower(images).image_embeds, rtol=0, atol=1e-5)


def test_values_that_do_not_fit_together_are_refused():
    for keys, message in (
        ({"rotary_grid_size": 8, "num_attention_heads": 16}, "width divisible by 4, not 2"),
        ({"rotary_grid_size": 0}, "rotary_grid_size=0: choose 1 or more"),
        ({"rotary_axes": "zx"}, "rotary_axes='zx' is unknown; choose one of 'yx', 'xy'"),
        ({"rotary_merged_position": "first"}, "choose one of 'largest', 'mean'"),
        ({"pooling_num_heads": 5}, "pooling_num_heads=5 does not divide hidden_size=32"),
        ({"use_visual_projection": False, "visual_projection_bias": True}, "needs use_visual_projection=True"),
    ):
        with pytest.raises(Exception, match=message):
            MLIPVisionConfig(**{**VISION, **keys})
    assert isinstance(MLIPVisionModel(MLIPVisionConfig(**VISION)).encoder.layers[0].self_attn.layer_norm, nn.Identity)
