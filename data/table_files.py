# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Text tables (csv, tsv, jsonl): count the rows line by line, and repair cells that begin with a lone quote.

A csv reader takes a quote at the beginning of a cell for the start of a quoted cell. Without a second quote it reads
all lines up to the next quote anywhere as one cell, and their rows disappear.
"""

import csv
import io
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pandas as pd
from datasets import Dataset

from .columns import IMAGE_COLUMNS

logger = logging.getLogger(__name__)

# An empty cell is an empty string, and the captions "None" and "NA" are these words.
CSV_OPTIONS = {"keep_default_na": False}
MAX_LINES_OF_ROW = 1000  # a quote that is still open after as many lines is a lone quote


@dataclass
class CheckedTable:
    """What `check_table` counted in one csv or tsv file.

    Args:
        num_rows: rows below the header.
        lone_quotes: numbers of the lines, from 1 on, in which a cell begins with a quote that nothing closes.
    """

    num_rows: int = 0
    lone_quotes: list[int] = field(default_factory=list)


def check_table(path: str | Path, separator: str, image_column: str | None = None) -> CheckedTable:
    """Count the rows of a csv or tsv file and find the cells that begin with a lone quote.

    Raises:
        ValueError: if a row has more cells than the header, or a quoted cell cannot be told from a lone quote.
    """
    checked = CheckedTable()
    for _, is_repaired, line_number in _iterate_rows(path, separator, image_column):
        checked.num_rows += 1
        if is_repaired:
            checked.lone_quotes.append(line_number)
    return checked


def read_repaired_table(path: str | Path, separator: str, image_column: str | None = None) -> Dataset:
    """Read a whole csv or tsv file into memory, with each lone quote as a character of its cell."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        header = _first_line(file)
    lines = [header or ""]
    lines += [text for text, _, _ in _iterate_rows(path, separator, image_column)]
    frame = pd.read_csv(io.StringIO("".join(lines)), sep=separator, **CSV_OPTIONS)
    return Dataset.from_pandas(frame, preserve_index=False)


def report_lone_quotes(path: str | Path, lone_quotes: list[int]) -> None:
    """Log in which lines a quote was read as a character."""
    cells = "1 cell begins" if len(lone_quotes) == 1 else f"{len(lone_quotes)} cells begin"
    logger.warning(
        "%s: %s with a quote that nothing closes (first in line %d); it is read as a character.",
        *(path, cells, lone_quotes[0]),
    )


def count_lines(path: str | Path) -> int:
    """Count the rows of a jsonl file: its lines that are not blank; 0 if it is a single list."""
    with open(path, "rb") as file:
        lines = (line for line in file if not line.isspace())
        first = next(lines, b"")
        return 0 if first.lstrip().startswith(b"[") or not first else 1 + sum(1 for _ in lines)


def _first_line(lines: Iterator[str]) -> str | None:
    return next((line for line in lines if line.strip("\r\n")), None)


def _iterate_rows(path: str | Path, separator: str, image_column: str | None) -> Iterator[tuple[str, bool, int]]:
    """Yield the text of each row below the header, whether it was repaired, and the number of its first line."""
    with open(path, newline="", encoding="utf-8-sig") as file, _long_cells_allowed():
        lines = _Lines(file)
        header = next(csv.reader([_first_line(lines) or ""], delimiter=separator), [])
        image_index = _image_index(header, image_column)
        blank = " \t\r\n".replace(separator, "")
        for line in lines:
            number = lines.number
            if not line.strip(blank):
                continue
            row, is_repaired = line, False
            if '"' not in line:
                cells = line.count(separator) + 1
            elif not _is_open([line], separator):
                cells = len(next(csv.reader([line], delimiter=separator)))
            else:
                taken = _lines_of_quoted_row(line, lines, separator)
                cells, is_repaired = _judge(path, number, taken, header, separator, image_index)
                row = _repair(line, separator) if is_repaired else "".join(taken)
                if is_repaired:
                    lines.put_back(taken[1:])
            if cells > len(header):
                raise ValueError(
                    f"{path}, line {number}: has {cells} cells, and the header {len(header)}; put a cell that contains "
                    "the separator in quotes."
                )
            yield row, is_repaired, number


