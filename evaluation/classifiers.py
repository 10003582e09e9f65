# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

import importlib.util
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers.utils import logging

from .metrics import accuracy_metrics

# Strengths of LogisticRegression that `linear_probe` chooses from, weakest regularisation last.
PROBE_C = (0.001, 0.01, 0.1, 1.0, 10.0)


FEW_SHOT_C = 0.1


PROBE_STEPS = 1000


SPARE_SHOTS = 4  # of each class and draw, in case that some are broken


HELD_BACK = 0.2  # share of the training images that chooses the strength


def require_sklearn() -> None:
    """Raises ImportError with what to install, before anything is computed."""
    if importlib.util.find_spec("sklearn") is None:
        raise ImportError("Linear probes need scikit-learn, which is not installed: pip install scikit-learn.")


def linear_probe(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int) -> dict:
    """Accuracy of logistic regression on frozen features, in percent, as `accuracy_metrics`.

    The strength of the regularisation is the one of `PROBE_C` that classifies a fifth of the training images best when
    trained on the others; then all are trained on.

    Args:
        train: (R, D) features to train on.
        train_labels: (R,) long.
        test: (I, D) features to classify.
        test_labels: (I,) long.
        classes: how many there are.

    Returns:
        `accuracy@1`, `accuracy@5`, `mean_per_class_accuracy`, and `C`, the strength chosen.

    Raises:
        ImportError: without scikit-learn.
        ValueError: for training images of a single class.
    """
    require_sklearn()
    order = np.random.default_rng(0).permutation(len(train))
    cut = max(1, round(HELD_BACK * len(train)))
    held, rest = order[:cut], order[cut:]
    accuracies = {}
    if len(train_labels[rest].unique()) > 1:
        for C in logging.tqdm(PROBE_C, desc="Linear probe", unit="fit"):
            rank = _ranks(train[rest], train_labels[rest], train[held], train_labels[held], classes, C)
            accuracies[C] = (rank == 0).double().mean().item()
    best = max(accuracies, key=accuracies.__getitem__, default=FEW_SHOT_C)
    rank = _ranks(train, train_labels, test, test_labels, classes, best)
    return {**accuracy_metrics(rank, test_labels, classes), "C": best}


def few_shot(
    train: Tensor,
    train_labels: Tensor,
    test: Tensor,
    test_labels: Tensor,
    classes: int,
    shots: int,
    seeds: int,
    rows: Tensor | None = None,
    names: Sequence[str] | None = None,
) -> dict[str, float]:
    """`accuracy@1` of logistic regression on `shots` images of each class, its mean over draws of them, and
    `accuracy_spread`, its standard deviation; in percent. `rows` and `names` as in `draw_shots`.

    Raises:
        ImportError: without scikit-learn.
    """
    require_sklearn()
    found = []
    for seed in logging.tqdm(range(seeds), desc=f"{shots} shots", unit="seed"):
        chosen = draw_shots(train_labels, shots, seed, names, rows)
        rank = _ranks(train[chosen], train_labels[chosen], test, test_labels, classes, FEW_SHOT_C)
        found.append(accuracy_metrics(rank, test_labels, classes)["accuracy@1"])
    return {"accuracy@1": float(np.mean(found)), "accuracy_spread": float(np.std(found, ddof=seeds > 1))}


def draw_shots(
    labels: Tensor,
    shots: int,
    seed: int,
    names: Sequence[str] | None = None,
    rows: Tensor | None = None,
    spare: int = 0,
) -> Tensor:
    """Places of `shots` images of each class that occurs in `labels` `(R,)`; more shots of a seed contain the fewer.

    `rows` `(R,)` tells which rows of the split the labels belong to, the first R if not given: a seed draws the same
    images whichever others are there. `spare` more of each class come along where there are as many. `names` of the
    classes are for the error.

    Raises:
        ValueError: for a class with fewer images.
    """
    rows = torch.arange(len(labels)) if rows is None else rows
    lots = np.random.default_rng(seed).random(int(rows.max()) + 1)  # one for every row of the split, there or not
    order = torch.from_numpy(lots[rows.numpy()].argsort())
    chosen = []
    for label in labels.unique().tolist():
        places = order[labels[order] == label]
        if len(places) < shots:
            name = f"class {names[label]!r}" if names else f"class {label}"
            raise ValueError(f"--shots {shots}: {name} has {len(places)} images to train on; choose at most as many.")
        chosen.append(places[: shots + spare])
    return torch.cat(chosen)


def _ranks(train: Tensor, train_labels: Tensor, test: Tensor, test_labels: Tensor, classes: int, C: float) -> Tensor:
    """How many classes score at least as high as the right one, `(I,)`; a class that was not trained is never right."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    known = train_labels.unique()
    if len(known) < 2:
        raise ValueError(f"The training images are of {len(known)} class(es); a classifier needs two or more.")
    model = make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=PROBE_STEPS))
    model.fit(train.numpy(), train_labels.numpy())
    scores = torch.full((len(test), classes), -torch.inf, dtype=torch.float64)
    scores[:, known] = torch.from_numpy(model.predict_log_proba(test.numpy())).double()
    right = scores.gather(1, test_labels[:, None])  # (I, 1)
    return (scores >= right).sum(dim=1) - 1
