# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Strict loading of saved models and processors: missing, unexpected or misshapen weights raise an error.

transformers initialises such weights at random and only logs a warning.
"""

import copy
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoProcessor, CLIPConfig, CLIPProcessor, PreTrainedConfig

import modeling_mlip
from modeling_mlip import MLIPConfig, MLIPModel, MLIPPreTrainedModel
from modeling_mlip.frequency import resize_spectral_filter

from .configurations import CONFIG_CLASSES, START_CLASSES, saved_config
from .formatting import format_names
from .text_context import stretch_text_context

# The keys of MLIPConfig that leave out everything that MLIP adds to CLIP.
CLIP_ONLY = {"frequency_layers": 0, "frequency_loss_weight": 0, "token_loss_weight": 0}


def load_pretrained(name_or_path: str, config: MLIPConfig | None = None, **kwargs: Any) -> MLIPModel:
    """Loads a saved MLIP model, or an MLIP model with the weights of a CLIP model of transformers.

    Parameters that MLIP adds to CLIP are initialised as for training.

    Args:
        config: a configuration that differs from the saved one. It may add or leave out parts. With another
            `image_size`, the position embeddings and spectral filters are interpolated. With a larger
            `max_position_embeddings`, those of the text tower are stretched by `stretch_text_context`.
        kwargs: for `from_pretrained`.

    Raises:
        OSError: if `name_or_path` cannot be read.
        ValueError: if it is another kind of model, or a weight is missing, unexpected, damaged or of another shape than
            the configuration needs, or the text tower cannot be stretched.
    """
    return load_with_new_parameters(name_or_path, config, **kwargs)[0]


def load_with_new_parameters(
    name_or_path: str, config: MLIPConfig | None = None, **kwargs: Any
) -> tuple[MLIPModel, frozenset[str]]:
    """`load_pretrained`, and the names of the parameters that the saved model did not contain."""
    saved = saved_config(name_or_path, START_CLASSES)
    if isinstance(saved, CLIPConfig):
        saved = MLIPConfig.from_clip_config(saved, **CLIP_ONLY)
        config = config or MLIPConfig.from_clip_config(CLIPConfig.from_pretrained(name_or_path))
    config = config or saved
    image_size = config.vision_config.image_size
    saved_image_size = saved.vision_config.image_size
    loaded_config = config if image_size == saved_image_size else _with_image_size(config, saved_image_size)
    length, context = config.text_config.max_position_embeddings, saved.text_config.max_position_embeddings
    if length > context:
        loaded_config = copy.deepcopy(loaded_config)
        loaded_config.text_config.max_position_embeddings = context
    model, missing = _load(MLIPModel, name_or_path, saved, loaded_config, **kwargs)
    if "token_visual_projection.weight" in missing:
        model.start_tokens_from_projections()
    if length > context:
        stretch_text_context(model, length)
    new_parameters = frozenset(missing & {name for name, _ in model.named_parameters()})
    return model if image_size == saved_image_size else resize_model(model, config), new_parameters


def resize_model(model: MLIPModel, config: MLIPConfig) -> MLIPModel:
    """A model with the weights of `model` for another image size.

    Position embeddings are interpolated as by `interpolate_pos_encoding=True` of `model` (bicubic), spectral filters by
    `resize_spectral_filter`. So the outputs equal those of `model` with `interpolate_pos_encoding=True`.

    Args:
        config: the configuration of `model`, but for `vision_config.image_size`.
    """
    vision, image_size = model.config.vision_config, config.vision_config.image_size
    old_side, new_side = vision.image_size // vision.patch_size, image_size // vision.patch_size
    state = model.state_dict()
    embeddings = model.vision_model.embeddings
    name = "vision_model.embeddings.position_embedding.weight"
    num_prefix_tokens = state[name].shape[0] - old_side**2  # the class token
    # Only the shape of this argument is used.
    patch_embeddings = state[name].new_empty(1, num_prefix_tokens + new_side**2, vision.hidden_size)
    with torch.no_grad():
        state[name] = embeddings.interpolate_pos_encoding(patch_embeddings, image_size, image_size)[0]
    for name in [name for name in state if name.endswith(".spectral_filter")]:
        state[name] = resize_spectral_filter(state[name], (new_side, new_side), width=old_side)
    with torch.random.fork_rng(devices=[]):  # the random weights are replaced, so they must not change later draws
        resized = MLIPModel._from_config(
            config, attn_implementation=model.config._attn_implementation, dtype=model.dtype
        )
    resized.load_state_dict(state)
    return resized.to(model.device).train(model.training)


def load_processor(
    name_or_path: str | Path, image_size: int | None = None, context: int | None = None, **kwargs: Any
) -> CLIPProcessor:
    """Loads the processor of a saved model.

    Args:
        image_size: the side of the images in pixels, if it differs from the saved one.
        context: the longest caption in tokens, if it differs from the saved one.
        kwargs: for `from_pretrained`.

    Raises:
        OSError: if there is no image processor.
        ValueError: if there is no vocabulary. transformers makes an empty one, which gives all texts the same ids.
    """
    processor = AutoProcessor.from_pretrained(name_or_path, **kwargs)
    if len(processor.tokenizer) <= len(set(processor.tokenizer.all_special_ids)):
        raise ValueError(
            f"{name_or_path} has no tokenizer.json (or vocab.json and merges.txt): copy it from where the model was "
            "trained or converted."
        )
    if image_size is not None:
        images = processor.image_processor
        size_keys = [key for key, value in dict(images.size).items() if value]
        images.size = type(images.size)(**dict.fromkeys(size_keys, image_size))
        images.crop_size = type(images.crop_size)(height=image_size, width=image_size)
    if context is not None:
        processor.tokenizer.model_max_length = context
    return processor


def load_saved(folder: str | Path) -> MLIPPreTrainedModel:
    """Loads the model of a folder with the class that it was saved from.

    Raises:
        OSError, ValueError: as `load_pretrained`.
    """
    config = saved_config(folder, CONFIG_CLASSES)
    name = (config.architectures or [None])[0]
    if name not in modeling_mlip.__all__:
        raise ValueError(f"{folder}/config.json: architectures={config.architectures}: no class of modeling_mlip.")
    return _load(getattr(modeling_mlip, name), folder, config, config)[0]


def _with_image_size(config: MLIPConfig, image_size: int) -> MLIPConfig:
    """A copy with another image size. Without merging, because a small image may have too few tokens for the ratio."""
    config = copy.deepcopy(config)
    config.vision_config.merge_ratio = 0.0
    config.vision_config.image_size = image_size
    return config


def _load(
    model_class: type[MLIPPreTrainedModel],
    name_or_path: str | Path,
    saved: PreTrainedConfig,
    config: PreTrainedConfig,
    **kwargs: Any,
) -> tuple[Any, set[str]]:
    """The model, and the names of its new weights: those that `config` needs and `saved` does not."""
    try:
        model, report = model_class.from_pretrained(
            name_or_path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
    except (SafetensorError, pickle.UnpicklingError) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"{name_or_path}: the weights cannot be read ({message}); copy them again.") from error
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in model_class(saved).state_dict().items()}
    misshapen = [(name, list(shape), list(needed)) for name, shape, needed in report["mismatched_keys"]]
    overridden = [
        f"{name} {shape} for {needed}" for name, shape, needed in misshapen if shape == [*expected.get(name, ())]
    ]
    if overridden:
        raise ValueError(
            f"{name_or_path}: the changed configuration needs weights of another shape: {format_names(overridden)}; of "
            "the sizes of a saved model only image_size can be changed, and max_position_embeddings can grow."
        )
    _refuse(
        name_or_path,
        "weights of another shape than the configuration says",
        [f"{name} {shape} for {needed}" for name, shape, needed in misshapen],
    )
    _refuse(name_or_path, "missing weights", set(report["missing_keys"]) & set(expected))
    unknown = set(report["unexpected_keys"]) - set(expected)
    _refuse(name_or_path, "weights that the configuration does not know", unknown)
    return model, set(report["missing_keys"])


def _refuse(name_or_path: str | Path, fault: str, names: Iterable[str]) -> None:
    names = sorted(names)
    if names:
        raise ValueError(
            f"{name_or_path}: {fault}: {format_names(names)}; config.json and the weights are not of one model."
        )
