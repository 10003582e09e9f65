# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What a run starts from: configuration, processor and model, each from a saved model or from scratch."""

from collections.abc import Iterable
from typing import Any

from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.hub.configurations import named_config, override_config, pretrained_config
from modeling_mlip.hub.loading import load_processor, load_with_new_parameters
from modeling_mlip.hub.text_context import check_stretchable

SPECIAL_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def build_config(
    *,
    model_name_or_path: str | None = None,
    config_name: str | None = None,
    overrides: dict[str, Any] | None = None,
    max_seq_length: int | None = None,
) -> MLIPConfig:
    """Configuration of a saved model, or a named one, with some keys changed.

    Args:
        max_seq_length: longest caption in tokens. If it exceeds the context of the text tower, it becomes the context,
            and `build_model` stretches the position embeddings of a saved model. A shorter one changes nothing.

    Raises:
        ValueError: if not exactly one of `model_name_or_path` and `config_name` is given, a key or value is unknown, or
            the text tower of a saved model cannot be stretched.
    """
    if (model_name_or_path is None) == (config_name is None):
        raise ValueError(
            f"Got model_name_or_path={model_name_or_path!r} and config_name={config_name!r}: give one of them, a model "
            "to start from or a configuration to train from scratch."
        )
    config = named_config(config_name) if config_name is not None else pretrained_config(str(model_name_or_path))
    if overrides:
        config = override_config(config, overrides)
    text_config: Any = config.text_config
    if max_seq_length is not None and max_seq_length > text_config.max_position_embeddings:
        if model_name_or_path is not None:
            check_stretchable(text_config, max_seq_length)
        text_config.max_position_embeddings = max_seq_length
    return config


def build_processor(
    config: MLIPConfig,
    *,
    model_name_or_path: str | None = None,
    tokenizer_name: str | None = None,
    captions: Iterable[str] | None = None,
) -> CLIPProcessor:
    """Processor of a saved model, or a new one, for the image size and the context of `config`.

    Args:
        tokenizer_name: a CLIP tokenizer that replaces the saved model's; from scratch, the tokenizer to use.
        captions: from scratch without `tokenizer_name`, the texts to train a tokenizer on.

    Raises:
        OSError: if a folder or Hub id cannot be read.
        ValueError: from scratch, if neither `tokenizer_name` nor `captions` is given.
    """
    image_size = config.vision_config.image_size
    options: dict[str, Any] = {}
    if tokenizer_name is not None:
        options["tokenizer"] = CLIPTokenizer.from_pretrained(tokenizer_name)
    if model_name_or_path is not None:
        saved = pretrained_config(model_name_or_path)
        context = config.text_config.max_position_embeddings
        return load_processor(
            model_name_or_path,
            image_size=image_size if image_size != saved.vision_config.image_size else None,
            context=context if context != saved.text_config.max_position_embeddings else None,
            **options,
        )
    if tokenizer_name is None and captions is not None:
        options["tokenizer"] = train_tokenizer(captions, max_seq_length=config.text_config.max_position_embeddings)
    if not options:
        raise ValueError("Got neither tokenizer_name nor captions to train a tokenizer on: give one of them.")
    options["tokenizer"].model_max_length = config.text_config.max_position_embeddings
    crop_size = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=crop_size)
    return CLIPProcessor(image_processor=image_processor, **options)


def build_model(
    config: MLIPConfig,
    tokenizer: CLIPTokenizer,
    *,
    model_name_or_path: str | None = None,
    attn_implementation: str = "sdpa",
) -> tuple[MLIPModel, frozenset[str]]:
    """Model with the weights of a saved one, or with random weights and the vocabulary of the tokenizer.

    Returns:
        The model, and the names of the parameters that the saved model did not contain; none from scratch.

    Raises:
        ValueError: if the tokenizer has more tokens than the saved model, or its weights do not match `config`.
    """
    vocab_size = config.text_config.vocab_size
    if model_name_or_path is None:
        text = config.text_config.to_dict()
        text |= {name: getattr(tokenizer, name) for name in SPECIAL_TOKEN_IDS}
        config = MLIPConfig(**{**config.to_dict(), "text_config": {**text, "vocab_size": len(tokenizer)}})
        return MLIPModel._from_config(config, attn_implementation=attn_implementation), frozenset()
    if len(tokenizer) > vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {vocab_size}: leave out tokenizer_name to use "
            "the model's own tokenizer."
        )
    return load_with_new_parameters(
        model_name_or_path, config=config, dtype="float32", attn_implementation=attn_implementation
    )
