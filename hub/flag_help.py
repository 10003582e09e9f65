# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The help texts of the subcommands of `mlip`: flags in groups with their defaults, and rare flags only on request."""

import argparse
import dataclasses
from collections.abc import Collection, Mapping


class FlagHelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of the description and adds the default to each flag that has one.

    A flag that accepts dashes as well as underscores is shown with underscores.
    """

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default != [] and action.option_strings
        return super()._get_help_string(action) if has_default and action.nargs != 0 else action.help

    def _format_action_invocation(self, action: argparse.Action) -> str:
        spellings = list(action.option_strings)
        with_dashes = {f"--{name[2:].replace('_', '-')}" for name in spellings if "_" in name}
        action.option_strings = [name for name in spellings if name not in with_dashes]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = spellings


class ShortHelpAction(argparse.Action):
    """Prints the help text without some groups of flags, and exits."""

    def __init__(self, option_strings: list[str], dest: str, hidden_groups: Collection[str], help: str):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)
        self.hidden_groups = frozenset(hidden_groups)

    def __call__(self, parser, namespace, values, option_string=None):
        parser._action_groups = [group for group in parser._action_groups if group.title not in self.hidden_groups]
        parser.print_help()
        parser.exit()


def add_help_flags(parser: argparse.ArgumentParser, hidden_groups: Collection[str]) -> None:
    """Adds `--help`, which leaves out the groups with these titles, and `--help-all`. The parser has no help yet."""
    parser.add_argument("-h", "--help", action=ShortHelpAction, hidden_groups=hidden_groups, help="Show this help.")
    parser.add_argument("--help-all", action="help", help="Show all flags.")


def describe_negations(parser: argparse.ArgumentParser) -> None:
    """Gives each `--no_NAME` flag its own help: HfArgumentParser copies that of `--NAME`."""
    for action in parser._actions:
        if isinstance(action, argparse._StoreFalseAction):
            action.help = f"Set --{action.dest} to false."


def group_flags(parser: argparse.ArgumentParser, titles: Mapping[str, str]) -> None:
    """Moves flags from argparse's group "options" into groups, in the order of `titles`.

    Args:
        titles: destination of a flag -> title of its group.
    """
    groups = {title: parser.add_argument_group(title) for title in dict.fromkeys(titles.values())}
    options = parser._optionals
    actions: dict[str, list[argparse.Action]] = {}
    for action in options._group_actions:
        actions.setdefault(action.dest, []).append(action)
    for name, title in titles.items():
        for action in actions.get(name, []):
            action.metavar = None if action.choices else "VALUE"
            options._group_actions.remove(action)
            groups[title]._group_actions.append(action)


def group_dataclasses(parser: argparse.ArgumentParser, groups: Mapping[str, Collection[type]]) -> None:
    """Groups the flags of an HfArgumentParser by the dataclasses that declare them, and describes their negations.

    Args:
        groups: title of a group -> its dataclasses.
    """
    fields = {
        title: [field.name for kind in kinds for field in dataclasses.fields(kind)] for title, kinds in groups.items()
    }
    describe_negations(parser)
    group_flags(parser, {name: title for title, names in fields.items() for name in names})