class _Lines:
    """Iterates over lines, of which some can be put back; `number` counts from 1 on."""

    def __init__(self, file: Iterator[str]):
        self.file = file
        self.stack: list[str] = []  # the next line is the last
        self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if self.stack:
            line = self.stack.pop()
        else:
            line = next(self.file, "")
            if not line:
                raise StopIteration
        self.number += 1
        return line

    def put_back(self, lines: list[str]) -> None:
        self.stack += reversed(lines)
        self.number -= len(lines)


def _lines_of_quoted_row(line: str, lines: _Lines, separator: str) -> list[str]:
    """Return the lines that a csv reader takes for one row, at most `MAX_LINES_OF_ROW`."""
    taken = [line]

    def take() -> Iterator[str]:
        yield line
        for following in lines:
            taken.append(following)
            yield following
            if len(taken) == MAX_LINES_OF_ROW:
                return

    next(csv.reader(take(), delimiter=separator))
    return taken


def _judge(
    path: str | Path,
    number: int,
    taken: list[str],
    header: list[str],
    separator: str,
    image_index: int | None,
) -> tuple[int, bool]:
    """Return how many cells a row has whose first line leaves a quote open, and whether this quote is a character.

    It is one if nothing closes it, if text follows the closing quote, or if each line looks like a row by itself: with
    as many cells as the header, and an image of the same kind in each.
    """
    cells = next(csv.reader(taken, delimiter=separator))
    is_open = _is_open(taken, separator)
    literal = [_split_literally(line, separator) for line in taken]
    is_well_formed = not is_open and len(cells) == len(header) and _is_strict(taken, separator)
    if is_well_formed and not _are_rows(literal, len(header), image_index):
        return len(cells), False
    if len(literal[0]) != len(header):
        raise ValueError(
            f"{path}, line {number}: a cell begins with a quote, and it is not clear where the cell ends; write a "
            'quote inside a quoted cell twice ("").'
        )
    return len(literal[0]), True


def _is_open(taken: list[str], separator: str) -> bool:
    """Whether a csv reader would go on reading the row after these lines."""
    return len(list(csv.reader([*taken, "\n", "x\n"], delimiter=separator))) < 2


def _is_strict(taken: list[str], separator: str) -> bool:
    """Whether each closing quote is followed by a separator or the end of a line."""
    try:
        list(csv.reader(taken, delimiter=separator, strict=True))
    except csv.Error:
        return False
    return True


def _are_rows(literal: list[list[str]], num_columns: int, image_index: int | None) -> bool:
    """Whether each line is a row by itself: it has all columns and names an image of the same kind."""
    if image_index is None or any(len(cells) != num_columns for cells in literal):
        return False
    kinds = {_kind(cells[image_index]) for cells in literal}
    return len(kinds) == 1 and kinds != {("", "")}


def _kind(image: str) -> tuple[str, str]:
    """The scheme and the extension of a path or URL."""
    scheme, _, _ = image.strip().rpartition("://")
    extension = re.search(r"\.\w+$", image.strip().strip('"'))
    return scheme.partition("://")[0], extension[0].lower() if extension else ""


def _split_literally(line: str, separator: str) -> list[str]:
    """Split one line into cells; a quote that this line does not close is a character."""
    quoted = re.compile(rf'"((?:[^"]|"")*)"(?={re.escape(separator)}|$)')
    text, cells, place = line.rstrip("\r\n"), [], 0
    while True:
        match = quoted.match(text, place)
        end = match.end() if match else text.find(separator, place)
        end = len(text) if end < 0 else end
        cells.append(match[1].replace('""', '"') if match else text[place:end])
        if end >= len(text):
            return cells
        place = end + len(separator)


def _repair(line: str, separator: str) -> str:
    """Write the cells of a line anew, with their quotes as csv writes them."""
    output = io.StringIO()
    csv.writer(output, delimiter=separator, lineterminator="\n").writerow(_split_literally(line, separator))
    return output.getvalue()


def _image_index(header: list[str], image_column: str | None) -> int | None:
    names = [name.lower() for name in header]
    candidates = (*([image_column.lower()] if image_column is not None else []), *IMAGE_COLUMNS)
    return next((names.index(name) for name in candidates if name in names), None)


@contextmanager
def _long_cells_allowed() -> Iterator[None]:
    """Let the csv module read cells of any length; a lone quote may open one over many lines."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)
