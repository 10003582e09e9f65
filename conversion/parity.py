# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Parity: runs the original model and the MLIP model on the same inputs in float32 and compares all results.

The original shares its tensors with the converted model, and half precision is widened one operation at a time. So both
models together take the memory of one.
"""

import functools
import importlib.util
import itertools
import json
import math
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from modeling_mlip import MLIPConfig, MLIPModel

from . import tables
from .hugging_face_towers import ENCODERS
from .open_clip_configurations import highest_id, needs_text_module, towers

TOLERANCE = 1e-4
# Number of groups of layers that the report has for each tower.
GROUPS = 4
# Captions that go through the text towers at a time.
TEXT_BATCH = 16
OUTPUTS = ("image embeddings", "text embeddings", "logits")
ALL_LENGTHS = "text, all lengths"


@dataclass
class Report:
    """Largest absolute differences in float32, by group.

    Args:
        oracle: name and version of the original.
        rows: `(group, largest difference, largest magnitude of the original)`.
    """

    oracle: str
    rows: list[tuple[str, float, float]] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest difference; NaN if any difference is not finite or an output was not compared.

        Differences of hidden states are divided by their magnitude where that is above 1.
        """
        if not {*OUTPUTS, ALL_LENGTHS} <= {name for name, _, _ in self.rows}:
            return math.nan
        return largest(
            difference if name in (*OUTPUTS, ALL_LENGTHS) else difference / max(1.0, magnitude)
            for name, difference, magnitude in self.rows
        )

    @property
    def passed(self) -> bool:
        return self.worst <= TOLERANCE  # False for NaN

    def differences(self) -> dict[str, float]:
        return {name: difference for name, difference, _ in self.rows}

    def to_dict(self) -> dict[str, Any]:
        rows = [{"group": name, "max_difference": diff, "max_magnitude": size} for name, diff, size in self.rows]
        return {
            "oracle": self.oracle,
            "tolerance": TOLERANCE,
            "passed": self.passed,
            "worst": self.worst,
            "groups": rows,
        }

    def __str__(self) -> str:
        lines = [f"Parity with {self.oracle} (float32)", f"  {'group':<24}{'max |difference|':>18}{'max |value|':>14}"]
        lines += [f"  {name:<24}{difference:>18.2e}{magnitude:>14.2e}" for name, difference, magnitude in self.rows]
        verdict = "passed" if self.passed else "FAILED"
        return "\n".join([*lines, f"  {verdict}: worst {self.worst:.1e}, allowed {TOLERANCE:.0e}"])


def largest(values: Iterable[float]) -> float:
    """The largest value; NaN if there is none or if one is not finite. Python's `max` drops a NaN behind a number."""
    values = list(values)
    return max(values) if values and all(map(math.isfinite, values)) else math.nan


@dataclass
class Oracle:
    """An original model.

    Args:
        name: library and version.
        outputs: `(images, ids)` -> `OUTPUTS`, shapes `(B, P)`, `(T, P)`, `(B, T)`.
        encode_text: ids `(T, L)` -> normalised embeddings `(T, P)`.
        pools_at_highest_id: whether the text tower pools at the highest id of a text, so that no id is above EOS.
    """

    name: str
    model: nn.Module
    vision_layers: nn.ModuleList
    text_layers: nn.ModuleList
    outputs: Callable[[Tensor, Tensor], tuple[Tensor, ...]]
    encode_text: Callable[[Tensor], Tensor]
    pools_at_highest_id: bool


# Keys of model_cfg about how OpenCLIP stores parameters and returns outputs.
NOT_MATHEMATICS = ("custom_text", "output_dict", "cast_dtype", "multimodal_cfg")


