# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Conversion of CLIP and OpenCLIP checkpoints to MLIP and back: `convert_checkpoint` and `export_checkpoint`.

The way of the data: `sources` reads -> `configs` and `tables` translate -> the model takes the tensors as they are ->
`parity` compares with the original -> a folder is written aside and renamed.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPProcessor

from modeling_mlip import MLIPConfig, MLIPModel, MLIPVisionConfig

from . import tables
from .open_clip_configurations import clip_of_mlip_config, open_clip_of_mlip_config, towers
from .parity import TOLERANCE, Oracle, Report, clip_oracle, compare, open_clip_oracle
from .processors import preprocess_cfg_of, processor_of_open_clip, text_cfg_of
from .sources import OPEN_CLIP_CONFIG, OPEN_CLIP_WEIGHTS, Source, read_source

REPORT_FILE = "conversion_report.json"
MODEL_FILES = ("config.json", OPEN_CLIP_CONFIG)
Format = Literal["open_clip", "clip", "both"]


@dataclass
class Conversion:
    """A converted model and what there is to say about it; `report` is `None` if no original could run beside it."""

    model: MLIPModel
    processor: CLIPProcessor
    report: Report | None
    source: Source
    notes: list[str] = field(default_factory=list)


def convert_checkpoint(
    source: str | Path, *, model: str | None = None, **config_overrides
) -> tuple[MLIPModel, CLIPProcessor]:
    """Make an MLIP model of a CLIP or OpenCLIP checkpoint, exactly: at `merge_ratio=0` its embeddings are the source's.

    Args:
        source: an OpenCLIP or CLIP folder, a checkpoint file, or a Hub id; see `sources.read_source`.
        model: the OpenCLIP name or JSON config of a checkpoint file without one.
        config_overrides: keys of `MLIPConfig` and `MLIPVisionConfig`, for example `merge_ratio=0.5`.

    Returns:
        The model in the source's floating-point type, its tensors mapped from the source's file, and the processor.

    Raises:
        ValueError, OSError: in one line, if the source is damaged, not supported, or does not come out equal.
    """
    conversion = convert(source, model, config_overrides)
    return conversion.model, conversion.processor


def convert(source: str | Path, model: str | None = None, overrides: dict[str, Any] | None = None) -> Conversion:
    """`convert_checkpoint`, with the parity report and notes."""
    read = read_source(source, model)
    config = _overridden(read.config, overrides or {})
    if read.kind == "mlip":
        mlip = _empty(config)
        shapes = {name: tensor.shape for name, tensor in mlip.state_dict().items()}
        mlip = _take(mlip, tables.to_mlip(read.state, tables.same_names(shapes), shapes))
        return Conversion(mlip, _saved_processor(read.folder), None, read, read.notes)

    table = tables.CLIP if read.kind == "clip" else tables.OPEN_CLIP
    if read.kind == "clip":
        processor = _saved_processor(read.folder)
    else:
        processor = processor_of_open_clip(
            read.model_cfg, read.preprocess_cfg, towers(config)[0].image_size, read.folder
        )
        _take_special_ids(config, processor.tokenizer)
        if read.preprocess_cfg.get("resize_mode") == "longest":
            read.notes.append(
                "resize_mode longest: CLIPImageProcessor rounds the shorter side down, OpenCLIP to nearest"
            )
    mlip = _empty(config)
    shapes = {name: tensor.shape for name, tensor in mlip.state_dict().items() if not tables.is_own(name)}
    mlip = _take(mlip, tables.to_mlip(read.state, table, shapes))
    report = _parity(mlip, read)
    if report is None:
        read.notes.append("parity was not checked: install open_clip_torch, and the original runs beside the result")
    return Conversion(mlip, processor, report, read, read.notes)


def _saved_processor(folder: Path) -> CLIPProcessor:
    try:
        return CLIPProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError) as error:
        raise OSError(
            f"{folder} has no processor that loads ({str(error).splitlines()[0]}): put the tokenizer's files and "
            "preprocessor_config.json beside the weights."
        ) from None


def _overridden(config: dict[str, Any], overrides: dict[str, Any]) -> MLIPConfig:
    top, vision = ({field.name for field in fields(kind)} for kind in (MLIPConfig, MLIPVisionConfig))
    config = {**config, "vision_config": dict(config["vision_config"])}
    for key, value in overrides.items():
        if key in vision and key not in top:
            config["vision_config"][key] = value
        elif key in top and key not in ("vision_config", "text_config"):
            config[key] = value
        else:
            raise ValueError(f"{key}={value!r} is no key of MLIPConfig or MLIPVisionConfig.")
    try:
        return MLIPConfig(**config)
    except StrictDataclassError as error:
        raise ValueError(str(error.__cause__ or error)) from None


