# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Name tables between the parameters of other formats and MLIP's, and the two functions that apply them.

A row is `theirs: ours`. `{}` stands for the layer number. Several names on the right: the tensor is split in as many
parts along its first axis (OpenCLIP keeps query, key and value in one matrix). State dict in, state dict out; tensors
are views wherever the memory layout allows it.

Sources: the parameter names of `open_clip.model.CLIP` and `CustomTextCLIP` (open_clip 3.3; the prefix `text.` of the
latter is removed on reading and added on writing), of `timm.models.VisionTransformer` (timm 1.0), and of
`transformers.CLIPModel` and `SiglipModel` (transformers 5).
"""

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from tqdm import tqdm

from modeling_mlip import MLIPConfig

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


def _linear(theirs: str, ours: str | tuple[str, ...]) -> dict[str, str | tuple[str, ...]]:
    """The rows of a Linear, a LayerNorm or a convolution: weight and bias."""
    if isinstance(ours, str):
        return {f"{theirs}.{kind}": f"{ours}.{kind}" for kind in ("weight", "bias")}
    return {f"{theirs}.{kind}": tuple(f"{name}.{kind}" for name in ours) for kind in ("weight", "bias")}


LOGITS: Table = {"logit_scale": "logit_scale", "logit_bias": "logit_bias"}
OPEN_CLIP_VISION: Table = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    **_block("visual.transformer.resblocks.{}", "vision_model.encoder.layers.{}"),
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "visual.proj": "visual_projection.weight",
}
_HEAD = "vision_model.head"
# timm's ViT with attention pooling (SigLIP), in OpenCLIP's TimmModel.
TIMM_SIGLIP_VISION: Table = {
    **_linear("visual.trunk.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
    "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
    **_linear("visual.trunk.blocks.{}.norm1", "vision_model.encoder.layers.{}.layer_norm1"),
    **_linear("visual.trunk.blocks.{}.norm2", "vision_model.encoder.layers.{}.layer_norm2"),
    **_linear(
        "visual.trunk.blocks.{}.attn.qkv",
        tuple(f"vision_model.encoder.layers.{{}}.self_attn.{part}_proj" for part in "qkv"),
    ),
    **_linear("visual.trunk.blocks.{}.attn.proj", "vision_model.encoder.layers.{}.self_attn.out_proj"),
    **_linear("visual.trunk.blocks.{}.mlp.fc1", "vision_model.encoder.layers.{}.mlp.fc1"),
    **_linear("visual.trunk.blocks.{}.mlp.fc2", "vision_model.encoder.layers.{}.mlp.fc2"),
    **_linear("visual.trunk.norm", "vision_model.post_layernorm"),
    "visual.trunk.attn_pool.latent": f"{_HEAD}.probe",
    **_linear("visual.trunk.attn_pool.q", f"{_HEAD}.q_proj"),
    **_linear("visual.trunk.attn_pool.kv", (f"{_HEAD}.k_proj", f"{_HEAD}.v_proj")),
    **_linear("visual.trunk.attn_pool.proj", f"{_HEAD}.out_proj"),
    **_linear("visual.trunk.attn_pool.norm", f"{_HEAD}.layernorm"),
    **_linear("visual.trunk.attn_pool.mlp.fc1", f"{_HEAD}.mlp.fc1"),
    **_linear("visual.trunk.attn_pool.mlp.fc2", f"{_HEAD}.mlp.fc2"),
}
OPEN_CLIP_TEXT: Table = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    **_block("transformer.resblocks.{}", "text_model.encoder.layers.{}"),
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
# OpenCLIP's projection of the text tower: a matrix, or a Linear if it has a bias.
MATRIX_PROJECTION: Table = {"text_projection": "text_projection.weight"}
OPEN_CLIP: Table = {**LOGITS, **OPEN_CLIP_VISION, **OPEN_CLIP_TEXT, **MATRIX_PROJECTION}
# OpenCLIP multiplies by these from the right, a Linear by its transpose.
TRANSPOSED = {"visual.proj", "text_projection"}
# timm's position embeddings have a first axis of length 1.
UNSQUEEZED = {"visual.trunk.pos_embed"}
# OpenCLIP stores these as scalars or with one element, transformers' SiglipModel with one element.
SCALARS = {"logit_scale", "logit_bias"}

# MLIP uses the names of transformers' CLIP, which has no LayerScale and no bias of the logits.
CLIP: Table = {
    name: name
    for row in OPEN_CLIP.values()
    for name in ((row,) if isinstance(row, str) else row)
    if "layer_scale" not in name and name != "logit_bias"
}

# transformers' SigLIP has other names for the pooling head and the text projection.
SIGLIP: Table = {
    **{
        name: name
        for name in CLIP
        if not any(part in name for part in ("class_embedding", "pre_layrnorm", "projection"))
    },
    "logit_bias": "logit_bias",
    "vision_model.embeddings.patch_embedding.bias": "vision_model.embeddings.patch_embedding.bias",
    "vision_model.head.probe": f"{_HEAD}.probe",
    **{
        f"vision_model.head.attention.in_proj_{kind}": tuple(f"{_HEAD}.{part}_proj.{kind}" for part in "qkv")
        for kind in ("weight", "bias")
    },
    **_linear("vision_model.head.attention.out_proj", f"{_HEAD}.out_proj"),
    **_linear("vision_model.head.layernorm", f"{_HEAD}.layernorm"),
    **_linear("vision_model.head.mlp.fc1", f"{_HEAD}.mlp.fc1"),
    **_linear("vision_model.head.mlp.fc2", f"{_HEAD}.mlp.fc2"),
    **_linear("text_model.head", "text_projection"),
}


def open_clip_table(config: MLIPConfig) -> Table:
    """OpenCLIP's names for the towers of a configuration."""
    vision = TIMM_SIGLIP_VISION if config.vision_config.pooling == "attention" else OPEN_CLIP_VISION
    has_bias = config.text_config.text_projection_bias
    projection = _linear("text_projection", "text_projection") if has_bias else MATRIX_PROJECTION
    return {**LOGITS, **vision, **OPEN_CLIP_TEXT, **projection}


