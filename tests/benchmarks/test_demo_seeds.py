# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""benchmarks/demo_seeds.py: each seed runs once, and the summary is over seeds."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import demo_seeds  # noqa: E402


@pytest.fixture
def fake_demo(monkeypatch):
    """In place of the demo's process: MLIP tells 90 % plus the seed of the shapes."""
    seeds = []

    def run(command, **kwargs):
        folder, seed = Path(command[command.index("--output_dir") + 1]), int(command[command.index("--seed") + 1])
        if seed < 0:
            return SimpleNamespace(returncode=1, stderr="no room")
        seeds.append(seed)
        (folder / "now").mkdir()
        rows = [{"model": "MLIP", "merge ratio": "0.5", "shape accuracy": 90.0 + seed}]
        (folder / "now" / "results.json").write_text(json.dumps({"seed": seed, "rows": rows}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(demo_seeds.subprocess, "run", run)
    return seeds


def test_each_seed_runs_once_and_the_summary_is_over_seeds(fake_demo, tmp_path, capsys):
    flags = ["--result_file", str(tmp_path / "seeds.json"), "--seeds"]
    demo_seeds.main([*flags, "0", "2"])
    demo_seeds.main([*flags, "0", "2", "4"])
    assert fake_demo == [0, 2, 4]
    (row,) = demo_seeds.summarise(json.loads((tmp_path / "seeds.json").read_text())["runs"])
    assert (row["runs"], row["busy loops"], row["shape accuracy"]) == (3, 0, "92.0 ± 2.0")
    assert "92.0 ± 2.0" in capsys.readouterr().out


def test_runs_beside_busy_loops_are_reported_by_themselves(fake_demo, tmp_path):
    path = tmp_path / "seeds.json"
    demo_seeds.main(["--result_file", str(path), "--seeds", "0"])
    started = []
    with pytest.MonkeyPatch.context() as patch:
        popen = subprocess.Popen
        patch.setattr(demo_seeds.subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1])
        demo_seeds.main(["--result_file", str(path), "--seeds", "0", "--busy_loops", "1"])
    assert [loop.returncode for loop in started] == [-9]  # stopped with the run
    assert [row["busy loops"] for row in demo_seeds.summarise(json.loads(path.read_text())["runs"])] == [0, 1]


def test_a_demo_that_fails_is_reported(fake_demo, tmp_path):
    with pytest.raises(RuntimeError, match="seed -1 failed:\nno room"):
        demo_seeds.main(["--result_file", str(tmp_path / "seeds.json"), "--seeds", "-1"])


def test_a_negative_number_of_busy_loops_is_refused(fake_demo, capsys):
    with pytest.raises(SystemExit):
        demo_seeds.main(["--busy_loops", "-1"])
    assert "--busy_loops -1: choose 0 or more" in capsys.readouterr().err
