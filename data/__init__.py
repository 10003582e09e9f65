# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Data sets of image-caption pairs: load them, find their columns, and make batches of pixel values and token ids."""

from .collators import EvaluationCollator, PairCollator
from .columns import find_columns
from .data_arguments import DataArguments
from .images import load_image
from .items import PairDataset, StreamedPairDataset, build_pairs, set_epoch
from .skip_budget import SkipBudget
from .sources import load_pairs, load_splits

__all__ = [
    "DataArguments",
    "EvaluationCollator",
    "PairCollator",
    "PairDataset",
    "SkipBudget",
    "StreamedPairDataset",
    "build_pairs",
    "find_columns",
    "load_image",
    "load_pairs",
    "load_splits",
    "set_epoch",
]
