# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Model cards: their metadata parse, hold what was measured, and name nothing of this machine; their snippets run."""

import getpass
import re
import socket
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from PIL import Image
from transformers.pipelines import get_supported_tasks

from modeling_mlip import MLIPConfig
from modeling_mlip.hub.model_card import add_to_model_card, write_model_card
from modeling_mlip.hub.results import CLASSIFICATION_TASK, RETRIEVAL_TASK, Result


def recall(direction: str, value: float, **setting) -> Result:
    return Result("retrieval", "recall", 1, value, None, setting, direction, RETRIEVAL_TASK)


RESULTS = [
    recall("image_to_text", 61.23),
    recall("text_to_image", 66.789),
    Result("zero_shot", "accuracy", 1, 12.5, prefix="zero_shot_label"),
]


def write_card(folder, **changes):
    given = {
        "results": RESULTS,
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


def test_metadata_parse_and_hold_the_figures(tmp_path):
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
        ("zero-shot-image-classification", "owner/pairs", "accuracy", "zero shot label accuracy@1 (%)", 12.5),
    }
    for expected in ("61.23", "66.79", "12.50", "0.375", "1234", r"a \| b", "# my-model", "](learning_curves.png)"):
        assert expected in card.text, expected
    assert "{{" not in card.content and "{%" not in card.content


def test_metadata_survive_the_hubs_own_readers(tmp_path):
    """`ModelCard.validate` asks the Hub; here huggingface_hub's parsers, which drop malformed entries, are asked."""
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
def test_the_license_is_that_of_the_base_model(tmp_path, license, readable):
    base = tmp_path / "base"
    base.mkdir()
    if readable:
        (base / "README.md").write_text(f"---\nlicense: {license}\n---\n# Base\n")
    assert write_card(tmp_path / "model", base_model=str(base)).data.license == license
    assert write_card(tmp_path / "none", base_model=None).data.license == "apache-2.0"


def test_results_at_several_merge_ratios_are_a_table_and_a_picture(tmp_path):
    results = [recall("text_to_image", 60 - 10 * ratio, merge_ratio=ratio, patch_tokens=64) for ratio in (0, 0.5)]
    card = write_card(tmp_path / "model", merge_ratios=results)
    assert "55.00" in card.text and "patch tokens left" in card.text and "](merge_ratios.png)" in card.text
    assert Image.open(tmp_path / "model" / "merge_ratios.png").size[0] > 300
    assert "Merge ratios" not in write_card(tmp_path / "none").text


def test_what_is_not_given_is_left_out(tmp_path):
    card = write_card(
        tmp_path / "model", results=[], dataset=None, base_model=None, training={}, curves="no_such_picture.png"
    )
    assert card.data.eval_results is None and card.data.datasets is None and card.data.base_model is None
    for absent in ("None", "## Results", "## Training", "## Conversion", "was trained on", "starts from", "losses"):
        assert absent not in card.content.replace("pairs that it was trained on", ""), absent
    assert "no_such_picture" not in card.content


