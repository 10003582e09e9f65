# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

import copy
import hashlib
import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from datasets import Dataset, IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import v2
from transformers import CLIPImageProcessor, CLIPProcessor

from .columns import find_columns

SHUFFLE_BUFFER = 1000  # pairs of a stream, still encoded


FAIR_SHARDS = 16  # shards of each process from which on one more or less makes no difference


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows with every image as {"bytes", "path"}, so that a broken one does not raise inside datasets."""
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


def _cell(row: dict[str, Any], column: str) -> Any:
    outer, _, inner = column.partition(".")
    return row[column] if column in row else row[outer][inner]


def read_captions(value: Any) -> list[str]:
    """The captions in one cell: a string, the bytes of one, or a list of these; the empty ones are left out."""
    values = value if isinstance(value, list) else [] if value is None else [value]
    captions = [
        caption.decode() if isinstance(caption, bytes) else caption for caption in values if caption is not None
    ]
    for caption in captions:
        if not isinstance(caption, str):
            raise TypeError(f"a caption is of type {type(caption).__name__}, not a string")
    return [caption.strip() for caption in captions if caption.strip()]


def read_image(data: bytes | None, path: str | None) -> Image.Image:
    """Decode an image to RGB: upright by its EXIF orientation, on white where it is transparent."""
    if data is None:
        if not path:
            raise ValueError("there is no image")
        with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
            data = file.read()
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits of grey, which convert("RGB") would clip to white
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def stable_hash(text: str | bytes) -> int:
    """A signed 64-bit number that is the same in every process and run."""
    data = text.encode() if isinstance(text, str) else text
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)


def image_transform(image_processor: CLIPImageProcessor) -> Callable[[Image.Image | torch.Tensor], torch.Tensor]:
    """One image, PIL or uint8 (3, H, W), to the pixel values (3, H, W) that the processor gives."""

    def transform(image: Image.Image | torch.Tensor) -> torch.Tensor:
        return image_processor(images=image, return_tensors="pt")["pixel_values"][0]

    return transform


class Augmentation(torch.nn.Module):
    """What training does to a PIL image before `image_transform`, as uint8 (3, S, S); mild enough for drawings.

    There is no flip: captions say left and right.
    """

    def __init__(self, image_size: int, shift: float, scale: float, brightness: float, contrast: float):
        super().__init__()
        self.image_size = image_size
        self.shift, self.scale, self.brightness, self.contrast = shift, scale, brightness, contrast

    def forward(self, image: Image.Image) -> torch.Tensor:
        pixels = v2.functional.pil_to_tensor(image)
        _, H, W = pixels.shape
        down, right, zoom, brightness, contrast = torch.empty(5).uniform_(-1, 1).tolist()

        # Step (1): a square window around the middle, moved and scaled; beyond the image its edge goes on.
        side = min(H, W)
        window = round(side / (1 + self.scale * zoom))
        top = round((H - window) / 2 + self.shift * down * side)
        left = round((W - window) / 2 + self.shift * right * side)
        rows = torch.arange(top, top + window).clamp(0, H - 1)
        columns = torch.arange(left, left + window).clamp(0, W - 1)
        pixels = pixels.index_select(1, rows).index_select(2, columns)
        size = [self.image_size, self.image_size]
        pixels = v2.functional.resize(pixels, size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True).float()

        # Step (2): brighter or darker, then more or less contrast around the mean. torchvision's ColorJitter does the
        # same at ten times the cost: on small images its floor wakes all threads.
        brightness, contrast = 1 + self.brightness * brightness, 1 + self.contrast * contrast
        offset = pixels.mean().item() * brightness * (1 - contrast)
        return pixels.mul_(brightness * contrast).add_(offset + 0.5).clamp_(0, 255).to(torch.uint8)


def augmentation(image_size: int) -> Augmentation:
    return Augmentation(image_size, shift=1 / 8, scale=0.15, brightness=0.2, contrast=0.2)


class _Pairs:
    """Makes the item of one row, for the two data sets below.

    An item is {"pixel_values": float (3, H, W), "captions": list of str, "image_id": str, "where": str}: in training
    the captions that the policy takes ("first", one at "random", or "all"), all in evaluation; equal ids are equal
    images. A row of no use is {"where": str, "error": str} instead.
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
    ):
        self.dataset = undecoded(dataset)
        self.image_column = image_column
        self.caption_column = caption_column
        self.transform = transform
        self.training = training
        self.seed = seed
        self.augmentation = augmentation
        self.caption_policy = caption_policy
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that live on see it change

    def set_epoch(self, epoch: int):
        self._epoch.fill_(epoch)

    def item(self, row: dict[str, Any], where: str, epoch: int, key: str | None = None) -> dict[str, Any]:
        """The item of a row that lies `where`; its random choices follow from the seed, the epoch and the key, which is
        the image's id if not given."""
        value = row[self.image_column]
        value = value if isinstance(value, dict) else {"path": value} if isinstance(value, str) else {"bytes": value}
        data, path = value.get("bytes"), value.get("path")
        try:
            captions = read_captions(_cell(row, self.caption_column))
            if not captions:
                raise ValueError("the caption is empty")
            image = read_image(data, path)
        except Exception as error:
            return {"where": f"{where} ({path})" if path else where, "error": one_line(error)}

        image_id = path if data is None else f"{stable_hash(data):x}"
        if self.training:
            # The CPU generator alone: torch.manual_seed would reset the model's dropout on an accelerator as well.
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(stable_hash(f"{self.seed} {epoch} {key or image_id}"))
                chosen = int(torch.randint(len(captions), ()))
                captions = {"first": captions[:1], "random": [captions[chosen]], "all": captions}[self.caption_policy]
                if self.augmentation is not None:
                    image = self.augmentation(image)
        return {"pixel_values": self.transform(image), "captions": captions, "image_id": image_id, "where": where}


