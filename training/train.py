# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip train`: train or fine-tune on image-caption pairs, evaluate, save.

    mlip train --config_name tiny --dataset_name shapes --output_dir runs/shapes --num_train_epochs 5
    mlip train --config_name tiny --merge_ratio 0.5 --train_file train.parquet --validation_file test.parquet \
        --output_dir runs/mine --num_train_epochs 20 --eval_strategy epoch
    mlip train --model_name_or_path runs/mine --data_dir my_images --output_dir runs/fine --learning_rate 1e-5
"""

import argparse
import json
from pathlib import Path
from typing import Any

from transformers import CLIPImageProcessor, CLIPProcessor, CLIPTokenizer, HfArgumentParser, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.data.arguments import DataArguments
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.data.columns import find_columns
from modeling_mlip.data.items import build_pairs, read_captions
from modeling_mlip.data.sources import load_pairs
from modeling_mlip.hub.configurations import (
    MODEL_FIELDS,
    VISION_FIELDS,
    named_config,
    override_config,
    pretrained_config,
)
from modeling_mlip.hub.errors import hub_errors
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.hub.loading import load_pretrained, load_processor
from modeling_mlip.hub.model_card import write_model_card

from .arguments import MLIPTrainingArguments, ModelArguments
from .learning_curves import plot_learning_curves
from .trainer import MLIPTrainer

CURVES = "learning_curves.png"
MERGE_RATIOS = (0, 0.3, 0.5, 0.7)
WAYS = ("text to image", "image to text")


def parse_value(text: str) -> Any:
    """`0.5`, `true`, `null`, `[3,6,9]` as JSON reads them; anything else is a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Every key of the model's and the vision tower's configuration, to be changed by a flag of its name."""
    group = parser.add_argument_group("MLIPConfig and MLIPVisionConfig", "lists as JSON: --merge_layers [3,6,9]")
    for name in [*MODEL_FIELDS, *VISION_FIELDS]:
        group.add_argument(f"--{name}", type=parse_value, default=argparse.SUPPRESS, metavar="VALUE")


def parse_arguments(
    arguments: list[str] | None,
) -> tuple[ModelArguments, DataArguments, MLIPTrainingArguments, dict[str, Any]]:
    """The three groups of arguments, and the overrides of the configuration."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, MLIPTrainingArguments),
        prog="mlip train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_config_flags(parser)
    model_args, data_args, training_args, *rest = parser.parse_args_into_dataclasses(arguments)
    return model_args, data_args, training_args, vars(rest[0]) if rest else {}


def build_config(model_args: ModelArguments, overrides: dict[str, Any]) -> MLIPConfig:
    if model_args.model_name_or_path is not None and model_args.config_name is None:
        config = pretrained_config(model_args.model_name_or_path)
    elif model_args.config_name is not None and model_args.model_name_or_path is None:
        config = named_config(model_args.config_name)
    else:
        raise ValueError("Give one of --model_name_or_path (a model to start from) and --config_name (from scratch).")
    return override_config(config, overrides) if overrides else config


def build_processor(
    model_args: ModelArguments, data_args: DataArguments, config: MLIPConfig, pairs: dict[str, Any]
) -> CLIPProcessor:
    """The processor of the model to start from, or one of the configuration's size with the tokenizer asked for."""
    context = config.text_config.max_position_embeddings
    if model_args.model_name_or_path is not None:
        if model_args.tokenizer_name is None:
            return load_processor(model_args.model_name_or_path)
        tokenizer = CLIPTokenizer.from_pretrained(model_args.tokenizer_name)
        return CLIPProcessor.from_pretrained(model_args.model_name_or_path, tokenizer=tokenizer)
    if model_args.tokenizer_name is not None:
        tokenizer = CLIPTokenizer.from_pretrained(model_args.tokenizer_name)
    elif data_args.streaming:
        raise ValueError("A tokenizer cannot be trained on a stream; give --tokenizer_name, a folder or a Hub id.")
    else:
        column = find_columns(pairs["train"], **data_args.columns())[1]
        cells = pairs["train"].select_columns([column.partition(".")[0]])
        captions = (text for row in cells for text in read_captions(_inner(row, column)))
        tokenizer = train_tokenizer(captions, max_seq_length=context)
    size = config.vision_config.image_size
    image_processor = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def _inner(row: dict[str, Any], column: str) -> Any:
    for name in column.split("."):
        row = row[name]
    return row


