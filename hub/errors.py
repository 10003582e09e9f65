# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Error messages for users: which errors a user can act on, and how each becomes one line."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HTTPError, StrictDataclassError
from safetensors import SafetensorError

USER_ERRORS = (ValueError, OSError, ImportError, MemoryError, HTTPError, SafetensorError, StrictDataclassError)
# transformers raises a RuntimeError if the package of a `report_to` value is missing, torch if GPU memory is exhausted.
USER_RUNTIME_ERRORS = ("to be installed", "not installed", "out of memory", "No CUDA GPUs", "no NVIDIA driver")


def is_user_error(error: BaseException) -> bool:
    """Whether the error comes from a value, a file, the network or the installation, and not from a bug in the code."""
    if isinstance(error, RuntimeError):
        return any(words in str(error) for words in USER_RUNTIME_ERRORS)
    return isinstance(error, USER_ERRORS)


def error_line(error: BaseException) -> str:
    """The message of an error. The error of a configuration's validator replaces the one that wraps it."""
    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    message = str(error).strip() or type(error).__name__
    # Messages of libraries about files, the network or packages span several lines.
    return " ".join(message.split()) if isinstance(error, (OSError, ImportError, RuntimeError)) else message


def with_flags(message: str) -> str:
    """The message of a library function for the command line: the parameters that it asks for become flags.

    `overwrite=True` becomes `--overwrite`, and `split=NAME` becomes `--split NAME`.
    """
    message = re.sub(r"(?<![\w.-])([a-z]\w*)=True\b", r"--\1", message)
    return re.sub(r"(?<![\w.-])([a-z]\w*)=([A-Z]+)\b", r"--\1 \2", message)


@contextmanager
def hub_errors(
    subject: str, next_step: str = "Run the same command again: files that have arrived are not sent twice."
) -> Iterator[None]:
    """Turns errors of the connection to the Hub into an OSError.

    Args:
        subject: what failed, for example the repository; begins the message.
        next_step: ends the message. If the Hub denies access, the message says how to log in instead.

    Raises:
        OSError: if the Hub refuses a request or does not answer.
    """
    try:
        yield
    except (HTTPError, RuntimeError) as error:  # huggingface_hub wraps some HTTP errors of uploads in a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, HTTPError):
            raise
        response = getattr(cause, "response", None)
        if response is not None and response.status_code in (401, 403):
            next_step = "Log in with 'hf auth login', with a token that may write there."
        raise OSError(f"{subject}: {' '.join(str(cause).split())} {next_step}") from error
