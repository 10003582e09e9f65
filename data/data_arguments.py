# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`DataArguments` choose the data set and its columns on the command line, `TrainingDataArguments` also how training
reads it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from .columns import CAPTION_COLUMNS, IMAGE_COLUMNS


@dataclass
class DataArguments:
    """The image-caption pairs."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "A Hub id, a local folder, or 'shapes' or 'framed-shapes' (images that this program draws)."},
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of that data set."})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder of tar shards, of images with metadata.csv or metadata.jsonl, of tables, or one that "
            "save_to_disk of datasets wrote. For evaluation also a folder with one folder of images per class."
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "A csv, tsv, json, jsonl, parquet or webdataset tar file to train on, or a pattern of files: "
            "'shards/{00000..00041}.tar', 'tables/*.csv'."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    image_column: str | None = field(
        default=None,
        metadata={
            "help": "The column of images, or of their paths or URLs. Relative paths start at the folder of the table. "
            f"By default the first of: {', '.join(IMAGE_COLUMNS)}."
        },
    )
    caption_column: str | None = field(
        default=None,
        metadata={
            "help": "The column of captions (strings or lists of strings). A field of a struct is named with a dot: "
            f"json.caption. By default the first of: {', '.join(CAPTION_COLUMNS)}."
        },
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={
            "help": "Longest caption in tokens, with BOS and EOS; the context length of the model by default. In mlip "
            "train a greater value gives the model this context: see 'Long captions' in docs/training.md."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data set as a stream; training then needs --max_steps."}
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Train on this number of pairs, the first ones of the data set."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on this number of images, the first ones of the data set."}
    )

    def source(self) -> dict[str, Any]:
        """Return the keyword arguments of `load_splits` and `load_pairs`, without the columns."""
        names = ["dataset_name", "dataset_config_name", "data_dir", "train_file", "validation_file"]
        names += ["streaming", "max_train_samples", "max_eval_samples"]
        return {name: getattr(self, name) for name in names}

    def columns(self) -> dict[str, str | None]:
        """Return the keyword arguments of `find_columns`."""
        return {"image_column": self.image_column, "caption_column": self.caption_column}


@dataclass
class TrainingDataArguments(DataArguments):
    """The image-caption pairs, and what training makes of them."""

    caption_policy: Literal["first", "random", "all"] = field(
        default="random",
        metadata={
            "help": "What training does with several captions of one image: take the first, take one at random in each "
            "epoch, or make a pair of each. Evaluation always uses all of them."
        },
    )
    augment: bool = field(default=True, metadata={"help": "Shift, scale and brighten the training images at random."})
    keep_in_memory: bool = field(
        default=False,
        metadata={
            "help": "Decode each training image once and keep its pixel values in memory: 0.6 MB for 224 x 224 pixels. "
            "It needs --no_augment and --caption_policy first or all."
        },
    )
    reference_file: str | None = field(
        default=None,
        metadata={
            "help": "A file like --train_file, of pairs on which the embeddings must stay close to those of the "
            "starting model, for example photographs while it is fine-tuned on drawings; see --reference_weight."
        },
    )

    def items(self) -> dict[str, Any]:
        """Return the keyword arguments of `build_pairs` that come from the command line."""
        names = ("augment", "caption_policy", "keep_in_memory")
        return {**self.columns(), **{name: getattr(self, name) for name in names}}
