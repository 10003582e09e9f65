# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip push`: shares a saved folder on the Hub, once it has come back equal in a process without this package.

mlip push runs/mine owner/name --private
mlip push runs/mine owner/name --dry_run
"""

import argparse
import os
import subprocess
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path

import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file
from transformers import AutoProcessor

from . import without_package
from .errors import hub_errors
from .loading import load_saved

# What a run needs to go on and no reader of the model does; the pickles among it never leave this machine.
LEFT_HERE = ["checkpoint-*", "_*", "training_args.bin"]
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="mlip push", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("folder", help="A saved model: of 'mlip train', 'mlip convert' or save_pretrained.")
    parser.add_argument("repo", help="Where it goes on the Hub: owner/name.")
    parser.add_argument("--private", action="store_true", help="Make the new repository a private one.")
    parser.add_argument("--dry_run", action="store_true", help="Examine the folder and push nothing.")
    parser.add_argument("--commit_message", default="Upload MLIP model", help="What the commit says.")
    flags = parser.parse_args(arguments)
    print(examine(flags.folder))
    if flags.dry_run:
        print("Nothing was pushed: --dry_run.")
    else:
        print(f"Pushed to {push(flags.folder, flags.repo, flags.private, flags.commit_message)}")


def examine(folder: str) -> str:
    """Reloads the folder in a clean process, and returns what was found equal.

    Raises:
        ValueError: if the folder does not load here or there, does not come back equal, or holds a pickle.
    """
    # Step (1): what is read at all
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is no folder; give one that a model was saved to.")
    for path in sorted(Path(folder).rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix in PICKLES and not any(fnmatch(name, pattern) for pattern in LEFT_HERE):
            raise ValueError(
                f"{path} is a pickle, which can run any code when it is loaded; save weights with save_pretrained, "
                "which writes safetensors, and leave out the rest."
            )
    # Step (2): here, strictly, and there
    model = load_saved(folder)
    has_processor = (Path(folder) / without_package.PROCESSOR_CONFIG).is_file()
    ours = without_package.observe(model, AutoProcessor.from_pretrained(folder) if has_processor else None)
    theirs = _observe_in_clean_process(folder)
    # Step (3): to the bit
    wrong = sorted(ours.keys() ^ theirs.keys())
    wrong += [name for name in ours.keys() & theirs.keys() if not torch.equal(ours[name], theirs[name])]
    if wrong:
        raise ValueError(
            f"{folder} does not come back equal where this package is not installed: {', '.join(wrong[:5])}"
            f"{f' and {len(wrong) - 5} more' if len(wrong) > 5 else ''}. Load it here and save it again: the code "
            "files in it are not those that it was made with."
        )
    outputs = sum(name.startswith("output ") for name in ours)
    without = "" if has_processor else ", and there is no processor in the folder"
    return (
        f"{type(model).__name__} of {folder} comes back equal to the bit in a process without this package: "
        f"{len(dict(model.named_parameters()))} weights, {len(dict(model.named_buffers()))} buffers, "
        f"{outputs} outputs{without}."
    )


def _observe_in_clean_process(folder: str) -> dict[str, torch.Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        seen = Path(scratch) / "seen.safetensors"
        environment = {**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            [sys.executable, "-P", without_package.__file__, str(Path(folder).resolve()), str(seen)],
            cwd=scratch,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
            raise ValueError(
                f"{folder} does not load where this package is not installed: {said[-1]}. Load it here and save it "
                "again, which writes the code files and config.json anew."
            )
        return load_file(seen)


def push(folder: str, repo: str, private: bool = False, commit_message: str | None = None) -> str:
    """Creates the repository if need be and uploads; a second call goes on where an interrupted one stopped.

    Raises:
        ValueError: if a private one was asked for and a public one is there.
        OSError: if the Hub refuses or does not answer.
    """
    api = HfApi()
    with hub_errors(f"{repo} on {api.endpoint}"):
        repo = api.create_repo(repo, private=private or None, exist_ok=True).repo_id
        if private and not api.model_info(repo).private:
            raise ValueError(f"{repo} is there already and is public; make it private first, or leave out --private.")
        return api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=commit_message, ignore_patterns=[*LEFT_HERE]
        ).repo_url.url


if __name__ == "__main__":
    main()
