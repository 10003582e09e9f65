# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Embeddings equal those of transformers' CLIP, and a run that stops anywhere and is resumed gives the same shards."""

import importlib.util
import json
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from data_cases import encoded, picture, write_tar
from PIL import Image
from torch.nn.functional import normalize
from transformers import CLIPModel, CLIPProcessor

from modeling_mlip.evaluation.encoders import load_encoder
from modeling_mlip.evaluation.evaluation_split import LoadingOptions
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.search import embed
from modeling_mlip.search.chunks import Chunk, ChunkReader, RowBatch, mark_last
from modeling_mlip.search.collection import Row, load_collection
from modeling_mlip.search.embedding_folder import EmbeddingFolder
from modeling_mlip.search.row_readers import CaptionReader, ImageReader

NUM_IMAGES = 11
OPTIONS = embed.EmbedOptions(dtype="float32", shard_size=4, loading=LoadingOptions(batch_size=2, skip_budget=0.2))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """A folder of images without captions; the sixth is broken."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(NUM_IMAGES):
        picture(number, (40, 32 + number)).save(folder / f"{number:02}.png")
    (folder / "05.png").write_bytes(b"no image")
    return folder


@pytest.fixture(scope="module")
def encoder(sources):
    return load_encoder(sources["clip"])


@pytest.fixture
def tables(tmp_path) -> Path:
    """Parquet files of drawn pairs, of 3, 4 and 4 rows; a row has two captions."""
    captions = [["a red circle", "a circle"], *([f"a shape with {n} stripes"] for n in range(10))]
    images = [{"bytes": encoded(picture(number)), "path": None} for number in range(NUM_IMAGES)]
    for file, rows in enumerate((range(3), range(3, 7), range(7, 11))):
        columns = {"image": [images[row] for row in rows], "caption": [captions[row] for row in rows]}
        dataset = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
        dataset.to_parquet(tmp_path / f"{file}.parquet")
    return tmp_path


def read_shards(folder: Path) -> dict[str, list]:
    rows = [row for path in EmbeddingFolder(folder).list_shards() for row in datasets.Dataset.from_parquet(str(path))]
    return {name: [row[name] for row in rows] for name in rows[0]}


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in EmbeddingFolder(folder).list_shards()}


def test_image_embeddings_equal_those_of_transformers(photos, sources, encoder, tmp_path, empty_cache):
    result = embed.embed_collection(encoder, load_collection(str(photos)), tmp_path / "out", OPTIONS)
    stored = read_shards(tmp_path / "out")
    names = [f"{number:02}.png" for number in range(NUM_IMAGES) if number != 5]
    images = [Image.open(photos / name) for name in names]
    theirs, processor = CLIPModel.from_pretrained(sources["clip"]), CLIPProcessor.from_pretrained(sources["clip"])
    with torch.no_grad():
        features = theirs.get_image_features(**processor(images=images, return_tensors="pt")).pooler_output
    assert stored["id"] == names and "caption" not in stored
    torch.testing.assert_close(torch.tensor(stored["embedding"]), normalize(features, dim=-1), atol=1e-5, rtol=0)
    assert (result["num_embeddings"], result["num_skipped"]) == (10, 1)
    assert result["skipped"] == ["05.png: this is not an image of a known format"]
    assert json.loads((tmp_path / "out" / "embeddings.json").read_text())["finished"]


def test_caption_embeddings_equal_those_of_transformers(tables, sources, encoder, tmp_path, empty_cache):
    collection = load_collection(str(tables / "*.parquet"))
    options = embed.EmbedOptions(with_text=True, dtype="float32", shard_size=4, loading=LoadingOptions(2))
    embed.embed_collection(encoder, collection, tmp_path / "out", options)
    stored = read_shards(tmp_path / "out")
    captions = ["a red circle", "a circle", *(f"a shape with {n} stripes" for n in range(10))]
    theirs, processor = CLIPModel.from_pretrained(sources["clip"]), CLIPProcessor.from_pretrained(sources["clip"])
    with torch.no_grad():
        inputs = processor.tokenizer(captions, padding=True, return_tensors="pt")
        features = theirs.get_text_features(**inputs).pooler_output
    assert stored["id"] == ["0#1", "0#2", *map(str, range(1, 11))]
    assert stored["caption"] == captions
    torch.testing.assert_close(torch.tensor(stored["embedding"]), normalize(features, dim=-1), atol=1e-5, rtol=0)


def test_float16_embeddings_are_the_rounded_float32_ones(tables, encoder, tmp_path, empty_cache):
    collection = load_collection(str(tables / "*.parquet"))
    embed.embed_collection(encoder, collection, tmp_path / "half", embed.EmbedOptions(shard_size=4))
    embed.embed_collection(encoder, collection, tmp_path / "single", embed.EmbedOptions(dtype="float32", shard_size=4))
    files = [str(path) for path in EmbeddingFolder(tmp_path / "half").list_shards()]
    half = datasets.Dataset.from_parquet(files)
    assert half.features["embedding"] == datasets.List(datasets.Value("float16"), length=24)
    assert half["caption"][:2] == ["a red circle", "a shape with 0 stripes"]  # the first caption of each image
    single = np.array(read_shards(tmp_path / "single")["embedding"], dtype=np.float32)
    assert np.array_equal(np.array(half["embedding"][:], dtype=np.float16), single.astype(np.float16))


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_that_stops_at_any_batch_and_is_resumed_gives_the_same_shards(
    streaming, tables, encoder, tmp_path, monkeypatch, empty_cache
):
    collection = load_collection(str(tables / "*.parquet"), streaming=streaming)
    embed.embed_collection(encoder, collection, tmp_path / "whole", OPTIONS)
    expected = shard_bytes(tmp_path / "whole")
    assert len(expected) == 3
    embed_inputs, calls = embed.embed_inputs, []

    def stop_at(encoder, inputs):
        calls.append(inputs)
        if "pixel_values" in inputs and len(calls) == stop:
            raise KeyboardInterrupt
        return embed_inputs(encoder, inputs)

    monkeypatch.setattr(embed, "embed_inputs", stop_at)
    for stop in range(2, 7):  # call 1 embeds a caption for the width
        folder = tmp_path / f"stopped{stop}"
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            embed.embed_collection(encoder, collection, folder, OPTIONS)
        assert not json.loads((folder / "embeddings.json").read_text())["finished"]
        (folder / ".shard-00000-000009.parquet.tmp").write_bytes(b"half")  # as after SIGKILL
        left = 6 - 2 * len(shard_bytes(folder))
        stop = 0
        calls.clear()
        result = embed.embed_collection(encoder, collection, folder, OPTIONS)
        assert len(calls) == 1 + left, "embeds finished rows again"
        assert shard_bytes(folder) == expected and not list(folder.glob(".shard*"))
        assert result["num_embeddings"] == NUM_IMAGES


def test_a_stream_gives_the_embeddings_of_the_table_and_ids_by_file(tables, encoder, tmp_path, empty_cache):
    for name, streaming in (("table", False), ("stream", True)):
        collection = load_collection(str(tables / "*.parquet"), streaming=streaming)
        embed.embed_collection(encoder, collection, tmp_path / name, OPTIONS)
    table, stream = read_shards(tmp_path / "table"), read_shards(tmp_path / "stream")
    assert table["id"] == [str(row) for row in range(NUM_IMAGES)]
    assert stream["id"] == [f"{file}-{row}" for file, rows in enumerate((3, 4, 4)) for row in range(rows)]
    np.testing.assert_allclose(table["embedding"], stream["embedding"], atol=1e-6)


def test_workers_change_nothing(photos, encoder, tmp_path):
    for name, workers in (("alone", 0), ("workers", 2)):
        loading = LoadingOptions(batch_size=2, num_workers=workers, skip_budget=0.2)
        options = embed.EmbedOptions(shard_size=4, loading=loading)
        embed.embed_collection(encoder, load_collection(str(photos)), tmp_path / name, options)
    assert shard_bytes(tmp_path / "alone") == shard_bytes(tmp_path / "workers")


def test_a_sample_of_a_tar_is_named_by_its_file_and_key(tmp_path, empty_cache):
    write_tar(tmp_path / "a.tar", [("cat/1.png", encoded(picture(0))), ("cat/2.png", encoded(picture(1)))])
    for streaming in (False, True):
        collection = load_collection(str(tmp_path / "*.tar"), streaming=streaming)
        assert [row.id for row in collection.read(0, 0)] == ["a.tar/cat/1", "a.tar/cat/2"]
        assert collection.caption_column is None


def test_paths_outside_the_folder_stay_absolute(tmp_path, photos, empty_cache):
    (tmp_path / "table.csv").write_text(f"image,caption\n{photos / '00.png'},a\nphotos/1.png,b\n")
    collection = load_collection(str(tmp_path / "table.csv"))
    assert [row.id for row in collection.read(0, 0)] == [str(photos / "00.png"), "photos/1.png"]


class FakeCollection:
    """Parts of rows, as a data set with a length (one part) or as a stream."""

    def __init__(self, lengths: list[int], is_stream: bool):
        self.lengths, self.num_parts = lengths, len(lengths)
        self.num_rows = None if is_stream else lengths[0]

    def read(self, part, start, stop=None):
        for number in range(start, self.lengths[part] if stop is None else stop):
            yield Row(f"{part}-{number}", None, None)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize(
    "lengths, is_stream", [([17], False), ([16], False), ([17], True), ([16], True), ([5, 0, 9, 8], True)]
)
def test_each_row_is_read_by_exactly_one_process_also_after_a_stop(lengths, is_stream, num_processes):
    collection = FakeCollection(lengths, is_stream)
    rows = sorted(f"{part}-{number}" for part, length in enumerate(lengths) for number in range(length))

    def read(finished, last):
        readers = [ChunkReader(collection, 4, 3, finished, last, n, num_processes) for n in range(num_processes)]
        return [batch for reader in readers for batch in reader]

    batches = read(frozenset(), {})
    assert sorted(row.id for batch in batches for row in batch.rows) == rows
    assert sum(batch.ends_part for batch in batches) == sum(length > 0 for length in lengths)
    done = [batch for batch in batches if batch.chunk.number in (0, 2) or batch.ends_part]
    finished = {batch.chunk for batch in done}
    last = {batch.chunk.part: batch.chunk.number for batch in done if batch.ends_part}
    before = [row.id for batch in batches for row in batch.rows if batch.chunk in finished]
    after = [row.id for batch in read(finished, last) for row in batch.rows]
    assert sorted(before + after) == rows
    everything = {batch.chunk for batch in batches}
    ends = {part: -(-length // 4) - 1 for part, length in enumerate(lengths) if length}
    assert read(everything, ends) == []


def test_mark_last_marks_the_last_value():
    assert list(mark_last([])) == [] and list(mark_last("ab")) == [("a", False), ("b", True)]
    assert Chunk(0, 2) < Chunk(1, 0)


def test_an_unusable_caption_is_skipped_as_text_and_empty_beside_an_image(tokenizer, transform):
    image = {"bytes": encoded(picture()), "path": None}
    rows = [Row("0", image, ["a red square", "", "a green square"]), Row("1", image, " "), Row("b.png", image, 3)]
    batch = RowBatch(Chunk(0, 0), rows, True, True)
    as_text = CaptionReader(tokenizer, 8)[batch]
    assert as_text.ids == ["0#1", "0#2"] and as_text.num_rows == 3
    assert as_text.skipped == ["row 1: the caption is empty", "b.png: a caption is of type int, not a string"]
    assert [len(inputs["input_ids"]) for inputs in as_text.inputs] == [2]
    as_images = ImageReader(transform)[batch]
    assert as_images.captions == ["a red square", None, None] and as_images.skipped == []
    assert as_images.inputs[0]["pixel_values"].shape == (3, 3, 32, 32)


def test_a_run_with_other_settings_is_refused_in_one_line(photos, sources, tmp_path, capsys):
    output = ["--output_dir", str(tmp_path / "out"), "--skip_budget", "0.2"]
    command = ["embed", sources["mlip"], str(photos), *output]
    assert mlip([*command, "--merge_ratio", "0.25"]) == 0
    assert "10 images at merge ratio 0.25, 1 rows skipped" in capsys.readouterr().out
    assert mlip([*command, "--merge_ratio", "0.5"]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "begun with merge_ratio=0.25, and this run has merge_ratio=0.5" in line
    assert mlip(["embed", sources["plain"], str(photos), *output]) == 1
    assert "model_hash=" in capsys.readouterr().err
    assert mlip([*command, "--merge_ratio", "0.25"]) == 0
    assert "(finished before)" in capsys.readouterr().out


def test_the_merge_ratio_changes_the_embeddings_and_the_saved_one_is_the_default(photos, sources, tmp_path):
    collection = load_collection(str(photos))
    encoder = load_encoder(sources["mlip"])  # saved with 0.5
    assert embed.embed_collection(encoder, collection, tmp_path / "half", OPTIONS)["merge_ratio"] == 0.5
    saved_hash = embed.hash_model(encoder.model)
    encoder.model.set_merge_ratio(0.0)
    assert embed.hash_model(encoder.model) == saved_hash
    embed.embed_collection(encoder, collection, tmp_path / "none", OPTIONS)
    half, none = (read_shards(tmp_path / name)["embedding"] for name in ("half", "none"))
    assert np.abs(np.array(half) - np.array(none)).max() > 1e-4


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--dtype", "bfloat16"], "dtype='bfloat16': choose one of float16, float32"),
        (["--shard_size", "0"], "shard_size=0: choose 1 or more"),
        (["--batch_size", "0"], "batch_size=0: choose 1 or more"),
        (["--split", "test"], "split=test"),
        (["--text"], "has no caption column to embed"),
        (["--skip_budget", "0"], "Skipped 1 of 11"),
    ],
)
def test_a_wrong_flag_is_refused_in_one_line(flags, message, photos, sources, tmp_path, capsys):
    assert mlip(["embed", sources["clip"], str(photos), "--output_dir", str(tmp_path / "out"), *flags]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in line


def test_a_run_that_was_killed_before_its_first_file_starts_again(photos, encoder, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".embeddings.json.x1y2").write_text("{")  # a temporary file of write_atomically
    embed.embed_collection(encoder, load_collection(str(photos)), folder, OPTIONS)
    assert {path.suffix for path in folder.iterdir()} == {".json", ".parquet"}


def test_a_folder_with_other_files_and_a_damaged_shard_are_refused(photos, encoder, tmp_path):
    collection = load_collection(str(photos))
    with pytest.raises(FileExistsError, match="not empty"):
        embed.embed_collection(encoder, collection, photos, OPTIONS)
    with pytest.raises(FileNotFoundError, match="folder that mlip embed wrote"):
        EmbeddingFolder(photos).read_metadata()
    embed.embed_collection(encoder, collection, tmp_path / "out", OPTIONS)
    shard = EmbeddingFolder(tmp_path / "out").list_shards()[1]
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match="is no complete shard"):
        EmbeddingFolder(tmp_path / "out").read_summaries()


def test_the_speed_benchmark_kills_and_resumes_and_compares_with_a_plain_loop(tmp_path):
    path = Path(__file__).parents[2] / "benchmarks" / "embed_speed.py"
    spec = importlib.util.spec_from_file_location("embed_speed", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    small = "--images 4 --batch_size 2 --rounds 1 --hidden_size 64 --layers 1 --kills 2".split()
    benchmark.main([*small, "--output", str(tmp_path / "result.json")])
    record = json.loads((tmp_path / "result.json").read_text())
    committed = json.loads((path.parent / "results" / "embed_speed.json").read_text())
    assert record["kills"]["complete_outputs"] == 2
    assert committed["kills"]["complete_outputs"] == committed["kills"]["kills"] == 10
    assert set(record["speed"]) == set(committed["speed"])
    assert committed["speed"]["speed_over_plain_loop"]["0.5"] > committed["speed"]["speed_over_plain_loop"]["0.0"]
    clip, processor, encoder = benchmark.make_encoders(hidden_size=64, layers=1)
    benchmark.write_drawn_files(tmp_path / "images", 2)
    plain = benchmark.embed_plainly(clip, processor, sorted((tmp_path / "images").iterdir()))
    embed.embed_collection(encoder, load_collection(str(tmp_path / "images")), tmp_path / "out", OPTIONS)
    np.testing.assert_allclose(read_shards(tmp_path / "out")["embedding"], plain.numpy(), atol=1e-5)
