# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""HTML pages of pictures and tables: the report of the demo, and the pages of `mlip visualize`.

A page is one file that needs no other file and no network. Its template is page.html.jinja.
"""

import base64
import mimetypes
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader

from modeling_mlip.hub.atomic_files import write_atomically
from modeling_mlip.hub.formatting import format_value, is_number

TEMPLATE = "page.html.jinja"


@dataclass(frozen=True)
class Section:
    """A part of a page: a picture with its caption, a table, or both.

    Args:
        title: heading.
        picture: image file, which becomes part of the page.
        text: caption of the picture.
        rows: rows of the table; a row may lack some keys.
        missing: why the section is empty, as a sentence.
    """

    title: str
    picture: Path | None = None
    text: str = ""
    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: str = ""

    @property
    def columns(self) -> list[str]:
        """The keys of the rows, in the order in which they occur."""
        return list(dict.fromkeys(key for row in self.rows for key in row))


def write_page(path: str | Path, title: str, sections: Sequence[Section]) -> Path:
    """Writes a page. All texts are escaped.

    Returns:
        the path.

    Raises:
        OSError: if a picture cannot be read or the page cannot be written.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"data_uri": data_uri, "cell": format_value}
    environment.tests["table_number"] = is_number
    page = environment.get_template(TEMPLATE).render(title=title, sections=sections)
    write_atomically(path, page + "\n")
    return Path(path)


def data_uri(picture: str | Path) -> str:
    """The content of an image file as a data URI."""
    return data_uri_of(Path(picture).read_bytes(), mimetypes.guess_type(picture)[0] or "image/png")


def data_uri_of(content: bytes, media_type: str) -> str:
    """Bytes as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"
