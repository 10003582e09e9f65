# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Every source gives the same pairs; pixels equal the processor's; what is broken is skipped, counted and budgeted."""

import csv
import io
import itertools
import json
import re
import tarfile
import time
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, Value
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessor

from modeling_mlip.data.arguments import DataArguments
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.data.collators import EvaluationCollator, PairCollator
from modeling_mlip.data.columns import find_columns
from modeling_mlip.data.items import (
    PairDataset,
    StreamedPairDataset,
    augmentation,
    image_transform,
    read_image,
    split_by_process,
    stable_hash,
)
from modeling_mlip.data.shapes import shapes_dataset
from modeling_mlip.data.skip_budget import SkipBudget
from modeling_mlip.data.sources import load_pairs

CAPTIONS = ["a red square", "a green square", "None", "a blue square"]
COLOURS = ["red", "green", "black", "blue"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["a red square", "a green square"] * 2, max_seq_length=8)


@pytest.fixture(scope="module")
def transform():
    return image_transform(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}))


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def image_dataset(images: list[bytes | str | None], captions: list) -> Dataset:
    cells = [{"bytes": None, "path": image} if isinstance(image, str) else {"bytes": image} for image in images]
    cells = [None if image is None else {"path": None} | cell for image, cell in zip(images, cells, strict=True)]
    dataset = Dataset.from_dict({"image": cells, "caption": captions})
    return dataset.cast_column("image", datasets.Image())


def pairs(dataset: Dataset, transform, training: bool = False, **options) -> PairDataset:
    return PairDataset(dataset, "image", "caption", transform, training=training, seed=0, **options)


# Sources: each writes the four pairs of COLOURS and CAPTIONS, and says which flags read them.


