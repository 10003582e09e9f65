# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Configurations by name, from a folder or from the Hub, and changes to some of their keys."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPConfig, PreTrainedConfig

from modeling_mlip import MLIPConfig, MLIPTextConfig, MLIPVisionConfig

from .errors import error_line

# By `model_type`: the configurations that this package saves, and those of models that training can start from.
CONFIG_CLASSES = {kind.model_type: kind for kind in (MLIPConfig, MLIPTextConfig, MLIPVisionConfig)}
START_CLASSES = {kind.model_type: kind for kind in (MLIPConfig, CLIPConfig)}

# name -> (vision keys, text keys, projection_dim). The sizes are those of OpenCLIP's models of these names. `tiny` is
# for training on a CPU: it merges in its first layer, where merging saves most, and its frequency stage has one layer.
# `nano` is the model of the demo.
NAMED_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "nano": (
        dict(
            **dict(image_size=48, patch_size=16, hidden_size=96, num_hidden_layers=4, num_attention_heads=3),
            **dict(merge_layers=[0], frequency_layers=1),
        ),
        dict(hidden_size=96, num_hidden_layers=1, num_attention_heads=3, max_position_embeddings=24),
        96,
    ),
    "tiny": (
        dict(
            **dict(image_size=64, patch_size=8, hidden_size=192, num_hidden_layers=6, num_attention_heads=3),
            **dict(merge_layers=[0], frequency_layers=1),
        ),
        dict(hidden_size=192, num_hidden_layers=3, num_attention_heads=3, max_position_embeddings=32),
        192,
    ),
    "vit-b-32": (
        dict(image_size=224, patch_size=32, hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
        dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, max_position_embeddings=77),
        512,
    ),
    "vit-b-16": (
        dict(image_size=224, patch_size=16, hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
        dict(hidden_size=512, num_hidden_layers=12, num_attention_heads=8, max_position_embeddings=77),
        512,
    ),
    "vit-l-14": (
        dict(image_size=224, patch_size=14, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
        dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, max_position_embeddings=77),
        768,
    ),
}

# Weight of the frequency embedding in the image embedding, for models trained from scratch. It starts at 0 for models
# with CLIP's weights.
FREQUENCY_EMBED_WEIGHT = 0.5


def named_config(name: str) -> MLIPConfig:
    """The configuration with a name of `NAMED_CONFIGS`, or the one saved in a folder.

    Raises:
        ValueError: if `name` is neither.
    """
    if name in NAMED_CONFIGS:
        vision, text, projection_dim = NAMED_CONFIGS[name]
        towers = [
            {
                **keys,
                "intermediate_size": 4 * keys["hidden_size"],
                "hidden_act": "gelu",
                "projection_dim": projection_dim,
            }
            for keys in (vision, text)
        ]
        return MLIPConfig(
            vision_config=towers[0],
            text_config=towers[1],
            projection_dim=projection_dim,
            frequency_embed_weight=FREQUENCY_EMBED_WEIGHT,
        )
    if (Path(name) / "config.json").is_file():
        return pretrained_config(name)
    raise ValueError(
        f"config_name={name!r} is unknown; choose one of {', '.join(NAMED_CONFIGS)}, or a folder with a config.json."
    )


def pretrained_config(name_or_path: str) -> MLIPConfig:
    """The configuration of a saved MLIP model, or an MLIP configuration made from that of a CLIP model.

    Raises:
        OSError, ValueError: as `saved_config`.
    """
    config = saved_config(name_or_path, START_CLASSES)
    return MLIPConfig.from_clip_config(config) if isinstance(config, CLIPConfig) else config


def saved_config(name_or_path: str | Path, classes: dict[str, Any]) -> Any:
    """The configuration of a folder or Hub id.

    Args:
        classes: the configuration class of each allowed `model_type`.

    Raises:
        OSError: if `name_or_path` is not a folder and cannot be loaded from the Hub.
        ValueError: if the folder has no config.json, its `model_type` is not allowed, or a value in it is not allowed.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name_or_path} holds no config.json; give the folder of a saved model.")
    try:
        model_type = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    except OSError as error:
        if folder.is_dir():
            raise
        raise OSError(
            f"There is no folder {name_or_path}, and no model of that id could be loaded from the Hub: {error}"
        ) from error
    if model_type not in classes:
        raise ValueError(
            f"{name_or_path} holds a model of type {model_type!r}; choose a model of type "
            f"{' or '.join(map(repr, classes))}. 'mlip convert' makes MLIP models from CLIP and OpenCLIP checkpoints."
        )
    try:
        return classes[model_type].from_pretrained(name_or_path)
    except StrictDataclassError as error:
        raise ValueError(f"{name_or_path}/config.json: {error_line(error)}") from error


def _specific_fields(config_class: Any) -> dict[str, Any]:
    """Fields that MLIP's or CLIP's configuration class declares, without those of every configuration."""
    classes = [base for base in config_class.__mro__ if base.__module__.endswith(("_mlip", "_clip"))]
    names = [name for base in reversed(classes) for name in base.__dict__.get("__annotations__", {})]
    return {name: field for name in names if (field := config_class.__dataclass_fields__.get(name)) is not None}


# The keys that `override_config` accepts and that `mlip train` has flags for. A key of both belongs to the model.
MODEL_FIELDS = {k: v for k, v in _specific_fields(MLIPConfig).items() if k not in ("text_config", "vision_config")}
VISION_FIELDS = {k: v for k, v in _specific_fields(MLIPVisionConfig).items() if k not in MODEL_FIELDS}


def override_config(config: MLIPConfig, overrides: dict[str, Any]) -> MLIPConfig:
    """A copy of the configuration with some keys of the model or of the vision tower changed.

    Sizes that depend on a changed key follow it, unless they are given too: `intermediate_size` and
    `frequency_hidden_size` follow `hidden_size`, and both towers' `projection_dim` follows the model's. Without a
    frequency embedding, `frequency_embed_weight` becomes 0.

    Raises:
        ValueError: if a key is unknown, or a value is not allowed.
    """
    unknown = [
        f"{name}={overrides[name]!r}" for name in sorted(set(overrides) - set(MODEL_FIELDS) - set(VISION_FIELDS))
    ]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a key of MLIPConfig or MLIPVisionConfig.")
    model = {name: value for name, value in overrides.items() if name in MODEL_FIELDS}
    vision = {name: value for name, value in overrides.items() if name in VISION_FIELDS}
    if "hidden_size" in vision:
        vision.setdefault("frequency_hidden_size", None)  # the configuration computes it
        vision.setdefault("intermediate_size", 4 * vision["hidden_size"])
    num_layers = vision.get("frequency_layers", config.frequency_layers)
    if not (num_layers and model.get("frequency_loss_weight", config.frequency_loss_weight)):
        vision.setdefault("frequency_embed_weight", 0.0)
    if "projection_dim" in model:
        vision["projection_dim"] = model["projection_dim"]
    text = {"projection_dim": model["projection_dim"]} if "projection_dim" in model else {}
    values = config.to_dict()
    keys = {
        **values,
        **model,
        "vision_config": {**values["vision_config"], **vision},
        "text_config": {**values["text_config"], **text},
    }
    try:
        return MLIPConfig(**keys)
    except StrictDataclassError as error:
        raise ValueError(error_line(error)) from error
