# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Every source gives the same pairs; what is not read is said with its number; bad input is one clear line."""

import csv
import json

import datasets
import pytest
import torch
from data_cases import encoded, image_dataset, picture, write_jsonl, write_tar
from datasets import Dataset, DatasetDict
from PIL import Image

from modeling_mlip.data.columns import find_columns, get_cell
from modeling_mlip.data.data_arguments import DataArguments
from modeling_mlip.data.items import PairDataset, StreamedPairDataset
from modeling_mlip.data.shapes import shapes_dataset
from modeling_mlip.data.sources import load_pairs, load_splits

pytestmark = pytest.mark.usefixtures("empty_cache")

PNG = encoded(picture())

CAPTIONS = ["a red square", "a green square", "None", "a blue square"]
COLOURS = ["red", "green", "black", "blue"]


# Sources: each writes the four pairs of COLOURS and CAPTIONS, and returns the arguments that read them.


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
    for shard in (0, 1):
        files = []
        for index in (2 * shard, 2 * shard + 1):
            image = encoded(Image.new("RGB", (32, 32), COLOURS[index]))
            files += [(f"{index}.png", image), (caption_file.format(index), encode(CAPTIONS[index]))]
        write_tar(root / "shards" / f"{shard:04}.tar", files)
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
def test_sample_limits_and_the_drawn_data_set(streaming, monkeypatch):
    monkeypatch.setattr("modeling_mlip.data.sources.shapes_dataset", lambda: shapes_dataset(20, 10))
    args = DataArguments(dataset_name="shapes", streaming=streaming, max_train_samples=7, max_eval_samples=2)
    loaded = load_pairs(**args.source(), **args.columns())
    assert [len(list(loaded[split])) for split in ("train", "validation")] == [7, 2]
    assert find_columns(loaded["train"], **args.columns()) == ("image", "caption")
    for name, limit in (("max_train_samples", 0), ("max_eval_samples", -1)):
        with pytest.raises(ValueError, match=f"{name}={limit}: choose 1 or more"):
            load_pairs(dataset_name="shapes", streaming=streaming, **{name: limit})


def bad_inputs(root):
    write_images(root / "plain")
    (root / "empty").mkdir()
    (root / "empty.csv").write_text("image,caption\n")
    (root / "nocaption.csv").write_text("image,colour\na.png,red\n")
    (root / "broken.parquet").write_bytes(b"not parquet")
    (root / "pairs.xyz").write_text("")
    (root / "pairs.jsonl").write_text('{"image": "a.png", "caption": "a"}\n')
    return [
        ({}, ValueError, "no source.*dataset_name, data_dir, train_file"),
        ({"dataset_name": "shapes", "data_dir": str(root)}, ValueError, "dataset_name and data_dir"),
        ({"dataset_name": str(root / "nowhere")}, FileNotFoundError, "nowhere: no such folder"),
        ({"dataset_name": str(root / "empty")}, FileNotFoundError, "empty could not be read"),
        ({"data_dir": str(root / "nowhere")}, FileNotFoundError, "nowhere: no such folder"),
        ({"data_dir": str(root / "plain")}, ValueError, "metadata.csv or metadata.jsonl"),
        ({"train_file": str(root / "no*.parquet")}, FileNotFoundError, "train_file=.*no such file"),
        ({"validation_file": str(root / "no.csv")}, FileNotFoundError, "validation_file=.*no such file"),
        ({"train_file": str(root / "pairs.*")}, ValueError, ".jsonl, .xyz files"),
        ({"train_file": str(root / "pairs.xyz")}, ValueError, ".xyz files; give one kind of .csv"),
        ({"train_file": str(root / "broken.parquet")}, ValueError, "broken.parquet could not be read"),
        ({"train_file": str(root / "empty.csv")}, ValueError, "empty.csv: holds no pairs"),
        ({"train_file": str(root / "nocaption.csv")}, ValueError, "No caption column.*image, colour"),
        (
            {"train_file": str(root / "pairs.jsonl"), "image_column": "x"},
            ValueError,
            "image_column=x.*image, caption",
        ),
    ]


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_bad_input_is_one_clear_line(tmp_path, streaming):
    for source, kind, message in bad_inputs(tmp_path):
        with pytest.raises(kind, match=message) as caught:
            load_pairs(**source, streaming=streaming)
        assert "\n" not in str(caught.value)