def write_images(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for colour in COLOURS:
        Image.new("RGB", (32, 32), colour).save(folder / f"{colour}.png")


def csv_source(root):
    write_images(root / "table" / "pictures")
    with open(root / "table" / "pairs.csv", "w", newline="") as file:
        rows = [(f"pictures/{colour}.png", caption) for colour, caption in zip(COLOURS, CAPTIONS, strict=True)]
        csv.writer(file).writerows([("image_path", "caption"), *rows])
    return {"train_file": str(root / "table" / "pairs.csv")}


def tsv_source(root):
    write_images(root / "pictures")
    rows = [f"{root}/pictures/{colour}.png\t{caption}" for colour, caption in zip(COLOURS, CAPTIONS, strict=True)]
    (root / "pairs.tsv").write_text("\n".join(["filepath\ttitle", *rows]) + "\n")
    return {"train_file": str(root / "pairs.tsv")}


def jsonl_source(root):
    write_images(root / "pictures")
    rows = [
        {"image": f"pictures/{colour}.png", "captions": [text]} for colour, text in zip(COLOURS, CAPTIONS, strict=True)
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train_file": str(root / "pairs.jsonl")}


def folders_source(root):
    # Two tables of the same name, each with paths relative to its own folder.
    for index in (0, 1):
        part = root / "parts" / str(index)
        part.mkdir(parents=True)
        rows = [{"image": f"{n}.png", "caption": CAPTIONS[2 * index + n]} for n in (0, 1)]
        (part / "pairs.json").write_text(json.dumps(rows))
        for n in (0, 1):
            Image.new("RGB", (32, 32), COLOURS[2 * index + n]).save(part / f"{n}.png")
    return {"train_file": str(root / "parts" / "*" / "pairs.json")}


def parquet_source(root):
    (root / "both").mkdir()
    images = [encoded(Image.new("RGB", (32, 32), colour)) for colour in COLOURS]
    image_dataset(images, CAPTIONS).to_parquet(root / "both" / "train.parquet")
    image_dataset(images[:1], CAPTIONS[:1]).to_parquet(root / "both" / "test.parquet")
    return {"dataset_name": str(root / "both")}


def imagefolder_source(root):
    write_images(root / "folder")
    rows = [{"file_name": f"{colour}.png", "text": caption} for colour, caption in zip(COLOURS, CAPTIONS, strict=True)]
    (root / "folder" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"data_dir": str(root / "folder")}


def tar_source(root, caption_file="{}.txt", encode=str.encode):
    (root / "shards").mkdir(exist_ok=True)
    for shard in (0, 1):
        with tarfile.open(root / "shards" / f"{shard:04}.tar", "w") as tar:
            for index in (2 * shard, 2 * shard + 1):
                image = encoded(Image.new("RGB", (32, 32), COLOURS[index]))
                files = {f"{index}.png": image, caption_file.format(index): encode(CAPTIONS[index])}
                for name, data in files.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return {"data_dir": str(root / "shards")}


def tar_file_source(root):
    tar_source(root, "{}.json", lambda caption: json.dumps({"caption": caption, "width": 32}).encode())
    return {"train_file": str(root / "shards" / "*.tar")}


SOURCES = [
    *(csv_source, tsv_source, jsonl_source, folders_source, parquet_source),
    *(imagefolder_source, tar_source, tar_file_source),
]


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_the_same_pairs(source, streaming, tmp_path, transform, monkeypatch):
    args = DataArguments(**source(tmp_path), streaming=streaming)
    monkeypatch.chdir("/")  # paths are relative to the table, not to where the program runs
    loaded = load_pairs(**args.source(), **args.columns())
    assert set(loaded) == ({"train", "validation"} if source is parquet_source else {"train"})
    dataset = loaded["train"]
    kind = StreamedPairDataset if streaming else PairDataset
    items = list(kind(dataset, *find_columns(dataset, **args.columns()), transform, training=False, seed=0))
    assert [item.get("error") for item in items] == [None] * 4
    assert [item["captions"] for item in items] == [[caption] for caption in CAPTIONS]
    for item, colour in zip(items, COLOURS, strict=True):
        assert torch.equal(item["pixel_values"], transform(Image.new("RGB", (32, 32), colour)))
    assert len({item["image_id"] for item in items}) == 4


@pytest.mark.parametrize("streaming", [False, True])
def test_sample_limits_and_the_embedded_data_set(streaming, monkeypatch):
    monkeypatch.setattr("modeling_mlip.data.sources.shapes_dataset", lambda: shapes_dataset(20, 10))
    args = DataArguments(dataset_name="shapes", streaming=streaming, max_train_samples=7, max_eval_samples=2)
    loaded = load_pairs(**args.source(), **args.columns())
    assert [len(list(loaded[split])) for split in ("train", "validation")] == [7, 2]
    assert find_columns(loaded["train"], **args.columns()) == ("image", "caption")


def test_the_columns_named_by_flag_win(tmp_path):
    dataset = Dataset.from_dict({"image": ["a"], "photo": ["b"], "Caption": ["c"], "other": [["d"]], "number": [1]})
    assert find_columns(dataset) == ("image", "Caption")
    assert find_columns(dataset, image_column="photo", caption_column="other") == ("photo", "other")
    with pytest.raises(ValueError, match=r"number.*int64.*--caption_column"):
        find_columns(dataset, caption_column="number")
    with pytest.raises(ValueError, match="--image_column pic: no such column; the columns are image, photo, Caption"):
        find_columns(dataset, image_column="pic")
    with pytest.raises(ValueError, match=r"No caption column.*the columns are image, photo.*--caption_column"):
        find_columns(dataset.remove_columns("Caption"))


def bad_inputs(root):
    write_images(root / "plain")
    (root / "empty").mkdir()
    (root / "empty.csv").write_text("image,caption\n")
    (root / "nocaption.csv").write_text("image,colour\na.png,red\n")
    (root / "broken.parquet").write_bytes(b"not parquet")
    (root / "pairs.xyz").write_text("")
    (root / "pairs.jsonl").write_text('{"image": "a.png", "caption": "a"}\n')
    return [
        ({}, ValueError, "no source.*--dataset_name, --data_dir, --train_file"),
        ({"dataset_name": "shapes", "data_dir": str(root)}, ValueError, "--dataset_name and --data_dir"),
        ({"dataset_name": str(root / "nowhere")}, FileNotFoundError, "nowhere: no such folder"),
        ({"dataset_name": str(root / "empty")}, FileNotFoundError, "empty could not be read"),
        ({"data_dir": str(root / "nowhere")}, FileNotFoundError, "nowhere: no such folder"),
        ({"data_dir": str(root / "plain")}, ValueError, "metadata.csv or metadata.jsonl"),
        ({"train_file": str(root / "no*.parquet")}, FileNotFoundError, "--train_file .*no such file"),
        ({"validation_file": str(root / "no.csv")}, FileNotFoundError, "--validation_file .*no such file"),
        ({"train_file": str(root / "pairs.*")}, ValueError, ".jsonl, .xyz files"),
        ({"train_file": str(root / "pairs.xyz")}, ValueError, ".xyz files; give one kind of .csv"),
        ({"train_file": str(root / "broken.parquet")}, ValueError, "broken.parquet could not be read"),
        ({"train_file": str(root / "empty.csv")}, ValueError, "empty.csv: holds no pairs"),
        ({"train_file": str(root / "nocaption.csv")}, ValueError, "No caption column.*image, colour"),
        (
            {"train_file": str(root / "pairs.jsonl"), "image_column": "x"},
            ValueError,
            "--image_column x.*image, caption",
        ),
    ]


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_bad_input_is_one_clear_line(tmp_path, streaming):
    for flags, kind, message in bad_inputs(tmp_path):
        with pytest.raises(kind, match=message) as caught:
            load_pairs(**flags, streaming=streaming)
        assert "\n" not in str(caught.value)


# Pixels


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (20, 70), (33, 32)])
def test_transform_equals_the_processor(size, transform):
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = picture(1, size)
    theirs = processor(images=[image, image], return_tensors="pt")["pixel_values"][1]
    ours = transform(image)
    assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(transform(pixels), theirs)