def open_clip_oracle(model_cfg: dict[str, Any], state: dict[str, Tensor]) -> Oracle | None:
    """OpenCLIP's model on these tensors, or `None` where open_clip is not installed.

    Args:
        state: names without the prefix `text.`.
    """
    if importlib.util.find_spec("open_clip") is None:
        return None
    import open_clip

    model = open_clip_model_on_meta(model_cfg)
    has_text_module = isinstance(model, open_clip.CustomTextCLIP)
    has_timm_tower = "timm_model_name" in model_cfg["vision_cfg"]
    state = tables.with_text_prefix(state) if has_text_module else state
    state |= {key: state[key].reshape(model.logit_scale.shape) for key in tables.SCALARS & set(state)}
    model.load_state_dict(state, assign=True)
    if has_timm_tower:
        _fill_timm_buffers(model.visual.trunk)
    text_model = model.text if has_text_module else model
    is_hugging_face = bool(model_cfg["text_cfg"].get("hf_model_name"))
    if is_hugging_face:
        _fill_buffers(text_model.transformer)
    elif text_model.attn_mask is not None:
        text_model.attn_mask = torch.full(text_model.attn_mask.shape, float("-inf")).triu_(1)

    def outputs(images: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        image, text, scale, *bias = model(images, ids)
        logits = scale * image @ text.T
        return image, text, logits + bias[0] if bias else logits

    image_layers = model.visual.trunk.blocks if has_timm_tower else model.visual.transformer.resblocks
    layers = image_layers, text_layers(text_model.transformer)
    reads_all_ids = is_hugging_face or bool(model_cfg["text_cfg"].get("embed_cls"))
    pools_at_highest_id = not reads_all_ids and model_cfg["text_cfg"].get("pool_type", "argmax") == "argmax"
    encode_text = functools.partial(model.encode_text, normalize=True)
    name = f"open_clip {open_clip.__version__}"
    return Oracle(name, model, *layers, outputs, encode_text, pools_at_highest_id)


def open_clip_model_on_meta(model_cfg: dict[str, Any]) -> Any:
    """OpenCLIP's model without memory and without CoCa's decoder. The configuration of a Hugging Face text tower is
    not fetched."""
    import open_clip

    keys = {key: value for key, value in model_cfg.items() if key not in NOT_MATHEMATICS}
    for tower in ("vision_cfg", "text_cfg"):
        keys[tower] = {key: value for key, value in model_cfg[tower].items() if key != "output_tokens"}
    with tempfile.TemporaryDirectory() as folder, torch.device("meta"):
        if name := model_cfg["text_cfg"].get("hf_model_name"):
            (Path(folder) / "config.json").write_text(json.dumps(ENCODERS[name]))
            keys["text_cfg"] |= {"hf_model_name": folder, "hf_model_pretrained": False}
        return open_clip.CustomTextCLIP(**keys) if needs_text_module(model_cfg) else open_clip.CLIP(**keys)


def text_layers(encoder: Any) -> nn.ModuleList:
    """The layers of a text transformer of OpenCLIP, MLIP, or transformers (RoBERTa, the encoder of M2M-100)."""
    for name in ("resblocks", "layers"):
        if hasattr(encoder, name):
            return getattr(encoder, name)
    return encoder.encoder.layer


def _fill_timm_buffers(tower: nn.Module) -> None:
    """Computes the buffers that timm does not save, for a tower that was made on the meta device."""
    module: Any
    for module in tower.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                setattr(module, name, torch.empty_like(buffer, device="cpu"))
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()


def _fill_buffers(encoder: Any) -> None:
    """Computes the buffers that transformers does not save, for an encoder that was made on the meta device."""
    if hasattr(encoder, "embed_positions"):
        positions = encoder.embed_positions
        del positions.weights
        positions.make_weights(
            positions.num_positions + positions.offset, positions.embedding_dim, positions.padding_idx
        )
    else:
        embeddings = encoder.embeddings
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[1])[None]
        embeddings.token_type_ids = torch.zeros_like(embeddings.position_ids)


def clip_oracle(config: dict[str, Any], state: dict[str, Tensor]) -> Oracle:
    """transformers' CLIPModel on these tensors."""
    clip_config = transformers.CLIPConfig(**config)
    pools_at_highest_id = clip_config.text_config.eos_token_id == 2
    return _transformers_oracle(transformers.CLIPModel, clip_config, state, pools_at_highest_id)


def siglip_oracle(config: dict[str, Any], state: dict[str, Tensor]) -> Oracle:
    """transformers' SiglipModel on these tensors."""
    return _transformers_oracle(transformers.SiglipModel, transformers.SiglipConfig(**config), state)


def _transformers_oracle(
    model_class: Any, config: transformers.PreTrainedConfig, state: dict[str, Tensor], pools_at_highest_id: bool = False
) -> Oracle:
    with torch.device("meta"):
        model = model_class(config)
    model.load_state_dict(state, assign=True)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[1])[None]

    def outputs(images: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        output = model(input_ids=ids, pixel_values=images)
        return output.image_embeds, output.text_embeds, output.logits_per_image

    layers = model.vision_model.encoder.layers, model.text_model.encoder.layers
    name = f"transformers {transformers.__version__}"
    return Oracle(name, model, *layers, outputs, functools.partial(_encode_text, model), pools_at_highest_id)


def _encode_text(model: Any, ids: Tensor) -> Tensor:
    """Normalised text embeddings `(T, P)` of an MLIP model, or a CLIP or SigLIP model of transformers."""
    return nn.functional.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)


HALF = (torch.float16, torch.bfloat16)


