# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Refuses, before training starts, the arguments of transformers' Trainer that would have no effect or a wrong one.

`docs/training-arguments.md` lists every argument. A test compares it with this file and the installed transformers.
"""

from collections.abc import Sized
from typing import Any

import datasets
from torch.utils.data import IterableDataset
from transformers import TrainingArguments
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)

from modeling_mlip.hub.extras import install_hint

from .arguments import METRIC_SCHEDULERS, MLIPTrainingArguments

# Metrics of `MLIPTrainer.evaluate`, without the prefix "eval_".
RETRIEVAL_METRICS = (
    *(f"image_to_text_recall@{k}" for k in (1, 5, 10)),
    *(f"text_to_image_recall@{k}" for k in (1, 5, 10)),
    "mean_recall",
)

# Optimizers that change the weights during the backward pass, before a gradient that is not finite can be refused.
FUSED_OPTIMIZERS = ("lomo", "adalomo")

LEAVE_OUT = "leave it out"
NO_LABELS = f"the contrastive loss has no labels; {LEAVE_OUT}"
NO_PREDICTIONS = (
    f"evaluation computes recall from all embeddings at once; {LEAVE_OUT}, and compute other metrics from "
    "trainer.predict(...)"
)

# Argument of TrainingArguments -> values that are allowed, and why no others are, with the next step.
REFUSED_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "label_smoothing_factor": ((0.0,), NO_LABELS),
    "average_tokens_across_devices": ((True,), f"the loss is a mean over pairs and counts no tokens; {LEAVE_OUT}"),
    "label_names": (([], None), NO_LABELS),
    "remove_unused_columns": ((False,), f"the data set and the collator need their columns; {LEAVE_OUT}"),
    "train_sampling_strategy": (
        ("random", "sequential"),
        "captions are tokenized per batch, so their lengths are not known before; choose one of these",
    ),
    "length_column_name": (("length",), f"only sampling by length uses it, which is refused; {LEAVE_OUT}"),
    "auto_find_batch_size": (
        (False,),
        "a smaller batch changes the contrastive loss; set mini_batch_size to fit the batch into memory",
    ),
    "neftune_noise_alpha": ((None,), "noise on token embeddings is not implemented; set attention_dropout instead"),
    "use_liger_kernel": ((False,), f"Liger has no kernels for this model; {LEAVE_OUT}"),
    "liger_kernel_config": ((None,), f"Liger has no kernels for this model; {LEAVE_OUT}"),
    "use_cache": ((False,), f"the model generates no text; {LEAVE_OUT}"),
    "prediction_loss_only": ((False,), NO_PREDICTIONS),
    "eval_do_concat_batches": ((True,), NO_PREDICTIONS),
    "eval_use_gather_object": ((False,), f"every process evaluates the whole data set; {LEAVE_OUT}"),
    "eval_accumulation_steps": ((None,), f"embeddings move to the CPU after every batch; {LEAVE_OUT}"),
    "include_for_metrics": (([], None), NO_PREDICTIONS),
    "batch_eval_metrics": ((False,), NO_PREDICTIONS),
    "include_num_input_tokens_seen": (
        ("no", "non_padding"),
        "the model's main input is the image, so 'all' would count pixels; 'non_padding' counts caption tokens",
    ),
    "parallelism_config": (
        (None,),
        "the loss needs whole rows in every process; use DDP, FSDP (fsdp) or DeepSpeed (deepspeed)",
    ),
    "dataloader_in_order": ((True,), f"a resumed run could not repeat the order of the batches; {LEAVE_OUT}"),
    "debug": (
        ([], ""),
        "transformers' debugger fails on the boolean masks of attention; leave it out, a step that is not finite is "
        "found and named in any case",
    ),
    "ddp_static_graph": (
        (None, False),
        f"mini-batches and accumulation run several backward passes per step; {LEAVE_OUT}",
    ),
}

# Key of `accelerator_config` -> the same.
REFUSED_ACCELERATOR_VALUES: dict[str, tuple[tuple[Any, ...], str]] = {
    "split_batches": ((False,), "set per_device_train_batch_size to the pairs of one process"),
    "dispatch_batches": ((None, False), "every process reads its own pairs; leave it out"),
    "even_batches": ((True,), "a process with fewer batches would leave the others waiting; leave it out"),
}

# Argument of Trainer.__init__ -> why it is refused, with the next step.
REFUSED_TRAINER_ARGUMENTS = {
    "compute_loss_func": "the objective computes the loss; pass objective=Objective([...]) with your own parts",
    "compute_metrics": "evaluation computes recall; compute other metrics from trainer.predict(...)",
    "preprocess_logits_for_metrics": "evaluation keeps no logits; compute metrics from trainer.predict(...)",
}


def check_training_arguments(args: TrainingArguments, *, has_eval_dataset: bool, **trainer_arguments: Any) -> None:
    """Raise ValueError for the first argument that `MLIPTrainer` cannot honour.

    Args:
        args: the arguments of the run.
        has_eval_dataset: whether the trainer has an `eval_dataset`.
        trainer_arguments: further keyword arguments for `Trainer.__init__`, among them `train_dataset`.
    """
    if not isinstance(args, MLIPTrainingArguments):
        raise ValueError(f"args is a {type(args).__name__}: give MLIPTrainingArguments, which has the same arguments.")
    for name, (allowed, reason) in REFUSED_VALUES.items():
        _check_value(name, getattr(args, name, allowed[0]), allowed, reason)
    for name, (allowed, reason) in REFUSED_ACCELERATOR_VALUES.items():
        _check_value(f"accelerator_config.{name}", getattr(args.accelerator_config, name), allowed, reason)
    for name, reason in REFUSED_TRAINER_ARGUMENTS.items():
        if trainer_arguments.get(name) is not None:
            raise ValueError(f"{name}={trainer_arguments[name]!r} is not supported: {reason}.")
    check_optimizer(args, **trainer_arguments)
    check_integrations(args)
    check_evaluation(args, has_eval_dataset)
    check_train_dataset(args, trainer_arguments.get("train_dataset"))


def _check_value(name: str, value: Any, allowed: tuple[Any, ...], reason: str) -> None:
    if value not in allowed:
        shown = " or ".join(repr(choice) for choice in allowed)
        raise ValueError(f"{name}={_show(value)} is not supported (allowed: {shown}): {reason}.")


def _show(value: Any) -> str:
    return repr(getattr(value, "value", value))


def check_optimizer(
    args: MLIPTrainingArguments, optimizers: tuple[Any, Any] = (None, None), **trainer_arguments: Any
) -> None:
    """Raise ValueError for an optimizer that updates weights during the backward pass, or for a setting that
    mini-batches or the optimizer ignore."""
    for name, default in (("layer_decay", 1.0), ("new_parameters_learning_rate", None)):
        if getattr(args, name) != default and optimizers[0] is not None:
            raise ValueError(
                f"{name}={getattr(args, name)} has no effect on optimizers=..., which has learning rates of its own: "
                "leave one of them out."
            )
    optim = str(getattr(args.optim, "value", args.optim))
    if optim in FUSED_OPTIMIZERS or optim.endswith("_layerwise"):
        raise ValueError(
            f"optim={optim!r} changes weights during the backward pass, before a gradient that is not finite can be "
            "refused: choose another, for example 'adamw_torch_fused' or 'adafactor'."
        )
    if optim.startswith("schedule_free") and args.ema_decay is not None:
        raise ValueError(
            f"optim={optim!r} averages the weights itself: leave out ema_decay={args.ema_decay}, or choose another."
        )
    if args.torch_empty_cache_steps is not None and args.mini_batch_size is not None:
        raise ValueError(
            f"torch_empty_cache_steps={args.torch_empty_cache_steps} has no effect with mini_batch_size="
            f"{args.mini_batch_size}: leave one of them out."
        )


def check_integrations(args: MLIPTrainingArguments) -> None:
    """Raise ValueError for a name in `report_to` that transformers does not know or whose package is missing."""
    for name in args.report_to:
        if name not in INTEGRATION_TO_CALLBACK:
            choices = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to={name!r} is unknown: choose none, or from {choices}.")
        if name not in ("flyte", *get_available_reporting_integrations()):
            install = install_hint("train") if name == "tensorboard" else "install it"
            raise ValueError(f"report_to={name!r}: its package is not installed; {install}, or choose 'none'.")


def check_evaluation(args: MLIPTrainingArguments, has_eval_dataset: bool) -> None:
    """Raise ValueError for an argument that needs evaluation where the run has none, or an unknown metric."""
    eval_strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    evaluating = [f"eval_strategy={eval_strategy!r}"] if eval_strategy != "no" else []
    evaluating += ["eval_on_start=True"] if args.eval_on_start else []
    if evaluating and not has_eval_dataset:
        raise ValueError(f"{evaluating[0]} needs an eval_dataset: give one, or leave {evaluating[0]} out.")

    following = ["load_best_model_at_end=True"] if args.load_best_model_at_end else []
    following += ["save_strategy='best'"] if args.save_strategy == "best" else []
    scheduler = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    following += [f"lr_scheduler_type={scheduler!r}"] if scheduler in METRIC_SCHEDULERS else []
    if following and eval_strategy == "no":
        raise ValueError(
            f"{following[0]} follows a metric of evaluation: set eval_strategy to 'steps' or 'epoch' and give an "
            f"eval_dataset, or leave {following[0]} out."
        )
    metric = args.metric_for_best_model
    if eval_strategy != "no" and metric is not None and not metric.endswith(RETRIEVAL_METRICS):
        raise ValueError(
            f"metric_for_best_model={metric!r}: evaluation has no such metric; choose one of "
            f"{', '.join(f'eval_{name}' for name in RETRIEVAL_METRICS)}, with several data sets eval_NAME_mean_recall."
        )


def check_train_dataset(args: MLIPTrainingArguments, train_dataset: Any) -> None:
    """Raise ValueError for arguments that this data set would ignore, or that leave no batch of it."""
    batch_size = args.train_batch_size * args.world_size
    if isinstance(train_dataset, Sized) and args.dataloader_drop_last and len(train_dataset) < batch_size:
        raise ValueError(
            f"dataloader_drop_last=True drops every batch: the data set has {len(train_dataset)} rows and a batch "
            f"{batch_size}. Leave it out, or choose a smaller per_device_train_batch_size."
        )
    if isinstance(train_dataset, IterableDataset | datasets.IterableDataset):
        for name, default in (("data_seed", None), ("train_sampling_strategy", "random")):
            value = getattr(args, name)
            if value != default:
                raise ValueError(
                    f"{name}={_show(value)} has no effect on a stream, which is shuffled by seed: leave it out."
                )
