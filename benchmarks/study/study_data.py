# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The data sets of the study: their description files, their images and captions, and the augmentation.

A data set is one JSON file in `benchmarks/study/data` with the fields of `StudyData`; it needs no code.
"""

import json
from collections import Counter
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, DatasetDict, concatenate_datasets
from PIL import Image, ImageOps

from modeling_mlip.data.columns import find_columns
from modeling_mlip.data.images import read_image
from modeling_mlip.data.sources import load_pairs
from modeling_mlip.evaluation.metrics import RECALL_AT

FOLDER = Path(__file__).parent / "data"
SPLIT_SEED = 0
PIXEL_MEAN, PIXEL_STD = 0.5, 0.27
# The fields that every result file holds. Of the optional fields, it holds those that change a run.
RECORDED = ("batch", "learning_rate", "steps", "shift", "scale", "colour")
RECORDED_IF_CHANGED = ("image_size", "recall_at", "config", "model")


@dataclass(frozen=True)
class StudyData:
    """A data set and the settings of its runs.

    Args:
        name: name of the description file without ".json"; the result file has the same name.
        batch: pairs per training step.
        learning_rate: the peak.
        steps: training steps of CLIP.
        shift: largest shift of a training image, as a fraction of its side.
        scale: largest relative change of its size.
        colour: largest relative change of its brightness and of its contrast.
        metric: the result that figures show, a key of `run.evaluate_arm`.
        metric_label: the name of the metric in tables and figures.
        source: keyword arguments of `load_pairs`.
        image_size: side in pixels; images of other sizes are cropped and resized.
        recall_at: the k of recall@k.
        zero_shot: prompts with `{}` for the class name, by label column of the validation split.
        config: name of the configuration, see `named_config`.
        model: changes to it, see `override_config`.
        new_validation_split: draw the validation pairs from the training split, see `draw_validation_split`.
        note: what users of the data set must know.
    """

    name: str
    batch: int
    learning_rate: float
    steps: int
    shift: float
    scale: float
    colour: float
    metric: str
    metric_label: str
    source: dict[str, Any] = field(default_factory=dict)
    image_size: int = 64
    recall_at: tuple[int, ...] = (1,)
    zero_shot: dict[str, str] = field(default_factory=dict)
    config: str = "tiny"
    model: dict[str, Any] = field(default_factory=dict)
    new_validation_split: bool = False
    note: str = ""

    def record(self) -> dict[str, Any]:
        """The settings that a result file holds: runs with equal records are comparable."""
        defaults = {entry.name: entry.default for entry in fields(self)} | {"model": {}}
        values = asdict(self)
        changed = [name for name in RECORDED_IF_CHANGED if values[name] != defaults[name]]
        return json.loads(json.dumps({name: values[name] for name in (*RECORDED, *changed)}))


def read_study_data(name_or_file: str, train_file: str | None = None, validation_file: str | None = None) -> StudyData:
    """Read the description of a data set.

    Args:
        name_or_file: the name of a file in `benchmarks/study/data` without ".json", or the path of a JSON file.
        train_file: replaces the source of the training split.
        validation_file: replaces the source of the validation split.

    Raises:
        ValueError: if there is no such file, or if it has unknown, missing or wrong fields.
    """
    path = Path(name_or_file) if name_or_file.endswith(".json") else FOLDER / f"{name_or_file}.json"
    if not path.is_file():
        names = ", ".join(sorted(file.stem for file in FOLDER.glob("*.json")))
        raise ValueError(f"data={name_or_file!r} is unknown; choose one of {names}, or the path of a .json file.")
    description = json.loads(path.read_text())
    known = {entry.name: entry for entry in fields(StudyData) if entry.name != "name"}
    required = {name for name, entry in known.items() if entry.default is entry.default_factory is MISSING}
    unknown, missing = sorted(set(description) - set(known)), sorted(required - set(description))
    if unknown or missing:
        raise ValueError(
            f"{path} has the unknown fields {unknown} and lacks the fields {missing}; it may have {', '.join(known)}."
        )
    recall_at = tuple(description.get("recall_at", StudyData.recall_at))
    if not recall_at or not set(recall_at) <= set(RECALL_AT):
        raise ValueError(f"{path}: recall_at={list(recall_at)}; choose from {', '.join(map(str, RECALL_AT))}.")
    data = StudyData(name=path.stem, **description | {"recall_at": recall_at})
    if train_file or validation_file:
        columns = {name: value for name, value in data.source.items() if name.endswith("_column")}
        files = {"train_file": train_file, "validation_file": validation_file}
        given = {name: value for name, value in files.items() if value}
        kept = {name: data.source[name] for name in files if name in data.source}
        data = replace(data, source={**columns, **kept, **given})
    return data


def load_study_data(data: StudyData) -> dict[str, Any]:
    """Load both splits into memory.

    Returns:
        "train" and "validation": uint8 images `(N, 3, S, S)` and N lists of captions.
        "labels": for each column of `zero_shot`, the labels `(N,)` of the validation split and the class names.

    Raises:
        ValueError: if a source, a split or a label column is missing.
    """
    if not any(data.source.get(name) for name in ("dataset_name", "data_dir", "train_file")):
        raise ValueError(f"{data.name} names no source: give train_file and validation_file, or complete its source.")
    splits = load_pairs(**data.source)
    if set(splits) != {"train", "validation"}:
        raise ValueError(f"{data.name} has the splits {', '.join(splits)}; the study needs train and validation.")
    if data.new_validation_split:
        splits = draw_validation_split(splits)
    loaded: dict[str, Any] = {split: _load_split(rows, data) for split, rows in splits.items()}
    validation = splits["validation"]
    if unknown := set(data.zero_shot) - set(validation.column_names):
        raise ValueError(f"{data.name} has no label column {', '.join(sorted(unknown))}; check zero_shot.")
    loaded["labels"] = {
        name: (torch.tensor(validation[name][:]), validation.features[name].names) for name in data.zero_shot
    }
    return loaded


def _load_split(rows: Dataset, data: StudyData) -> tuple[torch.Tensor, list[list[str]]]:
    image_column, caption_column = find_columns(
        rows, data.source.get("image_column"), data.source.get("caption_column")
    )
    pixels = np.stack([np.asarray(_square_image(value, data.image_size)) for value in rows[image_column]])
    captions = [[value] if isinstance(value, str) else list(value) for value in rows[caption_column]]
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), captions


def _square_image(value: Any, size: int) -> Image.Image:
    image = value if isinstance(value, Image.Image) else read_image(value["bytes"], value.get("path"))
    image = image.convert("RGB")
    return image if image.size == (size, size) else ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)


def draw_validation_split(splits: DatasetDict) -> DatasetDict:
    """Draw validation pairs from the training split, as many as the published ones; train on all other pairs.

    Use it where the settings were chosen on the published validation pairs. Every word of a drawn caption also occurs
    in a training caption, as in the published split.
    """
    train, published = splits["train"], splits["validation"]
    train_words, published_words = (
        [set(text.lower().split()) for text in rows["caption"]] for rows in (train, published)
    )
    # The number of captions with each word that are still training captions.
    num_captions = Counter(word for words in train_words + published_words for word in words)
    drawn: list[int] = []
    for row in np.random.default_rng(SPLIT_SEED).permutation(len(train)).tolist():
        if len(drawn) < len(published) and all(num_captions[word] > 1 for word in train_words[row]):
            drawn.append(row)
            num_captions.subtract(train_words[row])
    kept = sorted(set(range(len(train))) - set(drawn))
    return DatasetDict(
        train=concatenate_datasets([train.select(kept), published]), validation=train.select(sorted(drawn))
    )


class InMemoryPairs(torch.utils.data.Dataset):
    """Decoded pairs for training. A batch is augmented as a whole; each image takes one random caption.

    Args:
        images: uint8 `(N, 3, S, S)`; they are augmented on their device.
        captions: N lists of captions.
    """

    def __init__(self, images: torch.Tensor, captions: list[list[str]], data: StudyData):
        self.images, self.captions, self.data = images, captions, data

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        images = self.images[indices].float() / 255
        images = augment(images, self.data.shift, self.data.scale, self.data.colour)
        return [
            {"pixel_values": image, "captions": [self._draw_caption(i)], "image_id": str(i), "where": f"row {i}"}
            for image, i in zip((images - PIXEL_MEAN) / PIXEL_STD, indices, strict=True)
        ]

    def _draw_caption(self, index: int) -> str:
        captions = self.captions[index]
        # Without a choice, no random number is drawn.
        return captions[int(torch.randint(len(captions), ()))] if len(captions) > 1 else captions[0]


def augment(
    images: torch.Tensor, shift: float, scale: float, colour: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Shift, scale and recolour each image by its own random amounts; new pixels at the border are white.

    Args:
        images: `(B, 3, S, S)` with values from 0 to 1. Random numbers are drawn on the CPU, for the same ones on every
            device.
        shift: largest shift as a fraction of the image side.
        scale: largest relative change of the size.
        colour: largest relative change of brightness and of contrast.
    """
    B = len(images)
    zoom, x, y, brightness, contrast = (2 * torch.rand(5, B, generator=generator) - 1).to(images.device)
    if shift or scale:
        theta = torch.zeros(B, 2, 3, device=images.device)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 + scale * zoom
        theta[:, :, 2] = 2 * shift * torch.stack([x, y], dim=1)
        grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
        images = 1 - torch.nn.functional.grid_sample(1 - images, grid, align_corners=False)
    if colour:
        brightness, contrast = (1 + colour * amount[:, None, None, None] for amount in (brightness, contrast))
        images = ((images * brightness - 0.5) * contrast + 0.5).clamp(0, 1)
    return images
