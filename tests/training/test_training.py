# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""MLIPTrainer and the two commands, on a few drawn pairs."""

import copy
import json
import math
import os
import subprocess
import sys

import datasets
import numpy as np
import pytest
import torch
from conftest import TEXT, small_config
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, CLIPConfig, CLIPModel, CLIPProcessor, TrainerCallback, pipeline

from modeling_mlip import MLIPModel
from modeling_mlip.data.arguments import DataArguments
from modeling_mlip.data.items import PairDataset, build_pairs, image_transform
from modeling_mlip.data.shapes import shapes_dataset
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.hub.configurations import NAMED_CONFIGS, named_config, override_config
from modeling_mlip.losses import MAX_LOGIT_SCALE, PairEmbeddings
from modeling_mlip.training.arguments import MLIPTrainingArguments, ModelArguments
from modeling_mlip.training.step_guard import StepGuard
from modeling_mlip.training.train import build_processor
from modeling_mlip.training.trainer import MLIPTrainer

SMALL = ["--hidden_size", "48", "--num_hidden_layers", "2", "--num_attention_heads", "3", "--patch_size", "16"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> tuple[str, str]:
    """Paths of two parquet files of drawn pairs, to train and to evaluate on."""
    folder = tmp_path_factory.mktemp("drawn")
    splits = shapes_dataset(num_train=48, num_validation=24)
    paths = []
    for name, split in splits.items():
        paths.append(str(folder / f"{name}.parquet"))
        split.to_parquet(paths[-1])
    return paths[0], paths[1]


@pytest.fixture(scope="module")
def trained(drawn, tmp_path_factory) -> str:
    """A folder that `mlip train` left."""
    folder = str(tmp_path_factory.mktemp("runs") / "first")
    assert mlip(train_flags(drawn, folder)) == 0
    return folder


def train_flags(drawn: tuple[str, str], folder: str, *more: str) -> list[str]:
    flags = ["train", "--train_file", drawn[0], "--validation_file", drawn[1], "--output_dir", folder]
    start = [] if "--model_name_or_path" in more else ["--config_name", "tiny", "--merge_ratio", "0.5", *SMALL]
    schedule = ["--max_steps", "4", "--per_device_train_batch_size", "16", "--logging_steps", "1", "--use_cpu"]
    return [*flags, *start, *schedule, *more]


def test_a_data_set_trains_as_the_items_made_of_it(drawn, tmp_path):
    """What a user of Trainer tries first: rows of `datasets`, with no class of ours."""
    rows = datasets.load_dataset("parquet", data_files={"train": drawn[0], "validation": drawn[1]})
    found = []
    for name in ("rows", "items"):
        torch.manual_seed(0)
        plain = make_trainer(tmp_path / name, drawn)
        processor, splits = plain.processing_class, dict(rows)
        if name == "items":
            splits = {
                split: build_pairs(own, processor, seed=42, training=split == "train") for split, own in splits.items()
            }
        trainer = MLIPTrainer(plain.model, plain.args, splits["train"], splits["validation"], processor)
        trainer.train()
        found.append((trainer.evaluate(), trainer.evaluate(splits["validation"]), trainer.model.state_dict()))
        assert found[-1][0]["eval_mean_recall"] == found[-1][1]["eval_mean_recall"]
    assert all(torch.equal(found[1][2][name], value) for name, value in found[0][2].items())
    with pytest.raises(ValueError, match="No image column"):
        MLIPTrainer(plain.model, plain.args, datasets.Dataset.from_dict({"text": ["a"]}), None, processor)


def make_trainer(tmp_path, drawn, model=None, rows=None, **arguments) -> MLIPTrainer:
    rows = rows if rows is not None else datasets.load_dataset("parquet", data_files=drawn[0])["train"]
    config = override_config(named_config("tiny"), dict(hidden_size=48, num_hidden_layers=2, patch_size=16))
    captions = datasets.load_dataset("parquet", data_files=drawn[0])
    processor = build_processor(ModelArguments(config_name="tiny"), DataArguments(), config, captions)
    config.text_config.vocab_size = len(processor.tokenizer)
    model = model or MLIPModel(config)
    transform = image_transform(processor.image_processor)
    pairs = [PairDataset(rows, "image", "caption", transform, training=t, seed=0) for t in (True, False)]
    args = MLIPTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", **{"max_steps": 2, "per_device_train_batch_size": 8, **arguments}
    )
    return MLIPTrainer(model, args, train_dataset=pairs[0], eval_dataset=pairs[1], processor=processor)


