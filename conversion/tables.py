# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Name tables between the parameters of other formats and MLIP's, and the two functions that apply them.

A row is `theirs: ours`. `{}` stands for the layer number. Three names on the right: the tensor is split in three along
its first axis (OpenCLIP keeps query, key and value in one matrix). State dict in, state dict out; tensors are views
wherever the memory layout allows it.

Sources: the parameter names of `open_clip.model.CLIP` (open_clip 3.3) and `transformers.CLIPModel` (transformers 5).
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

Table = Mapping[str, str | tuple[str, ...]]


def _block(theirs: str, ours: str) -> dict[str, str | tuple[str, ...]]:
    rows: dict[str, str | tuple[str, ...]] = {
        f"{theirs}.ls_1.gamma": f"{ours}.layer_scale1",
        f"{theirs}.ls_2.gamma": f"{ours}.layer_scale2",
    }
    for kind in ("weight", "bias"):
        rows |= {
            f"{theirs}.ln_1.{kind}": f"{ours}.layer_norm1.{kind}",
            f"{theirs}.ln_2.{kind}": f"{ours}.layer_norm2.{kind}",
            f"{theirs}.attn.in_proj_{kind}": tuple(f"{ours}.self_attn.{part}_proj.{kind}" for part in "qkv"),
            f"{theirs}.attn.out_proj.{kind}": f"{ours}.self_attn.out_proj.{kind}",
            f"{theirs}.mlp.c_fc.{kind}": f"{ours}.mlp.fc1.{kind}",
            f"{theirs}.mlp.c_proj.{kind}": f"{ours}.mlp.fc2.{kind}",
        }
    return rows


OPEN_CLIP: Table = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    **_block("visual.transformer.resblocks.{}", "vision_model.encoder.layers.{}"),
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    **_block("transformer.resblocks.{}", "text_model.encoder.layers.{}"),
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "text_projection": "text_projection.weight",
}
# OpenCLIP multiplies by these from the right, a Linear by its transpose.
TRANSPOSED = {"visual.proj", "text_projection"}

# MLIP uses the names of transformers' CLIP, which has no LayerScale.
CLIP: Table = {
    name: name
    for row in OPEN_CLIP.values()
    for name in ((row,) if isinstance(row, str) else row)
    if "layer_scale" not in name
}

# Parameters that MLIP adds to CLIP: a conversion initialises them, and only an MLIP folder contains them.
OWN = (
    "vision_model.frequency.",
    "frequency_projection.",
    "token_visual_projection.",
    "token_text_projection.",
    "token_frequency_projection.",
    "frequency_logit_scale",
    "token_logit_scale",
)

# Buffers in older files: position ids or a causal mask, which the model builds itself.
BUFFERS = {
    "attn_mask",
    "text_model.embeddings.position_ids",
    "vision_model.embeddings.position_ids",
}


def is_own(name: str) -> bool:
    """Whether a parameter exists only in MLIP."""
    return name.startswith(OWN)


def same_names(names: Iterable[str]) -> Table:
    """The table of a format with MLIP's names, for a state dict of MLIP."""
    return {pattern: pattern for pattern, _ in map(_split_layer, names)}


def to_mlip(state: Mapping[str, Tensor], table: Table, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Renames, splits and transposes a state dict of another format into one of MLIP.

    Args:
        state: their names and tensors.
        table: `OPEN_CLIP` or `CLIP`.
        shapes: names and shapes of MLIP's parameters for the configuration, without those that MLIP adds.

    Raises:
        ValueError: naming the key, if it is unknown, missing, or has another shape than the configuration needs.
    """
    state = {key: tensor for key, tensor in state.items() if key not in BUFFERS}
    ours: dict[str, Tensor] = {}
    for key, tensor in tqdm(state.items(), desc="renaming", unit=" tensors", disable=None, leave=False):
        names = _lookup(key, table)
        tensor = tensor.reshape(()) if key == "logit_scale" and tensor.numel() == 1 else tensor
        tensor = tensor.t().contiguous() if key in TRANSPOSED and tensor.ndim == 2 else tensor
        if tensor.shape[:1].numel() % len(names):
            raise ValueError(f"{key} has shape {list(tensor.shape)}, which does not split in {len(names)}.")
        ours.update(zip(names, tensor.chunk(len(names)) if len(names) > 1 else (tensor,), strict=True))

    their_name = _inverse_names(table, shapes)
    if unknown := [name for name in ours if name not in shapes]:
        raise ValueError(
            f"the config has no place for {_listed(their_name(name) for name in unknown)}: "
            "config and weights belong to different models."
        )
    if missing := [name for name in shapes if name not in ours]:
        raise ValueError(
            f"the config asks for {_listed(their_name(name) for name in missing)}, which the weights lack: "
            "config and weights belong to different models, or the file is incomplete."
        )
    for name, tensor in ours.items():
        if tensor.shape != shapes[name]:
            raise ValueError(
                f"{their_name(name)} is {list(tensor.shape)} in the weights, but the config asks for "
                f"{list(shapes[name])} ({name}): give the config that belongs to these weights."
            )
    return ours


def from_mlip(state: Mapping[str, Tensor], table: Table) -> dict[str, Tensor]:
    """The exact inverse of `to_mlip`. `state` must not contain parameters that MLIP adds.

    Raises:
        ValueError: naming the key, if the other format has no name for a key.
    """
    theirs: dict[str, Tensor] = {}
    rows = {names if isinstance(names, tuple) else (names,): key for key, names in table.items()}
    known = {name: (names, key) for names, key in rows.items() for name in names}
    for name, tensor in state.items():
        pattern, layer = _split_layer(name)
        if pattern not in known:
            raise ValueError(f"{name} has no place in the other format.")
        names, key = known[pattern]
        if pattern != names[0]:
            continue  # the second and third name of a row, handled with the first
        if len(names) > 1:
            tensor = torch.cat([state[part.format(layer)] for part in names])
        key = key.format(layer)
        theirs[key] = tensor.t().contiguous() if key in TRANSPOSED and table is OPEN_CLIP else tensor
    return theirs


def _split_layer(name: str) -> tuple[str, str]:
    found = re.search(r"\.(\d+)\.", name)
    return (name, "") if found is None else (name.replace(found[0], ".{}.", 1), found[1])


def _lookup(key: str, table: Table) -> tuple[str, ...]:
    pattern, layer = _split_layer(key)
    if pattern not in table:
        raise ValueError(f"{key} is not a parameter of a plain CLIP ViT: MLIP has no place for it.")
    names = table[pattern]
    return tuple(name.format(layer) for name in ((names,) if isinstance(names, str) else names))


def _inverse_names(table: Table, shapes: Iterable[str]):
    inverse = {name: key for key, names in table.items() for name in ((names,) if isinstance(names, str) else names)}

    def their_name(name: str) -> str:
        pattern, layer = _split_layer(name)
        return inverse.get(pattern, name).format(layer)

    return their_name


def _listed(names: Iterable[str], limit: int = 3) -> str:
    names = list(dict.fromkeys(names))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
