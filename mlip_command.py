# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The console script `mlip`: lists the commands, or runs one.

It is a module outside the package, so that the list appears at once: importing the package imports torch, which takes
seconds.
"""

import sys
from importlib.metadata import entry_points
from typing import NoReturn

ENTRY_POINT_GROUP = "mlip.commands"
DEBUG_FLAG = "--debug"
DESCRIPTIONS = {
    "train": "train or fine-tune on image-caption pairs",
    "evaluate": "retrieval, zero-shot classification, linear probe and few shots",
    "benchmark": "speed, FLOPs, memory and accuracy at each merge ratio",
    "interpolate": "weights between two models, by accuracy on new and old data",
    "convert": "CLIP, SigLIP and OpenCLIP checkpoints to MLIP, and back",
    "export": "both towers as ONNX files",
    "push": "verify a saved folder and upload it to the Hub",
    "visualize": "merged patches, importance and words as pictures",
    "embed": "embed a collection of images or captions",
    "search": "search an embedded collection by words or by an image",
    "app": "a local page to classify images and search a collection",
}


def list_commands() -> list[str]:
    """The names of the installed commands: those of `DESCRIPTIONS` in its order, then others."""
    names = {entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}
    return [name for name in DESCRIPTIONS if name in names] + sorted(names - set(DESCRIPTIONS))


def print_usage(arguments: list[str]) -> int:
    """Prints the list of commands, and an error if `arguments` name no command.

    Returns:
        The exit status: 0 for help that was asked for, else 2.
    """
    commands = list_commands()
    listing = "\n".join(f"  {name:<11} {DESCRIPTIONS.get(name, '')}".rstrip() for name in commands)
    print(
        f"usage: mlip [{DEBUG_FLAG}] COMMAND ...\n\ncommands:\n{listing}\n\n"
        f"'mlip COMMAND --help' describes a command. {DEBUG_FLAG} prints the traceback of an error."
    )
    is_help = arguments[:1] in (["-h"], ["--help"])
    if arguments and not is_help:
        print(
            f"mlip: error: there is no command {arguments[0]!r}; choose one of {', '.join(commands)}.", file=sys.stderr
        )
    return 0 if is_help else 2


def run() -> NoReturn:
    """Runs the command of the command line, and ends the process."""
    arguments = sys.argv[1:]
    name = next((argument for argument in arguments if argument != DEBUG_FLAG), None)
    if name not in list_commands():
        sys.exit(print_usage(arguments))
    from modeling_mlip.hub.cli import run as run_command

    run_command()
