# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Braces expand as in a shell, and the names of folders and files decide the splits by explicit rules."""

import os
from pathlib import Path

import pytest

from modeling_mlip.data.source_files import expand_braces, expand_pattern, list_files, split_files


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("a.tar", ["a.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{008..011}", ["008", "009", "010", "011"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}{0..1}.csv", ["a0.csv", "a1.csv", "b0.csv", "b1.csv"]),
        ("{a,{0..1}}", ["a", "0", "1"]),
        ("{name}.csv", ["{name}.csv"]),
    ],
)
def test_braces_expand_as_in_a_shell(pattern, expected):
    assert sorted(expand_braces(pattern)) == sorted(expected)


def test_a_range_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"\{a\.\.c\} is no range"):
        expand_braces("{a..c}.tar")


def test_a_literal_path_comes_before_its_meaning_as_a_pattern(tmp_path):
    for name in ("[ab].csv", "a.csv", "{0..1}.csv", "0.csv", "1.csv", "*.csv"):
        (tmp_path / name).touch()
    for name in ("[ab].csv", "{0..1}.csv", "*.csv"):
        assert expand_pattern(str(tmp_path / name)) == [str(tmp_path / name)]
    assert expand_pattern(str(tmp_path / "?.csv")) == [
        str(tmp_path / name) for name in ("*.csv", "0.csv", "1.csv", "a.csv")
    ]
    assert expand_pattern(str(tmp_path / "nowhere*")) == []


ALL_TRAINING = [
    ["mountain.tar", "test-drive.tar"],  # "test-drive" is not the whole name of a split
    ["a.tar", "b.tar"],
    ["train/a.tar", "train/test.tar"],
]


@pytest.mark.parametrize("names", ALL_TRAINING)
def test_files_without_names_of_splits_are_training_data(names):
    root = Path("/data")
    assert split_files([root / name for name in names], root) == ({"train": [root / name for name in names]}, [])


@pytest.mark.parametrize(
    "names, expected",
    [
        (["train.csv", "test.csv"], {"train": [0], "test": [1]}),
        (["train-00000-of-00002.csv", "train-00001-of-00002.csv", "dev.csv"], {"train": [0, 1], "validation": [2]}),
        (["cc3m-train-0000.tar", "cc3m_val_0000.tar"], {"train": [0], "validation": [1]}),
        (["training/0.tar", "val2017/0.tar", "Test/0.tar"], {"train": [0], "validation": [1], "test": [2]}),
        (["pairs.csv", "test.csv"], {"train": [0], "test": [1]}),
        (["test.csv"], {"test": [0]}),
    ],
)
def test_names_of_splits_are_whole_names_or_words_beside_a_train_file(names, expected):
    paths = [Path("/data") / name for name in names]
    splits, others = split_files(paths, Path("/data"))
    assert splits == {split: [paths[n] for n in numbers] for split, numbers in expected.items()} and not others


def test_files_of_no_split_are_returned():
    root = Path("/data")
    assert split_files([root / "train.csv", root / "notes.csv"], root) == (
        {"train": [root / "train.csv"]},
        [root / "notes.csv"],
    )


def test_images_are_split_by_folders_alone():
    root = Path("/data")
    classes = [root / "cat" / "train_1.png", root / "test" / "1.png"]
    assert split_files(classes, root, by_file_name=False) == ({"train": classes}, [])
    splits = [root / "train" / "cat" / "1.png", root / "test" / "cat" / "1.png", root / "extra" / "1.png"]
    assert split_files(splits, root, by_file_name=False) == ({"train": splits[:1], "test": splits[1:2]}, splits[2:])


def test_hidden_files_and_links_in_a_circle_are_not_listed(tmp_path):
    for name in ("a/b.png", ".git/c.png", "__pycache__/d.png", "a/.e.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path, tmp_path / "a" / "up")
    assert list_files(tmp_path) == [tmp_path / "a" / "b.png"]
