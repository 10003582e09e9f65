# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Verifies that a saved folder gives the same model in a process without this package, before it is shared."""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

import torch
from safetensors.torch import load_file

from . import without_package
from .formatting import format_names
from .loading import load_processor, load_saved

# Files that only a resumed run needs, or that name this machine: they are not pushed.
NOT_PUSHED = ["checkpoint-*", "_*", "training_args.bin", "trainer_state.json", "*tfevents*"]
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
TEXT_SUFFIXES = (".json", ".jsonl", ".md", ".py", ".txt", ".yaml", ".yml", ".html", ".csv")
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/~-])/(?:home|root|Users|tmp|mnt|data|work|scratch|var|opt)/[^\s\"'`,;)]+")


def verify_folder(folder: str) -> str:
    """Loads the folder here and in a process without this package, and compares all weights and outputs.

    Returns:
        One sentence that says what was compared.

    Raises:
        OSError: if a file cannot be read.
        ValueError: if the folder holds a pickle, a value that is not finite or a path of this machine, does not load,
            or gives another result without this package.
    """
    # Step (1): files that must not be shared
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder; give the folder of a saved model.")
    if (Path(folder) / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter without its model: train without --keep_adapter, which merges it, or upload "
            "the adapter with 'hf upload'."
        )
    check_files(Path(folder))
    # Step (2): load here, strictly
    model = load_saved(folder)
    has_processor = (Path(folder) / without_package.PROCESSOR_CONFIG).is_file()
    ours = without_package.collect_outputs(model, load_processor(folder) if has_processor else None)
    if names := nonfinite_names(ours):
        raise ValueError(f"{folder}: NaN or infinite values in {format_names(names)}; push a model without them.")
    # Step (3): load in a clean process, and compare bit for bit
    theirs = _collect_in_clean_process(folder)
    if names := unequal_names(ours, theirs):
        raise ValueError(
            f"{folder} gives another result where this package is not installed: {format_names(names)}. Its code files "
            "differ from the installed package: load the model and save it again."
        )
    num_outputs = sum(name.startswith("output ") for name in ours)
    if not num_outputs or len(ours) == num_outputs:
        raise ValueError(f"{folder}: the model has no {'weights' if num_outputs else 'outputs'} to compare.")
    no_processor = "" if has_processor else "; the folder has no processor"
    return (
        f"{type(model).__name__} of {folder} is equal to the bit in a process without this package: "
        f"{len(dict(model.named_parameters()))} weights, {len(dict(model.named_buffers()))} buffers, "
        f"{num_outputs} outputs{no_processor}."
    )


def is_pushed(name: str) -> bool:
    """Whether `mlip push` uploads the file with this path relative to the folder."""
    return not any(fnmatch(name, pattern) for pattern in NOT_PUSHED)


def check_files(folder: Path) -> None:
    """Checks the files that would be pushed, without loading them.

    Raises:
        ValueError: if one is a pickle, or a text that contains an absolute path of this machine.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or not is_pushed(path.relative_to(folder).as_posix()):
            continue
        if path.suffix in PICKLE_SUFFIXES:
            raise ValueError(
                f"{path} is a pickle, which can run any code when it is loaded; save the weights with save_pretrained, "
                "which writes safetensors, and remove this file."
            )
        # A vocabulary is data: tokens may look like paths.
        if path.suffix in TEXT_SUFFIXES and path.name not in ("tokenizer.json", "vocab.json", "merges.txt"):
            found = local_path_in(path.read_text(encoding="utf-8", errors="replace"))
            if found:
                raise ValueError(f"{path} contains a path of this machine, {found!r}; remove it before sharing.")


def local_path_in(text: str) -> str | None:
    """The first absolute path in a text that looks like one of this machine."""
    match = ABSOLUTE_PATH.search(text)
    return match[0] if match else None


def nonfinite_names(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the floating-point tensors with a NaN or an infinite value."""
    return sorted(
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not tensor.isfinite().all()
    )


def unequal_names(ours: Mapping[str, torch.Tensor], theirs: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are missing on one side or differ in shape, dtype or any value.

    NaN differs from everything, NaN included.
    """
    missing = ours.keys() ^ theirs.keys()
    different = [
        name
        for name in ours.keys() & theirs.keys()
        if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ]
    return sorted([*missing, *different])


def _collect_in_clean_process(folder: str) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        outputs = Path(scratch) / "outputs.safetensors"
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        process = subprocess.run(
            [sys.executable, "-P", without_package.__file__, str(Path(folder).resolve()), str(outputs)],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
        )
        if process.returncode:
            lines = [line for line in process.stderr.splitlines() if line.strip()] or ["no error message"]
            raise ValueError(
                f"{folder} does not load where this package is not installed: {lines[-1]}. Load it here and save it "
                "again, which writes the code files and config.json anew."
            )
        return load_file(outputs)
