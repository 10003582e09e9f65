# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What the Hub refuses or a connection loses, as one clear error."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.errors import HTTPError


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
