# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""several_nodes.py runs the recipe with variables and flags that torchrun and `mlip train` accept."""

import json
import os
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from modeling_mlip.data.sources import load_pairs
from modeling_mlip.training.flags import parse_arguments

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
import several_nodes  # noqa: E402

FAKE = """#!{python}
import json, os, sys
names = ("GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE")
variables = {{name: os.environ[name] for name in names}}
print(json.dumps([sys.argv[1:], variables]))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    several_nodes.write_tar_shards(folder)
    return folder


def test_the_shards_hold_every_pair_once(shards):
    names = [name for path in sorted(shards.glob("*.tar")) for name in tarfile.open(path).getnames()]
    assert len(names) == len(set(names)) == 2 * several_nodes.NUM_PAIRS
    rows = load_pairs(train_file=f"{shards}/*.tar")["train"]
    assert rows.num_rows == several_nodes.NUM_PAIRS


def test_each_node_runs_the_recipe_with_its_own_address(shards, tmp_path, monkeypatch):
    """With a torchrun that prints how it was called, and without namespaces, which need root."""
    (tmp_path / "torchrun").write_text(FAKE.format(python=sys.executable))
    (tmp_path / "ip").write_text('#!/bin/sh\nshift 3\nexec "$@"\n')
    for name in ("torchrun", "ip"):
        (tmp_path / name).chmod(stat.S_IRWXU)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    nodes = several_nodes.Nodes(tmp_path, ("first", "second"))
    nodes.root = shards
    for index, address in enumerate(several_nodes.ADDRESSES):
        run = tmp_path / "run"
        assert nodes.start(index, run).wait() == 0
        call, variables = json.loads(nodes.log(index, run).read_text())
        assert variables["GLOO_SOCKET_IFNAME"] == f"node{index}" and variables["OMP_NUM_THREADS"] == "1"
        assert variables["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
        start = call.index("train")
        torchrun_flags = dict(zip(call[: start - 2 : 2], call[1 : start - 2 : 2], strict=True))
        assert torchrun_flags["--nnodes"] == "2" and torchrun_flags["--nproc_per_node"] == "1"
        assert torchrun_flags["--rdzv_endpoint"] == f"{several_nodes.ADDRESSES[0]}:29500"
        assert torchrun_flags["--rdzv_conf"] == f"is_host={1 - index}"
        assert torchrun_flags["--local_addr"] == address and int(torchrun_flags["--max_restarts"]) > 0
        model_args, data_args, training_args, _ = parse_arguments(call[start + 1 :])
        assert model_args.config_name == "tiny" and not training_args.bf16 and training_args.use_cpu
        assert data_args.streaming and data_args.train_file == f"{shards}/*.tar"
        assert training_args.max_steps == several_nodes.STEPS and training_args.output_dir == str(run)
    assert subprocess.run(["sh", "-n", str(several_nodes.RECIPE)]).returncode == 0