def build_model(model_args: ModelArguments, config: MLIPConfig, tokenizer: CLIPTokenizer) -> MLIPModel:
    """The model, from scratch with the tokenizer's vocabulary or with the weights to start from."""
    attention = model_args.attn_implementation
    if model_args.model_name_or_path is None:
        text = config.text_config.to_dict()
        text |= {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        config = MLIPConfig(**{**config.to_dict(), "text_config": {**text, "vocab_size": len(tokenizer)}})
        return MLIPModel._from_config(config, attn_implementation=attention)
    if len(tokenizer) > config.text_config.vocab_size:
        raise ValueError(
            f"The tokenizer has {len(tokenizer)} tokens and the model {config.text_config.vocab_size}; take the "
            "tokenizer of the model by leaving out --tokenizer_name."
        )
    return load_pretrained(model_args.model_name_or_path, config=config, dtype="float32", attn_implementation=attention)


def checkpoint_to_resume(training_args: MLIPTrainingArguments) -> str | None:
    """The checkpoint that the flag names; "true" is the last one of `output_dir`, or none if there is none yet, so that
    one command starts a run and restarts it."""
    given = training_args.resume_from_checkpoint
    if given is None or given.lower() != "true":
        return given
    folder = training_args.output_dir
    return get_last_checkpoint(folder) if Path(folder).is_dir() else None


def check_output(training_args: MLIPTrainingArguments) -> None:
    """Refuses to write over a finished or interrupted run."""
    folder = Path(training_args.output_dir)
    resuming = checkpoint_to_resume(training_args) is not None
    if folder.is_dir() and not resuming and training_args.do_train:
        last = get_last_checkpoint(str(folder))
        if last is not None or (folder / "config.json").exists():
            hint = f", or go on with --resume_from_checkpoint {last}" if last else ""
            raise ValueError(f"output_dir={folder} holds a run already; choose another{hint}.")


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: MLIPTrainingArguments,
    overrides: dict[str, Any],
) -> dict[str, float]:
    """Trains, evaluates and saves; returns the metrics."""
    check_output(training_args)
    set_seed(training_args.seed)
    # Step (1): the configuration first: it is the cheapest to refuse
    config = build_config(model_args, overrides)
    context = config.text_config.max_position_embeddings
    if data_args.max_seq_length is not None and not 3 <= data_args.max_seq_length <= context:
        raise ValueError(f"max_seq_length={data_args.max_seq_length}: choose 3 to {context}, the model's context.")
    # Step (2): data, tokenizer, model
    pairs = load_pairs(**data_args.source(), **data_args.columns())
    if "train" not in pairs:
        raise ValueError("The data has no split to train on; give one as --train_file.")
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError("A stream has no end that is known before; say how long to train with --max_steps.")
    processor = build_processor(model_args, data_args, config, pairs)
    model = build_model(model_args, config, processor.tokenizer)
    datasets = {
        split: build_pairs(rows, processor, training=split == "train", seed=training_args.seed, **data_args.items())
        for split, rows in pairs.items()
    }
    if "validation" not in datasets:
        training_args.eval_strategy = "no"
    # Step (3): train and save
    with hub_errors("--push_to_hub"):
        trainer = MLIPTrainer(
            model,
            training_args,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("validation"),
            processor=processor,
            max_seq_length=data_args.max_seq_length,
        )
    result = trainer.train(resume_from_checkpoint=checkpoint_to_resume(training_args))
    metrics = dict(result.metrics)
    if "validation" in datasets:
        metrics |= trainer.evaluate()
    trainer.save_model()
    trainer.save_state()
    # Step (4): what people read
    if trainer.is_world_process_zero():
        trainer.save_metrics("all", metrics, combined=False)
        folder = Path(training_args.output_dir)
        plot_learning_curves(trainer.state.log_history, folder / CURVES)
        write_model_card(
            folder,
            metrics=metrics,
            config=model.config,
            dataset=data_args.dataset_name or data_args.data_dir or data_args.train_file,
            measured_on=data_args.validation_file,
            base_model=model_args.model_name_or_path,
            training=describe_run(training_args, trainer, metrics),
            curves=CURVES,
            merge_ratios=sweep_merge_ratios(trainer) if training_args.sweep and "validation" in datasets else None,
        )
        print(summary(metrics))
        print(f"\nSaved to {folder}: weights, processor, model card, {CURVES}.")
    if training_args.push_to_hub:
        repo = trainer.hub_model_id
        with hub_errors(repo, f"The run is saved; share it with 'mlip push {training_args.output_dir} {repo}'."):
            trainer.push_to_hub()
    return metrics


