# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A trained tokenizer is a normal CLIPTokenizer: CLIP's layout, no unknown text, the same ids after saving."""

import json

import pytest
from transformers import AutoTokenizer, CLIPTokenizer

from modeling_mlip.data.caption_tokenizer import train_tokenizer

CAPTIONS = ["a small red star with fine stripes", "a large red circle", "two dogs' tails, it's 2 o'clock"] * 3
TEXTS = [*CAPTIONS[:3], "A Large  RED\nstar!!", "naïve 🚀 漢字 \x00", "unseen words 123"]


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return train_tokenizer(CAPTIONS, max_seq_length=16)


def test_the_vocabulary_has_clips_layout(tokenizer):
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(len(tokenizer)))
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == tokenizer.pad_token_id
    assert tokenizer.bos_token_id == len(tokenizer) - 2
    # As in OpenAI's file: the bytes from "!", then the same at the end of a word.
    assert [vocab[token] for token in ("!", '"', "a", "!</w>", "a</w>")] == [0, 1, 64, 256, 320]
    assert len(tokenizer) > 514 + 10
    assert tokenizer.model_max_length == 16


def test_frequent_words_are_one_token_and_wrapped_in_bos_and_eos(tokenizer):
    ids = tokenizer("a Red star").input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", "a</w>", "red</w>", "star</w>", "<|endoftext|>"]


def test_no_text_is_unknown(tokenizer):
    text = "".join(map(chr, range(0x21, 0x2FF))) + "🚀漢"
    ids = tokenizer(text, verbose=False).input_ids
    assert len(ids) > 300
    assert tokenizer.unk_token_id not in ids[1:-1]
    assert tokenizer.decode(tokenizer("naïve 🚀").input_ids, skip_special_tokens=True) == "naïve 🚀"


def test_saved_and_reloaded_gives_equal_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    ours = tokenizer(TEXTS, verbose=False).input_ids
    assert len({tuple(ids) for ids in ours}) == len(TEXTS)
    for loader in (CLIPTokenizer, AutoTokenizer):
        theirs = loader.from_pretrained(tmp_path)
        assert isinstance(theirs, CLIPTokenizer)
        assert theirs(TEXTS, verbose=False).input_ids == ours
        assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert theirs.model_max_length == 16 and len(theirs) == len(tokenizer)
        assert theirs(TEXTS[:1], truncation=True, max_length=5).input_ids[0][-1] == tokenizer.eos_token_id


def test_training_is_deterministic_and_independent_of_the_order_of_ties():
    state = [json.dumps(train_tokenizer(list(CAPTIONS), 16).get_vocab(), sort_keys=True) for _ in range(5)]
    assert len(set(state)) == 1


def test_vocab_size_is_respected_and_refused_if_too_small():
    assert len(train_tokenizer(CAPTIONS, 16, vocab_size=520)) == 520
    with pytest.raises(ValueError, match=r"vocab_size=500.*514"):
        train_tokenizer(CAPTIONS, 16, vocab_size=500)
