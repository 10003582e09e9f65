# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A common interface to the models that can be evaluated: MLIP, CLIP of transformers, and OpenCLIP.

load_encoder("runs/mine"), load_encoder("openai/clip-vit-base-patch32"),
load_encoder("open_clip:ViT-B-32:laion2b_s34b_b79k"), load_encoder("open_clip:hf-hub:owner/name")
"""

import difflib
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import CLIPModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from modeling_mlip import MLIPConfig, MLIPModel, MLIPVisionModel
from modeling_mlip.configuration_mlip import MERGE_METHODS
from modeling_mlip.data.images import image_transform
from modeling_mlip.hub.configurations import START_CLASSES, saved_config
from modeling_mlip.hub.errors import error_line
from modeling_mlip.hub.extras import require_modules
from modeling_mlip.hub.loading import load_pretrained, load_processor

OPEN_CLIP = "open_clip:"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class Encoder:
    """A model with its tokenizer and image transform.

    Args:
        name: folder, Hub id or name that the model was loaded from.
        model: has `get_image_features(pixel_values)` and `get_text_features(input_ids, attention_mask)`, whose
            `pooler_output` is `(B, P)`, not normalised.
        tokenizer: callable as `data.collators.tokenize` calls it.
        transform: one PIL image to pixel values `(3, H, W)`.
        context: longest caption in tokens.
    """

    name: str
    model: Any
    tokenizer: Any
    transform: Callable[[Image.Image], torch.Tensor]
    context: int

    @property
    def merge_ratio(self) -> float:
        """The share of patch tokens that the model merges away; 0 for a model that cannot merge."""
        return self.model.config.merge_ratio if isinstance(self.model, MLIPModel) else 0.0


def make_encoder(name: str, model: Any, processor: Any) -> Encoder:
    """The encoder of a transformers model (`MLIPModel` or `CLIPModel`) and its processor."""
    context = model.config.text_config.max_position_embeddings
    return Encoder(name, model, processor.tokenizer, image_transform(processor.image_processor), context)


def load_encoder(source: str, dtype: str = "float32", attn_implementation: str = "sdpa") -> Encoder:
    """Loads a model for evaluation, to a GPU if there is one.

    Args:
        source: a folder or a Hub id of an MLIP model or of a CLIP model of transformers; or `open_clip:` and a name of
            open_clip with `:` and a tag or file of weights, or `open_clip:hf-hub:OWNER/NAME`, or
            `open_clip:local-dir:FOLDER`.
        dtype: one of `DTYPES`.

    Raises:
        ImportError: for `open_clip:` if open_clip is not installed.
        ValueError: if it is another kind of model, or weights are missing or damaged.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}.")
    if source.startswith(OPEN_CLIP):
        encoder = _load_open_clip(source)
    else:
        is_mlip = isinstance(saved_config(source, START_CLASSES), MLIPConfig)
        load = load_pretrained if is_mlip else _load_clip
        model = load(source, dtype=torch.float32, attn_implementation=attn_implementation)
        encoder = make_encoder(source, model, load_processor(source))
    encoder.model.eval().to("cuda" if torch.cuda.is_available() else "cpu", getattr(torch, dtype))
    return encoder


def _load_clip(source: str, **kwargs: Any) -> CLIPModel:
    model, report = CLIPModel.from_pretrained(source, output_loading_info=True, **kwargs)
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ValueError(
            f"{source}: missing weights: {', '.join(missing[:5])}; config.json and the weights are of different models."
        )
    return model


def set_merging(encoder: Encoder, merge_ratio: float | None = None, merge_method: str | None = None) -> None:
    """Changes the merge ratio and the merge method of an MLIP model, from its next call on; `None` keeps the value.

    Raises:
        ValueError: for a model without merging, or a value that is not allowed.
    """
    if merge_ratio is None and merge_method is None:
        return
    if not isinstance(encoder.model, MLIPModel):
        raise ValueError(
            f"{encoder.name} is not an MLIP model and merges no tokens: leave out merge_ratio, or convert it first: "
            "mlip convert SOURCE TARGET."
        )
    if merge_method is not None and merge_method not in MERGE_METHODS:
        raise ValueError(f"merge_method={merge_method!r}: choose one of {', '.join(MERGE_METHODS)}.")
    previous = encoder.model.config.merge_method
    _set_merge_method(encoder.model, merge_method or previous)
    if merge_ratio is not None:
        try:
            encoder.model.set_merge_ratio(merge_ratio)
        except (ValueError, StrictDataclassError) as error:
            _set_merge_method(encoder.model, previous)
            raise ValueError(error_line(error)) from error


