# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Configurations: transformers' CLIPConfig and SiglipConfig to the keys of MLIPConfig, and back."""

import math
from typing import Any

from transformers import CLIPConfig, SiglipConfig

from modeling_mlip import MLIPConfig
from modeling_mlip.configuration_mlip import repair_eos_token_id

from .open_clip_configurations import towers
from .timm_towers import DEFAULTS

# Keys of transformers' CLIP that change the mathematics.
CLIP_TEXT = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout", "projection_dim",
             "pad_token_id", "bos_token_id", "eos_token_id")  # fmt: skip
CLIP_VISION = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size",
               "patch_size", "hidden_act", "layer_norm_eps", "attention_dropout", "projection_dim",
               "num_channels")  # fmt: skip

# Parts of timm's towers that neither CLIP nor SigLIP of transformers has.
TIMM_PARTS = (
    ("rotary_grid_size", "rotary positions"),
    ("use_gated_mlp", "a gated MLP"),
    ("use_sub_layernorm", "LayerNorms before the output projections"),
    ("use_residual_post_norm", "LayerNorms after attention and MLP"),
    ("use_key_bias", "attention keys without a bias"),
    ("visual_projection_bias", "a bias of the image projection"),
    ("pooling_num_heads", "another number of heads in the pooling head"),
    ("pooling_intermediate_size", "another width of the MLP in the pooling head"),
)


def mlip_config_of_clip(config: CLIPConfig) -> dict[str, Any]:
    """The keys of MLIPConfig that compute what transformers computes from a `CLIPConfig`."""
    vision_config, text_config = towers(config)
    text = repair_eos_token_id({key: getattr(text_config, key) for key in CLIP_TEXT})
    vision = {key: getattr(vision_config, key) for key in CLIP_VISION}
    return {"projection_dim": config.projection_dim, "text_config": text, "vision_config": vision}


def clip_of_mlip_config(config: MLIPConfig) -> dict[str, Any]:
    """The keys of transformers' `CLIPConfig` for an MLIP config.

    Raises:
        ValueError: listing what transformers' CLIPModel does not compute.
    """
    vision, text = towers(config)
    obstacles = [
        what
        for what, there in (
            (f"{vision.pooling} pooling of the image tower", vision.pooling != "class"),
            ("an image tower without class token", not vision.use_class_token),
            ("an image tower without projection", not vision.use_visual_projection),
            ("an image tower without pre-LayerNorm", not vision.use_pre_layernorm),
            *((what, getattr(vision, key) != getattr(DEFAULTS, key)) for key, what in TIMM_PARTS),
            ("a patch bias", vision.has_patch_bias and vision.use_class_token),
            ("LayerScale", vision.layer_scale_init_value is not None or text.layer_scale_init_value is not None),
            ("an encoder of transformers as text tower", text.encoder_config is not None),
            ("pooling at the last text token", text.pooling == "last"),
            ("a class token of the text tower", text.pooling == "class"),
            ("a non-causal text tower", not text.use_causal_mask),
            ("a text projection with bias, or none", text.text_projection_bias or not text.use_text_projection),
            ("a logit bias", config.instance_loss == "sigmoid"),
            ("eos_token_id=2 (it reads 2 as: pool at the highest id)", text.eos_token_id == 2),
        )
        if there
    ]
    if obstacles:
        raise ValueError(
            f"transformers' CLIPModel does not have {'; '.join(obstacles)}: export with --to open_clip or --to siglip."
        )
    return {
        "projection_dim": config.projection_dim,
        "text_config": {key: getattr(text, key) for key in CLIP_TEXT},
        "vision_config": {key: getattr(vision, key) for key in CLIP_VISION},
    }


# SigLIP starts training at a temperature of 1/10.
SIGLIP_LOGIT_SCALE = math.log(10)
# Keys of transformers' SigLIP that change the mathematics, and have the same name in MLIP.
SIGLIP_TOWER = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
                "layer_norm_eps", "attention_dropout")  # fmt: skip
