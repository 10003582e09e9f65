# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The image towers of timm that OpenCLIP uses and MLIP computes: name to keys of MLIPVisionConfig, and back.

Sources: `timm/models/vision_transformer.py` and `eva.py` of timm 1.0. The activation belongs to the name: timm builds
the towers of the first SigLIP with the exact GELU, although they were trained with its tanh approximation.
"""

from typing import Any

from modeling_mlip import MLIPVisionConfig

# Width, layers, heads and width of the MLP.
SIGLIP_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
# Size, patch size, image sizes and activation.
SIGLIP_VARIANTS = (
    ("base", 32, (256,), "gelu_pytorch_tanh"),
    ("base", 16, (224, 256, 384, 512), "gelu"),
    ("large", 16, (256, 384), "gelu"),
    ("large", 16, (512,), "gelu_pytorch_tanh"),
    ("so400m", 14, (224, 378, 384), "gelu"),
    ("so400m", 16, (256, 384, 512), "gelu_pytorch_tanh"),
    ("giantopt", 16, (256, 384), "gelu_pytorch_tanh"),
)


def _siglip_towers() -> dict[str, dict[str, Any]]:
    towers = {}
    for size, patch_size, image_sizes, hidden_act in SIGLIP_VARIANTS:
        hidden_size, num_layers, num_heads, intermediate_size = SIGLIP_SIZES[size]
        for image_size in image_sizes:
            towers[f"vit_{size}_patch{patch_size}_siglip_{image_size}"] = {
                "hidden_size": hidden_size,
                "intermediate_size": intermediate_size,
                "num_hidden_layers": num_layers,
                "num_attention_heads": num_heads,
                "image_size": image_size,
                "patch_size": patch_size,
                "hidden_act": hidden_act,
                "layer_norm_eps": 1e-6,
                "use_class_token": False,
                "pooling": "attention",
                "use_pre_layernorm": False,
                "use_visual_projection": False,
                "crop_to_patches": image_size % patch_size > 0,
            }
    return towers


def _eva_towers() -> dict[str, dict[str, Any]]:
    """EVA (arXiv 2211.07636) and EVA-02 (arXiv 2303.11331)."""
    eva = {
        "layer_norm_eps": 1e-6,
        "use_pre_layernorm": False,
        "use_patch_bias": True,
        "use_key_bias": False,
        "visual_projection_bias": True,
    }
    plain: dict[str, Any] = {
        **eva,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
        "hidden_act": "gelu",
    }
    rotary: dict[str, Any] = {
        **eva,
        "hidden_act": "silu",
        "use_gated_mlp": True,
        "use_sub_layernorm": True,
        "rotary_grid_size": 16,
    }
    base, large, giant, enormous = (
        {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": intermediate_size}
        for width, layers, intermediate_size in (
            (768, 12, 2048),
            (1024, 24, 2730),
            (1408, 40, 6144),
            (1792, 64, 15360),
        )
    )
    towers = {
        "eva_giant_patch14_224": {**plain, **giant},
        "eva02_base_patch16_clip_224": {
            **rotary, **base, "num_attention_heads": 12, "image_size": 224, "patch_size": 16
        },
        "eva02_enormous_patch14_clip_224": {**plain, **enormous, "use_residual_post_norm": True},
    }  # fmt: skip
    for image_size in (224, 336):
        towers[f"eva02_large_patch14_clip_{image_size}"] = {
            **rotary, **large, "num_attention_heads": 16, "image_size": image_size, "patch_size": 14
        }  # fmt: skip
    return towers


# Size, patch size, image size, width, layers, heads, width of the MLP, and whether there is a class token.
PERCEPTION_ENCODERS = (
    ("tiny", 16, 384, 192, 12, 3, 768, True),
    ("small", 16, 384, 384, 12, 6, 1536, True),
    ("base", 16, 224, 768, 12, 12, 3072, True),
    ("large", 14, 336, 1024, 24, 16, 4096, True),
    ("gigantic", 14, 448, 1536, 50, 16, 8960, False),
)


def _perception_encoders() -> dict[str, dict[str, Any]]:
    """Perception Encoder (arXiv 2504.13181)."""
    towers = {}
    for size, patch_size, image_size, width, layers, heads, intermediate_size, has_class_token in PERCEPTION_ENCODERS:
        towers[f"vit_pe_core_{size}_patch{patch_size}_{image_size}"] = {
            "hidden_size": width,
            "intermediate_size": intermediate_size,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "use_class_token": has_class_token,
            "use_patch_bias": False,
            "pooling": "attention",
            "pooling_num_heads": 8,
            "pooling_intermediate_size": 4 * width,
            "visual_projection_bias": True,
            "rotary_grid_size": image_size // patch_size,
            "rotary_offset": 1.0 if has_class_token else 0.0,
            "rotary_axes": "xy",
        }
    return towers


# Size, patch size, image size, width, layers and heads.
CLIP_TOWERS = (
    ("base", 32, 224, 768, 12, 12),
    ("base", 16, 224, 768, 12, 12),
    ("large", 14, 224, 1024, 24, 16),
    ("large", 14, 336, 1024, 24, 16),
    ("huge", 14, 224, 1280, 32, 16),
)


def _clip_towers() -> dict[str, dict[str, Any]]:
    """timm's ViTs with the layers of CLIP (MobileCLIP2-L), and the image tower of MobileCLIP-B (arXiv 2311.17049)."""
    towers = {
        f"vit_{size}_patch{patch_size}_clip_{image_size}": {
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": image_size,
            "patch_size": patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "visual_projection_bias": True,
        }
        for size, patch_size, image_size, width, layers, heads in CLIP_TOWERS
    }
    stem = {"use_conv_stem": True, "use_patch_bias": True, "use_pre_layernorm": False, "layer_norm_eps": 1e-6}
    return {**towers, "vit_base_mci_224": towers["vit_base_patch16_clip_224"] | stem}


