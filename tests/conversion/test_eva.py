# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Conversion of EVA, EVA-02 and Perception Encoder from OpenCLIP, and back, against the originals."""

import json

import open_clip
import pytest
import timm
import torch
from eva_cases import TIMM_ARGUMENTS, VISION_KEYS, eva_cfg_of, open_clip_eva, open_clip_eva_folder
from safetensors.torch import load_file
from torch import nn

from modeling_mlip import MLIPConfig
from modeling_mlip.conversion import open_clip_configurations as configs
from modeling_mlip.conversion import parity
from modeling_mlip.conversion.checkpoints import convert, convert_checkpoint
from modeling_mlip.conversion.export import export_checkpoint
from modeling_mlip.conversion.timm_towers import TIMM_TOWERS, is_timm_tower

NAMES = ("EVA01-", "EVA02-", "PE-Core-")


@pytest.fixture(autouse=True)
def timm_towers(monkeypatch):
    for name, keys in VISION_KEYS.items():
        monkeypatch.setitem(TIMM_TOWERS, name, keys)


@pytest.mark.parametrize("name", TIMM_ARGUMENTS)
@torch.no_grad()
def test_converted_towers_equal_open_clip_and_come_back_to_the_bit(tmp_path, name):
    source = open_clip_eva_folder(tmp_path / "source", name)
    ours, processor = convert_checkpoint(source)
    theirs = open_clip_eva(name)
    images, ids = parity.random_inputs(ours.config, seed=1)
    output, expected = ours(input_ids=ids, pixel_values=images), theirs.get_logits(images, ids)[0]
    torch.testing.assert_close(output.image_embeds, theirs.encode_image(images, normalize=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits_per_image, expected, atol=1e-4, rtol=0)

    export_checkpoint(ours, processor, tmp_path / "back")
    back = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    state = load_file(source / "open_clip_model.safetensors")
    assert state.keys() == back.keys()
    assert all(torch.equal(state[key], back[key]) for key in state)
    content = json.loads((tmp_path / "back" / "open_clip_config.json").read_text())
    assert content["model_cfg"]["vision_cfg"] == eva_cfg_of(name)["vision_cfg"]
    if name == "vit_test_eva02":
        loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'back'}")
        assert torch.equal(loaded.eval().get_logits(images, ids)[0], expected)
        with pytest.raises(ValueError, match="transformers' CLIPModel does not have"):
            export_checkpoint(ours, processor, tmp_path / "clip", format="clip")


def test_all_12_configurations_are_known_by_name_and_come_back():
    theirs = {name: open_clip.get_model_config(name) for name in open_clip.list_models() if name.startswith(NAMES)}
    assert len(theirs) == 12
    for name, model_cfg in theirs.items():
        ours = configs.mlip_config_of_open_clip(model_cfg)
        config = MLIPConfig(**ours)
        assert is_timm_tower(config.vision_config)
        back = configs.open_clip_of_mlip_config(config)
        assert configs.mlip_config_of_open_clip(back) == ours, name
        assert back["vision_cfg"] == model_cfg["vision_cfg"], name


def keys_of(theirs: nn.Module) -> dict:
    """The keys of MLIPVisionConfig for a tower of timm, read from its modules."""
    block, rope, pool = theirs.blocks[0], theirs.rope, theirs.attn_pool
    has_joint_bias = block.attn.qkv is not None and block.attn.qkv.bias is not None
    is_gated = hasattr(block.mlp, "fc1_g")
    keys = {
        "hidden_size": theirs.embed_dim,
        "intermediate_size": block.mlp.fc2.in_features,
        "num_attention_heads": block.attn.num_heads,
        "image_size": theirs.patch_embed.img_size[0],
        "patch_size": theirs.patch_embed.patch_size[0],
        "layer_norm_eps": block.norm1.eps,
        "hidden_act": "silu" if is_gated else "gelu",
        "use_class_token": theirs.cls_token is not None,
        "has_patch_bias": theirs.patch_embed.proj.bias is not None,
        "use_pre_layernorm": isinstance(theirs.norm_pre, nn.LayerNorm),
        "use_key_bias": has_joint_bias,
        "use_gated_mlp": is_gated,
        "use_sub_layernorm": isinstance(block.attn.norm, nn.LayerNorm),
        "use_residual_post_norm": type(block).__name__ == "EvaBlockPostNorm",
        "rotary_grid_size": None if rope is None else rope.ref_feat_shape[0],
        "pooling": "class" if pool is None else "attention",
    }
    if rope is not None:
        keys |= {"rotary_offset": rope.grid_offset, "rotary_axes": {"ij": "yx", "xy": "xy"}[rope.grid_indexing]}
    if pool is not None:
        keys |= {"pooling_num_heads": pool.num_heads, "pooling_intermediate_size": pool.mlp.fc1.out_features}
    return keys


def test_the_table_of_eva_towers_equals_timm():
    names = [name for name in TIMM_TOWERS if name.startswith(("eva", "vit_pe"))]
    assert len(names) == 10
    for name in names:
        with torch.device("meta"):
            theirs = timm.create_model(
                name, num_classes=0, depth=1, global_pool="map" if "pe_core" in name else "token"
            )
        ours = MLIPConfig(vision_config=TIMM_TOWERS[name]).vision_config
        expected = keys_of(theirs)
        assert {key: getattr(ours, key) for key in expected} == expected, name
        assert isinstance(theirs.norm, nn.LayerNorm) and theirs.rope is None or theirs.rope.temperature == 10000
        assert isinstance(theirs.blocks[0].mlp.norm, nn.LayerNorm) == ours.use_sub_layernorm


@pytest.mark.parametrize("key", ["rotary_offset", "rotary_grid_size", "use_residual_post_norm"])
def test_parity_fails_if_a_key_differs(tmp_path, monkeypatch, key):
    name = "vit_test_eva02_post_norm" if key == "use_residual_post_norm" else "vit_test_pe"
    source = open_clip_eva_folder(tmp_path / "source", name)
    wrong = {"rotary_offset": 0.5, "rotary_grid_size": 5, "use_residual_post_norm": False}[key]
    monkeypatch.setitem(TIMM_TOWERS, name, VISION_KEYS[name] | {key: wrong})
    with pytest.raises(ValueError, match="the converted model gives other outputs"):
        convert(source)


def test_another_pooling_and_a_tower_that_timm_lacks_are_refused():
    model_cfg = open_clip.get_model_config("EVA02-B-16")
    model_cfg["vision_cfg"]["timm_pool"] = "avg"
    with pytest.raises(ValueError, match="timm_pool='avg' and timm_proj=None is not supported.*timm_pool='token'"):
        configs.mlip_config_of_open_clip(model_cfg)
    config = MLIPConfig(vision_config={"rotary_grid_size": 14})
    with pytest.raises(ValueError, match="OpenCLIP has no image tower like this"):
        configs.open_clip_of_mlip_config(config)
