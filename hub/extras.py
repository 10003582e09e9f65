# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Optional dependencies: the modules that each extra of setup.cfg installs, and one error if a module is missing."""

import importlib.util

# Extra -> the modules without which the code that needs this extra cannot be imported.
EXTRAS = {
    "train": ("accelerate", "datasets", "evaluate", "matplotlib", "torchvision"),
    "evaluate": ("accelerate", "datasets", "evaluate", "matplotlib", "torchvision"),
    "openclip": ("torchvision",),
}


def install_hint(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'modeling-mlip[{extra}]'"


def require_modules(subject: str, extra: str, *modules: str) -> None:
    """Checks that modules are installed, without importing them.

    Args:
        subject: what needs them; begins the message.
        extra: the extra of setup.cfg that installs them.
        modules: their names; those of `EXTRAS` if not given.

    Raises:
        ImportError: if one is not installed.
    """
    missing = [name for name in modules or EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise ImportError(f"{subject} needs {', '.join(missing)}, which {verb} not installed: {install_hint(extra)}.")
