# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The help of `mlip train`, and the values of its flags."""

import argparse
import json
import re

import pytest

from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.hub.configurations import MODEL_FIELDS, VISION_FIELDS
from modeling_mlip.hub.flag_help import FlagHelpFormatter, add_help_flags, group_flags
from modeling_mlip.training.flags import COMMON_FLAGS, build_parser, parse_arguments


def help_text(capsys, flag: str = "--help") -> str:
    with pytest.raises(SystemExit) as stopped:
        mlip(["train", flag])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def described_flags(text: str) -> list[str]:
    return re.findall(r"^  (?:-h, )?--(\w[\w-]*)", text, re.MULTILINE)


def test_help_shows_merging_first_and_the_flags_of_transformers_only_on_request(capsys):
    short, full = (described_flags(help_text(capsys, flag)) for flag in ("--help", "--help-all"))
    own = ("config_name", "merge_ratio", "token_loss_weight", "caption_column", "output_dir", "mini_batch_size")
    positions = [short.index(name) for name in own]
    assert positions == sorted(positions) and positions[1] < 8
    assert set(short) < set(full)
    hidden = set(full) - set(short)
    assert {"gradient_accumulation_steps", "hidden_size", "adam_beta1"} <= hidden and len(hidden) > 80
    assert len(full) == len(set(full)), "each flag has one spelling in the help"


def test_help_describes_each_key_of_the_configuration_and_its_default(capsys):
    text = help_text(capsys, "--help-all")
    for name, field in (VISION_FIELDS | MODEL_FIELDS).items():
        [entry] = re.findall(rf"^  --{name} .*?(?=\n  --|\n\n)", text, re.MULTILINE | re.DOTALL)
        entry = " ".join(entry.split())
        default = field.default if isinstance(field.default, str) else json.dumps(field.default)
        assert f"(default: {default}" in entry, name
        assert len(entry.partition("(default")[0]) > len(f"--{name} VALUE ") + 10, f"{name} has no description"
    words = " ".join(text.split())
    assert "(default: 0.0005)" in words
    assert "(default: 0.0; with --config_name nano, tiny, vit-b-32, vit-b-16, vit-l-14: 0.5)" in words


@pytest.mark.parametrize("name", ["augment", "sweep"])
def test_help_of_a_negated_flag_says_what_it_sets(name, capsys):
    assert f"--no_{name} Set --{name} to false." in " ".join(help_text(capsys).split())


def test_help_flags_of_transformers_that_are_shown_have_an_own_text():
    parser = build_parser()
    texts = {action.dest: action.help for action in parser._actions}
    assert all(texts[name] == text for name, text in COMMON_FLAGS.items())


@pytest.mark.parametrize(
    ("text", "value"),
    [("0.5", 0.5), ("[0, 1]", [0, 1]), ("null", None), ("None", None), ("False", False), ("ward", "ward")],
)
def test_values_of_keys_are_json_or_python_constants(text, value):
    parsed = parse_arguments(["--config_name", "tiny", "--output_dir", "runs", "--merge-layers", text])
    assert parsed[-1] == {"merge_layers": value}


def test_short_help_leaves_out_a_hidden_group_only(capsys):
    def help_of(flag: str) -> str:
        parser = argparse.ArgumentParser(add_help=False, formatter_class=FlagHelpFormatter)
        parser.add_argument("--first_flag", "--first-flag", default=3, help="One.")
        parser.add_argument("--second_flag", help="Two.")
        group_flags(parser, {"first_flag": "shown", "second_flag": "rare"})
        add_help_flags(parser, ["rare"])
        with pytest.raises(SystemExit):
            parser.parse_args([flag])
        return capsys.readouterr().out.partition("options:")[2]

    short, full = help_of("--help"), help_of("--help-all")
    assert "One. (default: 3)" in short and "--first-flag" not in short
    assert "second_flag" not in short and "Two." in full
    assert " ".join(full.split()).startswith(" ".join(short.split()))