class PairDataset(_Pairs, torch.utils.data.Dataset):
    """Items by index."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.item(self.dataset[index], where=f"row {index}", epoch=int(self._epoch), key=str(index))


def split_by_process(dataset: IterableDataset, rank: int, world_size: int) -> IterableDataset:
    """The share of one of `world_size` processes: no row belongs to two, every row to one.

    Whole shards where they can be dealt out evenly or are many; otherwise every `world_size`-th row of all shards,
    which every process then reads, though decodes only its own.
    """
    shards = dataset.num_shards
    whole = shards % world_size == 0 or shards >= FAIR_SHARDS * world_size
    return split_dataset_by_node(dataset, rank, world_size, strategy="shards" if whole else "examples")


class StreamedPairDataset(_Pairs, torch.utils.data.IterableDataset):
    """Items of a stream, its shards spread over the processes and over the dataloader's workers.

    In evaluation it is one pass in order. In training it is pass after pass without an end, so that every process
    always has a next batch, whatever it was dealt: the run needs a number of steps. Each pass shuffles the shards, who
    reads them, and a buffer of rows; it shows every row once. Who was dealt fewer rows begins his next pass earlier.

    An item of training says as "position": (worker, pass, rows of the pass read) where its reader stands.
    """

    def __init__(self, dataset: IterableDataset, *args: Any, **kwargs: Any):
        super().__init__(dataset, *args, **kwargs)
        self.process = 0
        self._skipped_batches, self._batch_size = 0, 1
        self._positions: dict[int, tuple[int, int]] = {}

    @property
    def num_shards(self) -> int:
        """How many workers find something to read."""
        return self.dataset.num_shards

    def for_process(self, rank: int, world_size: int) -> "StreamedPairDataset":
        """The share of one process."""
        share = copy.copy(self)
        share.dataset = split_by_process(self.dataset, rank, world_size)
        share.process = rank
        return share

    def resume(self, positions: dict[int, tuple[int, int]], batches: int, batch_size: int) -> None:
        """Go on where the workers stood after so many batches: worker -> (pass, rows of the pass read).

        The next iteration begins with as many batches of `None`: who skips the batches of a run that he resumes then
        skips what costs nothing. Rows that were read are passed over still encoded, back to the start of their pass.
        """
        self._positions, self._skipped_batches, self._batch_size = dict(positions), batches, batch_size

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        info = torch.utils.data.get_worker_info()
        worker, num_workers = (info.id, info.num_workers) if info else (0, 1)
        if not self.training:
            for count, row in enumerate(self.dataset):
                yield self.item(row, _where(row, f"row {count} of worker {worker}"), epoch=0)
            return
        # Workers take turns, a batch each.
        yield from itertools.repeat(None, len(range(worker, self._skipped_batches, num_workers)) * self._batch_size)
        first, start = self._positions.get(worker, (int(self._epoch), 0))
        for number in itertools.count(first):
            reader = f"of worker {worker} of process {self.process} in pass {number}"
            # The seed changes rather than the epoch of the data set, which workers share while one is ahead of another.
            # One shard after another: datasets reads several in threads, and then ends each pass with a pause of 5 s.
            seed = abs(stable_hash(f"{self.seed} {number}"))
            rows = self.dataset.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER, max_buffer_input_shards=1)
            count = 0
            for count, row in enumerate(rows, start=1):
                if count > start:
                    item = self.item(row, _where(row, f"row {count - 1} {reader}"), epoch=number)
                    yield {**item, "position": (worker, number, count)}
            if count == 0:
                raise ValueError(
                    f"Nothing to read for worker {worker} of process {self.process}: the stream has fewer rows than "
                    "readers, or its shards are empty; use fewer of --dataloader_num_workers and processes."
                )
            start = 0


def _where(row: dict[str, Any], place: str) -> str:
    """Where a row of a stream lies: in a tar shard its name there, which later passes find again."""
    return f"{row['__key__']} of {row['__url__']}" if row.get("__url__") else place


def one_line(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "this is not an image of a known format"  # PIL's own text holds an address
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


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
) -> PairDataset | StreamedPairDataset:
    """The items of a split, decoded, and in training augmented.

    Raises:
        ValueError: if it has no columns of images and captions.
    """
    kind = PairDataset if isinstance(rows, Dataset) else StreamedPairDataset
    image_size = processor.image_processor.crop_size["height"]
    return kind(
        rows,
        *find_columns(rows, image_column, caption_column),
        transform=image_transform(processor.image_processor),
        training=training,
        seed=seed,
        augmentation=augmentation(image_size) if training and augment else None,
        caption_policy=caption_policy,
    )