# The merge ratio on its way


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_the_merge_ratio_moves_in_a_line_from_the_first_step_to_the_last(tmp_path, drawn, mini_batch_size):
    trainer = make_trainer(
        tmp_path, drawn, max_steps=4, start_merge_ratio=0.75, save_steps=2, mini_batch_size=mini_batch_size
    )
    trainer.model.set_merge_ratio(0.25)
    seen = []
    tower = trainer.model.vision_model
    tower.register_forward_hook(lambda module, args, output: seen.append(output.token_sizes.shape[1]))
    trainer.train()
    passes = 1 if mini_batch_size is None else 6  # three mini-batches of 8 pairs, without and with gradients
    assert seen[::passes] == [4, 7, 9, 12]  # of 16 patches
    assert len(seen) == 4 * passes
    assert trainer.model.config.merge_ratio == 0.25
    assert json.load(open(tmp_path / "checkpoint-2" / "config.json"))["vision_config"]["merge_ratio"] == 0.25


def test_a_start_merge_ratio_that_leaves_no_token_is_refused(tmp_path, drawn):
    with pytest.raises(ValueError, match="start_merge_ratio=0.99: .*choose at most"):
        make_trainer(tmp_path, drawn, start_merge_ratio=0.99)


# What a run leaves


def test_a_run_leaves_all_that_its_summary_says(trained, capsys):
    for name in ("model.safetensors", "config.json", "tokenizer.json", "processor_config.json", "modeling_mlip.py"):
        assert os.path.isfile(os.path.join(trained, name)), name
    card = open(os.path.join(trained, "README.md")).read()
    metrics = json.load(open(os.path.join(trained, "all_results.json")))
    assert f"{metrics['eval_text_to_image_recall@1']:.2f}" in card
    assert Image.open(os.path.join(trained, "learning_curves.png")).size[0] > 300
    assert any("tfevents" in name for _, _, names in os.walk(trained) for name in names)
    history = json.load(open(os.path.join(trained, "trainer_state.json")))["log_history"]
    for part in ("loss", "spatial_loss", "frequency_loss", "token_loss", "logit_scale", "token_logit_scale"):
        assert sum(part in entry for entry in history) == 4, part
    first = history[0]
    weights = json.load(open(os.path.join(trained, "config.json")))
    total = first["spatial_loss"] + sum(
        weights[f"{part}_weight"] * first[part] for part in ("frequency_loss", "token_loss")
    )
    assert first["loss"] > first["spatial_loss"] + 0.05
    assert first["loss"] == pytest.approx(total, rel=1e-4)


def test_what_was_trained_loads_with_one_line_and_serves_a_pipeline(trained, drawn):
    model, processor = AutoModel.from_pretrained(trained), AutoProcessor.from_pretrained(trained)
    assert isinstance(model, MLIPModel) and isinstance(processor, CLIPProcessor)
    assert model.config.merge_ratio == 0.5
    row = datasets.load_dataset("parquet", data_files=drawn[1])["train"][0]
    labels = [row["caption"], "a blue ring with stripes"]
    inputs = processor(text=labels, images=row["image"], padding=True, return_tensors="pt")
    expected = model.eval()(**inputs).logits_per_image.softmax(dim=1)[0]
    classify = pipeline("zero-shot-image-classification", model=trained)
    found = classify(row["image"], candidate_labels=labels, hypothesis_template="{}")
    scores = {entry["label"]: entry["score"] for entry in found}
    assert [scores[label] for label in labels] == pytest.approx(expected.tolist(), abs=1e-5)


