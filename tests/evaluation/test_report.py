# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Tables line up, the model card's metadata parse and say what was measured, pictures show what they claim."""

import re

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers.pipelines import get_supported_tasks

from modeling_mlip import MLIPConfig
from modeling_mlip.evaluation.html_page import write_report
from modeling_mlip.evaluation.plots import retrieval_picture
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.hub.model_card import add_to_model_card, write_model_card
from modeling_mlip.training.learning_curves import plot_learning_curves

ROWS = [
    {"class": "shape", "accuracy": 71.238, "images": 5},
    {"class": "colour | of\nit", "accuracy": 100.0, "rate": 5e-5},
]


def test_plain_table_is_aligned():
    assert format_table(ROWS).splitlines() == [
        "class           accuracy  images   rate",
        "--------------  --------  ------  -----",
        "shape              71.24       5",
        "colour | of it    100.00          5e-05",
    ]
    assert format_table(ROWS, ["images", "class"]).splitlines()[2:] == ["     5  shape", "        colour | of it"]
    assert format_table([], ["metric"]).splitlines() == ["metric", "------"]


def test_markdown_table_is_aligned_and_no_cell_breaks_it():
    lines = format_table(ROWS, markdown=True).splitlines()
    assert lines[1] == "| --------------- | -------: | -----: | ----: |"
    assert lines[3] == r"| colour \| of it |   100.00 |        | 5e-05 |"
    assert len({len(line) for line in lines}) == 1


METRICS = {"eval_image_to_text_recall@1": np.float64(61.23), "eval_text_to_image_recall@1": 66.789, "accuracy@1": 12.5}


def write_card(folder, **changes):
    given = {
        "metrics": {**METRICS, "eval_runtime": 987.65, "eval_loss": 4.321},
        "config": MLIPConfig(merge_ratio=0.375),
        "dataset": "owner/pairs",
        "base_model": "openai/clip-vit-base-patch32",
        "training": {"steps": 1234, "output": "a | b"},
        "curves": "learning_curves.png",
    }
    folder.mkdir()
    (folder / "learning_curves.png").touch()
    path = write_model_card(folder, **{**given, **changes})
    assert path == folder / "README.md"
    return ModelCard.load(path)


def test_card_metadata_parse_and_hold_the_figures(tmp_path):
    card = write_card(tmp_path / "my-model")
    data = card.data
    assert (data.library_name, data.pipeline_tag) == ("transformers", "zero-shot-image-classification")
    assert (data.base_model, data.datasets, data.tags) == (
        "openai/clip-vit-base-patch32",
        ["owner/pairs"],
        ["mlip", "clip"],
    )
    assert data.model_name == "my-model"
    assert {(r.task_type, r.dataset_type, r.metric_type, r.metric_name, r.metric_value) for r in data.eval_results} == {
        ("image-text-retrieval", "owner/pairs", "recall", "image to text recall@1 (%)", 61.23),
        ("image-text-retrieval", "owner/pairs", "recall", "text to image recall@1 (%)", 66.79),
        ("zero-shot-image-classification", "owner/pairs", "accuracy", "accuracy@1 (%)", 12.5),
    }
    for said in ("61.23", "66.79", "12.50", "0.375", "1234", r"a \| b", 'name = "my-model"', "](learning_curves.png)"):
        assert said in card.text, said
    assert "987" not in card.content and "4.32" not in card.content  # neither a recall nor an accuracy
    assert "{{" not in card.content and "{%" not in card.content


def test_card_metadata_survive_the_hubs_own_readers(tmp_path):
    """What `ModelCard.validate` asks of the Hub, here of huggingface_hub's parsers, which drop what is malformed."""
    card = write_card(tmp_path / "model")
    again = ModelCard(card.content, ignore_metadata_errors=False)
    assert again.data.to_dict() == card.data.to_dict()
    [entry] = card.data.to_dict()["model-index"]
    assert entry["name"] == "model"
    for result in entry["results"]:
        assert set(result) == {"task", "dataset", "metrics"}
        assert all(isinstance(metric["value"], float) and metric["type"] for metric in result["metrics"])
    assert card.data.pipeline_tag in get_supported_tasks()


@pytest.mark.parametrize("license, readable", [("mit", True), ("cc-by-nc-4.0", True), (None, False)])
def test_card_takes_the_license_of_the_base_model(tmp_path, license, readable):
    base = tmp_path / "base"
    base.mkdir()
    if readable:
        (base / "README.md").write_text(f"---\nlicense: {license}\n---\n# Base\n")
    assert write_card(tmp_path / "model", base_model=str(base)).data.license == license
    assert write_card(tmp_path / "none", base_model=None).data.license == "apache-2.0"


def test_card_shows_what_each_merge_ratio_costs(tmp_path):
    rows = [{"merge ratio": ratio, "text to image recall@1 (%)": 60 - 10 * ratio} for ratio in (0, 0.5)]
    card = write_card(tmp_path / "model", merge_ratios=rows)
    assert "55.00" in card.text and "](merge_ratios.png)" in card.text
    assert Image.open(tmp_path / "model" / "merge_ratios.png").size[0] > 300
    assert "Merge ratios" not in write_card(tmp_path / "none").text


def test_card_leaves_out_what_is_not_given(tmp_path):
    card = write_card(
        tmp_path / "model", metrics={}, dataset=None, base_model=None, training={}, curves="no_such_picture.png"
    )
    assert card.data.eval_results is None and card.data.datasets is None and card.data.base_model is None
    for absent in ("None", "## Results", "## Training", "trained on", "starts from", "losses", "no_such_picture"):
        assert absent not in card.content.replace("pairs that it was trained on", ""), absent


