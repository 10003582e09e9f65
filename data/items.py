# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Data sets of image-caption pairs for a dataloader: rows to items, by index or as a stream.

A row that cannot be used becomes an item with its place and the reason, so that collators can list it and
`SkipBudget` can count it.
"""

import copy
import hashlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image, UnidentifiedImageError
from transformers import CLIPProcessor

from .columns import find_caption_column, find_columns, get_cell, read_captions
from .images import augmentation, convert_to_rgb, image_transform, read_image

SHUFFLE_BUFFER = 1000  # rows of a stream, with their images still encoded
MIN_SHARDS_PER_PROCESS = 16  # with as many, it hardly matters that some processes get one more than others
CAPTION_POLICIES = ("first", "random", "all")


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Return the same rows with each image as {"bytes", "path"}, so that datasets does not raise on a broken image."""
    if isinstance(dataset, Dataset) and dataset.format["type"] not in (None, "custom"):
        dataset = dataset.with_format(None)  # "torch" or "numpy" would decode the images all the same
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def stable_hash(text: str | bytes) -> int:
    """Return a signed 64-bit hash that is the same in every process and run."""
    data = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def split_image_cell(value: Any) -> tuple[bytes | None, str | None]:
    """Return the bytes and the path of an image cell: a path or URL, bytes, or a dictionary of both.

    Raises:
        TypeError: if the cell holds anything else, such as a list of images.
    """
    if isinstance(value, dict):
        return value.get("bytes"), value.get("path")
    if isinstance(value, str):
        return None, value
    if value is None or isinstance(value, bytes):
        return value, None
    raise TypeError(f"an image is of type {type(value).__name__}, not a path, bytes or a PIL image")


def read_image_cell(value: Any) -> tuple[Image.Image, str]:
    """Read an image cell; return the RGB image and an id that is equal for equal images.

    A PIL image, as a decoded column holds, is read as it is.
    """
    if isinstance(value, Image.Image):
        image = convert_to_rgb(value)
        return image, f"{stable_hash(image.tobytes()):x}"
    data, path = split_image_cell(value)
    image = read_image(data, path)
    return image, str(path) if data is None else f"{stable_hash(data):x}"


class _Pairs:
    """Turns rows into items; the base class of the two data sets below.

    An item is {"pixel_values": float (3, H, W), "captions": list of str, "image_id": str, "where": str}. In training
    "captions" holds those that the policy takes, in evaluation all of them. "image_id" is equal for equal images. With
    a column of long captions, "long_captions" holds one for each of "captions". A row that cannot be used gives
    {"where": str, "error": str} instead.

    Args:
        dataset: the rows.
        image_column: name of the image column, as `find_columns` returns it.
        caption_column: name of the caption column, as `find_columns` returns it.
        transform: maps an RGB PIL image, or what `augmentation` returns, to pixel values (3, H, W).
        training: whether to augment images and to apply the caption policy.
        seed: seed of all random choices.
        augmentation: changes an RGB PIL image at random; None for no augmentation.
        caption_policy: which captions training takes: "first", one at "random" in each epoch, or "all".
        long_caption_column: name of a second column of captions, as `find_caption_column` returns it. A row without a
            long caption cannot be used.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        image_column: str,
        caption_column: str,
        transform: Callable[[Any], torch.Tensor],
        training: bool,
        seed: int,
        augmentation: Callable[[Image.Image], Any] | None = None,
        caption_policy: str = "random",
        long_caption_column: str | None = None,
    ):
        if caption_policy not in CAPTION_POLICIES:
            raise ValueError(f"caption_policy={caption_policy!r}: choose one of {', '.join(CAPTION_POLICIES)}.")
        self.dataset = undecoded(dataset)
        self.image_column = image_column
        self.caption_column = caption_column
        self.transform = transform
        self.training = training
        self.seed = seed
        self.augmentation = augmentation
        self.caption_policy = caption_policy
        self.long_caption_column = long_caption_column
        # In shared memory, so that persistent workers see each new epoch, however they were started.
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, on which the random choices of training depend."""
        self._epoch.fill_(epoch)

    def item(self, row: dict[str, Any], where: str, epoch: int, key: str | None = None) -> dict[str, Any]:
        """Return the item of one row.

        Args:
            where: place of the row, for messages.
            key: what the random choices depend on, besides the seed and the epoch; the image's id if None.
        """
        value = row[self.image_column]
        long_captions = []
        try:
            captions = read_captions(get_cell(row, self.caption_column))
            if not captions:
                raise ValueError("the caption is empty")
            if self.long_caption_column is not None:
                long_captions = read_captions(get_cell(row, self.long_caption_column))
                if not long_captions:
                    raise ValueError("the long caption is empty")
            image, image_id = read_image_cell(value)
        except Exception as error:
            path = value.get("path") if isinstance(value, dict) else value if isinstance(value, str) else None
            return {"where": f"{where} ({path})" if path else where, "error": one_line(error)}

        pixels: Any = image
        if self.training:
            # Only the generator of the CPU: torch.manual_seed would also reset the dropout of the model on its device.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(stable_hash(f"{self.seed} {epoch} {key or image_id}"))
                chosen = int(torch.randint(len(captions), ()))
                captions = {"first": captions[:1], "random": [captions[chosen]], "all": captions}[self.caption_policy]
                long_captions = self._choose_long_captions(long_captions, len(captions))
                if self.augmentation is not None:
                    pixels = self.augmentation(image)
        item = {"pixel_values": self.transform(pixels), "captions": captions, "image_id": image_id, "where": where}
        return {**item, "long_captions": long_captions} if long_captions else item

    def _choose_long_captions(self, long_captions: list[str], count: int) -> list[str]:
        """One long caption for each of `count` captions, in order, from one at random on with the policy "random"."""
        if not long_captions:
            return []
        first = int(torch.randint(len(long_captions), ())) if self.caption_policy == "random" else 0
        return [long_captions[(first + number) % len(long_captions)] for number in range(count)]


