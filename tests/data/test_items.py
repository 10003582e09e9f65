# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Items depend on the seed alone; a stream yields each row once per pass; unusable rows become error items."""

import itertools
import re

import datasets
import pytest
import torch
from data_cases import encoded, image_dataset, pairs, picture, write_tar
from datasets import Dataset, Features, Value
from torch.utils.data import ConcatDataset, DataLoader, StackDataset, Subset

from modeling_mlip.data.collators import PairCollator
from modeling_mlip.data.columns import find_columns
from modeling_mlip.data.images import augmentation, read_image
from modeling_mlip.data.items import (
    KeptPairs,
    PairDataset,
    StreamedPairDataset,
    build_pairs,
    set_epoch,
    split_by_process,
)
from modeling_mlip.data.sources import load_pairs

# Items


def test_random_choices_depend_on_seed_epoch_and_index_alone(transform):
    data = image_dataset([encoded(picture())] * 6, [[f"caption {n}" for n in range(20)]] * 6)
    state = torch.get_rng_state()

    def read(epoch=0, workers=0, seed=0):
        dataset = PairDataset(data, "image", "caption", transform, True, seed, augmentation(32))
        dataset.set_epoch(epoch)
        items = list(DataLoader(dataset, batch_size=None, num_workers=workers))
        return [item["captions"][0] for item in items], torch.stack([item["pixel_values"] for item in items])

    captions, pixels = read()
    assert len(set(captions)) > 2 and not torch.equal(pixels[0], pixels[1])
    for other_captions, other_pixels, same in [
        (*read(), True),
        (*read(workers=2), True),
        (*read(epoch=1), False),
        (*read(seed=1), False),
    ]:
        assert (other_captions == captions) == same
        assert torch.equal(other_pixels, pixels) == same
    alone = PairDataset(data, "image", "caption", transform, True, 0, augmentation(32))[4]
    assert alone["captions"] == captions[4:5] and torch.equal(alone["pixel_values"], pixels[4])

    dataset = PairDataset(data, "image", "caption", transform, True, 0, augmentation(32))
    state = torch.get_rng_state()
    dataset[0]
    assert torch.equal(torch.get_rng_state(), state)


def test_kept_items_equal_new_ones_and_are_made_once(transform, monkeypatch):
    dataset = pairs(image_dataset([encoded(picture(n)) for n in range(3)], ["a", "b", "c"]), transform, training=True)
    kept = KeptPairs(dataset)
    expected = [dataset[index] for index in range(3)]
    first = [kept[index] for index in range(3)]
    first[0].pop("captions")  # as a collator may do
    monkeypatch.setattr(PairDataset, "item", None)  # a second decoding would fail
    for index, item in enumerate(expected):
        again = kept[index]
        assert torch.equal(again.pop("pixel_values"), item.pop("pixel_values")) and again == item
    assert len(kept) == 3


@pytest.mark.parametrize("changes", [{"augment": True}, {"caption_policy": "random"}, {"stream": True}])
def test_items_that_change_cannot_be_kept_in_memory(changes):
    rows = image_dataset([encoded(picture())], ["a"])
    rows = rows.to_iterable_dataset() if changes.pop("stream", False) else rows
    options = {"augment": False, "caption_policy": "first", **changes}
    with pytest.raises(ValueError, match="keep_in_memory=True needs items"):
        build_pairs(rows, None, training=True, keep_in_memory=True, **options)


def test_persistent_workers_see_the_epoch_change(transform):
    dataset = pairs(image_dataset([encoded(picture())] * 4, [list("abcdefghij")] * 4), transform, training=True)
    loader = DataLoader(dataset, batch_size=None, num_workers=1, persistent_workers=True)
    epochs = []
    for epoch in (0, 1, 0):
        dataset.set_epoch(epoch)
        epochs.append([item["captions"] for item in loader])
    assert epochs[0] == epochs[2] != epochs[1]


# Streams

NUM_ROWS, NUM_SHARDS = 26, 5  # shards of 6, 5, 5, 5 and 5 rows, which neither processes nor workers divide


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> dict[str, str]:
    """The same rows as parquet and as tar shards, as patterns."""
    root = tmp_path_factory.mktemp("shards")
    rows = image_dataset([encoded(picture(n)) for n in range(NUM_ROWS)], [f"caption {n}" for n in range(NUM_ROWS)])
    for index in range(NUM_SHARDS):
        shard = rows.shard(NUM_SHARDS, index)
        shard.to_parquet(root / f"{index}.parquet")
        files = []
        for number, row in enumerate(shard.cast_column("image", datasets.Image(decode=False))):
            files += [(f"{number}.png", row["image"]["bytes"]), (f"{number}.txt", row["caption"].encode())]
        write_tar(root / f"{index}.tar", files)
    return {kind: str(root / f"*.{kind}") for kind in ("parquet", "tar")}


