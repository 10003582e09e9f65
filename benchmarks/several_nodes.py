# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Trains on two nodes, kills one of them, and compares how the run ends with how it ends undisturbed.

    sudo python benchmarks/several_nodes.py

A node is a network namespace of this machine (`ip netns`, which needs root) with an address of its own and one process
on the CPU. Both run `recipes/several_nodes.sh` with flags for a tiny model and streamed tar shards. All processes of a
node get SIGKILL after the first checkpoint. A killed node other than the head is started again while the other one
waits. If the head is killed, the other node ends by itself, and both are started again. The command is always the same.

Equal endings: the bytes of the weights, every tensor of the optimizer, the schedule, the random states and the
positions in the stream of both processes.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from kill_and_resume import digest, in_child

from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.data.shapes import shapes_dataset
from modeling_mlip.training.checkpoint import DATA_STATE

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "several_nodes.sh"
RESULTS = Path(__file__).parent / "results" / "several_nodes.json"
ADDRESSES = ("10.213.7.1", "10.213.7.2")  # of the nodes; the first is the head
STEPS, SAVE_STEPS = 12, 4
NUM_PAIRS, NUM_SHARDS, NUM_WORKERS = 46, 4, 2
LIMIT = 400  # seconds until a run that does not end is an error


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if an ending differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    record: dict[str, Any] = {
        "machine": f"{platform.processor() or platform.machine()}; torch {torch.__version__}, gloo",
        "run": f"2 nodes of 1 process with {NUM_WORKERS} workers, {STEPS} steps, a checkpoint every {SAVE_STEPS}",
        "rounds": [],
    }
    with tempfile.TemporaryDirectory() as scratch, two_namespaces() as namespaces:
        root = Path(scratch)
        in_child(lambda: write_tar_shards(root), root / "log.txt")
        nodes = Nodes(root, namespaces)
        start = time.perf_counter()
        nodes.run_undisturbed(root / "undisturbed")
        record["seconds undisturbed"] = round(time.perf_counter() - start, 1)
        expected = node_run_ending(root / "undisturbed")
        for name, run in (("second node", nodes.run_with_killed_node), ("head", nodes.run_with_killed_head)):
            start = time.perf_counter()
            events = run(root / name.replace(" ", "-"))
            ending = node_run_ending(root / name.replace(" ", "-"))
            different = sorted(key for key in expected if ending[key] != expected[key])
            entry = {"killed": name, **events, "identical": not different, "different": different}
            record["rounds"].append(entry | {"seconds": round(time.perf_counter() - start, 1)})
            print(json.dumps(record["rounds"][-1]), flush=True)
            flags.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return int(not all(entry["identical"] for entry in record["rounds"]))


def write_tar_shards(root: Path) -> None:
    """Webdataset shards of drawn pairs, and a tokenizer: none can be trained on a stream."""
    rows = shapes_dataset(NUM_PAIRS, 0)["train"].select_columns(["image", "caption"])
    train_tokenizer(rows["caption"][:], max_seq_length=16).save_pretrained(root / "tokenizer")
    for index in range(NUM_SHARDS):
        with tarfile.open(root / f"{index:05d}.tar", "w") as shard:
            for number, row in enumerate(rows.shard(NUM_SHARDS, index)):
                image = io.BytesIO()
                row["image"].convert("RGB").save(image, "JPEG")
                contents = {"jpg": image.getvalue(), "txt": row["caption"].encode()}
                for extension, content in contents.items():
                    entry = tarfile.TarInfo(f"{index}{number:04d}.{extension}")
                    entry.size = len(content)
                    shard.addfile(entry, io.BytesIO(content))


def node_flags(root: Path, output_dir: Path) -> list[str]:
    """Flags after the name of the recipe: they replace those of the recipe that a CPU has no time for."""
    model = "--config_name tiny --hidden_size 16 --num_attention_heads 2 --num_hidden_layers 2 --patch_size 32"
    steps = f"--max_steps {STEPS} --save_steps {SAVE_STEPS} --logging_steps 1 --warmup_steps 2 --attention_dropout 0.1"
    batch = f"--per_device_train_batch_size 4 --mini_batch_size 2 --dataloader_num_workers {NUM_WORKERS} --bf16 false"
    rest = "--use_cpu --report_to none --disable_tqdm true"
    files = f"--tokenizer_name {root}/tokenizer --output_dir {output_dir}"
    return f"{model} {steps} {batch} {rest} {files}".split()


