# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`MLIPTrainer`: transformers' Trainer with the multi-level loss over one contrastive batch; it evaluates by retrieval.

trainer = MLIPTrainer(model, MLIPTrainingArguments("out"), train_dataset=train, eval_dataset=test, processor=processor)
trainer.train()
"""

import time
from collections import defaultdict
from collections.abc import Iterator, Sized
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPProcessor, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save
from transformers.trainer_utils import EvalLoopOutput

from modeling_mlip import MLIPModel
from modeling_mlip.data.collators import EvaluationCollator, PairCollator
from modeling_mlip.data.items import build_pairs
from modeling_mlip.data.skip_budget import SkipBudget
from modeling_mlip.evaluation.embedding import encode_pairs
from modeling_mlip.evaluation.metrics import retrieval_metrics
from modeling_mlip.hub.errors import error_line
from modeling_mlip.losses import MAX_LOGIT_SCALE, PairEmbeddings

from .arguments import MLIPTrainingArguments
from .checkpoint import InterruptibleTrainer
from .distributed import gather_columns, gather_numbers, num_processes, row_share
from .mini_batches import RandomState, embeddings, join, split_batch
from .step_guard import StepGuard

LOSS_PARTS = ("spatial_loss", "frequency_loss", "token_loss")
# Parameters of two and more dimensions that are no weights of a linear map, or biases of one in disguise.
NO_DECAY = ("bias", "norm", "gate", "position_embedding", "class_embedding", "layer_scale", "logit_scale", "query")


def _no_embedding() -> None:
    return None


class CodeFiles(TrainerCallback):
    """Puts the code files beside what is about to be pushed: of a checkpoint, Trainer takes only weights and config."""

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            custom_object_save(model, args.output_dir)


def items_of(dataset: Any, processor: CLIPProcessor, seed: int, training: bool = False) -> Any:
    """The items of the rows of a data set of `datasets`; any other data set has its own."""
    if not isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        return dataset
    return build_pairs(dataset, processor, seed=seed, training=training)


class MLIPTrainer(InterruptibleTrainer):
    """Trains an `MLIPModel` on image-caption pairs.

    Args:
        model: the model.
        args: how the job runs.
        train_dataset: rows of images and captions (`datasets.Dataset` or a stream), whose columns are found by their
            usual names and whose images are augmented; or `data.build_pairs` of such, where other settings are wanted.
        eval_dataset: the same, not augmented, or a dictionary of several.
        processor: saved with every checkpoint; its tokenizer encodes the captions.
        max_seq_length: longest caption in tokens; the text tower's context if not given.

    Raises:
        ValueError: if one contrastive batch is a single pair, or the model cannot start at `start_merge_ratio`; while
            training, if too many samples are broken, or the loss or its gradient is not finite in too many steps in a
            row.
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
        if args.start_merge_ratio is not None:
            merge_ratio = model.config.merge_ratio
            try:
                model.set_merge_ratio(args.start_merge_ratio)
            except StrictDataclassError as error:
                raise ValueError(f"start_merge_ratio={args.start_merge_ratio}: {error_line(error)}") from error
            model.set_merge_ratio(merge_ratio)
        if args.n_gpu > 1:
            raise ValueError(
                f"One process drives {args.n_gpu} GPUs, so each would see its own share of the batch as its only "
                "negatives; start one process for each: accelerate launch or torchrun --nproc_per_node."
            )
        length = max_seq_length or model.config.text_config.max_position_embeddings
        train_dataset = items_of(train_dataset, processor, args.seed, training=True)
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: items_of(rows, processor, args.seed) for name, rows in eval_dataset.items()}
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
        self.guard = StepGuard(args.max_nonfinite_steps)
        self._since = 0.0
        self._clear_notes()
        self._fit_parallel_wrappers()

    def _fit_parallel_wrappers(self) -> None:
        """What DDP and FSDP need to know of this model; DeepSpeed runs backward passes of a loss only."""
        if self.is_deepspeed_enabled and self.args.mini_batch_size is not None:
            raise ValueError(
                f"mini_batch_size={self.args.mini_batch_size} does not work with DeepSpeed; leave it out, or take DDP "
                "or FSDP (--fsdp)."
            )
        vision = self.model.vision_model
        if vision.frequency is not None and self.model.frequency_projection is None:
            vision.frequency.query.requires_grad_(False)  # no loss reaches it, and DDP waits for every gradient
        if self.is_fsdp_enabled:
            # It cannot shard scalars. They stay whole in every process, and `training_step` averages their gradients.
            temperatures = nn.Module()
            for name, scale in self.model.logit_scales().items():
                temperatures.register_parameter(name, scale)
            self.accelerator.state.fsdp_plugin.ignored_modules = [temperatures]
            # accelerate shards "the" input embedding apart; both towers' are in `_no_split_modules` already.
            self.model.get_input_embeddings = _no_embedding
        elif self.args.fsdp:
            raise ValueError(f"--fsdp: accelerate does not shard on {self.args.device.type}; leave the flag out there.")

    # Training

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward pass of one batch of this process, in one pass or in mini-batches."""
        self._clamp_temperatures(model)
        mini_batch_size = self.args.mini_batch_size
        with self._merge_ratio_of_the_step():
            if mini_batch_size is None or mini_batch_size >= self.args.per_device_train_batch_size:
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                loss = self._mini_batch_step(model, inputs, mini_batch_size)
        if self.is_fsdp_enabled and self.accelerator.sync_gradients:
            for scale in self._trained_temperatures(model):
                dist.all_reduce(scale.grad.div_(num_processes()))
        return loss

    @contextmanager
    def _merge_ratio_of_the_step(self) -> Iterator[None]:
        """The merge ratio on its way from `start_merge_ratio` to the model's own, which comes back afterwards."""
        start, own = self.args.start_merge_ratio, self.model.config.merge_ratio
        if start is not None:
            done = self.state.global_step / max(self.state.max_steps - 1, 1)
            self.model.set_merge_ratio(start + (own - start) * done)
        try:
            yield
        finally:
            if start is not None:
                self.model.set_merge_ratio(own)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """This process's share of the loss of the pairs of all processes as one batch; the mean of the shares is it."""
        # Step (1): what was skipped on the way here
        inputs, names = self._unpack(inputs)
        # Step (2): embeddings
        pairs = model(**inputs, return_pairs=True).pairs
        # Step (3): the losses against the pairs of all processes
        losses = self._losses(model, pairs, names)
        return (losses["loss"], losses) if return_outputs else losses["loss"]

    def _mini_batch_step(self, model: nn.Module, inputs: dict[str, Any], mini_batch_size: int) -> torch.Tensor:
        """`training_step` in the memory of a mini-batch, with the gradients of the whole batch."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs, names = self._unpack(self._prepare_inputs(inputs))
        mini_batches = split_batch(inputs, mini_batch_size)
        # Step (1): embeddings of all mini-batches, without a graph
        random_states, parts = [], []
        with torch.no_grad():
            for mini_batch in mini_batches:
                random_states.append(RandomState(mini_batch["pixel_values"]))
                parts.append(model(**mini_batch, return_pairs=True).pairs)
        pairs = join(parts)
        del parts
        # Step (2): the loss of the batch, and its gradient for every embedding and temperature
        embedded = [tensor.requires_grad_() for tensor in embeddings(pairs)]
        temperatures = self._trained_temperatures(model)
        loss = self._losses(model, pairs, names)["loss"] / self.current_gradient_accumulation_steps
        scaler = self.accelerator.scaler
        gradients = torch.autograd.grad(loss if scaler is None else scaler.scale(loss), [*embedded, *temperatures])
        sizes = [len(mini_batch["input_ids"]) for mini_batch in mini_batches]
        by_mini_batch = list(zip(*(gradient.split(sizes) for gradient in gradients[: len(embedded)]), strict=True))
        of_temperatures = list(zip(temperatures, gradients[len(embedded) :], strict=True))
        del pairs, embedded, gradients
        # Step (3): the embeddings again, with a graph, and their gradients on to the weights
        for i, (mini_batch, random_state) in enumerate(zip(mini_batches, random_states, strict=True)):
            is_last = i == len(mini_batches) - 1
            exchanges = is_last and self.accelerator.sync_gradients
            with nullcontext() if exchanges else self.accelerator.no_sync(model):
                with random_state.replayed():
                    roots = embeddings(model(**mini_batch, return_pairs=True).pairs)
                # DDP waits for the gradients of all parameters in the one backward pass that exchanges them.
                pulled = [*zip(roots, by_mini_batch[i], strict=True), *(of_temperatures if is_last else [])]
                tensors, pulls = zip(*(pair for pair in pulled if pair[0].requires_grad), strict=True)
                torch.autograd.backward(tensors, pulls)
        return loss.detach()

    def _unpack(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """What the model takes of a batch, and the names of its samples; notes what was skipped."""
        inputs = dict(inputs)
        skipped, names = inputs.pop("skipped"), inputs.pop("names")
        self.num_truncated += inputs.pop("num_truncated")
        self.skip_budget.add(skipped, seen=len(names) + len(skipped))
        self._since = self._since or time.perf_counter()
        self._num_pairs += len(names)
        self._image_size = inputs["pixel_values"].shape[-2:]
        return inputs, names

    def _losses(self, model: nn.Module, pairs: PairEmbeddings, names: list[str]) -> dict[str, torch.Tensor]:
        """The loss and its parts, own rows against the columns of all processes, for their mean over processes."""
        # Groups of the token level lie within a process, so no tokens need to travel.
        grouped = self.accelerator.unwrap_model(model).config.token_loss_group_size is not None
        columns = gather_columns(pairs, "local" if grouped else self.args.token_loss_scope)
        share = 1.0 if columns is None else row_share(len(pairs.text_embeds), len(columns.text_embeds))
        losses = self.accelerator.unwrap_model(model).compute_losses(pairs, columns)
        losses = {name: share * loss for name, loss in losses.items()}
        self.guard.watch(losses["loss"], names, pairs)
        self._note_losses(losses)
        return losses

    def _trained_temperatures(self, model: nn.Module) -> list[nn.Parameter]:
        scales = self.accelerator.unwrap_model(model).logit_scales().values()
        return [scale for scale in scales if scale.requires_grad]

    def _clamp_temperatures(self, model: nn.Module) -> None:
        # The optimizer may have moved a temperature beyond its clamp, where it has no gradient to come back by.
        with torch.no_grad():
            for logit_scale in self.accelerator.unwrap_model(model).logit_scales().values():
                logit_scale.clamp_(max=MAX_LOGIT_SCALE)

    def _get_grad_norm(self, model: nn.Module, grad_norm: torch.Tensor | float | None = None) -> torch.Tensor | float:
        """The norm, and here, before the optimizer's step, whether there is to be one."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if hasattr(grad_norm, "full_tensor"):  # of FSDP's shards
            grad_norm = grad_norm.full_tensor()
        # In float16 gradients overflow now and then; the scaler skips these steps itself and lowers its scale.
        scaler = self.accelerator.scaler
        judged = grad_norm if scaler is None else 0.0
        refused = self.guard.refuses(judged, self.state.global_step, self.state.max_steps)
        if refused:
            model.zero_grad()  # an optimizer passes over parameters without a gradient
        if scaler is None:
            self.optimizer._is_overflow = refused  # the schedule waits too
        return grad_norm

    # Optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if not any(part in name for part in NO_DECAY)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's; under FSDP temperatures are a group of their own: one kernel takes shards or tensors, not both."""
        optimizer = super().create_optimizer(model)
        if self.is_fsdp_enabled:
            temperatures = set(self.accelerator.unwrap_model(model or self.model).logit_scales().values())
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if parameter in temperatures]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if parameter not in temperatures]
                    optimizer.add_param_group({**group, "params": own})
        return optimizer

    # Logs

    def _clear_notes(self) -> None:
        self._part_sums: dict[str, torch.Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._num_pairs = 0

    def _note_losses(self, losses: dict[str, torch.Tensor]) -> None:
        finite = losses["loss"].detach().isfinite()
        for name in LOSS_PARTS:
            if name in losses:
                self._part_sums[name] += losses[name].detach().where(finite, 0.0)
        self._part_sums["steps"] += finite

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds loss parts, temperatures, speed, numbers of tokens and what was skipped to the logs of training."""
        if "loss" in logs and self._num_pairs:
            logs.update(self._notes())
            self._clear_notes()
            self._since = time.perf_counter()
        super().log(logs, start_time)

    def _notes(self) -> dict[str, float]:
        """Since the last logs and over all processes."""
        model = self.accelerator.unwrap_model(self.model)
        # Step (1): parts of the loss, over the steps where it was finite
        steps = self.accelerator.reduce(self._part_sums.pop("steps"), "mean")
        notes = {name: self.accelerator.reduce(total, "mean") / steps for name, total in self._part_sums.items()}
        logs = {name: value.item() for name, value in notes.items()} if steps else {}
        # Step (2): temperatures
        logs |= {name: scale.item() for name, scale in model.logit_scales().items()}
        # Step (3): pairs
        by_process = gather_numbers(self._num_pairs, self.num_truncated, device=self.args.device)
        num_pairs, truncated = (float(sum(numbers)) for numbers in zip(*by_process, strict=True))
        self.skip_budget.share()
        logs["images_per_second"] = num_pairs / (time.perf_counter() - self._since)
        logs |= {"skipped_samples": float(self.skip_budget.num_skipped), "truncated_captions": truncated}
        logs["skipped_steps"] = float(self.guard.skipped_steps)
        # Step (4): patch tokens after each layer of the vision tower
        height, width = self._image_size
        patch = model.config.vision_config.patch_size
        tokens = (height // patch) * (width // patch)
        for layer, removed in enumerate(model.vision_model.encoder.tokens_removed(tokens)):
            tokens -= removed
            logs[f"vision_tokens_layer_{layer}"] = float(tokens)
        return logs

    # Evaluation

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        dataset = self.eval_dataset[eval_dataset] if isinstance(eval_dataset, str) else eval_dataset
        dataset = self.eval_dataset if dataset is None else dataset
        if dataset is None:
            raise ValueError("Evaluation needs an eval_dataset; give one to MLIPTrainer or to evaluate().")
        # Every process evaluates everything: recall depends on the whole pool, not on a share of it.
        return DataLoader(
            items_of(dataset, self.processing_class, self.args.seed),
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
        length = len(dataloader.dataset) if isinstance(dataloader.dataset, Sized) else None
        budget = SkipBudget(self.args.skip_budget, length)
        with self.compute_loss_context_manager():
            encoded = encode_pairs(self.model, dataloader, self.args.device, description, budget=budget)
        budget.judge_whole()
        metrics = retrieval_metrics(
            encoded.image_embeds, encoded.text_embeds, encoded.caption_image, encoded.caption_ids
        )
        return EvalLoopOutput(
            predictions=encoded.image_embeds.numpy(),
            label_ids=None,
            metrics={f"{metric_key_prefix}_{name}": value for name, value in metrics.items()},
            num_samples=len(encoded.image_embeds),
        )

    # Sharing

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Leaves the card that is there: `push_to_hub` would write a draft over the one with what was measured."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)