# Files are chosen by explicit rules, and what is left out is said


def load_captions(streaming=False, **source) -> dict[str, list[str]]:
    """The captions of each split, each read as an item with its image."""
    splits = load_pairs(streaming=streaming, **source)
    captions = {}
    for name, rows in splits.items():
        image, text = find_columns(rows)
        assert all(
            row[image] for row in (rows.cast_column(image, datasets.Image(decode=False)) if rows.features else rows)
        )
        captions[name] = [get_cell(row, text) for row in rows]
    return captions


def write_metadata(folder, names=("test_drive", "val", "b"), kind="csv"):
    folder.mkdir(parents=True)
    for name in names:
        picture().save(folder / f"{name}.png")
    if kind == "csv":
        lines = [f"{name}.png,caption {name}\n" for name in names]
        (folder / "metadata.csv").write_text("file_name,caption\n" + "".join(lines))
    else:
        write_jsonl(folder / "metadata.jsonl", [{"file_name": f"{n}.png", "caption": f"caption {n}"} for n in names])


@pytest.mark.parametrize("parameter", ["data_dir", "dataset_name"])
@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_what_img2dataset_writes_is_read(streaming, parameter, tmp_path, caplog):
    for shard in range(2):
        files = []
        for n in range(3):
            key = f"{shard:05}{n:04}"
            files += [(f"{key}.jpg", encoded(picture(n), "JPEG")), (f"{key}.txt", b"a")]
            files += [(f"{key}.json", json.dumps({"caption": f"{shard}{n}", "error_message": None}).encode())]
        write_tar(tmp_path / f"{shard:05}.tar", files)
        Dataset.from_dict({"url": ["http://x/a"], "caption": ["x"]}).to_parquet(tmp_path / f"{shard:05}.parquet")
        (tmp_path / f"{shard:05}_stats.json").write_text('{"count": 3}')
    captions = load_captions(streaming, **{parameter: str(tmp_path)})
    assert captions == {"train": ["00", "01", "02", "10", "11", "12"]}
    assert "left out 4 files (2 .json, 2 .parquet; 00000.parquet, " in caplog.text


@pytest.mark.parametrize("parameter", ["data_dir", "dataset_name"])
@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_names_of_images_and_stray_tables_do_not_change_a_folder_with_metadata(
    kind, streaming, parameter, tmp_path, caplog
):
    folder = tmp_path / "train [1]*"
    write_metadata(folder, kind=kind)
    picture().save(folder / "test_extra.png")
    (folder / "train.csv").write_text("a,b\n")
    (folder / ".hidden.csv").write_text("")
    captions = load_captions(streaming, **{parameter: str(folder)})
    assert captions == {"train": ["caption test_drive", "caption val", "caption b"]}
    assert "left out 1 file (1 .csv; train.csv)" in caplog.text
    assert streaming or "left out 1 file (1 .png; test_extra.png) that no metadata file names" in caplog.text


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_folders_name_the_splits_of_metadata(streaming, tmp_path):
    write_metadata(tmp_path / "train", ["a"])
    write_metadata(tmp_path / "val2017", ["b"])
    assert load_captions(streaming, data_dir=str(tmp_path)) == {"train": ["caption a"], "validation": ["caption b"]}


