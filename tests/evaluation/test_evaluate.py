# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip evaluate` on drawn images: each kind of model equals its own library, each kind of labels is read."""

import importlib.util
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from datasets import ClassLabel, Dataset
from evaluation_cases import run_evaluate
from huggingface_hub import ModelCard
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from transformers import CLIPModel, CLIPProcessor

from modeling_mlip import MLIPModel
from modeling_mlip.data import items as data
from modeling_mlip.data.collators import tokenize
from modeling_mlip.data.images import read_image
from modeling_mlip.data.shapes import PROMPTS
from modeling_mlip.data.sources import load_pairs, load_splits
from modeling_mlip.evaluation import classifiers as classification
from modeling_mlip.evaluation.classifiers import draw_shots, few_shot_accuracy, linear_probe_accuracy
from modeling_mlip.evaluation.encoders import load_encoder, set_merging
from modeling_mlip.evaluation.evaluation_split import prepare_split
from modeling_mlip.evaluation.labels import find_label_columns, read_classes
from modeling_mlip.evaluation.templates import DEFAULT_TEMPLATES, read_templates
from modeling_mlip.hub.cli import main as mlip

# Models


@torch.no_grad()
@pytest.mark.parametrize("kind", ["mlip", "clip", "open_clip"])
def test_each_kind_of_model_gives_the_zero_shot_accuracy_of_its_own_library(kind, sources, splits, files, tmp_path):
    rows, names = splits["validation"], splits["validation"].features["colour"].names
    flags = ["--validation_file", files["validation"], "--label_columns", "colour", "--templates", PROMPTS["colour"]]
    found = run_evaluate(sources[kind], tmp_path, *flags)
    prompts = [PROMPTS["colour"].format(name) for name in names]
    if kind == "open_clip":
        model, transform = open_clip.create_model_from_pretrained(sources[kind].removeprefix("open_clip:"))
        images = model.encode_image(torch.stack([transform(image) for image in rows["image"]]), normalize=True)
        texts = model.encode_text(open_clip.get_tokenizer("ViT-B-32")(prompts), normalize=True)
        scores = images @ texts.T
    else:
        model = (MLIPModel if kind == "mlip" else CLIPModel).from_pretrained(sources[kind]).eval()
        processor = CLIPProcessor.from_pretrained(sources[kind])
        inputs = processor(text=prompts, images=list(rows["image"]), padding=True, return_tensors="pt")
        scores = model(**inputs).logits_per_image
    hits = scores.argmax(dim=1) == torch.tensor(rows["colour"])
    assert found["zero_shot_colour_accuracy@1"] == pytest.approx(100 * hits.double().mean().item())
    assert {"text_to_image_recall@1", "mean_recall", "zero_shot_colour_mean_per_class_accuracy"} <= found.keys()


def test_a_caption_that_open_clip_cuts_is_counted_and_cut_as_it_does(sources):
    encoder = load_encoder(sources["open_clip"])
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    for text, cut in (("a cat!", 0), ("cat " * 75, 0), ("cat " * 76, 1), ("cat " * 200, 1), ("", 0)):
        ids, _, [length] = tokenize(encoder.tokenizer, [text], encoder.context)
        padded = torch.nn.functional.pad(ids, (0, 77 - ids.shape[1]), value=encoder.tokenizer.pad_token_id)
        assert padded.tolist() == tokenizer([text]).tolist()
        assert (length > encoder.context) == cut


def test_merging_is_set_on_mlip_models_alone(sources):
    encoder = load_encoder(sources["mlip"])
    set_merging(encoder, 0.25, "tome")
    vision = encoder.model.vision_model.config
    assert (encoder.merge_ratio, vision.merge_ratio, vision.merge_method) == (0.25, 0.25, "tome")
    assert all(layer.config.merge_method == "tome" for layer in encoder.model.vision_model.encoder.layers)
    with pytest.raises(ValueError, match="clip is not an MLIP model and merges no tokens.*mlip convert"):
        set_merging(load_encoder(sources["clip"]), 0.5)


