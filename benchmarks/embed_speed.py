# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Speed of `mlip embed` against a plain loop of transformers' CLIP, and runs of it that are killed and resumed.

    OMP_NUM_THREADS=1 python benchmarks/embed_speed.py

Speed: a CLIP of the size of ViT-S/16 with random weights embeds drawn images, in a loop over files, processor and model
as its documentation shows it; and `mlip embed` embeds the same files with the same weights as an MLIP model, at merge
ratio 0 and 0.5. All take turns, batch by batch in random order, and a ratio is taken within a batch; the median and the
quartiles are shown. Seconds are those of the processor that this process gets, so that other programs count less. The
ratio of FLOPs is that of the image tower.

Kills: `mlip embed` is killed with SIGKILL at a random one of the moments that an undisturbed run goes through: before a
batch, before a file is renamed to its final name, or after that. Then the same command runs to its end. A complete
output has the same shards as the undisturbed run, byte by byte, and each id once.
"""

import argparse
import functools
import json
import os
import platform
import random
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.data.shapes import shapes_dataset
from modeling_mlip.data.skip_budget import SkipBudget
from modeling_mlip.evaluation.cost import gflops_of
from modeling_mlip.evaluation.encoders import Encoder, make_encoder
from modeling_mlip.evaluation.evaluation_split import LoadingOptions
from modeling_mlip.hub.loading import CLIP_ONLY
from modeling_mlip.search import embed
from modeling_mlip.search.chunks import ChunkReader
from modeling_mlip.search.collection import load_collection
from modeling_mlip.search.embedding_folder import EmbeddingFolder
from modeling_mlip.search.row_readers import ImageReader

RESULTS = Path(__file__).parent / "results" / "embed_speed.json"
RATIOS = (0.0, 0.5)
NUM_KILL_IMAGES, KILL_BATCH, KILL_SHARD = 26, 4, 8


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden_size", type=int, default=384)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    torch.set_num_threads(1)  # threads do not survive the fork of a run that is killed
    record: dict[str, Any] = {"machine": f"{platform.machine()}, 1 thread; torch {torch.__version__}"}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        record["kills"] = kill_and_embed(root, flags.kills, flags.seed)
        print(json.dumps(record["kills"], indent=2), flush=True)
        write_drawn_files(root / "images", flags.images)
        record["speed"] = measure_embedding(
            root / "images", flags.batch_size, flags.rounds, flags.hidden_size, flags.layers
        )
        print(json.dumps(record["speed"], indent=2))
    flags.output.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def write_drawn_files(folder: Path, number: int, image_size: int = 224) -> None:
    """Drawn images as files."""
    folder.mkdir()
    for row, drawn in enumerate(shapes_dataset(number, 0, image_size)["train"]):
        drawn["image"].save(folder / f"{row:05}.png")


def make_encoders(hidden_size: int, layers: int, image_size: int = 224) -> tuple[CLIPModel, CLIPProcessor, Encoder]:
    """A CLIP with random weights, its processor, and the MLIP model with the same weights."""
    tokenizer = train_tokenizer(["a red circle", "a blue star"] * 2, max_seq_length=16)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    heads = max(hidden_size // 64, 1)
    size = {"hidden_size": hidden_size, "intermediate_size": 4 * hidden_size, "num_attention_heads": heads}
    config = CLIPConfig(
        vision_config={**size, "num_hidden_layers": layers, "image_size": image_size, "patch_size": 16},
        text_config={**size, **ids, "num_hidden_layers": 1, "vocab_size": len(tokenizer)},
        projection_dim=hidden_size,
    )
    torch.manual_seed(0)
    clip = CLIPModel(config).eval()
    model = MLIPModel(MLIPConfig.from_clip_config(config, **CLIP_ONLY)).eval()
    model.load_state_dict(clip.state_dict())
    crop = {"height": image_size, "width": image_size}
    image_processor = CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=crop)
    processor = CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
    return clip, processor, make_encoder("random", model, processor)


# Speed


def measure_embedding(images: Path, batch_size: int, rounds: int, hidden_size: int, layers: int) -> dict[str, Any]:
    """Images per second of the plain loop and of `mlip embed` at each ratio, and their ratios."""
    files = sorted(images.iterdir())
    clip, processor, encoder = make_encoders(hidden_size, layers)
    seconds: dict[str, list[float]] = {"plain": [], **{str(ratio): [] for ratio in RATIOS}}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            loops = {name: embed_in_steps(encoder, images, batch_size, Path(folder, name)) for name in seconds}
            for step in range(-(-len(files) // batch_size)):
                batch = files[step * batch_size : (step + 1) * batch_size]
                for name in sorted(seconds, key=lambda _: random.random()):
                    if name == "plain":
                        work: Callable[[], Any] = functools.partial(embed_plainly, clip, processor, batch)
                    else:
                        encoder.model.set_merge_ratio(float(name))
                        work = functools.partial(next, loops[name])
                    seconds[name].append(cpu_seconds_of(work))
    ratios = {
        str(ratio): [a / b for a, b in zip(seconds["plain"], seconds[str(ratio)], strict=True)] for ratio in RATIOS
    }
    gflops = {}
    for ratio in RATIOS:
        encoder.model.set_merge_ratio(ratio)
        gflops[str(ratio)] = gflops_of(encoder, torch.zeros(1, 3, 224, 224))
    return {
        "images": len(files),
        "batch_size": batch_size,
        "hidden_size": hidden_size,
        "layers": layers,
        "batches": len(seconds["plain"]),
        "images_per_second": {name: round(len(files) * rounds / sum(values), 2) for name, values in seconds.items()},
        "speed_over_plain_loop": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "quartiles": {
            name: [round(value, 3) for value in np.quantile(values, [0.25, 0.75])] for name, values in ratios.items()
        },
        "flop_ratio": {name: round(gflops["0.0"] / value, 3) for name, value in gflops.items()},
    }


def embed_in_steps(encoder: Encoder, images: Path, batch_size: int, output: Path) -> Iterator[None]:
    """What `embed_collection` does with the rows, one batch and one shard for each step."""
    output.mkdir()
    folder, reader = EmbeddingFolder(output), ImageReader(encoder.transform)
    rows = ChunkReader(load_collection(str(images)), batch_size, batch_size)
    width = encoder.model.config.projection_dim
    for embedded in embed.embed_chunks(encoder, map(reader.__getitem__, rows), width, np.float16, SkipBudget(0, None)):
        folder.write_shard(embedded.summary, embedded.ids, None, embedded.embeddings)
        yield


def embed_plainly(clip: CLIPModel, processor: CLIPProcessor, files: list[Path]) -> torch.Tensor:
    """One batch as a user of transformers would embed it; normalised embeddings `(B, D)`."""
    images = [Image.open(file).convert("RGB") for file in files]
    with torch.no_grad():
        features = clip.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    return normalize(features, dim=-1)


def cpu_seconds_of(work: Callable[[], Any]) -> float:
    """Seconds of the processor that a function takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