def stream(pattern: str, transform, training=True, seed=0) -> StreamedPairDataset:
    rows = load_pairs(train_file=pattern, streaming=True)["train"]
    return StreamedPairDataset(rows, *find_columns(rows), transform, training, seed)


class Worker:
    """The worker info of torch, so that one process can simulate all workers."""

    def __init__(self, id: int, num_workers: int):
        self.id, self.num_workers, self.seed, self.dataset = id, num_workers, id, None


def passes(stream, monkeypatch, processes=1, workers=1, count=1) -> list[list[list[str]]]:
    """Return the captions of each reader in its first passes: pass -> reader -> captions."""
    seen: list[list[list[str]]] = [[] for _ in range(count)]
    for rank in range(processes):
        share = stream.for_process(rank, processes)
        for worker in range(workers):
            monkeypatch.setattr(torch.utils.data, "get_worker_info", lambda worker=worker: Worker(worker, workers))
            for number in range(count):
                seen[number].append([])
            for item in share:
                _, number, _ = item["position"]
                if number == count:
                    break
                seen[number][-1] += item["captions"]
    return seen


@pytest.mark.parametrize("kind", ["parquet", "tar"])
@pytest.mark.parametrize("processes, workers", [(2, 2), (5, 1), (1, 5), (2, 1)])
def test_a_pass_of_all_processes_and_workers_reads_each_row_once(
    kind, processes, workers, shards, transform, monkeypatch
):
    everything = sorted(f"caption {n}" for n in range(NUM_ROWS))
    for readers in passes(stream(shards[kind], transform), monkeypatch, processes, workers, count=3):
        assert len(readers) == processes * workers
        assert sorted(sum(readers, [])) == everything
        assert all(readers)


def test_many_shards_are_assigned_whole_and_few_row_by_row(monkeypatch):
    dataset = Dataset.from_dict({"n": range(70)})
    for num_shards, whole in [(4, True), (33, True), (5, False)]:
        shares = [split_by_process(dataset.to_iterable_dataset(num_shards), rank, 2) for rank in (0, 1)]
        rows = [[row["n"] for row in share] for share in shares]
        assert sorted(rows[0] + rows[1]) == list(range(70))
        assert (shares[0].num_shards < num_shards) == whole


def test_the_order_of_a_stream_depends_on_seed_and_pass_alone(shards, transform, monkeypatch):
    first = passes(stream(shards["tar"], transform), monkeypatch, processes=2, workers=2, count=2)
    assert first == passes(stream(shards["tar"], transform), monkeypatch, processes=2, workers=2, count=2)
    assert first[0] != first[1]
    assert [set(reader) for reader in first[0]] != [
        set(reader) for reader in first[1]
    ]  # other shards in the second pass
    assert first != passes(stream(shards["tar"], transform, seed=1), monkeypatch, processes=2, workers=2, count=2)
    second = passes(stream(shards["tar"], transform), monkeypatch, count=2)[1][0]
    started_later = stream(shards["tar"], transform)
    started_later.set_epoch(1)
    assert second == [item["captions"][0] for item in itertools.islice(started_later, NUM_ROWS)]


