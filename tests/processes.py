# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Forks, for tests that need a process of their own: importing torch and transformers takes seconds.

`CleanProcess` can import everything that is installed here except this package.
"""

import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def run_in_fork(work: Callable[[], int], log: Path) -> int:
    """Runs `work` in a fork of this process, with its output in `log`; returns the status that it returns, or 1."""
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    status = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        torch.set_num_threads(1)  # threads do not survive a fork
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


# Reads a job from each line, and answers with the exit status of its fork.
SERVER = """
import importlib.util, json, os, sys, traceback
assert importlib.util.find_spec("modeling_mlip") is None
import torch, transformers
from huggingface_hub import constants
from transformers import AutoModel, AutoProcessor, CLIPImageProcessor, CLIPModel, CLIPProcessor
torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    if pid := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
        continue
    status = 1
    try:
        log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(job["cwd"])
        sys.argv = ["-c", *job["arguments"]]
        constants.HF_HUB_OFFLINE = not job["online"]
        exec(job["code"], {"__name__": "__main__"})
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""


class CleanProcess:
    """A process without this package, whose forks run code.

    Args:
        folder: for the cache of transformers, and for links to the packages that it can import.
        environment: variables of the process.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.cache = folder, folder / "cache"
        site = folder / "site"
        site.mkdir()
        for packages in [Path(path) for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]:
            for path in packages.iterdir():
                if "modeling_mlip" not in path.name and not (site / path.name).exists():
                    (site / path.name).symlink_to(path)
        variables = {**os.environ, **environment, "HF_HOME": str(self.cache), "PYTHONPATH": str(site)}
        command = [sys.executable, "-S", "-P", "-c", SERVER]
        self._process = subprocess.Popen(
            command, cwd=folder, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, code: str, arguments: list[str], cwd: Path, online: bool = False) -> str:
        """What the code prints, errors included. It starts with an empty cache.

        Args:
            arguments: `sys.argv[1:]` of the code.
            online: whether the code may ask the Hub.
        """
        shutil.rmtree(self.cache, ignore_errors=True)
        log = self.folder / "log.txt"
        job = {"code": code, "arguments": arguments, "cwd": str(cwd), "online": online, "log": str(log)}
        print(json.dumps(job), file=self._process.stdin, flush=True)
        status = self._process.stdout.readline()
        printed = log.read_text()
        assert status == "0\n", printed
        return printed

    def close(self) -> None:
        self._process.communicate()


@contextmanager
def running_clean_process(folder: Path, environment: dict[str, str]) -> Iterator[CleanProcess]:
    process = CleanProcess(folder, environment)
    try:
        yield process
    finally:
        process.close()
