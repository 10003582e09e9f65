# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The layout that others rely on: imports point one way, and the Hub receives every file that it needs."""

import ast
import re
from pathlib import Path

import pytest
from conftest import small_model
from transformers.dynamic_module_utils import get_relative_imports

ROOT = Path(__file__).parent.parent
PURE = ("frequency.py", "losses.py", "token_merging.py")
# Room -> the rooms that it may import beside the model.
MAY_IMPORT = {
    "hub": set(),
    "data": {"hub"},
    "evaluation": {"data", "hub"},
    "training": {"evaluation", "data", "hub"},
    "conversion": {"hub"},
}
HUB_FILES = {"configuration_mlip.py", "modeling_mlip.py", *PURE}


def imports_of(path: Path) -> list[tuple[int, str]]:
    """(level, module) of every import: level 0 is absolute."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"{folder} holds no module"
    return found


@pytest.mark.parametrize("path", files("modeling_mlip"), ids=lambda path: path.name)
def test_the_model_imports_no_room(path):
    for level, module in imports_of(path):
        assert level in (0, 1)
        assert not (level == 0 and module.startswith("modeling_mlip"))
        assert not re.match(r"(modeling_mlip\.)?(hub|data|evaluation|training|conversion)\b", module)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_in_one_direction(room):
    allowed = {"modeling_mlip", *MAY_IMPORT[room]}
    for path in files(room):
        depth = len(path.relative_to(ROOT).parts) - 1
        for level, module in imports_of(path):
            assert level <= depth, f"{path}: a relative import that leaves the room"
            if level == 0 and module.split(".")[0] == "modeling_mlip":
                parts = module.split(".")
                target = parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "modeling_mlip"
                assert target != room, f"{path}: inside a room, imports are relative"
                assert target in allowed, f"{path} imports {module}"


@pytest.mark.parametrize("name", PURE)
def test_the_mathematics_imports_nothing_of_ours(name):
    for level, module in imports_of(ROOT / "modeling_mlip" / name):
        assert level == 0
        assert module.split(".")[0] in {"collections", "math", "itertools", "typing", "torch"}


@pytest.mark.parametrize("path", files("modeling_mlip"), ids=lambda path: path.name)
def test_relative_imports_are_of_the_form_that_the_hub_finds(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module is not None and "." not in node.module
    written = {module for level, module in imports_of(path) if level}
    assert set(get_relative_imports(path)) == written  # no docstring line that the regular expression takes for one


def test_a_saved_model_carries_every_file_of_the_model(tmp_path):
    small_model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == HUB_FILES
    assert {path.name for path in files("modeling_mlip")} == HUB_FILES | {"__init__.py"}


def test_pyproject_has_three_lines():
    assert len((ROOT / "pyproject.toml").read_text().splitlines()) == 3