def test_metadata_columns_are_named_as_in_an_imagefolder(tmp_path):
    write_metadata(tmp_path / "a", ["x"])
    rows = load_pairs(data_dir=str(tmp_path / "a"), image_column="image", caption_column="caption")["train"]
    assert isinstance(rows.features["image"], datasets.Image)
    assert rows[0]["image"].size == (32, 32)
    (tmp_path / "a" / "metadata.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="got metadata files of the kinds .csv, .jsonl; keep one kind"):
        load_pairs(data_dir=str(tmp_path / "a"))


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_a_folder_of_tables_is_split_by_their_names_and_one_kind_is_read(streaming, tmp_path, caplog):
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"):
        image_dataset([encoded(picture())], [name]).to_parquet(tmp_path / "data" / f"{name}.parquet")
    (tmp_path / "data" / "train.csv").write_text("x,y\n")
    expected = {"train": ["train-00000-of-00002", "train-00001-of-00002"], "validation": ["validation-00000-of-00001"]}
    assert load_captions(streaming, dataset_name=str(tmp_path)) == expected
    assert "left out 1 file (1 .csv; train.csv) beside the .parquet files" in caplog.text


def test_a_folder_that_describes_its_files_is_read_as_it_says(tmp_path):
    for name in ("first", "second"):
        image_dataset([encoded(picture())], [name]).to_parquet(tmp_path / f"{name}.parquet")
    lines = ["configs:", "- config_name: default", "  data_files:", "  - split: train", "    path: second.parquet"]
    (tmp_path / "README.md").write_text("\n".join(["---", *lines, "---", ""]))
    assert load_captions(dataset_name=str(tmp_path)) == {"train": ["second"]}


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
def test_classes_are_folders_whatever_the_images_are_called(streaming, tmp_path):
    for split, number in (("train", 2), ("test", 1)):
        for label in ("cat", "test", "test tube"):
            for n in range(number):
                (tmp_path / split / label).mkdir(parents=True, exist_ok=True)
                picture().save(tmp_path / split / label / f"train_{n}.png")
    splits = load_splits(data_dir=str(tmp_path), streaming=streaming)
    assert {name: len(list(rows)) for name, rows in splits.items()} == {"train": 6, "validation": 3}
    assert splits["train"].features["label"].names == ["cat", "test", "test tube"]
    [whole] = load_splits(data_dir=str(tmp_path / "train"), streaming=streaming).values()
    assert sorted(row["label"] for row in whole) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize("parameter", ["data_dir", "dataset_name"])
def test_what_save_to_disk_wrote_is_read(parameter, streaming, tmp_path):
    rows = image_dataset([encoded(picture(n)) for n in range(3)], ["a", "b", "c"])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict(train=rows.select([0, 1]), test=rows.select([2])).save_to_disk(tmp_path / "several")
    assert load_captions(streaming, **{parameter: str(tmp_path / "one")}) == {"train": ["a", "b", "c"]}
    expected = {"train": ["a", "b"], "validation": ["c"]}
    assert load_captions(streaming, **{parameter: str(tmp_path / "several")}) == expected
    with pytest.raises(ValueError, match="one is a folder; give its files, or the folder with data_dir=FOLDER"):
        load_pairs(train_file=str(tmp_path / "one"))


PATTERNS = [
    ("{00000..00001}.{kind}", 4),
    ("{00000,00001}.{kind}", 4),
    ("0000{0..1}.{kind}", 4),
    ("0000[01].{kind}", 4),
    ("*.{kind}", 4),
    ("a [0-1].d/pairs.{kind}", 2),
    ("a [0-1].d/*.{kind}", 2),
    ("**/pairs.{kind}", 2),
]


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize("kind", ["parquet", "tar", "csv"])
@pytest.mark.parametrize("pattern, number", PATTERNS)
def test_braces_brackets_and_literal_names_are_read(pattern, number, kind, streaming, tmp_path):
    for name in ("00000", "00001", "a [0-1].d/pairs"):
        path = tmp_path / f"{name}.{kind}"
        path.parent.mkdir(exist_ok=True)
        if kind == "tar":
            write_tar(path, [(f"{n}.{end}", data) for n in "ab" for end, data in (("png", PNG), ("txt", b"a"))])
        elif kind == "csv":
            path.write_text("image,caption\na.png,a\nb.png,b\n")
        else:
            image_dataset([PNG, PNG], ["a", "b"]).to_parquet(path)
    source = str(tmp_path / pattern.replace("{kind}", kind))
    assert len(list(load_pairs(train_file=source, streaming=streaming)["train"])) == number


def test_splits_that_are_not_used_are_named(tmp_path, caplog):
    for name in ("train", "validation", "test"):
        image_dataset([PNG], [name]).to_parquet(tmp_path / f"{name}.parquet")
    assert load_captions(data_dir=str(tmp_path)) == {"train": ["train"], "validation": ["validation"]}
    assert "data_dir: left out the splits test; train and validation are used." in caplog.text


def test_missing_files_of_braces_are_counted_and_named(tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", PNG), ("a.txt", b"a")])
    with pytest.raises(FileNotFoundError, match=r"train_file=.*: 2 of 3 files are missing, the first is .*1\.tar"):
        load_pairs(train_file=str(tmp_path / "{0..2}.tar"))


def test_messages_of_sources_name_parameters_and_not_flags(tmp_path):
    for source, kind, _ in bad_inputs(tmp_path):
        with pytest.raises(kind) as caught:
            load_pairs(**source)
        assert "--" not in str(caught.value)