def test_no_card_names_a_path_the_user_or_the_host(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private" / "clip").mkdir(parents=True)
    private = str(tmp_path / "private")
    cards = [
        write_card(tmp_path / "a", dataset="train.parquet", measured_on="test.parquet"),
        write_card(tmp_path / "b", dataset=f"{private}/emoji", base_model="private/clip"),
        write_card(
            tmp_path / "c",
            conversion={
                "source": f"{private}/clip",
                "notes": [f"{private}/clip has no tokenizer"],
                "reports": [f"Parity with {private}/clip"],
            },
        ),
    ]
    (tmp_path / "b" / "README.md").write_text(cards[1].content)
    split = [Result("retrieval", "recall", 1, 1.0, "test", {"merge_ratio": 0.5}, "text_to_image", RETRIEVAL_TASK)]
    cards.append(ModelCard.load(add_to_model_card(tmp_path / "b", split, dataset=f"{private}/test.parquet")))
    for card in cards:
        for name in (str(tmp_path), "private", getpass.getuser() + "@", f"@{socket.gethostname()}"):
            assert name not in card.content, name
        assert not re.search(r"(?<![\w:/.])/(?:home|root|tmp|work|Users)/", card.content)
    assert "Measured on test.parquet" in cards[0].text and cards[0].data.eval_results[0].dataset_name == "test.parquet"
    assert cards[1].data.datasets is None and cards[1].data.base_model is None
    assert cards[1].data.eval_results[0].dataset_name == "emoji" and "starts from clip" in cards[1].text
    assert "from `clip`" in cards[2].text and "- clip has no tokenizer" in cards[2].text
    assert "test.parquet" in cards[3].text


def test_the_losses_of_training_are_named(tmp_path):
    config = MLIPConfig(frequency_layers=0, token_loss_weight=0.25)
    assert "InfoNCE + 0.25 x token-level InfoNCE (spatial features) |" in write_card(tmp_path / "a", config=config).text
    config = MLIPConfig(frequency_loss_weight=0.7, token_loss_weight=0)
    assert re.search(r"InfoNCE \+ 0.7 x frequency-caption InfoNCE +\|", write_card(tmp_path / "b", config=config).text)


def test_evaluations_add_to_the_card_and_a_second_replaces_the_first(tmp_path):
    folder = tmp_path / "model"
    write_card(folder)

    def result(prefix, value, ratio=0.5, task=CLASSIFICATION_TASK, **keys):
        return Result("any", keys.get("metric", "accuracy"), 1, value, "test", {"merge_ratio": ratio}, prefix, task)

    zero_shot = {"prefix": "zero_shot_label", "task": "zero-shot-image-classification"}
    add_to_model_card(folder, [result(value=10.0, **zero_shot)], dataset="owner/pets")
    second = [result(value=11.111, **zero_shot), result("linear_probe_label", 50.0)]
    add_to_model_card(folder, second, dataset="owner/pets")
    add_to_model_card(folder, [result("few_shot_label_4_shots", 30.0, ratio=0.0)], dataset="owner/pets")
    card = ModelCard((folder / "README.md").read_text(), ignore_metadata_errors=False)
    found = {
        (r.task_type, r.dataset_type, r.dataset_split, r.metric_name, r.metric_value) for r in card.data.eval_results
    }
    images = "image-classification"
    assert {entry for entry in found if entry[1] == "owner/pets"} == {
        (zero_shot["task"], "owner/pets", "test", "zero shot label accuracy@1 (%) at merge ratio 0.5", 11.11),
        (images, "owner/pets", "test", "linear probe label accuracy@1 (%) at merge ratio 0.5", 50.0),
        (images, "owner/pets", "test", "few shot label 4 shots accuracy@1 (%) at merge ratio 0", 30.0),
    }
    assert len(found) == 3 + 3  # the results of training are still there
    assert card.text.count("## Evaluations") == 1 and "11.11" in card.text and "10.00" not in card.text
    assert card.text.index("## Results") < card.text.index("## Evaluations") < card.text.index("## Limits")
    with pytest.raises(ValueError, match="has no split"):
        add_to_model_card(folder, RESULTS, dataset="owner/pets")
    assert ModelCard.load(folder / "README.md").content == card.content


def test_a_converted_folder_has_a_card_with_its_notes_and_parity(tmp_path):
    conversion = {"source": "owner/clip", "notes": ["Note one.", "Note two."], "reports": ["passed: worst 1e-6"]}
    unmeasured = {"results": [], "dataset": None, "training": {}, "curves": None}
    card = write_card(
        tmp_path / ".target.x1", base_model="owner/clip", conversion=conversion, name="target", **unmeasured
    )
    assert card.text.lstrip().startswith("# target\n") and ".target" not in card.content
    assert card.data.base_model == "owner/clip"
    assert "converted by `mlip convert` from `owner/clip`" in card.text
    assert "\n- Note one.\n- Note two.\n" in card.text and "\n```\npassed: worst 1e-6\n```\n" in card.text
    assert 'name = "path/to/target"' in card.text
    exported = write_card(tmp_path / "exported", config=None, base_model=None, conversion=conversion, **unmeasured)
    assert "set_merge_ratio" not in exported.text and "pixels" not in exported.text and "None" not in exported.text
    assert "## Conversion" in exported.text


def test_the_snippets_run_from_any_folder(sources, tmp_path, monkeypatch):
    """The first code block of the card with the path filled in, with a caption longer than the context."""
    card = (Path(sources["mlip"]) / "README.md").read_text()
    name = Path(sources["mlip"]).name
    assert f'"path/to/{name}"' in card
    snippets = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    code = "\n".join(snippets).replace(f"path/to/{name}", sources["mlip"])
    code = code.replace("a photo of a cat", "a photo of a cat " * 50)
    monkeypatch.chdir(tmp_path)
    Image.new("RGBA", (40, 30)).save("picture.png")
    values: dict = {}
    exec(code, values)
    assert values["probabilities"].shape == (1, 2)
    assert values["model"].config.vision_config.merge_ratio == 0.5