def test_evaluate_gives_the_metrics_of_the_run_whatever_the_batch(trained, drawn, tmp_path, capsys):
    expected = json.load(open(os.path.join(trained, "all_results.json")))
    for batch_size in ("5", "24"):
        output = tmp_path / f"{batch_size}.json"
        flags = ["--model_name_or_path", trained, "--validation_file", drawn[1], "--output_file", str(output)]
        labels = ["--label_columns", "shape", "texture", "--templates", "a {} with stripes", "a shape with {} stripes"]
        assert mlip(["evaluate", *flags, *labels, "--per_device_eval_batch_size", batch_size]) == 0
        metrics = json.loads(output.read_text())
        for way in ("text_to_image", "image_to_text"):
            assert metrics[f"{way}_recall@5"] == pytest.approx(expected[f"eval_{way}_recall@5"])
        assert 0 <= metrics["zero_shot_texture_accuracy@1"] <= 100
    assert "24 images" in capsys.readouterr().out


def test_fine_tuning_starts_from_the_saved_weights(trained, drawn, tmp_path):
    folder = str(tmp_path / "second")
    flags = ("--model_name_or_path", trained, "--learning_rate", "0", "--token_loss_weight", "0.25")
    assert mlip(train_flags(drawn, folder, *flags)) == 0
    before, after = (load_file(os.path.join(path, "model.safetensors")) for path in (trained, folder))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert AutoModel.from_pretrained(folder).config.token_loss_weight == 0.25


def test_training_starts_from_a_clip_folder_of_transformers(trained, drawn, tmp_path):
    processor = CLIPProcessor.from_pretrained(trained)
    text = {**TEXT, "vocab_size": len(processor.tokenizer), "max_position_embeddings": 32}
    text |= {"bos_token_id": processor.tokenizer.bos_token_id, "eos_token_id": processor.tokenizer.eos_token_id}
    vision = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 64, "patch_size": 16}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config=text, projection_dim=24))
    clip.save_pretrained(tmp_path / "clip")
    processor.save_pretrained(tmp_path / "clip")
    folder = str(tmp_path / "mlip")
    flags = ("--model_name_or_path", str(tmp_path / "clip"), "--learning_rate", "0", "--merge_ratio", "0.3")
    assert mlip(train_flags(drawn, folder, *flags)) == 0
    ours = load_file(os.path.join(folder, "model.safetensors"))
    for name, weight in clip.state_dict().items():
        assert torch.equal(ours[name], weight), name
    assert torch.equal(ours["token_visual_projection.weight"], clip.visual_projection.weight)


def test_an_interrupted_run_goes_on_to_the_same_weights(drawn, tmp_path):
    whole, part = str(tmp_path / "whole"), str(tmp_path / "part")
    assert mlip(train_flags(drawn, whole, "--save_steps", "2")) == 0
    assert mlip(train_flags(drawn, part, "--save_steps", "2")) == 0
    for name in ("model.safetensors", "config.json"):
        os.remove(os.path.join(part, name))
    resumed = ("--resume_from_checkpoint", os.path.join(part, "checkpoint-2"))
    assert mlip(train_flags(drawn, part, *resumed)) == 0
    expected, found = (load_file(os.path.join(path, "model.safetensors")) for path in (whole, part))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


# The trainer


def test_the_trainer_learns_the_pairs_it_sees(drawn, tmp_path):
    trainer = make_trainer(
        tmp_path, drawn, max_steps=150, per_device_train_batch_size=48, learning_rate=3e-3, logging_steps=50
    )
    before = trainer.evaluate()["eval_text_to_image_recall@5"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_text_to_image_recall@5"] > before + 20
    assert set(after) >= {"eval_image_to_text_recall@1", "eval_text_to_image_recall@10", "eval_mean_recall"}


def test_the_best_model_is_chosen_by_recall(drawn, tmp_path):
    choice = dict(eval_strategy="steps", eval_steps=1, save_strategy="best", metric_for_best_model="eval_mean_recall")
    trainer = make_trainer(tmp_path, drawn, load_best_model_at_end=True, greater_is_better=True, **choice)
    trainer.train()
    recalls = [entry["eval_mean_recall"] for entry in trainer.state.log_history if "eval_mean_recall" in entry]
    assert len(recalls) == 2
    assert trainer.state.best_metric == max(recalls)


def test_norms_biases_gates_positions_and_temperatures_take_no_weight_decay(drawn, tmp_path):
    trainer = make_trainer(tmp_path, drawn)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    for name, parameter in trainer.model.named_parameters():
        is_map = parameter.ndim >= 2 and "position_embedding" not in name
        assert (name in decayed) == is_map, name


def test_temperatures_stay_below_their_clamp(drawn, tmp_path):
    trainer = make_trainer(tmp_path, drawn, max_steps=1)
    with torch.no_grad():
        for scale in trainer.model.logit_scales().values():
            scale.fill_(9.0)
    trainer.train()
    for scale in trainer.model.logit_scales().values():
        assert scale.item() == pytest.approx(MAX_LOGIT_SCALE, abs=1e-3)


def test_gradient_accumulation_is_a_mean(drawn, tmp_path):
    """Two accumulated batches of the same pairs take the step of one such batch, not of twice its gradient."""
    rows = datasets.load_dataset("parquet", data_files=drawn[0])["train"].select([*range(8)] * 2)
    weights = []
    for steps in (1, 2):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path,
            drawn,
            rows=rows if steps == 2 else rows.select(range(8)),
            gradient_accumulation_steps=steps,
            train_sampling_strategy="sequential",
            max_steps=1,
            optim="sgd",
            max_grad_norm=0,
            warmup_steps=0,
            learning_rate=1.0,
        )
        trainer.train()
        weights.append(trainer.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name].cpu(), weight.cpu(), rtol=0, atol=1e-5, msg=name)


