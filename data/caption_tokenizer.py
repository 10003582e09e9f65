# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A tokenizer trained on the captions, in CLIP's exact format: a saved folder is a normal `CLIPTokenizer`."""

import json
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

END_OF_WORD = "</w>"
SPECIAL_TOKENS = ("<|startoftext|>", "<|endoftext|>")


def train_tokenizer(captions: Iterable[str], max_seq_length: int, vocab_size: int = 8192) -> CLIPTokenizer:
    """Train byte-level BPE on the captions.

    The vocabulary is laid out as CLIP's: the 256 bytes, the same at the end of a word, the merges in order, BOS, and
    EOS with the highest id. Every byte is in it, so no text is unknown; few captions give fewer tokens than
    `vocab_size`.
    """
    characters = list(bytes_to_unicode().values())
    alphabet = characters + [character + END_OF_WORD for character in characters]
    num_merges = vocab_size - len(alphabet) - len(SPECIAL_TOKENS)
    if num_merges < 0:
        raise ValueError(
            f"vocab_size={vocab_size}: choose at least {vocab_size - num_merges}, the bytes alone need it."
        )

    # Step (1): CLIP's own text normalisation and word split, with an empty BPE behind them.
    clip = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = clip.normalizer, clip.pre_tokenizer

    # Step (2): learn the merges. The alphabet goes in as special tokens because they alone have fixed ids: the trainer
    # numbers all others in the order of a hash map, and breaks ties between merges by these numbers.
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + num_merges,
        min_frequency=2,
        special_tokens=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]

    # Step (3): CLIP's layout.
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), *SPECIAL_TOKENS])
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_seq_length)  # type: ignore[arg-type]
