# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The functions that find a column and those that read it agree on its name."""

import itertools

import datasets
import numpy as np
import pytest
from data_cases import encoded, picture
from datasets import Dataset, Features, Value

from modeling_mlip.data.columns import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    find_caption_column,
    find_columns,
    find_image_column,
    get_cell,
    iterate_captions,
    list_columns,
    read_captions,
)
from modeling_mlip.data.items import PairDataset, StreamedPairDataset


def test_the_columns_named_by_the_caller_win(tmp_path):
    dataset = Dataset.from_dict({"image": ["a"], "photo": ["b"], "Caption": ["c"], "other": [["d"]], "number": [1]})
    assert find_columns(dataset) == ("image", "Caption")
    assert find_columns(dataset, image_column="photo", caption_column="other") == ("photo", "other")
    with pytest.raises(ValueError, match=r"number.*int64.*caption_column=NAME"):
        find_columns(dataset, caption_column="number")
    with pytest.raises(ValueError, match="image_column=pic: no such column; the columns are image, photo, Caption"):
        find_columns(dataset, image_column="pic")
    with pytest.raises(ValueError, match=r"No caption column.*the columns are image, photo.*caption_column=NAME"):
        find_columns(dataset.remove_columns("Caption"))


# A flat name with a dot, a field of a struct, a field of a struct whose own name has a dot, two levels.
DOTTED = {
    "meta.caption": {"meta.caption": "a"},
    "json.caption": {"json": {"caption": "a", "width": 3}},
    "meta.info.text": {"meta.info": {"text": "a"}},
    "json.meta.caption": {"json": {"meta": {"caption": "a"}}},
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", DOTTED)
def test_a_caption_column_with_dots_is_found_and_read_by_all_functions(name, streaming, tmp_path, transform):
    picture().save(tmp_path / "a.png")
    dataset = Dataset.from_list([{"image": str(tmp_path / "a.png"), **DOTTED[name]}] * 2)
    rows = dataset.to_iterable_dataset() if streaming else dataset
    assert find_caption_column(rows) == name
    assert find_columns(rows) == find_columns(rows, caption_column=name) == ("image", name)
    assert [get_cell(row, name) for row in rows] == ["a", "a"]
    assert list(iterate_captions(rows, name)) == ["a", "a"]
    kind = StreamedPairDataset if streaming else PairDataset
    items = list(kind(rows, "image", name, transform, training=False, seed=0))
    assert [item.get("captions") for item in items] == [["a"], ["a"]]


def test_a_flat_column_comes_before_a_field_of_a_struct():
    dataset = Dataset.from_list([{"image": "a", "json.caption": "flat", "json": {"caption": "inner"}}])
    assert find_caption_column(dataset) == "json.caption"
    assert list(iterate_captions(dataset, "json.caption")) == ["flat"]


def test_a_missing_struct_is_an_empty_caption_and_unreadable_cells_are_left_out():
    assert get_cell({"json": None}, "json.caption") is None
    with pytest.raises(KeyError):
        get_cell({"json": None}, "text")
    rows = [{"captions": [b"\xff"]}, {"captions": [b"good", None, b" "]}, {"captions": None}]
    assert list(iterate_captions(Dataset.from_list(rows), "captions")) == ["good"]
    with pytest.raises(TypeError, match="type int"):
        read_captions([3])


def test_a_data_set_without_a_caption_column_has_none():
    assert find_caption_column(Dataset.from_dict({"image": ["a"], "label": [1]})) is None


NOT_ONE_IMAGE = {
    "a list of images": Dataset.from_dict(
        {"images": [[{"bytes": encoded(picture()), "path": None}]], "caption": ["a"]}
    ).cast_column("images", datasets.List(datasets.Image())),
    "a list of paths": Dataset.from_dict({"images": [["a.png", "b.png"]], "caption": ["a"]}),
    "an array": Dataset.from_dict({"images": [np.zeros((4, 4, 3)).tolist()], "caption": ["a"]}),
    "an array feature": Dataset.from_dict(
        {"images": [np.zeros((4, 4), dtype=np.uint8)], "caption": ["a"]},
        features=Features({"images": datasets.Array2D((4, 4), "uint8"), "caption": Value("string")}),
    ),
    "numbers": Dataset.from_dict({"images": [3], "caption": ["a"]}),
}


@pytest.mark.parametrize("kind", NOT_ONE_IMAGE)
@pytest.mark.parametrize("given", [None, "images"])
def test_a_column_that_is_not_one_image_per_row_is_refused_by_its_name(kind, given):
    with pytest.raises(ValueError, match=r"^The image column images holds .*image_column=NAME\.$"):
        find_image_column(NOT_ONE_IMAGE[kind], given)


def test_a_stream_without_features_is_checked_by_its_first_row(tmp_path):
    def rows():
        yield {"image": ["a.png"], "caption": "a"}

    stream = datasets.IterableDataset.from_generator(rows)
    assert stream.features is None
    with pytest.raises(ValueError, match="The image column image holds values of type list"):
        find_columns(stream)


def test_a_usable_column_comes_before_one_that_is_not():
    dataset = Dataset.from_dict({"images": [["a.png"]], "image_path": ["a.png"], "caption": ["a"]})
    assert find_image_column(dataset) == "image_path"


def test_messages_name_parameters_and_not_flags():
    dataset = Dataset.from_dict({"pictures": ["a"], "my_words": ["a"], "number": [1]})
    for call in (
        lambda: find_columns(dataset),
        lambda: find_columns(dataset, "pictures"),
        lambda: find_columns(dataset, "pictures", "number"),
        lambda: find_columns(dataset, "nowhere"),
    ):
        with pytest.raises(ValueError, match="(image|caption)_column=") as caught:
            call()
        assert "--" not in str(caught.value)


def test_every_usual_name_is_found_in_any_case():
    for image, caption in (*zip(IMAGE_COLUMNS, itertools.cycle(CAPTION_COLUMNS)), ("image", CAPTION_COLUMNS[-1])):
        assert find_columns(Dataset.from_dict({image.upper(): ["a"], caption.title(): ["b"]})) == (
            image.upper(),
            caption.title(),
        )
    assert set(list_columns(Dataset.from_list([{"a": {"b": {"c": 1}}}]))) == {"a", "a.b", "a.b.c"}
