# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The layout of the project: direction of imports, the files of the Hub, unique names, a test for each source file."""

import ast
import functools
import re
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import small_model
from transformers.dynamic_module_utils import get_relative_imports

ROOT = Path(__file__).parent.parent
PURE = ("frequency.py", "losses.py", "rotary.py", "token_merging.py", "token_similarity.py")
# Room -> the rooms that it may import beside the model.
MAY_IMPORT = {
    "hub": set(),
    "data": {"hub"},
    "evaluation": {"data", "hub"},
    "training": {"evaluation", "data", "hub"},
    "conversion": {"hub"},
    "search": {"evaluation", "data", "hub"},
}
SOURCES = ("modeling_mlip", *MAY_IMPORT, "benchmarks")
SHARED_NAMES = {"main", "__init__"}
HUB_FILES = {"configuration_mlip.py", "modeling_mlip.py", *PURE}


def imports_of(path: Path) -> list[tuple[int, str]]:
    """The (level, module) of every import; level 0 is absolute."""
    imports = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            imports.append((node.level, node.module or ""))
    return imports


def files(*folders: str) -> list[Path]:
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len({path.relative_to(ROOT).parts[0] for path in paths}) == len(folders), "a folder holds no module"
    return paths


def shared_names(names: list[tuple[str, Path]]) -> dict[str, list[str]]:
    """The names that occur more than once, with their files."""
    places = defaultdict(list)
    for name, path in names:
        places[name].append(str(path.relative_to(ROOT)))
    return {name: paths for name, paths in places.items() if len(paths) > 1 and name not in SHARED_NAMES}


@functools.cache
def text_of(path: Path) -> str:
    return path.read_text()


@functools.cache
def public_names(path: Path) -> list[str]:
    return [
        node.name
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name not in SHARED_NAMES and node.name[0] != "_"
    ]


def is_named_by(path: Path, test: str) -> bool:
    """Whether a test imports the module, names its file, or names a public function or class that it defines."""
    stem = re.escape(path.stem)
    packages = path.relative_to(ROOT).with_suffix("").parts[:-1]
    package = re.escape(".".join(packages if packages[0] == "modeling_mlip" else ("modeling_mlip", *packages)))
    dotted = rf"{package}\.{stem}\b"
    imported = rf"from {package} import [^\n]*\b{stem}\b"
    if any(name in test and re.search(rf"\b{name}\b", test) for name in public_names(path)):
        return True
    pattern = rf"{dotted}|{imported}|\b{stem}\.py\b|^from {stem} import"
    return path.stem in test and re.search(pattern, test, re.MULTILINE) is not None


@pytest.mark.parametrize("path", files("modeling_mlip"), ids=lambda path: path.name)
def test_the_model_imports_no_room(path):
    for level, module in imports_of(path):
        assert level in (0, 1)
        assert not (level == 0 and module.startswith("modeling_mlip"))
        assert not re.match(r"(modeling_mlip\.)?(hub|data|evaluation|training|conversion|search)\b", module)


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
def test_the_mathematics_imports_nothing_else_of_ours(name):
    for level, module in imports_of(ROOT / "modeling_mlip" / name):
        if level == 1:
            assert f"{module}.py" in PURE
        else:
            assert module.split(".")[0] in {"collections", "math", "itertools", "typing", "torch"}


@pytest.mark.parametrize("path", files("modeling_mlip"), ids=lambda path: path.name)
def test_relative_imports_are_of_the_form_that_the_hub_finds(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1
            assert node.module is not None and "." not in node.module
    written = {module for level, module in imports_of(path) if level}
    assert (
        set(get_relative_imports(path)) == written
    )  # the Hub's regular expression takes no docstring line for an import


def test_a_saved_model_carries_every_file_of_the_model(tmp_path):
    small_model().save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == HUB_FILES
    assert {path.name for path in files("modeling_mlip")} == HUB_FILES | {"__init__.py"}


def test_no_two_files_have_the_same_name():
    """Packages are folders, so only the names of modules count."""
    assert shared_names([(path.stem, path) for path in files(*SOURCES)]) == {}


def test_no_two_functions_or_classes_of_modules_have_the_same_name():
    names = [
        (node.name, path)
        for path in files(*SOURCES)
        for node in ast.parse(path.read_text()).body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    ]
    assert shared_names(names) == {}


@pytest.mark.parametrize("path", files(*SOURCES), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_source_file_is_imported_or_named_by_a_test(path):
    if path.name == "__init__.py":
        return
    tests = [test for test in (ROOT / "tests").rglob("*.py") if test != Path(__file__)]
    assert any(is_named_by(path, text_of(test)) for test in tests), f"no test imports or names {path.name}"


@pytest.mark.parametrize("path", files(*SOURCES), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_source_file_begins_with_a_licence_and_a_docstring(path):
    text = path.read_text()
    assert text.startswith("# Copyright 2026 The MLIP authors.")
    assert ast.get_docstring(ast.parse(text)), "no docstring"


def test_no_file_names_a_folder_of_one_machine_or_has_a_placeholder():
    paths = [*files(*SOURCES), *(path for path in (ROOT / "recipes").iterdir()), *ROOT.glob("*.md")]
    pattern = re.compile(r"(?<![\w.>)}])/(work|tmp|home|root|Users)/|\bTODO\b|\bFIXME\b")
    matches = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if pattern.search(line)
    ]
    assert matches == []


def test_pyproject_has_three_lines():
    assert len((ROOT / "pyproject.toml").read_text().splitlines()) == 3
