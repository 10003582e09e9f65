# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Tiny random OpenCLIP checkpoints with Hugging Face text towers, that several tests share."""

import json
from pathlib import Path

import torch
from conversion_cases import TEXT, VISION, randomize, word_tokenizer
from safetensors.torch import save_file

SPECIAL_IDS = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
ROBERTA = {
    "model_type": "roberta", "vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 40, "max_position_embeddings": 16, "type_vocab_size": 1, "layer_norm_eps": 1e-5,
    **SPECIAL_IDS,
}  # fmt: skip
M2M_100 = {
    "model_type": "m2m_100", "vocab_size": 200, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2,
    "encoder_ffn_dim": 40, "max_position_embeddings": 16, "activation_function": "relu", "scale_embedding": True,
    "encoder_layerdrop": 0.0, **SPECIAL_IDS,
}  # fmt: skip
# `hf_model_name` -> encoder, and the keys of text_cfg with it.
ENCODERS = {"test/roberta": ROBERTA, "test/xlm": ROBERTA | {"model_type": "xlm-roberta"}, "test/nllb": M2M_100}
TEXTS = {
    "roberta": {"hf_model_name": "test/roberta", "hf_pooler_type": "mean_pooler"},  # the projection is an MLP
    "xlm-roberta": {"hf_model_name": "test/xlm", "hf_pooler_type": "cls_last_hidden_state_pooler",
                    "hf_proj_type": "linear"},
    "nllb": {"hf_model_name": "test/nllb", "hf_pooler_type": "cls_pooler", "hf_proj_type": "linear"},
}  # fmt: skip


def hugging_face_cfg_of(variant: str) -> dict:
    """OpenCLIP's model_cfg of a small model."""
    text = TEXTS[variant] | {"hf_tokenizer_name": "roberta-base", "context_length": TEXT["context_length"]}
    return {"embed_dim": 24, "quick_gelu": variant == "roberta", "vision_cfg": VISION, "text_cfg": text}


def open_clip_hugging_face(variant: str, folder: Path):
    """OpenCLIP's own model, which reads the configuration of the encoder from `folder`."""
    import open_clip

    cfg = hugging_face_cfg_of(variant)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(ENCODERS[cfg["text_cfg"]["hf_model_name"]]))
    cfg["text_cfg"] |= {"hf_model_name": str(folder), "hf_model_pretrained": False}
    torch.manual_seed(0)
    theirs = open_clip.CustomTextCLIP(**cfg).eval()
    randomize(theirs)
    return theirs


def hugging_face_folder(folder: Path, variant: str):
    """An OpenCLIP folder, and OpenCLIP's model with these weights."""
    theirs = open_clip_hugging_face(variant, folder / "encoder")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": hugging_face_cfg_of(variant)}))
    save_file(theirs.state_dict(), folder / "open_clip_model.safetensors")
    word_tokenizer({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}).save_pretrained(folder)
    return folder, theirs
