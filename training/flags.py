# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The command line of `mlip train`: flags of this project with their defaults, and behind --help-all all others."""

import argparse
import dataclasses
import functools
import inspect
import json
import re
from typing import Any

from transformers import CLIPConfig, CLIPVisionConfig, HfArgumentParser, TrainingArguments

from modeling_mlip import MLIPConfig, MLIPVisionConfig
from modeling_mlip.data.data_arguments import TrainingDataArguments
from modeling_mlip.hub.configurations import MODEL_FIELDS, NAMED_CONFIGS, VISION_FIELDS, named_config
from modeling_mlip.hub.flag_help import FlagHelpFormatter, add_help_flags, describe_negations, group_flags

from .arguments import MLIPTrainingArguments, ModelArguments

# Titles of groups in the help text.
MLIP_GROUP = "token merging, frequency stage and losses"
CLIP_GROUP = "sizes of the model"
INHERITED_GROUP = "transformers.TrainingArguments"
HIDDEN_GROUPS = (CLIP_GROUP, INHERITED_GROUP)
# Flags of transformers that most runs need, with their help; shown before the other flags of training.
COMMON_FLAGS = {
    "output_dir": "Folder for the model, its card and its checkpoints; created if missing.",
    "num_train_epochs": "Number of passes over the training data.",
    "max_steps": "Number of training steps, instead of --num_train_epochs.",
    "eval_strategy": "When to evaluate during training. Without --do_train and --do_eval, a run with validation data "
    "also evaluates at its end.",
    "resume_from_checkpoint": "A checkpoint to continue from. 'true' takes the last one in --output_dir, and starts a "
    "new run if there is none.",
    "do_train": "Train; the default if --do_eval is not given either.",
    "do_eval": "Evaluate --model_name_or_path, or after --do_train the trained model.",
    "seed": "Seed of the initial weights, the order of the data and the augmentation.",
    "bf16": "Train in bfloat16 mixed precision.",
    "push_to_hub": "Upload the model to the Hub whenever it is saved.",
}
# Beginnings of the names of the most important keys of the configuration, which are shown first.
FIRST_KEYS = ("merge_", "frequency_", "token_")
PYTHON_CONSTANTS = {"None": None, "True": True, "False": False}


def parse_value(text: str) -> Any:
    """Parse `0.5`, `true`, `null` or `[3,6,9]` as JSON, and Python's `True`, `False` and `None`; any other text stays a
    string."""
    if text in PYTHON_CONSTANTS:
        return PYTHON_CONSTANTS[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_arguments(
    arguments: list[str] | None, description: str | None = None
) -> tuple[ModelArguments, TrainingDataArguments, MLIPTrainingArguments, dict[str, Any]]:
    """Parse the command line into the three groups of arguments and the changed keys of the configuration."""
    model_args, data_args, training_args, *others = build_parser(description).parse_args_into_dataclasses(arguments)
    return model_args, data_args, training_args, vars(others[0]) if others else {}


def build_parser(description: str | None = None) -> HfArgumentParser:
    """The parser of `mlip train`, its flags in groups."""
    parser = HfArgumentParser(
        (ModelArguments, TrainingDataArguments, MLIPTrainingArguments),
        prog="mlip train",
        usage="mlip train [--FLAG VALUE ...]",
        description=description,
        epilog="--help-all also lists the sizes of the model and all flags of transformers.TrainingArguments.",
        formatter_class=FlagHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    describe_negations(parser)
    describe_common_flags(parser)
    group_flags(parser, dict.fromkeys(ModelArguments.__dataclass_fields__, "model"))
    add_config_flags(parser)
    group_flags(parser, dict.fromkeys(TrainingDataArguments.__dataclass_fields__, "data") | training_groups())
    add_help_flags(parser, HIDDEN_GROUPS)
    parser._action_groups.sort(key=lambda group: group.title in HIDDEN_GROUPS)  # last in the help text
    return parser


def describe_common_flags(parser: argparse.ArgumentParser) -> None:
    """Replace the help of `COMMON_FLAGS`, which in transformers describes its Trainer."""
    for action in parser._actions:
        action.help = COMMON_FLAGS.get(action.dest, action.help)


def training_groups() -> dict[str, str]:
    """The group of each training argument: those of transformers with an unchanged default are apart."""
    inherited = TrainingArguments.__dataclass_fields__
    titles: dict[str, str] = dict.fromkeys(COMMON_FLAGS, "training")
    for field in dataclasses.fields(MLIPTrainingArguments):
        is_own = inherited.get(field.name) is None or inherited[field.name].default != field.default
        titles.setdefault(field.name, "training" if is_own else INHERITED_GROUP)
    return titles


def add_config_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each key of the model's and the vision tower's configuration."""
    changes = "Each flag changes a key of the configuration that --model_name_or_path or --config_name names.\n"
    mlip_group = parser.add_argument_group(
        MLIP_GROUP, f"{changes}A saved model has its own defaults. Give lists as JSON: --merge_layers [3,6,9]."
    )
    clip_group = parser.add_argument_group(
        CLIP_GROUP, f"{changes}The defaults are those of a ViT-B/32; --config_name chooses other sizes."
    )
    clip_keys = set(CLIPConfig.__dataclass_fields__) | set(CLIPVisionConfig.__dataclass_fields__)
    descriptions = describe_keys(MLIPVisionConfig) | describe_keys(MLIPConfig)
    fields = VISION_FIELDS | MODEL_FIELDS
    for name in sorted(fields, key=_importance):
        text = descriptions.get(name, "see transformers.CLIPConfig.")
        group = clip_group if name in clip_keys else mlip_group
        group.add_argument(
            *dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")),
            type=parse_value,
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=f"{text[0].upper()}{text[1:]} ({describe_default(name, fields[name].default)})".replace("%", "%%"),
        )


def _importance(name: str) -> int:
    """Sorts the keys of `FIRST_KEYS` first; the other keys keep their order."""
    return next((n for n, beginning in enumerate(FIRST_KEYS) if name.startswith(beginning)), len(FIRST_KEYS))


def describe_default(name: str, default: Any) -> str:
    """The default of a key, and its value in the named configurations that differ from it by more than their sizes."""
    values: dict[str, list[str]] = {}
    for config_name, (vision, _, _) in NAMED_CONFIGS.items():
        if name in vision or name == "frequency_embed_weight":
            config = _read_named_config(config_name)
            value = getattr(config.vision_config if name in VISION_FIELDS else config, name)
            if value != default:
                values.setdefault(json.dumps(value), []).append(config_name)
    named = [f"; with --config_name {', '.join(names)}: {value}" for value, names in values.items()]
    return f"default: {default if isinstance(default, str) else json.dumps(default)}{''.join(named)}"


@functools.cache
def _read_named_config(name: str) -> MLIPConfig:
    """`named_config`, made once for the help of all flags."""
    return named_config(name)


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
