# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Pictures against formulas and the model's own outputs; pages are complete; bad input is refused."""

import base64
import re

import numpy as np
import pytest
import torch
from conftest import open_gate, small_config, small_model
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from modeling_mlip import MLIPForImageClassification
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.evaluation.visualize import pictures
from modeling_mlip.evaluation.visualize import visualize as command
from modeling_mlip.evaluation.visualize.inspection import caption_words, filter_magnitudes, inspect_image
from modeling_mlip.evaluation.visualize.pictures import draw_words, fill_regions, region_borders, tint_regions
from modeling_mlip.evaluation.visualize.sections import settings_section, tokens_section
from modeling_mlip.hub.cli import main as mlip

CAPTION = "A dog's bone, medium-light: xylophones!"


@pytest.fixture(scope="module")
def processor() -> CLIPProcessor:
    tokenizer = train_tokenizer(["a dog's bone of medium light"] * 3, max_seq_length=32, vocab_size=600)
    return CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32), tokenizer)


def build_model(processor: CLIPProcessor, vision: dict | None = None, **keys):
    tokenizer = processor.tokenizer
    text = dict(
        vocab_size=len(tokenizer),
        max_position_embeddings=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = small_model(vision={"merge_ratio": 0.6, **(vision or {})}, text=text, **keys)
    model.set_attn_implementation("eager")
    return open_gate(model) if model.vision_model.frequency is not None else model


def noise(width: int = 48, height: int = 32, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture(scope="module")
def folder(processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "model"
    build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def pixel_values(processor, image) -> torch.Tensor:
    return processor.image_processor(images=image, return_tensors="pt")["pixel_values"]


def same_partition(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two labellings of (N,) put the same things together."""
    return np.array_equal(one[:, None] == one[None], other[:, None] == other[None])


# Inspection


@pytest.mark.parametrize("method", ["mlip", "tome", "elip"])
def test_the_stages_end_in_the_models_own_token_map(processor, method):
    model = build_model(processor, {"merge_method": method})
    inspection = inspect_image(model, processor, noise())
    with torch.no_grad():
        theirs = model.get_image_features(pixel_values=pixel_values(processor, noise()), output_token_map=True)
    assert torch.equal(inspection.stages[-1].after, theirs.token_map[0])
    assert len(inspection.stages) == 3 and inspection.num_tokens == [64, 64, 47, 35, 26]
    for first, second in zip(inspection.stages, inspection.stages[1:], strict=False):
        assert torch.equal(first.after, second.before)
    for stage in inspection.stages:  # a stage splits nothing
        pairs = set(zip(stage.before.tolist(), stage.after.tolist(), strict=True))
        assert len(pairs) == stage.before.max() + 1


def test_importance_is_what_the_layers_are_guided_by(processor):
    model = build_model(processor)
    inspection = inspect_image(model, processor, noise())
    guides = []
    for stage in inspection.stages:
        layer = model.vision_model.encoder.layers[stage.layer]
        original = layer._match

        def match(patches, guide, states, importance, *rest, original=original):
            guides.append((guide[1][0], importance[0]))
            return original(patches, guide, states, importance, *rest)

        layer._match = match
    with torch.no_grad():
        model.get_image_features(pixel_values=pixel_values(processor, noise()))
    assert len(guides) == len(inspection.stages) == 3
    for stage, (spatial, frequency) in zip(inspection.stages, guides, strict=True):
        torch.testing.assert_close(stage.spatial, spatial)
        torch.testing.assert_close(stage.frequency, frequency)
        maps = stage.importance()
        z = [(values - values.mean()) / values.std(correction=0) for values in (spatial, frequency)]
        for name, scores in zip(("spatial", "frequency", "both"), (*z, (z[0] + z[1]) / 2), strict=True):
            for patch in range(64):
                assert float(maps[name][patch]) == pytest.approx(float(scores[stage.before[patch]]), abs=1e-3)


def test_word_alignment_is_the_mean_cosine_of_a_words_tokens_in_float64(processor):
    model = build_model(processor)
    inspection = inspect_image(model, processor, noise(), CAPTION)
    words = [word.text for word in inspection.words]
    assert words == ["A", "dog's", "bone", "medium-light", "xylophones"] and inspection.num_truncated == 0

    text = processor.tokenizer(CAPTION, return_tensors="pt")
    with torch.no_grad():
        vision = model.get_image_features(pixel_values=pixel_values(processor, noise()), output_token_map=True)
        states = model.get_text_features(**text).last_hidden_state[0].double().numpy()
    tower, weights = model.vision_model, {name: p.detach().double().numpy() for name, p in model.named_parameters()}
    patches = vision.last_hidden_state[0, 1:].double().numpy()
    patches = (patches - patches.mean(-1, keepdims=True)) / np.sqrt(
        patches.var(-1, keepdims=True) + tower.post_layernorm.eps
    )
    patches = patches * weights["vision_model.post_layernorm.weight"] + weights["vision_model.post_layernorm.bias"]
    image = patches @ weights["token_visual_projection.weight"].T
    image += vision.frequency_hidden_state[0].double().numpy() @ weights["token_frequency_projection.weight"].T
    captions = states @ weights["token_text_projection.weight"].T

    tokens = processor.tokenizer.convert_ids_to_tokens(text["input_ids"][0].tolist())
    spelled, spans = [], {}
    for place, token in enumerate(tokens[1:-1], start=1):  # by spelling, where the program goes by offsets
        spelled.append((token.removesuffix("</w>"), place))
    for word in words:
        left, spans[word] = re.sub(r"[^\w]", "", word).lower(), []
        while left:
            piece, place = spelled.pop(0)
            if re.fullmatch(r"[\w]+|'s", piece):
                left = left.removeprefix(re.sub(r"[^\w]", "", piece))
                spans[word].append(place)
            elif spans[word]:  # the hyphen and the apostrophe within a word
                spans[word].append(place)
    assert len(spans["xylophones"]) > 2
    for word in inspection.words:
        for patch in range(64):
            i = image[vision.token_map[0, patch]]
            cosines = [captions[n] @ i / np.linalg.norm(captions[n]) / np.linalg.norm(i) for n in spans[word.text]]
            assert float(word.similarity[patch]) == pytest.approx(np.mean(cosines), abs=1e-5)


def test_similarity_is_the_models(processor):
    model = build_model(processor)
    inspection = inspect_image(model, processor, noise(), CAPTION)
    with torch.no_grad():
        text = processor.tokenizer(CAPTION, return_tensors="pt")
        theirs = model(**text, pixel_values=pixel_values(processor, noise()))
    assert inspection.logit == pytest.approx(float(theirs.logits_per_image), rel=1e-4)
    assert inspection.cosine == pytest.approx(float(theirs.image_embeds[0] @ theirs.text_embeds[0]), rel=1e-4)


def test_words_follow_offsets_and_those_cut_off_are_counted():
    caption = "a kitten, so tiny today"
    offsets = [[0, 0], [0, 1], [2, 5], [5, 8], [8, 9], [10, 12], [13, 15], [0, 0]]  # a kit ten , so ti
    words = [("a", [1]), ("kitten", [2, 3]), ("so", [5]), ("tiny", [6])]
    assert caption_words(caption, offsets) == (words, 2)
    assert caption_words("!?", [[0, 0], [0, 2], [0, 0]]) == ([], 0)


def test_the_crop_is_the_processors_without_normalisation(processor):
    inspection = inspect_image(build_model(processor), processor, noise(48, 32))
    assert np.array_equal(
        inspection.crop, np.asarray(noise(48, 32))[:, 8:40]
    )  # as high as the crop: nothing is resized


@pytest.mark.parametrize("patch_size", [4, 5])  # an even and an odd grid
def test_filters_are_drawn_as_they_act(processor, patch_size):
    vision = {"patch_size": patch_size, "image_size": 8 * patch_size if patch_size == 4 else 35}
    model = build_model(processor, vision)
    magnitudes = filter_magnitudes(model)
    H = W = vision["image_size"] // patch_size
    assert len(magnitudes) == 2
    for magnitude, block in zip(magnitudes, model.vision_model.frequency.layers, strict=True):
        half = torch.view_as_complex(block.spectral_filter.detach().double().contiguous()).numpy()
        for u in range(-(H // 2), H - H // 2):
            for v in range(-(W // 2), W - W // 2):
                own = half[u % H, v % W] if v % W <= W // 2 else None
                mirrored = half[-u % H, -v % W].conj() if -v % W <= W // 2 else None
                both = [value for value in (own, mirrored) if value is not None]
                expected = np.abs(sum(both) / len(both))
                np.testing.assert_allclose(magnitude[u + H // 2, v + W // 2], expected, atol=1e-9)


# Pictures


def test_filled_regions_are_the_partition_of_the_token_map(processor):
    inspection = inspect_image(build_model(processor), processor, noise())
    for stage in inspection.stages:
        labels = stage.after.view(inspection.grid).numpy()
        filled = fill_regions(inspection.crop, labels)
        colours = filled[::4, ::4].reshape(64, 3).astype(int) @ [1, 256, 65536]  # of each patch's corner
        assert same_partition(colours, labels.ravel())  # noise: no two regions have one mean
        assert np.array_equal(filled, filled[::4, ::4].repeat(4, 0).repeat(4, 1))
        for token in range(labels.max() + 1):
            inside = (labels == token).repeat(4, 0).repeat(4, 1)
            np.testing.assert_allclose(filled[inside][0], inspection.crop[inside].mean(axis=0), atol=0.51)
        tinted = tint_regions(labels)
        alone = np.bincount(labels.ravel())[labels] == 1
        assert np.array_equal(tinted[..., 3] == 0, alone)
        hues = (tinted[..., :3] * 255).round().reshape(64, 3) @ [1, 256, 65536]
        merged = ~alone.ravel()
        assert same_partition(hues[merged], labels.ravel()[merged])


def test_borders_stand_between_different_tokens_and_nowhere_else():
    labels = np.random.default_rng(0).integers(0, 3, (5, 7))
    drawn = {tuple(map(tuple, border)) for border in region_borders(labels).tolist()}
    expected = set()
    for y in range(5):
        for x in range(7):
            if x < 6 and labels[y, x] != labels[y, x + 1]:
                expected.add(((x + 1, y), (x + 1, y + 1)))
            if y < 4 and labels[y, x] != labels[y + 1, x]:
                expected.add(((x, y + 1), (x + 1, y + 1)))
    assert drawn == expected
    assert region_borders(np.zeros((3, 3), dtype=int)).shape == (0, 2, 2)


# The command


def images_of(page: str) -> list[bytes]:
    return [base64.b64decode(data) for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)]


def test_a_page_is_whole_and_holds_every_picture(folder, tmp_path, capsys):
    noise().save(tmp_path / "a & b.png")
    out = tmp_path / "new" / "out"
    flags = ["--image", str(tmp_path / "a & b.png"), "--caption", "<b>$x$ dog", "--output_dir", str(out)]
    assert mlip(["visualize", str(folder), *flags]) == 0
    pictures = ["a & b_regions.png", "a & b_importance.png", "a & b_words.png", "filters.png"]
    assert sorted(path.name for path in out.iterdir()) == sorted([*pictures, "a & b.html"])  # and nothing aside
    page = (out / "a & b.html").read_text()
    assert images_of(page) == [(out / name).read_bytes() for name in pictures]
    assert "a &amp; b.png in the model" in page and "&lt;b&gt;$x$ dog" in page and "<b>" not in page
    assert not re.search(r"https?://|<script|<link|@import", page)
    assert "Left out" not in page
    similarity = re.search(r"64 patches -> 26 tokens, similarity (-?0\.\d{4})", capsys.readouterr().out).group(1)
    assert f"<td>{similarity}</td>" in page

    # A later call without a caption, with other settings: no picture of the first one is left.
    assert mlip(["visualize", str(folder), *flags[:2], *flags[4:], "--merge_ratio", "0"]) == 0
    page = (out / "a & b.html").read_text()
    assert len(images_of(page)) == 2 and page.count("Left out") == 2
    assert "Nothing merges at merge_ratio=0" in page and "No caption was given" in page
    assert sorted(path.name for path in out.iterdir()) == ["a & b.html", "a & b_importance.png", "filters.png"]


def test_parts_that_a_model_lacks_are_named(processor, tmp_path):
    folder = tmp_path / "model"
    build_model(processor, {"frequency_layers": 0}, token_loss_weight=0).save_pretrained(folder)
    processor.save_pretrained(folder)
    noise().save(tmp_path / "x.png")
    pages = command.visualize(str(folder), [tmp_path / "x.png"], tmp_path / "out", "a dog", merge_method="tome")
    page = next(iter(pages)).read_text()
    assert len(images_of(page)) == 2
    assert "no frequency stage (frequency_layers=0)" in page and "(token_loss_weight=0)" in page
    assert "&#39;tome&#39;, uses none of them" in page
    assert not (tmp_path / "out" / "filters.png").exists()


def test_a_folder_of_images_gives_a_page_each(folder, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    noise().save(images / "x.png")
    noise(seed=1).save(images / "x.jpg")
    noise(seed=2).convert("RGBA").save(images / "y.webp")
    (images / "notes.txt").write_text("no image")
    assert mlip(["visualize", str(folder), "--image", str(images), "--output_dir", str(tmp_path / "out")]) == 0
    assert {path.name for path in (tmp_path / "out").glob("*.html")} == {"x.png.html", "x.jpg.html", "y.html"}
    printed = capsys.readouterr()
    assert printed.out.count("64 patches -> 26 tokens") == 3 and "3/3" in printed.err


def test_a_run_that_breaks_off_leaves_no_half_page(folder, tmp_path, monkeypatch):
    noise().save(tmp_path / "x.png")

    def fail(*args):
        raise OSError("disk full")

    monkeypatch.setattr(command, "write_page", fail)
    with pytest.raises(OSError, match="disk full"):
        command.visualize(str(folder), [tmp_path / "x.png"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["filters.png"]


def test_bad_input_is_refused_in_one_line_that_names_it(folder, processor, tmp_path, capsys):
    noise().save(tmp_path / "x.png")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:300])
    for empty in ("empty", "clip", "classifier"):
        (tmp_path / empty).mkdir()
    CLIPModel(
        CLIPConfig(
            text_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1),
            vision_config=dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1),
        )
    ).save_pretrained(tmp_path / "clip")
    MLIPForImageClassification(small_config()).save_pretrained(tmp_path / "classifier")
    model, image, out = str(folder), str(tmp_path / "x.png"), str(tmp_path / "out")
    for source, picture, target, more, expected in [
        (model, str(tmp_path / "none.png"), out, [], "none.png: no such file; give an image"),
        (model, str(tmp_path / "text.png"), out, [], "text.png: not an image"),
        (model, str(tmp_path / "cut.png"), out, [], "cut.png: not an image that can be read"),
        (model, str(tmp_path / "empty"), out, [], "holds no image"),
        (model, image, str(tmp_path / "text.png"), [], "text.png is a file; choose a folder"),
        (model, image, out, ["--merge_ratio", "1.5"], "merge_ratio=1.5"),
        (model, image, out, ["--merge_method", "best"], "merge_method='best' is unknown; choose one of 'mlip'"),
        (str(tmp_path / "empty"), image, out, [], "holds no config.json"),
        (str(tmp_path / "clip"), image, out, [], "'clip'; choose a model of type 'mlip'"),
        (str(tmp_path / "classifier"), image, out, [], "MLIPForImageClassification; give a saved MLIPModel"),
    ]:
        assert mlip(["visualize", source, "--image", picture, "--output_dir", target, *more]) == 1, expected
        said = capsys.readouterr()
        assert expected in said.err and "Traceback" not in said.err and said.out == ""
        assert not (tmp_path / "out").exists()


def test_tables_of_a_page_name_the_tokens_of_each_layer_and_no_local_path(processor, tmp_path):
    model = build_model(processor, vision={"merge_ratio": 0.5})
    inspection = inspect_image(model, processor, noise())
    tokens = tokens_section(inspection).rows
    depth = model.config.vision_config.num_hidden_layers
    assert [row["layer"] for row in tokens] == list(range(depth))
    assert tokens[0]["tokens in attention"] == inspection.num_tokens[0]
    assert tokens[-1]["tokens in MLP"] == inspection.num_tokens[-1]
    settings = {
        row["setting"]: row["value"] for row in settings_section(str(tmp_path), model, inspection, "x", None).rows
    }
    assert settings["model"] == tmp_path.name and settings["merge ratio"] == "0.5" and "caption" not in settings


@pytest.mark.parametrize("num_words", [1, 6])
def test_the_picture_of_words_holds_all_its_texts(num_words, tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures, "_save", lambda figure, path: figures.append(figure))
    words = [(f"word{n}", np.random.default_rng(n).normal(size=(4, 4))) for n in range(num_words)]
    draw_words(tmp_path / "words.png", np.zeros((32, 32, 3), np.uint8), words)
    [figure] = figures
    figure.draw_without_rendering()
    labels = [figure.axes[-1].yaxis.label, *(axes.title for axes in figure.axes)]
    assert labels[0].get_text() == "cosine similarity"
    for label in labels:
        box = label.get_window_extent()
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, label
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, label
