# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A CLIPProcessor with the pixels and token ids of OpenCLIP, and OpenCLIP's settings for a CLIPProcessor.

OpenCLIP cleans a text before it tokenizes: HTML entities, curly quotes and white space, for some models case or
punctuation. For some models it overwrites [SEP] with id 0. Here both are steps of the tokenizer, so they are saved with
it.
"""

import gzip
import hashlib
import importlib.resources
import importlib.util
import json
import re
import string
import tempfile
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, normalizers, processors
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPProcessor,
    CLIPTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from modeling_mlip.hub.extras import install_hint

from .hugging_face_towers import vocab_size_of
from .open_clip_configurations import CLIP_VOCAB

TOKENIZER_FILES = (
    "tokenizer.json",
    "vocab.json",
    "vocab.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
)
RESAMPLE = {"bicubic": 3, "bilinear": 2, "random": 3}  # PIL's numbers; OpenCLIP takes bicubic for "random" at inference
# SHA-256 of CLIP's vocabulary as sorted JSON.
CLIP_VOCABULARY_SHA256 = "88090f1273a5322f16b5289e86fc42c42b1eb43da00372fa2ae7fdbde1aaf5dd"
# `hf_tokenizer_name` of an exported tokenizer that no Hub id is known for.
UNKNOWN_TOKENIZER = "owner/name"
# Texts on which the tokenizers are compared, beside texts with every added token.
PROBE_TEXTS = ("", "a photo of a cat", "Hello World!", "!", "two dogs, 3 cats; it's 50%", "caf\u00e9", "word " * 100)
MAX_PROBED_TOKENS = 1000
SENTINEL = re.compile("\u2581?<extra_id_[0-9]+>")
# What OpenCLIP's cleaning (html.unescape twice, ftfy) replaces in captions that are found on the web.
REPLACED = {
    "&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&#39;": "'", "&#x27;": "'", "&apos;": "'", "&nbsp;": " ",
    "[\u02bc\u2018-\u201b]": "'", "[\u201c-\u201f]": '"',
    "\ufb00": "ff", "\ufb01": "fi", "\ufb02": "fl", "\ufb03": "ffi", "\ufb04": "ffl",
}  # fmt: skip


def processor_of_open_clip(
    model_cfg: dict[str, Any], preprocess_cfg: dict[str, Any], image_size: int, folder: Path | None
) -> CLIPProcessor:
    """The processor that OpenCLIP's configs describe.

    Args:
        folder: a folder that may contain the files of a Hugging Face tokenizer; without them, its name is looked up.

    Raises:
        ValueError, OSError: if a setting is not supported, or the tokenizer cannot be found.
    """
    return CLIPProcessor(
        image_processor=image_processor_of(preprocess_cfg, image_size),
        tokenizer=tokenizer_of(model_cfg["text_cfg"], folder),
    )


def image_processor_of(preprocess_cfg: dict[str, Any], image_size: int) -> CLIPImageProcessor:
    """OpenCLIP's transform for inference. As in OpenCLIP, the `image_size` of the model replaces the configured one.

    Raises:
        ValueError: if the resize mode, interpolation or fill color is not supported.
    """
    mean, std = preprocess_cfg.get("mean", OPENAI_CLIP_MEAN), preprocess_cfg.get("std", OPENAI_CLIP_STD)
    interpolation = preprocess_cfg.get("interpolation") or "bicubic"
    mode = preprocess_cfg.get("resize_mode") or "shortest"
    sizes = {
        "shortest": {"shortest_edge": image_size},
        "squash": {"height": image_size, "width": image_size},
        "longest": {"max_height": image_size, "max_width": image_size},
    }
    if mode not in sizes or interpolation not in RESAMPLE:
        raise ValueError(
            f"preprocess_cfg has resize_mode={mode!r} and interpolation={interpolation!r}; supported are "
            f"{', '.join(sizes)} and {', '.join(RESAMPLE)}."
        )
    if mode == "longest" and preprocess_cfg.get("fill_color"):
        raise ValueError(
            f"preprocess_cfg has fill_color={preprocess_cfg['fill_color']}: CLIPImageProcessor pads with 0."
        )
    return CLIPImageProcessor(
        size=sizes[mode],
        crop_size={"height": image_size, "width": image_size},
        do_center_crop=mode != "squash",  # with "longest" it pads
        resample=RESAMPLE[interpolation],
        image_mean=list(mean) if isinstance(mean, list | tuple) else [mean] * 3,
        image_std=list(std) if isinstance(std, list | tuple) else [std] * 3,
    )


def preprocess_cfg_of(images: CLIPImageProcessor, image_size: int) -> dict[str, Any]:
    """OpenCLIP's preprocess_cfg of an image processor; the inverse of `image_processor_of`.

    Raises:
        ValueError: if OpenCLIP has no such size or interpolation.
    """
    size = {key: value for key, value in dict(images.size).items() if value}
    mode = {"shortest_edge": "shortest", "height": "squash", "max_height": "longest"}.get(next(iter(sorted(size))))
    if mode is None or set(size.values()) != {image_size}:
        raise ValueError(f"OpenCLIP cannot resize to {size} for images of {image_size}.")
    names = {number: name for name, number in RESAMPLE.items() if name != "random"}
    if int(images.resample) not in names:
        raise ValueError(f"OpenCLIP has no interpolation like resample={images.resample}.")
    return {
        "size": image_size,
        "mode": "RGB",
        "mean": list(images.image_mean),
        "std": list(images.image_std),
        "interpolation": names[int(images.resample)],
        "resize_mode": mode,
        "fill_color": 0,
    }


# Tokenizers


def tokenizer_of(text_cfg: dict[str, Any], folder: Path | None) -> PreTrainedTokenizerFast:
    """The tokenizer of OpenCLIP's text_cfg: CLIP's tokenizer, or the Hugging Face tokenizer that it names.

    Raises:
        OSError: if the tokenizer cannot be loaded.
        ValueError: if a setting is not supported, or the tokenizer has more tokens than the model.
    """
    options = dict(text_cfg.get("tokenizer_kwargs") or {})
    clean, strip_sep = options.pop("clean", None), options.pop("strip_sep_token", False)
    length = options.pop("context_length", None) or text_cfg.get("context_length", 77)
    if options or text_cfg.get("tokenizer_mode"):
        options |= {"tokenizer_mode": text_cfg["tokenizer_mode"]} if text_cfg.get("tokenizer_mode") else {}
        raise ValueError(f"the tokenizer has the settings {options}, which MLIP does not support.")
    name = text_cfg.get("hf_tokenizer_name")
    if not name:
        return _with_cleaning(_clip_tokenizer(folder), clean or "lower", length, split_special_tokens=True)
    try:
        tokenizer = AutoTokenizer.from_pretrained(_files_or(folder, name))
    except (OSError, ValueError, ImportError) as error:
        raise OSError(
            f"the tokenizer {name} could not be loaded ({str(error).splitlines()[0]}): "
            "put its files (tokenizer.json, tokenizer_config.json) beside the weights, or connect to the Hub."
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"the tokenizer {name} ({type(tokenizer).__name__}) has no tokenizer.json, which MLIP needs.")
    vocab_size = vocab_size_of(text_cfg, default=CLIP_VOCAB)
    if surplus_tokens(tokenizer, vocab_size):
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model only {vocab_size}.")
    if strip_sep:
        _overwrite_sep(tokenizer)
    name = tokenizer.init_kwargs.get("hf_tokenizer_name", name)
    options = {"hf_tokenizer_name": name, "hf_tokenizer_size": len(tokenizer)}
    if clean == "canonicalize":  # without punctuation, a special token in a caption is a word
        options["split_special_tokens"] = True
    return _with_cleaning(tokenizer, clean or "whitespace", length, **options)


def surplus_tokens(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> list[str]:
    """The tokens that the embeddings of a model lack.

    T5's sentinels do not count, because no caption contains them: the vocabulary of the multilingual SigLIP ends with
    100 of them, for which the model has no embeddings.
    """
    if len(tokenizer) <= vocab_size:
        return []
    tokens = (token for token, index in tokenizer.get_vocab().items() if index >= vocab_size)
    return [token for token in tokens if not SENTINEL.fullmatch(token)]


def _files_or(folder: Path | None, name: str) -> Path | str:
    if folder is not None and any((folder / file).is_file() for file in TOKENIZER_FILES):
        return folder
    return name


def _clip_tokenizer(folder: Path | None) -> PreTrainedTokenizerFast:
    """CLIP's byte-pair encoding from open_clip's vocabulary file, from files in `folder`, or from the Hub.

    It pads with id 0, as OpenCLIP does. That id is the token "!", so the tokenizer must not treat special tokens in a
    text as special: an exclamation mark in a caption stays a token of the caption.
    """
    if importlib.util.find_spec("open_clip") is not None:
        packed = importlib.resources.files("open_clip") / "bpe_simple_vocab_16e6.txt.gz"
        lines = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")
        vocab, merges = clip_vocabulary(lines[1:])
        return CLIPTokenizer(vocab=vocab, merges=merges, pad_token="!")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(_files_or(folder, "openai/clip-vit-base-patch32"))
        if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # transformers makes an empty one of missing files
            raise OSError("no file of a vocabulary was found")
    except (OSError, ValueError) as error:
        raise OSError(
            f"CLIP's vocabulary was not found ({str(error).splitlines()[0]}): {install_hint('openclip')}, "
            "put tokenizer.json beside the weights, or connect to the Hub."
        ) from None
    tokenizer.pad_token = "!"
    return tokenizer


def clip_vocabulary(merge_lines: list[str]) -> tuple[dict[str, int], list[Any]]:
    """CLIP's 49 408 tokens and 48 894 merges from the lines of its merges file.

    The order of the tokens is: bytes, bytes at the end of a word, merges, BOS, EOS.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    num_others = 256 - len(printable)
    characters = [chr(code) for code in printable] + [chr(256 + i) for i in range(num_others)]  # GPT-2's byte alphabet
    num_merges = CLIP_VOCAB - 2 * 256 - 2
    merges = [tuple(line.split()) for line in merge_lines[:num_merges]]
    tokens = [*characters, *(c + "</w>" for c in characters), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(tokens)}, merges


