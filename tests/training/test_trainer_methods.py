# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Public methods and arguments of transformers' Trainer work with `MLIPTrainer`."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import small_model
from torch.utils.data import ConcatDataset, Subset
from training_cases import make_processor, make_rows
from transformers import EarlyStoppingCallback

from modeling_mlip import MLIPModel
from modeling_mlip.data.items import build_pairs
from modeling_mlip.training import MLIPTrainer, MLIPTrainingArguments

PROCESSOR = make_processor()


def make_model() -> MLIPModel:
    tokenizer = PROCESSOR.tokenizer
    text = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return small_model(text={**text, "vocab_size": len(tokenizer)}).train()


def make_trainer(folder: Path, train=None, evaluation=None, arguments=None, **kwargs) -> MLIPTrainer:
    settings = {"max_steps": 4, "per_device_train_batch_size": 6, "logging_steps": 1, "save_strategy": "no"}
    args = MLIPTrainingArguments(str(folder), use_cpu=True, report_to="none", **{**settings, **(arguments or {})})
    kwargs.setdefault("model", None if "model_init" in kwargs else make_model())
    return MLIPTrainer(
        args=args,
        train_dataset=make_rows(12) if train is None else train,
        eval_dataset=evaluation,
        processing_class=PROCESSOR,
        **kwargs,
    )


def test_predict_returns_embeddings_captions_and_metrics(tmp_path):
    trainer = make_trainer(tmp_path, evaluation=make_rows(5))
    predictions, label_ids, metrics = trainer.predict(make_rows(7))
    images, captions = predictions
    assert images.shape == (7, 24) and captions.shape == (7, 24)
    assert label_ids.tolist() == list(range(7))
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, rtol=1e-5)
    nearest = (captions @ images.T).argmax(axis=1) == label_ids
    assert metrics["test_text_to_image_recall@1"] == pytest.approx(100 * nearest.mean())


def test_evaluate_takes_a_dictionary_of_data_sets(tmp_path):
    trainer = make_trainer(tmp_path, evaluation={"small": make_rows(3), "large": make_rows(9)})
    metrics = trainer.evaluate()
    assert {"eval_small_mean_recall", "eval_large_mean_recall"} <= set(metrics)
    assert trainer.evaluate(make_rows(3))["eval_mean_recall"] == metrics["eval_small_mean_recall"]


def test_evaluation_without_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="Evaluation needs an eval_dataset"):
        make_trainer(tmp_path).evaluate()


def test_early_stopping_and_the_best_model_follow_the_recall(tmp_path):
    schedule = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_mean_recall", "greater_is_better": True}
    trainer = make_trainer(
        tmp_path,
        evaluation=make_rows(12),
        arguments={**schedule, **best, "max_steps": 6, "learning_rate": 0.0},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    trainer.train()
    assert trainer.state.global_step == 3  # the first is the best, and two more do not improve on it
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-1"


def test_a_model_of_model_init_is_trained_and_searched_over(tmp_path):
    trainer = make_trainer(tmp_path, evaluation=make_rows(6), model_init=lambda trial=None: make_model())
    first = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.train()
    trained = trainer.model.state_dict()
    assert any(not torch.equal(first[name], trained[name]) for name in first)
    again = make_trainer(tmp_path, evaluation=make_rows(6), model_init=lambda trial=None: make_model())
    again.train()
    again.train()  # starts again from a new model
    assert all(torch.equal(trained[name], tensor) for name, tensor in again.model.state_dict().items())


def test_a_hyperparameter_search_runs(tmp_path):
    trainer = make_trainer(tmp_path, evaluation=make_rows(6), model_init=lambda trial=None: make_model())
    best = trainer.hyperparameter_search(
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-3)},
        compute_objective=lambda metrics: metrics["eval_mean_recall"],
        n_trials=2,
        direction="maximize",
        backend="optuna",
    )
    assert 1e-4 <= best.hyperparameters["learning_rate"] <= 1e-3


def test_a_trainer_without_processor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="processing_class=None"):
        MLIPTrainer(make_model(), MLIPTrainingArguments(str(tmp_path), report_to="none", use_cpu=True))


