# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Image-caption pairs, from where they lie to a batch.

In the order of a run: `load_pairs` reads the source that the flags name and `find_columns` its columns; `PairDataset`
(or `StreamedPairDataset`, dealt out by `split_by_process`) decodes one image and picks a caption; a collator makes the
batch; `SkipBudget` stops the run when too many images or captions were of no use.
"""

import copy
import glob
import hashlib
import io
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import fsspec
import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from datasets.distributed import split_dataset_by_node
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms import v2
from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer

from .arguments import DataArguments
from .shapes import shapes_dataset

# Usual names, the likeliest first; upper or lower case.
IMAGE_COLUMNS = (
    *("image", "img", "images", "jpg", "jpeg", "png", "webp"),
    *("image_path", "image_file", "file_name", "filename", "filepath", "file_path", "path"),
)
CAPTION_COLUMNS = (
    *("caption", "captions", "text", "texts", "txt", "sentence", "sentences"),
    *("description", "descriptions", "raw", "alt_text", "title"),
)
VALIDATION_SPLITS = ("validation", "val", "valid", "dev", "test")
# Extension -> the builder of datasets that reads it, and what that takes. An empty cell of a csv is an empty string,
# and a caption "None" or "NA" is that word.
READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".csv": ("csv", {"keep_default_na": False}),
    ".tsv": ("csv", {"keep_default_na": False, "sep": "\t"}),
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".parquet": ("parquet", {}),
    ".tar": ("webdataset", {}),
}
SHUFFLE_BUFFER = 1000  # pairs of a stream, still encoded
FAIR_SHARDS = 16  # shards of each process from which on one more or less makes no difference


# 1. Sources


def load_pairs(args: DataArguments) -> DatasetDict | IterableDatasetDict:
    """Read the splits "train" and "validation" (either may be missing) of image-caption pairs.

    Raises:
        FileNotFoundError, ValueError: as `load_splits`, or without a caption column.
    """
    splits = load_splits(args, captioned=True)
    for dataset in splits.values():
        find_columns(dataset, args)
    return splits


def load_splits(args: DataArguments, captioned: bool = False) -> DatasetDict | IterableDatasetDict:
    """Read the splits "train" and "validation" (either may be missing) from the one source that the flags name.

    Relative image paths in a csv, tsv, json or parquet file become relative to the file's folder. With `captioned` a
    folder of images alone is refused before they are listed; without, the names of its folders are classes.

    Raises:
        FileNotFoundError: a folder, file or Hub data set that is not there.
        ValueError: no source or several, an unreadable or empty one, or one without an image column.
    """
    sources = {
        "--dataset_name": args.dataset_name,
        "--data_dir": args.data_dir,
        "--train_file/--validation_file": args.train_file or args.validation_file,
    }
    given = [flag for flag, value in sources.items() if value]
    if len(given) != 1:
        raise ValueError(
            f"Got {' and '.join(given) or 'no source of image-caption pairs'}: give one of {', '.join(sources)} "
            "('--dataset_name shapes' needs no files)."
        )
    if args.dataset_name:
        found = _load_name(args.dataset_name, args)
    elif args.data_dir:
        found = _load_folder(args.data_dir, args, captioned)
    else:
        patterns = {"train": args.train_file, "validation": args.validation_file}
        found = {split: _load_files(f"--{split}_file", files, args) for split, files in patterns.items() if files}

    splits = {"train": found["train"]} if "train" in found else {}
    held_back = [name for name in VALIDATION_SPLITS if name in found]
    if held_back:
        splits["validation"] = found[held_back[0]]
    if not splits:
        raise ValueError(f"{given[0]} has the splits {', '.join(found)}: name one of them train, validation or test.")
    limits = {"train": args.max_train_samples, "validation": args.max_eval_samples}
    for split, dataset in splits.items():
        splits[split] = dataset = first_rows(dataset, limits[split])
        if _is_empty(dataset):
            raise ValueError(f"{given[0]} {sources[given[0]]}: the {split} split holds no pairs.")
        find_image_column(dataset, args)
    return IterableDatasetDict(splits) if args.streaming else DatasetDict(splits)


def _load_name(name: str, args: DataArguments) -> dict[str, Dataset | IterableDataset]:
    if name == "shapes":
        drawn = shapes_dataset()
        return {split: part.to_iterable_dataset() if args.streaming else part for split, part in drawn.items()}
    folder = os.path.expanduser(name)
    if not os.path.isdir(folder):
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise FileNotFoundError(f"--dataset_name {name}: no such folder; give a folder, a Hub id or 'shapes'.")
        return _load(f"--dataset_name {name}", name, args, name=args.dataset_config_name)
    found = _load(f"--dataset_name {name}", folder, args, name=args.dataset_config_name)
    return {
        split: dataset if _is_empty(dataset) else _with_paths_from(folder, dataset, args)
        for split, dataset in found.items()
    }


def _load_folder(name: str, args: DataArguments, captioned: bool) -> dict[str, Dataset | IterableDataset]:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"--data_dir {name}: no such folder.")
    if any(folder.rglob("*.tar")):
        return _load(f"--data_dir {name}", "webdataset", args, data_dir=str(folder))
    has_table = any(path.suffix in (".csv", ".jsonl", ".parquet") for path in folder.rglob("metadata.*"))
    if captioned and not has_table:
        raise ValueError(
            f"--data_dir {name}: found neither tar shards nor a metadata.csv or metadata.jsonl; add one with the "
            "columns file_name and caption, or give your own table as --train_file."
        )
    return _load(f"--data_dir {name}", "imagefolder", args, data_dir=str(folder))


def _load_files(flag: str, pattern: str, args: DataArguments) -> Dataset | IterableDataset:
    paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True), key=os.path.split)
    if not paths:
        raise FileNotFoundError(f"{flag} {pattern}: no such file.")
    extensions = sorted({os.path.splitext(path)[1].lower() for path in paths})
    if len(extensions) > 1 or extensions[0] not in READERS:
        raise ValueError(f"{flag} {pattern}: got {', '.join(extensions)} files; give one kind of {', '.join(READERS)}.")
    builder, options = READERS[extensions[0]]
    parts = []
    for folder, group in itertools.groupby(paths, key=os.path.dirname):
        found = _load(f"{flag} {pattern}", builder, args, data_files={"train": list(group)}, **options)
        if not _is_empty(found["train"]):
            parts.append(_with_paths_from(folder, found["train"], args))
    if not parts:
        raise ValueError(f"{flag} {pattern}: holds no pairs.")
    return datasets.concatenate_datasets(parts)


def _load(source: str, path: str, args: DataArguments, **options: Any) -> dict[str, Dataset | IterableDataset]:
    try:
        return datasets.load_dataset(path, streaming=args.streaming, **options)
    except Exception as error:  # datasets raises nearly anything, and wraps what says why
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        if "corresponds to no data" in str(cause):
            raise ValueError(f"{source}: holds no pairs.") from error
        raise kind(f"{source} could not be read: {one_line(cause)}") from error


def _with_paths_from(folder: str, dataset: Dataset | IterableDataset, args: DataArguments) -> Dataset | IterableDataset:
    """Make the image paths of a table relative to its folder; other kinds of images stay as they are."""
    features = dataset.features
    column = find_image_column(dataset, args)
    if features is not None and getattr(features[column], "dtype", None) not in ("string", "large_string"):
        return dataset

    def join(path: Any) -> dict[str, Any]:
        local = isinstance(path, str) and path and "://" not in path
        return {column: os.path.join(os.path.abspath(folder), path) if local else path}

    return dataset.map(join, input_columns=[column])


def first_rows(dataset: Dataset | IterableDataset, limit: int | None) -> Dataset | IterableDataset:
    """So many rows of a data set from its beginning; all of them for `None`."""
    if limit is None:
        return dataset
    return dataset.select(range(min(limit, len(dataset)))) if isinstance(dataset, Dataset) else dataset.take(limit)


def _is_empty(dataset: Dataset | IterableDataset) -> bool:
    return next(iter(undecoded(dataset)), None) is None


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The same rows with every image as {"bytes", "path"}, so that a broken one does not raise inside datasets."""
    for name, feature in (dataset.features or {}).items():
        if isinstance(feature, datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset


# 2. Columns


def find_columns(dataset: Dataset | IterableDataset, args: DataArguments) -> tuple[str, str]:
    """The names of the image and the caption column, by flag or by their usual names.

    A caption inside a struct, such as the json of a webdataset, is named "json.caption".
    """
    columns = _columns(dataset)
    inner = {
        f"{outer}.{name}": kind
        for outer, names in columns.items()
        if isinstance(names, dict)
        for name, kind in names.items()
    }
    image = find_image_column(dataset, args)
    caption = _find("caption", args.caption_column, CAPTION_COLUMNS, columns | inner)
    kind = (columns | inner)[caption]
    if dataset.features is not None and not _holds_text(kind):
        raise ValueError(
            f"The caption column {caption} holds {kind}: choose one of strings or lists of strings with "
            "--caption_column."
        )
    return image, caption


def find_image_column(dataset: Dataset | IterableDataset, args: DataArguments) -> str:
    """The name of the image column, by flag or by its usual names."""
    return _find("image", args.image_column, IMAGE_COLUMNS, _columns(dataset))


def _columns(dataset: Dataset | IterableDataset) -> dict[str, Any]:
    # A stream of csv or json knows its columns from its first row alone.
    return dict(dataset.features or next(iter(dataset), {}))


def _find(role: str, flag: str | None, usual: tuple[str, ...], columns: dict[str, Any]) -> str:
    listed = f"the columns are {', '.join(columns)}"
    if flag is not None:
        if flag not in columns:
            raise ValueError(f"--{role}_column {flag}: no such column; {listed}.")
        return flag
    by_name = {name.rsplit(".")[-1].lower(): name for name in columns} | {name.lower(): name for name in columns}
    found = [by_name[name] for name in usual if name in by_name]
    if not found:
        raise ValueError(f"No {role} column with a usual name: {listed}; choose one with --{role}_column.")
    return found[0]


def _holds_text(feature: Any) -> bool:
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        feature = feature.feature
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string", "binary")


# 3. One image and its captions


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


# 4. Data sets of items


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


# 5. Batches


def tokenize(
    tokenizer: CLIPTokenizer, captions: list[str], max_seq_length: int
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """T captions to input_ids and attention_mask, int64 (T, L) padded to the longest, and how many were cut.

    A caption of more than `max_seq_length` tokens loses its last words, never BOS or EOS.
    """
    encoded = tokenizer(captions, verbose=False)["input_ids"]
    num_truncated = sum(len(ids) > max_seq_length for ids in encoded)
    encoded = [ids if len(ids) <= max_seq_length else ids[: max_seq_length - 1] + ids[-1:] for ids in encoded]
    L = max(len(ids) for ids in encoded)
    input_ids = torch.tensor([ids + [tokenizer.pad_token_id] * (L - len(ids)) for ids in encoded])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (L - len(ids)) for ids in encoded])
    return input_ids, attention_mask, num_truncated


