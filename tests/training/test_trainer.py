# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`MLIPTrainer` on a few drawn pairs: steps, schedules, skipped steps and logs."""

import copy
import json
import math

import datasets
import numpy as np
import pytest
import torch
from transformers import TrainerCallback

from modeling_mlip import MLIPModel
from modeling_mlip.data.images import image_transform
from modeling_mlip.data.items import PairDataset, build_pairs
from modeling_mlip.hub.configurations import named_config, override_config
from modeling_mlip.losses import MAX_LOGIT_SCALE
from modeling_mlip.training.arguments import MLIPTrainingArguments
from modeling_mlip.training.starting_point import build_processor
from modeling_mlip.training.trainer import MLIPTrainer


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
    config = override_config(
        named_config("tiny"), dict(hidden_size=48, num_hidden_layers=2, patch_size=16, token_loss_weight=0.1)
    )
    captions = datasets.load_dataset("parquet", data_files=drawn[0])["train"]["caption"]
    processor = build_processor(config, captions=captions)
    config.text_config.vocab_size, config.text_config.num_hidden_layers = len(processor.tokenizer), 1
    model = model or MLIPModel(config)
    transform = image_transform(processor.image_processor)
    pairs = [PairDataset(rows, "image", "caption", transform, training=t, seed=0) for t in (True, False)]
    args = MLIPTrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", **{"max_steps": 2, "per_device_train_batch_size": 8, **arguments}
    )
    return MLIPTrainer(model, args, train_dataset=pairs[0], eval_dataset=pairs[1], processing_class=processor)


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


def test_training_raises_the_recall_on_its_pairs(drawn, tmp_path):
    trainer = make_trainer(
        tmp_path, drawn, max_steps=40, per_device_train_batch_size=48, learning_rate=3e-3, logging_steps=50
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
        for scale in trainer.model.scalar_parameters().values():
            scale.fill_(9.0)
    trainer.train()
    for scale in trainer.model.scalar_parameters().values():
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
    with pytest.raises(ValueError, match=rf"not finite.* {max_nonfinite_steps} steps in a row.*Samples: {samples}\."):
        trainer.train()
    assert len(snapshots.taken) == steps + max_nonfinite_steps - 1


def test_a_run_without_one_finite_step_fails_however_short(drawn, tmp_path):
    trainer = make_trainer(tmp_path, drawn)
    with torch.no_grad():
        trainer.model.visual_projection.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"not finite at step 1, for 2 steps in a row.*row \d+, row \d+"):
        trainer.train()


def test_logs_tell_speed_and_the_tokens_of_each_layer(drawn, tmp_path):
    trainer = make_trainer(tmp_path, drawn, logging_steps=1)
    trainer.model.set_merge_ratio(0.5)
    trainer.train()
    entry = trainer.state.log_history[0]
    tokens = [entry[f"vision_tokens_layer_{layer}"] for layer in range(2)]
    assert 16 >= tokens[0] >= tokens[1] == 8
    assert entry["images_per_second"] > 0 and np.isfinite(entry["grad_norm"])
    assert entry["skipped_steps"] == entry["skipped_samples"] == 0


@pytest.mark.parametrize(
    "argument",
    [
        ("mini_batch_size", 0),
        ("max_nonfinite_steps", 0),
        ("token_loss_scope", "node"),
        ("learning_rate", math.inf),  # the first step would make every weight infinite, and the run would end well
        ("learning_rate", -1.0),
        ("weight_decay", -0.1),
        ("gradient_accumulation_steps", 0),
        ("per_device_eval_batch_size", 0),  # it would fail after the training
        ("max_steps", 0),
    ],
)
def test_an_argument_out_of_its_range_is_refused(drawn, tmp_path, argument):
    name, value = argument
    with pytest.raises(ValueError, match=f"{name}={value!r}: choose"):
        make_trainer(tmp_path, drawn, **{name: value})


def test_a_batch_of_one_pair_is_refused(drawn, tmp_path):
    with pytest.raises(ValueError, match="per_device_train_batch_size=1"):
        make_trainer(tmp_path, drawn, per_device_train_batch_size=1)
