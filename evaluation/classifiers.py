# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Logistic regression on frozen features: the linear probe and few-shot classification. It needs scikit-learn."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from modeling_mlip.hub.extras import require_modules

from .metrics import accuracy_metrics

PROBE_C = (0.001, 0.01, 0.1, 1.0, 10.0)  # inverse regularisation strengths that the linear probe chooses from
FEW_SHOT_C = 0.1
MAX_ITERATIONS = 1000
HELD_OUT_SHARE = 0.2  # share of the training images that chooses the strength
SPARE_SHOTS = 4  # extra images of each class and draw, which replace images that cannot be read


def require_sklearn() -> None:
    """Raises ImportError with what to install if scikit-learn is missing."""
    require_modules("A linear probe", "evaluate", "sklearn")


def linear_probe_accuracy(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, num_classes: int
) -> dict[str, float]:
    """Accuracy of logistic regression on frozen features, in percent, as `accuracy_metrics`.

    Chooses the C of `PROBE_C` with the highest accuracy on a fifth of the training images when trained on the others;
    then trains on all of them.

    Args:
        train: (R, D) features to train on.
        train_labels: (R,) long.
        test: (I, D) features to classify.
        test_labels: (I,) long.

    Returns:
        `accuracy@1`, `accuracy@5`, `mean_per_class_accuracy`, and `C`, the chosen value.

    Raises:
        ImportError: without scikit-learn.
        ValueError: for training images of a single class.
    """
    require_sklearn()
    order = np.random.default_rng(0).permutation(len(train))
    num_held_out = max(1, round(HELD_OUT_SHARE * len(train)))
    held_out, fitted = order[:num_held_out], order[num_held_out:]
    accuracies = {}
    if len(train_labels[fitted].unique()) > 1:
        for C in logging.tqdm(PROBE_C, desc="Linear probe", unit="fit"):
            rank = _fit_and_rank(
                train[fitted], train_labels[fitted], train[held_out], train_labels[held_out], num_classes, C
            )
            accuracies[C] = (rank == 0).double().mean().item()
    best = max(accuracies, key=accuracies.__getitem__, default=FEW_SHOT_C)
    rank = _fit_and_rank(train, train_labels, test, test_labels, num_classes, best)
    return {**accuracy_metrics(rank, test_labels, num_classes), "C": best}


def few_shot_accuracy(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    num_classes: int,
    shots: int,
    seeds: int,
    rows: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """Accuracy of logistic regression on `shots` images per class, over `seeds` random draws, in percent.

    Args:
        rows, names: as in `draw_shots`; the other arguments are those of `linear_probe_accuracy`.

    Returns:
        `accuracy@1`, the mean over draws, and `accuracy_spread`, the standard deviation over draws.

    Raises:
        ImportError: without scikit-learn.
        ValueError: for a class with fewer images, or for less than one seed.
    """
    require_sklearn()
    if seeds < 1:
        raise ValueError(f"seeds={seeds}: choose 1 or more.")
    accuracies = []
    for seed in logging.tqdm(range(seeds), desc=f"{shots} shots", unit="seed"):
        chosen = draw_shots(train_labels, shots, seed, names, rows)
        rank = _fit_and_rank(train[chosen], train_labels[chosen], test, test_labels, num_classes, FEW_SHOT_C)
        accuracies.append(accuracy_metrics(rank, test_labels, num_classes)["accuracy@1"])
    return {"accuracy@1": float(np.mean(accuracies)), "accuracy_spread": float(np.std(accuracies, ddof=seeds > 1))}


def draw_shots(
    labels: Tensor,
    shots: int,
    seed: int,
    names: Sequence[str] | None = None,
    rows: Tensor | None = None,
    spare: int = 0,
) -> Tensor:
    """Draws `shots` images of each class that occurs; a larger number of shots contains the smaller one of its seed.

    Args:
        labels: (R,) long.
        names: class names for the error.
        rows: (R,) long, the rows of the split that the labels belong to; the first R rows if not given. A seed draws
            the same rows of the split whichever of its other rows are present.
        spare: number of additional images of each class, as far as there are any.

    Returns:
        indices into `labels`.

    Raises:
        ValueError: for a class with fewer than `shots` images.
    """
    rows = torch.arange(len(labels)) if rows is None else rows
    lots = np.random.default_rng(seed).random(int(rows.max()) + 1)  # one for every row of the split, present or not
    order = torch.from_numpy(lots[rows.numpy()].argsort())
    chosen = []
    for label in labels.unique().tolist():
        places = order[labels[order] == label]
        if len(places) < shots:
            name = f"class {names[label]!r}" if names else f"class {label}"
            raise ValueError(f"shots={shots}: {name} has {len(places)} images to train on; choose at most as many.")
        chosen.append(places[: shots + spare])
    return torch.cat(chosen)


def _fit_and_rank(
    train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, num_classes: int, C: float
) -> Tensor:
    """Trains a classifier and ranks the right class of each test image, `(I,)`: 0 is the first place.

    A class without training images is never right. A score that is NaN counts as a miss.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    trained = train_labels.unique()
    if len(trained) < 2:
        raise ValueError(f"The training images are of {len(trained)} class(es); a classifier needs two or more.")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=MAX_ITERATIONS))
    model.fit(train.numpy(), train_labels.numpy())
    scores = torch.full((len(test), num_classes), -torch.inf, dtype=torch.float64)
    scores[:, trained] = torch.from_numpy(model.predict_log_proba(test.numpy())).double()
    right = scores.gather(1, test_labels[:, None])  # (I, 1)
    return (~(scores < right)).sum(dim=1) - 1
