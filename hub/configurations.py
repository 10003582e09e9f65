# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Where a configuration comes from: a name, a folder, or a CLIP model; and overrides from the command line."""

from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CLIPConfig, PreTrainedConfig

from modeling_mlip import MLIPConfig, MLIPTextConfig, MLIPVisionConfig

from .errors import error_line

# By `model_type`: what `save_pretrained` writes here, and what a run may start from.
CONFIG_CLASSES = {kind.model_type: kind for kind in (MLIPConfig, MLIPTextConfig, MLIPVisionConfig)}
START_CLASSES = {kind.model_type: kind for kind in (MLIPConfig, CLIPConfig)}

# name -> (vision keys, text keys, projection_dim), the sizes of OpenCLIP's models of that name. `tiny` is for training
# on a CPU: it merges in its first layer, where that saves most, and its frequency stage is small.
NAMED_CONFIGS: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
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


# Of the frequency embedding in that of an image, for models trained from nothing; with CLIP's weights it begins at 0.
FREQUENCY_EMBED_WEIGHT = 0.5


def named_config(name: str) -> MLIPConfig:
    """The configuration of that name, or of the folder of that name.

    Raises:
        ValueError: if there is neither.
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
    """The configuration of a saved MLIP model, or of a CLIP model of transformers as MLIP's.

    Raises:
        ValueError: as `saved_config`.
    """
    config = saved_config(name_or_path, START_CLASSES)
    return MLIPConfig.from_clip_config(config) if isinstance(config, CLIPConfig) else config


def saved_config(name_or_path: str | Path, classes: dict[str, Any]) -> Any:
    """The configuration of a folder or Hub id, of the class that its `model_type` says.

    Raises:
        OSError: if it is neither a folder nor to be had from the Hub.
        ValueError: if there is none, if it is of another kind of model, or if it has a value that is not allowed.
    """
    folder = Path(name_or_path)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{name_or_path} holds no config.json; give a folder that a model was saved to.")
    try:
        model_type = PreTrainedConfig.get_config_dict(name_or_path)[0].get("model_type")
    except OSError as error:
        if folder.is_dir():
            raise
        raise OSError(f"There is no folder {name_or_path}, and as a Hub id it was not found: {error}") from error
    if model_type not in classes:
        raise ValueError(
            f"{name_or_path} holds a model of type {model_type!r}; here it may be {' or '.join(map(repr, classes))}. "
            "CLIP and OpenCLIP checkpoints become MLIP models with 'mlip convert'."
        )
    try:
        return classes[model_type].from_pretrained(name_or_path)
    except StrictDataclassError as error:
        raise ValueError(f"{name_or_path}/config.json: {error_line(error)}") from error


def _own_fields(config_class: Any) -> dict[str, Any]:
    """Fields of a configuration that are its own or CLIP's, and not those of every configuration."""
    classes = [base for base in config_class.__mro__ if base.__module__.endswith(("_mlip", "_clip"))]
    names = [name for base in reversed(classes) for name in base.__dict__.get("__annotations__", {})]
    return {name: field for name in names if (field := config_class.__dataclass_fields__.get(name)) is not None}


# Every key of the model's and the vision tower's configuration is a flag; the model's wins where both have one.
MODEL_FIELDS = {k: v for k, v in _own_fields(MLIPConfig).items() if k not in ("text_config", "vision_config")}
VISION_FIELDS = {k: v for k, v in _own_fields(MLIPVisionConfig).items() if k not in MODEL_FIELDS}


def override_config(config: MLIPConfig, overrides: dict[str, Any]) -> MLIPConfig:
    """A copy of the configuration with some keys of the model or of the vision tower changed, validated as a whole.

    Raises:
        ValueError: for a key that neither has.
    """
    unknown = sorted(set(overrides) - set(MODEL_FIELDS) - set(VISION_FIELDS))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not a key of MLIPConfig or MLIPVisionConfig.")
    model = {name: value for name, value in overrides.items() if name in MODEL_FIELDS}
    vision = {name: value for name, value in overrides.items() if name in VISION_FIELDS}
    if "hidden_size" in vision:  # sizes that follow it, unless they are given too
        vision.setdefault("frequency_hidden_size", None)
        vision.setdefault("intermediate_size", 4 * vision["hidden_size"])
    if "projection_dim" in model:
        vision["projection_dim"] = model["projection_dim"]
    text = {"projection_dim": model["projection_dim"]} if "projection_dim" in model else {}
    values = config.to_dict()
    return MLIPConfig(
        **{
            **values,
            **model,
            "vision_config": {**values["vision_config"], **vision},
            "text_config": {**values["text_config"], **text},
        }
    )
