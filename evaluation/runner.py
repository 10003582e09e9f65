# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Runs evaluation tasks: `evaluate` for a model in Python, `run_tasks` for several settings of a model in one pass."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor

from modeling_mlip.data.columns import find_caption_column
from modeling_mlip.hub.results import Result

from .embedding import EncodedPairs, encode_variants
from .encoders import Encoder, make_encoder
from .evaluation_split import EvaluationSplit, LoadingOptions, Rows, choose_split, label_images, prepare_split
from .labels import LabelCollator, labels_of
from .tasks import TASKS, Encodings, Task
from .tasks.task import TrainFeatures


@dataclass(frozen=True)
class Evaluation:
    """The results of one setting of a model, and the embeddings that they were computed from."""

    results: list[Result]
    pairs: EncodedPairs


def evaluate(
    model: Any,
    processor: Any,
    dataset: Rows | Mapping[str, Rows],
    tasks: Sequence[str | Task] = ("retrieval",),
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    label_columns: Sequence[str] = (),
    class_names: Sequence[str] | None = None,
    max_seq_length: int | None = None,
    max_train_samples: int | None = None,
    max_eval_samples: int | None = None,
    batch_size: int = 128,
    num_workers: int = 0,
    skip_budget: float = 0.01,
) -> list[Result]:
    """Evaluates a model on a data set.

    Example:

    ```python
    from modeling_mlip.evaluation import FewShots, evaluate

    results = evaluate(model, processor, dataset, tasks=["retrieval", FewShots(shots=[1, 4])], label_columns=["label"])
    {result.name: result.value for result in results}  # {"text_to_image_recall@1": 61.2, ...}
    ```

    Args:
        model: an `MLIPModel`, or a `CLIPModel` of transformers; its training mode is restored at the end.
        processor: its `CLIPProcessor`.
        dataset: a `Dataset` or `IterableDataset` to evaluate, or a `DatasetDict`. Linear probes and few shots need its
            "train" split too.
        tasks: names of `TASKS`, or tasks with options such as `Reranking(rerank=20)`.
        split: the split of a `DatasetDict` to evaluate; by default validation, else test, else train.
        image_column, caption_column: found by their usual names if not given.
        label_columns: found by their ClassLabel feature or their usual names if not given; required beside captions.
        class_names: names of the classes of the only label column, from class 0 on.
        max_seq_length: longest caption in tokens; the model's context if not given.
        max_train_samples, max_eval_samples: use only the first rows.
        batch_size: images per batch; the results do not depend on it.
        num_workers: processes that decode images.
        skip_budget: share of rows that may be skipped because they cannot be read.

    Returns:
        the results of each task, in the order of `tasks`, in percent.

    Raises:
        ImportError: if a task needs a package that is not installed.
        ValueError: for a task, an option, a column or a split that does not fit, or if too many rows cannot be read.
    """
    encoder = make_encoder(type(model).__name__, model, processor)
    chosen = resolve_tasks(tasks)
    prepared = prepare_tasks(
        encoder,
        dataset,
        chosen,
        split=split,
        image_column=image_column,
        caption_column=caption_column,
        label_columns=label_columns,
        class_names=class_names,
        max_seq_length=max_seq_length,
        max_train_samples=max_train_samples,
        max_eval_samples=max_eval_samples,
        loading=LoadingOptions(batch_size, num_workers, skip_budget),
    )
    return run_tasks(encoder, prepared, chosen)[0].results


def resolve_tasks(tasks: Sequence[str | Task]) -> list[Task]:
    """The tasks, those given by name with their default options.

    Raises:
        ValueError: for an unknown name, or without a task.
    """
    if isinstance(tasks, str):
        tasks = [tasks]
    for task in tasks:
        if not isinstance(task, Task) and task not in TASKS:
            raise ValueError(f"tasks={task!r}: no such task; choose from {', '.join(TASKS)}, or give a Task.")
    if not tasks:
        raise ValueError(f"tasks={list(tasks)}: give at least one of {', '.join(TASKS)}.")
    return [task if isinstance(task, Task) else TASKS[task]() for task in tasks]


# 1. Everything that can be refused


def prepare_tasks(
    encoder: Encoder, dataset: Rows | Mapping[str, Rows], tasks: Sequence[Task], **options: Any
) -> EvaluationSplit:
    """The split that the tasks need, after every task has accepted it.

    Args:
        options: keyword arguments of `prepare_split`.

    Raises:
        ImportError, ValueError: as `prepare_split` and `Task.prepare`.
    """
    name, splits = choose_split(dataset, options.get("split"))
    _check_captions(splits[name or ""], tasks, options.get("caption_column"))
    if not options.get("label_columns") and any(task.needs_captions for task in tasks):
        next_step = "choose the columns of labels with label_columns=NAME"
        _refuse_tasks([task for task in tasks if task.needs_labels], next_step)
    split = prepare_split(
        encoder,
        dataset,
        with_captions=any(task.needs_captions for task in tasks),
        with_labels=any(task.needs_labels for task in tasks),
        **options,
    )
    if split.train is None or isinstance(split.train, IterableDataset):
        _refuse_tasks(
            [task for task in tasks if task.needs_train_split],
            "give a data set with a train and a validation split, not streamed",
        )
    for task in tasks:
        task.prepare(encoder, split)
    return split


