# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The Hugging Face text towers of OpenCLIP: keys of text_cfg to keys of MLIPTextConfig, and back.

Sources: `HFTextEncoder` of `open_clip/hf_model.py` (open_clip 3.3), and the config.json of each encoder on the Hub,
from which only the keys that change the mathematics of the encoder are taken.
"""

from typing import Any

from modeling_mlip import MLIPTextConfig

_SPECIAL_IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
_ROBERTA = {
    "model_type": "roberta", "vocab_size": 50265, "hidden_size": 768, "num_hidden_layers": 12,
    "num_attention_heads": 12, "intermediate_size": 3072, "max_position_embeddings": 514, "type_vocab_size": 1,
    "layer_norm_eps": 1e-5, **_SPECIAL_IDS,
}  # fmt: skip
_XLM_ROBERTA = _ROBERTA | {"model_type": "xlm-roberta", "vocab_size": 250002}
_NLLB = {
    "model_type": "m2m_100", "vocab_size": 256206, "d_model": 1024, "encoder_layers": 12,
    "encoder_attention_heads": 16, "encoder_ffn_dim": 4096, "max_position_embeddings": 1024,
    "activation_function": "relu", "scale_embedding": True, "encoder_layerdrop": 0.0, **_SPECIAL_IDS,
}  # fmt: skip
# `hf_model_name` of OpenCLIP -> configuration of the encoder.
ENCODERS: dict[str, dict[str, Any]] = {
    "roberta-base": _ROBERTA,
    "xlm-roberta-base": _XLM_ROBERTA,
    "xlm-roberta-large": _XLM_ROBERTA
    | {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
    "facebook/nllb-200-distilled-600M": _NLLB,
    "facebook/nllb-200-distilled-1.3B": _NLLB | {"encoder_layers": 24, "encoder_ffn_dim": 8192},
}
# `hf_pooler_type` -> `pooling`. With "cls_pooler", OpenCLIP adds RoBERTa's own pooling layer, which no model of its
# list has; an encoder of M2M-100 has no such layer.
POOLERS = {
    "roberta": {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "class"},
    "xlm-roberta": {"mean_pooler": "mean", "cls_last_hidden_state_pooler": "class"},
    "m2m_100": {"mean_pooler": "mean", "cls_pooler": "class"},
}
PROJECTIONS = ("linear", "mlp", None)


def text_keys_of_hugging_face(text_cfg: dict[str, Any], embed_dim: int) -> dict[str, Any]:
    """The keys of MLIPTextConfig for OpenCLIP's text_cfg with an `hf_model_name` of `ENCODERS`.

    Raises:
        ValueError: naming the tower, if OpenCLIP pools or projects in a way that is not supported.
    """
    name = text_cfg["hf_model_name"]
    encoder = ENCODERS[name]
    poolers = POOLERS[encoder["model_type"]]
    pooler, projection = text_cfg.get("hf_pooler_type", "mean_pooler"), text_cfg.get("hf_proj_type", "mlp")
    width: Any = encoder.get("hidden_size", encoder.get("d_model"))
    if pooler not in poolers or projection not in PROJECTIONS or (projection is None and width != embed_dim):
        raise ValueError(
            f"the Hugging Face text tower {name} with hf_pooler_type={pooler!r} and hf_proj_type={projection!r} is not "
            f"supported; supported are {', '.join(map(repr, poolers))} and {', '.join(map(repr, PROJECTIONS))} "
            f"(None only for embed_dim={width})."
        )
    return {
        "encoder_config": dict(encoder),
        "vocab_size": encoder["vocab_size"],
        "max_position_embeddings": text_cfg.get("context_length", 77),
        **_SPECIAL_IDS,
        "pooling": poolers[pooler],
        "use_causal_mask": False,
        "use_text_projection": projection is not None,
        "text_projection_hidden_size": (width + embed_dim) // 2 if projection == "mlp" else None,
    }


def hugging_face_text_cfg(text: MLIPTextConfig, embed_dim: int) -> dict[str, Any]:
    """OpenCLIP's text_cfg of a text tower with `encoder_config`; the inverse of `text_keys_of_hugging_face`.

    Raises:
        ValueError: if OpenCLIP has no such encoder or projection.
    """
    encoder = text.encoder_config.to_dict() | {"vocab_size": text.vocab_size}
    names = [name for name, keys in ENCODERS.items() if all(encoder.get(key) == keys[key] for key in keys)]
    tower = f"{text.num_hidden_layers} x {text.hidden_size}, {text.vocab_size} tokens"
    if not names:
        raise ValueError(
            f"OpenCLIP has no {encoder['model_type']} text tower like this ({tower}): share it as an MLIP model with "
            "'mlip push'."
        )
    hidden_size = text.text_projection_hidden_size
    if text.text_projection_bias or hidden_size not in (None, (text.hidden_size + embed_dim) // 2):
        raise ValueError(
            f"OpenCLIP's {names[0]} has no projection with a bias or text_projection_hidden_size={hidden_size}; it has "
            f"linear projections, and {(text.hidden_size + embed_dim) // 2}."
        )
    projection = "linear" if hidden_size is None else "mlp"
    poolers = {ours: theirs for theirs, ours in POOLERS[encoder["model_type"]].items()}
    return {
        "hf_model_name": names[0],
        "hf_pooler_type": poolers[text.pooling],
        "hf_proj_type": projection if text.use_text_projection else None,
        "context_length": text.max_position_embeddings,
    }


def vocab_size_of(text_cfg: dict[str, Any], default: int) -> int:
    """The number of token embeddings of a text_cfg; `default` if it does not say."""
    if text_cfg.get("hf_model_name"):
        return ENCODERS[text_cfg["hf_model_name"]]["vocab_size"]
    return text_cfg.get("vocab_size", default)
