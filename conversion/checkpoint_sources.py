# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Recognises the format of a checkpoint and reads it without running code in it.

The configuration is read first, so that unsupported models are refused before any weight is read. Weights are mapped
from the file (`mmap`) and not copied, so reading needs little memory.
"""

import json
import pickle
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPConfig, SiglipConfig

from . import tables
from .open_clip_configurations import (
    SUPPORTED,
    mlip_config_of_open_clip,
    model_cfg_of_name,
    model_cfg_of_shapes,
    read_model_cfg,
    towers,
)
from .transformers_configurations import mlip_config_of_clip, mlip_config_of_siglip

OPEN_CLIP_CONFIG = "open_clip_config.json"
OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "open_clip_pytorch_model.pth",
)
TRANSFORMERS_KINDS = ("clip", "siglip", "mlip")
TRANSFORMERS_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")

# Keys under which training scripts store the weights, and prefixes that wrappers add to each name.
NESTED = ("state_dict", "model_state_dict", "ema_state_dict", "state_dict_ema", "model_ema", "ema", "model")
WRAPPERS = ("module.", "_orig_mod.", "ema_model.", "ema.", "model.")
BOOKKEEPING = {"n_averaged", "initted", "step"}
# Numbers that OpenAI's files store beside the weights.
OPENAI_EXTRAS = {"input_resolution", "context_length", "vocab_size"}


@dataclass
class Source:
    """A checkpoint: `config` has the keys of MLIPConfig, `state` the tensors by their names in the checkpoint."""

    name: str
    kind: str  # "open_clip" | "clip" | "siglip" | "mlip"
    config: dict[str, Any]
    state: dict[str, Tensor]
    model_cfg: dict[str, Any] = field(default_factory=dict)  # OpenCLIP's
    preprocess_cfg: dict[str, Any] = field(default_factory=dict)  # OpenCLIP's
    folder: Path = field(default_factory=Path)  # may contain processor and tokenizer files
    notes: list[str] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.state.values())


def read_source(source: str | Path, model: str | None = None) -> Source:
    """Reads a folder, a file or a Hub id.

    Args:
        source: an OpenCLIP folder or Hub id, a checkpoint file of open_clip or OpenAI, a CLIP or SigLIP folder or Hub
            id of transformers, or an MLIP folder.
        model: for a file without a config: a name of OpenCLIP, a JSON file, or "openai" for OpenAI's own models.

    Raises:
        ImportError: if `model` is a name and open_clip is not installed.
        OSError: if a file is missing or cannot be fetched.
        ValueError: if the checkpoint is damaged, contains code, or is not supported.
    """
    path = Path(str(source).removeprefix("local-dir:")).expanduser()
    if path.is_file():
        return _read_file(path, model)
    if not path.is_dir():
        path = _download(str(source).removeprefix("hf-hub:"))
    name = str(source)
    open_clip_weights = _find(path, OPEN_CLIP_WEIGHTS)
    config = _read_json(path / "config.json") if (path / "config.json").is_file() else {}
    kind = config.get("model_type")
    if (path / OPEN_CLIP_CONFIG).is_file() and (open_clip_weights or kind not in TRANSFORMERS_KINDS):
        return _read_open_clip(path, name, open_clip_weights or _only_checkpoint(path), model)
    if kind in TRANSFORMERS_KINDS:
        weights = _find(path, TRANSFORMERS_WEIGHTS)
        if weights is None:
            raise FileNotFoundError(f"{name} has no weights: expected {' or '.join(TRANSFORMERS_WEIGHTS)}.")
        readers = {"clip": _read_clip, "siglip": _read_siglip, "mlip": _read_mlip}
        return readers[kind](path, name, weights)
    if kind == "siglip2":
        raise ValueError(
            f"{name} is a SigLIP 2 with images of any shape (NaFlex, model_type 'siglip2'), which is not supported; "
            "supported are the SigLIP 2 checkpoints with a fixed resolution, whose model_type is 'siglip'."
        )
    if kind is not None:
        raise ValueError(f"{name} is a model of the type {kind!r}, which is not supported; {SUPPORTED}.")
    return _read_file(_only_checkpoint(path), model)


def _read_open_clip(folder: Path, name: str, weights: Path, model: str | None) -> Source:
    content = read_model_cfg(folder / OPEN_CLIP_CONFIG)
    model_cfg = model_cfg_of_name(model) if model else content["model_cfg"]
    config = mlip_config_of_open_clip(model_cfg)
    state, notes = _open_clip_state(read_weights(weights))
    return Source(name, "open_clip", config, state, model_cfg, content.get("preprocess_cfg") or {}, folder, notes)


def _read_file(path: Path, model: str | None) -> Source:
    beside = path.parent / OPEN_CLIP_CONFIG
    content: dict[str, Any] = {}
    if model and model != "openai":
        content = (
            {"model_cfg": model_cfg_of_name(model)} if not model.endswith(".json") else read_model_cfg(Path(model))
        )
    elif not model and beside.is_file():
        content = read_model_cfg(beside)
    if content:
        mlip_config_of_open_clip(content["model_cfg"])  # refuse before reading weights
    weights = read_weights(path)
    openai = model == "openai" or (not content and _is_openai(weights))
    state, notes = _open_clip_state(weights)
    if openai:
        content = {"model_cfg": model_cfg_of_shapes(state)}
        notes.append("read as OpenAI's CLIP: the architecture from the shapes, QuickGELU")
    if not content:
        raise ValueError(
            f"{path} has no config beside it: give model=NAME, a name of OpenCLIP (ViT-B-32), a JSON configuration, "
            "or openai for a model of OpenAI; weights alone do not tell GELU from QuickGELU."
        )
    config = mlip_config_of_open_clip(content["model_cfg"])
    preprocess_cfg = content.get("preprocess_cfg") or {}
    return Source(str(path), "open_clip", config, state, content["model_cfg"], preprocess_cfg, path.parent, notes)


def _read_clip(folder: Path, name: str, weights: Path) -> Source:
    clip = CLIPConfig.from_pretrained(folder)
    config, notes = mlip_config_of_clip(clip), []
    eos = config["text_config"]["eos_token_id"]
    if towers(clip)[1].eos_token_id != eos:
        notes.append(f"eos_token_id 2 (an old config) read as the highest id, {eos}")
    state, more = _uniform(_tensors(_unwrapped(read_weights(weights))))
    return Source(name, "clip", config, state, folder=folder, notes=notes + more)


def _read_siglip(folder: Path, name: str, weights: Path) -> Source:
    config = mlip_config_of_siglip(SiglipConfig.from_pretrained(folder))
    state, notes = _uniform(_tensors(_unwrapped(read_weights(weights))))
    return Source(name, "siglip", config, state, folder=folder, notes=notes)


def _read_mlip(folder: Path, name: str, weights: Path) -> Source:
    config = {key: value for key, value in _read_json(folder / "config.json").items() if key != "auto_map"}
    return Source(name, "mlip", config, read_weights(weights), folder=folder)


# Reading files


def read_weights(path: Path) -> dict[str, Any]:
    """Tensors of a file, or of all shards of an index, mapped into memory. Code in the file is not run.

    Raises:
        ValueError: if the file is truncated, is not a checkpoint, or is a pickle with code.
    """
    if path.name.endswith(".index.json"):
        return _read_shards(path)
    with path.open("rb") as file:
        if file.read(40).startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a pointer of Git LFS, not the weights: fetch them with `git lfs pull`.")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                return {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ValueError(f"{path} is truncated or is not safetensors ({error}): fetch it again.") from None
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"PK"  # files of torch < 1.6 are not, and cannot be mapped
        weights = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        wants = re.search(r"GLOBAL (\S+)|Unsupported (?:global|class|operand)[^\n]*?([\w.]+)", str(error))
        what = f" ({wants[1] or wants[2]})" if wants else ""
        raise ValueError(
            f"{path} is not a plain checkpoint of tensors: it is damaged, or a pickle with code{what}, which is "
            "not run. Save its state dict alone, as safetensors."
        ) from None
    except (RuntimeError, EOFError, ValueError, KeyError, AttributeError) as error:
        if "TorchScript" in str(error):
            raise ValueError(
                f"{path} is a TorchScript archive, which is code: save its state dict "
                f"(torch.jit.load(...).state_dict()) and convert that with model=openai."
            ) from None
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} is truncated or is not a checkpoint ({reason}): fetch it again.") from None
    if isinstance(weights, dict):
        return weights
    raise ValueError(f"{path} holds a {type(weights).__name__}, not a state dict.")


def _read_shards(index: Path) -> dict[str, Any]:
    weight_map: dict[str, str] = _read_json(index).get("weight_map", {})
    weights: dict[str, Any] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard or not (index.parent / shard).is_file():
            raise FileNotFoundError(f"{index} names the shard {shard}, which is not beside it: fetch it again.")
        weights.update(read_weights(index.parent / shard))
    if absent := [key for key in weight_map if key not in weights]:
        raise ValueError(f"{index} lists {absent[0]}, but {weight_map[absent[0]]} does not contain it: fetch it again.")
    return weights


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again.") from None
    if isinstance(content, dict):
        return content
    raise ValueError(f"{path} holds a {type(content).__name__}, not keys and values.")


def _find(folder: Path, names: tuple[str, ...]) -> Path | None:
    files = (folder / (name + end) for name in names for end in ("", ".index.json"))
    return next((file for file in files if file.is_file()), None)


def _only_checkpoint(folder: Path) -> Path:
    if found := _find(folder, TRANSFORMERS_WEIGHTS):
        return found
    files = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(files) != 1:
        listed = ", ".join(file.name for file in files) or "none"
        raise ValueError(f"{folder} has neither a config nor exactly one checkpoint (found: {listed}): name the file.")
    return files[0]


def _download(repo: str) -> Path:
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo):
        raise FileNotFoundError(f"{repo} is neither a file, nor a folder, nor a Hub id of the form owner/name.")
    try:
        files = HfApi().list_repo_files(repo)
        wanted = (*OPEN_CLIP_WEIGHTS, *TRANSFORMERS_WEIGHTS) if OPEN_CLIP_CONFIG in files else TRANSFORMERS_WEIGHTS
        weights = next((name for name in wanted if name in files or f"{name}.index.json" in files), None)
        shards = [weights, f"{Path(weights).stem}-*{Path(weights).suffix}"] if weights else []
        return Path(snapshot_download(repo, allow_patterns=["*.json", "*.txt", "*.model", *shards]))
    except (HfHubHTTPError, HFValidationError, OSError, RuntimeError) as error:
        try:
            return Path(snapshot_download(repo, local_files_only=True))
        except (OSError, ValueError):
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise OSError(f"{repo} is not a local path, and could not be fetched from the Hub ({reason}).") from None


# State dicts


def _is_openai(weights: dict[str, Any]) -> bool:
    """Whether a bare state dict is from OpenAI: it contains its resolution, or mixes float16 with float32."""
    if any(key in weights for key in NESTED):
        return False
    dtypes = {value.dtype for value in weights.values() if isinstance(value, Tensor) and value.is_floating_point()}
    return bool(OPENAI_EXTRAS & set(weights)) or dtypes == {torch.float16, torch.float32}


def _open_clip_state(weights: dict[str, Any]) -> tuple[dict[str, Tensor], list[str]]:
    weights = {key: value for key, value in weights.items() if key not in OPENAI_EXTRAS}
    state = _tensors(_unwrapped(weights))
    decoder = [key for key in state if key.startswith(tables.DECODER)]
    state = {key: tensor for key, tensor in state.items() if key not in decoder}
    # CustomTextCLIP keeps the text tower under `text.`, CLIP at the top; see `tables.with_text_prefix`.
    state, notes = _uniform({key.removeprefix("text."): tensor for key, tensor in state.items()})
    return state, [*notes, *(["CoCa's caption decoder was left out"] if decoder else [])]


def _unwrapped(weights: dict[str, Any]) -> dict[str, Any]:
    """The state dict in a training checkpoint, without the prefixes of wrappers."""
    while found := next((key for key in NESTED if isinstance(weights.get(key), dict)), None):
        weights = weights[found]
    weights = {key: value for key, value in weights.items() if key not in BOOKKEEPING}
    averaged = {key: value for key, value in weights.items() if key.startswith("ema_model.")}
    weights = averaged or weights
    while weights and (wrapper := next((w for w in WRAPPERS if all(key.startswith(w) for key in weights)), None)):
        weights = {key.removeprefix(wrapper): value for key, value in weights.items()}
    return {key.replace("._orig_mod.", "."): value for key, value in weights.items()}


def _tensors(weights: dict[str, Any]) -> dict[str, Tensor]:
    others = [key for key, value in weights.items() if not isinstance(value, Tensor)]
    if others:
        kind = type(weights[others[0]]).__name__
        raise ValueError(f"{others[0]} is a {kind}, not a tensor: this is not a state dict of a model.")
    if not weights:
        raise ValueError("the checkpoint holds no tensors.")
    return weights


def _uniform(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Converts mixed floating-point types to float32. OpenAI mixes float16 with float32."""
    dtypes = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(dtypes) < 2:
        return state, []
    floats = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in state.items()}
    return floats, [f"{' and '.join(sorted(map(str, dtypes)))} became float32"]
