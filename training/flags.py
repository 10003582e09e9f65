# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The command line of `mlip train`: flags of this project first, then those of transformers, each with its default."""

import argparse
import dataclasses
import inspect
import json
import re
from typing import Any

from transformers import HfArgumentParser, TrainingArguments

from modeling_mlip import MLIPConfig, MLIPVisionConfig
from modeling_mlip.data.data_arguments import DataArguments
from modeling_mlip.hub.configurations import MODEL_FIELDS, VISION_FIELDS

from .arguments import MLIPTrainingArguments, ModelArguments

CONFIG_GROUP = "configuration (keys of MLIPConfig and MLIPVisionConfig)"
INHERITED_GROUP = "transformers.TrainingArguments"


class FlagHelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description, and adds the default to each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default != [] and action.option_strings
        return super()._get_help_string(action) if has_default and action.nargs != 0 else action.help


def parse_value(text: str) -> Any:
    """Parse `0.5`, `true`, `null` or `[3,6,9]` as JSON; any other text stays a string."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_arguments(
    arguments: list[str] | None, description: str | None = None
) -> tuple[ModelArguments, DataArguments, MLIPTrainingArguments, dict[str, Any]]:
    """Parse the command line into the three groups of arguments and the changed keys of the configuration."""
    model_args, data_args, training_args, *others = build_parser(description).parse_args_into_dataclasses(arguments)
    return model_args, data_args, training_args, vars(others[0]) if others else {}


def build_parser(description: str | None = None) -> HfArgumentParser:
    """The parser of `mlip train`, its flags in groups."""
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, MLIPTrainingArguments),
        prog="mlip train",
        usage="mlip train [--FLAG VALUE ...]",
        description=description,
        formatter_class=FlagHelpFormatter,
        allow_abbrev=False,
    )
    describe_negations(parser)
    group_flags(parser)
    add_config_flags(parser)
    parser._action_groups.sort(key=lambda group: group.title == INHERITED_GROUP)  # last in the help text
    return parser


def describe_negations(parser: argparse.ArgumentParser) -> None:
    """Give each `--no_NAME` flag its own help: HfArgumentParser copies that of `--NAME`."""
    for action in parser._actions:
        if isinstance(action, argparse._StoreFalseAction):
            action.help = f"Set --{action.dest} to false."


def group_flags(parser: argparse.ArgumentParser) -> None:
    """Move the flags from argparse's one group into a group per dataclass, those of transformers apart."""
    inherited = TrainingArguments.__dataclass_fields__
    is_own = {
        field.name: inherited.get(field.name) is None or inherited[field.name].default != field.default
        for field in dataclasses.fields(MLIPTrainingArguments)
    }
    titles = {field.name: "model" for field in dataclasses.fields(ModelArguments)}
    titles |= {field.name: "data" for field in dataclasses.fields(DataArguments)}
    titles |= {name: "training" if own else INHERITED_GROUP for name, own in is_own.items()}
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(titles.values())}
    options = parser._optionals
    for action in list(options._group_actions):
        if action.dest in titles:
            action.metavar = None if action.choices else "VALUE"
            options._group_actions.remove(action)
            groups[titles[action.dest]]._group_actions.append(action)


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each key of the model's and the vision tower's configuration."""
    group = parser.add_argument_group(
        CONFIG_GROUP,
        "Each changes a key of the configuration that --model_name_or_path or --config_name names. Lists as JSON: "
        "--merge_layers [3,6,9].",
    )
    for config_class, fields in ((MLIPConfig, MODEL_FIELDS), (MLIPVisionConfig, VISION_FIELDS)):
        descriptions = describe_keys(config_class)
        for name, field in fields.items():
            text = descriptions.get(name, "See transformers.CLIPConfig.")
            text = f"{text[0].upper()}{text[1:]} (default of {config_class.__name__}: {field.default})"
            group.add_argument(
                f"--{name}",
                type=parse_value,
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=text.replace("%", "%%"),
            )


def describe_keys(config_class: type) -> dict[str, str]:
    """The descriptions of a configuration's keys, from the "Args:" section of its docstring and of its base classes."""
    descriptions: dict[str, str] = {}
    for base in reversed(config_class.__mro__):
        text = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Args:\n")[2]
        section = re.split(r"\n(?=\S)", text)[0]
        # "    name (type): text" or "    name: text"; its further lines are indented more.
        for entry in re.split(r"\n(?=    \S)", section):
            match = re.fullmatch(r"\s*(\w+)(?: \([^\n]*\))?:\s+(.*)", entry, flags=re.DOTALL)
            if match is not None:
                descriptions[match[1]] = " ".join(match[2].replace("`", "").split())
    return descriptions
