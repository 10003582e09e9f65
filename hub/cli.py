# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The command `mlip`: finds the subcommands that are installed, runs one, and turns its errors into one line.

A subcommand is an entry point of the group `mlip.commands`, so that each lives with the code that it calls.
"""

import atexit
import os
import sys
import threading
from importlib.metadata import entry_points
from typing import NoReturn

from huggingface_hub.errors import StrictDataclassError

from .errors import error_line

ENTRY_POINT_GROUP = "mlip.commands"


def main(arguments: list[str] | None = None) -> int:
    """Runs `mlip COMMAND ...`; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if not arguments or arguments[0] not in commands:
        asked_for_help = arguments[:1] in (["-h"], ["--help"])
        listing = ", ".join(sorted(commands))
        print(f"usage: mlip COMMAND ...\n\ncommands: {listing}\n'mlip COMMAND --help' describes one of them.")
        if arguments and not asked_for_help:
            print(f"mlip: error: there is no command {arguments[0]!r}; choose one of {listing}.", file=sys.stderr)
        return 0 if asked_for_help else 2
    name = arguments[0]
    try:
        commands[name].load()(arguments[1:])
    except (ValueError, OSError, ImportError, StrictDataclassError) as error:
        # On a line of its own: a progress bar may stand on the current one.
        print(f"\nmlip {name}: error: {error_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"mlip {name}: stopped from the keyboard.", file=sys.stderr)
        return 130
    return 0


def run() -> NoReturn:
    """The program `mlip`: `main`, what is registered to happen at exit, and the end, without Python's own teardown.

    While Python tears itself down, a thread of Arrow that lets go of a stream's file would abort the process after all
    its work was done (apache/arrow#45214). What Python does before its teardown is done here, in its order, as
    multiprocessing ends a child: joining threads one by one would wait forever for those of an idle executor.
    """
    status = main()
    threading._shutdown()  # type: ignore[attr-defined]  # of CPython; its stubs leave it out
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
