# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The command `mlip` prints one line for an error and keeps the traceback of a bug in a file."""

import re
from pathlib import Path

import pytest
from safetensors import SafetensorError

from modeling_mlip.hub import cli


class FakeEntryPoint:
    name = "fail"

    def __init__(self, error: BaseException):
        self.error = error

    def load(self):
        def command(arguments):
            raise self.error

        return command


@pytest.fixture
def raising(monkeypatch):
    def install(error):
        monkeypatch.setattr(cli, "entry_points", lambda group: [FakeEntryPoint(error)])

    return install


@pytest.mark.parametrize(
    "error",
    [
        ValueError("merge_ratio=2"),
        OSError("no such file"),
        ImportError("no package"),
        MemoryError("too large"),
        SafetensorError("header"),
        RuntimeError("WandbCallback requires wandb to be installed. Run `pip install wandb`."),
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
    ],
)
def test_an_error_of_the_user_is_one_line(raising, error, capsys):
    raising(error)
    assert cli.main(["fail"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines == [f"mlip fail: error: {error}"]


def test_an_error_names_the_flag_to_give(raising, capsys):
    raising(FileExistsError("out exists: choose another folder, or set overwrite=True to replace it."))
    assert cli.main(["fail"]) == 1
    assert "or set --overwrite to replace it." in capsys.readouterr().err


@pytest.mark.parametrize("error", [KeyError("eval_loss"), RuntimeError("size mismatch"), AttributeError("None.x")])
def test_a_bug_is_one_line_with_a_file_of_its_traceback(raising, error, capsys):
    raising(error)
    assert cli.main(["fail"]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"unexpected {type(error).__name__}" in line
    log = Path(re.search(r"traceback in (\S+)\.$", line)[1])
    assert "Traceback" in log.read_text() and type(error).__name__ in log.read_text()
    log.unlink()


def test_debug_raises_the_error(raising):
    raising(ValueError("merge_ratio=2"))
    with pytest.raises(ValueError, match="merge_ratio=2"):
        cli.main(["--debug", "fail"])


def test_an_interruption_is_no_error(raising, capsys):
    raising(KeyboardInterrupt())
    assert cli.main(["fail"]) == 130
    assert "Traceback" not in capsys.readouterr().err
