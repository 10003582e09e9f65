# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The command `mlip`: runs a subcommand and prints its errors as one line.

Each subcommand is an entry point of the group `mlip.commands`.
"""

import atexit
import os
import sys
import tempfile
import threading
import traceback
from importlib.metadata import entry_points
from typing import NoReturn

from mlip_command import DEBUG_FLAG, ENTRY_POINT_GROUP, print_usage

from .errors import error_line, is_user_error, with_flags


def main(arguments: list[str] | None = None) -> int:
    """Runs `mlip [--debug] COMMAND ...`.

    An error that the user can act on is printed as one line. Any other error is a bug: its traceback goes to a file,
    whose path is printed. With `--debug`, errors are raised.

    Returns:
        The exit status: 0, 1 for an error, 2 for an unknown command, 130 for an interruption from the keyboard.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = arguments[:1] == [DEBUG_FLAG]
    arguments = arguments[1:] if debug else arguments
    commands = {entry.name: entry for entry in entry_points(group=ENTRY_POINT_GROUP)}
    if not arguments or arguments[0] not in commands:
        return print_usage(arguments)
    name = arguments[0]
    try:
        commands[name].load()(arguments[1:])
    except KeyboardInterrupt:
        print(f"mlip {name}: stopped from the keyboard.", file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            raise
        message = with_flags(error_line(error)) if is_user_error(error) else _describe_bug(error)
        # The line break ends the line of a progress bar.
        print(f"\nmlip {name}: error: {message}", file=sys.stderr)
        return 1
    return 0


def _describe_bug(error: Exception) -> str:
    """One line that names the error and the file with its traceback."""
    with tempfile.NamedTemporaryFile("w", prefix="mlip-", suffix=".log", delete=False, encoding="utf-8") as log:
        traceback.print_exception(error, file=log)
    message = " ".join(str(error).split())
    return f"unexpected {type(error).__name__}: {message}. Please report it with the traceback in {log.name}."


def run() -> NoReturn:
    """Runs `main` for the console script, and ends the process without Python's own teardown.

    During the teardown, a thread of Arrow that closes a file of a stream can abort the process after all work is done
    (apache/arrow#45214). This function does what Python does before the teardown, in the same order as multiprocessing
    ends a child process. It does not join threads one by one, because those of an idle executor never end.
    """
    status = main()
    threading._shutdown()  # type: ignore[attr-defined]  # CPython has it; the type stubs do not
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    run()
