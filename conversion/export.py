# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Export of MLIP models to OpenCLIP's format and to transformers' CLIP and SigLIP: `export_checkpoint`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPConfig, CLIPProcessor, SiglipConfig

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.hub.atomic_files import check_target, new_folder
from modeling_mlip.hub.extras import install_hint

from . import tables
from .checkpoint_sources import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS
from .checkpoints import check_finite, compare_strictly, empty_model, fill_model
from .open_clip_configurations import open_clip_of_mlip_config, towers
from .parity import Report, clip_oracle, open_clip_oracle, siglip_oracle
from .processors import (
    UNKNOWN_TOKENIZER,
    check_open_clip_tokens,
    preprocess_cfg_of,
    surplus_tokens,
    text_cfg_of,
)
from .siglip_processors import siglip_processor_of
from .transformers_configurations import clip_of_mlip_config, siglip_of_mlip_config

FORMATS = ("open_clip", "clip", "siglip", "both")
Format = Literal["open_clip", "clip", "siglip", "both"]


@dataclass
class Exported:
    """A model in another format: `config` and `state` as in the files of that format."""

    format: str
    config: dict[str, Any]
    state: dict[str, Tensor]
    report: Report | None


def export_checkpoint(
    model: MLIPModel,
    processor: CLIPProcessor,
    target: str | Path,
    format: Format = "open_clip",
    *,
    drop_frequency: bool = False,
    overwrite: bool = False,
) -> list[str]:
    """Writes a folder that OpenCLIP, or transformers' CLIPModel or SiglipModel, loads without this package.

    Args:
        target: a folder that does not exist, or with `overwrite` a model folder, which is replaced.
        format: "open_clip" for `create_model_and_transforms("local-dir:...")`, "clip" for `CLIPModel.from_pretrained`,
            "siglip" for `SiglipModel.from_pretrained`, or "both" in one folder: OpenCLIP and the class of transformers
            that has the towers.
        drop_frequency: leaves out a frequency stage that the model uses, although this changes its embeddings.

    Returns:
        Notes about everything that the other format does not contain.

    Raises:
        OSError: if `target` exists or cannot be written.
        ValueError: if the format cannot compute the model or its token ids, a weight is not finite, or the frequency
            stage is in use (its gate or `frequency_embed_weight` is not zero) without `drop_frequency`.
    """
    check_target(target, overwrite)
    exported, notes = export(model, processor, format, drop_frequency)
    with new_folder(target, overwrite) as folder:
        write_exported(exported, processor, model.config, folder)
    return notes


def export(
    model: MLIPModel, processor: CLIPProcessor, format: str, drop_frequency: bool = False
) -> tuple[list[Exported], list[str]]:
    """Translates to one or both formats and compares the results, without writing anything.

    Raises:
        ValueError: as `export_checkpoint`.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown; choose one of {', '.join(map(repr, FORMATS))}.")
    transformers_format = "siglip" if model.config.vision_config.pooling == "attention" else "clip"
    formats = ("open_clip", transformers_format) if format == "both" else (format,)
    _check_vocabulary(model, processor)
    check_finite(model.state_dict(), "the model")
    state, notes = _clip_state(model, drop_frequency)
    plain = _without_frequency(model)
    exported = []
    if "open_clip" in formats:
        exported.append(_to_open_clip(plain, state, processor, notes))
    if "clip" in formats:
        config = clip_of_mlip_config(model.config)
        oracle = clip_oracle(config, state)
        exported.append(
            Exported("clip", config, tables.from_mlip(state, tables.CLIP), compare_strictly(plain, oracle, "clip"))
        )
    if "siglip" in formats:
        exported.append(_to_siglip(plain, state, notes))
    return exported, notes


def _check_vocabulary(model: MLIPModel, processor: CLIPProcessor) -> None:
    vocab_size = towers(model.config)[1].vocab_size
    if surplus_tokens(processor.tokenizer, vocab_size):
        raise ValueError(
            f"the tokenizer has {len(processor.tokenizer)} tokens, the model only {vocab_size}: give the tokenizer of "
            "this model, or resize its token embeddings."
        )


def _to_open_clip(model: MLIPModel, state: dict[str, Tensor], processor: CLIPProcessor, notes: list[str]) -> Exported:
    """OpenCLIP's format; adds to `notes`."""
    model_cfg = open_clip_of_mlip_config(model.config)
    open_clip_state = tables.from_mlip(state, tables.open_clip_table(model.config))
    oracle = open_clip_oracle(model_cfg, open_clip_state)
    if model_cfg.get("custom_text"):
        open_clip_state = tables.with_text_prefix(open_clip_state)
    model_cfg["text_cfg"] |= text_cfg_of(processor.tokenizer)
    if not check_open_clip_tokens(processor.tokenizer, model_cfg):
        notes.append(f"token ids were not compared: {install_hint('openclip')}")
    if model_cfg["text_cfg"].get("hf_tokenizer_name") == UNKNOWN_TOKENIZER:
        notes.append(
            "OpenCLIP loads the tokenizer from this folder with local-dir:. For hf-hub:, set hf_tokenizer_name in "
            f"{OPEN_CLIP_CONFIG} to the Hub id of the repository"
        )
    return Exported("open_clip", model_cfg, open_clip_state, compare_strictly(model, oracle, "open_clip"))


