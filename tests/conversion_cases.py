# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Tiny random OpenCLIP and CLIP checkpoints that the conversion tests share."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

VISION = {"image_size": 32, "layers": 3, "width": 48, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
CLIPA = (
    {"no_ln_pre": True, "pool_type": "avg", "final_ln_after_pool": True},
    {"vocab_size": 200, "pool_type": "last", "no_causal_mask": True, "hf_tokenizer_name": "bert-base-uncased",
     "tokenizer_kwargs": {"strip_sep_token": True}},
)  # fmt: skip
WORLDWIDE = {"vocab_size": 200, "pool_type": "eos", "eos_id": 2, "hf_tokenizer_name": "facebook/xlm-v-base"}
# Every way in which OpenCLIP's plain ViTs differ: vision keys, text keys, keys of the model.
VARIANTS: dict[str, tuple[dict, dict, dict]] = {
    "plain": ({}, {}, {}),
    "quickgelu": ({}, {}, {"quick_gelu": True}),
    "layer_scale": ({"ls_init_value": 1e-4}, {"ls_init_value": 1e-3}, {}),
    "mlp_ratio": ({"mlp_ratio": 4.3637}, {}, {}),
    "norm_eps": ({"norm_kwargs": {"eps": 1e-3}}, {"norm_kwargs": {"eps": 1e-4}}, {}),
    "gelu_tanh": ({"act_kwargs": {"approximate": "tanh"}}, {}, {}),
    "clipa": (*CLIPA, {}),
    "worldwide": ({}, WORLDWIDE, {}),
}
SPECIAL = {
    "bert-base-uncased": {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102},
    "facebook/xlm-v-base": {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3},
}
WORDS = ["a", "photo", "of", "cat", "dog", "red", "blue", "two"]


def model_cfg_of(variant: str) -> dict:
    vision, text, model = VARIANTS[variant]
    return {"embed_dim": 24, **model, "vision_cfg": VISION | vision, "text_cfg": TEXT | text}


def randomize(model: torch.nn.Module, seed: int = 0) -> None:
    """Norms, biases and LayerScale away from their trivial start, so that a wrong one is seen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def open_clip_model(variant: str):
    import open_clip

    torch.manual_seed(0)
    theirs = open_clip.CLIP(**model_cfg_of(variant)).eval()
    randomize(theirs)
    return theirs


def open_clip_folder(folder: Path, variant: str = "plain", state: dict | None = None, **preprocess_cfg) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    model_cfg = model_cfg_of(variant)
    content = {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    save_file(state or open_clip_model(variant).state_dict(), folder / "open_clip_model.safetensors")
    if name := model_cfg["text_cfg"].get("hf_tokenizer_name"):
        word_tokenizer(SPECIAL[name]).save_pretrained(folder)
    return folder


def word_tokenizer(special: dict[str, int], wrap: tuple[str, str] | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, with the special ids of another and its start and end."""
    roles = {"pad": "pad_token", "unk": "unk_token", "cls": "cls_token", "sep": "sep_token", "s": "bos_token",
             "/s": "eos_token"}  # fmt: skip
    free = (number for number in range(200) if number not in special.values())
    vocab = special | dict(zip([*WORDS, "!", "'"], free, strict=False))
    tokens = {roles[token.strip("[]<>").lower()]: token for token in special}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token=tokens["unk_token"]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    start = wrap[0] if wrap else tokens.get("cls_token", tokens.get("bos_token"))
    end = wrap[1] if wrap else tokens.get("sep_token", tokens.get("eos_token"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A {end}", special_tokens=[(start, special[start]), (end, special[end])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **tokens)


def clip_folder(folder: Path, eos_token_id: int = 99) -> tuple[Path, CLIPModel]:
    """A folder of transformers' CLIP; `eos_token_id=2` makes a config as they were before transformers 4.31."""
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**shared, "vocab_size": 100, "max_position_embeddings": 12, "bos_token_id": 98, "pad_token_id": 99}
    vision = {**shared, "hidden_size": 48, "image_size": 32, "patch_size": 8}
    config = CLIPConfig(text_config=text | {"eos_token_id": eos_token_id}, vision_config=vision, projection_dim=24)
    torch.manual_seed(0)
    theirs = CLIPModel(config).eval()
    randomize(theirs)
    theirs.save_pretrained(folder)
    tokenizer = word_tokenizer({"<s>": 98, "</s>": 99, "<pad>": 0, "<unk>": 1})
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder, theirs
