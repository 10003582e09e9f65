# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Conversion of timm's ViTs with the layers of CLIP and of MobileCLIP-B, against OpenCLIP's TimmModel."""

import json
from functools import partial

import open_clip
import pytest
import timm
import torch
from conversion_cases import SPECIAL, TEXT, randomize, word_tokenizer
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from timm.models.vision_transformer_hybrid import ConvStem, _create_vision_transformer_hybrid
from torch import nn

from modeling_mlip import MLIPConfig, MLIPVisionConfig
from modeling_mlip.conversion import open_clip_configurations as configs
from modeling_mlip.conversion import parity
from modeling_mlip.conversion.checkpoints import convert_checkpoint
from modeling_mlip.conversion.export import export_checkpoint
from modeling_mlip.conversion.timm_towers import TIMM_TOWERS

SIZES = {"embed_dim": 48, "depth": 2, "num_heads": 3, "mlp_ratio": 2.0}
KEYS = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96, "image_size": 64,
    "hidden_act": "gelu", "visual_projection_bias": True,
}  # fmt: skip
TOWERS = {
    "vit_test_patch8_clip_64": {**KEYS, "patch_size": 8, "layer_norm_eps": 1e-5},
    "vit_test_mci_64": {**KEYS, "patch_size": 16, "layer_norm_eps": 1e-6, "use_conv_stem": True,
                        "use_patch_bias": True, "use_pre_layernorm": False},
}  # fmt: skip