def _to_siglip(model: MLIPModel, state: dict[str, Tensor], notes: list[str]) -> Exported:
    """transformers' SigLIP; adds to `notes`."""
    config = siglip_of_mlip_config(model.config)
    if "logit_bias" not in state:
        state = {**state, "logit_bias": torch.zeros_like(state["logit_scale"])}
        notes.append("logit_bias is 0, because the model was trained with InfoNCE")
    siglip_state = tables.from_mlip(state, tables.SIGLIP)
    report = compare_strictly(model, siglip_oracle(config, siglip_state), "siglip")
    return Exported("siglip", config, siglip_state, report)


def _clip_state(model: MLIPModel, drop_frequency: bool) -> tuple[dict[str, Tensor], list[str]]:
    """The parameters that CLIP has too, and notes about what is left out."""
    state = model.state_dict()
    own_names = [name for name in state if tables.is_own(name)]
    notes = []
    stage = model.vision_model.frequency
    if stage is not None and (stage.gate.any() or model.config.frequency_embed_weight):
        in_use = "the frequency stage, which is in use (gate or frequency_embed_weight), so that embeddings change"
        if not drop_frequency:
            raise ValueError(f"the other format cannot contain {in_use}: set drop_frequency=True to leave it out.")
        notes.append(f"left out: {in_use}")
    if own_names:
        modules = dict.fromkeys(name.removeprefix("vision_model.").split(".")[0] for name in own_names)
        notes.append(f"not in the other format, left out: {', '.join(modules)}")
    if model.config.merge_ratio > 0:
        notes.append(f"merging (merge_ratio={model.config.merge_ratio}) is off there: all tokens are kept")
    return {name: tensor for name, tensor in state.items() if not tables.is_own(name)}, notes


def _without_frequency(model: MLIPModel) -> MLIPModel:
    """The model without the frequency stage, on the same tensors. The export must equal it."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not tables.is_own(name)}
    config = model.config.to_dict()
    config["vision_config"] |= {"frequency_layers": 0, "frequency_embed_weight": 0.0}
    return fill_model(empty_model(MLIPConfig.from_dict(config)), state)


def write_exported(exported: list[Exported], processor: CLIPProcessor, config: MLIPConfig, folder: Path) -> None:
    """Writes the files of one or two formats. Their names differ, so one folder can contain two."""
    for item in exported:
        if item.format == "open_clip":
            content = {
                "model_cfg": item.config,
                "preprocess_cfg": preprocess_cfg_of(processor.image_processor, towers(config)[0].image_size),
            }
            (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            save_file(item.state, folder / OPEN_CLIP_WEIGHTS[0], metadata={"format": "pt"})
        else:
            kind, name = {"clip": (CLIPConfig, "CLIPModel"), "siglip": (SiglipConfig, "SiglipModel")}[item.format]
            dtype = next(iter(item.state.values())).dtype
            kind(**item.config, architectures=[name], dtype=dtype).save_pretrained(folder)
            save_file(item.state, folder / "model.safetensors", metadata={"format": "pt"})
    if any(item.format == "siglip" for item in exported):
        siglip_processor_of(processor).save_pretrained(folder)
    else:
        processor.save_pretrained(folder)
