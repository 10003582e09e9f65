# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Name tables between the parameters of other formats and MLIP's, and the two functions that apply them.

A row is `theirs: ours`. `{}` stands for the layer number. Several names on the right: the tensor is split in as many
parts along its first axis (OpenCLIP keeps query, key and value in one matrix). State dict in, state dict out; tensors
are views wherever the memory layout allows it.

Sources: the parameter names of `open_clip.model.CLIP` and `CustomTextCLIP` (open_clip 3.3; the prefix `text.` of the
latter is removed on reading and added on writing), of timm's `VisionTransformer` and `Eva` (timm 1.0), and of
`transformers.CLIPModel` and `SiglipModel` (transformers 5).
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from modeling_mlip import MLIPConfig, MLIPTextConfig, MLIPVisionConfig

from .open_clip_configurations import SUPPORTED
from .timm_towers import is_timm_tower

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
_TIMM_BLOCK, _LAYER = "visual.trunk.blocks.{}", "vision_model.encoder.layers.{}"
_QKV = tuple(f"{_LAYER}.self_attn.{part}_proj" for part in "qkv")
# timm's ViT and Eva in OpenCLIP's TimmModel, but for queries, keys and values.
_STEM = "vision_model.embeddings.patch_embedding"
TIMM_VISION: Table = {
    "visual.trunk.cls_token": "vision_model.embeddings.class_embedding",
    **_linear("visual.trunk.patch_embed.proj", "vision_model.embeddings.patch_embedding"),
    **{
        f"visual.trunk.patch_embed.backbone.{{}}.{theirs}.{kind}": f"{_STEM}.{{}}.{ours}.{kind}"
        for theirs, ours, kinds in (
            ("conv", "conv", ("weight", "bias")),
            ("bn", "norm", ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        )
        for kind in kinds
    },
    "visual.trunk.pos_embed": "vision_model.embeddings.position_embedding.weight",
    **_linear("visual.trunk.norm_pre", "vision_model.pre_layrnorm"),
    **_linear(f"{_TIMM_BLOCK}.norm1", f"{_LAYER}.layer_norm1"),
    **_linear(f"{_TIMM_BLOCK}.norm2", f"{_LAYER}.layer_norm2"),
    **_linear(f"{_TIMM_BLOCK}.attn.norm", f"{_LAYER}.self_attn.layer_norm"),
    **_linear(f"{_TIMM_BLOCK}.attn.proj", f"{_LAYER}.self_attn.out_proj"),
    **_linear(f"{_TIMM_BLOCK}.mlp.fc2", f"{_LAYER}.mlp.fc2"),
    **_linear(f"{_TIMM_BLOCK}.mlp.norm", f"{_LAYER}.mlp.layer_norm"),
    **_linear("visual.trunk.norm", "vision_model.post_layernorm"),
    "visual.trunk.attn_pool.latent": f"{_HEAD}.probe",
    **_linear("visual.trunk.attn_pool.q", f"{_HEAD}.q_proj"),
    **_linear("visual.trunk.attn_pool.kv", (f"{_HEAD}.k_proj", f"{_HEAD}.v_proj")),
    **_linear("visual.trunk.attn_pool.proj", f"{_HEAD}.out_proj"),
    **_linear("visual.trunk.attn_pool.norm", f"{_HEAD}.layernorm"),
    **_linear("visual.trunk.attn_pool.mlp.fc1", f"{_HEAD}.mlp.fc1"),
    **_linear("visual.trunk.attn_pool.mlp.fc2", f"{_HEAD}.mlp.fc2"),
    **_linear("visual.trunk.head", "visual_projection"),
}
# Queries, keys and values in one Linear, with one bias (SigLIP, Perception Encoder).
TIMM_JOINT_QKV: Table = _linear(f"{_TIMM_BLOCK}.attn.qkv", _QKV)
# In one Linear, with separate biases and none of the keys (EVA).
TIMM_JOINT_WEIGHT: Table = {
    f"{_TIMM_BLOCK}.attn.qkv.weight": tuple(f"{name}.weight" for name in _QKV),
    f"{_TIMM_BLOCK}.attn.q_bias": f"{_QKV[0]}.bias",
    f"{_TIMM_BLOCK}.attn.v_bias": f"{_QKV[2]}.bias",
}
# In one Linear each (EVA-02).
TIMM_SEPARATE_QKV: Table = {
    name: ours
    for part, ours_part in zip("qkv", _QKV, strict=True)
    for name, ours in _linear(f"{_TIMM_BLOCK}.attn.{part}_proj", ours_part).items()
}
TIMM_MLP: Table = _linear(f"{_TIMM_BLOCK}.mlp.fc1", f"{_LAYER}.mlp.fc1")
TIMM_GATED_MLP: Table = {
    **_linear(f"{_TIMM_BLOCK}.mlp.fc1_g", f"{_LAYER}.mlp.gate_proj"),
    **_linear(f"{_TIMM_BLOCK}.mlp.fc1_x", f"{_LAYER}.mlp.fc1"),
}
OPEN_CLIP_TEXT: Table = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    **_block("transformer.resblocks.{}", "text_model.encoder.layers.{}"),
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_POOL = "visual.attn_pool"
# CoCa's pooling. OpenCLIP keeps the weights of query, key and value in one matrix if all inputs have the same width.
COCA_POOL: Table = {
    f"{_POOL}.query": f"{_HEAD}.query",
    **_linear(f"{_POOL}.ln_q", f"{_HEAD}.layernorm_query"),
    **_linear(f"{_POOL}.ln_k", f"{_HEAD}.layernorm"),
    **{f"{_POOL}.attn.{part}_proj_weight": f"{_HEAD}.{part}_proj.weight" for part in "qkv"},
    f"{_POOL}.attn.in_proj_bias": tuple(f"{_HEAD}.{part}_proj.bias" for part in "qkv"),
    **_linear(f"{_POOL}.attn.out_proj", f"{_HEAD}.out_proj"),
}
JOINED_COCA_POOL: Table = {
    **{name: ours for name, ours in COCA_POOL.items() if not name.endswith("_proj_weight")},
    f"{_POOL}.attn.in_proj_weight": tuple(f"{_HEAD}.{part}_proj.weight" for part in "qkv"),
}
COCA_TEXT: Table = {"cls_emb": "text_model.embeddings.class_embedding"}
# Prefix of the decoder that CoCa generates captions with.
DECODER = "text_decoder."
_ENCODER = "text_model.encoder"
# RoBERTa and XLM-RoBERTa of transformers, in OpenCLIP's HFTextEncoder.
ROBERTA_TEXT: Table = {
    **{
        f"transformer.embeddings.{name}.weight": f"{_ENCODER}.embeddings.{name}.weight"
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
    },
    **_linear("transformer.embeddings.LayerNorm", f"{_ENCODER}.embeddings.LayerNorm"),
    **{
        theirs: ours
        for name in (
            *(f"attention.self.{part}" for part in ("query", "key", "value")),
            "attention.output.dense",
            "attention.output.LayerNorm",
            "intermediate.dense",
            "output.dense",
            "output.LayerNorm",
        )
        for theirs, ours in _linear(
            f"transformer.encoder.layer.{{}}.{name}", f"{_ENCODER}.encoder.layer.{{}}.{name}"
        ).items()
    },
}
# The encoder of M2M-100 (NLLB) of transformers, in OpenCLIP's HFTextEncoder.
M2M_100_TEXT: Table = {
    "transformer.embed_tokens.weight": f"{_ENCODER}.embed_tokens.weight",
    **{
        theirs: ours
        for name in (
            *(f"self_attn.{part}_proj" for part in ("k", "v", "q", "out")),
            "self_attn_layer_norm",
            "fc1",
            "fc2",
            "final_layer_norm",
        )
        for theirs, ours in _linear(f"transformer.layers.{{}}.{name}", f"{_ENCODER}.layers.{{}}.{name}").items()
    },
    **_linear("transformer.layer_norm", f"{_ENCODER}.layer_norm"),
}
# The projection of OpenCLIP's HFTextEncoder: linear, or two layers.
ENCODER_PROJECTION: Table = {
    "proj.weight": "text_projection.weight",
    "proj.{}.weight": "text_projection.{}.weight",
}
# OpenCLIP's projection of the text tower: a matrix, or a Linear if it has a bias.
MATRIX_PROJECTION: Table = {"text_projection": "text_projection.weight"}
OPEN_CLIP: Table = {**LOGITS, **OPEN_CLIP_VISION, **OPEN_CLIP_TEXT, **MATRIX_PROJECTION}
# OpenCLIP multiplies by these from the right, a Linear by its transpose.
TRANSPOSED = {"visual.proj", "text_projection"}
# The number of axes of length 1 before the others in timm.
UNSQUEEZED = {"visual.trunk.pos_embed": 1, "visual.trunk.cls_token": 2}
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
    vision: Any = config.vision_config
    text: Any = config.text_config
    vision_table = _timm_table(vision) if is_timm_tower(vision) else OPEN_CLIP_VISION
    if vision.pooling == "cross_attention":
        vision_table = {**vision_table, **(JOINED_COCA_POOL if vision.hidden_size == vision.pooled_size else COCA_POOL)}
    return {**LOGITS, **vision_table, **_open_clip_text_table(text)}


def _timm_table(vision: MLIPVisionConfig) -> Table:
    if vision.use_key_bias:
        attention = TIMM_JOINT_QKV
    else:
        attention = TIMM_SEPARATE_QKV if vision.use_gated_mlp else TIMM_JOINT_WEIGHT
    return {**TIMM_VISION, **attention, **(TIMM_GATED_MLP if vision.use_gated_mlp else TIMM_MLP)}


def _open_clip_text_table(config: MLIPTextConfig) -> Table:
    if config.encoder_config is not None:
        encoder = M2M_100_TEXT if config.encoder_config.model_type == "m2m_100" else ROBERTA_TEXT
        return {**encoder, **ENCODER_PROJECTION}
    has_bias = config.text_projection_bias
    projection = _linear("text_projection", "text_projection") if has_bias else MATRIX_PROJECTION
    return {**OPEN_CLIP_TEXT, **(COCA_TEXT if config.pooling == "class" else {}), **projection}


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
    "transformer.embeddings.position_ids",
    "transformer.embeddings.token_type_ids",
    "transformer.embed_positions.weights",
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
        tensor = tensor.squeeze(tuple(range(UNSQUEEZED[key]))) if key in UNSQUEEZED else tensor
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
        tensor = tensor[(None,) * UNSQUEEZED[key]] if key in UNSQUEEZED else tensor
        theirs[key] = tensor.t().contiguous() if key in TRANSPOSED else tensor
    return theirs


def _split_layer(name: str) -> tuple[str, str]:
    found = re.search(r"\.(\d+)\.", name)
    return (name, "") if found is None else (name.replace(found[0], ".{}.", 1), found[1])


def _lookup(key: str, table: Table) -> tuple[str, ...]:
    pattern, layer = _split_layer(key)
    if pattern not in table:
        raise ValueError(f"{key} is not a parameter of a supported tower; {SUPPORTED}.")
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
