# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

from dataclasses import dataclass, field

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
