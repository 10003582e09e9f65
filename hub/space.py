# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""A Space of the Hub that shows the page of `mlip app` for a model on the Hub.

The Space consists of three small files. It installs this package by pip, and loads the model from its repository.
"""

import json
import tempfile
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path

from huggingface_hub import HfApi

from .configurations import CONFIG_CLASSES, saved_config
from .errors import hub_errors
from .without_package import PROCESSOR_CONFIG

DISTRIBUTION = "modeling-mlip"
MESSAGE = "Page of mlip app"
README = """---
title: {title}
sdk: gradio
{sdk_version}python_version: "3.11"
app_file: app.py
models:
- {model}
---

Classify an image by labels of your choice with [{model}](https://huggingface.co/{model}), and compare its scores and
speed at different merge ratios. The page is that of `mlip app {model}`.
"""
APP = """from modeling_mlip.search.app import build_page
from modeling_mlip.search.app_session import AppSession

build_page(AppSession({model!r})).launch()
"""


def push_space(model: str, requirement: str, private: bool = False) -> str:
    """Creates the Space with the name of the model, or updates its files.

    Args:
        model: the id of a model on the Hub, owner/name.
        requirement: the line of requirements.txt that installs this package, see `default_requirement`.
        private: whether a new Space is a private one.

    Returns:
        The address of the Space.

    Raises:
        ValueError: if `private` is set and the Space exists and is public.
        OSError: if the Hub refuses a request or does not answer.
    """
    api = HfApi()
    with hub_errors(f"Space {model} on {api.endpoint}"):
        space = api.create_repo(model, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
        if private and not api.space_info(space.repo_id).private:
            raise ValueError(
                f"Space {model} exists and is public: make it private first, or push without private=True."
            )
        with tempfile.TemporaryDirectory() as folder:
            for name, content in space_files(space.repo_id, requirement).items():
                Path(folder, name).write_text(content, encoding="utf-8")
            api.upload_folder(repo_id=space.repo_id, repo_type="space", folder_path=folder, commit_message=MESSAGE)
        return space.url


def check_space_model(folder: str) -> None:
    """Raises ValueError if the page cannot show the saved model: it needs both towers and a processor."""
    architectures = saved_config(folder, CONFIG_CLASSES).architectures or ["a configuration alone"]
    has_processor = Path(folder, PROCESSOR_CONFIG).is_file()
    if architectures != ["MLIPModel"] or not has_processor:
        raise ValueError(
            f"--space: {folder} holds {' and '.join(architectures)}{'' if has_processor else ' without a processor'}; "
            "give an MLIPModel with its processor, or push without --space."
        )


def space_files(model: str, requirement: str) -> dict[str, str]:
    """Name -> content of each file of the Space."""
    try:
        sdk_version = f"sdk_version: {version('gradio')}\n"
    except PackageNotFoundError:  # the Hub takes its newest version
        sdk_version = ""
    title = model.rpartition("/")[2]
    return {
        "README.md": README.format(title=title, model=model, sdk_version=sdk_version),
        "app.py": APP.format(model=model),
        "requirements.txt": f"{requirement}\n",
    }


def default_requirement() -> str:
    """The line of requirements.txt that installs this package as it was installed here: the commit of a repository, or
    the version of a package index.

    Raises:
        ValueError: if it was installed from files of this machine.
    """
    package = distribution(DISTRIBUTION)
    source = json.loads(package.read_text("direct_url.json") or "{}")  # PEP 610; no such file: from an index
    if "vcs_info" in source:
        return f"{DISTRIBUTION}[app] @ {source['vcs_info']['vcs']}+{source['url']}@{source['vcs_info']['commit_id']}"
    if not source and package.read_text("INSTALLER"):
        return f"{DISTRIBUTION}[app]=={package.version}"
    raise ValueError(
        f"--space: {DISTRIBUTION} is installed from files of this machine, which a Space cannot read. Say how it "
        f"installs the package, for example --space_requirement '{DISTRIBUTION}[app] @ git+https://HOST/OWNER/NAME'."
    )