class InFloat32(TorchFunctionMode):
    """Computes in float32 with parameters in half precision, by widening the operands of each operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ == "__get__":  # reading an attribute needs no widened tensor
            return _widened(func(*args))
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in HALF:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


@torch.no_grad()
def compare(model: MLIPModel, oracle: Oracle, seed: int = 0) -> Report:
    """Compares the models at `merge_ratio=0`.

    Two random images and three random captions give every layer, the embeddings and the logits. Captions of every
    length with every class of token id (`captions_of_all_lengths`) give the text embeddings.
    """
    images, ids = random_inputs(model.config, seed)
    all_ids = captions_of_all_lengths(model.config, oracle.pools_at_highest_id, seed)
    merge_ratio = model.config.merge_ratio
    model.eval().set_merge_ratio(0.0)
    oracle.model.eval()
    with InFloat32() if model.dtype in HALF else nullcontext():
        with _recorded(oracle.vision_layers, oracle.text_layers) as theirs:
            their_outputs = oracle.outputs(images, ids)
        with _recorded(model.vision_model.encoder.layers, text_layers(model.text_model.encoder)) as ours:
            output = model(input_ids=ids, pixel_values=images)
        our_texts = torch.cat([_encode_text(model, batch) for batch in all_ids.split(TEXT_BATCH)])
        their_texts = torch.cat([oracle.encode_text(batch) for batch in all_ids.split(TEXT_BATCH)])
    model.set_merge_ratio(merge_ratio)

    report = Report(oracle.name)
    for tower, our_states, their_states in zip(("vision", "text"), ours, theirs, strict=True):
        for first, last in _groups(len(their_states)):
            pairs = list(zip(our_states[first : last + 1], their_states[first : last + 1], strict=True))
            difference = largest(_difference(a, b) for a, b in pairs)
            magnitude = largest(b.abs().max().item() for _, b in pairs)
            report.rows.append((f"{tower} layers {first}-{last}", difference, magnitude))
    our_outputs = (output.image_embeds, output.text_embeds, output.logits_per_image, our_texts)
    names = (*OUTPUTS, ALL_LENGTHS)
    for name, a, b in zip(names, our_outputs, (*their_outputs, their_texts), strict=True):
        report.rows.append((name, _difference(a, b), b.abs().max().item()))
    return report


def random_inputs(config: MLIPConfig, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images `(2, 3, S, S)` distributed as normalised pixels, and ids `(3, L)`: captions of three lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    vision, text = towers(config)
    images = torch.randn(2, 3, vision.image_size, vision.image_size, generator=generator)
    length, pad = text.max_position_embeddings, text.pad_token_id or 0
    eos = pad if text.pooling == "last" else text.eos_token_id
    # As in captions: no id is above an EOS that is found as the highest id, and the first EOS is the end.
    top = eos if eos == highest_id(text.vocab_size) else text.vocab_size
    ids = torch.randint(1, top, (3, length), generator=generator)
    ids[ids == eos] = 3 if eos != 3 else 4
    for row, end in enumerate((length - 1, length // 2, min(3, length - 1))):
        ids[row, end] = eos
        ids[row, end + 1 :] = pad
    return images, ids


def captions_of_all_lengths(config: MLIPConfig, pools_at_highest_id: bool, seed: int = 0) -> Tensor:
    """Token ids `(L, L)`: row n has EOS at position n, and every class of id occurs at many positions.

    The classes are the first ids, BOS, PAD, the ids next to EOS, added tokens (above EOS) and the last id.

    Args:
        pools_at_highest_id: leaves out ids above EOS, which a model that pools at the highest id cannot hold.
    """
    generator = torch.Generator().manual_seed(seed)
    _, text = towers(config)
    length, pad = text.max_position_embeddings, text.pad_token_id or 0
    eos = pad if text.pooling == "last" else text.eos_token_id
    top = eos if pools_at_highest_id and text.pooling == "eos" else text.vocab_size
    bos = text.bos_token_id if text.bos_token_id is not None else 0
    special = [0, 1, 2, 3, bos, pad, eos - 1, eos + 1, (eos + top) // 2, top - 2, top - 1]
    special = sorted({number for number in special if 0 <= number < top and number != eos})
    ids = torch.randint(0, top, (length, length), generator=generator)
    ids[ids == eos] = special[-1]
    for row in range(length):
        for column in range(row % 2, length, 2):  # every second token is special
            ids[row, column] = special[(row // 2 + column // 2) % len(special)]
        ids[row, row] = eos
        if row % 3 or text.pooling == "last":
            ids[row, row + 1 :] = pad  # other rows keep ids after EOS, which change the embedding only of a mean
    return ids


def _difference(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference; NaN if the shapes differ or a value is not finite."""
    if ours.shape != theirs.shape or not ours.numel():
        return math.nan
    return (ours - theirs).abs().max().item()  # torch's max keeps NaN


def _groups(num_layers: int) -> list[tuple[int, int]]:
    bounds = sorted({num_layers * part // GROUPS for part in range(GROUPS + 1)})
    return [(first, after - 1) for first, after in itertools.pairwise(bounds)]


@contextmanager
def _recorded(*towers: nn.ModuleList):
    """Yields a list for each tower. Each layer that runs appends its hidden states."""
    states: tuple[list[Tensor], ...] = tuple([] for _ in towers)

    def recorder(tower: list[Tensor]):
        return lambda module, inputs, output: tower.append(output[0] if isinstance(output, tuple) else output)

    handles = [
        layer.register_forward_hook(recorder(tower))
        for tower, layers in zip(states, towers, strict=True)
        for layer in layers
    ]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()
