# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""LoRA (Hu et al. 2021, arXiv 2106.09685) by PEFT: adapters on the attention and MLP layers of both towers, merged into
the weights at the end or saved as an adapter.

The adapters are injected in place, so the class of the model stays `MLIPModel`.
"""

import copy
import re
from collections.abc import Set
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from modeling_mlip import MLIPModel
from modeling_mlip.hub.extras import require_modules

from .arguments import MLIPTrainingArguments
from .trained_parameters import BLOCK, TOWERS, trained_sides

if TYPE_CHECKING:
    import peft

ADAPTER = "default"  # PEFT's name of a model's only adapter
BASE_LAYER = re.compile(r"^(?P<layer>.*)\.base_layer\.(?P<tensor>weight|bias)$")


def lora_config(model: MLIPModel, args: MLIPTrainingArguments) -> "peft.LoraConfig":
    """PEFT's configuration for the linear layers of the blocks that are not frozen."""
    require_modules(f"lora_rank={args.lora_rank}", "lora", "peft")
    from peft import LoraConfig

    towers = {TOWERS[side] for side in trained_sides(args)}
    layers = []
    for name, module in model.named_modules():
        block = BLOCK.match(name)
        is_trained = block is not None and block["tower"] in towers and int(block["index"]) >= args.freeze_layers
        layers += [name] if is_trained and isinstance(module, nn.Linear) else []
    options: dict[str, Any] = {"r": args.lora_rank, "lora_alpha": args.lora_alpha}  # PEFT takes a float alpha too
    return LoraConfig(**options, target_modules=layers)


def add_adapters(model: MLIPModel, args: MLIPTrainingArguments, new_parameters: Set[str] = frozenset()) -> None:
    """Adds LoRA to the model in place. All other parameters are frozen, except those that the starting checkpoint did
    not contain.

    Raises:
        ImportError: if PEFT is not installed.
    """
    config = lora_config(model, args)
    from peft import inject_adapter_in_model

    inject_adapter_in_model(config, model, ADAPTER)
    for name, parameter in model.named_parameters():
        if name in new_parameters:
            parameter.requires_grad_(True)


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers with an adapter, by name."""
    return {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}


def merged_state_dict(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The state dict of the model without adapters, whose weights are W + alpha / rank * B A.

    Args:
        model: gives the factor of each adapter.
        state_dict: of the model with adapters, which is not changed.
    """
    scales = {name: layer.scaling[ADAPTER] for name, layer in adapted_layers(model).items()}
    merged = {}
    for name, tensor in state_dict.items():
        base = BASE_LAYER.match(name)
        if base is not None:
            layer = base["layer"]
            if base["tensor"] == "weight":
                a, b = (state_dict[f"{layer}.lora_{letter}.{ADAPTER}.weight"] for letter in "AB")
                tensor = tensor + b @ a * scales[layer]  # (out, in) + (out, rank) @ (rank, in)
            merged[f"{layer}.{base['tensor']}"] = tensor
        elif ".lora_A." not in name and ".lora_B." not in name:
            merged[name] = tensor
    return merged


def save_adapter(model: MLIPModel, state_dict: dict[str, torch.Tensor], folder: str | Path) -> None:
    """Writes the adapter for `peft.PeftModel.from_pretrained(starting_model, folder)`.

    Args:
        state_dict: of the model with adapters.
    """
    from peft import get_peft_model_state_dict

    config = copy.copy(model.peft_config[ADAPTER])
    config.inference_mode, config.base_model_name_or_path = True, model.name_or_path or None
    config.save_pretrained(folder)
    adapter = get_peft_model_state_dict(model, state_dict=state_dict, adapter_name=ADAPTER)
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in adapter.items()}
    save_file(tensors, Path(folder) / "adapter_model.safetensors", metadata={"format": "pt"})


def merge_adapters(model: nn.Module) -> None:
    """Merges the adapters into the weights and removes them."""
    for name, layer in adapted_layers(model).items():
        layer.merge()
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def trained_state_dict(model: nn.Module, new_parameters: Set[str]) -> dict[str, torch.Tensor]:
    """All parameters that differ from those of the starting checkpoint: the adapters and the new parameters."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad or name in new_parameters}
