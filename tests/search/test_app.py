# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The page of `mlip app`: its functions called directly, through Gradio's client, and in Chromium.

The last two need the extra `app`, and the browser needs Playwright and an installed Chromium; they are skipped without.
"""

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import CLIPProcessor

from modeling_mlip import MLIPModel
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.search.app import build_page, find_images_and_rows, format_report
from modeling_mlip.search.app_session import AppSession, split_labels
from modeling_mlip.search.collection import load_collection
from modeling_mlip.search.embed import EmbedOptions, embed_collection

LABELS = "a red circle, a blue star,\n a green ring, a blue star"
NAMES = ["a red circle", "a blue star", "a green ring"]


@pytest.fixture(scope="module")
def images(files) -> Path:
    return Path(files["images"]) / "validation"


@pytest.fixture(scope="module")
def session(images, sources, tmp_path_factory) -> AppSession:
    path = tmp_path_factory.mktemp("app") / "index"
    embed_collection(AppSession(sources["mlip"]).encoder, load_collection(str(images)), path, EmbedOptions())
    return AppSession(sources["mlip"], str(path))


@pytest.fixture(scope="module")
def image(images) -> Image.Image:
    return Image.open(sorted(images.rglob("*.png"))[3])


def expected_scores(source: str, image: Image.Image, merge_ratio: float) -> list[float]:
    model, processor = MLIPModel.from_pretrained(source).eval(), CLIPProcessor.from_pretrained(source)
    model.set_merge_ratio(merge_ratio)
    with torch.no_grad():
        inputs = processor(text=NAMES, images=image, return_tensors="pt", padding=True)
        return model(**inputs).logits_per_image.softmax(dim=1)[0].tolist()


def test_probabilities_are_the_softmax_of_the_models_logits(session, sources, image):
    scores = session.classify(image, LABELS)
    assert list(scores) == NAMES
    assert list(scores.values()) == pytest.approx(expected_scores(sources["mlip"], image, 0.5), abs=1e-5)


def test_the_merge_report_compares_a_ratio_with_no_merging_and_leaves_the_model_as_it_was(session, sources, image):
    report = session.inspect_merging(image, LABELS, 0.75)
    assert (report.num_patches, report.num_tokens) == (64, 16)
    assert list(report.scores.values()) == pytest.approx(expected_scores(sources["mlip"], image, 0.75), abs=1e-5)
    assert list(report.scores_unmerged.values()) == pytest.approx(expected_scores(sources["mlip"], image, 0), abs=1e-5)
    assert report.milliseconds > 0 and report.milliseconds_unmerged > 0
    assert session.encoder.merge_ratio == 0.5 and session.model.config._attn_implementation == "sdpa"
    unmerged = session.inspect_merging(image, LABELS, 0.0)
    assert unmerged.picture.size == (32, 32) and report.picture.width > 300
    assert unmerged.scores == unmerged.scores_unmerged
    with pytest.raises(ValueError, match="merge_ratio=1"):
        session.inspect_merging(image, LABELS, 1.0)
    assert session.encoder.merge_ratio == 0.5


def test_search_finds_an_image_by_itself(session, images):
    file = sorted(images.rglob("*.png"))[5]
    hits = session.search("", Image.open(file))
    assert hits[0].id == str(file.relative_to(images)) and len(hits) == 12
    gallery, rows = find_images_and_rows(session, "a red circle", None)
    assert len(gallery) == len(rows) == 12 and rows[0][0] in gallery[0][1]


def test_what_is_missing_is_said_in_one_line(session, sources, image):
    with pytest.raises(ValueError, match="Give labels"):
        session.classify(image, " ,")
    with pytest.raises(ValueError, match="Choose an image"):
        format_report(session, None, LABELS, 0.5)
    with pytest.raises(ValueError, match="no index"):
        AppSession(sources["mlip"]).search("a red circle")
    with pytest.raises(ValueError, match="is another model"):
        AppSession(sources["plain"], str(session.index.path))
    assert split_labels(LABELS) == NAMES


def test_the_command_needs_gradio_and_says_so(sources, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert mlip(["app", sources["mlip"]]) == 1
    assert "pip install 'modeling-mlip[app]'" in capsys.readouterr().err


@pytest.fixture
def page_url(session, monkeypatch):
    pytest.importorskip("gradio", reason="the page needs the extra 'app'")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    page = build_page(session)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, url, _ = page.launch(server_name="127.0.0.1", server_port=port, prevent_thread_lock=True, quiet=True)
    yield url
    page.close()


def test_the_server_answers_each_tab(page_url, session, image, images):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(page_url, verbose=False)
    file = gradio_client.handle_file(str(sorted(images.rglob("*.png"))[3]))
    answer = client.predict(file, LABELS, api_name="/classify")
    scores = session.classify(image, LABELS)
    assert answer["label"] == max(scores, key=scores.get)
    assert {entry["label"]: entry["confidence"] for entry in answer["confidences"]} == pytest.approx(scores, abs=1e-5)
    summary, picture, table = client.predict(file, LABELS, 0.75, api_name="/merging")
    assert summary.startswith("64 patches → 16 tokens") and Path(picture).stat().st_size > 1000
    assert [row[0] for row in table["data"]] == NAMES
    gallery, table = client.predict("a red circle", None, api_name="/search")
    assert len(gallery) == len(table["data"]) == 12
    with pytest.raises(Exception, match="Choose an image first"):
        client.predict(None, LABELS, 0.75, api_name="/merging")


SIZES = {"wide": (1200, 900), "phone": (390, 844)}


@pytest.mark.parametrize("name", SIZES)
def test_the_page_works_in_a_browser(name, page_url, images):
    """With the variable SCREENSHOTS, a folder, it also saves the pictures of docs/search.md."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs an installed Chromium")
    file, folder = str(sorted(images.rglob("*.png"))[3]), os.environ.get("SCREENSHOTS")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        width, height = SIZES[name]
        page = browser.new_page(viewport={"width": width, "height": height})
        page.goto(page_url)
        panel = page.locator("[role=tabpanel]:visible")

        def finish(text: str, picture: str) -> None:
            panel.get_by_text(text).first.wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            if folder is not None:
                page.wait_for_load_state("networkidle")
                page.screenshot(path=f"{folder}/app_{picture}_{name}.png", full_page=True)

        def enter(button: str) -> None:
            panel.locator("input[type=file]").first.set_input_files(file)
            panel.get_by_role("textbox").first.fill("a red circle, a blue star, a green ring")
            panel.locator("img").first.wait_for()  # the upload is complete
            if button == "Show":
                panel.locator("input[type=range]").fill("0.75")
            panel.get_by_role("button", name=button, exact=True).click()

        enter("Classify")
        finish("%", "classify")
        page.get_by_role("tab", name="Merging").click()
        enter("Show")
        finish("64 patches → 16 tokens", "merging")
        page.get_by_role("tab", name="Search").click()
        panel.get_by_role("textbox").first.fill("a red circle")
        panel.get_by_role("button", name="Search", exact=True).click()
        finish(".png", "search")
        browser.close()
