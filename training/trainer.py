# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`MLIPTrainer`: transformers' Trainer with the multi-level loss over one contrastive batch; it evaluates by retrieval.

trainer = MLIPTrainer(model, MLIPTrainingArguments("out"), train_dataset=train, eval_dataset=test, processor=processor)
trainer.train()
"""

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPProcessor, Trainer, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_utils import EvalLoopOutput

from modeling_mlip import MLIPModel
from modeling_mlip.losses import MAX_LOGIT_SCALE

from .arguments import MLIPTrainingArguments
from .data import EvaluationCollator, PairCollator, SkipBudget
from .distributed import gather_pairs
from .metrics import encode_pairs, retrieval_metrics

LOSS_PARTS = ("spatial_loss", "frequency_loss", "token_loss")
# Parameters of two and more dimensions that are no weights of a linear map, or biases of one in disguise.
NO_DECAY = ("bias", "norm", "gate", "position_embedding", "class_embedding", "layer_scale", "logit_scale", "query")


class CodeFiles(TrainerCallback):
    """Puts the code files beside what is about to be pushed: of a checkpoint, Trainer takes only weights and config."""

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            custom_object_save(model, args.output_dir)


class MLIPTrainer(Trainer):
    """Trains an `MLIPModel` on image-caption pairs.

    Args:
        model: the model.
        args: how the job runs.
        train_dataset: `PairDataset` or `StreamedPairDataset` made for training.
        eval_dataset: the same made for evaluation, or a dictionary of several.
        processor: saved with every checkpoint; its tokenizer encodes the captions.
        max_seq_length: longest caption in tokens; the text tower's context if not given.

    Raises:
        ValueError: if one contrastive batch is a single pair; while training, if the loss is not finite or too many
            samples are broken.
    """

    def __init__(
        self,
        model: MLIPModel,
        args: MLIPTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processor: CLIPProcessor | None = None,
        max_seq_length: int | None = None,
        **kwargs: Any,
    ):
        if train_dataset is not None and args.train_batch_size * args.world_size < 2:
            raise ValueError(
                f"per_device_train_batch_size={args.per_device_train_batch_size} on {args.world_size} device(s) is one "
                "pair, and a contrastive loss needs others to compare it with; choose 2 or more."
            )
        if args.n_gpu > 1:
            raise ValueError(
                f"One process drives {args.n_gpu} GPUs, so each would see its own share of the batch as its only "
                "negatives; start one process for each: accelerate launch or torchrun --nproc_per_node."
            )
        length = max_seq_length or model.config.text_config.max_position_embeddings
        super().__init__(
            model=model,
            args=args,
            data_collator=PairCollator(processor.tokenizer, length),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processor,
            **kwargs,
        )
        self.add_callback(CodeFiles)
        self.evaluation_collator = EvaluationCollator(processor.tokenizer, length)
        self.skip_budget = None
        if train_dataset is not None:
            size = len(train_dataset) if hasattr(train_dataset, "__len__") else None
            self.skip_budget = SkipBudget(args.skip_budget, size)
        self.num_truncated = 0
        self._part_sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=args.device))
        self._part_steps = 0

    # Training

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of the pairs of all processes as one batch."""
        # Step (1): what was skipped on the way here
        inputs = dict(inputs)
        skipped, names = inputs.pop("skipped"), inputs.pop("names")
        self.num_truncated += inputs.pop("num_truncated")
        self.skip_budget.add(skipped, seen=len(names) + len(skipped))
        # Step (2): embeddings here, and those of the other processes
        pairs = gather_pairs(model(**inputs, return_pairs=True).pairs)
        # Step (3): the losses
        losses = self.accelerator.unwrap_model(model).compute_losses(pairs)
        if not torch.isfinite(losses["loss"]):
            parts = {name: value.item() for name, value in losses.items()}
            raise ValueError(
                f"The loss is not finite at step {self.state.global_step}: {parts}. The batch: {', '.join(names[:16])}"
                f"{' ...' if len(names) > 16 else ''}. Look at these samples, lower --learning_rate, or train in "
                "float32 or bfloat16. The last checkpoint is whole."
            )
        for name in LOSS_PARTS:
            if name in losses:
                self._part_sums[name] += losses[name].detach()
        self._part_steps += 1
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        # The optimizer may have moved a temperature beyond its clamp, where it has no gradient to come back by.
        with torch.no_grad():
            for logit_scale in self.accelerator.unwrap_model(model).logit_scales().values():
                logit_scale.clamp_(max=MAX_LOGIT_SCALE)
        return super().training_step(model, inputs, num_items_in_batch)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if not any(part in name for part in NO_DECAY)]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds each loss part, each temperature and what was skipped to the logs of training."""
        if "loss" in logs and self._part_steps:
            logs.update({name: (total / self._part_steps).item() for name, total in self._part_sums.items()})
            self._part_sums.clear()
            self._part_steps = 0
            scales = self.accelerator.unwrap_model(self.model).logit_scales()
            logs.update({name: scale.item() for name, scale in scales.items()})
            logs["skipped_samples"] = float(len(self.skip_budget.skipped))
            logs["truncated_captions"] = float(self.num_truncated)
        super().log(logs, start_time)

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset; give one to MLIPTrainer or to evaluate().")
        # Every process evaluates everything: recall depends on the whole pool, not on a share of it.
        return DataLoader(
            dataset,
            batch_size=self.args.per_device_eval_batch_size,
            collate_fn=self.evaluation_collator,
            num_workers=self.args.dataloader_num_workers,
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Recall@1, 5 and 10 both ways over the whole data set, whatever the batch size."""
        with self.compute_loss_context_manager():
            encoded = encode_pairs(self.model, dataloader, self.args.device, description)
        num_images = len(encoded.image_embeds)
        SkipBudget(self.args.skip_budget, num_images + len(encoded.skipped)).add(encoded.skipped, seen=num_images)
        metrics = retrieval_metrics(
            encoded.image_embeds, encoded.text_embeds, encoded.caption_image, encoded.caption_ids
        )
        return EvalLoopOutput(
            predictions=encoded.image_embeds.numpy(),
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=num_images,
        )

    # Sharing

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leaves the card that is there: `push_to_hub` would write a draft over the one with what was measured."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)