class PairDataset(_Pairs, torch.utils.data.Dataset):
    """Items of a data set with a length, by index."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(self.dataset[index], where=f"row {index}", epoch=int(self._epoch), key=str(index))


class KeptPairs(torch.utils.data.Dataset):
    """The items of a `PairDataset` without random choices. Each is made once and kept in memory."""

    def __init__(self, pairs: PairDataset):
        self.pairs = pairs
        self._items: dict[int, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index not in self._items:
            self._items[index] = self.pairs[index]
        return dict(self._items[index])


def split_by_process(dataset: IterableDataset, rank: int, world_size: int) -> IterableDataset:
    """Return the rows of one of `world_size` processes; each row belongs to exactly one process.

    Processes get whole shards if `world_size` divides the number of shards, or if there are many. Otherwise each reads
    all shards and decodes every `world_size`-th row.
    """
    num_shards = dataset.num_shards
    whole_shards = num_shards % world_size == 0 or num_shards >= MIN_SHARDS_PER_PROCESS * world_size
    return split_dataset_by_node(dataset, rank, world_size, strategy="shards" if whole_shards else "examples")


class StreamedPairDataset(_Pairs, torch.utils.data.IterableDataset):
    """Items of a stream, whose shards are divided among the processes and the workers of the dataloader.

    In evaluation it is one pass in order. In training it never ends, so that each process always has a next batch; the
    number of steps ends the run. Each pass yields each row once. It shuffles the shards, their assignment to workers,
    and a buffer of rows. Workers with fewer rows start the next pass sooner.

    In training an item also holds "position": (worker, pass, rows of this pass that the worker has read).
    """

    def __init__(self, dataset: IterableDataset, *args: Any, **kwargs: Any):
        super().__init__(dataset, *args, **kwargs)
        self.process = 0
        self._skipped_batches, self._batch_size = 0, 1
        self._positions: dict[int, tuple[int, int]] = {}

    @property
    def num_shards(self) -> int:
        """Number of shards, which is the largest number of workers that have rows to read."""
        return self.dataset.num_shards

    def for_process(self, rank: int, world_size: int) -> "StreamedPairDataset":
        """Return a copy that yields the items of one process."""
        share = copy.copy(self)
        share.dataset = split_by_process(self.dataset, rank, world_size)
        share.process = rank
        return share

    def resume(self, positions: dict[int, tuple[int, int]], batches: int, batch_size: int) -> None:
        """Continue a stream after `batches` batches.

        The next iteration yields that many batches of `None` first, because a trainer skips the batches that it has
        trained on. Rows that were read before are skipped without decoding their images.

        Args:
            positions: worker -> (pass, rows of this pass that it has read).
            batches: number of batches that were read.
            batch_size: items in each.
        """
        self._positions, self._skipped_batches, self._batch_size = dict(positions), batches, batch_size

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        if not self.training:
            for count, row in enumerate(self.dataset):
                yield self.item(row, _where(row, f"row {count} of worker {worker}"), epoch=0)
            return
        # Workers take turns: one batch each.
        yield from itertools.repeat(None, len(range(worker, self._skipped_batches, num_workers)) * self._batch_size)
        first, start = self._positions.get(worker, (int(self._epoch), 0))
        for number in itertools.count(first):
            reader = f"of worker {worker} of process {self.process} in pass {number}"
            # A new seed for each pass, not a new epoch of the data set: workers share its epoch and may be in different
            # passes. One shard at a time, because datasets reads several in threads and then waits 5 s at the end.
            seed = abs(stable_hash(f"{self.seed} {number}"))
            rows = self.dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=1)
            count = 0
            for count, row in enumerate(rows, start=1):
                if count > start:
                    item = self.item(row, _where(row, f"row {count - 1} {reader}"), epoch=number)
                    yield {**item, "position": (worker, number, count)}
            if count == 0:
                raise ValueError(
                    f"Worker {worker} of process {self.process} has no rows to read: the stream has fewer rows than "
                    "there are workers in all, or its shards are empty; use fewer dataloader workers or processes."
                )
            start = 0


def _where(row: dict[str, Any], place: str) -> str:
    """Return the place of a row of a stream: its key and shard if it comes from a tar, since these never change."""
    return f"{row['__key__']} of {row['__url__']}" if row.get("__url__") else place


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text, or the name of its class if it has no text."""
    if isinstance(error, UnidentifiedImageError):
        return "this is not an image of a known format"  # PIL's own text holds a memory address
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def set_epoch(dataset: Any, epoch: int) -> None:
    """Set the epoch of each data set inside `dataset` that has one.

    It looks through the wrappers of torch, such as Subset and ConcatDataset: everything with the attribute `dataset`,
    or `datasets` with a list.
    """
    if callable(getattr(dataset, "set_epoch", None)):
        dataset.set_epoch(epoch)
        return
    wrapped = [getattr(dataset, "dataset", None)]
    several = getattr(dataset, "datasets", None)
    wrapped += list(several.values()) if isinstance(several, dict) else list(several or ())
    for inner in wrapped:
        if inner is not None and inner is not dataset:
            set_epoch(inner, epoch)


