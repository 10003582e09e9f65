# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

import base64
import html
import mimetypes
from pathlib import Path
from typing import Any

from modeling_mlip.hub.formatting import format_value, is_number

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin-bottom: 1.5rem; }
th, td { padding: 0.25rem 0.9rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
"""


def write_report(
    folder: str | Path,
    title: str,
    tables: list[tuple[str, list[dict[str, Any]]]],
    pictures: list[tuple[str, str | Path]],
) -> Path:
    """Writes report.html: one file with everything in it, pictures too.

    Args:
        tables: heading and rows of each; a row may lack some keys.
        pictures: caption and file of each.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, rows in tables:
        body.append(f"<h2>{html.escape(heading)}</h2>\n{html_table(rows)}")
    for caption, picture in pictures:
        kind = mimetypes.guess_type(picture)[0] or "image/png"
        data = base64.b64encode(Path(picture).read_bytes()).decode()
        alt = html.escape(caption)
        body.append(f'<h2>{alt}</h2>\n<img alt="{alt}" src="data:{kind};base64,{data}">')
    path = Path(folder) / "report.html"
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return path


def html_table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(key)}</th>" for key in columns)
    lines = []
    for row in rows:
        values = [row.get(key) for key in columns]
        lines.append(
            "".join(f"<td{' class=number' * is_number(v)}>{html.escape(format_value(v))}</td>" for v in values)
        )
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"