def poison(trainer: MLIPTrainer, *rows: int) -> None:
    """Makes the pixels of these rows infinite."""
    item_of = trainer.train_dataset.item

    def item(row, where, **kwargs):
        made = item_of(row, where, **kwargs)
        if int(where.removeprefix("row ")) in rows:
            made["pixel_values"] = torch.full_like(made["pixel_values"], torch.inf)
        return made

    trainer.train_dataset.item = item


class Snapshots(TrainerCallback):
    """Weights, optimizer state and schedule after every step."""

    def __init__(self):
        self.taken = []

    def on_step_end(self, args, state, control, model=None, optimizer=None, lr_scheduler=None, **kwargs):
        states = [optimizer.state_dict()["state"], lr_scheduler.state_dict()]
        self.taken.append(copy.deepcopy({"weights": model.state_dict(), "states": str(states)}))

    def unchanged(self, step: int) -> bool:
        before, after = self.taken[step - 1], self.taken[step]
        same = all(torch.equal(weight, after["weights"][name]) for name, weight in before["weights"].items())
        return same and before["states"] == after["states"]


@pytest.mark.parametrize("mini_batch_size", [None, 3])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(drawn, tmp_path, mini_batch_size):
    split = {"mini_batch_size": mini_batch_size}
    trainer = make_trainer(tmp_path, drawn, max_steps=3, logging_steps=1, train_sampling_strategy="sequential", **split)
    poison(trainer, 8, 13)  # of step 1
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    trainer.train()
    assert [snapshots.unchanged(step) for step in (1, 2)] == [True, False]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["skipped_steps"] for entry in logs] == [0, 1, 1]
    assert ["spatial_loss" in entry for entry in logs] == [True, False, True]
    assert all(np.isfinite(entry[part]) for entry in (logs[0], logs[2]) for part in ("loss", "token_loss", "grad_norm"))


@pytest.mark.parametrize("max_nonfinite_steps", [1, 2])
def test_too_many_steps_in_a_row_that_are_not_finite_name_the_samples(drawn, tmp_path, max_nonfinite_steps):
    limits = {"max_steps": 9, "max_nonfinite_steps": max_nonfinite_steps}
    trainer = make_trainer(tmp_path, drawn, train_sampling_strategy="sequential", **limits)
    poison(trainer, 3, 17, 18, 27)  # of steps 0, 2 and 3
    snapshots = Snapshots()
    trainer.add_callback(snapshots)
    steps, samples = {1: (0, "row 3"), 2: (2, "row 17, row 18, row 27")}[max_nonfinite_steps]
    with pytest.raises(ValueError, match=rf"not finite.* {max_nonfinite_steps} in a row.*The samples: {samples}\."):
        trainer.train()
    assert len(snapshots.taken) == steps + max_nonfinite_steps - 1


def test_a_run_without_one_finite_step_fails_however_short(drawn, tmp_path):
    trainer = make_trainer(tmp_path, drawn)
    with torch.no_grad():
        trainer.model.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite at step 1, 2 in a row.*row \d+, row \d+"):
        trainer.train()


