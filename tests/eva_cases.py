# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Tiny random checkpoints of OpenCLIP with timm's EVA, EVA-02 and Perception Encoder towers, for several tests."""

import json
from functools import partial
from pathlib import Path

import torch
from conversion_cases import TEXT, randomize
from safetensors.torch import save_file
from timm.layers import LayerNorm
from timm.models import register_model
from timm.models.eva import Eva, _create_eva

EMBED_DIM = 24
# timm's arguments that distinguish each kind of tower, and the image size.
EVA = {"mlp_ratio": 80 / 48, "qkv_bias": True}
EVA02 = {"mlp_ratio": 40 / 48, "qkv_fused": False, "swiglu_mlp": True, "scale_mlp": True, "scale_attn_inner": True,
         "use_rot_pos_emb": True, "ref_feat_shape": (3, 3)}  # fmt: skip
PERCEPTION = {"mlp_ratio": 80 / 48, "attn_type": "rope", "use_pre_transformer_norm": True, "use_rot_pos_emb": True,
              "rope_grid_indexing": "xy", "attn_pool_num_heads": 4, "attn_pool_mlp_ratio": 1.5,
              "ref_feat_shape": (4, 4), "norm_layer": partial(LayerNorm, eps=1e-5)}  # fmt: skip
TIMM_ARGUMENTS = {
    "vit_test_eva": EVA,
    "vit_test_eva02": EVA02,
    "vit_test_eva02_post_norm": {**EVA, "use_post_norm": True},
    "vit_test_pe": {**PERCEPTION, "rope_grid_offset": 1.0},
    "vit_test_pe_without_class_token": {**PERCEPTION, "class_token": False},
}
_SHARED = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 32, "patch_size": 8}
_EVA_KEYS = {**_SHARED, "layer_norm_eps": 1e-6, "use_pre_layernorm": False, "use_patch_bias": True,
             "use_key_bias": False, "visual_projection_bias": True}  # fmt: skip
_PERCEPTION_KEYS = {**_SHARED, "intermediate_size": 80, "hidden_act": "gelu", "layer_norm_eps": 1e-5,
                    "use_patch_bias": False, "pooling": "attention", "pooling_num_heads": 4,
                    "pooling_intermediate_size": 72, "visual_projection_bias": True, "rotary_grid_size": 4,
                    "rotary_axes": "xy"}  # fmt: skip
# The keys of MLIPVisionConfig for each name, as in the table of conversion/timm_towers.py.
VISION_KEYS = {
    "vit_test_eva": {**_EVA_KEYS, "intermediate_size": 80, "hidden_act": "gelu"},
    "vit_test_eva02": {**_EVA_KEYS, "intermediate_size": 40, "hidden_act": "silu", "use_gated_mlp": True,
                       "use_sub_layernorm": True, "rotary_grid_size": 3},
    "vit_test_eva02_post_norm": {**_EVA_KEYS, "intermediate_size": 80, "hidden_act": "gelu",
                                 "use_residual_post_norm": True},
    "vit_test_pe": {**_PERCEPTION_KEYS, "use_class_token": True, "rotary_offset": 1.0},
    "vit_test_pe_without_class_token": {**_PERCEPTION_KEYS, "use_class_token": False, "rotary_offset": 0.0},
}  # fmt: skip


def _register(name: str) -> None:
    def create(pretrained: bool = False, **kwargs) -> Eva:
        keys = dict(img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3)
        return _create_eva(name, **keys, **TIMM_ARGUMENTS[name], **kwargs)

    create.__name__, create.__module__ = name, __name__
    globals()[name] = create
    register_model(create)


for _name in TIMM_ARGUMENTS:
    _register(_name)


def eva_cfg_of(name: str) -> dict:
    """OpenCLIP's model_cfg of a small model with the tower `name`."""
    pool = "map" if "pe" in name.split("_") else "token"
    vision = {"image_size": 32, "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool,
              "timm_proj": None}  # fmt: skip
    return {"embed_dim": EMBED_DIM, "custom_text": True, "vision_cfg": vision, "text_cfg": TEXT}


def open_clip_eva(name: str):
    """A random model in which every parameter matters."""
    import open_clip

    torch.manual_seed(0)
    cfg = {key: value for key, value in eva_cfg_of(name).items() if key != "custom_text"}
    theirs = open_clip.CustomTextCLIP(**cfg).eval()
    randomize(theirs)
    with torch.no_grad():
        for parameter in theirs.visual.parameters():
            if parameter.ndim > 1:  # timm starts these so small that attention and positions hardly matter
                parameter += torch.randn_like(parameter) * parameter.shape[-1] ** -0.5
    return theirs


def open_clip_eva_folder(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": eva_cfg_of(name), "preprocess_cfg": {}}))
    save_file(open_clip_eva(name).state_dict(), folder / "open_clip_model.safetensors")
    return folder