def test_card_names_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private" / "clip").mkdir(parents=True)
    card = write_card(tmp_path / "other", dataset="train.parquet", measured_on="test.parquet")
    assert card.data.eval_results[0].dataset_name == "test.parquet" and "Measured on test.parquet" in card.text
    card = write_card(tmp_path / "model", dataset=str(tmp_path / "private" / "emoji"), base_model="private/clip")
    assert card.data.datasets is None and card.data.base_model is None
    assert card.data.eval_results[0].dataset_name == "emoji"
    assert "starts from clip" in card.text and "private" not in card.content


def test_card_says_which_losses_trained_it(tmp_path):
    config = MLIPConfig(frequency_layers=0, token_loss_weight=0.25)
    assert "InfoNCE + 0.25 x token-level InfoNCE (spatial features) |" in write_card(tmp_path / "a", config=config).text
    config = MLIPConfig(frequency_loss_weight=0.7, token_loss_weight=0)
    assert re.search(r"InfoNCE \+ 0.7 x frequency-caption InfoNCE +\|", write_card(tmp_path / "b", config=config).text)


def test_curves_are_drawn_for_what_was_logged_only(tmp_path):
    path = tmp_path / "curves.png"
    plot_learning_curves([{"step": 10, "train_runtime": 3.0, "train_loss": 2.0}], path)
    assert not path.exists()
    log = [{"step": step, "loss": 1 / step, "token_loss": 2 / step, "epoch": 1.0} for step in range(1, 9)]
    plot_learning_curves(log, path)
    one_panel = Image.open(path).size
    plot_learning_curves(log + [{"step": 8, "eval_mean_recall": 50.0}, {"step": 8, "logit_scale": 14.0}], path)
    three_panels = Image.open(path).size
    assert three_panels == (2 * one_panel[0], 2 * one_panel[1])


@pytest.mark.parametrize("num_images", [3, 20])
def test_right_images_are_framed_where_they_rank(tmp_path, num_images):
    embeds = torch.nn.functional.normalize(
        torch.randn(num_images, 8, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    images = [Image.new("RGB", (20, 20)) if n % 2 else np.zeros((20, 20, 3), np.uint8) for n in range(num_images)]
    captions = [f"costs {n}$ or {n + 1}$_" for n in range(num_images)]
    retrieval_picture(tmp_path / "right.png", images, captions, embeds, embeds, num_queries=2)
    red, green, blue = np.asarray(Image.open(tmp_path / "right.png").convert("RGB")).astype(int).transpose(2, 0, 1)
    columns = np.flatnonzero(((green > red + 80) & (green > blue + 80)).any(axis=0))
    second_place = 2.7 / (1.5 + min(5, num_images)) * green.shape[1]  # the caption is 1.5 images wide
    assert len(columns) and columns.max() < second_place
    retrieval_picture(tmp_path / "wrong.png", images, captions, embeds, -embeds, num_queries=2, top=2)
    red, green, blue = np.asarray(Image.open(tmp_path / "wrong.png").convert("RGB")).astype(int).transpose(2, 0, 1)
    assert not ((green > red + 80) & (green > blue + 80)).any()


def test_report_is_one_file_and_escapes(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    path = write_report(
        tmp_path, "Demo <1>", [("A & B", [{"class": "<b>", "hits": 71.238}])], [("It", tmp_path / "picture.png")]
    )
    (tmp_path / "picture.png").unlink()
    page = path.read_text(encoding="utf-8")
    assert path == tmp_path / "report.html"
    assert "Demo &lt;1&gt;" in page and "A &amp; B" in page and "<td>&lt;b&gt;</td><td class=number>71.24</td>" in page
    assert re.findall(r'src="(.{22})', page) == ["data:image/png;base64,"]


def test_evaluations_add_to_the_card_and_a_second_replaces_the_first(tmp_path):
    folder = tmp_path / "model"
    write_card(folder)
    base = {"dataset": "owner/pets", "split": "test", "merge_ratio": 0.5, "images": 40}
    add_to_model_card(folder, {**base, "zero_shot_label_accuracy@1": 10.0})
    add_to_model_card(folder, {**base, "zero_shot_label_accuracy@1": 11.111, "linear_probe_label_accuracy@1": 50.0})
    add_to_model_card(folder, {**base, "merge_ratio": 0.0, "few_shot_label_4_shots_accuracy@1": 30.0})
    card = ModelCard((folder / "README.md").read_text(), ignore_metadata_errors=False)
    found = {
        (r.task_type, r.dataset_type, r.dataset_split, r.metric_name, r.metric_value) for r in card.data.eval_results
    }
    zero_shot, images = "zero-shot-image-classification", "image-classification"
    assert {entry for entry in found if entry[1] == "owner/pets"} == {
        (zero_shot, "owner/pets", "test", "zero shot label accuracy@1 (%) at merge ratio 0.5", 11.11),
        (images, "owner/pets", "test", "linear probe label accuracy@1 (%) at merge ratio 0.5", 50.0),
        (images, "owner/pets", "test", "few shot label 4 shots accuracy@1 (%) at merge ratio 0", 30.0),
    }
    assert len(found) == 3 + 3  # those of training are still there
    assert card.text.count("## Evaluations") == 1 and "11.11" in card.text and "10.00" not in card.text
    assert card.text.index("## Results") < card.text.index("## Evaluations") < card.text.index("## Limits")


def test_card_tells_probes_from_zero_shot(tmp_path):
    metrics = {"linear_probe_label_accuracy@1": 70.0, "zero_shot_label_mean_per_class_accuracy": 20.0}
    results = write_card(tmp_path / "model", metrics=metrics).data.eval_results
    assert {(r.task_type, r.metric_value) for r in results} == {
        ("image-classification", 70.0),
        ("zero-shot-image-classification", 20.0),
    }
