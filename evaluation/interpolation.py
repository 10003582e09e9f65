# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Interpolation between the weights of two models, the start and the end of fine-tuning (WiSE-FT, Wortsman et al. 2021,
arXiv 2109.01903)."""

from collections.abc import Mapping

import torch
from torch import Tensor


def check_same_shapes(start: Mapping[str, Tensor], end: Mapping[str, Tensor]) -> None:
    """Raises ValueError, naming the parameter, if a parameter of both models has two shapes, or if they share none."""
    for name, tensor in end.items():
        if name in start and start[name].shape != tensor.shape:
            raise ValueError(
                f"{name} has the shape {list(start[name].shape)} in START and {list(tensor.shape)} in END: interpolate "
                "a model and the one that its training started from."
            )
    if not start.keys() & end.keys():
        raise ValueError("START and END have no parameter in common: give two models of one architecture.")


def interpolate_weights(start: Mapping[str, Tensor], end: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * start + alpha * end, for each tensor of `end`.

    Tensors that `start` lacks, and integers, are those of `end`. At alpha 0 and 1 the tensors are copies.

    Args:
        start: name -> tensor, float32.
        end: likewise, of the same shapes.
        alpha: 0 to 1.
    """
    weights = {}
    for name, tensor in end.items():
        if alpha == 1 or name not in start or not tensor.is_floating_point():
            weights[name] = tensor.clone()
        else:
            weights[name] = start[name].clone() if alpha == 0 else torch.lerp(start[name], tensor, alpha)
    return weights


def choose_alpha(accuracies: Mapping[float, tuple[float, float]]) -> float:
    """The alpha that keeps most of the gain on the new data for the smallest part of the loss on the old data.

    It has the highest sum of both accuracies, each divided by its absolute change from the lowest to the highest alpha.
    So accuracies of different scales count alike. An accuracy without a change does not count.

    Both ends have equal sums if the end gains on one kind of data and loses on the other. Of equal sums, the highest
    accuracy on the new data decides, because training was for these, and then the highest alpha.

    Args:
        accuracies: alpha -> accuracy on the new data, accuracy on the old data.
    """
    start, end = accuracies[min(accuracies)], accuracies[max(accuracies)]
    changes = [abs(last - first) for first, last in zip(start, end, strict=True)]

    def score(alpha: float) -> float:
        pairs = zip(accuracies[alpha], changes, strict=True)
        return sum(value / change for value, change in pairs if change)

    return max(accuracies, key=lambda alpha: (round(score(alpha), 9), accuracies[alpha][0], alpha))
