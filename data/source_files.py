# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Find the files of a source: expand patterns, list folders, and sort files into splits.

`datasets` receives explicit lists of files. It would otherwise guess the format and the splits of a folder from the
names of all its files.
"""

import glob
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from datasets.data_files import DataFilesList

logger = logging.getLogger(__name__)

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
RANGE = re.compile(r"(\d+)\.\.(\d+)")
BRACES = re.compile(r"\{([^{}]*(?:,|\.\.)[^{}]*)\}")


# Patterns


def expand_pattern(pattern: str) -> list[str]:
    """Return the paths that a pattern matches, sorted by folder and name; none if there are none.

    The pattern is first tried as a literal path, then with braces ({00000..00041}.tar, {train,val}.csv), then with
    wildcards. Brackets in a name are tried as a set of characters, then as themselves.

    Raises:
        FileNotFoundError: if some of the files that braces name are missing.
    """
    pattern = os.path.expanduser(pattern)
    if os.path.exists(pattern):
        return [pattern]
    alternatives = expand_braces(pattern)
    matches = [_match(alternative) for alternative in alternatives]
    missing = [alternative for alternative, paths in zip(alternatives, matches, strict=True) if not paths]
    if missing and len(missing) < len(alternatives):
        raise FileNotFoundError(
            f"{pattern}: {len(missing)} of {len(alternatives)} files are missing, the first is {missing[0]}."
        )
    return sorted(set(itertools.chain.from_iterable(matches)), key=os.path.split)


def expand_braces(pattern: str) -> list[str]:
    """Expand {a,b} and {000..041} as a shell does, zeros at the beginning included."""
    match = BRACES.search(pattern)
    if match is None:
        return [pattern]
    bounds = RANGE.fullmatch(match[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        width = len(bounds[1]) if bounds[1].startswith("0") or bounds[2].startswith("0") else 0
        numbers = range(first, last + 1) if first <= last else range(first, last - 1, -1)
        words = [f"{number:0{width}d}" for number in numbers]
    elif "," in match[1]:
        words = match[1].split(",")
    else:
        raise ValueError(f"{pattern}: {match[0]} is no range; write it as {{00000..00041}} or {{a,b}}.")
    alternatives = [pattern[: match.start()] + word + pattern[match.end() :] for word in words]
    return list(dict.fromkeys(itertools.chain.from_iterable(map(expand_braces, alternatives))))


def _match(pattern: str) -> list[str]:
    if os.path.exists(pattern):
        return [pattern]
    return glob.glob(pattern, recursive=True) or glob.glob(pattern.replace("[", "[[]"), recursive=True)


# Folders


def list_files(folder: Path) -> list[Path]:
    """Return all files under a folder, hidden ones excepted, sorted by path."""
    paths, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(root)
        if real in visited:  # a link to a folder above
            folders[:] = []
            continue
        visited.add(real)
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]
        paths += [Path(root, name) for name in names if not name.startswith(".")]
    return sorted(paths, key=str)


def split_files(
    paths: Iterable[Path], root: Path, by_file_name: bool = True
) -> tuple[dict[str, list[Path]], list[Path]]:
    """Sort files into splits by the names of their folders and their own names.

    A folder names a split if it is called like one, apart from digits: "train", "val2017". With `by_file_name`, so does
    a file: "test-00000-of-00002.parquet". If some file is called like training data, it is enough that the first or the
    last word of a file name is that of a split: "pairs_test_01.tar". Files without a split are training data, unless
    others are called so.

    Args:
        paths: the files, somewhere under `root`.
        root: folders above it do not count.
        by_file_name: whether file names count too.

    Returns:
        The files of each split, and the files without a split although others are called training data.
    """
    paths = list(paths)
    splits = [_split_of(path.relative_to(root), by_file_name, _whole_name) for path in paths]
    if by_file_name:
        loose = [_split_of(path.relative_to(root), by_file_name, _first_or_last_word) for path in paths]
        splits = loose if "train" in loose else splits
    others = [path for path, split in zip(paths, splits, strict=True) if split is None]
    if "train" not in splits and others:
        if not by_file_name:  # a class of images may be called "test"
            return {"train": paths}, []
        splits, others = [split or "train" for split in splits], []
    groups: dict[str, list[Path]] = {name: [] for name in ("train", "validation", "test") if name in splits}
    for path, split in zip(paths, splits, strict=True):
        if split is not None:
            groups[split].append(path)
    return groups, others


def _split_of(path: Path, by_file_name: bool, split_in_name: Callable[[str], str | None]) -> str | None:
    names = [_whole_name(part) for part in path.parts[:-1]]
    if by_file_name:
        names.append(split_in_name(path.stem))
    return next((name for name in names if name is not None), None)


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[^a-z]+", name.lower()) if word and word != "of"]


def _whole_name(name: str) -> str | None:
    words = _words(name)
    return SPLIT_NAMES.get(words[0]) if len(words) == 1 else None


def _first_or_last_word(name: str) -> str | None:
    words = _words(name)
    return next((SPLIT_NAMES[word] for word in (words[:1] + words[-1:]) if word in SPLIT_NAMES), None)


def report_left_out(source: str, paths: Sequence[Path], reason: str) -> None:
    """Log how many files of a folder are not read, by extension, and name the first ones; README.md does not count."""
    paths = [path for path in paths if path.name != "README.md"]
    if paths:
        kinds = Counter(path.suffix.lower() or "without an extension" for path in paths)
        counts = ", ".join(f"{number} {kind}" for kind, number in sorted(kinds.items()))
        first = ", ".join(path.name for path in paths[:3])
        files = "1 file" if len(paths) == 1 else f"{len(paths)} files"
        logger.warning("%s: left out %s (%s; %s) %s.", source, files, counts, first, reason)


def data_files(paths: Iterable[Path | str]) -> DataFilesList:
    """Return a list of files that datasets takes as it is, without reading wildcards into the names.

    Size and time of change are part of it, so that datasets does not take a changed file from its cache.
    """
    absolute = [os.path.abspath(path) for path in paths]
    versions = [(path, str(os.stat(path).st_size), str(os.stat(path).st_mtime_ns)) for path in absolute]
    return DataFilesList(absolute, versions)  # type: ignore[arg-type]
