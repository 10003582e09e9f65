# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`MLIPTrainer`: transformers' Trainer with an `Objective` over one contrastive batch, evaluated by retrieval.

trainer = MLIPTrainer(model, MLIPTrainingArguments("out"), train_dataset=train, processing_class=processor)
trainer.train()
"""

from collections.abc import Iterable, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPProcessor, TrainerCallback
from transformers.dynamic_module_utils import custom_object_save

from modeling_mlip import MLIPModel
from modeling_mlip.data.collators import EvaluationCollator, PairCollator
from modeling_mlip.data.skip_budget import SkipBudget

from .argument_checks import check_training_arguments
from .arguments import MLIPTrainingArguments
from .deepspeed_shards import (
    broadcasting_scalars,
    check_deepspeed_config,
    updating_master_scalars,
)
from .distillation import build_objective
from .distributed import Exchange, average_gradients, gather_numbers, num_processes
from .fine_tuning import FineTuningTrainer, check_fine_tuning
from .mini_batches import RandomState, count_mini_batches, floating_tensors, join_rows, split_rows
from .objective import Objective
from .reference_pairs import ReferenceCollator
from .retrieval_evaluation import RetrievalEvaluationMixin, build_dataset
from .schedules import StepSchedule, resize_images
from .step_guard import StepGuard
from .trained_parameters import base_learning_rate
from .training_log import TrainingLog
from .weight_average import WeightAverage

# Parameters with two or more axes that are not the weight of a linear map, and biases that are not called so.
NO_DECAY = ("bias", "norm", "gate", "position_embedding", "class_embedding", "layer_scale", "logit_scale", "query")


def _no_embedding() -> None:
    return None


class SaveCodeFiles(TrainerCallback):
    """Saves the model's code files before a push: Trainer copies only weights and config from a checkpoint."""

    def on_push_begin(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            custom_object_save(model, args.output_dir)


class StepCallback(TrainerCallback):
    """What `MLIPTrainer` does around the optimizer step."""

    def __init__(self, trainer: "MLIPTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.prepare_step()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.finish_step()


class MLIPTrainer(RetrievalEvaluationMixin, FineTuningTrainer):
    """Trains an `MLIPModel` on image-caption pairs.

    Args:
        model: the model, or `None` with `model_init`.
        args: how the job runs.
        train_dataset: rows of images and captions (`datasets.Dataset` or `IterableDataset`), whose columns are found by
            their usual names and whose images are augmented; or the result of `data.build_pairs` for other settings.
        eval_dataset: the same without augmentation, or a dictionary of several.
        processing_class: the processor. Its tokenizer encodes the captions, and every checkpoint contains it.
        objective: losses of the run; by default those of the model's configuration and of `args`.
        max_seq_length: longest caption in tokens; by default the text tower's context.
        data_collator: makes a batch of items; by default `data.PairCollator`.
        new_parameters: names of the parameters that the starting checkpoint did not contain, for
            `new_parameters_learning_rate`, `head_warmup_steps` and `lora_rank`.
        reference_dataset: like `train_dataset`, pairs for `reference_weight`. With an `objective` of your own, give it
            a part that compares them.

    Raises:
        ValueError: if there is no processor, if a contrastive batch would be a single pair, or if the model cannot
            start at `start_merge_ratio`; during training, if too many samples are broken or too many steps in a row
            have a loss or gradient that is not finite.
    """

    def __init__(
        self,
        model: MLIPModel | None = None,
        args: MLIPTrainingArguments | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: CLIPProcessor | None = None,
        objective: Objective | None = None,
        max_seq_length: int | None = None,
        data_collator: Any = None,
        new_parameters: Iterable[str] = (),
        reference_dataset: Dataset | None = None,
        **kwargs: Any,
    ):
        args = MLIPTrainingArguments("trainer_output") if args is None else args
        check_training_arguments(args, has_eval_dataset=eval_dataset is not None, train_dataset=train_dataset, **kwargs)
        check_batch(args, train_dataset)
        if processing_class is None:
            raise ValueError(
                "processing_class=None: give the model's processor, for example AutoProcessor.from_pretrained(...)."
            )
        self.new_parameters = frozenset(new_parameters)
        if model is not None:  # raises errors before Trainer makes `output_dir`
            StepSchedule(model, args)
            check_fine_tuning(model, args, self.new_parameters)
        self._builds_objective = objective is None
        if objective is None and model is not None:
            objective = build_objective(model, args, has_references=reference_dataset is not None)
        self.objective_optimizer: torch.optim.Optimizer | None = None
        train_dataset = build_dataset(
            train_dataset, processing_class, args.seed, training=True, long_caption_column=args.long_caption_column
        )
        if isinstance(eval_dataset, dict):
            eval_dataset = {
                name: build_dataset(rows, processing_class, args.seed) for name, rows in eval_dataset.items()
            }
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        length = max_seq_length or self.model.config.text_config.max_position_embeddings
        self.data_collator = data_collator or PairCollator(processing_class.tokenizer, length)
        if reference_dataset is not None:
            self.reference_dataset = build_dataset(reference_dataset, processing_class, args.seed, training=True)
            self.data_collator = ReferenceCollator(self.data_collator, self.reference_dataset, args.seed)
        self.evaluation_collator = EvaluationCollator(processing_class.tokenizer, length)
        self._set_objective(objective or self._build_objective(self.model))
        self.skip_budget = None
        if train_dataset is not None:
            size = len(train_dataset) if hasattr(train_dataset, "__len__") else None
            self.skip_budget = SkipBudget(args.skip_budget, size)
        self.guard = StepGuard(args.max_nonfinite_steps)
        self.training_log = TrainingLog(self.args.device)
        self._is_gradient_finite = True
        self._skips_step = False
        self.add_callback(SaveCodeFiles)
        self.add_callback(StepCallback(self))
        if args.ema_decay is not None:
            self.weight_average = WeightAverage(args.ema_decay)
            self.add_callback(self.weight_average)
        self._prepare_model()

    # Setting up

    def _build_objective(self, model: MLIPModel) -> Objective:
        return build_objective(model, self.args, has_references=self.reference_dataset is not None)

    def _set_objective(self, objective: Objective) -> None:
        self.training_objective = objective.to(self.args.device)
        self._initial_objective = {name: tensor.clone() for name, tensor in objective.state_dict().items()}

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """A new model of `model_init`; the objective starts anew with it."""
        model = super().call_model_init(trial)
        if hasattr(self, "accelerator"):  # not in __init__, which prepares the first model itself
            self.model = model
            if self._builds_objective:
                self._set_objective(self._build_objective(model))
            else:
                self.training_objective.load_state_dict(self._initial_objective)
            self.objective_optimizer = None
            self._prepare_model()
        return model

    def _prepare_model(self) -> None:
        """Checks what the run needs of the model, and adapts the model to DDP, FSDP and DeepSpeed."""
        model, args = self.model, self.args
        self.schedule = StepSchedule(model, args)
        if self.is_deepspeed_enabled:
            config = self.accelerator.state.deepspeed_plugin.deepspeed_config
            check_deepspeed_config(config, bool(self.training_objective.trained_parameters()))
        if args.ema_decay is not None and (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            raise ValueError(
                f"ema_decay={args.ema_decay}: the average needs whole weights in every process, and FSDP and DeepSpeed "
                "shard them. Leave it out, or use DDP."
            )
        self.prepare_fine_tuning()
        vision = model.vision_model
        if vision.frequency is not None and model.frequency_projection is None:
            vision.frequency.query.requires_grad_(
                False
            )  # without a loss; DDP waits for the gradient of every parameter
        if self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            has_teacher = args.keep_weight or args.distill_unmerged or self.reference_dataset is not None
            if plugin.cpu_ram_efficient_loading and has_teacher:
                raise ValueError(
                    "keep_weight, reference pairs and distill_unmerged need the starting weights in every process: set "
                    "cpu_ram_efficient_loading to false in fsdp_config."
                )
            # FSDP cannot shard scalars. They stay whole in every process, and `training_step` averages their gradients.
            scalars = nn.Module()
            for name, parameter in model.scalar_parameters().items():
                scalars.register_parameter(name, parameter)
            self.accelerator.state.fsdp_plugin.ignored_modules = [scalars]
            # accelerate shards the input embedding separately; `_no_split_modules` contains both towers' already.
            model.get_input_embeddings = _no_embedding
        elif args.fsdp:
            raise ValueError(f"fsdp={args.fsdp}: accelerate does not shard on {args.device.type}; leave it out.")

    def get_train_dataloader(self) -> DataLoader:
        """Trainer's. A last batch of a single pair has no negatives, so it is dropped."""
        drop_last, dataset = self.args.dataloader_drop_last, self.train_dataset
        if isinstance(dataset, Sized) and self.args.world_size == 1 and len(dataset) > 1:
            self.args.dataloader_drop_last = drop_last or len(dataset) % self._train_batch_size == 1
        try:
            return super().get_train_dataloader()
        finally:
            self.args.dataloader_drop_last = drop_last

    # Training

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's."""
        with broadcasting_scalars() if self.is_deepspeed_enabled else nullcontext():
            return super().train(*args, **kwargs)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward pass of one batch of this process, in one pass or in mini-batches."""
        if self.weight_average is not None:
            self.weight_average.use_trained()
        self._begin_step(self.accelerator.unwrap_model(model))
        num_pairs = len(inputs["input_ids"])
        count = count_mini_batches(num_pairs, self.args.mini_batch_size, self.args.device)
        with self.schedule.applied(self.state.global_step, self.state.max_steps) as settings:
            inputs = self._resize_images(inputs, settings.image_size)
            self._log_tokens(inputs["pixel_values"])
            if count == 1:
                loss = super().training_step(model, inputs, num_items_in_batch)
            else:
                loss = self._mini_batch_step(model, inputs, count)
        if self.accelerator.sync_gradients:
            self._finish_gradients(model)
        return loss

    def _begin_step(self, model: nn.Module) -> None:
        if not self.is_deepspeed_enabled:
            self.training_objective.on_step_begin(model)
            return
        with updating_master_scalars(model):
            self.training_objective.on_step_begin(model)

    def _resize_images(self, inputs: dict[str, Any], image_size: int | None) -> dict[str, Any]:
        """The batch with images of the size of this step."""
        if image_size is None:
            return inputs
        pixel_values = resize_images(inputs["pixel_values"].to(self.args.device), image_size)
        return {**inputs, "pixel_values": pixel_values, "interpolate_pos_encoding": True}

    def _log_tokens(self, pixel_values: torch.Tensor) -> None:
        model = self.accelerator.unwrap_model(self.model)
        height, width = pixel_values.shape[-2:]
        patch_size = model.config.vision_config.patch_size
        num_patches = model.config.vision_config.count_kept_patches((height // patch_size) * (width // patch_size))
        self.training_log.set_tokens(num_patches, model.vision_model.encoder.tokens_removed(num_patches))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """This process's share of the loss over the pairs of all processes; the mean of the shares is that loss.

        With `return_outputs` also the model's `MLIPOutput`, with the named losses as further keys.
        """
        # Step (1): remove what is not for the model
        inputs, names = self._unpack(inputs)
        # Step (2): the rows of the objective's parts
        outputs, rows = self.training_objective.compute_rows(model, inputs)
        # Step (3): the losses against the pairs of all processes
        losses = self._compute_losses(model, rows, names)
        if not return_outputs:
            return losses["loss"]
        for name, loss in losses.items():
            outputs[name] = loss
        return losses["loss"], outputs

    def _mini_batch_step(self, model: nn.Module, inputs: dict[str, Any], count: int) -> torch.Tensor:
        """`training_step` in the memory of a mini-batch, with the gradients of the whole batch."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs, names = self._unpack(self._prepare_inputs(inputs))
        mini_batches = split_rows(inputs, count)
        # Step (1): the rows of all mini-batches, without a graph
        random_states, parts = [], []
        with torch.no_grad(), self.compute_loss_context_manager():
            mini_batches = [self.training_objective.add_targets(mini_batch) for mini_batch in mini_batches]
            for mini_batch in mini_batches:
                random_states.append(RandomState(mini_batch["pixel_values"]))
                parts.append(self.training_objective.compute_rows(model, mini_batch)[1])
        rows = join_rows(parts)
        del parts
        # Step (2): the loss of the batch; its gradient with respect to every row and every parameter of the losses
        row_tensors = [tensor.requires_grad_() for tensor in floating_tensors(rows)]
        parameters = [*self._trained_scalars(model), *self.training_objective.trained_parameters()]
        loss = self._compute_losses(model, rows, names)["loss"] / self.current_gradient_accumulation_steps
        scaler = self.accelerator.scaler
        scaled_loss = loss if scaler is None else scaler.scale(loss)
        gradients = torch.autograd.grad(scaled_loss, [*row_tensors, *parameters], allow_unused=True)
        row_gradients = split_rows(list(gradients[: len(row_tensors)]), count)
        parameter_gradients = list(zip(parameters, gradients[len(row_tensors) :], strict=True))
        del rows, row_tensors, gradients
        # Step (3): the rows again, with a graph; their gradients propagate to the weights
        for i, (mini_batch, random_state) in enumerate(zip(mini_batches, random_states, strict=True)):
            is_last = i == count - 1
            synchronises = is_last and self.accelerator.sync_gradients
            with nullcontext() if synchronises else self.accelerator.no_sync(model):
                with random_state.replayed(), self.compute_loss_context_manager():
                    rows = self.training_objective.compute_rows(model, mini_batch)[1]
                # DDP expects the gradients of all parameters in the one backward pass that synchronises.
                roots = list(zip(floating_tensors(rows), row_gradients[i], strict=True))
                roots += parameter_gradients if is_last else []
                roots = [root for root in roots if root[0].requires_grad and root[1] is not None]
                if self.is_deepspeed_enabled:
                    self._deepspeed_backward(roots, synchronises)
                else:
                    tensors, root_gradients = zip(*roots, strict=True)
                    torch.autograd.backward(tensors, root_gradients)
        return loss.detach()

    def _deepspeed_backward(self, roots: list[tuple[torch.Tensor, torch.Tensor]], synchronises: bool) -> None:
        """The backward pass from tensors with known gradients, and the optimizer step if it `synchronises`.

        DeepSpeed runs the backward pass of a scalar only. The gradients of this one are those given.
        """
        scalar = torch.stack([(tensor * gradient).sum(dtype=torch.float32) for tensor, gradient in roots]).sum()
        engine = self.accelerator.deepspeed_engine_wrapped
        engine.backward(scalar, sync_gradients=synchronises, scale_wrt_gas=False)

    def _unpack(self, inputs: dict[str, Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """The tensors of a batch and the names of its samples. Counts the pairs and the skipped samples."""
        inputs = dict(inputs)
        num_pairs = len(inputs["input_ids"])
        skipped, names = inputs.pop("skipped", []), inputs.pop("names", [f"pair {n}" for n in range(num_pairs)])
        inputs.pop("caption_lengths", None)  # for evaluation
        self.training_log.add_batch(num_pairs, inputs.pop("num_truncated", 0))
        if self.skip_budget is not None:
            self.skip_budget.add(skipped, seen=len(names) + len(skipped))
        return inputs, names

    def _compute_losses(self, model: nn.Module, rows: dict[str, Any], names: list[str]) -> dict[str, torch.Tensor]:
        """The named losses and their weighted sum, own rows against the columns of all processes."""
        exchange = Exchange(len(names), self.args.device)
        losses = self.training_objective(self.accelerator.unwrap_model(model), rows, exchange)
        self.guard.add_batch(losses["loss"], names, rows)
        self.training_log.add_losses(losses)
        return losses

    def _trained_scalars(self, model: nn.Module) -> list[nn.Parameter]:
        scalars = self.accelerator.unwrap_model(model).scalar_parameters().values()
        return [scalar for scalar in scalars if scalar.requires_grad]

    def _finish_gradients(self, model: nn.Module) -> None:
        """Averages the gradients that no wrapper averages, and checks all of them before Trainer clips them."""
        self.keep_head_gradients(model)
        if self.is_fsdp_enabled:
            average_gradients(self._trained_scalars(model))
        average_gradients(self.training_objective.trained_parameters())
        if self.is_deepspeed_enabled:  # it has checked the gradients and taken or skipped the step
            is_float16 = self.model_wrapped.fp16_enabled()
            self._is_gradient_finite = is_float16 or not self.accelerator.optimizer_step_was_skipped
            return
        if self.accelerator.scaler is not None:  # float16 gradients overflow at times; the scaler handles these steps
            self._is_gradient_finite = True
            return
        gradients = [parameter.grad for parameter in (*model.parameters(), *self.training_objective.parameters())]
        local = [g.to_local() if hasattr(g, "to_local") else g for g in gradients if g is not None]
        self._is_gradient_finite = bool(nn.utils.get_total_norm(local).isfinite()) if local else True

    def prepare_step(self) -> None:
        """Before the optimizer step: removes the gradients of a step that must be skipped, and clips those of the
        objective's own parameters, which Trainer does not know."""
        self._skips_step = self.guard.should_skip(
            self._is_gradient_finite, self.state.global_step, self.state.max_steps
        )
        scaler = self.accelerator.scaler
        if self._skips_step:  # an optimizer skips parameters without a gradient
            self.model_wrapped.zero_grad()
            self.training_objective.zero_grad()
        if scaler is None:
            self.optimizer._is_overflow = self._skips_step  # then the learning rate schedule waits too
        gradients = [p.grad for p in self.training_objective.trained_parameters() if p.grad is not None]
        for gradient in gradients if scaler is not None else []:
            gradient.div_(scaler.get_scale())
        if gradients and self.args.max_grad_norm > 0:
            nn.utils.clip_grad_norm_(self.training_objective.trained_parameters(), self.args.max_grad_norm)

    def finish_step(self) -> None:
        """After the optimizer step: the average of the weights, the step of the objective's own parameters, and its
        hooks."""
        is_skipped = self._skips_step or self.accelerator.optimizer_step_was_skipped
        if self.weight_average is not None and not is_skipped:
            self.weight_average.update()
        if self.objective_optimizer is not None:
            if not is_skipped:
                for group in self.objective_optimizer.param_groups:
                    group["lr"] = base_learning_rate(self.optimizer)
                self.objective_optimizer.step()
            self.objective_optimizer.zero_grad()
        self.training_objective.on_step_end(self.accelerator.unwrap_model(self.model))

    # Optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters() if not any(word in name for word in NO_DECAY)]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's optimizer of the model, and one like it for the parameters of the objective's parts.

        Under FSDP the model's scalar parameters form a group of their own: one kernel cannot take both shards and plain
        tensors.
        """
        optimizer = super().create_optimizer(model)
        if self.is_fsdp_enabled:
            scalars = set(self.accelerator.unwrap_model(model or self.model).scalar_parameters().values())
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if parameter in scalars]
                if own:
                    group["params"] = [parameter for parameter in group["params"] if parameter not in scalars]
                    optimizer.add_param_group({**group, "params": own})
        if self.objective_optimizer is None and self.training_objective.trained_parameters():
            self.objective_optimizer = self._create_objective_optimizer()
        return optimizer

    def _create_objective_optimizer(self) -> torch.optim.Optimizer:
        if num_processes() > 1:
            for tensor in self.training_objective.state_dict().values():  # all processes start with the same
                dist.broadcast(tensor, src=0)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.training_objective)
        if not isinstance(optimizer_class, type) or {"params", "model", "optimizer_dict"} & set(options):
            raise ValueError(
                f"optim={self.args.optim}: the objective has parameters of its own, which need a plain optimizer "
                "such as adamw_torch."
            )
        decay = set(self.get_decay_parameter_names(self.training_objective))
        trained = [(name, p) for name, p in self.training_objective.named_parameters() if p.requires_grad]
        with_decay = [p for name, p in trained if name in decay and p.ndim > 1]
        without_decay = [p for name, p in trained if not (name in decay and p.ndim > 1)]
        groups = [
            {"params": with_decay, "weight_decay": self.args.weight_decay},
            {"params": without_decay, "weight_decay": 0.0},
        ]
        return optimizer_class([group for group in groups if group["params"]], **options)

    # Logs

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds named losses, scalar parameters, speed, tokens per layer and counts to the logs of training."""
        if "loss" in logs and not self.training_log.is_empty:
            model = self.accelerator.unwrap_model(self.model)
            logs.update(self.training_log.summarize(self.accelerator))
            logs.update({name: scalar.item() for name, scalar in model.scalar_parameters().items()})
            if self.skip_budget is not None:
                self.skip_budget.share()
                logs["skipped_samples"] = float(self.skip_budget.num_skipped)
            logs["skipped_steps"] = float(self.guard.skipped_steps)
        if "train_runtime" in logs:  # Trainer multiplies steps by the batch size, also where a batch was smaller
            by_process = gather_numbers(self.training_log.total_pairs, device=self.args.device)
            num_pairs = sum(pairs for (pairs,) in by_process)
            logs["train_samples_per_second"] = round(num_pairs / logs["train_runtime"], 3)
        super().log(logs, start_time)

    # Sharing

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Keeps an existing card: `push_to_hub` would replace the card with the measured figures by a draft."""
        if not (Path(self.args.output_dir) / "README.md").is_file():
            super().create_model_card(*args, **kwargs)


def check_batch(args: MLIPTrainingArguments, train_dataset: Any) -> None:
    """Raises ValueError if one contrastive batch is a single pair, or is spread over GPUs of one process."""
    if train_dataset is not None and args.train_batch_size * args.world_size < 2:
        raise ValueError(
            f"per_device_train_batch_size={args.per_device_train_batch_size} on {args.world_size} device(s) is one "
            "pair, and a contrastive loss compares a pair with others; choose 2 or more."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"One process uses {args.n_gpu} GPUs, so each GPU would compare only its share of the batch; start one "
            "process per GPU: accelerate launch, or torchrun --nproc_per_node."
        )
