# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Reference pairs: which pairs a batch gets, and that only distillation from the starting model uses them.

test_distillation.py compares the loss with a formula, and mini-batches with whole batches.
"""

import json
import re
from pathlib import Path

import pytest
import torch
from data_cases import encoded, image_dataset, pairs, picture
from train_command_cases import error_of, train_flags
from training_cases import make_processor, make_rows

from modeling_mlip.data.collators import PairCollator
from modeling_mlip.data.items import build_pairs
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.training.reference_pairs import ReferenceCollator


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def collators(processor, rows, **options) -> tuple[PairCollator, ReferenceCollator]:
    collate_fn = PairCollator(processor.tokenizer, 12)
    return collate_fn, ReferenceCollator(collate_fn, build_pairs(rows, processor, training=True), **options)


def captions_of(batch: dict, processor) -> set[str]:
    """The reference captions without spaces, which the tokenizer changes."""
    texts = processor.tokenizer.batch_decode(batch["reference_input_ids"], skip_special_tokens=True)
    return {text.replace(" ", "") for text in texts}


def test_a_batch_gets_as_many_reference_pairs_chosen_by_its_captions_and_the_seed(processor):
    rows = make_rows(20)
    items = list(build_pairs(rows, processor, training=False))
    plain, with_references = collators(processor, rows)
    batch, again = with_references(items[:6]), with_references(items[:6])
    for name, tensor in plain(items[:6]).items():
        assert torch.equal(batch[name], tensor) if isinstance(tensor, torch.Tensor) else batch[name] == tensor
    assert batch["reference_pixel_values"].shape == (6, 3, 32, 32)
    assert captions_of(batch, processor) <= {caption.replace(" ", "") for caption in rows["caption"]}
    assert all(torch.equal(batch[name], again[name]) for name in batch if name.startswith("reference_"))
    for other in (with_references(items[6:12]), collators(processor, rows, seed=1)[1](items[:6])):
        assert not torch.equal(other["reference_pixel_values"], batch["reference_pixel_values"])
    assert with_references([None] * 6) == {}


def test_broken_reference_pairs_are_replaced_and_listed(processor, transform):
    broken = pairs(image_dataset([encoded(picture()), b"no image"], ["a red circle", "a blue star"]), transform)
    collate_fn = PairCollator(processor.tokenizer, 12)
    items = list(build_pairs(make_rows(8), processor, training=False))
    batch = ReferenceCollator(collate_fn, broken)(items)
    assert captions_of(batch, processor) == {"aredcircle"} and len(batch["reference_pixel_values"]) == 8
    assert batch["skipped"] and all(text.startswith("reference row 1: ") for text in batch["skipped"])
    with pytest.raises(ValueError, match="The reference data set is empty or a stream"):
        ReferenceCollator(collate_fn, make_rows(4).to_iterable_dataset())


def test_the_command_keeps_the_embeddings_of_a_reference_file(drawn, trained, tmp_path, capfd):
    flags = ["--model_name_or_path", trained, "--reference_file", drawn[1], "--reference_weight", "3"]
    flags += ["--sweep", "false"]
    assert mlip(train_flags(drawn, str(tmp_path / "run"), *flags)) == 0
    logs = json.loads((Path(tmp_path) / "run" / "trainer_state.json").read_text())["log_history"]
    losses = [entry for entry in logs if "reference_loss" in entry]
    assert len(losses) == 4 and losses[0]["reference_loss"] < losses[-1]["reference_loss"]
    for entry in losses:
        expected = entry["spatial_loss"] + entry["frequency_loss"] + 0.1 * entry["token_loss"]
        assert entry["loss"] == pytest.approx(expected + 3 * entry["reference_loss"], abs=2e-3)
    capfd.readouterr()
    for wrong, message in (
        (["--reference_weight", "3"], "--reference_weight 3 has no effect without --reference_file"),
        (["--reference_file", drawn[1]], "--reference_file .* keeps what a model knew before training: give it as"),
        ([*flags, "--do_eval"], "--reference_file .* has no effect without training"),
    ):
        assert mlip(train_flags(drawn, str(tmp_path / "none"), *wrong)) == 1
        assert re.search(message, error_of(capfd.readouterr().err))