def test_an_infinite_gradient_of_a_finite_loss_is_refused_too():
    guard = StepGuard(max_nonfinite_steps=2)
    pairs = PairEmbeddings(torch.ones(3, 2), torch.ones(3, 2), torch.arange(3))
    verdicts = []
    for norm in (1.0, math.inf, torch.tensor(1.0), math.nan):
        guard.watch(torch.tensor(1.0), ["a", "b", "c"], pairs)
        verdicts.append(guard.refuses(norm, step=0, max_steps=9))
    assert verdicts == [False, True, False, True]
    assert guard.skipped_steps == 2
    broken = pairs._replace(image_embeds=torch.tensor([[1.0, 1.0], [1.0, torch.nan], [1.0, 1.0]]))
    guard.watch(torch.tensor(1.0), ["d", "e", "f"], broken)
    with pytest.raises(ValueError, match=r"The samples: a, b, c, e\."):
        guard.refuses(math.nan, step=4, max_steps=9)


def test_logs_tell_speed_and_the_tokens_of_each_layer(drawn, tmp_path):
    trainer = make_trainer(tmp_path, drawn, logging_steps=1)
    trainer.model.set_merge_ratio(0.5)
    trainer.train()
    entry = trainer.state.log_history[0]
    tokens = [entry[f"vision_tokens_layer_{layer}"] for layer in range(2)]
    assert 16 >= tokens[0] >= tokens[1] == 8
    assert entry["images_per_second"] > 0 and np.isfinite(entry["grad_norm"])
    assert entry["skipped_steps"] == entry["skipped_samples"] == 0


@pytest.mark.parametrize("argument", [("mini_batch_size", 0), ("max_nonfinite_steps", 0), ("token_loss_scope", "node")])
def test_an_argument_out_of_its_range_is_refused(drawn, tmp_path, argument):
    name, value = argument
    with pytest.raises(ValueError, match=f"{name}={value!r}: choose"):
        make_trainer(tmp_path, drawn, **{name: value})


def test_one_pair_is_no_contrastive_batch(drawn, tmp_path):
    with pytest.raises(ValueError, match="per_device_train_batch_size=1"):
        make_trainer(tmp_path, drawn, per_device_train_batch_size=1)


# Configurations


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_named_configurations_are_what_their_names_say(name):
    config = named_config(name)
    vision = config.vision_config
    if name != "tiny":
        size, patch = name.split("-")[1:]
        assert vision.patch_size == int(patch)
        assert (vision.hidden_size, vision.num_hidden_layers) == {"b": (768, 12), "l": (1024, 24)}[size]
    assert vision.projection_dim == config.text_config.projection_dim == config.projection_dim
    assert vision.frequency_embed_weight == 0.5  # from nothing; what starts from CLIP's weights embeds as CLIP


def test_overrides_reach_their_home_and_unknown_ones_are_refused():
    changed = override_config(small_config(), {"merge_ratio": 0.5, "token_loss_weight": 0, "projection_dim": 16})
    assert changed.vision_config.merge_ratio == 0.5
    assert changed.token_loss_weight == 0
    assert changed.text_config.projection_dim == changed.vision_config.projection_dim == 16
    with pytest.raises(ValueError, match="merge_rato"):
        override_config(small_config(), {"merge_rato": 0.5})


# Bad input: one line, status 1, nothing written


def bad_inputs(drawn) -> dict[str, tuple[list[str], str]]:
    return {
        "no such file": (["--train_file", "nowhere.parquet"], "nowhere.parquet"),
        "no such column": (["--caption_column", "words"], "words"),
        "ratio of 1": (["--merge_ratio", "1"], "merge_ratio=1"),
        "ratio as a word": (["--merge_ratio", "half"], "half"),
        "layer beyond the depth": (["--merge_layers", "[7]"], "layer 7 does not exist"),
        "no token left": (["--merge_ratio", "0.99"], "leaves none of 16"),
        "patch does not divide": (["--patch_size", "7"], "image_size=64 is not divisible by patch_size=7"),
        "one pair": (["--per_device_train_batch_size", "1"], "per_device_train_batch_size=1"),
        "unknown name": (["--config_name", "huge"], "config_name='huge'"),
        "two starts": (["--model_name_or_path", "x", "--config_name", "tiny"], "Give one of"),
        "context": (["--max_seq_length", "99"], "max_seq_length=99"),
        "no such model": (["--model_name_or_path", "nowhere/here/there"], "There is no folder nowhere/here/there"),
    }