@contextmanager
def two_namespaces() -> Iterator[tuple[str, str]]:
    """Names of two network namespaces, connected by a pair of virtual network cards.

    Raises:
        PermissionError: without the rights of root.
    """
    names = (f"mlip-{os.getpid()}-0", f"mlip-{os.getpid()}-1")
    try:
        for name in names:
            status = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
            if status.returncode:
                raise PermissionError(f"ip netns add {name}: {status.stderr.strip()}. Run this program as root.")
        call(f"ip link add node0 netns {names[0]} type veth peer name node1 netns {names[1]}")
        for index, name in enumerate(names):
            call(f"ip -n {name} addr add {ADDRESSES[index]}/24 dev node{index}")
            call(f"ip -n {name} link set node{index} up")
            call(f"ip -n {name} link set lo up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def call(command: str) -> str:
    return subprocess.run(command.split(), check=True, capture_output=True, text=True).stdout


class Nodes:
    """Two nodes that run the recipe.

    Args:
        root: folder of the shards and the logs.
        namespaces: names of the network namespaces.
    """

    def __init__(self, root: Path, namespaces: tuple[str, str]):
        self.root, self.namespaces = root, namespaces

    def start(self, index: int, output_dir: Path) -> subprocess.Popen:
        """Runs the recipe in node `index`."""
        environment = {
            **os.environ,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "SHARDS": str(self.root),
            "NODES": "2",
            "PROCESSES": "1",
            "HEAD": ADDRESSES[0],
            "ADDRESS": ADDRESSES[index],
            "GLOO_SOCKET_IFNAME": f"node{index}",
        }
        command = ["ip", "netns", "exec", self.namespaces[index], str(RECIPE), *node_flags(self.root, output_dir)]
        with open(self.log(index, output_dir), "a") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self.root)

    def log(self, index: int, output_dir: Path) -> Path:
        return self.root / f"{output_dir.name}-{index}.txt"

    def kill(self, index: int) -> int:
        """Kills all processes of a node at once; returns their number."""
        pids = [int(pid) for pid in call(f"ip netns pids {self.namespaces[index]}").split()]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        return len(pids)

    def wait(self, index: int, process: subprocess.Popen, output_dir: Path, statuses: tuple[int, ...] = (0,)) -> int:
        """The exit status of a node's command. Raises RuntimeError if it is another one than `statuses`."""
        try:
            status = process.wait(LIMIT)
        except subprocess.TimeoutExpired:
            self.kill(0), self.kill(1)
            status = None
        if status not in statuses:
            logs = [self.log(number, output_dir).read_text()[-6000:] for number in (0, 1)]
            raise RuntimeError(f"Node {index} ended with {status}:\n" + "\n".join(logs))
        return status

    def wait_for_checkpoint(self, output_dir: Path) -> None:
        end = time.monotonic() + LIMIT
        while not (output_dir / f"checkpoint-{SAVE_STEPS}").is_dir():
            if time.monotonic() > end:
                self.kill(0), self.kill(1)
                raise RuntimeError(f"No checkpoint:\n{self.log(0, output_dir).read_text()[-6000:]}")
            time.sleep(0.01)

    def run_undisturbed(self, output_dir: Path) -> None:
        processes = [self.start(index, output_dir) for index in (0, 1)]
        for index, process in enumerate(processes):
            self.wait(index, process, output_dir)

    def run_with_killed_node(self, output_dir: Path) -> dict[str, Any]:
        """Kills the second node after the first checkpoint and starts it again. Returns what happened."""
        head, second = (self.start(index, output_dir) for index in (0, 1))
        self.wait_for_checkpoint(output_dir)
        events = {"processes killed": self.kill(1), "checkpoints then": list_checkpoints(output_dir)}
        second.wait()
        again = self.start(1, output_dir)
        self.wait(0, head, output_dir)
        self.wait(1, again, output_dir)
        return events | {"the other node": "waited"}

    def run_with_killed_head(self, output_dir: Path) -> dict[str, Any]:
        """Kills the head after the first checkpoint, waits until the other node ends, and starts both again."""
        head, second = (self.start(index, output_dir) for index in (0, 1))
        self.wait_for_checkpoint(output_dir)
        events = {"processes killed": self.kill(0), "checkpoints then": list_checkpoints(output_dir)}
        head.wait()
        start = time.perf_counter()
        self.wait(1, second, output_dir, statuses=(1,))
        seconds = time.perf_counter() - start
        self.kill(1)  # what a worker may have left
        self.run_undisturbed(output_dir)
        return events | {"the other node": f"ended with status 1 after {seconds:.0f} s"}


def list_checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*"))


def node_run_ending(folder: Path) -> dict[str, Any]:
    """What two runs that end alike have in common."""
    last = folder / f"checkpoint-{STEPS}"
    ranks = range(len(ADDRESSES))
    return {
        "weights": hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        "optimizer": digest(torch.load(last / "optimizer.pt", weights_only=True)),
        "schedule": digest(torch.load(last / "scheduler.pt", weights_only=True)),
        "random states": [digest(torch.load(last / f"rng_state_{rank}.pth", weights_only=False)) for rank in ranks],
        "streams": [json.loads((last / DATA_STATE.format(rank)).read_text()) for rank in ranks],
    }


if __name__ == "__main__":
    sys.exit(main())
