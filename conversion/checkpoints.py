# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Conversion of CLIP, SigLIP and OpenCLIP checkpoints to MLIP: `convert_checkpoint`.

`checkpoint_sources` reads a checkpoint, `open_clip_configurations`, `transformers_configurations` and `tables`
translate it, the model takes the tensors without a copy, and `parity` compares it with the original. `export` goes the
other way.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPProcessor, SiglipConfig

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.hub.configurations import override_config
from modeling_mlip.hub.errors import error_line
from modeling_mlip.hub.extras import install_hint, require_modules
from modeling_mlip.hub.formatting import format_names
from modeling_mlip.hub.verification import nonfinite_names

from . import tables
from .checkpoint_sources import Source, read_source
from .open_clip_configurations import towers
from .parity import TOLERANCE, Oracle, Report, clip_oracle, compare, open_clip_oracle, siglip_oracle
from .processors import processor_of_open_clip
from .reports import write_reports
from .siglip_processors import mlip_processor_of_siglip

# For towers that were trained without merging: see benchmarks/training_free_merging.py.
MERGE_METHOD = "ward"


@dataclass
class Conversion:
    """A converted model; `report` is `None` if the original could not run beside it."""

    model: MLIPModel
    processor: CLIPProcessor
    report: Report | None
    source: Source
    notes: list[str] = field(default_factory=list)


def convert_checkpoint(
    source: str | Path, *, model: str | None = None, **config_overrides
) -> tuple[MLIPModel, CLIPProcessor]:
    """Converts a CLIP, SigLIP or OpenCLIP checkpoint to MLIP. At `merge_ratio=0` its embeddings equal the source's.

    Args:
        source: an OpenCLIP, CLIP or SigLIP folder, a checkpoint file or a Hub id; see `checkpoint_sources.read_source`.
        model: the OpenCLIP name or JSON configuration of a checkpoint file without one.
        config_overrides: keys of `MLIPConfig` and `MLIPVisionConfig`, for example `merge_ratio=0.5`.

    Returns:
        The model in the floating-point type of the source, whose tensors are mapped from its file, and the processor.

    Raises:
        ImportError: if `model` is a name and open_clip is not installed.
        OSError: if a file is missing or cannot be read.
        ValueError: if the source is damaged, has values that are not finite, is not supported, or the outputs differ.
    """
    conversion = convert(source, model, config_overrides)
    return conversion.model, conversion.processor


def convert(source: str | Path, model: str | None = None, overrides: dict[str, Any] | None = None) -> Conversion:
    """As `convert_checkpoint`, with the parity report and notes."""
    checkpoint = read_source(source, model)
    check_finite(checkpoint.state, checkpoint.name)
    config = _build_config(checkpoint, overrides or {})
    if checkpoint.kind == "mlip":
        mlip = empty_model(config)
        shapes = {name: tensor.shape for name, tensor in mlip.state_dict().items()}
        mlip = fill_model(mlip, tables.to_mlip(checkpoint.state, tables.same_names(shapes), shapes))
        return Conversion(mlip, _load_processor(checkpoint.folder), None, checkpoint, checkpoint.notes)

    if checkpoint.kind == "clip":
        processor, table = _load_processor(checkpoint.folder), tables.CLIP
    elif checkpoint.kind == "siglip":
        vision, text = towers(config)
        if not (checkpoint.folder / "tokenizer.json").is_file():
            require_modules("the sentencepiece tokenizer of SigLIP", "siglip", "sentencepiece")
        processor, table = _load_processor(checkpoint.folder), tables.SIGLIP
        processor = mlip_processor_of_siglip(processor, vision.image_size, text.max_position_embeddings)
        _set_special_ids(config, processor.tokenizer)
    else:
        table = tables.open_clip_table(config)
        processor = processor_of_open_clip(
            checkpoint.model_cfg, checkpoint.preprocess_cfg, towers(config)[0].image_size, checkpoint.folder
        )
        _set_special_ids(config, processor.tokenizer)
        if checkpoint.preprocess_cfg.get("resize_mode") == "longest":
            checkpoint.notes.append(
                "resize_mode longest: CLIPImageProcessor rounds the shorter side down, OpenCLIP to nearest"
            )
    mlip = empty_model(config)
    shapes = {name: tensor.shape for name, tensor in mlip.state_dict().items() if not tables.is_own(name)}
    mlip = fill_model(mlip, tables.to_mlip(checkpoint.state, table, shapes))
    report = _compare_with_source(mlip, checkpoint)
    if report is None:
        checkpoint.notes.append(f"parity was not checked, which needs open_clip: {install_hint('openclip')}")
    return Conversion(mlip, processor, report, checkpoint, checkpoint.notes)


