# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Where transformers' own tests come from: the source distribution of the installed version, by way of pip.

Only its `tests/` is unpacked, into a cache outside the repository. The source distribution holds the test mixins but
not the folders below them, so the few names that the mixins import from there get stand-ins.
"""

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

# What the mixins import or open and the source distribution lacks -> what stands there instead.
STAND_INS = {
    "tests/__init__.py": "",
    "src/transformers/__init__.py": "",
    "tests/exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "tests/generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "tests/utils/test_configuration_utils.py": (
        'config_common_kwargs = {"return_dict": False, "output_hidden_states": True, "dtype": "float16",\n'
        '    "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}, "problem_type": "regression"}\n'
    ),
}


def transformers_tests() -> Path:
    """A folder that holds transformers' `tests` as a package; downloads it the first time.

    Raises:
        RuntimeError: if pip cannot get the source distribution, or it holds no tests.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "modeling-mlip"
    release = f"transformers-{transformers.__version__}"
    target = cache / release
    if target.exists():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        root = Path(scratch) / release
        _unpack_tests(_download(Path(scratch)), root)
        for name, text in STAND_INS.items():
            if not (root / name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text)
        root.rename(target)
    return target


def _download(folder: Path) -> Path:
    requirement = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", "transformers"]
    done = subprocess.run([*pip, "--dest", str(folder), requirement], capture_output=True, text=True)
    archives = list(folder.glob("transformers-*.tar.gz"))
    if done.returncode or not archives:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no archive came"]
        raise RuntimeError(
            f"pip got no source distribution of {requirement}: {errors[-1]}. Its tests are what `make conformance` "
            "runs: install a released version of transformers, and reach a package registry."
        )
    return archives[0]


def _unpack_tests(archive: Path, root: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = Path(member.name).parts
            if member.isfile() and parts[1:2] == ("tests",) and ".." not in parts:
                path = root.joinpath(*parts[1:])
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(tar.extractfile(member).read())
    if not (root / "tests" / "test_modeling_common.py").exists():
        raise RuntimeError(
            f"{archive.name} holds no tests/test_modeling_common.py; transformers packs its tests no more."
        )