# Labels


def test_a_folder_of_classes_is_classified_by_its_folders(sources, files, tmp_path, capsys):
    found = run_evaluate(sources["mlip"], tmp_path, "--data_dir", files["images"], "--templates", "a shape, {}")
    assert "text_to_image_recall@1" not in found
    assert found["images"] == 40 and 0 <= found["zero_shot_label_accuracy@1"] <= 100
    flags = ["--validation_file", files["validation"], "--label_columns", "texture", "--templates", "a shape, big {}"]
    by_column = run_evaluate(sources["mlip"], tmp_path, *flags)  # the same images and prompts from elsewhere
    assert found["zero_shot_label_accuracy@1"] == by_column["zero_shot_texture_accuracy@1"]
    assert "mean per class" in capsys.readouterr().out


def test_labels_of_every_kind_become_the_same_classes(splits):
    rows = splits["validation"]
    names = rows.features["shape"].names
    numbers = torch.tensor(rows["shape"])
    as_text = [names[n] for n in numbers]
    for values, given in ((as_text, None), (as_text, names), (numbers.tolist(), names)):
        classes = read_classes([Dataset.from_dict({"cls": values})], "cls", given)
        assert [classes.names[classes.label_of(value)] for value in values] == as_text
    assert read_classes([rows], "shape").names == names
    stream = Dataset.from_dict({"cls": as_text}).to_iterable_dataset()
    assert read_classes([stream], "cls", names).label_of("ring") == names.index("ring")


def test_label_columns_are_found_by_kind_then_by_name(splits):
    assert find_label_columns(splits["train"], []) == ["shape", "colour", "texture"]
    assert find_label_columns(Dataset.from_dict({"image": [1], "class": ["a"], "label": ["b"]}), []) == ["label"]
    with pytest.raises(ValueError, match="No column of class labels.*the columns are image, size"):
        find_label_columns(Dataset.from_dict({"image": [1], "size": [2]}), [])


def test_a_stream_of_labelled_images_gives_what_reading_gives(sources, files, tmp_path):
    flags = ["--data_dir", files["images"], "--templates", "a shape, {}", "--per_device_eval_batch_size", "7"]
    assert run_evaluate(sources["clip"], tmp_path, *flags) == run_evaluate(
        sources["clip"], tmp_path, *flags, "--streaming"
    )


def test_a_row_for_each_caption_is_evaluated_as_a_list_of_captions(sources, files, splits, tmp_path):
    """The layout of OpenCLIP's csv and of Flickr's own table."""
    rows = splits["validation"].select(range(12)).select_columns(["image"])
    captions = [[f"one of {n}", f"two of {n}"] for n in range(12)]
    rows.add_column("caption", captions).to_parquet(tmp_path / "listed.parquet")
    twice = rows.select([n for n in range(12) for _ in range(2)])
    twice.add_column("caption", [text for own in captions for text in own]).to_parquet(tmp_path / "rows.parquet")
    flags = ["--rerank", "3", "--per_device_eval_batch_size"]
    listed = run_evaluate(
        sources["mlip"], tmp_path, "--validation_file", str(tmp_path / "listed.parquet"), *flags, "12"
    )
    for batch_size in ("1", "5", "24"):  # also with batches that hold no new image
        found = run_evaluate(
            sources["mlip"], tmp_path, "--validation_file", str(tmp_path / "rows.parquet"), *flags, batch_size
        )
        assert found == listed | {"dataset": found["dataset"]}, batch_size
    assert (listed["images"], listed["captions"]) == (12, 24)


