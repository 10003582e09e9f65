# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Bytes that a process sends in one training step, and the memory of the losses, for many processes.

    python benchmarks/exchange_cost.py

Nothing is sent and no large tensor is made. The bytes follow from the shapes; tests/training/test_distributed.py
compares them with what two and three processes send. The memory is that of the real code on tensors without data.
"""

import argparse
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from modeling_mlip.losses import PairColumns, PairEmbeddings, multi_level_loss
from modeling_mlip.training import distributed

RESULTS = Path(__file__).parent / "results" / "exchange_cost.json"
KEY_BYTES = 8
MIB = 2**20


class Shapes(NamedTuple):
    """Sizes of what the losses compare."""

    width: int = 512  # P
    text_tokens: int = 77  # L
    image_tokens: int = 98  # M, half of the patches of a ViT-B/16 at 224 pixels
    num_key_kinds: int = 2  # of captions and of images
    float_bytes: int = 4


class Sent(NamedTuple):
    """What one process sends in the forward and backward pass of a loss."""

    num_bytes: int
    num_exchanges: int  # one after the other


# Bytes by part of the objective. `rows` are the pairs of each process, `rank` is the process that sends. A gather among
# W processes counts as W - 1 times the padded rows of one process, and so does the sum of gradients in its backward
# pass: no algorithm sends less.


def keys_sent(rows: list[int], rank: int, shapes: Shapes) -> Sent:
    """Caption and image keys, which every loss needs to find positives."""
    return Sent((len(rows) - 1) * max(rows) * KEY_BYTES * shapes.num_key_kinds, shapes.num_key_kinds)


def info_nce_sent(rows: list[int], rank: int, shapes: Shapes, num_embeddings: int = 2) -> Sent:
    """Embeddings of images and captions, and their gradients; a third embedding with a frequency loss."""
    gathered = (len(rows) - 1) * max(rows) * shapes.width * shapes.float_bytes
    return Sent(2 * num_embeddings * gathered, 2 * num_embeddings)


def sigmoid_sent(rows: list[int], rank: int, shapes: Shapes) -> Sent:
    """Caption embeddings and keys in W - 1 moves, the same in the backward pass, and gradients in W moves.

    The spatial and the frequency loss share them.
    """
    passed_on = sum(rows) - rows[(rank - 1) % len(rows)]  # every chunk but the last one that arrives
    embeds, keys = shapes.width * shapes.float_bytes, shapes.num_key_kinds * KEY_BYTES
    num_exchanges = 2 * (len(rows) - 1) + len(rows)
    return Sent(2 * passed_on * (embeds + keys) + sum(rows) * embeds, num_exchanges)


def global_tokens_sent(rows: list[int], rank: int, shapes: Shapes) -> Sent:
    """Caption tokens, their gradients and mask, and the scores of own images and other captions in both passes."""
    gathered = (len(rows) - 1) * max(rows) * shapes.text_tokens
    tokens = gathered * (2 * shapes.width * shapes.float_bytes + 1)
    scores = 2 * rows[rank] * (sum(rows) - rows[rank]) * shapes.float_bytes
    return Sent(tokens + scores, 5)


def local_tokens_sent(rows: list[int], rank: int, shapes: Shapes) -> Sent:
    return Sent(0, 0)


@contextmanager
def count_sent() -> Iterator[Counter]:
    """Counts the bytes ("num_bytes") and calls ("num_exchanges") of torch.distributed's collectives in the context.

    Calls that exchange numbers of rows are left out: a few integers.
    """
    counts: Counter = Counter()

    def wrap(name: str, num_bytes: Callable[..., int]) -> mock._patch:
        original = getattr(dist, name)

        def counted(*args, **kwargs):
            counts.update(num_bytes=num_bytes(*args), num_exchanges=1)
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, counted)

    def of_all_to_all(received, sent, received_sizes, sent_sizes) -> int:
        return (sum(sent_sizes) - sent_sizes[dist.get_rank()]) * sent.element_size()

    def of_transfers(transfers) -> int:
        return sum(transfer.tensor.nbytes for transfer in transfers if transfer.op is dist.isend)

    gather_numbers = distributed.gather_numbers

    def gather_uncounted(*numbers, **kwargs):
        before = Counter(counts)
        result = gather_numbers(*numbers, **kwargs)
        counts.clear()
        counts.update(before)
        return result

    with (
        wrap("all_gather_into_tensor", lambda gathered, local: gathered.nbytes - local.nbytes),
        wrap("reduce_scatter_tensor", lambda local, whole: whole.nbytes - local.nbytes),
        wrap("all_to_all_single", of_all_to_all),
        wrap("batch_isend_irecv", of_transfers),
        mock.patch.object(distributed, "gather_numbers", gather_uncounted),
    ):
        yield counts


# Memory


def instance_losses_memory(rows: list[int], shapes: Shapes, is_sigmoid: bool, has_frequency: bool) -> int:
    """Largest number of bytes in memory at a time in the forward and backward pass of the instance-level losses, in the
    first process. Its own embeddings and those that it received are included."""
    R, C = rows[0], sum(rows)
    with FakeTensorMode():

        def embeds(count: int) -> torch.Tensor:
            return torch.empty(count, shapes.width).requires_grad_()

        def keys(count: int) -> list[torch.Tensor]:
            return [torch.empty(count, dtype=torch.int64) for _ in range(shapes.num_key_kinds)]

        scalars = [torch.empty(()).requires_grad_() for _ in range(4)]
        own = [embeds(R), embeds(R), *keys(R), *([embeds(R)] if has_frequency else [])]
        exchange = distributed.Exchange(R)
        exchange.rows = rows[:3]  # the memory of every further move is that of the second
        received = [None, None] if is_sigmoid else [embeds(C), embeds(C)]
        received += [*keys(C), embeds(C) if has_frequency and not is_sigmoid else None]
        columns = PairColumns(*received, sum_over_chunks=exchange.sum_over_chunks if is_sigmoid else None)
        tracker = MemTracker()
        tracker.track_external(*(tensor for tensor in (*own, *received, *scalars) if tensor is not None))
        with (
            tracker,
            mock.patch.object(distributed, "_pass_on", lambda tensors, *_: list(map(torch.empty_like, tensors))),
        ):
            losses = multi_level_loss(
                PairEmbeddings(*own),
                logit_scale=scalars[0],
                logit_bias=scalars[1] if is_sigmoid else None,
                frequency_logit_scale=scalars[2] if has_frequency else None,
                frequency_logit_bias=scalars[3] if is_sigmoid and has_frequency else None,
                frequency_loss_weight=1.0,
                columns=columns,
            )
            losses["loss"].backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"]


def global_tokens_memory(rows: list[int], shapes: Shapes) -> int:
    """A lower bound: the caption tokens of all processes, a copy sorted by length, the gradients of both, and the
    scores of both directions with their gradients."""
    tokens = sum(rows) * shapes.text_tokens * shapes.width * shapes.float_bytes
    return 4 * tokens + 4 * rows[0] * sum(rows) * shapes.float_bytes


def local_tokens_memory(rows: list[int], shapes: Shapes) -> int:
    """A lower bound: the tokens of the process and their gradients."""
    return 2 * rows[0] * (shapes.text_tokens + shapes.image_tokens) * shapes.width * shapes.float_bytes


def count_parts(num_pairs: int, num_processes: int, shapes: Shapes) -> list[dict[str, int | str]]:
    """A row for each part of the objective: `part`, `processes`, `sent_bytes`, `exchanges` and `peak_bytes`."""
    rows = [num_pairs // num_processes] * num_processes

    def row(part: str, peak_bytes: int, *sent: Sent) -> dict[str, int | str]:
        return {
            "part": part,
            "processes": num_processes,
            "sent_bytes": sum(each.num_bytes for each in sent),
            "exchanges": sum(each.num_exchanges for each in sent),
            "peak_bytes": peak_bytes,
        }

    def memory(is_sigmoid: bool, has_frequency: bool) -> int:
        return instance_losses_memory(rows, shapes, is_sigmoid, has_frequency)

    given = rows, 0, shapes
    keys = keys_sent(*given)
    return [
        row("spatial, InfoNCE", memory(False, False), keys, info_nce_sent(*given)),
        row("spatial and frequency, InfoNCE", memory(False, True), keys, info_nce_sent(*given, 3)),
        row("spatial, sigmoid", memory(True, False), keys, sigmoid_sent(*given)),
        row("spatial and frequency, sigmoid", memory(True, True), keys, sigmoid_sent(*given)),
        row("token, local or in groups", local_tokens_memory(rows, shapes), local_tokens_sent(*given)),
        row("token, global", global_tokens_memory(rows, shapes), global_tokens_sent(*given)),
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=32768, help="C, pairs of all processes.")
    parser.add_argument("--processes", type=int, nargs="+", default=[8, 64, 512], help="Each divides the pairs.")
    parser.add_argument("--output_file", type=Path, default=RESULTS, help="The JSON file to write.")
    flags = parser.parse_args(arguments)
    for number in flags.processes:
        if number < 2 or flags.pairs % number:
            parser.error(f"--processes {number}: choose 2 or more that divide --pairs {flags.pairs}.")
    results = [row for number in flags.processes for row in count_parts(flags.pairs, number, Shapes())]
    print("| part | processes | MiB sent per process | exchanges | peak MiB per process |")
    print("| --- | ---: | ---: | ---: | ---: |")
    parts = list(dict.fromkeys(row["part"] for row in results))
    for row in sorted(results, key=lambda row: parts.index(row["part"])):
        sent, peak = row["sent_bytes"] / MIB, row["peak_bytes"] / MIB
        print(f"| {row['part']} | {row['processes']} | {sent:,.0f} | {row['exchanges']:,} | {peak:,.0f} |")
    contents = {"pairs": flags.pairs, "shapes": Shapes()._asdict(), "torch": torch.__version__, "rows": results}
    flags.output_file.parent.mkdir(exist_ok=True)
    flags.output_file.write_text(json.dumps(contents, indent=2) + "\n")
    print(f"written to {flags.output_file}")


if __name__ == "__main__":
    main()
