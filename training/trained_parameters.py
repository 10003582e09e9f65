# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Which parameters of a starting model train, and how fast: frozen parts, layer-wise learning-rate decay, another
learning rate for new parameters, and a warm-up of the head.

A parameter is new if the starting checkpoint did not contain it, such as those of a frequency stage on top of CLIP. New
parameters always train, also within a frozen part.
"""

import re
from collections import defaultdict
from collections.abc import Set
from typing import Any

import torch
from torch import nn

from modeling_mlip import MLIPModel

from .arguments import MLIPTrainingArguments

TOWERS = {"image": "vision_model", "text": "text_model"}
# Beginnings of the names of all parameters that only one side of a pair uses.
SIDES = {
    "image": (
        "vision_model.",
        "visual_projection.",
        "frequency_projection.",
        "token_visual_projection.",
        "token_frequency_projection.",
    ),
    "text": ("text_model.", "text_projection.", "token_text_projection."),
}
# The same of what comes before the first block of a tower.
INPUTS = {
    "image": ("vision_model.embeddings.", "vision_model.pre_layrnorm.", "vision_model.frequency."),
    "text": ("text_model.embeddings.", "text_model.encoder.embed"),
}
# Also in text towers that are an encoder of transformers.
BLOCK = re.compile(r"(?P<tower>vision_model|text_model)\.encoder\.(encoder\.)?layers?\.(?P<index>\d+)\.")


def count_blocks(model: nn.Module) -> dict[str, int]:
    """The number of blocks of each tower, by the tower's attribute name."""
    matches = (BLOCK.match(name) for name, _ in model.named_parameters())
    indices = [(match["tower"], int(match["index"])) for match in matches if match is not None]
    return {tower: 1 + max(index for name, index in indices if name == tower) for tower in TOWERS.values()}


def trained_sides(args: MLIPTrainingArguments) -> list[str]:
    """The sides of a pair, "image" and "text", whose towers are not frozen as a whole."""
    return [side for side in TOWERS if side != args.freeze]


def freeze_parameters(
    model: MLIPModel, args: MLIPTrainingArguments, new_parameters: Set[str] = frozenset()
) -> list[str]:
    """Freezes a tower (LiT, Zhai et al. 2021, arXiv 2111.07991) and the first blocks, as `args` say.

    `freeze` freezes a tower and its projections. `freeze_layers` freezes the first blocks of each other tower and what
    comes before them: embeddings, the pre-LayerNorm and the frequency stage.

    Returns:
        The names of the frozen parameters.
    """
    frozen = []
    for name, parameter in model.named_parameters():
        if name not in new_parameters and is_frozen(name, args):
            parameter.requires_grad_(False)
            frozen.append(name)
    return frozen


def is_frozen(name: str, args: MLIPTrainingArguments) -> bool:
    """Whether `freeze` or `freeze_layers` freeze the parameter with this name, if it is not new."""
    if args.freeze is not None and name.startswith(SIDES[args.freeze]):
        return True
    if args.freeze_layers == 0:
        return False
    block = BLOCK.match(name)
    if block is not None:
        return int(block["index"]) < args.freeze_layers
    return name.startswith((*INPUTS["image"], *INPUTS["text"]))


# Learning rates


def count_blocks_above(name: str, blocks: dict[str, int]) -> int:
    """The number of factors of layer-wise decay of a parameter: 1 in the last block of a tower, 2 in the block before
    it, one more than there are blocks in the embeddings, and 0 behind the last block (as in BEiT, Bao et al. 2021,
    arXiv 2106.08254)."""
    block = BLOCK.match(name)
    if block is not None:
        return blocks[block["tower"]] - int(block["index"])
    for side, tower in TOWERS.items():
        if name.startswith(INPUTS[side]):
            return blocks[tower] + 1
    return 0


def has_own_rates(args: MLIPTrainingArguments) -> bool:
    """Whether some parameters have another learning rate than `learning_rate`."""
    return args.layer_decay != 1 or args.new_parameters_learning_rate is not None


def split_learning_rates(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    args: MLIPTrainingArguments,
    new_parameters: Set[str] = frozenset(),
) -> None:
    """Splits each parameter group of an optimizer into groups with the learning rates that `args` ask for.

    A group has its factor of layer-wise decay as `lr_scale`. Groups with the factor 1 come first, because Trainer logs
    the learning rate of the first group. Groups of new parameters come last and have no decay.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    blocks = count_blocks(model)
    groups: list[tuple[tuple[bool, int], dict[str, Any]]] = []
    for group in optimizer.param_groups:
        by_kind: dict[tuple[bool, int], list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            is_new = names[parameter] in new_parameters
            has_decay = args.layer_decay != 1 and not is_new
            by_kind[is_new, count_blocks_above(names[parameter], blocks) if has_decay else 0].append(parameter)
        for (is_new, num_factors), parameters in by_kind.items():
            scale = args.layer_decay**num_factors
            rate = args.new_parameters_learning_rate if is_new else None
            rate = group["lr"] * scale if rate is None else rate
            groups.append(((is_new, num_factors), {**group, "params": parameters, "lr": rate, "lr_scale": scale}))
    optimizer.param_groups.clear()
    for _, group in sorted(groups, key=lambda entry: entry[0]):
        optimizer.add_param_group(group)


def base_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the current step without layer-wise decay."""
    group = optimizer.param_groups[0]
    return group["lr"] / group.get("lr_scale", 1)


# Head warm-up


def is_head(name: str, new_parameters: Set[str]) -> bool:
    """Whether a parameter trains during the warm-up of the head: projections, temperatures and new parameters."""
    return name in new_parameters or not name.startswith(("vision_model.", "text_model."))


def is_head_warmup(args: MLIPTrainingArguments, step: int, max_steps: int) -> bool:
    """Whether only the head trains in step `step`, counted from 0."""
    steps = args.head_warmup_steps
    return step < (round(steps * max_steps) if steps < 1 else steps)


def drop_tower_gradients(model: nn.Module, new_parameters: Set[str]) -> None:
    """Removes the gradients of all parameters that are not of the head. An optimizer then leaves their values and its
    state of them as they are.

    They are computed first, because DDP waits for the gradient of every parameter with `requires_grad`.
    """
    for name, parameter in model.named_parameters():
        if not is_head(name.replace("_checkpoint_wrapped_module.", ""), new_parameters):
            parameter.grad = None