def build_pairs(
    rows: Dataset | IterableDataset,
    processor: CLIPProcessor,
    *,
    training: bool,
    seed: int = 0,
    image_column: str | None = None,
    caption_column: str | None = None,
    augment: bool = True,
    caption_policy: str = "random",
    long_caption_column: str | None = None,
    keep_in_memory: bool = False,
) -> PairDataset | StreamedPairDataset | KeptPairs:
    """Return the items of a split for the trainer or for evaluation.

    Args:
        rows: as `load_pairs` returns them.
        processor: its image processor makes the pixel values.
        training: whether to augment images and to apply the caption policy.
        seed: seed of all random choices.
        image_column: name of the image column; found by its usual names if None.
        caption_column: name of the caption column; found by its usual names if None.
        augment: whether training augments images.
        caption_policy: which captions training takes: "first", one at "random" in each epoch, or "all".
        long_caption_column: name of a second column with long captions of the same images, for `ShortCaptionLoss`.
        keep_in_memory: whether training decodes each image once and keeps its pixel values; it needs a data set with a
            length, `augment` false and another caption policy than "random".

    Raises:
        ValueError: if there is no image column or no caption column, the policy is unknown, or the items cannot be
            kept in memory.
    """
    if keep_in_memory and (augment or caption_policy == "random" or not isinstance(rows, Dataset)):
        raise ValueError(
            "keep_in_memory=True needs items that are the same in each epoch, and no stream: turn augmentation off "
            f"(no_augment) and choose caption_policy 'first' or 'all'; it is {caption_policy!r}."
        )
    if long_caption_column is not None:
        find_caption_column(rows, long_caption_column, parameter="long_caption_column")
    kind = PairDataset if isinstance(rows, Dataset) else StreamedPairDataset
    image_size = processor.image_processor.crop_size["height"]
    pairs = kind(
        rows,
        *find_columns(rows, image_column, caption_column),
        transform=image_transform(processor.image_processor),
        training=training,
        seed=seed,
        augmentation=augmentation(image_size) if training and augment else None,
        caption_policy=caption_policy,
        long_caption_column=long_caption_column,
    )
    return KeptPairs(pairs) if keep_in_memory and training and isinstance(pairs, PairDataset) else pairs
