# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`evaluate` in Python equals the command; a new task needs a class and an entry; nothing is encoded twice."""

import pickle
from dataclasses import dataclass, field

import pytest
import torch
from datasets import DatasetDict
from evaluation_cases import run_evaluate
from transformers import CLIPModel

from modeling_mlip import MLIPModel
from modeling_mlip.data.shapes import PROMPTS
from modeling_mlip.evaluation import TASKS, FewShots, LinearProbe, Reranking, Retrieval, Task, ZeroShot, evaluate
from modeling_mlip.evaluation.encoders import load_encoder, make_encoder, set_merging
from modeling_mlip.evaluation.runner import prepare_tasks, run_tasks
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.hub.loading import load_processor
from modeling_mlip.hub.results import Result, values_by_name


@pytest.fixture
def model(sources):
    return MLIPModel.from_pretrained(sources["mlip"])


@pytest.fixture(scope="module")
def processor(sources):
    return load_processor(sources["mlip"])


# The library function


def test_evaluate_equals_the_command(model, processor, sources, splits, files, tmp_path):
    tasks = [Retrieval(), ZeroShot(templates=[PROMPTS["colour"]]), Reranking(rerank=5), "linear_probe"]
    tasks.append(FewShots(shots=[1, 2], seeds=2))
    model.train()
    results = evaluate(model, processor, splits, tasks, label_columns=["colour"])
    assert model.training
    flags = ["--train_file", files["train"], "--validation_file", files["validation"], "--label_columns", "colour"]
    flags += ["--templates", PROMPTS["colour"], "--rerank", "5", "--linear_probe", "--shots", "1", "2", "--seeds", "2"]
    theirs = run_evaluate(sources["mlip"], tmp_path, *flags)
    ours = values_by_name(results)
    assert ours == {name: theirs[name] for name in ours}
    assert len(ours) == 7 + 6 + 3 + 7 + 3 + 4  # six by caption length: some captions have more than 20 tokens
    assert {result.task for result in results} == set(TASKS)
    assert {(result.split, result.setting["merge_ratio"]) for result in results} == {("validation", 0.5)}
    assert results[-1].setting == {"column": "colour", "shots": 2, "seeds": 2, "merge_ratio": 0.5}


def test_evaluate_takes_one_split_a_stream_and_a_clip_model(model, processor, sources, splits):
    rows = splits["validation"]
    results = evaluate(model, processor, rows)
    assert values_by_name(results) == values_by_name(evaluate(model, processor, rows.to_iterable_dataset()))
    assert values_by_name(results) == values_by_name(evaluate(model, processor, splits, "retrieval"))
    clip = CLIPModel.from_pretrained(sources["clip"])
    found = evaluate(clip, processor, rows, ["zero_shot"], batch_size=7)
    assert [result.setting["column"] for result in found if result.k == 1] == ["shape", "colour", "texture"]
    assert values_by_name(evaluate(model, processor, DatasetDict(test=rows))) == values_by_name(results)
    only = evaluate(model, processor, splits, split="train", max_train_samples=30, max_eval_samples=5)
    assert only[0].split == "train"