def test_a_decoded_item_holds_the_processors_pixels(transform):
    image = picture(2, (40, 36))
    item = pairs(image_dataset([encoded(image)], ["a"]), transform)[0]
    assert torch.equal(item["pixel_values"], transform(image))


def test_transparent_images_lie_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 1)
    for data in (encoded(clear), encoded(palette, transparency=0)):
        pixels = np.asarray(read_image(data, None))
        assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[3, 3].tolist() == [255, 255, 255]


def test_exif_orientation_and_16_bit_grey_are_respected():
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: turn clockwise
    upright = read_image(encoded(image, "JPEG", exif=exif), None)
    assert upright.size == (8, 16)
    assert np.asarray(upright)[2].max() < 50 and np.asarray(upright)[13].min() > 200

    grey = read_image(encoded(Image.fromarray(np.full((4, 4), 128 * 256, dtype=np.uint16))), None)
    assert np.asarray(grey).tolist() == np.full((4, 4, 3), 128).tolist()


def test_augmentation_is_mild_and_never_flips():
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (8, 24, 24, 40))  # on the left
    lefts, sizes, whites = [], [], set()
    for seed in range(50):
        torch.manual_seed(seed)
        pixels = augmentation(64)(image).float().mean(dim=0)
        assert pixels.shape == (64, 64)
        dark = pixels < 100
        assert pixels[:, 40:].min() > 150  # the edge goes on, no black border
        whites.add(pixels[0, 63].item())
        lefts.append(dark.any(dim=0).nonzero().min().item())
        sizes.append(dark.any(dim=0).sum().item())
    assert len(whites) > 10 and 200 < min(whites) < 240
    assert min(lefts) < 6 and 10 < max(lefts) < 24
    assert 12 <= min(sizes) < 16 < max(sizes) <= 20


def test_augmentation_of_a_photo_keeps_its_proportions():
    image = Image.new("RGB", (300, 200), "white")
    image.paste("black", (130, 80, 170, 120))
    torch.manual_seed(0)
    dark = augmentation(64)(image).float().mean(dim=0) < 100
    height, width = dark.any(dim=1).sum().item(), dark.any(dim=0).sum().item()
    assert 9 <= height <= 16 and abs(height - width) <= 1


def test_items_are_fast(transform):
    dataset = pairs(shapes_dataset(200, 0)["train"], transform, training=True, augmentation=augmentation(64))
    start = time.process_time()
    assert len([dataset[index] for index in range(200)]) == 200
    assert time.process_time() - start < 3  # 0.13 s


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


def test_workers_that_live_on_see_the_epoch_change(transform):
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
        with tarfile.open(root / f"{index}.tar", "w") as tar:
            for number, row in enumerate(shard.cast_column("image", datasets.Image(decode=False))):
                for name, data in (
                    (f"{number}.png", row["image"]["bytes"]),
                    (f"{number}.txt", row["caption"].encode()),
                ):
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    return {kind: str(root / f"*.{kind}") for kind in ("parquet", "tar")}


def stream(pattern: str, transform, training=True, seed=0) -> StreamedPairDataset:
    args = DataArguments(train_file=pattern, streaming=True)
    rows = load_pairs(**args.source(), **args.columns())["train"]
    return StreamedPairDataset(rows, *find_columns(rows, **args.columns()), transform, training, seed)


