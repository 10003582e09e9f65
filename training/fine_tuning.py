# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A Trainer with recipes of fine-tuning: LoRA, frozen parts, learning rates by layer, and a warm-up of the head."""

import dataclasses
import os
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers.trainer import TRAINING_ARGS_NAME

from modeling_mlip import MLIPModel

from .arguments import MLIPTrainingArguments
from .checkpoint import InterruptibleTrainer
from .lora import adapted_layers, add_adapters, merge_adapters, merged_state_dict, save_adapter, trained_state_dict
from .trained_parameters import (
    TOWERS,
    count_blocks,
    drop_tower_gradients,
    freeze_parameters,
    has_own_rates,
    is_head_warmup,
    split_learning_rates,
    trained_sides,
)

# The trained parameters of a checkpoint, adapters not merged.
TRAINED_PARAMETERS = "lora_parameters.safetensors"


def check_fine_tuning(model: MLIPModel, args: MLIPTrainingArguments, new_parameters: Set[str] = frozenset()) -> None:
    """Checks the arguments of fine-tuning against the model.

    Args:
        new_parameters: names of the parameters that the starting checkpoint did not contain.

    Raises:
        ValueError: if an argument is out of range or has no effect on this model.
    """
    blocks = count_blocks(model)
    smallest = min(blocks[TOWERS[side]] for side in trained_sides(args))
    if args.freeze_layers > smallest:
        raise ValueError(f"freeze_layers={args.freeze_layers}: choose at most {smallest}, the blocks of the tower.")
    if args.lora_rank is not None and all(args.freeze_layers == blocks[TOWERS[side]] for side in trained_sides(args)):
        raise ValueError(
            f"freeze_layers={args.freeze_layers} leaves no block for lora_rank={args.lora_rank}: choose a smaller one."
        )
    if args.keep_adapter and new_parameters:
        raise ValueError(
            f"keep_adapter=True: an adapter cannot contain the {len(new_parameters)} parameters that the starting "
            f"checkpoint lacks ({min(new_parameters)}, ...). Leave keep_adapter out, or leave these parts out of the "
            "configuration, for example with frequency_layers=0 and frequency_loss_weight=0."
        )
    if args.new_parameters_learning_rate is not None and not new_parameters:
        raise ValueError(
            f"new_parameters_learning_rate={args.new_parameters_learning_rate} has no effect: the starting checkpoint "
            "contains all parameters of this configuration. Leave it out."
        )
    if args.head_warmup_steps and args.lora_rank is not None and not new_parameters:
        raise ValueError(
            f"head_warmup_steps={args.head_warmup_steps} with lora_rank={args.lora_rank}: the projections are frozen "
            "and no parameter is new, so nothing would train. Leave one of them out."
        )


