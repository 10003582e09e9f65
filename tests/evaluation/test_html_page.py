# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Pages are one file, and every text in them is escaped."""

import configparser
import re
from pathlib import Path

from PIL import Image

from modeling_mlip.evaluation import html_page
from modeling_mlip.evaluation.html_page import Section, write_page


def test_a_page_is_one_file_and_escapes_every_text(tmp_path):
    picture = tmp_path / "picture.png"
    Image.new("RGB", (4, 4)).save(picture)
    sections = [
        Section("A & B", rows=[{"class": "<b>", "hits": 71.238}, {"<i>": None}]),
        Section('"It"', picture=picture, text="a < b"),
        Section("C", missing="No <c>."),
    ]
    path = write_page(tmp_path / "report.html", "Demo <1>", sections)
    content = picture.read_bytes()
    picture.unlink()
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report.html"
    for expected in (
        "<title>Demo &lt;1&gt;</title>",
        "<h2>A &amp; B</h2>",
        "<th>class</th><th>hits</th><th>&lt;i&gt;</th>",
        "<td>&lt;b&gt;</td><td class=number>71.24</td><td></td>",
        'alt="&#34;It&#34;"',
        "<figcaption>a &lt; b</figcaption>",
        "Left out. No &lt;c&gt;.",
    ):
        assert expected in page, expected
    [data] = re.findall(r'src="([^"]+)"', page)
    assert data == html_page.data_uri_of(content, "image/png")
    assert "{{" not in page and "{%" not in page


def test_the_template_is_installed_with_the_package():
    config = configparser.ConfigParser()
    config.read(Path(__file__).parents[2] / "setup.cfg")
    files = config["options.package_data"]["modeling_mlip.evaluation"].split()
    assert html_page.TEMPLATE in files and (Path(html_page.__file__).parent / html_page.TEMPLATE).is_file()
