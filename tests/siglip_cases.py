# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Tiny random SigLIP checkpoints of transformers and OpenCLIP, and tokenizers like theirs, that several tests share."""

import io
import json
from pathlib import Path

import torch
from conversion_cases import randomize
from safetensors.torch import save_file
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer, _create_vision_transformer
from transformers import (
    GemmaTokenizer,
    PreTrainedTokenizerBase,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
    SiglipTokenizer,
    T5Tokenizer,
)

CAPTIONS = [
    "a photo of a cat",
    "two red dogs and a blue bird",
    "the quick brown fox jumps",
    "caf\u00e9 by the sea 35",
] * 9
WIDTH, LENGTH, TOKENS = 48, 12, 400
TOWER = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 80}
TIMM_NAME = "vit_test_patch8_siglip_32"
# The keys of MLIPVisionConfig for `TIMM_NAME`, as in the table of conversion/timm_towers.py.
TIMM_KEYS = {
    **TOWER,
    "image_size": 32,
    "patch_size": 8,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "use_class_token": False,
    "pooling": "attention",
    "use_pre_layernorm": False,
    "use_visual_projection": False,
    "crop_to_patches": False,
}
# Every way in which the text towers of OpenCLIP's SigLIP models differ.
SIGLIP_TEXTS = {
    "siglip": {"proj_bias": True},
    "siglip2": {"proj_bias": True, "act_kwargs": {"approximate": "tanh"}, "width": 32, "heads": 2},
    "without_projection": {"proj_type": "none"},
}


@register_model
def vit_test_patch8_siglip_32(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """A small tower like timm's `vit_base_patch16_siglip_224`."""
    keys = dict(img_size=32, patch_size=8, embed_dim=WIDTH, depth=3, num_heads=3, mlp_ratio=80 / WIDTH)
    return _create_vision_transformer(TIMM_NAME, **keys, class_token=False, **kwargs)


def siglip_cfg_of(variant: str) -> dict:
    """OpenCLIP's model_cfg of a small SigLIP model."""
    text = {"context_length": LENGTH, "vocab_size": TOKENS, "width": WIDTH, "heads": 3, "layers": 2,
            "mlp_ratio": 1.6667, "no_causal_mask": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6},
            "hf_tokenizer_name": "timm/ViT-B-16-SigLIP", "tokenizer_kwargs": {"clean": "canonicalize"}}  # fmt: skip
    vision = {"image_size": 32, "timm_model_name": TIMM_NAME, "timm_model_pretrained": False, "timm_pool": "map",
              "timm_proj": "none"}  # fmt: skip
    return {"embed_dim": WIDTH, "init_logit_bias": -10, "custom_text": True, "vision_cfg": vision,
            "text_cfg": text | SIGLIP_TEXTS[variant]}  # fmt: skip


def open_clip_siglip(variant: str = "siglip"):
    import open_clip

    torch.manual_seed(0)
    cfg = {key: value for key, value in siglip_cfg_of(variant).items() if key != "custom_text"}
    theirs = open_clip.CustomTextCLIP(**cfg).eval()
    randomize(theirs)
    theirs.logit_scale.data.fill_(2.0)
    theirs.logit_bias.data.fill_(-3.0)
    return theirs


def open_clip_siglip_folder(folder: Path, variant: str, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder.mkdir(parents=True)
    preprocess_cfg = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    content = {"model_cfg": siglip_cfg_of(variant), "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(open_clip_siglip(variant).state_dict(), folder / "open_clip_model.safetensors")
    tokenizer.save_pretrained(folder)
    return folder


def transformers_siglip(image_size: int = 32) -> SiglipModel:
    """A random SigLIP model; every parameter matters."""
    text = {**TOWER, "num_hidden_layers": 2, "vocab_size": TOKENS, "max_position_embeddings": LENGTH}
    vision = {**TOWER, "image_size": image_size, "patch_size": 8}
    torch.manual_seed(0)
    theirs = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    randomize(theirs)
    theirs.logit_scale.data.fill_(2.0)
    theirs.logit_bias.data.fill_(-3.0)
    return theirs


def siglip_folder(folder: Path, tokenizer: PreTrainedTokenizerBase, image_size: int = 32) -> tuple[Path, SiglipModel]:
    theirs = transformers_siglip(image_size)
    theirs.save_pretrained(folder)
    images = SiglipImageProcessor(size={"height": image_size, "width": image_size}, resample=2)
    SiglipProcessor(images, tokenizer).save_pretrained(folder)
    return folder, theirs


# Tokenizers


def sentencepiece_model() -> bytes:
    """A unigram model with the special ids of T5 and SigLIP: <pad> 0, </s> 1, <unk> 2."""
    import sentencepiece

    writer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CAPTIONS), model_writer=writer, model_type="unigram", vocab_size=60, pad_id=0, eos_id=1,
        unk_id=2, bos_id=-1, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return writer.getvalue()


def sentencepiece_tokenizer(folder: Path) -> SiglipTokenizer:
    """The tokenizer of transformers' SigLIP folders."""
    file = folder / "spiece.model"
    file.write_bytes(sentencepiece_model())
    return SiglipTokenizer(str(file), model_input_names=["input_ids"])


def t5_tokenizer() -> T5Tokenizer:
    """The tokenizer of OpenCLIP's SigLIP repositories: a fast one with the same vocabulary."""
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_proto=sentencepiece_model())
    vocab = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(pieces.get_piece_size())]
    return T5Tokenizer(vocab=vocab, extra_ids=0, pad_token="</s>")


def gemma_tokenizer() -> GemmaTokenizer:
    """The tokenizer of SigLIP 2, with byte fallback: <pad> 0, <eos> 1, <bos> 2, <unk> 3."""
    merges = [("a", "t"), ("c", "at"), ("\u2581", "a"), ("\u2581", "cat"), ("o", "f"), ("d", "o")]
    characters = sorted({character for text in CAPTIONS for character in text.replace(" ", "\u2581")})
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256)), *characters]
    vocab = {token: index for index, token in enumerate(dict.fromkeys([*tokens, *map("".join, merges)]))}
    return GemmaTokenizer(
        vocab=vocab,
        merges=merges,
        add_bos_token=False,
        add_eos_token=True,
        padding_side="right",
        model_max_length=10**30,
    )