@pytest.mark.parametrize("case", bad_inputs(("", "")))
def test_bad_input_is_one_line_and_leaves_nothing(case, drawn, tmp_path, capfd):
    flags, message = bad_inputs(drawn)[case]
    folder = tmp_path / "out"
    assert mlip(train_flags(drawn, str(folder), *flags)) == 1
    error = capfd.readouterr().err
    assert "Traceback" not in error
    line = [line for line in error.splitlines() if line.startswith("mlip train: error:")]
    assert len(line) == 1
    assert message in line[0]
    assert not folder.exists() or not any(folder.iterdir())


def test_a_finished_run_is_not_written_over(trained, drawn, capfd):
    before = sorted(os.listdir(trained))
    assert mlip(train_flags(drawn, trained)) == 1
    assert "holds a run already" in capfd.readouterr().err
    assert sorted(os.listdir(trained)) == before


def test_broken_images_are_skipped_and_counted_within_the_budget(drawn, tmp_path, capfd):
    rows = datasets.load_dataset("parquet", data_files=drawn[0])["train"].cast_column("image", datasets.Image(False))
    broken = rows.map(
        lambda row, index: {"image": {"bytes": b"no image", "path": None} if index == 3 else row["image"]},
        with_indices=True,
    )
    path = str(tmp_path / "broken.parquet")
    broken.to_parquet(path)
    # The first epoch of 3 steps sees every row.
    assert mlip(train_flags((path, drawn[1]), str(tmp_path / "within"), "--skip_budget", "0.05")) == 0
    results = json.load(open(tmp_path / "within" / "trainer_state.json"))["log_history"]
    assert max(entry.get("skipped_samples", 0) for entry in results) == 1
    assert mlip(train_flags((path, drawn[1]), str(tmp_path / "beyond"), "--skip_budget", "0")) == 1
    error = capfd.readouterr().err
    assert "row 3: this is not an image" in error
    assert not (tmp_path / "beyond" / "config.json").exists()


def test_captions_beyond_the_context_are_cut_with_eos_kept_and_counted(drawn, tmp_path):
    folder = tmp_path / "short"
    assert mlip(train_flags(drawn, str(folder), "--max_seq_length", "5")) == 0
    history = json.load(open(folder / "trainer_state.json"))["log_history"]
    assert max(entry.get("truncated_captions", 0) for entry in history) > 0


def test_an_unknown_command_is_named(capsys):
    assert mlip(["tarin"]) == 2
    printed = capsys.readouterr()
    assert "'tarin'" in printed.err and "train" in printed.out


PROGRAM = """
import atexit, os, threading, time
from modeling_mlip.hub.cli import run

class Teardown:
    def __del__(self):
        os.abort()  # as what an unfinished stream leaves behind may

kept = Teardown()
atexit.register(print, "handlers ran")
threading.Thread(target=lambda: (time.sleep(0.2), print("threads ended"))).start()
run()
"""


@pytest.mark.parametrize(("argument", "status"), [("--help", 0), ("dance", 2)])
def test_the_program_ends_whatever_still_reads_after_all_that_waits_for_its_end(argument, status):
    done = subprocess.run([sys.executable, "-c", PROGRAM, argument], capture_output=True, text=True)
    assert done.returncode == status
    assert done.stdout.splitlines()[-2:] == ["threads ended", "handlers ran"]


def test_help_names_every_flag_group(capsys):
    with pytest.raises(SystemExit) as stopped:
        mlip(["train", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--merge_ratio", "--token_loss_weight", "--caption_column", "--learning_rate", "--config_name"):
        assert flag in text


def test_every_pixel_of_the_saved_processor_is_what_training_saw(trained):
    processor = AutoProcessor.from_pretrained(trained)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    seen = image_transform(processor.image_processor)(image)
    assert torch.equal(seen, processor(images=image, return_tensors="pt")["pixel_values"][0])
