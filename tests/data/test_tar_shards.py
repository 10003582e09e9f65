# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Every file of a tar shard belongs to a sample, or is counted and named."""

import json
import tarfile

import datasets
import pytest
from data_cases import encoded, picture, write_tar
from datasets import load_dataset

from modeling_mlip.data.columns import find_columns, get_cell
from modeling_mlip.data.sources import load_pairs
from modeling_mlip.data.tar_shards import load_tar_shards, split_name

pytestmark = pytest.mark.usefixtures("empty_cache")

PNG = encoded(picture())


def caption(number: int) -> bytes:
    return f"caption {number}".encode()


LAYOUTS = {
    "plain": [(f"{n}.{kind}", data) for n in range(6) for kind, data in (("png", PNG), ("txt", caption(n)))],
    "in folders": [(f"x/{n}.{kind}", data) for n in range(6) for kind, data in (("png", PNG), ("txt", caption(n)))],
    "dots in the names": [
        (f"photo.{n}.{kind}", data) for n in range(6) for kind, data in (("png", PNG), ("txt", caption(n)))
    ],
    "dots in some names": [
        (f"{name}.{kind}", data)
        for n, name in enumerate(["a", "a.1", "a.2", "b.x", "b", "c"])
        for kind, data in (("png", PNG), ("txt", caption(n)))
    ],
    "images before captions": [(f"{n}.png", PNG) for n in range(6)] + [(f"{n}.txt", caption(n)) for n in range(6)],
    "with masks": [
        (f"{n}.{kind}", data) for n in range(6) for kind, data in (("png", PNG), ("mask.png", PNG), ("txt", caption(n)))
    ],
    "jpg and png": [
        (f"{n}.{kind}", data)
        for n in range(6)
        for kind, data in ((("jpg", "png", "JPG")[n % 3], PNG), ("txt", caption(n)))
    ],
    "json of several types": [
        (f"{n}.{kind}", data)
        for n in range(6)
        for kind, data in (
            ("png", PNG),
            ("json", json.dumps({"caption": f"caption {n}", "x": [None, 1, "a", 0.5, {}, []][n]}).encode()),
        )
    ],
}


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_sample_of_a_shard_is_read(layout, streaming, tmp_path):
    write_tar(tmp_path / "0.tar", LAYOUTS[layout])
    rows = load_pairs(data_dir=str(tmp_path), streaming=streaming)["train"]
    image, text = find_columns(rows)
    cells = [(row[image], get_cell(row, text)) for row in rows]
    assert [text for _, text in cells] == [f"caption {n}" for n in range(6)]
    assert all(image is not None for image, _ in cells)


@pytest.mark.parametrize("streaming", [False, True])
def test_ordinary_shards_have_the_rows_that_datasets_reads(streaming, tmp_path):
    files = []
    for n in range(6):
        files += [(f"{n}.jpg", PNG), (f"{n}.json", json.dumps({"caption": f"a {n}", "width": n}).encode())]
        files += [(f"{n}.cls", str(n).encode()), (f"{n}.txt", caption(n))]
    for shard in (0, 1):
        write_tar(tmp_path / f"{shard}.tar", files[12 * shard : 12 * shard + 12])
    paths = [str(tmp_path / "0.tar"), str(tmp_path / "1.tar")]
    theirs = load_dataset("webdataset", data_files={"train": paths}, streaming=streaming)["train"]
    ours = load_tar_shards(paths, streaming)
    assert ours.features == theirs.features
    decode = datasets.Image(decode=False)
    assert list(ours.cast_column("jpg", decode)) == list(theirs.cast_column("jpg", decode))
    if streaming:
        assert ours.num_shards == theirs.num_shards == 2
        shuffled = [[row["__key__"] for row in rows.shuffle(seed=3, buffer_size=4)] for rows in (ours, theirs)]
        assert shuffled[0] == shuffled[1]


def test_files_that_belong_to_no_sample_are_counted_and_named(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", [*LAYOUTS["plain"], ("README", b"a"), ("LICENSE", b"b"), ("1.txt", b"again")])
    assert len(load_pairs(data_dir=str(tmp_path))["train"]) == 6
    assert "left out 2 files without an extension or a name before it, first README" in caplog.text
    assert "left out 1 file with the name of an earlier file, first 1.txt" in caplog.text


def test_links_are_counted_and_named(tmp_path, caplog):
    write_tar(tmp_path / "0.tar", LAYOUTS["plain"])
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        link = tarfile.TarInfo("6.png")
        link.type, link.linkname = tarfile.SYMTYPE, "5.png"
        tar.addfile(link)
    assert len(load_pairs(data_dir=str(tmp_path))["train"]) == 6
    assert "left out 1 file of the type link, first 6.png" in caplog.text


def test_text_that_cannot_be_decoded_is_one_missing_caption_and_is_named(tmp_path, caplog):
    files = [*LAYOUTS["plain"], ("6.png", PNG), ("6.txt", b"caf\xe9")]
    write_tar(tmp_path / "0.tar", files)
    rows = load_pairs(data_dir=str(tmp_path))["train"]
    assert rows["txt"][:] == [f"caption {n}" for n in range(6)] + [None]
    assert "6.txt could not be decoded" in caplog.text


@pytest.mark.parametrize("streaming", [False, True])
def test_a_broken_shard_is_named(streaming, tmp_path):
    (tmp_path / "0.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(ValueError, match=r"0\.tar is no complete tar file") as caught:
        load_pairs(data_dir=str(tmp_path), streaming=streaming)
    assert "\n" not in str(caught.value)


def test_a_changed_shard_is_not_taken_from_the_cache(tmp_path):
    write_tar(tmp_path / "0.tar", LAYOUTS["plain"])
    assert len(load_pairs(data_dir=str(tmp_path))["train"]) == 6
    write_tar(tmp_path / "0.tar", LAYOUTS["plain"][:4])
    assert len(load_pairs(data_dir=str(tmp_path))["train"]) == 2


@pytest.mark.parametrize(
    "name, key, field",
    [("a.jpg", "a", "jpg"), ("./x.y/a.seg.png", "./x.y/a", "seg.png"), ("README", "README", None), (".hid", "", None)],
)
def test_a_key_ends_at_the_first_dot_of_the_name(name, key, field):
    assert split_name(name) == (key, field)