def _overwrite_sep(tokenizer: PreTrainedTokenizerFast) -> None:
    """[CLS] text [SEP] becomes [CLS] text [id 0], as CLIPA was trained."""
    zero = tokenizer.convert_ids_to_tokens(0)
    cls, cls_id = tokenizer.cls_token, tokenizer.cls_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {zero}", pair=f"{cls} $A {zero} $B {zero}", special_tokens=[(cls, cls_id), (zero, 0)]
    )


def _cleaning(clean: str) -> list[normalizers.Normalizer]:
    steps: list[normalizers.Normalizer] = [
        normalizers.Replace(Regex(old) if old[0] == "[" else old, new) for old, new in REPLACED.items()
    ]
    if clean == "canonicalize":
        punctuation = "".join("\\" + character for character in string.punctuation.replace("_", ""))
        steps += [normalizers.Replace("_", " "), normalizers.Replace(Regex(f"[{punctuation}]"), "")]
    if clean in ("canonicalize", "lower"):  # as in Python, a capital sigma at the end of a word has a form of its own
        steps += [normalizers.Replace(Regex(r"(?<=\p{L})\u03a3(?!\p{L})"), "\u03c2"), normalizers.Lowercase()]
    elif clean != "whitespace":
        raise ValueError(f"the tokenizer cleans texts by {clean!r}; known are canonicalize, lower and whitespace.")
    return [normalizers.NFC(), *steps, normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip()]


