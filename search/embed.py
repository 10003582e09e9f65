# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip embed`: embeds a collection of images, or its captions, into parquet shards.

    mlip embed runs/mine photos --output_dir embeddings
    mlip embed runs/mine 'shards/{00000..00041}.tar' --streaming --output_dir embeddings --merge_ratio 0.5
    mlip embed runs/mine pairs.csv --text --output_dir captions
    accelerate launch --num_processes 2 -m modeling_mlip.search.embed runs/mine photos --output_dir embeddings

Each row has the columns id (the file name of the image, or else the number of the row), caption if the collection has
captions, and embedding, normalised. The same command resumes a run that was stopped, with any number of processes.
embeddings.json says how the embeddings were made, and names the rows that could not be read.
"""

import argparse
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils.data import DataLoader
from transformers.utils import logging

from modeling_mlip.data.collators import tokenize
from modeling_mlip.data.skip_budget import SkipBudget
from modeling_mlip.evaluation.embedding import evaluating
from modeling_mlip.evaluation.encoders import DTYPES, Encoder, load_encoder, set_merging
from modeling_mlip.evaluation.evaluation_split import LoadingOptions
from modeling_mlip.hub.flag_help import FlagHelpFormatter

from .chunks import ChunkReader
from .collection import Collection, load_collection
from .embedding_folder import DTYPES_OF_EMBEDDINGS, EmbeddingFolder, ShardSummary
from .row_readers import CaptionReader, ImageReader, ReadBatch

SHARD_SIZE = 2048
# Keys of a configuration that do not change embeddings, or that embeddings.json holds beside the hash.
UNHASHED_KEYS = ("_name_or_path", "_commit_hash", "transformers_version", "architectures", "dtype", "merge_ratio")


@dataclass(frozen=True)
class EmbedOptions:
    """How a collection is embedded.

    Args:
        with_text: embed captions instead of images.
        dtype: type of the stored embeddings, "float16" or "float32".
        shard_size: rows of the collection per shard. A kill loses at most one unfinished shard per process.
        loading: how images are read.

    Raises:
        ValueError: for a value out of range.
    """

    with_text: bool = False
    dtype: str = "float16"
    shard_size: int = SHARD_SIZE
    loading: LoadingOptions = LoadingOptions()

    def __post_init__(self):
        if self.dtype not in DTYPES_OF_EMBEDDINGS:
            raise ValueError(f"dtype={self.dtype!r}: choose one of {', '.join(DTYPES_OF_EMBEDDINGS)}.")
        if self.shard_size < 1:
            raise ValueError(f"shard_size={self.shard_size}: choose 1 or more.")


def embed_collection(
    encoder: Encoder, collection: Collection, output_dir: str, options: EmbedOptions | None = None
) -> dict[str, Any]:
    """Embed a collection, or the rest of it if `output_dir` holds a part. All processes call it together.

    Args:
        encoder: on the device that computes; its merge ratio is that of the embeddings.

    Returns:
        the content of embeddings.json, and "rows_per_second" of this run, over all processes.

    Raises:
        FileExistsError, ValueError: if `output_dir` holds other files or a run with other settings.
        ValueError: if more rows are skipped than the budget allows, or there are no captions to embed.
    """
    options = options or EmbedOptions()
    if options.with_text and collection.caption_column is None:
        raise ValueError(f"{collection.source} has no caption column to embed; choose one with caption_column=NAME.")
    state = PartialState()
    folder = EmbeddingFolder(output_dir)
    # Step (1): what is left to embed. All processes list the shards before one of them writes.
    settings = describe_settings(encoder, collection, options)
    with state.main_process_first():
        is_finished = folder.begin(settings)
    if is_finished:
        return {**folder.read_metadata(), "rows_per_second": 0.0}
    state.wait_for_everyone()
    if state.is_main_process:
        folder.remove_unfinished_files()
    summaries = folder.read_summaries()
    state.wait_for_everyone()
    # Step (2): embed it
    budget = options.loading.new_budget(collection.rows)
    _count_in_budget(budget, summaries, state.is_main_process)
    start = time.perf_counter()
    num_rows = 0
    batches = _read_batches(encoder, collection, options, summaries, state)
    for embedded in embed_chunks(encoder, batches, settings["width"], DTYPES_OF_EMBEDDINGS[options.dtype], budget):
        num_rows += embedded.summary.num_rows
        captions = None if collection.caption_column is None else embedded.captions
        folder.write_shard(embedded.summary, embedded.ids, captions, embedded.embeddings)
    # Step (3): the results of all processes
    budget.share()
    budget.judge_whole()
    total = sum(gather_object([num_rows]))
    metadata = _finish(folder) if state.is_main_process else None
    state.wait_for_everyone()
    return {**(metadata or folder.read_metadata()), "rows_per_second": total / (time.perf_counter() - start)}


def describe_settings(encoder: Encoder, collection: Collection, options: EmbedOptions) -> dict[str, Any]:
    """The settings that embeddings.json holds; those of a resumed run must be the same."""
    config = getattr(encoder.model, "config", None)
    return {
        "model": os.path.abspath(encoder.name) if os.path.isdir(encoder.name) else encoder.name,
        "revision": getattr(config, "_commit_hash", None),
        "model_hash": hash_model(encoder.model),
        "model_dtype": str(next(encoder.model.parameters()).dtype).removeprefix("torch."),
        "merge_ratio": encoder.merge_ratio,
        "content": "captions" if options.with_text else "images",
        "source": collection.source,
        "root": collection.root,
        "split": collection.split,
        "image_column": collection.image_column,
        "caption_column": collection.caption_column,
        "num_rows": collection.num_rows,
        "num_parts": collection.num_parts,
        "width": embed_captions(encoder, ["a"]).shape[1],
        "dtype": options.dtype,
        "shard_size": options.shard_size,
    }


def hash_model(model: torch.nn.Module) -> str:
    """A hash of the weights and the configuration, without the merge ratio; equal for a model that was moved."""
    digest = hashlib.blake2b(digest_size=8)
    config = getattr(model, "config", None)
    if config is not None:
        digest.update(json.dumps(_hashed_keys(config.to_dict()), sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _hashed_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _hashed_keys(entry) for key, entry in value.items() if key not in UNHASHED_KEYS}
    return value


def _count_in_budget(budget: SkipBudget, summaries: list[ShardSummary], is_main_process: bool) -> None:
    """Count the rows of finished shards. The main process counts them, and `share` tells the others."""
    for summary in summaries if is_main_process else []:
        budget.add(summary.skipped, summary.num_rows)


def _read_batches(
    encoder: Encoder,
    collection: Collection,
    options: EmbedOptions,
    summaries: list[ShardSummary],
    state: PartialState,
) -> Iterator[ReadBatch]:
    """The batches that this process has to embed, behind a progress bar in the main process."""
    rows = ChunkReader(
        collection,
        options.shard_size,
        options.loading.batch_size,
        finished={summary.chunk for summary in summaries},
        last={summary.chunk.part: summary.chunk.number for summary in summaries if summary.ends_part},
        process=state.process_index,
        num_processes=state.num_processes,
    )
    reader = CaptionReader(encoder.tokenizer, encoder.context) if options.with_text else ImageReader(encoder.transform)
    # The sampler hands over whole batches of rows: this process reads them in order, the workers decode them.
    sampler: Any = rows  # torch types a sampler as one of row numbers
    batches: Any = DataLoader(reader, sampler=sampler, batch_size=None, num_workers=options.loading.num_workers)
    total = collection.num_rows
    bar = logging.tqdm(
        desc="Embedding" if state.num_processes == 1 else f"Embedding, process 0 of {state.num_processes}",
        unit=" rows" if options.with_text else " images",
        total=None if total is None else -(-total // state.num_processes),
        initial=sum(summary.num_rows for summary in summaries) // state.num_processes,
        disable=None if state.is_main_process else True,
    )
    with bar:
        for batch in batches:
            yield batch
            bar.update(batch.num_rows)


@dataclass
class EmbeddedChunk:
    """The embeddings of one chunk: its summary, n ids and captions, and `(n, D)` embeddings."""

    summary: ShardSummary
    ids: list[str]
    captions: list[str | None]
    embeddings: np.ndarray


def embed_chunks(
    encoder: Encoder, batches: Iterable[ReadBatch], width: int, dtype: type[np.floating], budget: SkipBudget
) -> Iterator[EmbeddedChunk]:
    """Embed batches, and yield each chunk when its last batch is embedded.

    Args:
        width: D, of an embedding.

    Raises:
        ValueError: if more rows are skipped than the budget allows.
    """
    ids: list[str] = []
    captions: list[str | None] = []
    skipped: list[str] = []
    embeddings: list[np.ndarray] = []
    num_rows = 0
    for batch in batches:
        budget.add(batch.skipped, batch.num_rows)
        ids += batch.ids
        captions += batch.captions
        skipped += batch.skipped
        num_rows += batch.num_rows
        embeddings += [embed_inputs(encoder, inputs).cpu().numpy().astype(dtype) for inputs in batch.inputs]
        if batch.ends_chunk:
            summary = ShardSummary(batch.chunk, num_rows, len(ids), skipped, batch.ends_part)
            joined = np.concatenate([np.empty((0, width), dtype), *embeddings])
            yield EmbeddedChunk(summary, ids, captions, joined)
            ids, captions, skipped, embeddings, num_rows = [], [], [], [], 0


def embed_inputs(encoder: Encoder, inputs: dict[str, Tensor]) -> Tensor:
    """Normalised embeddings, float32 `(B, D)`, of `pixel_values`, or of `input_ids` and `attention_mask`."""
    model = encoder.model
    with evaluating(model):
        inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        outputs = model.get_image_features(**inputs) if "pixel_values" in inputs else model.get_text_features(**inputs)
        return normalize(outputs.pooler_output.float(), dim=-1)


def embed_captions(encoder: Encoder, captions: list[str]) -> Tensor:
    """Normalised embeddings, float32 `(T, D)`, of T captions; longer ones than the context are shortened."""
    input_ids, attention_mask, _ = tokenize(encoder.tokenizer, captions, encoder.context)
    return embed_inputs(encoder, {"input_ids": input_ids, "attention_mask": attention_mask})


def _finish(folder: EmbeddingFolder) -> dict[str, Any]:
    """Write the results of all shards into embeddings.json; return its content."""
    summaries = folder.read_summaries()
    skipped = [entry for summary in summaries for entry in summary.skipped]
    metadata = {
        **folder.read_metadata(),
        "num_embeddings": sum(summary.num_embeddings for summary in summaries),
        "num_skipped": len(skipped),
        "skipped": skipped,
        "finished": True,
    }
    folder.write_metadata(metadata)
    return metadata


# The command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlip embed",
        description=__doc__,
        formatter_class=FlagHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="A folder or Hub id of an MLIP or CLIP model; or open_clip:NAME:TAG.")
    parser.add_argument(
        "source",
        help="A folder (of images, tables or tar shards), a file or pattern of files (csv, tsv, json, jsonl, parquet, "
        "tar), a Hub id, or 'shapes'.",
    )
    parser.add_argument("--output_dir", required=True, help="The folder for the embeddings.")
    parser.add_argument("--text", action="store_true", help="Embed the captions instead of the images.")
    parser.add_argument(
        "--merge_ratio", type=float, help="Share of patch tokens to merge away; the saved one if not given."
    )
    parser.add_argument("--dtype", default="float16", help="Type of the embeddings: float16 or float32.")
    parser.add_argument("--model_dtype", default="float32", help=f"Precision of the model: {', '.join(DTYPES)}.")
    parser.add_argument("--batch_size", type=int, default=128, help="Images per batch.")
    parser.add_argument("--shard_size", type=int, default=SHARD_SIZE, help="Rows of the source per shard.")
    parser.add_argument("--dataloader_num_workers", type=int, default=0, help="Processes that decode images.")
    parser.add_argument("--skip_budget", type=float, default=0.01, help="Share of rows that may be unreadable.")
    parser.add_argument("--split", help="The split to embed: train or validation; the first that exists if not given.")
    parser.add_argument("--streaming", action="store_true", help="Read the source as a stream.")
    parser.add_argument("--dataset_config_name", help="The configuration of a data set of the Hub.")
    parser.add_argument("--image_column", help="The column of images; found by its usual names if not given.")
    parser.add_argument("--caption_column", help="The column of captions; found by its usual names if not given.")
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Raises ValueError, OSError and ImportError in one line that says what to do."""
    flags = make_parser().parse_args(arguments)
    loading = LoadingOptions(flags.batch_size, flags.dataloader_num_workers, flags.skip_budget)
    options = EmbedOptions(flags.text, flags.dtype, flags.shard_size, loading)
    state = PartialState(cpu=not torch.cuda.is_available())
    names = ("split", "dataset_config_name", "image_column", "caption_column", "streaming")
    collection = load_collection(flags.source, **{name: getattr(flags, name) for name in names})
    encoder = load_encoder(flags.model, flags.model_dtype)
    set_merging(encoder, flags.merge_ratio)
    encoder.model.to(state.device)
    result = embed_collection(encoder, collection, flags.output_dir, options)
    if state.is_main_process:
        print(describe_result(flags.output_dir, result))
    state.destroy_process_group()


def describe_result(output_dir: str, result: dict[str, Any]) -> str:
    """The lines that the command prints: what was embedded, and the first rows that were skipped."""
    speed = f", {result['rows_per_second']:.1f} rows/s" if result["rows_per_second"] else " (finished before)"
    lines = [
        f"{output_dir}: {result['num_embeddings']} {result['content']} at merge ratio {result['merge_ratio']:g}, "
        f"{result['num_skipped']} rows skipped{speed}"
    ]
    lines += [f"  skipped {entry}" for entry in result["skipped"][:5]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