class FineTuningTrainer(InterruptibleTrainer):
    """A Trainer that trains some parameters, each with its own learning rate, and with `lora_rank` adapters.

    With adapters, every checkpoint contains the merged model, or with `keep_adapter` the adapter, and beside it the
    trained parameters, from which a run is resumed.

    Raises:
        ValueError: if a run is resumed with other adapters or from another starting model.
    """

    new_parameters: Set[str]  # names of the parameters that the starting checkpoint did not contain

    def prepare_fine_tuning(self) -> None:
        """Freezes parameters of the model and adds adapters."""
        model, args = self.model, self.args
        check_fine_tuning(model, args, self.new_parameters)
        if self.is_deepspeed_enabled and (recipe := describe_recipe(args).keys() - {"freeze", "freeze_layers"}):
            raise ValueError(
                f"{', '.join(sorted(recipe))}: with DeepSpeed only freeze and freeze_layers work; leave the others "
                "out, or use DDP or FSDP."
            )
        freeze_parameters(model, args, self.new_parameters)
        if args.lora_rank is not None and not adapted_layers(model):
            add_adapters(model, args, self.new_parameters)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer's, with the learning rates that the arguments ask for."""
        is_created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_created and has_own_rates(self.args):
            unwrapped = self.accelerator.unwrap_model(model or self.model)
            split_learning_rates(optimizer, unwrapped, self.args, self.new_parameters)
        return optimizer

    def keep_head_gradients(self, model: nn.Module) -> None:
        """Removes the gradients of the towers during the warm-up of the head."""
        if is_head_warmup(self.args, self.state.global_step, self.state.max_steps):
            drop_tower_gradients(self.accelerator.unwrap_model(model), self.new_parameters)

    @property
    def merges_adapters(self) -> bool:
        return self.args.lora_rank is not None and not self.args.keep_adapter

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's. At its end the adapters are merged into the weights, unless `keep_adapter` is set or FSDP shards
        them."""
        if self.args.lora_rank is not None and not adapted_layers(self.model):  # merged by an earlier call
            add_adapters(self.model, self.args, self.new_parameters)
            self.model_wrapped = self.model
            none_yet: Any = None
            self.optimizer = none_yet  # Trainer creates one for the adapters
        result = super().train(*args, **kwargs)
        if self.merges_adapters and not self.is_fsdp_enabled:
            merge_adapters(self.accelerator.unwrap_model(self.model))
        return result

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Trainer's, but adapters are merged into the written weights, or with `keep_adapter` written alone."""
        model, folder = self.accelerator.unwrap_model(self.model), output_dir or self.args.output_dir
        restore_class_name(model)
        if not self.args.should_save or not adapted_layers(model):
            super()._save(output_dir, state_dict)
            return
        os.makedirs(folder, exist_ok=True)
        state_dict = state_dict or model.state_dict()
        if self._is_writing_checkpoint and not self.is_fsdp_enabled:
            trained = trained_state_dict(model, self.new_parameters)
            save_file({name: t.contiguous() for name, t in trained.items()}, os.path.join(folder, TRAINED_PARAMETERS))
        if self.merges_adapters:
            super()._save(output_dir, merged_state_dict(model, state_dict))
        else:
            save_adapter(model, state_dict, folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)
            torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        path = Path(resume_from_checkpoint) / TRAINED_PARAMETERS
        rank = self.args.lora_rank
        if path.is_file() != (rank is not None):
            saved = "with" if path.is_file() else "without"
            raise ValueError(
                f"{resume_from_checkpoint} was saved {saved} lora_rank, and this run has lora_rank={rank}."
            )
        if rank is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self._load_trained_parameters(path)

    def _load_best_model(self) -> None:
        folder = self.state.best_model_checkpoint
        if self.args.lora_rank is None or self.is_fsdp_enabled or folder is None:
            super()._load_best_model()
        else:
            self._load_trained_parameters(Path(folder) / TRAINED_PARAMETERS)

    @torch.no_grad()
    def _load_trained_parameters(self, path: Path) -> None:
        """Loads the trained parameters of a checkpoint. All others are those of the starting model."""
        saved, trained = load_file(path), trained_state_dict(self.model, self.new_parameters)
        shapes, expected = ({name: tuple(t.shape) for name, t in state.items()} for state in (saved, trained))
        if shapes != expected:
            different = sorted(name for name in shapes.keys() | expected if shapes.get(name) != expected.get(name))
            raise ValueError(
                f"{path} contains other parameters than this run trains ({len(different)}, among them {different[0]}): "
                "resume with the same model, lora_rank, freeze and freeze_layers."
            )
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
        weights = path.with_name("model.safetensors")
        if self.merges_adapters and weights.is_file():
            merged = merged_state_dict(self.model, self.model.state_dict())
            for name, tensor in load_file(weights).items():
                if not torch.allclose(tensor, merged[name].to(tensor), rtol=1e-3, atol=1e-4):
                    raise ValueError(
                        f"{path.parent} was not trained from this model: {name} differs. Give the model that the run "
                        "started from."
                    )


def restore_class_name(model: nn.Module) -> None:
    """Gives the class that FSDP2 derives from the model's class the name of the latter.

    transformers finds the code files of a model, and the entry for them in `config.json`, from the name and the module
    of the class. No effect on other models.
    """
    derived = type(model)
    if issubclass(derived, FSDPModule):
        original = next(base for base in derived.__mro__ if not issubclass(base, FSDPModule))
        derived.__module__, derived.__name__ = original.__module__, original.__name__
        derived.__qualname__ = original.__qualname__


def describe_recipe(args: MLIPTrainingArguments) -> dict[str, Any]:
    """The arguments of fine-tuning that differ from their defaults."""
    names = ["lora_rank", "keep_adapter", "freeze", "freeze_layers", "layer_decay"]
    names += ["new_parameters_learning_rate", "head_warmup_steps"]
    if args.lora_rank is not None and args.lora_alpha != 2 * args.lora_rank:
        names.insert(1, "lora_alpha")
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    return {name: getattr(args, name) for name in names if getattr(args, name) != defaults[name]}
