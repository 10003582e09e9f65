# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Arguments of training: the model to start from, and `TrainingArguments` with the defaults of contrastive training."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .objective import TOKEN_LOSS_SCOPES

# Metric of the best model, and of learning rate schedules that follow a metric. Higher is better.
DEFAULT_METRIC = "eval_mean_recall"
METRIC_SCHEDULERS = ("reduce_lr_on_plateau", "greedy")
DISTILLATION_LOSSES = ("features", "similarities")
FROZEN_TOWERS = ("image", "text")


@dataclass
class ModelArguments:
    """The model to start from. Exactly one of `model_name_or_path` and `config_name` is required."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "A saved MLIP model, or a CLIP model of transformers: a folder or a Hub id."},
    )
    config_name: str | None = field(
        default=None,
        metadata={
            "help": "Train from scratch with this configuration: nano, tiny, vit-b-32, vit-b-16, vit-l-14, or a folder "
            "with a config.json."
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={
            "help": "A CLIP tokenizer: a folder or a Hub id. By default the tokenizer of --model_name_or_path; with "
            "--config_name, a tokenizer is trained on the captions of the training data."
        },
    )
    attn_implementation: str = field(
        default="sdpa",
        metadata={"help": "Attention kernel: sdpa or eager. On a CPU, eager trains faster on short sequences."},
    )


@dataclass
class MLIPTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the defaults of contrastive training, and arguments of `MLIPTrainer`.

    Without `do_train`, `do_eval` and `do_predict`, a run of `mlip train` trains, and evaluates if there is validation
    data. The metric for the best model is `eval_mean_recall` if not given.

    `docs/training-arguments.md` lists which arguments of `TrainingArguments` work and which are refused.

    Raises:
        ValueError: if a value is not allowed, or if values contradict each other.
    """

    per_device_train_batch_size: int = field(
        default=128, metadata={"help": "Pairs per device. The pairs of all devices form one contrastive batch."}
    )
    per_device_eval_batch_size: int = field(
        default=128, metadata={"help": "Images or captions per device in evaluation. It does not change the metrics."}
    )
    learning_rate: float = field(default=5e-4, metadata={"help": "Peak learning rate of AdamW."})
    weight_decay: float = field(
        default=0.1,
        metadata={"help": "Weight decay of AdamW. Norms, biases, gates, positions and temperatures have none."},
    )
    adam_beta2: float = field(default=0.98, metadata={"help": "Beta2 of AdamW. The default is CLIP's for a ViT."})
    lr_scheduler_type: str = field(
        default="cosine", metadata={"help": "Learning rate schedule, one of transformers.SchedulerType."}
    )
    warmup_steps: float = field(
        default=0.1, metadata={"help": "Warm-up steps; a value below 1 is a fraction of all steps."}
    )
    report_to: None | str | list[str] = field(
        default="tensorboard",
        metadata={"help": "Where logs are sent besides the progress bar: tensorboard, wandb, none, ..."},
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Steps between logs; a value below 1 is a fraction of all steps."}
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further options of the learning rate schedule, as JSON."}
    )
    metric_for_best_model: str | None = field(
        default=None,
        metadata={
            "help": "Metric for --load_best_model_at_end, --save_strategy best and schedules that follow a metric; "
            "eval_mean_recall if not given."
        },
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Only false is allowed: the data set and the collator need their columns."}
    )
    sweep: bool = field(
        default=True,
        metadata={"help": "After training, also evaluate at merge ratios 0, 0.3, 0.5 and 0.7 for the model card."},
    )
    start_merge_ratio: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of patch tokens merged in the first step. It changes linearly to the model's "
            "--merge_ratio in the last step. A high value such as 0.9 makes early steps cheap. Evaluation and the "
            "saved model use --merge_ratio."
        },
    )
    start_patch_dropout: float | None = field(
        default=None,
        metadata={
            "help": "Fraction of patch tokens dropped at random in the first step (FLIP). It changes linearly to the "
            "model's --patch_dropout. Evaluation keeps all patches."
        },
    )
    steps_without_patch_dropout: float = field(
        default=0.0,
        metadata={
            "help": "Last steps that drop no patches, so that the model learns from whole images; a value below 1 is a "
            "fraction of all steps."
        },
    )
    start_image_size: int | None = field(
        default=None,
        metadata={
            "help": "Side in pixels of the images of the first step, a multiple of the patch size. It grows by whole "
            "patches to the model's --image_size in the last steps."
        },
    )
    mini_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Pairs that a device computes at a time, so that --per_device_train_batch_size fits into memory. "
            "The gradients are those of the whole batch. The forward pass of both towers is computed twice."
        },
    )
    token_loss_scope: str = field(
        default="global",
        metadata={
            "help": "Negatives of the token loss with token_loss_type filip and token_loss_group_size null: 'global' "
            "(the pairs of all devices) or 'local' (the pairs of this device). 'local' is faster."
        },
    )
    keep_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of a loss that keeps the embeddings of images and captions close to those of the starting "
            "model, a frozen copy at its own merge ratio; see --keep_type."
        },
    )
    reference_weight: float = field(
        default=10.0, metadata={"help": "Weight of the same loss on the pairs of --reference_file."}
    )
    keep_type: str = field(
        default="features",
        metadata={
            "help": "How --keep_weight, --reference_weight and --distill_unmerged compare the two models: 'features' "
            "(1 - cosine of their embeddings) or 'similarities' (divergence of their image-caption distributions over "
            "the batch)."
        },
    )
    distill_unmerged: float = field(
        default=0.0,
        metadata={
            "nargs": "?",
            "const": 1.0,
            "help": "Weight of a loss that keeps image embeddings at --merge_ratio close to those of the starting "
            "model at merge ratio 0, a frozen copy; 1 without a value.",
        },
    )
    ema_decay: float | None = field(
        default=None,
        metadata={
            "help": "Decay per step of an exponential moving average of the weights, for example 0.999. Evaluation, "
            "checkpoints and the saved model then use the average."
        },
    )
    long_caption_column: str | None = field(
        default=None,
        metadata={
            "help": "A second column of the training data, with a long caption of each image. The losses of the model "
            "then use the long captions, and a further loss compares the captions of --caption_column with the "
            "principal components of the image embeddings (Long-CLIP)."
        },
    )
    short_caption_weight: float = field(
        default=1.0, metadata={"help": "Weight of that loss of the short captions, beside --long_caption_column."}
    )
    lora_rank: int | None = field(
        default=None,
        metadata={
            "help": "Train LoRA adapters of this rank on the attention and MLP layers of both towers, by PEFT. Only "
            "they and the parameters that --model_name_or_path lacks train. They are merged into the weights at the "
            "end."
        },
    )
    lora_alpha: float | None = field(
        default=None, metadata={"help": "Adapters are scaled by lora_alpha / lora_rank; 2 * lora_rank if not given."}
    )
    keep_adapter: bool = field(
        default=False, metadata={"help": "Save the adapter for peft.PeftModel instead of merging it into the weights."}
    )
    freeze: str | None = field(
        default=None,
        metadata={"help": "A tower to freeze with its projections: 'image' (LiT) or 'text'. New parameters train."},
    )
    freeze_layers: int = field(
        default=0,
        metadata={"help": "Freeze the first blocks of each tower, and its embeddings. New parameters train."},
    )
    layer_decay: float = field(
        default=1.0,
        metadata={
            "help": "Factor of the learning rate from each block to the one before it, for example 0.75. Projections "
            "have --learning_rate."
        },
    )
    new_parameters_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Peak learning rate of the parameters that --model_name_or_path lacks."},
    )
    head_warmup_steps: float = field(
        default=0.0,
        metadata={
            "help": "First steps, in which only projections, temperatures and new parameters train; a value below 1 is "
            "a fraction of all steps."
        },
    )
    max_nonfinite_steps: int = field(
        default=5,
        metadata={
            "help": "A step is skipped if its loss or gradient is not finite. The run ends with an error after this "
            "many skipped steps in a row."
        },
    )
    skip_budget: float = field(
        default=0.01,
        metadata={"help": "Fraction of broken images and empty captions above which the run ends with an error."},
    )

    def __post_init__(self):
        self.has_task_flags = self.do_train or self.do_eval or self.do_predict
        self.do_train = self.do_train or not self.has_task_flags
        self._set_metric_defaults()
        try:
            super().__post_init__()
        except ValueError as error:  # some of transformers' messages have several lines
            raise ValueError(" ".join(str(error).split())) from error
        self._set_schedule_defaults()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        # No key of a batch is a label; Trainer would search for some.
        self.label_names = self.label_names or []
        # Every parameter has a gradient in every step, and the only buffers are position ids, which never change.
        self.ddp_find_unused_parameters = self.ddp_find_unused_parameters or False
        self.ddp_broadcast_buffers = self.ddp_broadcast_buffers or False
        self._check_ranges()
        self._check_fine_tuning()
        if self.lora_rank is not None and self.lora_alpha is None:
            self.lora_alpha = 2.0 * self.lora_rank

    def _set_metric_defaults(self) -> None:
        # Enumerations of transformers are strings, so `in` and `==` also work with their members.
        selects_best = self.load_best_model_at_end or self.save_strategy == "best"
        if self.metric_for_best_model is None and (selects_best or self.lr_scheduler_type in METRIC_SCHEDULERS):
            self.metric_for_best_model = DEFAULT_METRIC

    def _set_schedule_defaults(self) -> None:
        options = self.lr_scheduler_kwargs
        if options is not None and not isinstance(options, dict):
            raise ValueError(
                f"lr_scheduler_kwargs={options!r}: give a dictionary, as JSON such as '{{\"num_cycles\": 0.5}}'."
            )
        if self.lr_scheduler_type in METRIC_SCHEDULERS:
            # The schedules' own default is "min": they would lower the learning rate when recall rises.
            self.lr_scheduler_kwargs = {"mode": "max" if self.greater_is_better else "min", **(options or {})}

    def _check_ranges(self) -> None:
        if not 0 <= self.skip_budget <= 1:
            raise ValueError(f"skip_budget={self.skip_budget}: choose a fraction from 0 to 1.")
        if self.mini_batch_size is not None and self.mini_batch_size < 1:
            raise ValueError(f"mini_batch_size={self.mini_batch_size}: choose 1 or more, or leave it out.")
        weights = ("keep_weight", "reference_weight", "distill_unmerged", "short_caption_weight")
        for name in ("learning_rate", "weight_decay", *weights):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: choose a finite number, 0 or more.")
        for name in ("gradient_accumulation_steps", "per_device_eval_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: choose 1 or more.")
        if self.do_train and self.max_steps == 0:
            raise ValueError("max_steps=0: choose 1 or more, or leave it out to train for num_train_epochs.")
        if self.do_train and self.max_steps < 0 and not 0 < self.num_train_epochs < math.inf:
            raise ValueError(f"num_train_epochs={self.num_train_epochs}: choose a finite number above 0.")
        if self.keep_type not in DISTILLATION_LOSSES:
            raise ValueError(f"keep_type={self.keep_type!r}: choose one of {', '.join(DISTILLATION_LOSSES)}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay}: choose a value between 0 and 1, or leave it out.")
        if self.max_nonfinite_steps < 1:
            raise ValueError(f"max_nonfinite_steps={self.max_nonfinite_steps}: choose 1 or more.")
        if self.token_loss_scope not in TOKEN_LOSS_SCOPES:
            raise ValueError(
                f"token_loss_scope={self.token_loss_scope!r}: choose one of {', '.join(TOKEN_LOSS_SCOPES)}."
            )

    def _check_fine_tuning(self) -> None:
        if self.lora_rank is not None and self.lora_rank < 1:
            raise ValueError(f"lora_rank={self.lora_rank}: choose 1 or more, or leave it out.")
        for name, default in (("lora_alpha", None), ("keep_adapter", False)):
            value = getattr(self, name)
            if value != default and self.lora_rank is None:
                raise ValueError(f"{name}={value} has no effect without lora_rank: set both, or leave it out.")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < math.inf:
            raise ValueError(f"lora_alpha={self.lora_alpha}: choose a finite number above 0.")
        if self.freeze is not None and self.freeze not in FROZEN_TOWERS:
            raise ValueError(f"freeze={self.freeze!r}: choose one of {', '.join(FROZEN_TOWERS)}, or leave it out.")
        if not 0 < self.layer_decay <= 1:
            raise ValueError(f"layer_decay={self.layer_decay}: choose a value above 0 and at most 1.")
        for name in ("freeze_layers", "new_parameters_learning_rate", "head_warmup_steps"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise ValueError(f"{name}={value}: choose a finite number, 0 or more.")
