# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Drawn pairs, a small run of `mlip train`, and the flags of both, which several tests share."""

import hashlib
from pathlib import Path

import pytest

from modeling_mlip.data.shapes import shapes_dataset
from modeling_mlip.hub.cli import main as mlip

SMALL = ["--hidden_size", "48", "--num_hidden_layers", "2", "--num_attention_heads", "3", "--patch_size", "16"]
SMALL += ["--token_loss_weight", "0.1"]


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> tuple[str, str]:
    """Paths of two parquet files of drawn pairs, for training and for evaluation."""
    folder = tmp_path_factory.mktemp("drawn")
    paths = []
    for name, split in shapes_dataset(num_train=48, num_validation=24).items():
        paths.append(str(folder / f"{name}.parquet"))
        split.to_parquet(paths[-1])
    return paths[0], paths[1]


@pytest.fixture(scope="session")
def trained(drawn, tmp_path_factory) -> str:
    """A folder that `mlip train` wrote."""
    folder = str(tmp_path_factory.mktemp("runs") / "first")
    assert mlip(train_flags(drawn, folder)) == 0
    return folder


def train_flags(drawn: tuple[str, str], folder: str, *more: str) -> list[str]:
    """A command that trains 4 steps and evaluates, with further flags."""
    files = ["--train_file", drawn[0], "--validation_file", drawn[1]]
    return train_flags_without_data(folder, *files, *more)


def train_flags_without_data(folder: str, *more: str) -> list[str]:
    start = [] if "--model_name_or_path" in more else ["--config_name", "tiny", "--merge_ratio", "0.5", *SMALL]
    schedule = ["--max_steps", "4", "--per_device_train_batch_size", "16", "--logging_steps", "1", "--use_cpu"]
    return ["train", "--output_dir", folder, *start, *schedule, *more]


def error_of(captured: str) -> str:
    """The one error line in what a command printed."""
    assert "Traceback" not in captured
    lines = [line for line in captured.splitlines() if line.startswith("mlip train: error:")]
    assert len(lines) == 1
    return lines[0]


def file_digests(folder: str | Path) -> dict[str, str]:
    """Digest of each file of a folder, by its relative path."""
    files = [path for path in Path(folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
