# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Every row of a csv, tsv or jsonl file is read, or the file is refused with the number of the line."""

import csv
import io
import random

import pandas as pd
import pytest
from datasets import Dataset

from modeling_mlip.data.sources import load_pairs
from modeling_mlip.data.table_files import check_table, read_repaired_table

pytestmark = pytest.mark.usefixtures("empty_cache")

NUM_ROWS = 16


def captions(**changes: str) -> list[str]:
    rows = [f"caption {number}" for number in range(NUM_ROWS)]
    for number, caption in changes.items():
        rows[int(number.removeprefix("row"))] = caption
    return rows


# Name -> the cells as they stand in the file, and the captions that they mean.
LONE_QUOTES = {
    "never closed": (captions(row3='"big dog'), captions(row3='"big dog')),
    "closed by a later lone quote": (
        captions(row3='"big dog', row9='the end"'),
        captions(row3='"big dog', row9='the end"'),
    ),
    "before a quoted word": (
        captions(row3='"big dog', row9='"small" cat'),
        captions(row3='"big dog', row9="small cat"),
    ),
    "before a quoted cell": (captions(row3='"big dog', row9='"a ""cat"""'), captions(row3='"big dog', row9='a "cat"')),
    "in the last row": (captions(row15='"big dog'), captions(row15='"big dog')),
    "in two rows": (captions(row3='"big dog', row4='"cat'), captions(row3='"big dog', row4='"cat')),
    "in the first and the last": (captions(row0='"a', row15='b"'), captions(row0='"a', row15='b"')),
}


@pytest.mark.parametrize("streaming", [False, True], ids=["read", "streamed"])
@pytest.mark.parametrize("kind, separator", [("csv", ","), ("tsv", "\t")])
@pytest.mark.parametrize("name", LONE_QUOTES)
def test_a_lone_quote_swallows_no_row(name, kind, separator, streaming, tmp_path, caplog):
    cells, expected = LONE_QUOTES[name]
    lines = [f"{number}.png{separator}{cell}\n" for number, cell in enumerate(cells)]
    path = tmp_path / f"pairs.{kind}"
    path.write_text(f"image{separator}caption\n" + "".join(lines))
    rows = list(load_pairs(train_file=str(path), streaming=streaming)["train"])
    assert [row["caption"] for row in rows] == expected
    assert [row["image"] for row in rows] == [str(tmp_path / f"{number}.png") for number in range(NUM_ROWS)]
    assert f"{path}: " in caplog.text and "read as a character" in caplog.text


@pytest.mark.parametrize("caption_first", [False, True])
def test_quoted_captions_of_several_lines_stay_one_row(caption_first, tmp_path, caplog):
    texts = ["two\nlines", "with, comma\nand, more", 'he said "hi"\n\nand left', "plain", "None", ""]
    table = io.StringIO()
    rows = [("image", "caption"), *((f"{number}.png", text) for number, text in enumerate(texts))]
    csv.writer(table).writerows(row[::-1] if caption_first else row for row in rows)
    path = tmp_path / "pairs.csv"
    path.write_text(table.getvalue(), newline="")
    assert check_table(path, ",").num_rows == len(texts) and not check_table(path, ",").lone_quotes
    assert load_pairs(train_file=str(path))["train"]["caption"][:] == texts
    assert not caplog.text


def test_random_well_formed_tables_are_read_as_pandas_reads_them(tmp_path):
    generator = random.Random(0)
    for number in range(100):
        texts = ["".join(generator.choices('ab ,"\n\t', k=generator.randrange(1, 12))) + "x" for _ in range(6)]
        path = tmp_path / f"{number}.csv"
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("image", "caption"), *((f"{n}.png", text) for n, text in enumerate(texts))])
        checked = check_table(path, ",")
        assert (checked.num_rows, checked.lone_quotes) == (len(texts), [])
        frame = pd.read_csv(path, keep_default_na=False)
        assert frame["caption"].tolist() == texts


def test_a_repaired_table_keeps_the_types_of_its_columns(tmp_path):
    (tmp_path / "pairs.csv").write_text('image,caption,width\na.png,"big,3\nb.png,small,4\n')
    rows = read_repaired_table(tmp_path / "pairs.csv", ",")
    assert isinstance(rows, Dataset) and rows["width"][:] == [3, 4] and rows["caption"][:] == ['"big', "small"]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "line, reason", [("2.png,a dog, running", "has 3 cells, and the header 2"), ('2.png,"a dog, running', "not clear")]
)
def test_a_row_that_cannot_be_told_apart_is_named_by_its_line(line, reason, streaming, tmp_path):
    (tmp_path / "pairs.csv").write_text(f"image,caption\n1.png,a\n{line}\n3.png,b\n")
    with pytest.raises(ValueError, match=f"pairs.csv, line 3: .*{reason}") as caught:
        load_pairs(train_file=str(tmp_path / "pairs.csv"), streaming=streaming)
    assert "\n" not in str(caught.value)


def test_rows_that_a_reader_drops_are_an_error_with_both_numbers(tmp_path, monkeypatch):
    (tmp_path / "pairs.jsonl").write_text('{"image": "a", "caption": "b"}\n' * 3)
    monkeypatch.setattr("modeling_mlip.data.file_readers.count_lines", lambda path: 5)
    with pytest.raises(ValueError, match="5 rows are in the files, and 3 could be read"):
        load_pairs(train_file=str(tmp_path / "pairs.jsonl"))


def test_blank_lines_and_windows_line_ends_are_no_rows(tmp_path):
    (tmp_path / "pairs.csv").write_bytes(b'\xef\xbb\xbfimage,caption\r\n\r\na.png,"b, c"\r\n  \r\nb.png,d\r\n')
    assert load_pairs(train_file=str(tmp_path / "pairs.csv"))["train"]["caption"][:] == ["b, c", "d"]
