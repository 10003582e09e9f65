# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What a run is given: the model and the data to start from, and how the job runs.

What changes the mathematics lives in `MLIPConfig`; every key of it is a flag of `mlip train` as well (see `train.py`).
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import TrainingArguments

from .distributed import TOKEN_LOSS_SCOPES


@dataclass
class ModelArguments:
    """The model to start from: one of the two."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A saved MLIP model or a CLIP model of transformers: a folder or a Hub id."}
    )
    config_name: str | None = field(
        default=None,
        metadata={"help": "Train from scratch: tiny, vit-b-32, vit-b-16, vit-l-14, or a folder with a config.json."},
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "A CLIP tokenizer: a folder or a Hub id. Without it the one of --model_name_or_path is taken, or, "
            "from scratch, one is trained on the captions."
        },
    )

    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa or eager; on a CPU eager trains faster on short sequences."}
    )


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


@dataclass
class MLIPTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults of contrastive training."""

    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Pairs per device; together they are one contrastive batch."}
    )
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Images or captions per device; the metrics do not depend on it."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(default=0.1, metadata={"help": "Not on norms, biases, gates, positions, temperatures."})
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of AdamW; CLIP's value for a ViT."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The learning rate schedule."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up, or a share of the run if below 1."})
    report_to: None | str | list[str] = field(
        default="tensorboard", metadata={"help": "Where logs go besides the progress bar: tensorboard, wandb, none ..."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs, or a share of the run if below 1."})
    sweep: bool = field(
        default=True,
        metadata={"help": "After training, evaluate at merge ratios 0, 0.3, 0.5 and 0.7 too, for the model card."},
    )
    start_merge_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Share of patch tokens merged away in the first step; it moves in a straight line to the model's "
            "--merge_ratio with the last. A high one, such as 0.9, makes early steps cheap. Evaluation and what is "
            "saved keep --merge_ratio."
        },
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs that a device computes at a time, to fit --per_device_train_batch_size into memory. The "
            "gradients are those of the whole batch; the towers' forward pass is computed twice."
        },
    )
    token_loss_scope: str = field(
        default="global",
        metadata={
            "help": "The negatives of the token loss where token_loss_group_size is null: 'global', the pairs of all "
            "devices, or 'local', its own (a sixth less time for a step of tiny on two devices of 128 pairs)."
        },
    )
    max_nonfinite_steps: int = field(
        default=5,
        metadata={
            "help": "A step whose loss or gradient is not finite is skipped; so many of them in a row end the run."
        },
    )
    skip_budget: float = field(
        default=0.01, metadata={"help": "Share of broken images and empty captions at which the run stops."}
    )

    def __post_init__(self):
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        # The collator and the model agree on their own keys, and loss parts are no labels.
        self.remove_unused_columns = False
        self.label_names = []
        # Every weight has a gradient in every step, and the only buffers are positions.
        self.ddp_find_unused_parameters = self.ddp_find_unused_parameters or False
        self.ddp_broadcast_buffers = self.ddp_broadcast_buffers or False
        if not 0 <= self.skip_budget <= 1:
            raise ValueError(f"skip_budget={self.skip_budget}: choose a share from 0 to 1.")
        if self.mini_batch_size is not None and self.mini_batch_size < 1:
            raise ValueError(f"mini_batch_size={self.mini_batch_size}: choose 1 or more, or leave it out.")
        if self.max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps={self.max_nonfinite_steps}: choose 1 or more.")
        if self.token_loss_scope not in TOKEN_LOSS_SCOPES:
            raise ValueError(
                f"token_loss_scope={self.token_loss_scope!r}: choose one of {', '.join(TOKEN_LOSS_SCOPES)}."
            )
