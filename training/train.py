# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip train`: train or fine-tune on image-caption pairs, evaluate, save.

    mlip train --config_name tiny --dataset_name shapes --output_dir runs/shapes --num_train_epochs 5
    mlip train --config_name tiny --merge_ratio 0.5 --train_file train.parquet --validation_file test.parquet \\
        --output_dir runs/mine --num_train_epochs 20 --eval_strategy epoch
    mlip train --model_name_or_path runs/mine --data_dir my_images --output_dir runs/fine --learning_rate 1e-5
    mlip train --model_name_or_path runs/fine --validation_file test.parquet --output_dir runs/fine --do_eval

Without --do_train and --do_eval it trains, and then evaluates if there is validation data.
"""

from itertools import chain
from pathlib import Path
from typing import Any

from transformers import CLIPProcessor, set_seed
from transformers.trainer_utils import get_last_checkpoint

from modeling_mlip import MLIPConfig
from modeling_mlip.data.columns import find_caption_column, find_columns, iterate_captions
from modeling_mlip.data.data_arguments import TrainingDataArguments
from modeling_mlip.data.items import build_pairs
from modeling_mlip.data.sources import load_pairs
from modeling_mlip.evaluation.tasks.retrieval import retrieval_results
from modeling_mlip.hub.atomic_files import check_folder_is_writable
from modeling_mlip.hub.configurations import pretrained_config
from modeling_mlip.hub.errors import hub_errors
from modeling_mlip.hub.model_card import write_model_card

from .arguments import MLIPTrainingArguments, ModelArguments
from .checkpoint import check_checkpoint
from .deepspeed_shards import check_deepspeed_config
from .distillation import build_objective
from .fine_tuning import describe_recipe
from .flags import parse_arguments
from .learning_curves import plot_learning_curves
from .run_summary import describe_run, format_summary, sweep_merge_ratios
from .starting_point import build_config, build_model, build_processor
from .trainer import MLIPTrainer

CURVES = "learning_curves.png"
# A folder with one of these holds a model or a run.
RUN_FILES = ("config.json", "trainer_state.json", "all_results.json", "*.safetensors", "pytorch_model*")

Splits = dict[str, Any]  # name of a split -> rows


def train(
    model_args: ModelArguments,
    data_args: TrainingDataArguments,
    training_args: MLIPTrainingArguments,
    overrides: dict[str, Any],
) -> dict[str, float]:
    """Run `mlip train` with parsed arguments: train, evaluate and save, each if asked for.

    Args:
        overrides: changed keys of the model's and the vision tower's configuration.

    Returns:
        The metrics of training and evaluation.

    Raises:
        OSError: if a file cannot be read or written.
        ValueError: if an argument is not allowed, or the folder would be written over.
    """
    # Step (1): what needs no data
    check_tasks(model_args, training_args, data_args.reference_file)
    checkpoint = find_checkpoint(training_args)
    if training_args.do_train:
        check_output_dir(training_args.output_dir, checkpoint)
    else:
        training_args.report_to = []  # without training, TensorBoard would write to the current folder
    set_seed(training_args.seed)
    check_max_seq_length(data_args.max_seq_length)
    config = build_config(
        model_name_or_path=model_args.model_name_or_path,
        config_name=model_args.config_name,
        overrides=overrides,
        max_seq_length=data_args.max_seq_length,
    )
    if training_args.keep_adapter and model_args.model_name_or_path is not None:
        check_kept_configuration(config, pretrained_config(model_args.model_name_or_path))
    # Step (2): data and model
    splits = load_splits_of_tasks(data_args, training_args)
    trainer = build_trainer(model_args, data_args, training_args, config, splits)
    # Step (3): train and save, then evaluate
    metrics: dict[str, float] = {}
    if training_args.do_train:
        metrics |= trainer.train(resume_from_checkpoint=checkpoint).metrics
        with hub_errors("--push_to_hub"):
            trainer.save_model()
    if training_args.do_eval:
        metrics |= trainer.evaluate()
    # Step (4): results for people
    if training_args.do_train:
        finish_training(trainer, metrics, model_args, data_args)
    elif trainer.is_world_process_zero():
        trainer.save_metrics("eval", metrics, combined=False)
        print(format_summary(metrics))
        print(f"\nSaved to {training_args.output_dir}: eval_results.json.")
    return metrics


# Step (1)


def check_tasks(model_args: ModelArguments, args: MLIPTrainingArguments, reference_file: str | None = None) -> None:
    """Raise ValueError for tasks that `mlip train` does not have, and flags that the tasks do not use."""
    if args.do_predict:
        raise ValueError(
            "--do_predict: mlip train writes no predictions. Leave it out; compute metrics with 'mlip evaluate', or "
            "embeddings in Python with MLIPTrainer.predict."
        )
    flags = {f"--{name} {getattr(args, name):g}": getattr(args, name) for name in ("keep_weight", "distill_unmerged")}
    for flag, is_given in {**flags, f"--reference_file {reference_file}": reference_file}.items():
        if is_given and model_args.model_name_or_path is None:
            raise ValueError(f"{flag} keeps what a model knew before training: give it as --model_name_or_path.")
    default_weight = MLIPTrainingArguments.reference_weight
    if reference_file is None and args.reference_weight != default_weight:
        raise ValueError(
            f"--reference_weight {args.reference_weight:g} has no effect without --reference_file: give the file, or "
            "leave it out."
        )
    if reference_file is not None and not args.do_train:
        raise ValueError(f"--reference_file {reference_file} has no effect without training: leave it out.")
    if args.do_train:
        check_starting_point(model_args, args)
        return
    if model_args.model_name_or_path is None:
        raise ValueError("--do_eval without --do_train: give the model to evaluate as --model_name_or_path.")
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            f"--resume_from_checkpoint {args.resume_from_checkpoint} without training: add --do_train, or evaluate the "
            "checkpoint as --model_name_or_path."
        )
    if args.push_to_hub:
        raise ValueError(
            f"--push_to_hub without training: add --do_train, or use 'mlip push {model_args.model_name_or_path}'."
        )


def check_starting_point(model_args: ModelArguments, args: MLIPTrainingArguments) -> None:
    """Raise ValueError for a flag of fine-tuning without a model to start from."""
    recipe = describe_recipe(args)
    if recipe and model_args.model_name_or_path is None:
        raise ValueError(
            f"--config_name {model_args.config_name} starts from random weights, and these flags fine-tune a model: "
            f"{', '.join(f'--{name}' for name in recipe)}. Leave them out, or give --model_name_or_path."
        )


def check_kept_configuration(config: MLIPConfig, starting: MLIPConfig) -> None:
    """Raise ValueError if a run with --keep_adapter changes the configuration: an adapter does not contain it."""
    now, before = ({**c.to_dict(), **c.vision_config.to_dict(), **c.text_config.to_dict()} for c in (config, starting))
    changed = sorted(name for name in now if now[name] != before.get(name) and not isinstance(now[name], dict))
    if changed:
        raise ValueError(
            f"--keep_adapter: an adapter does not contain the configuration, and this run changes {', '.join(changed)} "
            "of the starting model. Leave out the flags that change it, or leave out --keep_adapter."
        )


def find_checkpoint(args: MLIPTrainingArguments) -> str | None:
    """The checkpoint to resume from. "true" means the last one of `output_dir`, or none if there is none yet, so that
    the same command starts a run and restarts it."""
    value = args.resume_from_checkpoint
    if value is None or str(value).lower() == "false":
        return None
    if str(value).lower() != "true":
        return value
    return get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None


def check_output_dir(output_dir: str, checkpoint: str | None) -> None:
    """Raise ValueError if training would write over a finished or interrupted run, OSError if it cannot write.

    Args:
        checkpoint: the checkpoint to resume from; one in `output_dir` continues the run there.
    """
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--output_dir {folder} is a file: give a folder.")
    check_folder_is_writable(folder)
    last = get_last_checkpoint(output_dir) if folder.is_dir() else None
    run_files = [path.name for pattern in RUN_FILES for path in folder.glob(pattern)]
    if last is None and not run_files:
        return
    if checkpoint is not None and Path(checkpoint).resolve().parent == folder.resolve():
        return
    raise ValueError(
        f"--output_dir {folder} holds a run already ({Path(last).name if last else run_files[0]}): choose another "
        f"folder{resume_hint(last)}."
    )


def resume_hint(last: str | None) -> str:
    """How to continue the run in the folder, if its last checkpoint is complete."""
    try:
        check_checkpoint(last or "")
    except ValueError:
        return ""
    return f", or continue the run with --resume_from_checkpoint {last}"


def check_max_seq_length(max_seq_length: int | None) -> None:
    """Raise ValueError if captions of that length have no room for a word."""
    if max_seq_length is not None and max_seq_length < 3:
        raise ValueError(f"--max_seq_length {max_seq_length}: choose at least 3 (BOS, one token, EOS).")


# Step (2)


def load_splits_of_tasks(data_args: TrainingDataArguments, args: MLIPTrainingArguments) -> Splits:
    """Load the splits that the tasks need. Sets `do_eval` if no task was named and there is validation data.

    Raises:
        ValueError: if a split that a task needs is missing.
    """
    source = data_args.source()
    if not args.do_train and data_args.validation_file:
        source["train_file"] = None  # not needed
    splits = load_pairs(**source, **data_args.columns())
    if args.do_train and "train" not in splits:
        raise ValueError("The data has no split to train on: give one as --train_file.")
    if args.do_train and data_args.streaming and args.max_steps <= 0:
        raise ValueError("--streaming: a stream has no known end. Give the number of steps as --max_steps.")
    if "validation" not in splits:
        check_needs_no_validation(args)
    elif not args.has_task_flags:
        args.do_eval = True
    return splits


def load_references(data_args: TrainingDataArguments) -> Any:
    """The rows of `reference_file`; None if it is not given."""
    if data_args.reference_file is None:
        return None
    return load_pairs(train_file=data_args.reference_file, **data_args.columns())["train"]


def check_needs_no_validation(args: MLIPTrainingArguments) -> None:
    """Raise ValueError for the first flag that needs validation data."""
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    flags = {
        f"--eval_strategy {strategy}": strategy != "no",
        "--eval_on_start": args.eval_on_start,
        "--load_best_model_at_end": args.load_best_model_at_end,
        "--save_strategy best": args.save_strategy == "best",
        "--do_eval": args.do_eval,
    }
    for flag, is_given in flags.items():
        if is_given:
            raise ValueError(f"{flag} needs validation data, and there is none: give it as --validation_file.")


def build_trainer(
    model_args: ModelArguments,
    data_args: TrainingDataArguments,
    args: MLIPTrainingArguments,
    config: MLIPConfig,
    splits: Splits,
) -> MLIPTrainer:
    """The trainer of a run, with its model, processor and data sets."""
    name = model_args.model_name_or_path
    captions = None
    if name is None and model_args.tokenizer_name is None:
        if data_args.streaming:
            raise ValueError("--streaming: a tokenizer cannot be trained on a stream. Give one as --tokenizer_name.")
        columns: list[Any] = [find_columns(splits["train"], **data_args.columns())[1]]
        if args.long_caption_column is not None:
            columns.append(find_caption_column(splits["train"], args.long_caption_column, "long_caption_column"))
        captions = chain.from_iterable(iterate_captions(splits["train"], column) for column in columns)
    if (deepspeed_config := getattr(args, "hf_deepspeed_config", None)) is not None:
        check_deepspeed_config(deepspeed_config.config)  # before transformers builds a model for it
    processor = build_processor(
        config, model_name_or_path=name, tokenizer_name=model_args.tokenizer_name, captions=captions
    )
    model, new_parameters = build_model(
        config, processor.tokenizer, model_name_or_path=name, attn_implementation=model_args.attn_implementation
    )
    datasets = build_datasets(splits, processor, data_args, args)
    references = load_references(data_args)
    keep_merge_ratio = None if name is None else pretrained_config(name).merge_ratio
    with hub_errors("--push_to_hub"):
        return MLIPTrainer(
            model,
            args,
            train_dataset=datasets.get("train") if args.do_train else None,
            eval_dataset=datasets.get("validation"),
            processing_class=processor,
            objective=build_objective(model, args, keep_merge_ratio, has_references=references is not None),
            max_seq_length=data_args.max_seq_length,
            new_parameters=new_parameters,
            reference_dataset=references,
        )


def build_datasets(
    splits: Splits, processor: CLIPProcessor, data_args: TrainingDataArguments, args: MLIPTrainingArguments
) -> dict[str, Any]:
    """The items of each split; those of "train" are augmented, and have long captions if asked for."""
    options = {"seed": args.seed, **data_args.items()}
    training = {"training": True, "long_caption_column": args.long_caption_column}
    return {
        split: build_pairs(rows, processor, **options, **(training if split == "train" else {"training": False}))
        for split, rows in splits.items()
    }


# Step (4)


def finish_training(
    trainer: MLIPTrainer, metrics: dict[str, float], model_args: ModelArguments, data_args: TrainingDataArguments
) -> None:
    """Save metrics, learning curves and model card, print the summary, and push if asked for."""
    args: MLIPTrainingArguments = trainer.args
    folder = Path(args.output_dir)
    trainer.save_state()
    # In every process: FSDP gathers the weights of an evaluation from all of them.
    merge_ratios = sweep_merge_ratios(trainer) if args.sweep and args.do_eval else None
    if trainer.is_world_process_zero():
        trainer.save_metrics("all", metrics, combined=False)
        plot_learning_curves(trainer.state.log_history, folder / CURVES)
        write_model_card(
            folder,
            results=retrieval_results(metrics, key_prefix="eval_") if "eval_mean_recall" in metrics else [],
            config=trainer.model.config,
            dataset=data_args.dataset_name or data_args.data_dir or data_args.train_file,
            measured_on=data_args.validation_file,
            base_model=model_args.model_name_or_path,
            training=describe_run(trainer, metrics),
            curves=CURVES,
            merge_ratios=merge_ratios,
        )
        print(format_summary(metrics))
        print(f"\nSaved to {folder}: weights, processor, model card, {CURVES}.")
    if args.push_to_hub:
        repo = trainer.hub_model_id
        with hub_errors(repo, f"The run is saved; share it with 'mlip push {args.output_dir} {repo}'."):
            trainer.push_to_hub()


def main(arguments: list[str] | None = None) -> None:
    train(*parse_arguments(arguments, description=__doc__))


if __name__ == "__main__":
    main()