def test_real_workers_read_what_simulated_ones_read(shards, transform, tokenizer, monkeypatch):
    loader = DataLoader(
        stream(shards["parquet"], transform), batch_size=3, num_workers=2, collate_fn=lambda items: items
    )
    batches = [[item["captions"][0] for item in batch] for batch in itertools.islice(loader, 6)]
    simulated = passes(stream(shards["parquet"], transform), monkeypatch, workers=2, count=2)
    simulated = [sum(readers, []) for readers in zip(*simulated, strict=True)]
    assert batches[0::2] == [simulated[0][start : start + 3] for start in (0, 3, 6)]
    assert batches[1::2] == [simulated[1][start : start + 3] for start in (0, 3, 6)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_at_the_position_of_each_worker(workers, shards, transform, tokenizer):
    collate = PairCollator(tokenizer, 8)
    options = dict(batch_size=4, num_workers=workers, collate_fn=collate)
    whole = list(itertools.islice(DataLoader(stream(shards["tar"], transform), **options), 20))
    for after in (1, 5, 13):  # the last in the second pass
        positions = {}
        for batch in whole[:after]:
            positions |= batch["position"]
        resumed = stream(shards["tar"], transform)
        resumed.resume(positions, batches=after, batch_size=4)
        batches = list(itertools.islice(DataLoader(resumed, **options), 20))
        assert batches[:after] == [{}] * after
        for ours, theirs in zip(batches[after:], whole[after:], strict=True):
            assert ours["names"] == theirs["names"] and ours["position"] == theirs["position"]
            assert torch.equal(ours["pixel_values"], theirs["pixel_values"])
            assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_a_resumed_stream_does_not_decode_skipped_rows(shards, transform, monkeypatch):
    resumed = stream(shards["tar"], transform)
    resumed.resume({0: (1, 20)}, batches=40, batch_size=1)
    decoded = []
    monkeypatch.setattr(
        "modeling_mlip.data.items.read_image", lambda data, path: decoded.append(path) or read_image(data, path)
    )
    items = list(itertools.islice(resumed, 43))
    assert items[:40] == [None] * 40 and [item["position"][2] for item in items[40:]] == [21, 22, 23]
    assert len(decoded) == 3


def test_a_worker_without_rows_is_an_error(transform):
    rows = Dataset.from_dict({"image": [None], "caption": ["a"]}).to_iterable_dataset()
    share = StreamedPairDataset(rows, "image", "caption", transform, True, 0).for_process(1, 2)
    with pytest.raises(ValueError, match="process 1.*fewer rows.*dataloader workers"):
        next(iter(share))


def test_evaluation_reads_each_row_of_a_stream_once_and_in_order(shards, transform):
    dataset = stream(shards["parquet"], transform, training=False)
    plain = [item["captions"][0] for item in dataset]
    assert plain == [f"caption {n}" for start in range(NUM_SHARDS) for n in shard_rows(start)]
    over_workers = DataLoader(dataset, batch_size=None, num_workers=2)
    assert sorted(item["captions"][0] for item in over_workers) == sorted(plain)


def shard_rows(index: int) -> list[int]:
    return Dataset.from_dict({"n": range(NUM_ROWS)}).shard(NUM_SHARDS, index)["n"][:]


def test_a_row_of_a_tar_shard_is_named_by_its_file(shards, transform):
    item = next(iter(stream(shards["tar"], transform)))
    assert re.fullmatch(r"\d of .*\d\.tar", item["where"])
    item = next(iter(stream(shards["parquet"], transform)))
    assert item["where"] == "row 0 of worker 0 of process 0 in pass 0"


# Rows that cannot be used


def test_a_broken_row_becomes_an_error_item_and_the_next_row_is_read(tmp_path, transform):
    image = encoded(picture())
    missing = str(tmp_path / "missing.png")
    rows = [(image, "a"), (image[: len(image) // 2], "a"), (b"text", "a"), (missing, "a"), (None, "a")]
    rows += [(image, ""), (image, "  "), (image, None), (image, "b")]
    dataset = image_dataset(*map(list, zip(*rows, strict=True)))
    expected = [None, "truncated", "not an image", "No such file", "no image", *["caption is empty"] * 3, None]
    for training in (False, True):
        items = list(pairs(dataset, transform, training=training))
        assert len(items) == len(expected)
        for index, (item, reason) in enumerate(zip(items, expected, strict=True)):
            assert ("error" in item) == (reason is not None) == ("pixel_values" not in item)
            if reason:
                assert reason in item["error"] and "\n" not in item["error"]
            assert item["where"].startswith(f"row {index}")
        assert missing in items[3]["where"]
    assert list(pairs(dataset, transform))[2] == list(pairs(dataset, transform))[2]
    streamed = StreamedPairDataset(dataset.to_iterable_dataset(), "image", "caption", transform, False, 0)
    assert ["error" in item for item in streamed] == [reason is not None for reason in expected]


def test_evaluation_gives_all_captions_and_training_one_of_them(transform):
    dataset = image_dataset([encoded(picture())] * 40, [["one", "", " two ", None, "three"]] * 40)
    assert pairs(dataset, transform)[0]["captions"] == ["one", "two", "three"]
    chosen = [item["captions"] for item in pairs(dataset, transform, training=True)]
    assert {len(captions) for captions in chosen} == {1}
    assert {captions[0] for captions in chosen} == {"one", "two", "three"}


def test_the_caption_policy_changes_captions_and_nothing_else(transform, tokenizer):
    dataset = image_dataset([encoded(picture(n), "PNG") for n in (0, 1)], [["one", "two", "three"], ["four"]])
    read = {
        policy: list(pairs(dataset, transform, True, augmentation=augmentation(32), caption_policy=policy))
        for policy in ("first", "random", "all")
    }
    assert [item["captions"] for item in read["first"]] == [["one"], ["four"]]
    assert [item["captions"] for item in read["all"]] == [["one", "two", "three"], ["four"]]
    for policy, items in read.items():
        for ours, theirs in zip(items, read["random"], strict=True):
            assert torch.equal(ours["pixel_values"], theirs["pixel_values"]), policy
    assert pairs(dataset, transform, caption_policy="first")[0]["captions"] == ["one", "two", "three"]  # evaluation
    batch = PairCollator(tokenizer, 8)(read["all"])  # an image comes once for each of its captions
    assert len(batch["input_ids"]) == len(batch["pixel_values"]) == len(batch["names"]) == 4
    assert len(set(batch["image_ids"][:3].tolist())) == 1 and batch["image_ids"][3] != batch["image_ids"][0]


def test_columns_of_plain_bytes_are_images_too(transform):
    features = Features({"image": Value("binary"), "caption": Value("string")})
    dataset = Dataset.from_dict({"image": [encoded(picture(4))], "caption": ["a"]}, features=features)
    assert torch.equal(pairs(dataset, transform)[0]["pixel_values"], transform(picture(4)))


def test_images_of_every_form_give_the_same_pixels(tmp_path, transform):
    picture(4).save(tmp_path / "a.png")
    path, data = str(tmp_path / "a.png"), encoded(picture(4))
    forms = {
        "paths": Dataset.from_dict({"image": [path], "caption": ["a"]}),
        "URLs": Dataset.from_dict({"image": [f"file://{path}"], "caption": ["a"]}),
        "bytes": Dataset.from_dict({"image": [data], "caption": ["a"]}),
        "structs": Dataset.from_dict({"image": [{"bytes": data, "path": None}], "caption": ["a"]}),
        "decoded images": image_dataset([data], ["a"]),
        "images of torch": image_dataset([data], ["a"]).with_format("torch"),
        "images of a transform": image_dataset([data], ["a"]).with_transform(
            lambda rows: {"image": [picture(4) for _ in rows["image"]], "caption": rows["caption"]}
        ),
    }
    for form, rows in forms.items():
        item = pairs(rows, transform)[0]
        assert item.get("error") is None, form
        assert torch.equal(item["pixel_values"], transform(picture(4))), form
    decoded = datasets.IterableDataset.from_generator(lambda: iter([{"image": picture(4), "caption": "a"}] * 2))
    items = list(StreamedPairDataset(decoded, "image", "caption", transform, False, 0))
    assert torch.equal(items[0]["pixel_values"], transform(picture(4)))
    assert items[0]["image_id"] == items[1]["image_id"]


def test_the_epoch_reaches_data_sets_inside_any_wrapping(transform):
    rows = image_dataset([encoded(picture())] * 6, [list("abcdefghij")] * 6)
    first, second = (pairs(rows, transform, training=True) for _ in range(2))
    wrapped = ConcatDataset([Subset(Subset(first, range(4)), range(3)), second])
    epochs = []
    for epoch in (0, 1, 0):
        set_epoch(wrapped, epoch)
        epochs.append([wrapped[index]["captions"] for index in range(len(wrapped))])
        plain = pairs(rows, transform, training=True)
        plain.set_epoch(epoch)
        assert epochs[-1] == [plain[index]["captions"] for index in (*range(3), *range(6))]
    assert epochs[0] == epochs[2] != epochs[1]
    set_epoch(StackDataset(a=first, b=[1] * 6), 7)
    assert int(first._epoch) == 7
    set_epoch([1, 2], 3)  # nothing inside has an epoch


def test_an_unknown_caption_policy_is_refused(transform):
    with pytest.raises(ValueError, match="caption_policy='last': choose one of first, random, all"):
        pairs(image_dataset([encoded(picture())], ["a"]), transform, caption_policy="last")
