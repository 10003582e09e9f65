# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The image towers of timm that OpenCLIP uses and MLIP computes: name to keys of MLIPVisionConfig, and back.

Source: `timm/models/vision_transformer.py` of timm 1.0. The activation belongs to the name: timm builds the towers of
the first SigLIP with the exact GELU, although they were trained with its tanh approximation.
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


TIMM_TOWERS = _siglip_towers()
# How a tower may differ from a tower of the same size, for the error message of `timm_name_of`.
VARIABLE_KEYS = ("image_size", "hidden_act", "layer_norm_eps", "use_pre_layernorm", "use_visual_projection")


def vision_keys_of_timm(vision_cfg: dict[str, Any]) -> dict[str, Any]:
    """The keys of MLIPVisionConfig for OpenCLIP's vision_cfg with a `timm_model_name` of `TIMM_TOWERS`.

    Raises:
        ValueError: if OpenCLIP pools or projects in another way, or the image size is not that of the name.
    """
    name = vision_cfg["timm_model_name"]
    keys = TIMM_TOWERS[name]
    pool, projection = vision_cfg.get("timm_pool", "avg"), vision_cfg.get("timm_proj", "linear")
    if pool != "map" or projection != "none":
        raise ValueError(
            f"the timm image tower {name} with timm_pool={pool!r} and timm_proj={projection!r} is not supported; "
            "supported are timm_pool='map' and timm_proj='none', as in OpenCLIP's SigLIP models."
        )
    image_size = vision_cfg.get("image_size", keys["image_size"])
    if image_size not in (keys["image_size"], [keys["image_size"]] * 2):
        raise ValueError(f"image_size={image_size}, but the timm image tower {name} takes {keys['image_size']} pixels.")
    return dict(keys)


def timm_name_of(vision: MLIPVisionConfig) -> str:
    """The timm name of a tower; the inverse of `vision_keys_of_timm`.

    Raises:
        ValueError: if timm has no such tower, naming the difference from the most similar one.
    """
    nearest: tuple[str, dict[str, Any]] | None = None
    for name, keys in TIMM_TOWERS.items():
        different = {key: value for key, value in keys.items() if getattr(vision, key) != value}
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
