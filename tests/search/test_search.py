# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The index finds what a full comparison finds, and `mlip search` shows it; the index benchmark on few vectors."""

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from modeling_mlip.evaluation.encoders import load_encoder
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.search import vector_index
from modeling_mlip.search.chunks import Chunk
from modeling_mlip.search.collection import load_collection
from modeling_mlip.search.embed import EmbedOptions, embed_collection
from modeling_mlip.search.embedding_folder import EmbeddingFolder, ShardSummary
from modeling_mlip.search.search_command import image_path, search_image, search_words
from modeling_mlip.search.vector_index import VectorIndex, load_index_encoder

WIDTH = 6


def write_random_folder(path: Path, lengths: list[int], ids: list[str] | None = None) -> np.ndarray:
    """A finished folder of random embeddings in shards of these lengths; returns the embeddings."""
    folder = EmbeddingFolder(path)
    settings = {"width": WIDTH, "caption_column": "caption", "content": "captions", "root": None}
    folder.begin(settings)
    vectors = np.random.default_rng(0).standard_normal((sum(lengths), WIDTH))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    ids = ids or [str(row) for row in range(len(vectors))]
    start = 0
    for number, length in enumerate(lengths):
        rows = slice(start, start + length)
        captions = [f"caption {row}" for row in range(start, start + length)]
        summary = ShardSummary(Chunk(0, number), length, length, [], False)
        folder.write_shard(summary, ids[rows], captions, vectors[rows])
        start += length
    folder.write_metadata({**settings, "finished": True})
    return vectors


@pytest.fixture(scope="module")
def images(files) -> str:
    return str(Path(files["images"]) / "validation")


@pytest.fixture(scope="module")
def folder(images, sources, tmp_path_factory) -> Path:
    """The 40 drawn images of the validation split, embedded at the saved merge ratio 0.5."""
    path = tmp_path_factory.mktemp("search") / "index"
    embed_collection(load_encoder(sources["mlip"]), load_collection(images), path, EmbedOptions(shard_size=16))
    return path


def test_the_index_finds_the_rows_with_the_largest_products(tmp_path):
    vectors = write_random_folder(tmp_path / "index", [5, 0, 8, 1]).astype(np.float64)
    index = VectorIndex(tmp_path / "index")
    assert len(index) == 14
    for query in np.random.default_rng(1).standard_normal((4, WIDTH)):
        query /= np.linalg.norm(query)
        order = np.argsort(-(vectors @ query))[:3]
        hits = index.search(query, top_k=3)
        assert [hit.id for hit in hits] == [str(row) for row in order]
        assert [hit.caption for hit in hits] == [f"caption {row}" for row in order]
        np.testing.assert_allclose([hit.score for hit in hits], (vectors @ query)[order], atol=1e-3)
    assert len(index.search(query, top_k=100)) == 14
    with pytest.raises(ValueError, match="top_k=0"):
        index.search(query, top_k=0)


def test_rows_with_equal_ids_count_once(tmp_path):
    vectors = write_random_folder(tmp_path / "index", [6, 6], ids=[*"aaaaab", *"bbbccc"]).astype(np.float64)
    query = vectors[0]
    ranked = list(dict.fromkeys(np.array([*"aaaaabbbbccc"])[np.argsort(-(vectors @ query))].tolist()))
    assert [hit.id for hit in VectorIndex(tmp_path / "index").search(query, top_k=3)] == ranked
    assert [hit.id for hit in VectorIndex(tmp_path / "index").search(query, top_k=1)] == ["a"]


def test_the_index_is_built_once_and_again_for_new_embeddings(tmp_path, monkeypatch):
    write_random_folder(tmp_path / "index", [5])
    builds = []
    build = VectorIndex._build
    monkeypatch.setattr(VectorIndex, "_build", lambda self: builds.append(1) or build(self))
    for _ in range(2):
        VectorIndex(tmp_path / "index")
    assert len(builds) == 1
    shutil.rmtree(tmp_path / "index", ignore_errors=True)
    write_random_folder(tmp_path / "index", [5])
    (tmp_path / "index" / vector_index.INDEX).touch()
    folder = EmbeddingFolder(tmp_path / "index")
    folder.write_metadata(folder.read_metadata())  # newer than the index
    VectorIndex(tmp_path / "index")
    assert len(builds) == 2


