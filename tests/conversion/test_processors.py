# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The processor gives OpenCLIP's pixels and token ids, before and after it is saved."""

import numpy as np
import open_clip
import pytest
import torch
from conversion_cases import SPECIAL, TEXT, word_tokenizer
from PIL import Image
from transformers import AutoTokenizer

from modeling_mlip.conversion import processors

TEXTS = [
    "a photo of a cat", "Hello World!", "!", "!! wait?! ...", "  two   spaces\tand\nlines  ", "", "word " * 100,
    "x" * 300,
    "it's they're I'd 3.14 50%", "it\u2019s \u201cquoted\u201d", "salt &amp; pepper &lt;3 &quot;hm&quot; &#39;s",
    "caf\u00e9 na\u00efve e\u0301t\u00e9", "\u65e5\u672c\u8a9e \u0440\u0443\u0441\u0441\u043a\u0438\u0439",
    "party \U0001f389\U0001f389!", "of\ufb01ce", "snake_case & CO., Ltd.",
]  # fmt: skip


def ids_of(tokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def test_clip_token_ids_equal_open_clip(tmp_path):
    ours, theirs = processors.tokenizer_of({"context_length": 77}, None), open_clip.get_tokenizer("ViT-B-32")
    assert torch.equal(ids_of(ours, TEXTS), theirs(TEXTS))
    ours.save_pretrained(tmp_path)
    assert torch.equal(ids_of(AutoTokenizer.from_pretrained(tmp_path), TEXTS), theirs(TEXTS))
    assert processors.has_clip_vocabulary(ours)


def test_clip_vocabulary_equals_open_clip():
    ours = processors.tokenizer_of({"context_length": 77}, None).get_vocab()
    theirs = open_clip.tokenizer.SimpleTokenizer().encoder
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    assert ours == {renamed.get(token, token): number for token, number in theirs.items()}


# Only BERT's tokenizer has a [SEP] to strip.
TOKENIZERS = [(special, options) for special in SPECIAL for options in ({"clean": "canonicalize"}, {})]
TOKENIZERS.append(("bert-base-uncased", {"strip_sep_token": True}))


@pytest.mark.parametrize(("special", "options"), TOKENIZERS)
def test_hugging_face_token_ids_equal_open_clip(tmp_path, special, options):
    word_tokenizer(SPECIAL[special]).save_pretrained(tmp_path)
    text_cfg = TEXT | {"vocab_size": 200, "hf_tokenizer_name": special, "tokenizer_kwargs": options}
    ours = processors.tokenizer_of(text_cfg, tmp_path)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=12, **options)
    texts = [*TEXTS, "a photo of two cat!", "A Photo, of_two (cat)", "a " * 30]
    assert torch.equal(ids_of(ours, texts), theirs(texts))
    ours.save_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(ids_of(saved, texts), theirs(texts))
    assert processors.text_cfg_of(saved) == {"hf_tokenizer_name": special}


# Sizes whose margins are even after resizing: for odd ones CLIPImageProcessor may crop one pixel further up or left.
SHORTEST = [(300, 300), (301, 400), (224, 224), (480, 640), (100, 150), (500, 333)]


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
def test_pixels_equal_open_clip(mode, interpolation):
    from open_clip.transform import PreprocessCfg, image_transform_v2

    cfg = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3], "interpolation": interpolation, "resize_mode": mode}
    ours = processors.image_processor_of(cfg, 224)
    theirs = image_transform_v2(PreprocessCfg(size=224, **cfg), is_train=False)
    sizes = {"shortest": SHORTEST, "squash": [*SHORTEST, (256, 301)], "longest": [(300, 300), (480, 640), (100, 150)]}
    for size in sizes[mode]:
        image = picture(*size)
        difference = ours(image, return_tensors="pt").pixel_values[0] - theirs(image)
        assert (difference * torch.tensor(cfg["std"])[:, None, None]).abs().max() <= 2.01 / 255, size
    back = processors.preprocess_cfg_of(ours, 224)
    assert back["resize_mode"] == mode and back["mean"] == cfg["mean"] and back["std"] == cfg["std"]
    assert back["interpolation"] == ("bilinear" if interpolation == "bilinear" else "bicubic")


def picture(height: int, width: int) -> Image.Image:
    """Coloured spots of about ten pixels: contrasts as in a photograph."""
    colours = np.random.default_rng(0).integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height), Image.Resampling.BILINEAR)


def test_defaults_are_those_of_open_clip():
    ours = processors.image_processor_of({}, 336)
    assert dict(ours.size)["shortest_edge"] == 336 and ours.do_center_crop
    assert tuple(ours.image_mean) == open_clip.OPENAI_DATASET_MEAN
    assert tuple(ours.image_std) == open_clip.OPENAI_DATASET_STD


def test_settings_without_a_counterpart_are_refused():
    with pytest.raises(ValueError, match="fill_color=127"):
        processors.image_processor_of({"resize_mode": "longest", "fill_color": 127}, 224)
    with pytest.raises(ValueError, match="resize_mode='stretch'"):
        processors.image_processor_of({"resize_mode": "stretch"}, 224)
    with pytest.raises(ValueError, match="tokenizer_mode"):
        processors.tokenizer_of({"hf_tokenizer_name": "x", "tokenizer_mode": "clips"}, None)
    with pytest.raises(OSError, match="no/such-tokenizer could not be loaded"):
        processors.tokenizer_of({"hf_tokenizer_name": "no/such-tokenizer"}, None)


def test_a_vocabulary_that_is_not_there_is_said(monkeypatch, tmp_path):
    monkeypatch.setattr(processors.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(OSError, match="CLIP's vocabulary was not found.*pip install 'modeling-mlip"):
        processors._clip_tokenizer(tmp_path)