def sweep_merge_ratios(trainer: MLIPTrainer) -> list[dict[str, float]]:
    """Recall of the evaluation data at several merge ratios; the model is left as it was."""
    vision = trainer.model.config.vision_config
    trained_at, num_patches = vision.merge_ratio, (vision.image_size // vision.patch_size) ** 2
    rows = []
    for ratio in sorted({*MERGE_RATIOS, trained_at}):
        tokens_left = round(num_patches * (1 - ratio))
        if tokens_left:
            trainer.model.set_merge_ratio(ratio)
            metrics = trainer.evaluation_loop(trainer.get_eval_dataloader(), f"Merge ratio {ratio:g}").metrics
            recalls = {f"{way} recall@1 (%)": f"eval_{way.replace(' ', '_')}_recall@1" for way in WAYS}
            rows.append(
                {"merge ratio": ratio, "patch tokens left": tokens_left}
                | {shown: metrics[name] for shown, name in recalls.items()}
            )
    trainer.model.set_merge_ratio(trained_at)
    return rows


def describe_run(args: MLIPTrainingArguments, trainer: MLIPTrainer, metrics: dict[str, float]) -> dict[str, Any]:
    """The settings that a reader of the model card asks for."""
    return {
        "pairs per step": args.train_batch_size * args.world_size,
        "steps": trainer.state.global_step,
        "epochs": round(metrics["epoch"], 2),
        "peak learning rate": args.learning_rate,
        "schedule": str(args.lr_scheduler_type).rpartition(".")[2].lower(),
        "weight decay": args.weight_decay,
        "precision": "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32",
        "seed": args.seed,
        "minutes": round(metrics["train_runtime"] / 60, 1),
        "skipped samples": trainer.skip_budget.num_skipped,
        "skipped steps": trainer.guard.skipped_steps,
        "truncated captions": trainer.num_truncated,
    }


def summary(metrics: dict[str, float]) -> str:
    """The retrieval table, and under it what training took."""
    rows = [
        {"direction": way.replace("_", " "), **{f"recall@{k}": metrics[f"eval_{way}_recall@{k}"] for k in (1, 5, 10)}}
        for way in ("text_to_image", "image_to_text")
        if f"eval_{way}_recall@1" in metrics
    ]
    took = f"loss {metrics['train_loss']:.3f}, {metrics['train_runtime']:.0f} s, " if "train_loss" in metrics else ""
    speed = f"{metrics['train_samples_per_second']:.1f} pairs/s" if "train_samples_per_second" in metrics else ""
    return "\n".join(part for part in ("\n" + format_table(rows) if rows else "", took + speed) if part)


def main(arguments: list[str] | None = None) -> None:
    model_args, data_args, training_args, overrides = parse_arguments(arguments)
    # Without --do_train or --do_eval a run does both, as its name says.
    training_args.do_train = training_args.do_train or not training_args.do_eval
    train(model_args, data_args, training_args, overrides)


if __name__ == "__main__":
    main()
