# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Batches hold the right rows, captions and ids."""

import pytest
import torch
from data_cases import encoded, image_dataset, pairs, picture

from modeling_mlip.data.collators import EvaluationCollator, PairCollator
from modeling_mlip.data.items import stable_hash


def test_truncated_captions_keep_bos_and_eos_and_are_counted(transform, tokenizer):
    captions = ["a red square", "a green square " * 10, "a"]
    items = list(pairs(image_dataset([encoded(picture(n)) for n in range(3)], captions), transform))
    batch = PairCollator(tokenizer, max_seq_length=8)(items)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert ids.shape == mask.shape == (3, 8) and ids.dtype == torch.int64
    assert batch["pixel_values"].shape == (3, 3, 32, 32)
    assert batch["num_truncated"] == 1
    assert ids[:, 0].tolist() == [tokenizer.bos_token_id] * 3
    lengths = mask.sum(dim=1)
    assert lengths.tolist() == [5, 8, 3]
    assert ids[torch.arange(3), lengths - 1].tolist() == [tokenizer.eos_token_id] * 3
    assert (ids[mask == 0] == tokenizer.pad_token_id).all() and (mask == 0).any()
    theirs = tokenizer(captions, padding=True, truncation=True, max_length=8, return_tensors="pt")
    assert torch.equal(ids, theirs["input_ids"]) and torch.equal(mask, theirs["attention_mask"])


def test_equal_images_have_equal_ids_and_others_do_not(tmp_path, transform, tokenizer):
    picture(5).save(tmp_path / "5.png")
    images = [encoded(picture(n)) for n in (1, 2, 1)] + [str(tmp_path / "5.png")] * 2
    items = list(pairs(image_dataset(images, list("abcde")), transform))
    ids = PairCollator(tokenizer, 8)(items)["image_ids"]
    assert ids.dtype == torch.int64
    assert ids[0] == ids[2] and ids[3] == ids[4] and len(set(ids.tolist())) == 3
    assert stable_hash("row") == 6322326236435419995  # the same in every process and run


def test_skipped_rows_are_listed_and_a_batch_without_usable_rows_is_an_error(transform, tokenizer):
    dataset = pairs(image_dataset([encoded(picture()), b"text"], ["a red square", "b"]), transform)
    batch = PairCollator(tokenizer, 8)(list(dataset))
    assert len(batch["pixel_values"]) == len(batch["input_ids"]) == len(batch["image_ids"]) == 1
    assert batch["names"] == ["row 0"]
    assert batch["skipped"] == ["row 1: this is not an image of a known format"]
    with pytest.raises(ValueError, match="row 1: this is not an image"):
        PairCollator(tokenizer, 8)([dataset[1]])


def test_an_evaluation_batch_maps_each_caption_to_its_image(transform, tokenizer):
    captions = [["a red square", "a"], ["lost"], ["green"], ["square", "red", "a green"]]
    images = [encoded(picture(0)), b"text", encoded(picture(2)), encoded(picture(3))]
    items = list(pairs(image_dataset(images, captions), transform))
    batch = EvaluationCollator(tokenizer, 8)(items)
    assert batch["caption_image"].tolist() == [0, 0, 1, 2, 2, 2]
    assert batch["kept"].tolist() == [0, 2, 3]
    assert batch["pixel_values"].shape[0] == len(batch["image_ids"]) == 3
    texts = tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)
    assert texts == ["a red square", "a", "green", "square", "red", "a green"]
    assert len(batch["skipped"]) == 1


def test_an_evaluation_batch_without_usable_items_is_empty(transform, tokenizer):
    items = list(pairs(image_dataset([b"text"], ["a"]), transform))
    batch = EvaluationCollator(tokenizer, 8)(items)
    assert [len(batch[name]) for name in ("pixel_values", "kept", "caption_image", "skipped")] == [0, 0, 0, 1]


def test_a_max_seq_length_without_room_for_a_token_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"max_seq_length=2.*3"):
        PairCollator(tokenizer, 2)
