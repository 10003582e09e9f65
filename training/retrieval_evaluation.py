# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""How `MLIPTrainer` evaluates and predicts: retrieval over a whole data set instead of a loss per batch."""

from collections.abc import Iterator, Sized
from contextlib import contextmanager
from typing import Any

import datasets
import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, register_fsdp_forward_method
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPProcessor
from transformers.trainer_utils import EvalLoopOutput

from modeling_mlip.data.collators import EvaluationCollator
from modeling_mlip.data.items import build_pairs
from modeling_mlip.data.skip_budget import SkipBudget
from modeling_mlip.evaluation.embedding import encode_pairs
from modeling_mlip.evaluation.metrics import retrieval_metrics

from .arguments import MLIPTrainingArguments
from .training_log import TrainingLog


def build_dataset(
    dataset: Any, processor: CLIPProcessor, seed: int, training: bool = False, long_caption_column: str | None = None
) -> Any:
    """Items of the rows of a `datasets` data set, with default settings. Any other data set must yield items itself."""
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return dataset
    return build_pairs(dataset, processor, seed=seed, training=training, long_caption_column=long_caption_column)


@contextmanager
def gathering_shards(model: nn.Module) -> Iterator[None]:
    """Lets `get_image_features` and `get_text_features` gather the weights that FSDP2 shards, as `forward` does.

    No effect on other models. The methods leave inference mode: weights that FSDP2 gathers there cannot be trained.
    """
    if not isinstance(model, FSDPModule):
        yield
        return
    names = ("get_image_features", "get_text_features")
    for name in names:
        register_fsdp_forward_method(model, name)
        setattr(model, name, torch.inference_mode(False)(torch.no_grad()(getattr(model, name))))
    try:
        yield
    finally:
        for name in names:
            delattr(model, name)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


class RetrievalEvaluationMixin:
    """The evaluation methods of a Trainer, for models with image and text features."""

    args: MLIPTrainingArguments
    model: Any
    eval_dataset: Any
    processing_class: Any
    is_in_train: bool
    evaluation_collator: EvaluationCollator
    training_log: TrainingLog

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.training_log.paused():
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset; give one to MLIPTrainer or to evaluate().")
        return self._evaluation_dataloader(dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return self._evaluation_dataloader(test_dataset)

    def _evaluation_dataloader(self, dataset: Any) -> DataLoader:
        # Every process evaluates the whole data set: recall depends on all candidates.
        num_workers = self.args.dataloader_num_workers
        return DataLoader(
            build_dataset(dataset, self.processing_class, self.args.seed),
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.evaluation_collator,
            num_workers=num_workers,
            multiprocessing_context=self.args.dataloader_multiprocessing_context if num_workers else None,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Recall@1, 5 and 10 in both directions over the whole data set, independent of the batch size.

        Returns:
            `predictions`: image embeddings `(I, P)` and caption embeddings `(T, P)`, normalised; `label_ids` `(T,)`:
            the image of each caption.
        """
        self._prepare_evaluation()
        length = len(dataloader.dataset) if isinstance(dataloader.dataset, Sized) else None
        budget = SkipBudget(self.args.skip_budget, length)
        with self.compute_loss_context_manager(), gathering_shards(self.model):  # type: ignore[attr-defined]
            encoded = encode_pairs(self.model, dataloader, self.args.device, description, budget=budget)
        budget.judge_whole()
        metrics = retrieval_metrics(
            encoded.image_embeds, encoded.text_embeds, encoded.caption_image, encoded.caption_ids
        )
        return EvalLoopOutput(
            predictions=(encoded.image_embeds.numpy(), encoded.text_embeds.numpy()),
            label_ids=encoded.caption_image.numpy(),
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(encoded.image_embeds),
        )

    def _prepare_evaluation(self) -> None:
        """What Trainer's own loop does first: half precision if asked for, and averaged weights of an optimizer that
        keeps them apart from those it trains."""
        self._use_averaged_weights()  # type: ignore[attr-defined]
        if not self.is_in_train:
            args = self.args
            dtype = torch.float16 if args.fp16_full_eval else torch.bfloat16 if args.bf16_full_eval else None
            if dtype is not None:
                self.model.to(dtype=dtype, device=args.device)