def write_mlip(conversion: Conversion, folder: Path, name: str | None = None) -> None:
    """Writes weights, configuration, code files, processor, report and model card into a new folder.

    Args:
        name: the name of the model on its card; the name of the folder if not given.
    """
    conversion.model.save_pretrained(folder)
    conversion.processor.save_pretrained(folder)
    reports = {"mlip": conversion.report}
    write_reports(reports, conversion.notes, conversion.source.name, folder, conversion.model.config, name)


def check_finite(state: dict[str, Tensor], name: str) -> None:
    """Raises:
    ValueError: naming the tensors with a NaN or an infinite value.
    """
    if names := nonfinite_names(state):
        raise ValueError(
            f"{name} has NaN or infinite values in {format_names(names)}: take an earlier checkpoint of that training."
        )


def _build_config(checkpoint: Source, overrides: dict[str, Any]) -> MLIPConfig:
    try:
        config = MLIPConfig(**checkpoint.config)
    except StrictDataclassError as error:
        raise ValueError(f"{checkpoint.name}: {error_line(error)}") from error
    if checkpoint.kind != "mlip":  # trained without merging
        overrides = {"merge_method": MERGE_METHOD, **overrides}
    return override_config(config, overrides) if overrides else config


def _load_processor(folder: Path) -> CLIPProcessor:
    try:
        return CLIPProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise OSError(
            f"{folder} has no processor that loads ({str(error).splitlines()[0]}): put the tokenizer's files and "
            "preprocessor_config.json beside the weights."
        ) from error


def _set_special_ids(config: MLIPConfig, tokenizer) -> None:
    """Sets BOS and PAD to those of the tokenizer, and EOS where the model does not pool at it.

    Raises:
        ValueError: if the model pools at another id than the tokenizer's EOS, or an encoder of transformers pads with
            another id.
    """
    _, text = towers(config)
    if text.encoder_config is not None and tokenizer.pad_token_id != text.pad_token_id:
        raise ValueError(
            f"the text tower pads with the token id {text.pad_token_id}, but its tokenizer with "
            f"{tokenizer.pad_token_id}: configuration and tokenizer belong to different models."
        )
    text.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else text.pad_token_id
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    text.bos_token_id = bos
    if text.pooling != "eos":
        text.eos_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    elif tokenizer.eos_token_id is not None and tokenizer.eos_token_id != text.eos_token_id:
        raise ValueError(
            f"the model pools at the token id {text.eos_token_id}, but its tokenizer ends texts with "
            f"{tokenizer.eos_token_id}: configuration and tokenizer belong to different models."
        )


# Models from tensors


def empty_model(config: MLIPConfig) -> MLIPModel:
    """A model on the meta device, whose parameters have shapes and no memory."""
    with torch.device("meta"):
        return MLIPModel(config)


@torch.no_grad()
def fill_model(model: MLIPModel, state: dict[str, Tensor]) -> MLIPModel:
    """Gives a model on the meta device these tensors without a copy, and initialises the parameters that MLIP adds.

    Raises:
        ValueError: if a tensor is unknown, or one that other formats have is missing.
    """
    dtype = next(iter(state.values())).dtype
    missing, unknown = model.load_state_dict(state, strict=False, assign=True)
    if unknown or (missing and not all(tables.is_own(name) for name in missing)):
        raise ValueError(f"configuration and weights do not belong together: {[*unknown, *missing][0]}.")
    for parameter in (*model.parameters(), *model.buffers()):
        vars(parameter)["_is_hf_initialized"] = not parameter.is_meta  # initialize_weights skips these
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.empty(parameter.shape, dtype=dtype)))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
        vars(module)["_is_hf_initialized"] = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same source gives the same files
        model.initialize_weights()
    if any(name.startswith("token_visual_projection") for name in missing):
        model.start_tokens_from_projections()
    model.config.dtype = dtype
    return model.eval()


# Parity


def _compare_with_source(model: MLIPModel, checkpoint: Source) -> Report | None:
    state = {key: tensor for key, tensor in checkpoint.state.items() if key not in tables.BUFFERS}
    if checkpoint.kind == "open_clip":
        return compare_strictly(model, open_clip_oracle(checkpoint.model_cfg, state), checkpoint.name)
    if checkpoint.kind == "siglip":
        oracle = siglip_oracle(SiglipConfig.from_pretrained(checkpoint.folder).to_dict(), state)
    else:
        oracle = clip_oracle(CLIPConfig.from_pretrained(checkpoint.folder).to_dict(), state)
    return compare_strictly(model, oracle, checkpoint.name)


def compare_strictly(model: MLIPModel, oracle: Oracle | None, name: str) -> Report | None:
    """The parity report; `None` without an original.

    Raises:
        ValueError: if the outputs differ by more than `TOLERANCE`.
    """
    if oracle is None:
        return None
    report = compare(model, oracle)
    if not report.passed:
        raise ValueError(
            f"{name}: the converted model gives other outputs (allowed {TOLERANCE:.0e}); nothing is written.\n{report}"
        )
    return report
