# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Samples of WebDataset tar shards.

The files of a sample share a key: their path up to the first dot of the name. They may lie anywhere in the shard, and
a name may hold more dots. Every file belongs to a sample, or is counted and named in the log.
"""

import json
import logging
import os
import tarfile
from collections.abc import Iterable, Iterator
from functools import cache, reduce
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, Features, IterableDataset
from PIL import Image

logger = logging.getLogger(__name__)

Shard = tuple[str, int, int]  # path, size and time of change: datasets takes an equal list from its cache
Members = dict[str, tarfile.TarInfo]  # field -> file

CAPTION_FIELDS = ("txt", "text", "caption", "json", "jsn")
NUM_SAMPLES_FOR_FEATURES = 5
NONE = datasets.Value("null")
# Type of a column -> the types of its values.
PYTHON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "binary": (bytes,),
    "bool": (bool,),
    "int": (int,),
    "float": (int, float),
}


def load_tar_shards(paths: Iterable[str], streaming: bool) -> Dataset | IterableDataset:
    """Load the samples of tar shards, with the columns of each field and __key__ and __url__.

    Images stay encoded, as the feature `Image`; txt files are strings, cls files numbers, json files structs, and the
    others bytes.

    Raises:
        ValueError: if a shard is no tar file, or no shard holds a sample.
    """
    shards = [(path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for path in map(os.path.abspath, paths)]
    features = _infer_features(shards)
    kind = IterableDataset if streaming else Dataset
    return kind.from_generator(iterate_samples, features=features, gen_kwargs={"shards": shards, "features": features})


def iterate_samples(shards: list[Shard], features: Features | None = None) -> Iterator[dict[str, Any]]:
    """Yield the samples of the shards in the order of their first files.

    Args:
        features: fields that every sample has, None where it lacks one. An image of another type, such as png beside
            jpg, takes the place of a missing image. Without them the samples are as they are.
    """
    for path, _, _ in shards:
        try:
            with tarfile.open(path) as tar:
                for key, members in _group_members(path, tar, report=features is not None).items():
                    yield _read_sample(tar, path, key, members, features)
        except tarfile.TarError as error:
            raise ValueError(f"{path} is no complete tar file: {str(error).splitlines()[0].rstrip(':')}") from None


def _infer_features(shards: list[Shard]) -> Features:
    samples = list(islice(iterate_samples(shards), NUM_SAMPLES_FOR_FEATURES))
    if not samples:
        raise ValueError("the tar shards hold no samples")
    schemas = [pa.Table.from_pylist([_with_image_bytes(sample)]).schema for sample in samples]
    features = Features(reduce(_merge_features, map(Features.from_arrow_schema, schemas)))
    images = [name for name in features if _is_image(name)]
    for name in images:
        features[name] = datasets.Image()
    if images:  # images of other types move to the most frequent column
        most_frequent = max(images, key=lambda name: sum(name in sample for sample in samples))
        replaced = [name for name in images if not any({name, most_frequent} <= sample.keys() for sample in samples)]
        for name in replaced:
            if name != most_frequent:
                del features[name]
    return features


def _merge_features(first: Any, second: Any) -> Any:
    """Return a feature for the values of both; values of the second that do not fit become None."""
    if isinstance(first, dict) and isinstance(second, dict):
        names = [*first, *(name for name in second if name not in first)]
        return {name: _merge_features(first.get(name, NONE), second.get(name, NONE)) for name in names}
    if isinstance(first, datasets.List) and isinstance(second, datasets.List):
        return datasets.List(_merge_features(first.feature, second.feature))
    if first == NONE or (first, second) == (datasets.Value("int64"), datasets.Value("float64")):
        return second
    return first


def _with_image_bytes(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: value["bytes"] if _is_image(name) else value for name, value in sample.items()}


def _group_members(path: str, tar: tarfile.TarFile, report: bool) -> dict[str, Members]:
    """Return the files of each sample, by key; with `report` the files that belong to none are logged."""
    by_key: dict[str, Members] = {}
    links, nameless, doubled = [], [], []
    for member in tar.getmembers():
        if member.isdir():
            continue
        key, field = split_name(member.name)
        if not member.isfile():
            links.append(member.name)
        elif field is None:
            nameless.append(member.name)
        elif field in by_key.setdefault(key, {}):
            doubled.append(member.name)
        else:
            by_key[key][field] = member
    for names, reason in (
        (links, "of the type link"),
        (nameless, "without an extension or a name before it"),
        (doubled, "with the name of an earlier file"),
    ):
        if names and report:
            _report_once(path, len(names), reason, names[0])
    samples: dict[str, Members] = {}
    for key, members in by_key.items():
        samples |= _split_ambiguous_key(key, members)
    return samples


@cache  # a stream reads each shard in every pass
def _report_once(path: str, number: int, reason: str, first: str) -> None:
    logger.warning("%s: left out %s %s, first %s.", path, "1 file" if number == 1 else f"{number} files", reason, first)


def split_name(name: str) -> tuple[str, str | None]:
    """Split a path into the key of its sample and its field; the field is None without an extension.

    Keys end at the first dot of the file name, as in WebDataset.
    """
    folder, _, base = name.rpartition("/")
    stem, dot, field = base.partition(".")
    key = f"{folder}/{stem}" if folder else stem
    return key, field if stem and dot and field else None


def _split_ambiguous_key(key: str, members: Members) -> dict[str, Members]:
    """Return the one or several samples behind a key.

    "photo.1.jpg", "photo.1.txt", "photo.2.jpg" and "photo.2.txt" share the key "photo" but are two samples: each part
    before the last dot has an image and a caption. "photo.jpg", "photo.mask.png" and "photo.txt" are one sample.
    """
    by_part: dict[str, Members] = {}
    for field, member in members.items():
        part, _, extension = field.rpartition(".")
        by_part.setdefault(part, {})[extension] = member
    are_samples = all(
        any(map(_is_image, fields)) and any(field in CAPTION_FIELDS for field in fields) for fields in by_part.values()
    )
    if not are_samples:
        return {key: members}
    return {f"{key}.{part}" if part else key: fields for part, fields in by_part.items()}


def _read_sample(
    tar: tarfile.TarFile, path: str, key: str, members: Members, features: Features | None
) -> dict[str, Any]:
    sample: dict[str, Any] = {}
    for field, member in members.items():
        file = tar.extractfile(member)
        assert file is not None  # members are files
        sample[field] = _decode(f"{key}.{field}", field, file.read())
    if features is not None:
        images = [name for name in sample if _is_image(name)]
        missing = [name for name in features if _is_image(name) and name not in sample]
        if len(images) == 1 and images[0] not in features and missing:
            sample[missing[0]] = sample.pop(images[0])
        sample = {name: _fit(sample.get(name), feature) for name, feature in features.items()}
    return {**sample, "__key__": key, "__url__": path}


def _fit(value: Any, feature: Any) -> Any:
    """Return a value as its feature takes it, and None for values of another type, as in json files that differ."""
    if isinstance(feature, dict):
        fields = value if isinstance(value, dict) else {}
        return {name: _fit(fields.get(name), inner) for name, inner in feature.items()}
    if isinstance(feature, datasets.List):
        return [_fit(item, feature.feature) for item in value] if isinstance(value, list) else None
    if isinstance(feature, datasets.Value):
        kinds = next((kinds for dtype, kinds in PYTHON_TYPES.items() if feature.dtype.startswith(dtype)), ())
        return value if isinstance(value, kinds) else None
    return value


def _decode(name: str, field: str, data: bytes) -> Any:
    """Decode the content of a file by its extension; text that cannot be decoded is None, and its row is skipped."""
    extension = field.rpartition(".")[2].lower()
    if _is_image(field):
        return {"path": name, "bytes": data}
    try:
        if extension in ("json", "jsn"):
            return json.loads(data)
        if extension in ("txt", "text", "transcript", "caption"):
            return data.decode()
        if extension in ("cls", "cls2", "index", "inx", "id"):
            return int(data)
    except ValueError as error:
        logger.warning("%s could not be decoded: %s", name, error)
        return None
    return data


def _is_image(field: str) -> bool:
    extension = PurePosixPath(f"x.{field}").suffix.lower()
    return Image.registered_extensions().get(extension) in Image.OPEN