def _set_merge_method(model: MLIPModel, merge_method: str) -> None:
    model.config.merge_method = merge_method
    for tower in (module for module in model.modules() if isinstance(module, MLIPVisionModel)):
        tower.config.merge_method = merge_method


# OpenCLIP


class OpenClipModel(torch.nn.Module):
    """open_clip's model with the two methods of transformers' CLIP that evaluation calls."""

    def __init__(self, model: Any, context: int, pad_token_id: int):
        super().__init__()
        self.model = model
        self.context = context
        self.pad_token_id = pad_token_id

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def get_image_features(self, pixel_values: torch.Tensor) -> BaseModelOutputWithPooling:
        """`pooler_output` `(B, P)` of `pixel_values` `(B, 3, H, W)`."""
        return BaseModelOutputWithPooling(pooler_output=self.model.encode_image(pixel_values.to(self.dtype)))

    def get_text_features(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> BaseModelOutputWithPooling:
        """`pooler_output` `(T, P)` of `input_ids` `(T, L)`."""
        missing = self.context - input_ids.shape[1]  # open_clip requires full contexts, padded by its tokenizer's rule
        input_ids = torch.nn.functional.pad(input_ids, (0, missing), value=self.pad_token_id)
        return BaseModelOutputWithPooling(pooler_output=self.model.encode_text(input_ids))


class OpenClipTokenizer:
    """open_clip's tokenizer in the form that `data.collators.tokenize` calls: ids without padding."""

    def __init__(self, tokenizer: Callable[..., torch.Tensor], context: int):
        self.tokenizer = tokenizer
        self.context = context
        self.pad_token_id = int(tokenizer([""], context_length=context)[0, -1])

    def __call__(self, captions: list[str], verbose: bool = False) -> dict[str, list[list[int]]]:
        rows = []
        for ids, longer in zip(
            self.tokenizer(captions, context_length=self.context).tolist(),
            self.tokenizer(captions, context_length=self.context + 2).tolist(),
            strict=True,
        ):
            if len(self._without_padding(longer)) > self.context:
                # The caption was cut. An extra token before the last one makes `tokenize` count it and remove it.
                rows.append([*ids[:-1], 0, ids[-1]])
            else:
                rows.append(self._without_padding(ids))
        return {"input_ids": rows}

    def _without_padding(self, ids: list[int]) -> list[int]:
        length = len(ids)
        while length > 1 and ids[length - 1] == self.pad_token_id:
            length -= 1
        return ids[:length]


def _load_open_clip(source: str) -> Encoder:
    """The encoder of `open_clip:NAME:TAG` and the other forms that `load_encoder` lists."""
    require_modules(source, "openclip", "open_clip")
    import open_clip

    name = source.removeprefix(OPEN_CLIP)
    pretrained = None
    if not name.startswith(("hf-hub:", "local-dir:")):
        name, _, pretrained = name.partition(":")
        if name not in open_clip.list_models():
            near = difflib.get_close_matches(name, open_clip.list_models(), n=5, cutoff=0)
            raise ValueError(f"{source}: open_clip has no model {name!r}; the nearest names are {', '.join(near)}.")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained not in tags and not Path(pretrained).is_file():
            known = f" of {', '.join(tags)}" if tags else ""
            raise ValueError(
                f"{source}: give the weights, as {OPEN_CLIP}{name}:TAG with a tag{known}, or {OPEN_CLIP}{name}:FILE "
                "with a checkpoint file."
            )
    try:
        model, transform = open_clip.create_model_from_pretrained(name, pretrained=pretrained)
        tokenizer = open_clip.get_tokenizer(name)
    except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(f"{source} could not be loaded: {' '.join(str(error).split())[:300]}") from error
    context = int(model.context_length)
    wrapped = OpenClipTokenizer(tokenizer, context)
    return Encoder(source, OpenClipModel(model, context, wrapped.pad_token_id).eval(), wrapped, transform, context)