def build_pairs(
    rows: Dataset | IterableDataset, args: DataArguments, processor: CLIPProcessor, seed: int, training: bool
) -> PairDataset | StreamedPairDataset:
    """The items of a split, decoded, and in training augmented.

    Raises:
        ValueError: if it has no columns of images and captions.
    """
    kind = PairDataset if isinstance(rows, Dataset) else StreamedPairDataset
    image_size = processor.image_processor.crop_size["height"]
    return kind(
        rows,
        *find_columns(rows, args),
        transform=image_transform(processor.image_processor),
        training=training,
        seed=seed,
        augmentation=augmentation(image_size) if training and args.augment else None,
        caption_policy=args.caption_policy,
    )


@dataclass
class PairCollator:
    """Items to a batch of B images and T captions (in training B = T pairs: an image comes once for each caption).

    pixel_values float (B, 3, H, W); input_ids, attention_mask int64 (T, L); image_ids int64 (B,), equal for equal
    images; names, a list that says where each image lies; skipped, a list of "where: why" of the rows of no use;
    num_truncated, an int; of a stream also position, {worker: (pass, rows read)} of the one that read the batch. A
    batch that a stream skips is empty.
    """

    tokenizer: CLIPTokenizer
    max_seq_length: int

    def __post_init__(self):
        if self.max_seq_length < 3:
            raise ValueError(f"max_seq_length={self.max_seq_length}: choose at least 3 (BOS, one token, EOS).")

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        if items[0] is None:
            return {}
        position = items[-1].get("position")
        skipped = [f"{item['where']}: {item['error']}" for item in items if "error" in item]
        items = [item for item in items if "error" not in item]
        if not items:
            raise ValueError(
                f"Not one pair of a whole batch can be used: {'; '.join(skipped[:5])}. Repair or remove them."
            )
        captions = [caption for item in items for caption in item["captions"]]
        items = self.rows(items)
        input_ids, attention_mask, num_truncated = tokenize(self.tokenizer, captions, self.max_seq_length)
        return {
            "pixel_values": torch.stack([item["pixel_values"] for item in items]),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "image_ids": torch.tensor([stable_hash(item["image_id"]) for item in items]),
            "names": [item["where"] for item in items],
            "skipped": skipped,
            "num_truncated": num_truncated,
            **({"position": {position[0]: position[1:]}} if position else {}),
        }

    def rows(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The item of each image of the batch."""
        return [item for item in items for _ in item["captions"]]


class EvaluationCollator(PairCollator):
    """The same with all captions of each image, caption_image int64 (T,): the row of each caption's image, and kept
    int64 (B,): the place of each image among the items. A batch in which nothing is of use has B = T = 0."""

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        kept = torch.tensor([place for place, item in enumerate(items) if "error" not in item], dtype=torch.int64)
        counts = torch.tensor([len(items[place]["captions"]) for place in kept], dtype=torch.int64)
        if len(kept) == 0:
            skipped = [f"{item['where']}: {item['error']}" for item in items]
            batch = {"pixel_values": torch.empty(0), "skipped": skipped, "num_truncated": 0}
        else:
            batch = super().__call__(items)
        return {**batch, "kept": kept, "caption_image": torch.repeat_interleave(torch.arange(len(counts)), counts)}

    def rows(self, items: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return items


class SkipBudget:
    """Counts the rows of no use and stops the run when they are more than a share `budget` of the data set.

    A row counts once, in however many epochs it comes. A stream has no length: there the share is of the rows seen,
    judged once `WARM_UP` were, and a row counts each time it comes. One row is always forgiven, unless the budget is 0.
    Each process judges what it knows; `share` makes all of them know what all have counted.
    """

    WARM_UP = 1000
    LISTED = 100  # rows of a stream that are remembered

    def __init__(self, budget: float, num_samples: int | None):
        self.budget = budget
        self.num_samples = num_samples
        self.seen = 0
        self._count = 0
        self._rows: dict[str, str] = {}  # where -> "where: why"
        self._unshared: list[tuple[list[str], int]] = []

    @property
    def num_skipped(self) -> int:
        return self._count if self.num_samples is None else len(self._rows)

    def add(self, skipped: list[str], seen: int) -> None:
        """Count what one batch skipped of the `seen` rows that it was made from."""
        self._count_in(skipped, seen)
        self._unshared.append((skipped, seen))
        self._judge()

    def share(self) -> None:
        """Count what the other processes have added since the last time; to be called by all of them."""
        here, self._unshared = self._unshared, []
        mine = PartialState().process_index
        for process, added in enumerate(gather_object([here])):
            if process != mine:
                for skipped, seen in added:
                    self._count_in(skipped, seen)
        self._judge()

    def _count_in(self, skipped: list[str], seen: int) -> None:
        self.seen += seen
        self._count += len(skipped)
        if self.num_samples is None:
            skipped = skipped[: self.LISTED - len(self._rows)]
        self._rows |= {entry.split(": ")[0]: entry for entry in skipped}

    def judge_whole(self) -> None:
        """Judge a stream that has come to its end, however short it was."""
        self._judge(warm_up=0)

    def _judge(self, warm_up: int | None = None) -> None:
        total = self.seen if self.num_samples is None else self.num_samples
        if self.num_samples is None and self.seen < (self.WARM_UP if warm_up is None else warm_up):
            return
        allowed = max(int(self.budget * total), 1 if self.budget > 0 else 0)
        if self.num_skipped > allowed:
            raise ValueError(
                f"Skipped {self.num_skipped} of {total} pairs, and the budget of {self.budget:g} allows {allowed}: "
                f"{'; '.join(list(self._rows.values())[:5])}. Repair or remove them, or raise --skip_budget."
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": list(self._rows.values()), "count": self._count, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rows = {entry.split(": ")[0]: entry for entry in state["skipped"]}
        self._count, self.seen = state["count"], state["seen"]