class Worker:
    """What torch tells a worker of itself, so that one process can play them all."""

    def __init__(self, id: int, num_workers: int):
        self.id, self.num_workers, self.seed, self.dataset = id, num_workers, id, None


def passes(stream, monkeypatch, processes=1, workers=1, count=1) -> list[list[list[str]]]:
    """The captions that each reader sees in its first passes: pass -> reader -> captions."""
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
def test_a_pass_of_all_processes_and_workers_shows_each_row_once(
    kind, processes, workers, shards, transform, monkeypatch
):
    everything = sorted(f"caption {n}" for n in range(NUM_ROWS))
    for readers in passes(stream(shards[kind], transform), monkeypatch, processes, workers, count=3):
        assert len(readers) == processes * workers
        assert sorted(sum(readers, [])) == everything
        assert all(readers)


def test_many_shards_are_dealt_out_whole_and_few_row_by_row(monkeypatch):
    dataset = Dataset.from_dict({"n": range(70)})
    for num_shards, whole in [(4, True), (33, True), (5, False)]:
        shares = [split_by_process(dataset.to_iterable_dataset(num_shards), rank, 2) for rank in (0, 1)]
        rows = [[row["n"] for row in share] for share in shares]
        assert sorted(rows[0] + rows[1]) == list(range(70))
        assert (shares[0].num_shards < num_shards) == whole


def test_the_order_of_a_stream_follows_from_seed_and_pass_alone(shards, transform, monkeypatch):
    first = passes(stream(shards["tar"], transform), monkeypatch, processes=2, workers=2, count=2)
    assert first == passes(stream(shards["tar"], transform), monkeypatch, processes=2, workers=2, count=2)
    assert first[0] != first[1]
    assert [set(reader) for reader in first[0]] != [set(reader) for reader in first[1]]  # shards change hands
    assert first != passes(stream(shards["tar"], transform, seed=1), monkeypatch, processes=2, workers=2, count=2)
    second = passes(stream(shards["tar"], transform), monkeypatch, count=2)[1][0]
    started_later = stream(shards["tar"], transform)
    started_later.set_epoch(1)
    assert second == [item["captions"][0] for item in itertools.islice(started_later, NUM_ROWS)]


def test_real_workers_read_what_the_played_ones_do(shards, transform, tokenizer, monkeypatch):
    loader = DataLoader(
        stream(shards["parquet"], transform), batch_size=3, num_workers=2, collate_fn=lambda items: items
    )
    batches = [[item["captions"][0] for item in batch] for batch in itertools.islice(loader, 6)]
    played = passes(stream(shards["parquet"], transform), monkeypatch, workers=2, count=2)
    played = [sum(readers, []) for readers in zip(*played, strict=True)]
    assert batches[0::2] == [played[0][start : start + 3] for start in (0, 3, 6)]
    assert batches[1::2] == [played[1][start : start + 3] for start in (0, 3, 6)]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_resumes_where_each_worker_stood(workers, shards, transform, tokenizer):
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


def test_a_resumed_stream_decodes_nothing_that_it_skips(shards, transform, monkeypatch):
    resumed = stream(shards["tar"], transform)
    resumed.resume({0: (1, 20)}, batches=40, batch_size=1)
    decoded = []
    monkeypatch.setattr(
        "modeling_mlip.data.items.read_image", lambda data, path: decoded.append(path) or read_image(data, path)
    )
    items = list(itertools.islice(resumed, 43))
    assert items[:40] == [None] * 40 and [item["position"][2] for item in items[40:]] == [21, 22, 23]
    assert len(decoded) == 3


def test_a_reader_without_rows_is_told_so(transform):
    rows = Dataset.from_dict({"image": [None], "caption": ["a"]}).to_iterable_dataset()
    share = StreamedPairDataset(rows, "image", "caption", transform, True, 0).for_process(1, 2)
    with pytest.raises(ValueError, match="process 1.*fewer rows.*--dataloader_num_workers"):
        next(iter(share))


def test_evaluation_reads_a_stream_once_in_its_order_over_all_workers(shards, transform):
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


# Rows of no use


def test_a_broken_row_is_an_error_item_and_the_next_is_read(tmp_path, transform):
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


# Batches


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


