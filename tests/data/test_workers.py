# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Dataloader workers of every start method read what the main process reads."""

import itertools
import multiprocessing
import pickle

import pytest
import torch
from data_cases import encoded, image_dataset, picture, write_tar
from torch.utils.data import DataLoader, Subset
from transformers import CLIPProcessor

from modeling_mlip.data import build_pairs, load_pairs, set_epoch
from modeling_mlip.data.collators import EvaluationCollator, PairCollator
from modeling_mlip.data.items import PairDataset, StreamedPairDataset
from modeling_mlip.evaluation.labels import Classes, LabelCollator, LabelledImages, StreamedLabelledImages

START_METHODS = [
    method for method in ("fork", "spawn", "forkserver") if method in multiprocessing.get_all_start_methods()
]


@pytest.fixture(scope="module")
def processor(transform, tokenizer) -> CLIPProcessor:
    return CLIPProcessor(image_processor=transform.image_processor, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def rows():
    return image_dataset(
        [encoded(picture(n)) for n in range(8)], [[f"caption {n} {m}" for m in range(9)] for n in range(8)]
    )


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, str]:
    """Eight pairs in two shards, as tar, csv and parquet."""
    root = tmp_path_factory.mktemp("shards")
    for shard in (0, 1):
        numbers = range(4 * shard, 4 * shard + 4)
        write_tar(
            root / f"{shard}.tar",
            [
                (f"{n}.{kind}", data)
                for n in numbers
                for kind, data in (("png", encoded(picture(n))), ("txt", b"a red"))
            ],
        )
        image_dataset([encoded(picture(n)) for n in numbers], ["a red"] * 4).to_parquet(root / f"{shard}.parquet")
        for n in numbers:
            picture(n).save(root / f"{n}.png")
        (root / f"{shard}.csv").write_text("image,caption\n" + "".join(f"{n}.png,a red\n" for n in numbers))
    return {kind: str(root / f"*.{kind}") for kind in ("tar", "csv", "parquet")}


@pytest.mark.parametrize("start_method", START_METHODS)
def test_persistent_workers_of_every_start_method_follow_the_epoch(start_method, rows, processor, tokenizer):
    """The set epoch reaches workers that live on, through a Subset too, and the batches are those of this process."""
    dataset = build_pairs(rows, processor, training=True)
    options = dict(batch_size=4, collate_fn=PairCollator(tokenizer, 8))
    subset = Subset(dataset, range(8))
    workers = DataLoader(
        subset, num_workers=1, persistent_workers=True, multiprocessing_context=start_method, **options
    )
    pixels = []
    for epoch in (0, 1):
        set_epoch(subset, epoch)
        for ours, theirs in zip(workers, DataLoader(dataset, **options), strict=True):
            assert ours["names"] == theirs["names"]
            assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
            assert torch.equal(ours["input_ids"], theirs["input_ids"])
            pixels.append(ours["pixel_values"])
    assert not torch.equal(pixels[0], pixels[2])


@pytest.mark.parametrize("start_method", [method for method in START_METHODS if method != "spawn"])
def test_workers_read_streams_whether_forked_or_not(start_method, shards, processor, tokenizer):
    """Workers of "spawn" get the same pickle as those of "forkserver"."""
    stream = load_pairs(train_file=shards["tar"], streaming=True)["train"]
    dataset = build_pairs(stream, processor, training=False)
    options = dict(batch_size=4, collate_fn=EvaluationCollator(tokenizer, 8))
    workers = list(DataLoader(dataset, num_workers=1, multiprocessing_context=start_method, **options))
    for ours, theirs in zip(workers, DataLoader(dataset, **options), strict=True):
        assert ours["names"] == theirs["names"]
        assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize("kind", ["tar", "csv", "parquet"])
@pytest.mark.parametrize("training", [False, True])
def test_every_stream_can_be_pickled_and_reads_the_same_rows(kind, training, shards, processor):
    stream = load_pairs(train_file=shards[kind], streaming=True)["train"]
    dataset = build_pairs(stream, processor, training=training).for_process(0, 1)
    copied = pickle.loads(pickle.dumps(dataset))
    ours, theirs = (list(itertools.islice(items, 12 if training else None)) for items in (copied, dataset))
    assert len(ours) == (12 if training else 8) and not any("error" in item for item in ours)
    for item, expected in zip(ours, theirs, strict=True):
        assert item["where"] == expected["where"] and torch.equal(item["pixel_values"], expected["pixel_values"])


def test_everything_that_evaluation_gives_to_workers_can_be_pickled(rows, transform, tokenizer):
    labelled = rows.add_column("label", ["a", "b"] * 4)
    classes = [Classes("label", ["a", "b"], {"a": 0, "b": 1})]
    for kind, data in ((LabelledImages, labelled), (StreamedLabelledImages, labelled.to_iterable_dataset())):
        items = list(pickle.loads(pickle.dumps(kind(data, "image", classes, transform))))
        assert [item["labels"] for item in items] == [[0], [1]] * 4
    for collator in (LabelCollator(), EvaluationCollator(tokenizer, 8), PairCollator(tokenizer, 8)):
        assert type(pickle.loads(pickle.dumps(collator))) is type(collator)
    for dataset in (
        PairDataset(rows, "image", "caption", transform, True, 0),
        StreamedPairDataset(rows.to_iterable_dataset(), "image", "caption", transform, False, 0),
    ):
        assert "captions" in next(iter(pickle.loads(pickle.dumps(dataset))))