def test_an_unfinished_folder_is_refused(tmp_path):
    EmbeddingFolder(tmp_path / "index").begin({"width": WIDTH})
    with pytest.raises(ValueError, match="run the same mlip embed command again"):
        VectorIndex(tmp_path / "index")


def test_search_needs_faiss_and_says_so(tmp_path, monkeypatch):
    write_random_folder(tmp_path / "index", [5])
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ImportError, match=r"pip install 'modeling-mlip\[search\]'"):
        VectorIndex(tmp_path / "index")


def test_an_image_finds_itself_and_words_find_what_their_embedding_finds(folder, images, sources):
    index = VectorIndex(folder)
    encoder = load_index_encoder(index.metadata)
    assert encoder.merge_ratio == 0.5
    file = sorted(Path(images).rglob("*.png"))[7]
    hits = search_image(index, encoder, Image.open(file).convert("RGB"), top_k=3)
    assert hits[0].id == str(file.relative_to(images)) and hits[0].score == pytest.approx(1, abs=2e-3)
    assert image_path(index.metadata, hits[0].id) == file
    assert len(search_words(index, encoder, "a red circle", top_k=5)) == 5
    with pytest.raises(ValueError, match="empty"):
        search_words(index, encoder, " ")


def test_search_with_another_model_is_refused(folder, sources):
    with pytest.raises(ValueError, match="is not the model that made the embeddings"):
        load_index_encoder(VectorIndex(folder).metadata, sources["plain"])


def test_the_command_prints_a_table_and_writes_a_page_with_thumbnails(folder, images, tmp_path, capsys):
    page = tmp_path / "found.html"
    assert mlip(["search", str(folder), "a red circle", "--top_k", "3", "--output", str(page)]) == 0
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].split() == ["id", "score"] and len(lines) == 5
    assert re.fullmatch(r"big_\w+/\d+\.png\s+-?\d\.\d{4}", lines[2])
    text = page.read_text()
    assert text.count("data:image/png;base64,") == 3 and lines[2].split()[0] in text
    file = sorted(Path(images).rglob("*.png"))[0]
    assert mlip(["search", str(folder), "--image", str(file), "--top_k", "1"]) == 0
    assert str(file.relative_to(images)) in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["words", "--image", "a.png"]])
def test_words_and_an_image_exclude_each_other(flags, folder, capsys):
    assert mlip(["search", str(folder), *flags]) == 1
    assert "Give either words or --image FILE" in capsys.readouterr().err


def test_a_file_that_is_no_image_is_named(folder, tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("no image")
    for name, message in (
        ("notes.txt", "not an image that can be read"),
        ("nowhere.png", "No such file"),
        (".", "Is a directory"),
    ):
        assert mlip(["search", str(folder), "--image", str(tmp_path / name)]) == 1
        assert f"image={tmp_path / name}: {message}" in capsys.readouterr().err


def test_the_index_benchmark_writes_one_record_for_each_library_and_width(tmp_path, monkeypatch):
    path = Path(__file__).parents[2] / "benchmarks" / "search_index.py"
    spec = importlib.util.spec_from_file_location("search_index", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    monkeypatch.setattr(benchmark, "in_new_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr(benchmark, "RESULTS", tmp_path / "results.json")
    exact = "faiss, exact, float16"
    flags = ["--rows", "300", "--widths", "8", "--queries", "3", "--libraries", exact]
    benchmark.main([*flags, "--output", str(tmp_path / "results.json")])
    [record] = json.loads((tmp_path / "results.json").read_text())
    committed = json.loads((path.parent / "results" / "search_index.json").read_text())
    assert set(record) == set(committed[0]) and record["recall@10"] > 0.9
    vectors, query = np.concatenate(list(benchmark.draw_vectors(300, 8))), benchmark.draw_queries(1, 8)
    assert benchmark.exact_neighbours(300, 8, 1).tolist() == np.argsort(-(query @ vectors.T))[:, :10].tolist()
    million = [record for record in committed if record["rows"] == 10**6 and record["library"] == exact]
    assert {record["width"] for record in million} == {192, 512}
    assert all(max(record["build_peak_mib"], record["search_peak_mib"]) < 4096 for record in million)
