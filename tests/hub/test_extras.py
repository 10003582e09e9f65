# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The package without its extras: what works, and what the errors say. The extras of setup.cfg."""

import configparser
import re
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import mlip_command
from modeling_mlip.hub.extras import EXTRAS, install_hint, require_modules

ROOT = Path(__file__).parents[2]
# What a process without the extras can do. `None` in sys.modules is a package that is not installed.
WITHOUT_EXTRAS = """
import sys
for name in {blocked}:
    sys.modules[name] = None
import mlip_command
assert mlip_command.print_usage(["--help"]) == 0
assert "torch" not in sys.modules and "transformers" not in sys.modules, "the list of commands is slow"
from transformers import AutoModel
from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.hub.cli import main
keys = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
config = MLIPConfig(text_config=keys, vision_config=dict(keys, image_size=16, patch_size=8), projection_dim=16)
MLIPModel(config).save_pretrained({folder!r})
assert isinstance(AutoModel.from_pretrained({folder!r}), MLIPModel)
for command in ("train", "evaluate", "benchmark", "visualize", "convert"):
    assert main([command, "--help"]) == 1
try:
    main(["push", "--help"])
except SystemExit as stopped:
    assert stopped.code == 0
"""


def extras_of_setup() -> dict[str, list[str]]:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return {
        extra: [re.match(r"[\w-]+", line)[0].lower() for line in lines.split("\n") if line]
        for extra, lines in parser["options.extras_require"].items()
    }


def test_without_extras_the_model_works_and_the_commands_say_what_to_install(tmp_path):
    blocked = ["torchvision", "matplotlib", "datasets", "tensorboard", "evaluate", "accelerate", "sklearn", "open_clip"]
    script = WITHOUT_EXTRAS.format(blocked=blocked, folder=str(tmp_path / "model"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    errors = [line for line in done.stderr.splitlines() if ": error: " in line]
    extras = {
        line.split()[1].rstrip(":"): re.search(r"pip install 'modeling-mlip\[(\w+)\]'", line)[1] for line in errors
    }
    assert extras == {
        **{"train": "train", "evaluate": "evaluate", "benchmark": "evaluate", "visualize": "evaluate"},
        "convert": "openclip",
    }
    assert "usage: mlip push" in done.stdout


def test_a_missing_module_is_named_with_its_extra():
    with pytest.raises(ImportError, match=r"A probe needs no_such_module, which is not .*\[evaluate\]'\.$"):
        require_modules("A probe", "evaluate", "json", "no_such_module")
    require_modules("Training", "train")
    assert install_hint("openclip") == "pip install 'modeling-mlip[openclip]'"


def test_setup_installs_the_modules_of_each_extra():
    installed = extras_of_setup()
    distributions = packages_distributions()
    for extra, modules in EXTRAS.items():
        for module in modules:
            assert any(name.lower().replace("_", "-") in installed[extra] for name in distributions[module]), module
    # Training also evaluates, so its extra includes all that evaluation imports.
    assert set(EXTRAS["evaluate"]) <= set(EXTRAS["train"])


def test_every_command_has_a_description_and_every_hint_an_extra(capsys):
    for name in mlip_command.list_commands():
        assert mlip_command.DESCRIPTIONS.get(name), name
    assert mlip_command.print_usage(["no-such-command"]) == 2
    assert "no command 'no-such-command'; choose one of train, evaluate" in capsys.readouterr().err
    files = [
        path
        for folder in ("hub", "data", "evaluation", "training", "conversion", "search", "docs")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".md")
    ]
    hints = {
        hint
        for path in [*files, ROOT / "README.md"]
        for hint in re.findall(r"modeling-mlip\[(\w+)\]", path.read_text())
    }
    assert hints - {"extra"} <= set(extras_of_setup())