@register_model
def vit_test_patch8_clip_64(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """A small tower like timm's `vit_large_patch14_clip_224`."""
    norm = partial(timm.layers.LayerNorm, eps=1e-5)
    keys = dict(img_size=64, patch_size=8, pre_norm=True, norm_layer=norm, **SIZES)
    return _create_vision_transformer("vit_test_patch8_clip_64", **keys, **kwargs)


@register_model
def vit_test_mci_64(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """A small tower like timm's `vit_base_mci_224`."""
    channels, strides = (12, 12, 48), (4, 2, 2)
    stem = ConvStem(channels=channels, stride=strides, kernel_size=strides, padding=0, act_layer=nn.GELU)
    return _create_vision_transformer_hybrid(
        "vit_test_mci_64",
        backbone=stem,
        embed_args={"proj": False},
        img_size=64,
        no_embed_class=True,
        **SIZES,
        **kwargs,
    )


@pytest.fixture(autouse=True)
def towers(monkeypatch):
    for name, keys in TOWERS.items():
        monkeypatch.setitem(TIMM_TOWERS, name, keys)


def model_cfg_of(name: str) -> dict:
    vision = {"timm_model_name": name, "timm_model_pretrained": False, "timm_pool": "token", "timm_proj": None,
              "image_size": 64}  # fmt: skip
    text = TEXT | {"vocab_size": 200, "pool_type": "eos", "no_causal_mask": name == "vit_test_patch8_clip_64",
                   "hf_tokenizer_name": "facebook/xlm-v-base"}  # fmt: skip
    return {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "custom_text": True}


def timm_folder(folder, name: str):
    """An OpenCLIP folder, and OpenCLIP's model with these weights."""
    torch.manual_seed(0)
    cfg = {key: value for key, value in model_cfg_of(name).items() if key != "custom_text"}
    theirs = open_clip.CustomTextCLIP(**cfg).eval()
    randomize(theirs)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            module.num_batches_tracked += 7
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg_of(name)}))
    save_file(theirs.state_dict(), folder / "open_clip_model.safetensors")
    word_tokenizer(SPECIAL["facebook/xlm-v-base"]).save_pretrained(folder)
    return folder, theirs


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_converted_tower_equals_open_clip_and_comes_back_to_the_bit(tmp_path, name):
    source, theirs = timm_folder(tmp_path / "source", name)
    ours, processor = convert_checkpoint(source)
    images, ids = parity.random_inputs(ours.config, seed=1)
    output = ours(input_ids=ids, pixel_values=images)
    torch.testing.assert_close(output.image_embeds, theirs.encode_image(images, normalize=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, theirs.encode_text(ids, normalize=True), atol=1e-5, rtol=0)

    export_checkpoint(ours, processor, tmp_path / "back")
    back = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    state = load_file(source / "open_clip_model.safetensors")
    assert state.keys() == back.keys()
    assert all(torch.equal(state[key], back[key]) for key in state)
    content = json.loads((tmp_path / "back" / "open_clip_config.json").read_text())["model_cfg"]
    assert content["vision_cfg"] == model_cfg_of(name)["vision_cfg"]


@pytest.mark.parametrize("merge_method", ["mlip", "ward"])
def test_tower_with_a_stem_of_convolutions_merges_trains_and_loads(tmp_path, merge_method):
    source, _ = timm_folder(tmp_path / "source", "vit_test_mci_64")
    ours, _ = convert_checkpoint(source, merge_method=merge_method, merge_ratio=0.5, merge_layers=[1])
    images, ids = torch.randn(3, 3, 64, 64), parity.random_inputs(ours.config)[1]
    ours.train()(input_ids=ids, pixel_values=images, return_loss=True).loss.backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
    vision = ours.eval().vision_model(images, output_token_map=True)
    assert vision.token_map.shape == (3, 16) and vision.token_sizes.shape == (3, 8)
    ours.save_pretrained(tmp_path / "mlip")
    loaded = type(ours).from_pretrained(tmp_path / "mlip")
    assert torch.equal(loaded.vision_model(images).pooler_output, vision.pooler_output)
    larger = torch.randn(1, 3, 96, 64)
    assert ours.vision_model(larger, interpolate_pos_encoding=True).token_sizes.sum() == 24


def test_each_patch_is_embedded_by_itself(tmp_path):
    source, _ = timm_folder(tmp_path / "source", "vit_test_mci_64")
    embeddings = convert_checkpoint(source)[0].vision_model.embeddings
    image = torch.randn(1, 3, 64, 64)
    changed = image.clone()
    changed[..., 16:32, 32:48] += 1  # the patch in row 1 and column 2 of 4
    is_changed = (embeddings(image) != embeddings(changed)).any(dim=-1)[0]
    assert is_changed.nonzero().flatten().tolist() == [1 + 4 + 2]


@pytest.mark.parametrize(
    "name", [name for name in TIMM_TOWERS if "_clip_" in name and "eva" not in name] + ["vit_base_mci_224"]
)
def test_table_equals_timm(name):
    keys = TIMM_TOWERS[name]
    with torch.device("meta"):
        theirs = timm.create_model(name, num_classes=8, depth=1)
    block, stem = theirs.blocks[0], keys.get("use_conv_stem", False)
    assert (theirs.embed_dim, block.attn.num_heads) == (keys["hidden_size"], keys["num_attention_heads"])
    assert block.mlp.fc1.out_features == keys["intermediate_size"] and isinstance(block.mlp.act, nn.GELU)
    assert theirs.pos_embed.shape[1] == (keys["image_size"] // keys["patch_size"]) ** 2 + (not stem)
    assert isinstance(theirs.norm_pre, nn.Identity) == stem and theirs.norm.eps == keys["layer_norm_eps"]
    assert theirs.global_pool == "token" and theirs.head.bias is not None and theirs.reg_token is None


def test_configurations_of_mobileclip_with_a_vit_come_back():
    for name in ("MobileCLIP-B", "MobileCLIP2-B", "MobileCLIP2-L-14"):
        ours = configs.mlip_config_of_open_clip(open_clip.get_model_config(name))
        back = configs.open_clip_of_mlip_config(MLIPConfig(**ours))
        assert configs.mlip_config_of_open_clip(back) == ours, name
    for name, tower in (
        ("MobileCLIP-S1", "fastvit_mci1"),
        ("vit_medium_patch16_gap_256", "vit_medium_patch16_gap_256"),
    ):
        with pytest.raises(ValueError, match=f"the timm image tower {tower} is not supported; MLIP converts"):
            configs.mlip_config_of_open_clip(open_clip.get_model_config(name))


def test_a_stem_that_does_not_fit_the_patches_is_refused():
    with pytest.raises(StrictDataclassError, match="use_conv_stem=True needs patch_size=14 divisible by 8"):
        MLIPVisionConfig(use_conv_stem=True, patch_size=14)