def _take_special_ids(config: MLIPConfig, tokenizer) -> None:
    """BOS and padding as the tokenizer has them, and EOS where pooling does not hang on it."""
    _, text = towers(config)
    text.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else text.pad_token_id
    bos = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    text.bos_token_id = bos
    if text.pooling == "last":
        text.eos_token_id = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    elif tokenizer.eos_token_id is not None and tokenizer.eos_token_id != text.eos_token_id:
        raise ValueError(
            f"the model pools at the token id {text.eos_token_id}, but its tokenizer ends texts with "
            f"{tokenizer.eos_token_id}: config and tokenizer belong to different models."
        )


# Models from tensors


def _empty(config: MLIPConfig) -> MLIPModel:
    with torch.device("meta"):
        return MLIPModel(config)


@torch.no_grad()
def _take(model: MLIPModel, state: dict[str, Tensor]) -> MLIPModel:
    """Give a model on the meta device these tensors as they are, and start what it has beyond them."""
    dtype = next(iter(state.values())).dtype
    missing, unknown = model.load_state_dict(state, strict=False, assign=True)
    if unknown or (missing and not all(tables.is_own(name) for name in missing)):
        raise ValueError(f"config and weights contradict each other at {[*unknown, *missing][0]}.")
    for parameter in (*model.parameters(), *model.buffers()):
        vars(parameter)["_is_hf_initialized"] = not parameter.is_meta  # what initialize_weights leaves alone
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


def _parity(model: MLIPModel, read: Source) -> Report | None:
    if read.kind == "open_clip":
        return _checked(model, open_clip_oracle(read.model_cfg, read.state), read.name)
    state = {key: tensor for key, tensor in read.state.items() if key not in tables.BUFFERS}
    return _checked(model, clip_oracle(CLIPConfig.from_pretrained(read.folder).to_dict(), state), read.name)


def _checked(model: MLIPModel, oracle: Oracle | None, name: str) -> Report | None:
    if oracle is None:
        return None
    report = compare(model, oracle)
    if not report.passed:
        raise ValueError(f"{name} did not come out equal (allowed {TOLERANCE:.0e}); nothing is written.\n{report}")
    return report


# The other way


@dataclass
class Exported:
    """Weights and configs of another format; `config` and `preprocess_cfg` as its files have them."""

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
    """Write a folder that OpenCLIP, or transformers' CLIPModel, loads without this package.

    Args:
        target: a folder that does not exist, or with `overwrite` a model folder, which is replaced as a whole.
        format: "open_clip" for `create_model_and_transforms("local-dir:...")`, "clip" for `CLIPModel.from_pretrained`,
            or "both" in one folder.
        drop_frequency: leave out a frequency stage that the model uses, although this changes its embeddings.

    Returns:
        Notes: what the other format does not hold.

    Raises:
        ValueError, OSError: if the format cannot compute the model, the frequency stage is in use (its gate or
            `frequency_embed_weight` is not zero) without `drop_frequency`, or `target` is in the way.
    """
    check_target(target, overwrite)
    exported, notes = export(model, processor, format, drop_frequency)
    with new_folder(target, overwrite) as folder:
        write_exported(exported, processor, model.config, folder)
    return notes


def export(
    model: MLIPModel, processor: CLIPProcessor, format: str, drop_frequency: bool = False
) -> tuple[list[Exported], list[str]]:
    """Translate to one or both formats and compare with the original there, without writing anything."""
    if format not in ("open_clip", "clip", "both"):
        raise ValueError(f"format={format!r} is unknown; choose 'open_clip', 'clip' or 'both'.")
    state, notes = _without_own(model, drop_frequency)
    plain = _without_frequency(model)
    exported = []
    if format in ("open_clip", "both"):
        model_cfg = open_clip_of_mlip_config(model.config)
        theirs = tables.from_mlip(state, tables.OPEN_CLIP)
        oracle = open_clip_oracle(model_cfg, theirs)
        model_cfg["text_cfg"] |= text_cfg_of(processor.tokenizer)
        exported.append(Exported("open_clip", model_cfg, theirs, _checked(plain, oracle, "open_clip")))
    if format in ("clip", "both"):
        config = clip_of_mlip_config(model.config)
        oracle = clip_oracle(config, state)
        exported.append(Exported("clip", config, tables.from_mlip(state, tables.CLIP), _checked(plain, oracle, "clip")))
    return exported, notes


