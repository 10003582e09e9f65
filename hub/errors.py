# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Errors in one clear line: what the Hub refuses or a connection loses, and what libraries wrap."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HTTPError, StrictDataclassError


def error_line(error: BaseException) -> str:
    """What went wrong, without the layers that report it: a validator of a configuration wraps its own error."""
    while isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__
    message = str(error).strip() or type(error).__name__
    # Libraries write in paragraphs of what the machine, the network or the installation lacks.
    return " ".join(message.split()) if isinstance(error, (OSError, ImportError)) else message


@contextmanager
def hub_errors(
    what: str, again: str = "Run the same command again: what has arrived is not sent twice."
) -> Iterator[None]:
    """Turns what a connection raises into an OSError: `what` failed, why, and the next step."""
    try:
        yield
    except (HTTPError, RuntimeError) as error:  # huggingface_hub wraps what stops an upload in a RuntimeError
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        if not isinstance(cause, HTTPError):
            raise
        response = getattr(cause, "response", None)
        if response is not None and response.status_code in (401, 403):
            again = "Log in with 'hf auth login', with a token that may write there."
        raise OSError(f"{what}: {' '.join(str(cause).split())} {again}") from error
