# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Train a tokenizer on captions. It has the format of CLIP's tokenizer, so its saved folder is a `CLIPTokenizer`."""

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
    """Train byte-level BPE on captions.

    The vocabulary has the layout of CLIP's: the 256 bytes, the 256 bytes at the end of a word, the merges in order,
    BOS, and EOS with the highest id. It holds every byte, so no text is unknown.

    Args:
        captions: the texts to train on.
        max_seq_length: longest text in tokens that the tokenizer states, with BOS and EOS.
        vocab_size: largest number of tokens; few captions give fewer.

    Raises:
        ValueError: if `vocab_size` is too small for the bytes.
    """
    characters = list(bytes_to_unicode().values())
    alphabet = characters + [character + END_OF_WORD for character in characters]
    num_merges = vocab_size - len(alphabet) - len(SPECIAL_TOKENS)
    if num_merges < 0:
        raise ValueError(
            f"vocab_size={vocab_size}: choose at least {vocab_size - num_merges}, which the bytes alone need."
        )

    # Step (1): CLIP's text normalisation and its split into words, with an empty BPE.
    clip = CLIPTokenizer().backend_tokenizer
    tokenizer = Tokenizer(BPE(end_of_word_suffix=END_OF_WORD))
    tokenizer.normalizer, tokenizer.pre_tokenizer = clip.normalizer, clip.pre_tokenizer

    # Step (2): learn the merges. The alphabet consists of special tokens, because only their ids are fixed. The trainer
    # numbers other tokens in the order of a hash map, and breaks ties between merges by these numbers.
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + num_merges,
        min_frequency=2,
        special_tokens=alphabet,
        end_of_word_suffix=END_OF_WORD,
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]

    # Step (3): build the vocabulary in CLIP's layout.
    tokens = dict.fromkeys([*alphabet, *("".join(pair) for pair in merges), *SPECIAL_TOKENS])
    vocab = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_seq_length)  # type: ignore[arg-type]