SIGLIP_TEXT = (*SIGLIP_TOWER, "vocab_size", "max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
SIGLIP_VISION = (*SIGLIP_TOWER, "image_size", "patch_size", "num_channels")
# What distinguishes SigLIP's towers from CLIP's: key, SigLIP's value, and the name of another value.
SIGLIP_VISION_KEYS = (
    ("use_class_token", False, "a class token"),
    ("pooling", "attention", "an image tower without attention pooling"),
    ("use_pre_layernorm", False, "an image tower with a pre-LayerNorm"),
    ("use_visual_projection", False, "a projection of the image embedding"),
    ("layer_scale_init_value", None, "LayerScale"),
)
SIGLIP_TEXT_KEYS = (
    ("encoder_config", None, "an encoder of transformers as text tower"),
    ("pooling", "last", "text pooling at EOS"),
    ("use_causal_mask", False, "a causal text tower"),
    ("use_text_projection", True, "a text tower without a projection"),
    ("text_projection_bias", True, "a text projection without a bias"),
    ("layer_scale_init_value", None, "LayerScale"),
)


def mlip_config_of_siglip(config: SiglipConfig) -> dict[str, Any]:
    """The keys of MLIPConfig that compute what transformers computes from a `SiglipConfig`.

    Raises:
        ValueError: if the image tower has no pooling head, or the towers have embeddings of different widths.
    """
    vision_config, text_config = towers(config)
    if not vision_config.vision_use_head:
        raise ValueError(
            "a SigLIP image tower without its pooling head (vision_use_head=False) is not supported, because it has no "
            "image embedding; convert a SiglipModel with the head."
        )
    if text_config.projection_size != vision_config.hidden_size:
        raise ValueError(
            f"the text embedding has projection_size={text_config.projection_size}, but the image embedding "
            f"hidden_size={vision_config.hidden_size}: the configuration is not that of a SiglipModel."
        )
    vision = {key: getattr(vision_config, key) for key in SIGLIP_VISION}
    text = {key: getattr(text_config, key) for key in SIGLIP_TEXT}
    is_cropped = isinstance(vision["image_size"], int) and vision["image_size"] % vision["patch_size"] > 0
    return {
        "projection_dim": vision_config.hidden_size,
        "instance_loss": "sigmoid",
        "logit_scale_init_value": SIGLIP_LOGIT_SCALE,
        "vision_config": {
            **vision,
            **{key: value for key, value, _ in SIGLIP_VISION_KEYS},
            "crop_to_patches": is_cropped,
            "projection_dim": vision_config.hidden_size,
        },
        "text_config": {
            **text,
            **{key: value for key, value, _ in SIGLIP_TEXT_KEYS},
            "projection_dim": vision_config.hidden_size,
        },
    }


def siglip_of_mlip_config(config: MLIPConfig) -> dict[str, Any]:
    """The keys of transformers' `SiglipConfig` for an MLIP config.

    Raises:
        ValueError: listing what transformers' SiglipModel does not compute.
    """
    vision, text = towers(config)
    obstacles = [
        other
        for tower, keys in ((vision, SIGLIP_VISION_KEYS), (text, SIGLIP_TEXT_KEYS))
        for key, value, other in keys
        if getattr(tower, key) != value
    ]
    obstacles += [what for key, what in TIMM_PARTS if getattr(vision, key) != getattr(DEFAULTS, key)]
    if not (vision.has_patch_bias or vision.use_class_token):
        obstacles.append("patch embeddings without a bias")
    if obstacles:
        listed = "; ".join(dict.fromkeys(obstacles))
        raise ValueError(f"transformers' SiglipModel does not have {listed}: export with --to open_clip or --to clip.")
    return {
        "text_config": {
            **{key: getattr(text, key) for key in SIGLIP_TEXT},
            "projection_size": config.projection_dim,
        },
        "vision_config": {key: getattr(vision, key) for key in SIGLIP_VISION},
    }
