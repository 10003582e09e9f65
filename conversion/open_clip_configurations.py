# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Configurations: OpenCLIP's model_cfg to the keys of MLIPConfig, and back.

Models that MLIP does not compute are refused here, before any weight is read.
"""

import copy
import json
import math
from pathlib import Path
from typing import Any

from transformers import CLIPConfig, SiglipConfig

from modeling_mlip import MLIPConfig, MLIPTextConfig, MLIPVisionConfig
from modeling_mlip.hub.extras import require_modules

from .hugging_face_towers import ENCODERS, hugging_face_text_cfg, text_keys_of_hugging_face
from .timm_towers import TIMM_TOWERS, is_timm_tower, timm_head_of, timm_name_of, vision_keys_of_timm

SUPPORTED = (
    "MLIP converts CLIP, fixed-resolution SigLIP, and the ViTs of OpenCLIP (its own, CoCa's, and timm's SigLIP, EVA, "
    "EVA-02, Perception Encoder, CLIP and MobileCLIP-B) with its text transformer, RoBERTa, XLM-RoBERTa or NLLB"
)
CLIP_VOCAB, CLIP_BOS, CLIP_EOS = 49408, 49406, 49407

# OpenCLIP's defaults of vision_cfg and text_cfg. `None` and 0 turn a feature off.
VISION_DEFAULTS: dict[str, Any] = {
    "layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
    "ls_init_value": None, "no_ln_pre": False, "pool_type": "tok", "final_ln_after_pool": False,
    "act_kwargs": None, "norm_kwargs": None,
    "attentional_pool": False, "attn_pooler_queries": 256, "attn_pooler_heads": 8,
}  # fmt: skip
TEXT_DEFAULTS: dict[str, Any] = {
    "context_length": 77, "vocab_size": CLIP_VOCAB, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
    "ls_init_value": None, "pad_id": 0, "eos_id": 2, "no_causal_mask": False, "pool_type": "argmax",
    "proj_type": "linear", "proj_bias": False, "embed_cls": False,
    "act_kwargs": None, "norm_kwargs": None,
    "hf_tokenizer_name": None, "tokenizer_mode": None, "tokenizer_kwargs": None,
}  # fmt: skip
# Keys that do not change what a trained model computes.
IGNORED = {
    "patch_dropout", "output_tokens", "pos_embed_type",
    "timm_model_pretrained", "timm_pool", "timm_proj", "timm_proj_bias", "timm_drop", "timm_drop_path",
    "hf_model_pretrained", "hf_proj_type", "hf_pooler_type",
}  # fmt: skip
# Keys that must be off, and the name of a tower that has them, for error messages.
REFUSED = {
    "timm_model_name": "the timm image tower {}",
    "hf_model_name": "the Hugging Face text tower {}",
    "qk_norm": "a tower with qk_norm",
    "scaled_cosine_attn": "a tower with scaled_cosine_attn",
    "scale_heads": "a tower with scale_heads",
    "scale_attn_inner": "a tower with scale_attn_inner",
    "scale_attn": "a tower with scale_attn",
    "scale_fc": "a tower with scale_fc",
}
ACTIVATIONS = {("quick_gelu", None): "quick_gelu", ("gelu", None): "gelu", ("gelu", "tanh"): "gelu_pytorch_tanh"}


def model_cfg_of_name(name: str) -> dict[str, Any]:
    """OpenCLIP's model_cfg for a model name such as `ViT-B-32-quickgelu`, or of a JSON file.

    Raises:
        ImportError: if the name is not a file and open_clip is not installed.
        ValueError: if open_clip has no model of that name.
    """
    if name.endswith(".json"):
        return read_model_cfg(Path(name))["model_cfg"]
    require_modules(f"model={name}, unlike an open_clip_config.json,", "openclip", "open_clip")
    import open_clip

    name = name.replace("/", "-")
    if name not in open_clip.list_models():  # get_model_config returns None for some unknown names, and logs others
        raise ValueError(f"model={name!r} is not supported: OpenCLIP has no configuration of that name. {SUPPORTED}.")
    return copy.deepcopy(open_clip.get_model_config(name))


def read_model_cfg(path: Path) -> dict[str, Any]:
    """The content of an open_clip_config.json. A file that holds a model_cfg alone is wrapped as {"model_cfg": ...}.

    Raises:
        ValueError: if the file is not JSON or not a configuration of OpenCLIP.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again.") from None
    content = content if "model_cfg" in content else {"model_cfg": content}
    if not isinstance(content["model_cfg"], dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= set(
        content["model_cfg"]
    ):
        raise ValueError(f"{path} is not a configuration of OpenCLIP: it needs embed_dim, vision_cfg and text_cfg.")
    return content


def model_cfg_of_shapes(state: dict[str, Any]) -> dict[str, Any]:
    """OpenCLIP's model_cfg of a state dict of OpenAI, from its shapes. Heads are 64 wide, the activation is QuickGELU.

    Raises:
        ValueError: if the image tower is not a ViT.
    """
    if "visual.proj" not in state:
        raise ValueError(
            f"the image tower has no visual.proj: a ResNet or another tower is not supported; {SUPPORTED}."
        )
    layers = [len({key.split(".")[at] for key in state if key.startswith(start)})
              for start, at in (("visual.transformer.resblocks.", 3), ("transformer.resblocks.", 2))]  # fmt: skip
    width, _, patch_size, _ = state["visual.conv1.weight"].shape
    patches = state["visual.positional_embedding"].shape[0] - 1
    context_length, text_width = state["positional_embedding"].shape
    return {
        "embed_dim": state["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": {
            "image_size": patch_size * math.isqrt(patches),
            "layers": layers[0],
            "width": width,
            "patch_size": patch_size,
        },
        "text_cfg": {
            "context_length": context_length,
            "vocab_size": state["token_embedding.weight"].shape[0],
            "width": text_width,
            "heads": text_width // 64,
            "layers": layers[1],
        },
    }


def _refuse_tower(tower: str) -> None:
    raise ValueError(f"{tower} is not supported; {SUPPORTED}.")


def _resolved(name: str, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    for key, value in given.items():
        if key in REFUSED and value:
            _refuse_tower(REFUSED[key].format(value))
        if key == "block_type" and value not in (None, "default"):
            _refuse_tower(f"a tower with {value} attention blocks")
        if key == "proj_type" and value not in ("linear", "none"):
            _refuse_tower(f"a text tower with the projection {value!r}")
        if key not in {*defaults, *IGNORED, *REFUSED, "block_type"}:
            raise ValueError(f"{name} has the key {key}={value!r}, which MLIP does not know; {SUPPORTED}.")
    return {**defaults, **{key: value for key, value in given.items() if key in defaults and value is not None}}


def _square(name: str, value: Any) -> int:
    sides = {value} if isinstance(value, int) else set(value)
    if len(sides) != 1:
        raise ValueError(f"{name}={value}: MLIP takes square images and patches.")
    return sides.pop()


def _tower(cfg: dict[str, Any], quick_gelu: bool) -> dict[str, Any]:
    act = ("quick_gelu" if quick_gelu else "gelu", (cfg["act_kwargs"] or {}).get("approximate"))
    if act not in ACTIVATIONS or set(cfg["act_kwargs"] or {}) - {"approximate"}:
        _refuse_tower(f"a tower with the activation {act[0]} and {cfg['act_kwargs']}")
    if set(cfg["norm_kwargs"] or {}) - {"eps"}:
        _refuse_tower(f"a tower with norm_kwargs={cfg['norm_kwargs']}")
    return {
        "hidden_size": cfg["width"],
        "intermediate_size": int(cfg["width"] * cfg["mlp_ratio"]),
        "num_hidden_layers": cfg["layers"],
        "hidden_act": ACTIVATIONS[act],
        "layer_norm_eps": (cfg["norm_kwargs"] or {}).get("eps", 1e-5),
        "layer_scale_init_value": cfg["ls_init_value"],
    }


def towers(config: MLIPConfig | CLIPConfig | SiglipConfig) -> tuple[Any, Any]:
    """The vision config and the text config."""
    return config.vision_config, config.text_config


def highest_id(vocab_size: int) -> int:
    """The EOS id of a model that pools at the highest id of a text: CLIP's EOS, or the last of a smaller vocabulary.

    A vocabulary padded beyond CLIP's size keeps CLIP's EOS.
    """
    return CLIP_EOS if vocab_size >= CLIP_VOCAB else vocab_size - 1


def mlip_config_of_open_clip(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """The keys of MLIPConfig that compute what OpenCLIP computes from `model_cfg`, without the decoder of CoCa.

    Raises:
        ValueError: naming the tower, if MLIP does not compute it.
    """
    if isinstance(model_cfg["vision_cfg"].get("layers"), list | tuple):
        _refuse_tower(f"a ResNet image tower (layers={list(model_cfg['vision_cfg']['layers'])})")
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text", "init_logit_scale", "init_logit_bias",
             "nonscalar_logit_scale", "output_dict", "cast_dtype", "multimodal_cfg"}  # fmt: skip
    if unknown := set(model_cfg) - known:
        raise ValueError(f"model_cfg has the key {min(unknown)}, which MLIP does not know; {SUPPORTED}.")
    quick_gelu, embed_dim = bool(model_cfg.get("quick_gelu")), model_cfg["embed_dim"]
    has_timm_tower = model_cfg["vision_cfg"].get("timm_model_name") in TIMM_TOWERS
    return {
        "projection_dim": embed_dim,
        **_loss_keys(model_cfg),
        "vision_config": {
            **(
                vision_keys_of_timm(model_cfg["vision_cfg"])
                if has_timm_tower
                else _vision_keys(model_cfg["vision_cfg"], quick_gelu)
            ),
            "projection_dim": embed_dim,
        },
        "text_config": {**_text_keys(model_cfg["text_cfg"], quick_gelu, embed_dim), "projection_dim": embed_dim},
    }


def _loss_keys(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """A model with a logit bias was trained with the sigmoid loss, from a temperature of 1/10."""
    if model_cfg.get("init_logit_bias") is None:
        return {}
    return {
        "instance_loss": "sigmoid",
        "logit_bias_init_value": model_cfg["init_logit_bias"],
        "logit_scale_init_value": model_cfg.get("init_logit_scale", math.log(10)),
    }


def _vision_keys(vision_cfg: dict[str, Any], quick_gelu: bool) -> dict[str, Any]:
    vision = _resolved("vision_cfg", vision_cfg, VISION_DEFAULTS)
    mean, late_norm = vision["pool_type"] == "avg", vision["final_ln_after_pool"]
    if vision["pool_type"] not in ("tok", "avg") or (mean and not late_norm):
        _refuse_tower(f"an image tower with pool_type={vision['pool_type']!r} and final_ln_after_pool={late_norm}")
    return {
        **_tower(vision, quick_gelu),
        "num_attention_heads": vision["width"] // vision["head_width"],
        "image_size": _square("image_size", vision["image_size"]),
        "patch_size": _square("patch_size", vision["patch_size"]),
        "pooling": "mean" if mean else "class",
        "use_pre_layernorm": not vision["no_ln_pre"],
        **_attentional_pool_keys(vision),
    }


def _attentional_pool_keys(vision: dict[str, Any]) -> dict[str, Any]:
    """CoCa's pooling, in which the first query takes the place of the class token."""
    if not vision["attentional_pool"]:
        return {}
    if vision["attentional_pool"] is not True or vision["pool_type"] != "tok":
        _refuse_tower(
            f"an image tower with attentional_pool={vision['attentional_pool']!r} and pool_type={vision['pool_type']!r}"
        )
    return {
        "pooling": "cross_attention",
        "pooling_num_heads": vision["attn_pooler_heads"],
        "pooling_num_queries": vision["attn_pooler_queries"],
    }


def _text_keys(text_cfg: dict[str, Any], quick_gelu: bool, embed_dim: int) -> dict[str, Any]:
    if text_cfg.get("hf_model_name") in ENCODERS:
        own_keys = {key: value for key, value in text_cfg.items() if key != "hf_model_name"}
        _resolved("text_cfg", own_keys, TEXT_DEFAULTS)  # refuses keys that are not known
        return text_keys_of_hugging_face(text_cfg, embed_dim)
    text = _resolved("text_cfg", text_cfg, TEXT_DEFAULTS)
    if text["pool_type"] not in ("argmax", "eos", "last"):
        _refuse_tower(f"a text tower with pool_type={text['pool_type']!r}")
    if text["embed_cls"] and (text["no_causal_mask"] or text["pool_type"] != "argmax"):
        _refuse_tower(
            f"a text tower with embed_cls, pool_type={text['pool_type']!r} and no_causal_mask={text['no_causal_mask']}"
        )
    argmax, has_projection = text["pool_type"] == "argmax", text["proj_type"] == "linear"
    return {
        **_tower(text, quick_gelu),
        "num_attention_heads": text["heads"],
        "vocab_size": text["vocab_size"],
        "max_position_embeddings": text["context_length"],
        "bos_token_id": CLIP_BOS if text["vocab_size"] == CLIP_VOCAB and argmax else None,
        "eos_token_id": highest_id(text["vocab_size"]) if argmax else text["eos_id"],
        "pad_token_id": text["pad_id"],
        "pooling": "class" if text["embed_cls"] else "last" if text["pool_type"] == "last" else "eos",
        "use_causal_mask": not text["no_causal_mask"],
        "use_text_projection": has_projection,
        "text_projection_bias": has_projection and bool(text["proj_bias"]),
    }


def open_clip_of_mlip_config(config: MLIPConfig) -> dict[str, Any]:
    """OpenCLIP's model_cfg of an MLIP configuration, without the tokenizer; the inverse of `mlip_config_of_open_clip`.

    Raises:
        ValueError: if OpenCLIP has no such activation, shape or pooling.
    """
    vision, text = towers(config)
    acts = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    is_timm = is_timm_tower(vision)
    is_hugging_face = text.encoder_config is not None
    for part in (() if is_timm else (vision,)) + (() if is_hugging_face else (text,)):
        if part.hidden_act not in acts:
            raise ValueError(f"OpenCLIP has no activation {part.hidden_act!r}; it has {', '.join(acts)}.")
    if not (is_timm or is_hugging_face) and acts[vision.hidden_act][0] != acts[text.hidden_act][0]:
        raise ValueError(f"OpenCLIP has one activation for both towers, not {vision.hidden_act} and {text.hidden_act}.")

    def tower(ours) -> dict[str, Any]:
        width, approximate = ours.hidden_size, acts[ours.hidden_act][1]
        if width % ours.num_attention_heads:
            raise ValueError(f"hidden_size={width} is not divisible by num_attention_heads={ours.num_attention_heads}.")
        cfg: dict[str, Any] = {"width": width, "layers": ours.num_hidden_layers}
        if ours.intermediate_size != 4 * width:
            cfg["mlp_ratio"] = math.ceil(ours.intermediate_size / width * 1e4) / 1e4
            if int(width * cfg["mlp_ratio"]) != ours.intermediate_size:
                raise ValueError(f"no mlp_ratio of OpenCLIP gives intermediate_size={ours.intermediate_size}.")
        if ours.layer_norm_eps != 1e-5:
            cfg["norm_kwargs"] = {"eps": ours.layer_norm_eps}
        if ours.layer_scale_init_value is not None:
            cfg["ls_init_value"] = ours.layer_scale_init_value
        return cfg | ({"act_kwargs": {"approximate": approximate}} if approximate else {})

    vision_cfg = _timm_vision_cfg(vision) if is_timm else _plain_vision_cfg(vision, tower(vision))
    if is_hugging_face:
        text_cfg = hugging_face_text_cfg(text, config.projection_dim)
    else:
        text_cfg = _plain_text_cfg(text, tower(text))
    model_cfg: dict[str, Any] = {"embed_dim": config.projection_dim}
    if (vision if is_hugging_face else text).hidden_act == "quick_gelu":
        model_cfg["quick_gelu"] = True
    if config.instance_loss == "sigmoid":
        model_cfg["init_logit_bias"] = config.logit_bias_init_value
        model_cfg["init_logit_scale"] = config.logit_scale_init_value
    if needs_text_module({"vision_cfg": vision_cfg, "text_cfg": text_cfg}):
        model_cfg["custom_text"] = True
    return {**model_cfg, "vision_cfg": vision_cfg, "text_cfg": text_cfg}


def needs_text_module(model_cfg: dict[str, Any]) -> bool:
    """Whether OpenCLIP computes the text tower only in a module of its own (`CustomTextCLIP`).

    It takes that class for towers of timm, too, and for Hugging Face text towers.
    """
    text_cfg = model_cfg["text_cfg"]
    has_timm_tower = "timm_model_name" in model_cfg["vision_cfg"]
    return has_timm_tower or bool(text_cfg.get("hf_model_name") or text_cfg.get("embed_cls"))


def _plain_text_cfg(text: MLIPTextConfig, tower: dict[str, Any]) -> dict[str, Any]:
    if text.text_projection_hidden_size is not None:
        raise ValueError(
            "OpenCLIP's text transformer has a linear projection: "
            f"text_projection_hidden_size={text.text_projection_hidden_size}."
        )
    text_cfg = {"context_length": text.max_position_embeddings, "vocab_size": text.vocab_size, **tower}
    text_cfg |= {"heads": text.num_attention_heads, "pad_id": text.pad_token_id or 0}
    if not text.use_causal_mask:
        text_cfg["no_causal_mask"] = True
    if text.text_projection_bias:
        text_cfg["proj_bias"] = True
    if not text.use_text_projection:
        text_cfg["proj_type"] = "none"
    if text.pooling == "class":
        text_cfg["embed_cls"] = True
    elif text.pooling == "last":
        text_cfg["pool_type"] = "last"
    elif text.eos_token_id != text.vocab_size - 1:  # ids of added tokens are above EOS
        text_cfg |= {"pool_type": "eos", "eos_id": text.eos_token_id}
    return text_cfg


def _timm_vision_cfg(vision: MLIPVisionConfig) -> dict[str, Any]:
    return {
        "image_size": vision.image_size,
        "timm_model_name": timm_name_of(vision),
        "timm_model_pretrained": False,
        **timm_head_of(vision),
    }


def _plain_vision_cfg(vision: MLIPVisionConfig, tower: dict[str, Any]) -> dict[str, Any]:
    if not vision.use_visual_projection:
        raise ValueError("OpenCLIP's plain ViT has a projection of the image embedding: use_visual_projection=False.")
    vision_cfg = {"image_size": vision.image_size, "patch_size": vision.patch_size, **tower}
    vision_cfg["head_width"] = vision.hidden_size // vision.num_attention_heads
    if not vision.use_pre_layernorm:
        vision_cfg["no_ln_pre"] = True
    if vision.pooling == "cross_attention":
        vision_cfg |= {
            "attentional_pool": True,
            "attn_pooler_heads": vision.pooling_num_heads or vision.num_attention_heads,
            "attn_pooler_queries": vision.pooling_num_queries,
        }
    if vision.pooling == "mean":
        vision_cfg |= {"pool_type": "avg", "final_ln_after_pool": True}
    return vision_cfg
