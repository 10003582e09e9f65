# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`DataArguments`: the flags that name a data set, its columns and how training reads it."""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class DataArguments:
    """The image-caption pairs."""

    dataset_name: str | None = field(
        default=None, metadata={"help": "A Hub id or a local folder that datasets reads, or 'shapes' (drawn here)."}
    )
    dataset_config_name: str | None = field(default=None, metadata={"help": "The configuration of that data set."})
    data_dir: str | None = field(
        default=None,
        metadata={
            "help": "A folder of images with metadata.csv or metadata.jsonl, or of tar shards; to evaluate also one of "
            "a folder of images for each class."
        },
    )
    train_file: str | None = field(
        default=None, metadata={"help": "A csv, tsv, json, parquet or webdataset tar file (or a pattern) to train on."}
    )
    validation_file: str | None = field(default=None, metadata={"help": "The same, to evaluate on."})
    image_column: str | None = field(
        default=None,
        metadata={"help": "The column of images or of paths to them; found by its usual names if not given."},
    )
    caption_column: str | None = field(
        default=None, metadata={"help": "The column of captions (a string or a list); found by its usual names."}
    )
    caption_policy: Literal["first", "random", "all"] = field(
        default="random",
        metadata={
            "help": "Of several captions of an image, training takes the first, one at random in each epoch, or all, "
            "each a pair of its own. Evaluation takes all."
        },
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Longest caption in tokens, BOS and EOS included; the model's context if not given."},
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read the data set as a stream; training then needs --max_steps."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many pairs."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Evaluate on the first so many images."})
    augment: bool = field(
        default=True, metadata={"help": "Train on shifted, scaled and brightened images rather than on the plain ones."}
    )

    def source(self) -> dict[str, Any]:
        """The keyword arguments of `load_splits` and `load_pairs`, columns excepted."""
        names = ["dataset_name", "dataset_config_name", "data_dir", "train_file", "validation_file"]
        names += ["streaming", "max_train_samples", "max_eval_samples"]
        return {name: getattr(self, name) for name in names}

    def columns(self) -> dict[str, str | None]:
        """The keyword arguments of `find_columns`."""
        return {"image_column": self.image_column, "caption_column": self.caption_column}

    def items(self) -> dict[str, Any]:
        """The keyword arguments of `build_pairs`."""
        return {**self.columns(), "augment": self.augment, "caption_policy": self.caption_policy}