def test_classes_are_those_of_the_whole_data_set(sources, splits, tmp_path):
    names = splits["validation"].features["shape"].int2str
    paths = {}
    for split, left_out in (("train", None), ("validation", 0)):  # one class has images to train on alone
        rows = splits[split].filter(lambda row, left_out=left_out: row["shape"] != left_out)
        shapes = [names(row["shape"]) for row in rows]
        rows = rows.remove_columns(["caption", "shape", "colour", "texture"]).add_column("label", shapes)
        paths[split] = str(tmp_path / f"{split}.parquet")
        rows.to_parquet(paths[split])
    flags = ["--train_file", paths["train"], "--validation_file", paths["validation"], "--templates", "{}"]
    limited = run_evaluate(sources["mlip"], tmp_path, *flags, "--max_eval_samples", "1", "--shots", "1")
    assert limited["images"] == 1
    split = prepare_split(
        load_encoder(sources["mlip"]),
        load_splits(train_file=paths["train"], validation_file=paths["validation"]),
        with_captions=False,
        with_labels=True,
        max_eval_samples=1,
        max_train_samples=2,
    )
    assert len(split.classes[0].names) == len(set(splits["train"]["shape"]))
    assert (len(split.rows), len(split.train)) == (1, 2)


def test_class_labels_in_another_order_are_refused(splits):
    rows = splits["train"]
    turned = rows.cast_column("shape", ClassLabel(names=rows.features["shape"].names[::-1]))
    with pytest.raises(ValueError, match="shape is not the same in every split"):
        read_classes([rows, turned], "shape")
    with pytest.raises(ValueError, match="tags holds List.*a class label is"):
        read_classes([Dataset.from_dict({"tags": [["a", "b"]]})], "tags")
    with pytest.raises(ValueError, match=r"cls has 1 class\(es\) \(a\)"):
        read_classes([Dataset.from_dict({"cls": ["a", "a"]})], "cls")