# Kills


def kill_and_embed(root: Path, kills: int, seed: int) -> dict[str, Any]:
    """Kills runs and resumes them; returns the moments and the number of complete outputs."""
    _, _, encoder = make_encoders(hidden_size=64, layers=1, image_size=32)
    source = root / "kill_images"
    write_drawn_files(source, NUM_KILL_IMAGES, image_size=64)
    run_embed(encoder, source, root / "undisturbed", streaming=False, listing=root / "moments")
    moments = (root / "moments").read_text().splitlines()
    expected = [path.read_bytes() for path in EmbeddingFolder(root / "undisturbed").list_shards()]
    rng = random.Random(seed)
    rounds = []
    for number in range(kills):
        output, kill_at, streaming = root / f"killed{number}", rng.randrange(len(moments)), number % 2 == 1
        status = run_embed(encoder, source, output, streaming, kill_at=kill_at)
        if status != -signal.SIGKILL:
            raise RuntimeError(f"The run ended with {status} before the moment {moments[kill_at]}.")
        left = len(EmbeddingFolder(output).list_shards())
        run_embed(encoder, source, output, streaming)
        shards = EmbeddingFolder(output).list_shards()
        ids = [row for path in shards for row in pq.read_table(path, columns=["id"])["id"].to_pylist()]
        rounds.append(
            {
                "killed": moments[kill_at],
                "streamed": streaming,
                "shards_before": left,
                "identical": [path.read_bytes() for path in shards] == expected,
                "double_rows": len(ids) - len(set(ids)),
                "lost_rows": NUM_KILL_IMAGES - len(set(ids)),
            }
        )
    complete = [entry for entry in rounds if entry["identical"] and not entry["double_rows"] + entry["lost_rows"]]
    return {"kills": kills, "complete_outputs": len(complete), "rounds": rounds}


def run_embed(
    encoder: Encoder,
    source: Path,
    output: Path,
    streaming: bool,
    kill_at: int | None = None,
    listing: Path | None = None,
) -> int:
    """Embeds in a fork of this process, which dies at the moment of number `kill_at`; returns its status.

    Args:
        listing: a file for the names of all moments.
    """
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            count_moments(kill_at, listing)
            loading = LoadingOptions(KILL_BATCH)
            options = embed.EmbedOptions(shard_size=KILL_SHARD, loading=loading)
            embed.embed_collection(encoder, load_collection(str(source), streaming=streaming), str(output), options)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status not in (0, -signal.SIGKILL):
        raise RuntimeError(f"A run ended with status {status}.")
    return status


def count_moments(kill_at: int | None, listing: Path | None) -> None:
    """Makes this process count the moments that it goes through, and die at one of them."""
    count = 0

    def pass_moment(name: str) -> None:
        nonlocal count
        if listing is not None:
            with open(listing, "a") as file:
                print(name, file=file)
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    embed_inputs, replace = embed.embed_inputs, os.replace

    def embed_and_count(*args: Any) -> Any:
        pass_moment("before a batch")
        return embed_inputs(*args)

    def replace_and_count(temporary: Any, target: Any) -> None:
        pass_moment(f"before {Path(target).name} has its name")
        replace(temporary, target)
        pass_moment(f"after {Path(target).name} has its name")

    embed.embed_inputs, os.replace = embed_and_count, replace_and_count


if __name__ == "__main__":
    main()
