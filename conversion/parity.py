# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Parity: the original and the MLIP model side by side, in float32, on the same random images and token ids.

The original shares its tensors with the converted model, and half precision is widened one operation at a time, so that
both together take the memory of one.
"""

import importlib.util
import itertools
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from modeling_mlip import MLIPConfig, MLIPModel

from .open_clip_configurations import highest_id, towers

TOLERANCE = 1e-4
# Layers are reported in this many groups for each tower.
GROUPS = 4


@dataclass
class Report:
    """Largest absolute differences in float32, by group, with the largest magnitude that the original has there."""

    oracle: str
    rows: list[tuple[str, float, float]] = field(default_factory=list)

    @property
    def worst(self) -> float:
        """The largest difference, of hidden states in units of their magnitude where that is above 1."""
        return max(
            difference if name in OUTPUTS else difference / max(1.0, magnitude)
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


# Keys of model_cfg that say how OpenCLIP holds and returns things.
NOT_MATHEMATICS = ("custom_text", "output_dict", "cast_dtype")
OUTPUTS = ("image embeddings", "text embeddings", "logits")


def open_clip_oracle(model_cfg: dict[str, Any], state: dict[str, Tensor]) -> "Oracle | None":
    """OpenCLIP's model on these tensors, or `None` where open_clip is not installed."""
    if importlib.util.find_spec("open_clip") is None:
        return None
    import open_clip

    with torch.device("meta"):
        model = open_clip.CLIP(**{key: value for key, value in model_cfg.items() if key not in NOT_MATHEMATICS})
    state = {**state, "logit_scale": state["logit_scale"].reshape(model.logit_scale.shape)}
    model.load_state_dict(state, assign=True)
    if model.attn_mask is not None:
        model.attn_mask = torch.full(model.attn_mask.shape, float("-inf")).triu_(1)

    def outputs(images: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        image, text, scale = model(images, ids)
        return image, text, scale * image @ text.T

    layers = model.visual.transformer.resblocks, model.transformer.resblocks
    return Oracle(f"open_clip {open_clip.__version__}", model, *layers, outputs)


def clip_oracle(config: dict[str, Any], state: dict[str, Tensor]) -> "Oracle":
    """transformers' CLIPModel on these tensors."""
    with torch.device("meta"):
        model = transformers.CLIPModel(transformers.CLIPConfig(**config))
    model.load_state_dict(state, assign=True)
    for embeddings in (model.text_model.embeddings, model.vision_model.embeddings):
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[1])[None]

    def outputs(images: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
        output = model(input_ids=ids, pixel_values=images)
        return output.image_embeds, output.text_embeds, output.logits_per_image

    layers = model.vision_model.encoder.layers, model.text_model.encoder.layers
    return Oracle(f"transformers {transformers.__version__}", model, *layers, outputs)


@dataclass
class Oracle:
    name: str
    model: nn.Module
    vision_layers: nn.ModuleList
    text_layers: nn.ModuleList
    outputs: Callable[[Tensor, Tensor], tuple[Tensor, ...]]  # (images, ids) -> OUTPUTS: (B, P), (T, P), (B, T)


HALF = (torch.float16, torch.bfloat16)


class InFloat32(TorchFunctionMode):
    """Computes in float32 on parameters that stay in half precision: widens the operands of each operation."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func.__name__ == "__get__":  # an attribute; widening a tensor to read its shape would be a waste
            return _widened(func(*args))
        args, kwargs = tree_map(_widened, (args, kwargs or {}))
        return func(*args, **kwargs)


def _widened(value: Any) -> Any:
    if isinstance(value, Tensor) and value.dtype in HALF:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in HALF else value


@torch.no_grad()
def compare(model: MLIPModel, oracle: Oracle, seed: int = 0) -> Report:
    """Run both on two random images and three random captions; compare every layer, the embeddings and the logits."""
    images, ids = random_inputs(model.config, seed)
    merge_ratio = model.config.merge_ratio
    model.eval().set_merge_ratio(0.0)
    oracle.model.eval()
    with InFloat32() if model.dtype in HALF else nullcontext():
        with _recorded(oracle.vision_layers, oracle.text_layers) as theirs:
            their_outputs = oracle.outputs(images, ids)
        with _recorded(model.vision_model.encoder.layers, model.text_model.encoder.layers) as ours:
            output = model(input_ids=ids, pixel_values=images)
    model.set_merge_ratio(merge_ratio)

    report = Report(oracle.name)
    for tower, our_states, their_states in zip(("vision", "text"), ours, theirs, strict=True):
        for first, last in _groups(len(their_states)):
            pairs = list(zip(our_states[first : last + 1], their_states[first : last + 1], strict=True))
            difference = max(_difference(a, b) for a, b in pairs)
            report.rows.append(
                (f"{tower} layers {first}-{last}", difference, max(b.abs().max().item() for _, b in pairs))
            )
    our_outputs = (output.image_embeds, output.text_embeds, output.logits_per_image)
    for name, a, b in zip(OUTPUTS, our_outputs, their_outputs, strict=True):
        report.rows.append((name, _difference(a, b), b.abs().max().item()))
    return report


def random_inputs(config: MLIPConfig, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images `(2, 3, S, S)` as normalised pixels are spread, and ids `(3, L)`: captions of three lengths, padded."""
    generator = torch.Generator().manual_seed(seed)
    vision, text = towers(config)
    images = torch.randn(2, 3, vision.image_size, vision.image_size, generator=generator)
    length, pad = text.max_position_embeddings, text.pad_token_id or 0
    eos = text.eos_token_id if text.pooling == "eos" else pad
    # As in captions: nothing is above an EOS that is found as the highest id, and the first EOS is the end.
    top = eos if eos == highest_id(text.vocab_size) else text.vocab_size
    ids = torch.randint(1, top, (3, length), generator=generator)
    ids[ids == eos] = 3 if eos != 3 else 4
    for row, end in enumerate((length - 1, length // 2, min(3, length - 1))):
        ids[row, end] = eos
        ids[row, end + 1 :] = pad
    return images, ids


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def _groups(num_layers: int) -> list[tuple[int, int]]:
    bounds = sorted({num_layers * part // GROUPS for part in range(GROUPS + 1)})
    return [(first, after - 1) for first, after in itertools.pairwise(bounds)]


@contextmanager
def _recorded(*towers: nn.ModuleList):
    """Yields a list of hidden states for each tower, filled as its layers run."""
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