def test_what_cannot_be_evaluated_is_refused_before_anything_is_encoded(model, processor, splits, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("encoded")

    monkeypatch.setattr(model, "get_image_features", refuse)
    monkeypatch.setattr(model, "get_text_features", refuse)
    rows = splits["validation"]
    cases = [
        ({"tasks": ["retrival"]}, "tasks='retrival': no such task; choose from retrieval, zero_shot"),
        ({"tasks": []}, r"tasks=\[\]: give at least one"),
        ({"tasks": [Reranking()]}, "rerank=0: choose the number of candidates"),
        ({"tasks": [FewShots()], "label_columns": ["shape"], "dataset": splits}, r"shots=\[\]: choose one or more"),
        ({"tasks": [LinearProbe()]}, "linear_probe: give a data set with a train and a validation split"),
        ({"tasks": ["retrieval", "zero_shot"]}, "zero_shot: choose the columns of labels with label_columns"),
        ({"label_columns": ["shape"]}, "none of the tasks reads class labels"),
        ({"dataset": rows.remove_columns("caption")}, "retrieval: no column of captions has a usual name"),
        ({"dataset": splits, "split": "dev"}, "split='dev': no such split; the data set has 'train', 'validation'"),
        ({"batch_size": 0}, "batch_size=0: choose 1 or more"),
        ({"skip_budget": float("nan")}, "skip_budget=nan: choose a share"),
        ({"max_seq_length": 999}, "max_seq_length=999: MLIPModel takes 3"),
        ({"class_names": ["a", "b"]}, "class_names names the classes of one column, and 0 are classified"),
        ({"tasks": [FewShots(shots=[999])], "dataset": splits}, "shots=999: class '"),
    ]
    for keys, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            evaluate(model, processor, **{"dataset": rows, **keys})
        assert "--" not in str(caught.value)  # a parameter, not a flag
    with pytest.raises(ValueError, match="few_shots has no option 'shot'; it has shots, seeds"):
        FewShots(shot=[1])


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_a_model_that_computes_nan_is_refused_rather_than_given_zero_percent(tower, model, processor, splits):
    with torch.no_grad():
        next(getattr(model, tower).parameters()).fill_(float("nan"))
    with pytest.raises(ValueError, match="40 of 40 (image|caption) embeddings are not finite"):
        evaluate(model, processor, splits["validation"])


@pytest.mark.parametrize("kind", ["mlip", "clip", "open_clip"])
@pytest.mark.parametrize("task", [Retrieval(), ZeroShot()])
def test_what_goes_to_workers_can_be_pickled(kind, task, sources, splits):
    """Workers that are spawned, the default on macOS and Windows, receive it as a pickle."""
    encoder = load_encoder(sources[kind])
    dataloader = prepare_tasks(encoder, splits["validation"], [task]).dataloader
    dataset, collate_fn = pickle.loads(pickle.dumps((dataloader.dataset, dataloader.collate_fn)))
    ours, theirs = collate_fn([dataset[0], dataset[1]]), next(iter(dataloader))
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"][:2])


# Shared encodings


def test_tasks_share_every_encoding(model, processor, splits, monkeypatch):
    counts = {"images": 0, "texts": 0}
    images, texts = model.get_image_features, model.get_text_features

    def count_images(pixel_values, **kwargs):
        counts["images"] += len(pixel_values)
        return images(pixel_values=pixel_values, **kwargs)

    def count_texts(input_ids, **kwargs):
        counts["texts"] += len(input_ids)
        return texts(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "get_image_features", count_images)
    monkeypatch.setattr(model, "get_text_features", count_texts)
    tasks = [Retrieval(), Reranking(rerank=3), ZeroShot(templates=["{}"]), LinearProbe(), FewShots(shots=[1], seeds=1)]
    evaluate(model, processor, splits, tasks, label_columns=["shape"])
    classes = len(splits["train"].features["shape"].names)
    assert counts == {"images": 40 + 120, "texts": 40 + classes}


def test_several_settings_in_one_pass_equal_an_evaluation_each(model, processor, splits):
    encoder = make_encoder("model", model.eval(), processor)
    tasks = [Retrieval(), Reranking(rerank=3), LinearProbe()]
    split = prepare_tasks(encoder, splits, tasks, label_columns=["colour"])
    settings = [lambda: set_merging(encoder, 0.0), lambda: set_merging(encoder, 0.7)]
    together = run_tasks(encoder, split, tasks, settings)
    for apply_setting, evaluation, ratio in zip(settings, together, (0.0, 0.7), strict=True):
        apply_setting()
        [alone] = run_tasks(encoder, split, tasks)
        assert evaluation.results == alone.results
        assert {result.setting["merge_ratio"] for result in alone.results} == {ratio}
    assert values_by_name(together[0].results) != values_by_name(together[1].results)


# A new task: a class, and an entry in TASKS


@dataclass
class ToyOptions:
    """The toy task."""

    toy_power: int = field(default=0, metadata={"help": "The power of the mean embedding's length; 0 does not run."})

    def __post_init__(self):
        if self.toy_power < 0:
            raise ValueError(f"toy_power={self.toy_power}: choose 0 or more.")


class Toy(Task):
    """The length of the mean image embedding."""

    name = "toy"
    Options = ToyOptions

    def is_requested(self, is_captioned, label_columns):
        return self.options.toy_power > 0

    def encode(self, encoder, split):
        return 100.0

    def metrics(self, encoder, split, encodings, encoded):
        length = encodings.pairs.image_embeds.mean(dim=0).norm().item()
        return [Result(self.name, "length", None, encoded * length**self.options.toy_power)]


def test_a_task_is_one_class_and_one_entry(model, processor, sources, splits, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TASKS, "toy", Toy)
    flags = ["--validation_file", files["validation"]]
    found = run_evaluate(sources["mlip"], tmp_path, *flags, "--toy_power", "2", "--update_model_card")
    assert "toy length" in capsys.readouterr().out
    [result] = evaluate(model, processor, splits["validation"], [Toy(toy_power=2)], split="validation")
    assert (result.name, result.split, result.setting) == ("toy_length", "validation", {"merge_ratio": 0.5})
    assert found["toy_length"] == pytest.approx(result.value) and 0 < result.value < 100
    assert "toy length (%) at merge ratio 0.5" in open(f"{sources['mlip']}/README.md").read()
    assert "toy_length" not in run_evaluate(sources["mlip"], tmp_path, *flags)
    command = ["evaluate", "--model_name_or_path", sources["mlip"], *flags]
    assert mlip([*command, "--toy_power", "-1"]) == 1
    assert "toy_power=-1: choose 0 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        mlip(["evaluate", "--help"])
    assert "--toy_power" in capsys.readouterr().out


def test_option_names_are_unique_among_tasks():
    names = [name for task in TASKS.values() for name in task.Options.__dataclass_fields__]
    assert len(names) == len(set(names))
    for task in TASKS.values():
        for option in task.Options.__dataclass_fields__.values():
            assert option.metadata["help"]


def test_retrieval_reports_the_recall_of_short_and_long_captions(model, processor, splits):
    rows = splits["validation"].select(range(8))
    captions = [caption if n % 2 else f"{caption} {'red ' * 30}" for n, caption in enumerate(rows["caption"])]
    mixed = rows.remove_columns("caption").add_column("caption", captions)
    found = {result.name: result for result in evaluate(model, processor, mixed, tasks=["retrieval"])}
    groups = ("up_to_20_tokens", "21_to_77_tokens")  # the second one is longer than the context of 20 tokens
    names = [f"text_to_image_{group}_recall@{k}" for group in groups for k in (1, 5, 10)]
    assert set(names) <= set(found) and len(found) == 7 + len(names)
    assert found[names[0]].setting["caption_length"] == "up_to_20_tokens"
    mean = sum(found[f"text_to_image_{group}_recall@1"].value for group in groups) / 2
    assert mean == pytest.approx(found["text_to_image_recall@1"].value)