def _with_cleaning(tokenizer: PreTrainedTokenizerFast, clean: str, length: int, **options) -> PreTrainedTokenizerFast:
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    before = [backend.normalizer] if backend.normalizer is not None else []
    backend.normalizer = normalizers.Sequence([*_cleaning(clean), *before])
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=length,
        padding_side=tokenizer.padding_side,
        truncation_side=tokenizer.truncation_side,
        **special,
        **options,
    )


def has_clip_vocabulary(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the tokens and their ids are those of OpenCLIP's built-in tokenizer, without any added token."""
    return vocabulary_hash(tokenizer) == CLIP_VOCABULARY_SHA256


def vocabulary_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 of all tokens and their ids, added tokens included."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()


def text_cfg_of(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The keys of OpenCLIP's text_cfg about the tokenizer; empty for CLIP's vocabulary.

    `hf_tokenizer_name` is a Hub id, or `UNKNOWN_TOKENIZER` if none is known; never a local path. OpenCLIP ignores it
    with `local-dir:` and loads the tokenizer from the folder.
    """
    if has_clip_vocabulary(tokenizer):
        return {}
    name, size = (tokenizer.init_kwargs.get(key) for key in ("hf_tokenizer_name", "hf_tokenizer_size"))
    if not _is_hub_id(name) or size not in (None, len(tokenizer)):  # another size: tokens were added since
        name = UNKNOWN_TOKENIZER
    return {"hf_tokenizer_name": name}


def _is_hub_id(name: Any) -> bool:
    is_id = isinstance(name, str) and re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name) is not None
    return is_id and not Path(name).exists()


def check_open_clip_tokens(tokenizer: PreTrainedTokenizerFast, model_cfg: dict[str, Any]) -> bool:
    """Compares the ids of OpenCLIP's tokenizer for `model_cfg` with those of `tokenizer`.

    The texts are `PROBE_TEXTS` and one text for each added token. Ids after EOS are not compared where the text tower
    is causal and pools at EOS, because they do not change the embedding.

    Returns:
        False if open_clip is not installed, so that nothing was compared.

    Raises:
        ValueError: naming the first text whose ids differ.
    """
    if importlib.util.find_spec("open_clip") is None:
        return False
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    text_cfg = model_cfg["text_cfg"]
    length, options = text_cfg["context_length"], text_cfg.get("tokenizer_kwargs") or {}
    added = sorted(tokenizer.get_added_vocab())[:MAX_PROBED_TOKENS]
    texts = [*PROBE_TEXTS, *(f"a photo of {token} cat" for token in added if token not in tokenizer.all_special_tokens)]
    with tempfile.TemporaryDirectory() as folder:
        if "hf_tokenizer_name" in text_cfg:
            tokenizer.save_pretrained(folder)
            theirs = HFTokenizer(folder, context_length=length, **options)(texts)
        else:
            theirs = SimpleTokenizer(context_length=length, **options)(texts)
    ours = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    reads_padding = text_cfg.get("no_causal_mask") or text_cfg.get("embed_cls") or text_cfg.get("hf_model_name")
    pools_at_eos = text_cfg.get("pool_type", "argmax") != "last" and not reads_padding
    eos = text_cfg["eos_id"] if text_cfg.get("pool_type") == "eos" else int(theirs[0].max())
    for text, our_ids, their_ids in zip(texts, ours.tolist(), theirs.tolist(), strict=True):
        if pools_at_eos and eos in our_ids and eos in their_ids:
            our_ids, their_ids = our_ids[: our_ids.index(eos) + 1], their_ids[: their_ids.index(eos) + 1]
        if our_ids != their_ids:
            raise ValueError(
                f"OpenCLIP's tokenizer gives other token ids than the model's for the text {text[:60]!r}, so the "
                "embeddings of texts would differ; export to transformers' CLIP, or with a tokenizer that OpenCLIP has."
            )
    return True
