# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Compares libraries for nearest neighbours: faiss, usearch and lance on a million random vectors.

    pip install faiss-cpu usearch pylance
    python benchmarks/search_index.py

Vectors are normalised and drawn in blocks, so that no library holds them twice. Each library runs in its own process
with one thread. The result states the seconds to build and save the index, the seconds to load it, the milliseconds for
one query (the median of `--queries`), recall@10 against exact search in float32, the size on disk, and the peak memory
of the process that builds and of the process that searches. Searching is fast only for indexes that approximate; these
lose neighbours. Random vectors have no clusters, so the recall of an approximate index is lower here than on embeddings
of images.

usearch builds a graph row by row, which takes too long for a million rows here: `--graph_rows` limits it, and the
result states the number of rows.
"""

import argparse
import functools
import importlib.metadata
import json
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results" / "search_index.json"
BLOCK = 20_000
TOP_K = 10


def draw_vectors(rows: int, width: int) -> Iterator[np.ndarray]:
    """Blocks of normalised random vectors, float32 `(<= BLOCK, width)`; the same in each call."""
    for number, start in enumerate(range(0, rows, BLOCK)):
        shape = (min(BLOCK, rows - start), width)
        vectors = np.random.default_rng(number).standard_normal(shape, dtype=np.float32)
        yield vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def draw_queries(queries: int, width: int) -> np.ndarray:
    """Normalised random queries, float32 `(queries, width)`, other vectors than those of the index."""
    vectors = np.random.default_rng(10**6).standard_normal((queries, width), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@functools.cache
def exact_neighbours(rows: int, width: int, queries: int) -> np.ndarray:
    """The rows with the largest products, best first, `(queries, TOP_K)`."""
    wanted = draw_queries(queries, width)
    best = np.full((queries, 0), 0.0, dtype=np.float32)
    places = np.zeros((queries, 0), dtype=np.int64)
    for number, block in enumerate(draw_vectors(rows, width)):
        best = np.concatenate([best, wanted @ block.T], axis=1)
        new = np.broadcast_to(number * BLOCK + np.arange(len(block)), (queries, len(block)))
        places = np.concatenate([places, new], axis=1)
        order = np.argsort(-best, axis=1)[:, :TOP_K]
        best, places = np.take_along_axis(best, order, axis=1), np.take_along_axis(places, order, axis=1)
    return places


# Libraries: a function that builds and saves, and one that loads and returns a function from a query to rows


def build_faiss(path: Path, rows: int, width: int, factory: str) -> None:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.index_factory(width, factory, faiss.METRIC_INNER_PRODUCT)
    index.train(np.concatenate(list(draw_vectors(min(rows, 2 * BLOCK), width))))
    for block in draw_vectors(rows, width):
        index.add(block)
    faiss.write_index(index, str(path))


def load_faiss(path: Path, probes: int | None = None) -> Callable[[np.ndarray], np.ndarray]:
    import faiss

    faiss.omp_set_num_threads(1)
    index = faiss.read_index(str(path))
    if probes is not None:
        index.nprobe = probes
    return lambda query: index.search(query[None], TOP_K)[1][0]


def build_usearch(path: Path, rows: int, width: int) -> None:
    from usearch.index import Index

    index = Index(ndim=width, metric="ip", dtype="f16")
    for number, block in enumerate(draw_vectors(rows, width)):
        index.add(number * BLOCK + np.arange(len(block)), block, threads=1)
    index.save(str(path))


def load_usearch(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    from usearch.index import Index

    index = Index.restore(str(path))
    return lambda query: index.search(query, TOP_K, threads=1).keys


def build_lance(path: Path, rows: int, width: int) -> None:
    import lance
    import pyarrow as pa

    schema = pa.schema([pa.field("row", pa.int64()), pa.field("vector", pa.list_(pa.float16(), width))])

    def batches() -> Iterator[pa.RecordBatch]:
        for number, block in enumerate(draw_vectors(rows, width)):
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(block.astype(np.float16).ravel()), width)
            yield pa.record_batch([pa.array(number * BLOCK + np.arange(len(block))), vectors], schema=schema)

    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), str(path))


def load_lance(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    import lance

    stored = lance.dataset(str(path))

    def search(query: np.ndarray) -> np.ndarray:
        nearest = {"column": "vector", "q": query.astype(np.float16), "k": TOP_K, "metric": "dot"}
        return stored.to_table(columns=["row", "_distance"], nearest=nearest)["row"].to_numpy()

    return search


# name -> package, build, load, whether it needs `--graph_rows`
LIBRARIES: dict[str, tuple[str, Callable[..., None], Callable[..., Any], bool]] = {
    "faiss, exact, float32": ("faiss-cpu", lambda *args: build_faiss(*args, "Flat"), load_faiss, False),
    "faiss, exact, float16": ("faiss-cpu", lambda *args: build_faiss(*args, "SQfp16"), load_faiss, False),
    "faiss, 512 cells, 32 searched, float16": (
        "faiss-cpu",
        lambda *args: build_faiss(*args, "IVF512,SQfp16"),
        lambda path: load_faiss(path, 32),
        False,
    ),
    "usearch, graph, float16": ("usearch", build_usearch, load_usearch, True),
    "lance, exact, float16": ("pylance", build_lance, load_lance, False),
}


# Measurement


def in_new_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function in a process of its own, whose peak memory is then that of the function."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_mib() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measure_build(name: str, path: Path, rows: int, width: int) -> dict[str, float]:
    start = time.perf_counter()
    LIBRARIES[name][1](path, rows, width)
    return {"build_seconds": round(time.perf_counter() - start, 2), "build_peak_mib": peak_mib()}


def measure_search(name: str, path: Path, width: int, neighbours: np.ndarray) -> dict[str, float]:
    start = time.perf_counter()
    search = LIBRARIES[name][2](path)
    load_seconds = time.perf_counter() - start
    seconds, hits = [], 0
    for query, wanted in zip(draw_queries(len(neighbours), width), neighbours, strict=True):
        start = time.perf_counter()
        rows = search(query)
        seconds.append(time.perf_counter() - start)
        hits += len(set(rows.tolist()) & set(wanted.tolist()))
    return {
        "load_seconds": round(load_seconds, 2),
        "query_milliseconds": round(1000 * statistics.median(seconds), 1),
        "recall@10": round(hits / neighbours.size, 3),
        "search_peak_mib": peak_mib(),
    }


def measure_library(name: str, rows: int, width: int, queries: int, folder: Path) -> dict[str, Any]:
    path = folder / "index"
    neighbours = exact_neighbours(rows, width, queries)
    built = in_new_process(measure_build, name, path, rows, width)
    searched = in_new_process(measure_search, name, path, width, neighbours)
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    size = round(sum(file.stat().st_size for file in files) / 2**20)
    version = importlib.metadata.version(LIBRARIES[name][0])
    return {"library": name, "version": version, "rows": rows, "width": width, **built, **searched, "disk_mib": size}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--widths", type=int, nargs="+", default=[192, 512])
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--graph_rows", type=int, default=20_000)
    parser.add_argument("--libraries", nargs="+", default=list(LIBRARIES), help="Names from the result file.")
    parser.add_argument("--output", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    records = []
    for width in flags.widths:
        for name in flags.libraries:
            rows = min(flags.rows, flags.graph_rows) if LIBRARIES[name][3] else flags.rows
            with tempfile.TemporaryDirectory() as folder:
                records.append(measure_library(name, rows, width, flags.queries, Path(folder)))
            print(json.dumps(records[-1]), flush=True)
            flags.output.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
