# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Loading what was saved, strictly: transformers fills in a weight that is missing at random, with a warning."""

import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoProcessor, CLIPConfig, CLIPProcessor, PreTrainedConfig

import modeling_mlip
from modeling_mlip import MLIPConfig, MLIPModel, MLIPPreTrainedModel

from .configurations import CONFIG_CLASSES, START_CLASSES, saved_config

# What makes MLIP of CLIP, as the keys that leave it out.
CLIP_ONLY = {"frequency_layers": 0, "frequency_loss_weight": 0, "token_loss_weight": 0}


def load_pretrained(name_or_path: str, config: MLIPConfig | None = None, **kwargs: Any) -> MLIPModel:
    """A saved MLIP model, or a CLIP model of transformers with what MLIP adds at its start.

    Args:
        config: the configuration to load it with, where it differs from the saved one.
        kwargs: for `from_pretrained`.

    Raises:
        ValueError: for another kind of model, or if a weight is missing, left over, of another shape or damaged.
    """
    saved = saved_config(name_or_path, START_CLASSES)
    if isinstance(saved, CLIPConfig):
        saved = MLIPConfig.from_clip_config(saved, **CLIP_ONLY)
        config = config or MLIPConfig.from_clip_config(CLIPConfig.from_pretrained(name_or_path))
    model, missing = _load(MLIPModel, name_or_path, saved, config or saved, **kwargs)
    if "token_visual_projection.weight" in missing:
        model.start_tokens_from_projections()
    return model


def load_processor(name_or_path: str | Path, **kwargs: Any) -> CLIPProcessor:
    """The processor of a saved model.

    Raises:
        OSError: if it has no image processor.
        ValueError: if it has no vocabulary. transformers makes up for that by an empty one, with which every text is
            the same.
    """
    processor = AutoProcessor.from_pretrained(name_or_path, **kwargs)
    if len(processor.tokenizer) <= len(set(processor.tokenizer.all_special_ids)):
        raise ValueError(
            f"{name_or_path} has no tokenizer.json (or vocab.json and merges.txt): copy it from where the model was "
            "trained or converted."
        )
    return processor


def load_saved(folder: str | Path) -> MLIPPreTrainedModel:
    """The model of a folder, of the class that it was saved from.

    Raises:
        ValueError: as `load_pretrained`.
    """
    config = saved_config(folder, CONFIG_CLASSES)
    name = (config.architectures or [None])[0]
    if name not in modeling_mlip.__all__:
        raise ValueError(f"{folder}/config.json: architectures={config.architectures}: no class of modeling_mlip.")
    return _load(getattr(modeling_mlip, name), folder, config, config)[0]


def _load(
    model_class: type[MLIPPreTrainedModel],
    name_or_path: str | Path,
    saved: PreTrainedConfig,
    config: PreTrainedConfig,
    **kwargs: Any,
) -> tuple[Any, set[str]]:
    """The model, and the names of its weights that are new: those that `config` asks for and `saved` does not."""
    try:
        model, report = model_class.from_pretrained(
            name_or_path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except (SafetensorError, pickle.UnpicklingError) as error:
        raise ValueError(f"{name_or_path}: the weights cannot be read ({_line(error)}); copy them again.") from error
    with torch.device("meta"):
        expected = set(model_class(saved).state_dict())
    shapes = [f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in report["mismatched_keys"]]
    _refuse(name_or_path, "weights of another shape than the configuration says", shapes)
    _refuse(name_or_path, "missing weights", set(report["missing_keys"]) & expected)
    _refuse(name_or_path, "weights that the configuration does not know", set(report["unexpected_keys"]) - expected)
    return model, set(report["missing_keys"])


def _refuse(name_or_path: str | Path, what: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ValueError(
            f"{name_or_path}: {what}: {', '.join(names[:5])}{more}; config.json and the weights are not of one model."
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