TIMM_TOWERS = {**_siglip_towers(), **_eva_towers(), **_perception_encoders(), **_clip_towers()}
# Keys in which OpenCLIP's own ViT has the defaults.
PART_KEYS = (
    "use_class_token",
    "visual_projection_bias",
    "use_conv_stem",
    "has_patch_bias",
    "use_key_bias",
    "use_gated_mlp",
    "use_sub_layernorm",
    "use_residual_post_norm",
    "rotary_grid_size",
)
# Keys that set the sizes of these parts.
SIZE_KEYS = ("pooling_num_heads", "pooling_intermediate_size", "rotary_offset", "rotary_axes")
DEFAULTS = MLIPVisionConfig()
# How a tower may differ from a tower of the same size, for the error message of `timm_name_of`.
VARIABLE_KEYS = ("image_size", "hidden_act", "layer_norm_eps", "use_pre_layernorm", "use_visual_projection")


def vision_keys_of_timm(vision_cfg: dict[str, Any]) -> dict[str, Any]:
    """The keys of MLIPVisionConfig for OpenCLIP's vision_cfg with a `timm_model_name` of `TIMM_TOWERS`.

    Raises:
        ValueError: if OpenCLIP pools or projects in another way, or the image size is not that of the name.
    """
    name = vision_cfg["timm_model_name"]
    keys = TIMM_TOWERS[name]
    head = timm_head_of(MLIPVisionConfig(**keys))
    given = {"timm_pool": vision_cfg.get("timm_pool", "avg"), "timm_proj": vision_cfg.get("timm_proj", "linear")}
    if given != head:
        found, supported = (
            f"timm_pool={keys['timm_pool']!r} and timm_proj={keys['timm_proj']!r}" for keys in (given, head)
        )
        raise ValueError(
            f"the timm image tower {name} with {found} is not supported; supported are {supported}, as in OpenCLIP's "
            "models with this tower."
        )
    image_size = vision_cfg.get("image_size", keys["image_size"])
    if image_size not in (keys["image_size"], [keys["image_size"]] * 2):
        raise ValueError(f"image_size={image_size}, but the timm image tower {name} takes {keys['image_size']} pixels.")
    return dict(keys)


def timm_head_of(vision: MLIPVisionConfig) -> dict[str, str | None]:
    """The keys of OpenCLIP's vision_cfg for pooling and projection. With `None`, timm's classifier projects."""
    return {
        "timm_pool": "map" if vision.pooling == "attention" else "token",
        "timm_proj": None if vision.use_visual_projection else "none",
    }


def is_timm_tower(vision: MLIPVisionConfig) -> bool:
    """Whether a tower has parts that only towers of timm have, and OpenCLIP's own ViT has not."""
    return vision.pooling == "attention" or any(getattr(vision, key) != getattr(DEFAULTS, key) for key in PART_KEYS)


def timm_name_of(vision: MLIPVisionConfig) -> str:
    """The timm name of a tower; the inverse of `vision_keys_of_timm`.

    Raises:
        ValueError: if timm has no such tower, naming the difference from the most similar one.
    """
    nearest: tuple[str, dict[str, Any]] | None = None
    for name, keys in TIMM_TOWERS.items():
        theirs = MLIPVisionConfig(**keys)
        compared = dict.fromkeys([*keys, *PART_KEYS, *SIZE_KEYS, "layer_scale_init_value"])
        compared.pop("use_patch_bias", None)  # `has_patch_bias` is the resolved value
        different = {key: getattr(theirs, key) for key in compared if getattr(vision, key) != getattr(theirs, key)}
        if not different:
            return name
        if set(different) <= set(VARIABLE_KEYS) and (nearest is None or len(different) < len(nearest[1])):
            nearest = name, different
    tower = f"{vision.num_hidden_layers} x {vision.hidden_size}, {vision.image_size}/{vision.patch_size}"
    if nearest is None:
        raise ValueError(
            f"OpenCLIP has no image tower like this ({tower}): share it as an MLIP model with 'mlip push'."
        )
    name, different = nearest
    listed = ", ".join(f"{key}={value!r}, the model {getattr(vision, key)!r}" for key, value in different.items())
    raise ValueError(
        f"OpenCLIP has no image tower like this ({tower}): its {name} has {listed}. Export with --to siglip."
    )