def with_text_prefix(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's names of `CLIP` to those of `CustomTextCLIP`, whose text tower is a module of its own."""
    outside = ("visual.", *SCALARS)
    return {key if key.startswith(outside) else f"text.{key}": tensor for key, tensor in state.items()}


# Parameters that MLIP adds to CLIP: a conversion initialises them, and only an MLIP folder contains them.
OWN = (
    "vision_model.frequency.",
    "frequency_projection.",
    "token_visual_projection.",
    "token_text_projection.",
    "token_frequency_projection.",
    "frequency_logit_scale",
    "frequency_logit_bias",
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
        table: `CLIP`, `SIGLIP` or one of `open_clip_table`.
        shapes: names and shapes of MLIP's parameters for the configuration, without those that MLIP adds.

    Raises:
        ValueError: naming the key, if it is unknown, missing, or has another shape than the configuration needs.
    """
    state = {key: tensor for key, tensor in state.items() if key not in BUFFERS}
    ours: dict[str, Tensor] = {}
    for key, tensor in tqdm(state.items(), desc="renaming", unit=" tensors", disable=None, leave=False):
        names = _lookup(key, table)
        tensor = tensor.reshape(()) if key in SCALARS and tensor.numel() == 1 else tensor
        tensor = tensor.squeeze(0) if key in UNSQUEEZED else tensor
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
        tensor = tensor.reshape(1) if key in SCALARS and table is SIGLIP else tensor
        tensor = tensor[None] if key in UNSQUEEZED else tensor
        theirs[key] = tensor.t().contiguous() if key in TRANSPOSED else tensor
    return theirs


def _split_layer(name: str) -> tuple[str, str]:
    found = re.search(r"\.(\d+)\.", name)
    return (name, "") if found is None else (name.replace(found[0], ".{}.", 1), found[1])


def _lookup(key: str, table: Table) -> tuple[str, ...]:
    pattern, layer = _split_layer(key)
    if pattern not in table:
        raise ValueError(f"{key} is not a parameter of a tower that MLIP converts: MLIP has no place for it.")
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
