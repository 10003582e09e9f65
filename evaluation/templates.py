# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Prompt templates for zero-shot classification: a default list, files, and the lists of open_clip."""

from collections.abc import Sequence
from pathlib import Path

from modeling_mlip.hub.extras import require_modules

DEFAULT_TEMPLATES = (
    "{}",
    "a photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    "a picture of a {}.",
    "a drawing of a {}.",
    "an image of a {}.",
)
# Name -> the constant of open_clip.zero_shot_metadata.
OPEN_CLIP_TEMPLATES = {"openai": "OPENAI_IMAGENET_TEMPLATES", "simple": "SIMPLE_IMAGENET_TEMPLATES"}


def fill(template: str, name: str) -> str:
    """The prompt of a class: replaces `{}` by the name and keeps other braces."""
    return template.replace("{}", name)


def read_templates(value: str) -> tuple[str, ...]:
    """The templates that a value names.

    Args:
        value: a template with `{}`, a file with one template per line, "default", or a list of open_clip ("openai",
            "simple").

    Raises:
        ImportError: for a list of open_clip if open_clip is not installed.
        ValueError: for any other value without `{}`.
    """
    if "{}" in value:
        return (value,)
    if value == "default":
        return DEFAULT_TEMPLATES
    if value in OPEN_CLIP_TEMPLATES:
        require_modules(f"templates={value!r}", "openclip", "open_clip")
        from open_clip import zero_shot_metadata

        return tuple(template("{}") for template in getattr(zero_shot_metadata, OPEN_CLIP_TEMPLATES[value]))
    if Path(value).is_file():
        return check_templates(read_lines(value), value)
    raise ValueError(
        f"templates={value!r} has no {{}} for the class name and is not a file; give a template such as "
        f"'a photo of a {{}}.', a file with one template per line, or one of default, {', '.join(OPEN_CLIP_TEMPLATES)}."
    )


def check_templates(templates: Sequence[str], source: str = "templates") -> tuple[str, ...]:
    """Returns the templates if each has `{}`.

    Args:
        source: where they come from, for the error.

    Raises:
        ValueError: if a template has no `{}`, or there is no template.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(
                f"{source}: template {template!r} has no {{}} for the class name, as in 'a photo of a {{}}.'."
            )
    if not templates:
        raise ValueError(f"{source} holds no template; write one per line, such as 'a photo of a {{}}.'.")
    return tuple(templates)


def read_lines(path: str | Path) -> list[str]:
    """The non-empty lines of a UTF-8 text file, without surrounding white space.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # some editors write a byte order mark
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from None
    return [line.strip() for line in text.splitlines() if line.strip()]