def test_a_model_without_its_vocabulary_is_refused(sources, files, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(sources["mlip"], folder)
    (folder / "tokenizer.json").unlink()
    image = next(Path(files["images"]).rglob("*.png"))
    for command in (
        ["evaluate", "--model_name_or_path", str(folder), "--validation_file", files["validation"]],
        ["visualize", str(folder), "--image", str(image), "--output_dir", str(tmp_path / "out")],
        *(["train", "--model_name_or_path", str(folder), "--output_dir", str(tmp_path / "t"), "--train_file", path]
          for path in [files["train"]]),
    ):  # fmt: skip
        assert mlip(command) == 1
        assert "has no tokenizer.json" in capsys.readouterr().err


def test_broken_images_end_evaluation_as_soon_as_they_are_too_many(sources, files, splits, tmp_path, monkeypatch):
    rows = splits["validation"].select(range(40)).to_pandas()
    rows["image"] = [{"bytes": b"broken", "path": None}] * 12 + list(rows["image"][12:])
    rows.to_parquet(tmp_path / "rows.parquet")
    read = []
    monkeypatch.setattr(data, "read_image", lambda *args, **kwargs: read.append(1) or read_image(*args, **kwargs))
    flags = ["--validation_file", str(tmp_path / "rows.parquet"), "--per_device_eval_batch_size", "4"]
    assert mlip(["evaluate", "--model_name_or_path", sources["mlip"], *flags]) == 1
    assert len(read) == 4


def test_broken_rows_of_all_workers_of_a_stream_count(sources, files, tmp_path, capsys):
    folder = tmp_path / "images" / "train"
    for kind in ("a", "b"):
        (folder / kind).mkdir(parents=True)
        for number, image in enumerate(sorted(Path(files["images"]).rglob("*.png"))[:8]):
            shutil.copy(image, folder / kind / f"{number}.png")
        (folder / kind / "0.png").write_bytes(b"broken")
    (tmp_path / "names.txt").write_text("a\nb\n")
    flags = ["--data_dir", str(folder.parent), "--streaming", "--class_names", str(tmp_path / "names.txt")]
    for workers in ("0", "2"):
        more = ["--skip_budget", "0.1", "--dataloader_num_workers", workers]
        assert mlip(["evaluate", "--model_name_or_path", sources["mlip"], *flags, *more]) == 1
        assert "Skipped 2 of 16 pairs" in capsys.readouterr().err


# Classifiers on frozen features


def blobs(per_class: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.arange(7).repeat_interleave(per_class)
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(7, 10, generator=torch.Generator().manual_seed(0))
    return centres[labels] + 1.1 * torch.randn(len(labels), 10, generator=generator), labels


def test_linear_probe_equals_scikit_learn_at_the_strength_chosen():
    train, labels = blobs(30, 1)
    test, test_labels = blobs(20, 2)
    found = linear_probe_accuracy(train, labels, test, test_labels, 7)
    scaler = StandardScaler().fit(train)
    theirs = LogisticRegression(C=found["C"], max_iter=1000).fit(scaler.transform(train), labels)
    scores = theirs.predict_proba(scaler.transform(test))
    assert found["accuracy@1"] == pytest.approx(100 * (scores.argmax(1) == test_labels.numpy()).mean())
    best5 = np.argsort(-scores, axis=1)[:, :5]
    assert found["accuracy@5"] == pytest.approx(100 * (best5 == test_labels.numpy()[:, None]).any(1).mean())
    assert 60 < found["accuracy@1"] < 100


def test_few_shots_are_so_many_of_each_class_and_more_of_them_help():
    train, labels = blobs(30, 1)
    chosen = draw_shots(labels, 4, seed=3)
    assert labels[chosen].bincount().tolist() == [4] * 7
    assert set(draw_shots(labels, 2, seed=3).tolist()) < set(chosen.tolist())
    assert set(draw_shots(labels, 4, seed=4).tolist()) != set(chosen.tolist())
    test, test_labels = blobs(20, 2)
    one, many = (few_shot_accuracy(train, labels, test, test_labels, 7, shots, seeds=4) for shots in (1, 16))
    assert one["accuracy@1"] + 5 < many["accuracy@1"] < 100 and one["accuracy_spread"] > 0
    for seed in range(3):
        needed = torch.cat([draw_shots(labels, 4, seed), torch.arange(0, 210, 9)]).unique()
        among_fewer = needed[draw_shots(labels[needed], 4, seed, rows=needed)]
        assert set(among_fewer.tolist()) == set(draw_shots(labels, 4, seed).tolist())
    with pytest.raises(ValueError, match="shots=31: class 0 has 30 images"):
        draw_shots(labels, 31, seed=0)


def test_probes_of_the_command_classify_the_validation_split(sources, files, tmp_path):
    flags = ["--data_dir", files["images"], "--templates", "{}", "--shots", "2", "8", "--seeds", "2"]
    found = run_evaluate(sources["mlip"], tmp_path, *flags, "--linear_probe", "--update_model_card")
    for name in ("linear_probe_label_accuracy@1", "few_shot_label_2_shots_accuracy@1"):
        assert 0 <= found[name] <= 100
    assert "few_shot_label_8_shots_accuracy_spread" in found
    alone = run_evaluate(sources["mlip"], tmp_path, *flags)  # encodes the images drawn alone, in other batches
    for shots in (2, 8):
        name = f"few_shot_label_{shots}_shots_accuracy@1"
        assert alone[name] == pytest.approx(found[name], abs=1.3)  # one of 80 predictions
    card = ModelCard.load(f"{sources['mlip']}/README.md")
    results = {result.metric_name: result for result in card.data.eval_results}
    mine = results["linear probe label accuracy@1 (%) at merge ratio 0.5"]
    assert mine.task_type == "image-classification" and mine.dataset_split == "validation"
    assert mine.metric_value == pytest.approx(found["linear_probe_label_accuracy@1"], abs=0.01)
    assert results["zero shot label accuracy@1 (%) at merge ratio 0.5"].task_type == "zero-shot-image-classification"


def test_a_broken_image_does_not_cost_a_class_its_shots(sources, files, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(files["images"], folder)
    flags = ["--data_dir", str(folder), "--templates", "{}", "--shots", "3", "--seeds", "1", "--skip_budget", "0.5"]
    classes = sorted(path.name for path in (folder / "train").iterdir())
    own = sorted((folder / "train" / classes[0]).iterdir())
    drawn = draw_shots(torch.zeros(len(own), dtype=torch.long), 3, seed=0)  # the first class comes first
    own[drawn[0]].write_bytes(b"broken")
    assert 0 <= run_evaluate(sources["mlip"], tmp_path, *flags)["few_shot_label_3_shots_accuracy@1"] <= 100
    for path in own:
        path.write_bytes(b"broken")
    assert mlip(["evaluate", "--model_name_or_path", sources["mlip"], *flags]) == 1
    name = classes[0].replace("_", " ")
    assert f"No image of label '{name}' in the train split can be used" in capsys.readouterr().err


# Re-ranking


def test_reranking_reports_both_and_changes_something(sources, files, tmp_path):
    flags = ["--validation_file", files["validation"], "--rerank", "15"]
    found = run_evaluate(sources["mlip"], tmp_path, *flags)
    names = [f"{direction}_recall@{k}" for direction in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    plain = {name: found[name] for name in names}
    assert all(name.replace("recall", "reranked_recall") in found for name in plain)
    assert any(found[name.replace("recall", "reranked_recall")] != value for name, value in plain.items())
    unchanged = run_evaluate(sources["mlip"], tmp_path, *flags, "--rerank_weight", "0")
    assert unchanged["mean_reranked_recall"] == unchanged["mean_recall"] == found["mean_recall"]


# Templates


def test_templates_come_from_flags_files_and_open_clip(tmp_path):
    assert read_templates("a {}") == ("a {}",)
    assert read_templates("default") == DEFAULT_TEMPLATES
    theirs = open_clip.zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES
    assert [template.replace("{}", "cat") for template in read_templates("openai")] == [make("cat") for make in theirs]
    (tmp_path / "mine.txt").write_text("a {}\n\nthe {}.\n")
    assert read_templates(str(tmp_path / "mine.txt")) == ("a {}", "the {}.")
    (tmp_path / "mine.txt").write_bytes("\ufeffa {}\n".encode())  # as some editors save
    assert read_templates(str(tmp_path / "mine.txt")) == ("a {}",)


# Bad input


def bad_input(sources, files, tmp_path) -> list[tuple[list[str], str]]:
    (tmp_path / "two.txt").write_text("one\ntwo\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9 {}\n".encode("latin-1"))
    pairs, images = ["--validation_file", files["validation"]], ["--data_dir", files["images"]]
    mlip_model = ["--model_name_or_path", sources["mlip"]]
    return [
        (pairs, "Give the model to evaluate as --model_name_or_path"),
        (["--model_name_or_path", sources["plain"], *pairs, "--rerank", "5"], "has token_loss_weight=0"),
        (["--model_name_or_path", sources["clip"], *pairs, "--rerank", "5"], "is not an MLIP model"),
        (["--model_name_or_path", sources["clip"], *pairs, "--merge_ratio", "0.5"], "merges no tokens"),
        (["--model_name_or_path", "open_clip:ViT-B-23", *pairs], "no model 'ViT-B-23'; the nearest names are ViT-B-32"),
        (["--model_name_or_path", "open_clip:ViT-B-32", *pairs], "give the weights, as open_clip:ViT-B-32:TAG"),
        ([*mlip_model, *images, "--rerank", "5"], "reranking: no column of captions has a usual name"),
        ([*mlip_model, *images, "--templates", "no place"], "'no place' has no {} for the class name"),
        ([*mlip_model, *images, "--class_names", str(tmp_path / "two.txt")], "has 2 names, and label has 3 classes"),
        ([*mlip_model, *pairs, "--label_columns", "size"], "label_columns=size: no such column"),
        (
            [*mlip_model, *pairs, "--linear_probe"],
            "linear_probe: choose the columns of labels with --label_columns NAME",
        ),
        (
            [*mlip_model, *pairs, "--label_columns", "shape", "--shots", "1"],
            "few_shots: give a data set with a train and a validation split",
        ),
        ([*mlip_model, *images, "--shots", "1000"], "shots=1000: class 'big"),
        ([*mlip_model, *pairs, "--output_file", str(tmp_path / "none" / "x.json")], "there is no folder"),
        (["--model_name_or_path", sources["clip"], *pairs, "--update_model_card"], "has no README.md"),
        ([*mlip_model, *pairs, "--output_file", str(tmp_path)], "is a folder; name a file"),
        ([*mlip_model, *images, "--templates", str(tmp_path / "latin.txt")], "latin.txt is not UTF-8"),
        ([*mlip_model, *pairs, "--max_seq_length", "100"], "takes 3 (BOS, one token, EOS) to"),
        ([*mlip_model, *images, "--max_seq_length", "1"], "max_seq_length=1:"),
        ([*mlip_model, *pairs, "--templates", "a {}"], "has no effect: the task zero_shot does not run"),
        ([*mlip_model, *pairs, "--seeds", "2"], "seeds=2 has no effect: the task few_shots does not run"),
        ([*mlip_model, *images, "--shots", "0"], "shots=[0]: choose 1 or more"),
        ([*mlip_model, *pairs, "--rerank", "-1"], "rerank=-1: choose 0 or more"),
        ([*mlip_model, *pairs, "--rerank", "5", "--rerank_weight", "nan"], "rerank_weight=nan: choose a finite"),
        ([*mlip_model, *pairs, "--skip_budget", "nan"], "skip_budget=nan: choose a share from 0 to 1"),
        ([*mlip_model, *pairs, "--per_device_eval_batch_size", "0"], "per_device_eval_batch_size=0: choose 1 or more"),
        ([*mlip_model, *pairs, "--merge_ratio", "nan"], "merge_ratio"),
        ([*mlip_model, *pairs, "--caption_policy", "first"], "--caption_policy"),
        (["--model_name_or_path", f"open_clip:RN50:{tmp_path / 'two.txt'}", *pairs], "could not be loaded"),
    ]


def test_bad_input_is_refused_in_one_line_that_names_it(sources, files, tmp_path, capsys):
    for flags, message in bad_input(sources, files, tmp_path):
        assert mlip(["evaluate", *flags]) == 1, flags
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("mlip evaluate: error:") and message in line, (flags, line)


def test_images_beside_a_table_get_a_hint_that_names_it(sources, splits, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number, row in enumerate(splits["validation"].select(range(3))):
        row["image"].save(folder / f"{number}.png")
    flags = ["--model_name_or_path", sources["mlip"], "--data_dir", str(folder)]
    for command in ("evaluate", "benchmark"):
        assert (
            mlip([command, *flags, *(["--output_dir", str(tmp_path / "out")] if command == "benchmark" else [])]) == 1
        )
        assert "add one with the columns file_name and caption" in capsys.readouterr().err
    (folder / "captions.csv").write_text("image,caption\n0.png,a red star\n")
    hint = "rename captions.csv to metadata.csv with the columns file_name and caption, or give it as "
    assert mlip(["evaluate", *flags]) == 1
    assert f"{hint}validation_file" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"{hint}train_file"):
        load_pairs(data_dir=str(folder))


def test_without_scikit_learn_probes_say_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'modeling-mlip\[evaluate\]'"):
        classification.require_sklearn()


def test_a_label_that_is_no_class_is_skipped_and_counted(sources, files, splits, tmp_path, capsys):
    rows = splits["validation"].remove_columns(["caption", "colour", "texture"]).select(range(6))
    rows = rows.add_column("label", ["a", "b", "c", "a", "b", "c"]).remove_columns("shape")
    rows.to_parquet(tmp_path / "rows.parquet")
    (tmp_path / "names.txt").write_text("a\nb\n")
    flags = ["--validation_file", str(tmp_path / "rows.parquet"), "--class_names", str(tmp_path / "names.txt")]
    assert run_evaluate(sources["clip"], tmp_path, *flags, "--skip_budget", "0.5")["images"] == 4
    assert mlip(["evaluate", "--model_name_or_path", sources["clip"], *flags]) == 1
    assert "label='c' is none of the 2 classes" in capsys.readouterr().err