def test_skipped_rows_are_listed_and_a_batch_of_nothing_else_stops(transform, tokenizer):
    dataset = pairs(image_dataset([encoded(picture()), b"text"], ["a red square", "b"]), transform)
    batch = PairCollator(tokenizer, 8)(list(dataset))
    assert len(batch["pixel_values"]) == len(batch["input_ids"]) == len(batch["image_ids"]) == 1
    assert batch["names"] == ["row 0"]
    assert batch["skipped"] == ["row 1: this is not an image of a known format"]
    with pytest.raises(ValueError, match="row 1: this is not an image"):
        PairCollator(tokenizer, 8)([dataset[1]])


def test_evaluation_batch_says_whose_caption_is_whose(transform, tokenizer):
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


def test_evaluation_batch_of_nothing_of_use_is_empty(transform, tokenizer):
    items = list(pairs(image_dataset([b"text"], ["a"]), transform))
    batch = EvaluationCollator(tokenizer, 8)(items)
    assert [len(batch[name]) for name in ("pixel_values", "kept", "caption_image", "skipped")] == [0, 0, 0, 1]


def test_max_seq_length_without_room_for_a_word_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"max_seq_length=2.*3"):
        PairCollator(tokenizer, 2)


# The budget


def test_budget_counts_each_row_once_and_stops_beyond_its_share():
    budget = SkipBudget(0.01, num_samples=300)
    for _ in range(3):  # epochs
        budget.add(["row 1: empty", "row 5 (a: b.png): gone", "row 7: empty"], seen=300)
    with pytest.raises(ValueError, match=r"Skipped 4 of 300.*0.01 allows 3.*row 1: empty.*--skip_budget"):
        budget.add(["row 9: empty"], seen=100)


def test_budget_forgives_one_row_of_a_small_data_set_unless_it_is_0():
    budget = SkipBudget(0.01, num_samples=10)
    budget.add(["row 1: empty"], seen=10)
    with pytest.raises(ValueError, match="Skipped 2 of 10"):
        budget.add(["row 2: empty"], seen=10)
    with pytest.raises(ValueError, match="Skipped 1 of 10"):
        SkipBudget(0, num_samples=10).add(["row 1: empty"], seen=10)


def test_budget_of_a_stream_is_judged_once_enough_was_seen():
    budget = SkipBudget(0.01, num_samples=None)
    for _ in range(4):  # passes
        budget.add([f"row {n}: empty" for n in range(50)], seen=249)  # the same rows in each pass count each time
    assert budget.num_skipped == 200
    with pytest.raises(ValueError, match="Skipped 200 of 1000"):
        budget.add([], seen=4)


def test_what_processes_skipped_adds_up_to_the_same_everywhere(monkeypatch):
    """Three processes in lock step, whose exchange is played by a list."""
    for size, expected in ((1000, 5), (None, 7)):
        budgets = [SkipBudget(0.5, num_samples=size) for _ in range(3)]
        for step in range(2):
            for rank, budget in enumerate(budgets):
                rows = [f"row {rank}: empty"] + ([f"row {10 + rank}: empty"] if step and rank else [])
                budget.add(rows if step == 0 or rank else [], seen=100)
            added = [budget._unshared for budget in budgets]
            monkeypatch.setattr("modeling_mlip.data.skip_budget.gather_object", lambda here, added=added: added)
            for rank, budget in enumerate(budgets):
                process = SimpleNamespace(process_index=rank)
                monkeypatch.setattr("modeling_mlip.data.skip_budget.PartialState", lambda process=process: process)
                budget.share()
        assert {budget.num_skipped for budget in budgets} == {expected}
        assert {budget.seen for budget in budgets} == {600}


def test_budget_resumes():
    budget, resumed = SkipBudget(0.01, 100), SkipBudget(0.01, 100)
    budget.add(["row 1: empty"], seen=50)
    resumed.load_state_dict(json.loads(json.dumps(budget.state_dict())))
    assert resumed.state_dict() == budget.state_dict() and resumed.seen == 50
    resumed.add(["row 1: empty"], seen=50)
    with pytest.raises(ValueError, match="row 1: empty; row 2: empty"):
        resumed.add(["row 2: empty"], seen=1)


def test_columns_of_plain_bytes_are_images_too(transform):
    features = Features({"image": Value("binary"), "caption": Value("string")})
    dataset = Dataset.from_dict({"image": [encoded(picture(4))], "caption": ["a"]}, features=features)
    assert torch.equal(pairs(dataset, transform)[0]["pixel_values"], transform(picture(4)))
