# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Data sets of image-caption pairs: load them, find their columns, and make batches of pixel values and token ids."""

from modeling_mlip.hub.extras import require_modules

require_modules("Reading data sets", "train")  # before the imports that would fail

from .collators import EvaluationCollator, PairCollator  # noqa: E402
from .columns import find_columns  # noqa: E402
from .data_arguments import DataArguments, TrainingDataArguments  # noqa: E402
from .images import load_image  # noqa: E402
from .items import PairDataset, StreamedPairDataset, build_pairs, set_epoch  # noqa: E402
from .skip_budget import SkipBudget  # noqa: E402
from .sources import load_pairs, load_splits  # noqa: E402

__all__ = [
    "DataArguments",
    "EvaluationCollator",
    "PairCollator",
    "PairDataset",
    "SkipBudget",
    "StreamedPairDataset",
    "TrainingDataArguments",
    "build_pairs",
    "find_columns",
    "load_image",
    "load_pairs",
    "load_splits",
    "set_epoch",
]
