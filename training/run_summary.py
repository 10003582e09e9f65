# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What a run of `mlip train` tells its reader: the settings for the model card, recall by merge ratio, and a table."""

from collections.abc import Sized
from typing import Any

from modeling_mlip.evaluation.tasks.retrieval import retrieval_results
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.hub.results import Result

from .arguments import MLIPTrainingArguments
from .fine_tuning import describe_recipe
from .trainer import MLIPTrainer

MERGE_RATIOS = (0, 0.3, 0.5, 0.7)
DIRECTIONS = ("text to image", "image to text")


def sweep_merge_ratios(trainer: MLIPTrainer) -> list[Result]:
    """Evaluate at several merge ratios; the model keeps its own.

    Returns:
        recall@1 in both directions for each ratio, with "merge_ratio" and "patch_tokens" in its setting.
    """
    vision = trainer.model.config.vision_config
    trained_ratio, num_patches = vision.merge_ratio, (vision.image_size // vision.patch_size) ** 2
    results: list[Result] = []
    for ratio in sorted({*MERGE_RATIOS, trained_ratio}):
        tokens_left = round(num_patches * (1 - ratio))
        if not tokens_left:
            continue
        trainer.model.set_merge_ratio(ratio)
        metrics = trainer.evaluation_loop(trainer.get_eval_dataloader(), f"Merge ratio {ratio:g}").metrics
        setting = {"merge_ratio": ratio, "patch_tokens": tokens_left}
        recalls = retrieval_results(metrics, key_prefix="eval_", setting=setting)
        results += [result for result in reversed(recalls) if result.k == 1]  # text to image first
    trainer.model.set_merge_ratio(trained_ratio)
    return results


def count_pairs_per_step(trainer: MLIPTrainer) -> int:
    """Pairs of all devices in one contrastive batch; a small data set has fewer than the batch size."""
    batch_size = trainer.args.train_batch_size * trainer.args.world_size
    dataset = trainer.train_dataset
    return min(batch_size, len(dataset)) if isinstance(dataset, Sized) else batch_size


def describe_run(trainer: MLIPTrainer, metrics: dict[str, float]) -> dict[str, Any]:
    """The settings and counts of a finished training run, for the model card."""
    args: MLIPTrainingArguments = trainer.args
    accumulated = args.gradient_accumulation_steps
    return {
        "pairs per step": count_pairs_per_step(trainer),
        **({"contrastive batches accumulated per step": accumulated} if accumulated > 1 else {}),
        "steps": trainer.state.global_step,
        "epochs": round(metrics["epoch"], 2),
        "peak learning rate": args.learning_rate,
        "schedule": str(args.lr_scheduler_type).rpartition(".")[2].lower(),
        "weight decay": args.weight_decay,
        **describe_recipe(args),
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "seed": args.seed,
        "minutes": round(metrics["train_runtime"] / 60, 1),
        "skipped samples": trainer.skip_budget.num_skipped,
        "skipped steps": trainer.guard.skipped_steps,
        "truncated captions": trainer.training_log.num_truncated,
    }


def format_summary(metrics: dict[str, float]) -> str:
    """The retrieval table, and below it loss, time and speed of training; each only if it was measured."""
    rows = [
        {"direction": way, **{f"recall@{k}": metrics[f"eval_{way.replace(' ', '_')}_recall@{k}"] for k in (1, 5, 10)}}
        for way in DIRECTIONS
        if f"eval_{way.replace(' ', '_')}_recall@1" in metrics
    ]
    lines = ["\n" + format_table(rows)] if rows else []
    if "train_loss" in metrics:
        speed = metrics["train_samples_per_second"]
        lines.append(f"loss {metrics['train_loss']:.3f}, {metrics['train_runtime']:.0f} s, {speed:.1f} pairs/s")
    return "\n".join(lines)
