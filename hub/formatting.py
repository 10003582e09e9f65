# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Values and tables as text, for the terminal and for Markdown."""

from collections.abc import Sequence
from typing import Any

import numpy as np

# Names that an error message lists.
MAX_LISTED_NAMES = 5


def format_value(value: Any) -> str:
    """Two decimals for a float, two significant digits below 0.1, an empty string for `None`."""
    if value is None:
        return ""
    if isinstance(value, float):  # includes numpy's float64
        return f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:.2f}"
    return str(value)


def is_number(value: Any) -> bool:
    """Whether a table aligns the value to the right; `True` and `False` are words."""
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def format_table(rows: list[dict[str, Any]], columns: Sequence[str] | None = None, *, markdown: bool = False) -> str:
    """Aligned text: numbers to the right, everything else to the left.

    Args:
        columns: the keys to show, in order; all keys that occur, if not given. A row may lack some.
    """
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    cells = [list(columns)] + [[" ".join(format_value(row.get(key)).split()) for key in columns] for row in rows]
    if markdown:
        cells = [[cell.replace("|", r"\|") for cell in line] for line in cells]
    widths = [max(3, *(len(line[n]) for line in cells)) for n in range(len(columns))]
    numeric = [any(is_number(row.get(key)) for row in rows) for key in columns]

    rule = [
        "-" * (width - 1) + (":" if right and markdown else "-") for width, right in zip(widths, numeric, strict=True)
    ]
    aligned = [
        [c.rjust(width) if right else c.ljust(width) for c, width, right in zip(line, widths, numeric, strict=True)]
        for line in cells
    ]
    aligned.insert(1, rule)
    if markdown:
        return "\n".join("| " + " | ".join(line) + " |" for line in aligned)
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def format_names(names: list[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED_NAMES} more" if len(names) > MAX_LISTED_NAMES else ""
    return f"{', '.join(names[:MAX_LISTED_NAMES])}{more}"