@pytest.mark.parametrize("count", [13, 12, 7])
def test_no_batch_of_an_epoch_is_a_single_pair(tmp_path, count, monkeypatch):
    trainer = make_trainer(tmp_path, train=make_rows(count), arguments={"max_steps": -1, "num_train_epochs": 2})
    sizes = []
    original = trainer.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        sizes.append(len(inputs["input_ids"]))
        return original(model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", compute_loss)
    result = trainer.train()
    assert min(sizes) >= 2
    losses = [entry["loss"] for entry in trainer.state.log_history if "spatial_loss" in entry]
    assert result.metrics["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-3)
    assert not trainer.args.dataloader_drop_last  # the argument stays as the user gave it


def test_all_captions_of_an_image_are_split_into_mini_batches(tmp_path):
    rows = make_rows(6)
    rows = rows.add_column("captions", [[caption, f"{caption} again", "one for all"] for caption in rows["caption"]])
    pairs = build_pairs(
        rows.remove_columns("caption"),
        PROCESSOR,
        training=True,
        seed=0,
        caption_policy="all",
        caption_column="captions",
    )
    trainer = make_trainer(tmp_path, train=pairs, arguments={"mini_batch_size": 4, "per_device_train_batch_size": 4})
    sizes = []
    trainer.model.vision_model.register_forward_hook(lambda module, args, output: sizes.append(len(output[0])))
    trainer.train()
    assert max(sizes) <= 4


@pytest.mark.parametrize("wrap", [lambda data: Subset(data, range(8)), lambda data: ConcatDataset([data, data])])
def test_a_wrapped_data_set_receives_the_epoch(tmp_path, wrap):
    pairs = build_pairs(make_rows(12), PROCESSOR, training=True, seed=0)
    epochs = []
    original = pairs.set_epoch
    pairs.set_epoch = lambda epoch: (epochs.append(epoch), original(epoch))
    make_trainer(tmp_path, train=wrap(pairs), arguments={"max_steps": -1, "num_train_epochs": 3}).train()
    assert sorted(set(epochs)) == [0, 1, 2]


def test_the_reported_speed_counts_the_pairs_that_were_seen(tmp_path):
    trainer = make_trainer(tmp_path, arguments={"per_device_train_batch_size": 100, "max_steps": 3})
    metrics = trainer.train().metrics
    assert metrics["train_samples_per_second"] == pytest.approx(3 * 12 / metrics["train_runtime"], rel=0.01)


def test_logged_tokens_follow_the_merge_ratio_of_the_step(tmp_path):
    trainer = make_trainer(tmp_path, arguments={"start_merge_ratio": 0.75, "max_steps": 3})
    trainer.model.set_merge_ratio(0.25)
    trainer.train()
    last = f"vision_tokens_layer_{trainer.model.config.vision_config.num_hidden_layers - 1}"
    tokens = [entry[last] for entry in trainer.state.log_history if last in entry]
    assert tokens == [16, 32, 48]  # of 64 patches, at 0.75, 0.5 and 0.25


class AveragingOptimizer(torch.optim.SGD):
    """Holds other weights in training than in evaluation, like schedule-free optimizers."""

    mode = "train"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"


def test_an_optimizer_with_averaged_weights_is_in_evaluation_mode_where_weights_are_used(tmp_path, monkeypatch):
    model = make_model()
    optimizer = AveragingOptimizer(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(
        tmp_path, evaluation=make_rows(4), model=model, optimizers=(optimizer, schedule), arguments=saving
    )
    modes = {"train": [], "evaluate": [], "save": []}
    monkeypatch.setattr(
        MLIPModel,
        "forward",
        lambda self, *args, forward=MLIPModel.forward, **kwargs: (
            modes["train"].append(optimizer.mode) or forward(self, *args, **kwargs)
        ),
    )
    monkeypatch.setattr(
        MLIPModel,
        "get_image_features",
        lambda self, *args, method=MLIPModel.get_image_features, **kwargs: (
            modes["evaluate"].append(optimizer.mode) or method(self, *args, **kwargs)
        ),
    )
    monkeypatch.setattr(
        MLIPModel,
        "save_pretrained",
        lambda self, *args, save=MLIPModel.save_pretrained, **kwargs: (
            modes["save"].append(optimizer.mode) or save(self, *args, **kwargs)
        ),
    )
    trainer.train()
    trainer.save_model()
    assert set(modes["train"]) == {"train"} and set(modes["evaluate"]) == {"eval"} and set(modes["save"]) == {"eval"}


@pytest.mark.parametrize("flag, dtype", [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)])
def test_evaluation_in_half_precision_converts_the_model(tmp_path, flag, dtype):
    trainer = make_trainer(tmp_path, evaluation=make_rows(4), arguments={flag: True})
    metrics = trainer.evaluate()
    assert trainer.model.dtype == dtype and math.isfinite(metrics["eval_mean_recall"])