def _without_own(model: MLIPModel, drop_frequency: bool) -> tuple[dict[str, Tensor], list[str]]:
    everything = model.state_dict()
    own = [name for name in everything if tables.is_own(name)]
    notes = []
    stage = model.vision_model.frequency
    if stage is not None and (stage.gate.any() or model.config.frequency_embed_weight):
        lost = "the frequency stage, which is in use (gate or frequency_embed_weight), so that embeddings change"
        if not drop_frequency:
            raise ValueError(f"the other format cannot hold {lost}: give --drop-frequency to leave it out.")
        notes.append(f"left out: {lost}")
    if own:
        parts = dict.fromkeys(name.removeprefix("vision_model.").split(".")[0] for name in own)
        notes.append(f"not in the other format, left out: {', '.join(parts)}")
    if model.config.merge_ratio > 0:
        notes.append(f"merging (merge_ratio={model.config.merge_ratio}) is off there: all tokens are kept")
    return {name: tensor for name, tensor in everything.items() if not tables.is_own(name)}, notes


def _without_frequency(model: MLIPModel) -> MLIPModel:
    """The same tensors without the frequency stage: what the export has to equal."""
    state = {name: tensor for name, tensor in model.state_dict().items() if not tables.is_own(name)}
    config = model.config.to_dict()
    config["vision_config"] |= {"frequency_layers": 0}
    return _take(_empty(MLIPConfig.from_dict(config)), state)


# Writing


def check_target(target: str | Path, overwrite: bool) -> None:
    """Raises:
    OSError: if `target` is in the way: it exists without `overwrite`, or is no model folder that could be replaced.
    """
    target = Path(target)
    if not target.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{target} exists: choose another folder, or give --overwrite to replace it.")
    if not target.is_dir() or (any(target.iterdir()) and not any((target / name).is_file() for name in MODEL_FILES)):
        raise FileExistsError(
            f"{target} exists and is not a model folder, so it is not overwritten: choose another one."
        )


@contextmanager
def new_folder(target: str | Path, overwrite: bool) -> Iterator[Path]:
    """Yields a folder beside `target`, which becomes `target` at the end, or vanishes if anything goes wrong."""
    target = Path(target).absolute()
    target.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield aside
        aside.chmod(0o755)
        check_target(target, overwrite)  # once more: somebody may have been faster
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent)) / target.name
            target.rename(old)
            try:
                aside.rename(target)
            except OSError:
                old.rename(target)
                raise
            finally:
                shutil.rmtree(old.parent, ignore_errors=True)
        else:
            aside.rename(target)
    except OSError as error:
        if isinstance(error, FileExistsError):
            raise
        raise OSError(f"{target} could not be written ({error}); nothing is left behind.") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_mlip(conversion: Conversion, folder: Path) -> None:
    """Weights, config, code files, processor, report and model card."""
    conversion.model.save_pretrained(folder)
    conversion.processor.save_pretrained(folder)
    write_reports({"mlip": conversion.report}, conversion.notes, conversion.source.name, folder)


def write_exported(exported: list[Exported], processor: CLIPProcessor, config: MLIPConfig, folder: Path) -> None:
    """The files of one or both formats; each has its own names, so that one folder can serve both."""
    for part in exported:
        if part.format == "open_clip":
            content = {
                "model_cfg": part.config,
                "preprocess_cfg": preprocess_cfg_of(processor.image_processor, towers(config)[0].image_size),
            }
            (folder / OPEN_CLIP_CONFIG).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            save_file(part.state, folder / OPEN_CLIP_WEIGHTS[0], metadata={"format": "pt"})
        else:
            clip = CLIPConfig(**part.config, architectures=["CLIPModel"], dtype=next(iter(part.state.values())).dtype)
            clip.save_pretrained(folder)
            save_file(part.state, folder / "model.safetensors", metadata={"format": "pt"})
    processor.save_pretrained(folder)


CARD = """---
library_name: transformers
tags: [mlip, clip]
---
# {title}

Converted by `mlip convert` from `{source}`.

{notes}

{parity}
"""


def write_reports(reports: dict[str, Report | None], notes: list[str], source: str, folder: Path) -> None:
    """The parity report as JSON, and quoted in the model card."""
    found = {name: report and report.to_dict() for name, report in reports.items()}
    content = {"source": source, "notes": notes, "parity": found}
    (folder / REPORT_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    texts = [f"```\n{report}\n```" if report else "Parity was not checked." for report in reports.values()]
    listed = "\n".join(f"- {note}" for note in notes)
    card = CARD.format(title=Path(source).name, source=source, notes=listed, parity="\n\n".join(texts))
    (folder / "README.md").write_text(card, encoding="utf-8")
