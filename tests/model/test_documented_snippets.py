# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The programs of docs/ecosystem.md for other libraries run as they are written, and compute what our code computes.

A test is skipped if its library is not installed; sentence-transformers belongs to the extra `test`.
"""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

from modeling_mlip.data.framed_shapes import framed_shapes_dataset
from modeling_mlip.evaluation.encoders import load_encoder
from modeling_mlip.evaluation.metrics import retrieval_metrics
from modeling_mlip.search.collection import load_collection
from modeling_mlip.search.embed import embed_collection
from modeling_mlip.search.search_command import search_words
from modeling_mlip.search.vector_index import VectorIndex

DOCUMENT = Path(__file__).parents[2] / "docs" / "ecosystem.md"
NUM_PHOTOS = 10


def run_snippet(heading: str) -> dict:
    """Runs the first Python block below a heading of the document; returns its variables."""
    section = re.search(rf"^#+ {heading}\n(.*?)(?=^##|\Z)", DOCUMENT.read_text(), re.MULTILINE | re.DOTALL)[1]
    code = re.search(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)[1]
    variables = {"__name__": "snippet"}
    exec(compile(code, f"{DOCUMENT.name}, {heading}", "exec"), variables)
    return variables


@pytest.fixture
def example(sources, splits, tmp_path, monkeypatch) -> Path:
    """The files that the programs read: a saved model `folder`, and pictures in `photos`."""
    monkeypatch.chdir(tmp_path)
    Path("folder").symlink_to(sources["mlip"])
    Path("photos").mkdir()
    for number, image in enumerate(splits["validation"].select(range(NUM_PHOTOS))["image"]):
        image.save(f"photos/{number:04}.png")
    return tmp_path


@torch.no_grad()
def embed(texts: list[str], images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised embeddings `(T, P)` and `(I, P)` of the model in `folder`, in float64."""
    model, processor = AutoModel.from_pretrained("folder").eval(), AutoProcessor.from_pretrained("folder")
    inputs = processor(text=texts, images=images, padding=True, truncation=True, return_tensors="pt")
    embeds = (
        model.get_text_features(inputs.input_ids, inputs.attention_mask).pooler_output,
        model.get_image_features(inputs.pixel_values).pooler_output,
    )
    return tuple(torch.nn.functional.normalize(each.double(), dim=-1) for each in embeds)


def test_the_trainer_of_sentence_transformers_trains_a_folder_that_loads_as_our_model(example):
    pytest.importorskip("sentence_transformers")
    variables = run_snippet("Train with sentence-transformers")
    model, trainer, pairs = (variables[name] for name in ("model", "trainer", "pairs"))
    assert [row["loss"] > 0 for row in trainer.state.log_history[:-1]] == [True] * 4
    before, after = (AutoModel.from_pretrained(name).eval() for name in ("folder", "trained"))
    old = before.state_dict()
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, old[name])}
    towers = {
        name for name in old if re.search(r"layers\.\d+\.(self_attn|mlp).*weight", name) and "frequency" not in name
    }
    assert changed >= towers | {"visual_projection.weight", "text_projection.weight"}
    # The trainer's loss is cross entropy of 20 * cosine from images to captions.
    rows = pairs.select(range(6))
    batch = [model.preprocess(list(rows[name])) for name in ("image", "caption")]
    with torch.no_grad():
        ours = trainer.loss(batch, None)
        model.eval()
        images, texts = (torch.from_numpy(model.encode(list(rows[name]))).double() for name in ("image", "caption"))
        images_again = after.get_image_features(batch[0]["pixel_values"]).pooler_output
    images, texts = (torch.nn.functional.normalize(each, dim=-1) for each in (images, texts))
    theirs = torch.nn.functional.cross_entropy(20 * images @ texts.T, torch.arange(6))
    assert float(ours) == pytest.approx(float(theirs), rel=1e-4)
    torch.testing.assert_close(torch.nn.functional.normalize(images_again, dim=-1).double(), images, rtol=0, atol=1e-5)


def test_mteb_measures_the_recall_that_we_measure(example):
    pytest.importorskip("mteb")
    scores = run_snippet("MTEB")["scores"]
    rows = framed_shapes_dataset(1)["validation"]
    texts, images = embed(list(rows["caption"]), list(rows["image"]))
    ours = retrieval_metrics(images, texts, torch.arange(len(rows)))
    for k in (1, 5, 10):
        assert 100 * scores[f"hit_rate_at_{k}"] == pytest.approx(ours[f"text_to_image_recall@{k}"], abs=1)


def test_lancedb_finds_the_nearest_images_for_words_and_for_an_image(example):
    pytest.importorskip("lancedb")
    variables = run_snippet("LanceDB")
    paths = sorted(Path("photos").iterdir())
    texts, images = embed([variables["WORDS"]], [Image.open(path) for path in paths])
    for query, result in zip((texts[0], images[0]), variables["results"], strict=True):
        cosines = images @ query
        best = cosines.argsort(descending=True)[:3]
        assert [row["path"] for row in result] == [str(paths[index]) for index in best]
        np.testing.assert_allclose([1 - row["_distance"] for row in result], cosines[best], rtol=0, atol=1e-5)


def test_qdrant_finds_what_mlip_search_finds_in_the_shards_of_mlip_embed(example):
    pytest.importorskip("qdrant_client")
    embed_collection(load_encoder("folder"), load_collection("photos"), "embeddings")
    variables = run_snippet("Qdrant")
    theirs = search_words(VectorIndex("embeddings"), load_encoder("folder"), variables["WORDS"], top_k=3)
    assert [hit.payload["id"] for hit in variables["hits"]] == [hit.id for hit in theirs]
    np.testing.assert_allclose(
        [hit.score for hit in variables["hits"]], [hit.score for hit in theirs], rtol=0, atol=2e-3
    )


def test_torchao_quantises_each_row_of_a_weight_to_int8(example):
    pytest.importorskip("torchao")
    variables = run_snippet("torchao")
    exact = variables["model"].get_submodule("vision_model.encoder.layers.0.mlp.fc1").weight.detach().double()
    ours = variables["int8"].get_submodule("vision_model.encoder.layers.0.mlp.fc1").weight.dequantize().double()
    scale = exact.abs().amax(dim=1, keepdim=True) / 127.5
    assert float((ours - exact).abs().sub(scale).max()) < 1e-5  # at most one step
    assert not torch.equal(ours, exact)
    assert 0.98 < float(variables["cosines"].min()) < 1
