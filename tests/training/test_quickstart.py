# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The notebook examples/quickstart.ipynb runs, and the examples of docs/extend.md run on the model that it saves."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTEBOOK, EXTEND = ROOT / "examples" / "quickstart.ipynb", ROOT / "docs" / "extend.md"


def test_the_notebook_and_the_examples_that_start_from_its_model_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    namespace: dict = {}
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    for cell in cells:
        assert cell["outputs"], "a cell without its output"
        exec(compile("".join(cell["source"]), NOTEBOOK.name, "exec"), namespace)
    printed = capsys.readouterr().out
    for text in ("merge ratio 0.0: 64 patch tokens", "merge ratio 0.5: 32 patch tokens", "recall@1"):
        assert text in printed
    assert namespace["loaded"].config.merge_ratio == 0.5
    assert (tmp_path / "quickstart" / "modeling_mlip.py").is_file()
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", EXTEND.read_text(), re.DOTALL)):
        exec(compile(code, f"{EXTEND.name}, example {number}", "exec"), {})
    printed = capsys.readouterr().out
    assert "'pair_cosine_cosine'" in printed or "'cosine'" in printed
    assert "'uniformity_loss'" in printed
