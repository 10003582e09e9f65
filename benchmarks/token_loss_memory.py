# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Peak memory of the token-level loss, forward and backward, beside what the plain form would need.

    python benchmarks/token_loss_memory.py
    python benchmarks/token_loss_memory.py --pairs 256 --compare

Each measurement runs in a process of its own. What is counted is the peak resident set (on a GPU: the allocator's
peak) less what was resident before the loss: the tokens that it is given.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch

from modeling_mlip.losses import token_loss
from modeling_mlip.token_similarity import MAX_BLOCK_ELEMENTS, token_scores

RESULTS = Path(__file__).parent / "results" / "token_loss_memory.json"


def current_bytes(device: str) -> int:
    return torch.cuda.memory_allocated() if device == "cuda" else psutil.Process().memory_info().rss


def peak_bytes(device: str) -> int:
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure_token_loss(flags: argparse.Namespace) -> dict[str, float]:
    """One forward and backward pass in this process."""
    torch.manual_seed(0)
    image_tokens = torch.randn(flags.pairs, flags.image_tokens, flags.width, device=flags.device)
    text_tokens = torch.randn(flags.pairs, flags.text_tokens, flags.width, device=flags.device)
    for tokens in (image_tokens, text_tokens):  # in place: the peak of before shall not hide the one of after
        tokens /= tokens.norm(dim=-1, keepdim=True)
    weights = torch.full((flags.pairs, flags.image_tokens), 1 / flags.image_tokens, device=flags.device)
    mask = torch.ones(flags.pairs, flags.text_tokens, dtype=torch.bool, device=flags.device)
    small = [x[:2].clone().requires_grad_() for x in (image_tokens, text_tokens)]  # what the first call allocates once
    sum(scores.sum() for scores in token_scores(small[0], weights[:2], small[1], mask[:2])).backward()
    image_tokens.requires_grad_()
    text_tokens.requires_grad_()

    before, start = current_bytes(flags.device), time.perf_counter()
    block = sys.maxsize if flags.plain else MAX_BLOCK_ELEMENTS
    scores = token_scores(image_tokens, weights, text_tokens, mask, max_block_elements=block)
    token_loss(*scores, torch.tensor(2.6592), torch.eye(flags.pairs, device=flags.device)).backward()
    if flags.device == "cuda":
        torch.cuda.synchronize()
    return {"extra_mib": (peak_bytes(flags.device) - before) / 2**20, "seconds": time.perf_counter() - start}


def measure_in_process(flags: argparse.Namespace, plain: bool) -> dict[str, float]:
    names = ("pairs", "image_tokens", "text_tokens", "width", "device")
    given = [text for name in names for text in (f"--{name}", str(getattr(flags, name)))]
    command = [sys.executable, __file__, *given, "--measure", *(["--plain"] if plain else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1024, help="B, images and captions.")
    parser.add_argument("--image_tokens", type=int, default=98, help="M: half of the patches of a ViT-B/16 at 224.")
    parser.add_argument("--text_tokens", type=int, default=77, help="L, all of them counted.")
    parser.add_argument("--width", type=int, default=512, help="P.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compare", action="store_true", help="Measure the plain form too; it must fit in memory.")
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args(arguments)
    if flags.measure:
        print(json.dumps(measure_token_loss(flags)))
        return

    chunked = measure_in_process(flags, plain=False)
    similarities = flags.pairs**2 * flags.image_tokens * flags.text_tokens * 4 / 2**20
    result = {
        **{name: getattr(flags, name) for name in ("pairs", "image_tokens", "text_tokens", "width", "device")},
        "chunked": chunked,
        "plain": measure_in_process(flags, plain=True) if flags.compare else None,
        "similarities_mib": similarities,
        "machine": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
    }
    print(f"{flags.pairs} pairs, {flags.image_tokens} image tokens, {flags.text_tokens} text tokens, float32")
    print(f"all similarities at once: {similarities:,.0f} MiB, before any gradient")
    print(f"chunked, extra peak:      {chunked['extra_mib']:,.0f} MiB, {chunked['seconds']:.1f} s")
    if result["plain"]:
        print(f"plain, extra peak:        {result['plain']['extra_mib']:,.0f} MiB, {result['plain']['seconds']:.1f} s")
    RESULTS.parent.mkdir(exist_ok=True)
    history = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    same = ("pairs", "image_tokens", "text_tokens", "width", "device")
    history = [entry for entry in history if any(entry[name] != result[name] for name in same)]
    RESULTS.write_text(json.dumps([*history, result], indent=2) + "\n")
    print(f"written to {RESULTS}")


if __name__ == "__main__":
    main()