def _check_captions(rows: Rows, tasks: Sequence[Task], caption_column: str | None) -> None:
    names = [task.name for task in tasks if task.needs_captions]
    if names and find_caption_column(rows, caption_column) is None:
        raise ValueError(
            f"{' and '.join(names)}: no column of captions has a usual name; the columns are "
            f"{', '.join(rows.features or next(iter(rows), {}))}. Choose one with caption_column=NAME, or another task."
        )


def _refuse_tasks(tasks: Sequence[Task], next_step: str) -> None:
    if tasks:
        raise ValueError(f"{' and '.join(task.name for task in tasks)}: {next_step}.")


# 2. Encoding and metrics


def run_tasks(
    encoder: Encoder,
    split: EvaluationSplit,
    tasks: Sequence[Task],
    settings: Sequence[Callable[[], None]] = (lambda: None,),
) -> list[Evaluation]:
    """The results of all tasks for each setting of the vision tower, in one pass over the data.

    Args:
        split: of `prepare_tasks`.
        settings: functions without arguments, each of which sets the model to one setting.

    Returns:
        one `Evaluation` for each setting. The model keeps the last setting.

    Raises:
        ValueError: if too many rows cannot be read, or an embedding is not finite.
    """
    # Step (1): what the tasks share
    encodings = _encode_shared(encoder, split, tasks, settings)
    # Step (2): what each task adds, such as the embeddings of classes
    encoded = [task.encode(encoder, split) for task in tasks]
    # Step (3): results
    evaluations = []
    for apply_setting, shared in zip(settings, encodings, strict=True):
        apply_setting()
        results = [
            replace(
                result,
                split=split.name,
                setting={**result.setting, "merge_ratio": encoder.merge_ratio},
            )
            for task, task_encoded in zip(tasks, encoded, strict=True)
            for result in task.metrics(encoder, split, shared, task_encoded)
        ]
        evaluations.append(Evaluation(results, shared.pairs))
    return evaluations


def _encode_shared(
    encoder: Encoder, split: EvaluationSplit, tasks: Sequence[Task], settings: Sequence[Callable[[], None]]
) -> list[Encodings]:
    """Embeddings of the split, and features of the train rows that some task needs, for each setting."""
    budget = split.loading.new_budget(split.rows)
    with_tokens = any(task.needs_tokens for task in tasks)
    pairs = encode_variants(
        encoder.model, split.dataloader, encoder.model.device, "Evaluation", settings, with_tokens, budget
    )
    budget.judge_whole()
    for encoded in pairs:
        _check_finite(encoder, encoded)
    needed = [rows for task in tasks if (rows := task.train_rows(split)) is not None]
    trains: Sequence[TrainFeatures | None] = [None] * len(settings)
    if needed:
        trains = encode_train_rows(encoder, split, torch.cat(needed).unique(), settings)
    return [Encodings(encoded, _labels(split, encoded), train) for encoded, train in zip(pairs, trains, strict=True)]


def _check_finite(encoder: Encoder, pairs: EncodedPairs) -> None:
    """Raises ValueError for embeddings with NaN or infinity: their figures would be those of no model."""
    for kind, embeds in (("image", pairs.image_embeds), ("caption", pairs.text_embeds)):
        broken = int((~embeds.isfinite().all(dim=1)).sum())
        if broken:
            raise ValueError(
                f"{encoder.name}: {broken} of {len(embeds)} {kind} embeddings are not finite; check the weights for "
                "NaN, or evaluate in float32."
            )


def _labels(split: EvaluationSplit, pairs: EncodedPairs) -> list[Tensor]:
    """The labels `(I,)` of the images that were encoded, for each label column."""
    if pairs.labels is not None:
        return list(pairs.labels.unbind(dim=1))
    return [labels_of(split.rows, classes, pairs.image_rows) for classes in split.classes]


def encode_train_rows(
    encoder: Encoder, split: EvaluationSplit, rows: Tensor, settings: Sequence[Callable[[], None]]
) -> list[TrainFeatures]:
    """Features of some rows `(R,)` of the train split, for each setting.

    Raises:
        ValueError: if no image of a class can be read, or too many images cannot be read.
    """
    train = split.train_table
    chosen = train.select(rows.tolist())
    items = label_images(encoder, chosen, split.image_column, split.classes)
    dataloader = split.loading.dataloader(items, LabelCollator())
    budget = split.loading.new_budget(chosen)
    every_row = torch.arange(len(train))
    labels_that_occur = [set(labels_of(train, classes, every_row).tolist()) for classes in split.classes]
    features = []
    for pairs in encode_variants(
        encoder.model, dataloader, encoder.model.device, "Train split", settings, budget=budget
    ):
        _check_finite(encoder, pairs)
        assert pairs.labels is not None
        for number, classes in enumerate(split.classes):
            lost = labels_that_occur[number] - set(pairs.labels[:, number].tolist())
            if lost:
                raise ValueError(
                    f"No image of {classes.column} {classes.names[min(lost)]!r} in the train split can be used: "
                    f"{'; '.join(pairs.skipped[:3])}. Repair them, or remove the class."
                )
        features.append(TrainFeatures(pairs.image_embeds, pairs.labels, rows[pairs.image_rows]))
    return features
