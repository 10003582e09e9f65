# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Errors that a user can act on become one line with the next step; bugs do not."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HTTPError, StrictDataclassError

from modeling_mlip import MLIPConfig
from modeling_mlip.hub import atomic_files
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.hub.errors import error_line, hub_errors, is_user_error, with_flags


def http_error(status: int) -> HTTPError:
    error = HTTPError("the Hub says no")
    error.response = SimpleNamespace(status_code=status)
    return error


def test_a_wrong_configuration_is_one_line_without_the_validator_around_it():
    with pytest.raises(StrictDataclassError) as caught:
        MLIPConfig(merge_ratio=2)
    assert error_line(caught.value).startswith("merge_ratio=2 ")


@pytest.mark.parametrize(
    "message, expected",
    [
        ("out exists: set overwrite=True to replace it.", "out exists: set --overwrite to replace it."),
        ("choose one with caption_column=NAME.", "choose one with --caption_column NAME."),
        ("merge_ratio=1.5 is not a fraction, a.b=True, c=None", "merge_ratio=1.5 is not a fraction, a.b=True, c=None"),
    ],
)
def test_the_command_line_shows_the_parameters_to_set_as_flags(message, expected):
    assert with_flags(message) == expected


def test_messages_about_files_lose_their_line_breaks():
    assert error_line(OSError("no\n  such file")) == "no such file"
    assert error_line(ValueError("first\nsecond")) == "first\nsecond"
    assert error_line(ValueError()) == "ValueError"


@pytest.mark.parametrize(
    "error, expected",
    [
        (ValueError("x"), True),
        (OSError("x"), True),
        (ImportError("x"), True),
        (RuntimeError("wandb requires wandb to be installed"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (KeyError("x"), False),
        (AttributeError("x"), False),
    ],
)
def test_only_errors_that_a_user_can_act_on_are_user_errors(error, expected):
    assert is_user_error(error) is expected


@pytest.mark.parametrize("status, next_step", [(403, "hf auth login"), (500, "Run the same command again")])
def test_an_error_of_the_hub_names_the_repository_and_the_next_step(status, next_step):
    with pytest.raises(OSError, match=f"owner/name: .*the Hub says no.*{next_step}"):
        with hub_errors("owner/name"):
            raise http_error(status)


def test_an_error_that_is_not_of_the_connection_passes_unchanged():
    with pytest.raises(RuntimeError, match="a bug"), hub_errors("owner/name"):
        raise RuntimeError("a bug")


WRITING_COMMANDS = [
    ["convert", "nowhere"],
    ["export", "nowhere", "--output_dir"],
    ["interpolate", "start", "end", "--validation_file", "new.csv", "--validation_file", "old.csv", "--output_dir"],
    ["benchmark", "--model_name_or_path", "nowhere", "--output_dir"],
    ["train", "--config_name", "tiny", "--dataset_name", "shapes", "--output_dir"],
]


@pytest.mark.parametrize("command", WRITING_COMMANDS, ids=lambda command: command[0])
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_read(command, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert mlip([*command, str(tmp_path / "file" / "sub")]) == 1
    assert f"because {tmp_path / 'file'} is a file: choose another folder" in capsys.readouterr().err
    monkeypatch.setattr(atomic_files.os, "access", lambda *arguments: False)
    assert mlip([*command, str(tmp_path / "new" / "sub")]) == 1
    assert f"because {tmp_path} has no write permission: choose another folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
