# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The average of the weights: its values, where it is used, and runs that are resumed or skip a step."""

import pytest
import torch
from safetensors.torch import load_file
from test_distillation import arguments, make_trainer

from modeling_mlip.training.weight_average import TRAINED_WEIGHTS, WeightAverage

DECAY = 0.75


def run(folder, resumed=None, **changes):
    """A run whose trained weights after each step are recorded."""
    trainer = make_trainer(folder, **{"ema_decay": DECAY, "freeze": "text", **changes})
    history = [{name: tensor.double() for name, tensor in trainer.model.state_dict().items()}]
    finish_step = trainer.finish_step

    def recorded() -> None:
        finish_step()
        history.append({name: tensor.double() for name, tensor in trainer.model.state_dict().items()})

    trainer.finish_step = recorded
    trainer.train(resume_from_checkpoint=resumed and str(resumed))
    return trainer, history


def average_of(history: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    average = history[0]
    for weights in history[1:]:
        average = {name: DECAY * average[name] + (1 - DECAY) * weights[name] for name in average}
    return average


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name].double(), tensor, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 4 steps, evaluated and saved every 2 steps."""
    folder = tmp_path_factory.mktemp("run") / "run"
    trainer, history = run(folder, eval_strategy="steps", eval_steps=2, with_evaluation=True)
    trainer.save_model()
    return folder, trainer, history


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The same run without an average."""
    folder = tmp_path_factory.mktemp("plain") / "plain"
    return folder, run(folder, ema_decay=None)[1]


def test_evaluation_checkpoints_and_the_saved_model_use_the_average_and_training_does_not(whole, plain):
    folder, trainer, history = whole
    for ours, theirs in zip(history, plain[1], strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)  # the average changes no step
    final = average_of(history)
    assert_close(load_file(folder / "model.safetensors"), final)
    assert_close(trainer.model.state_dict(), final)
    middle = folder / "checkpoint-2"
    assert_close(load_file(middle / "model.safetensors"), average_of(history[:3]))
    stored = torch.load(middle / TRAINED_WEIGHTS, weights_only=True)
    assert_close({**history[2], **stored}, history[2])
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert stored.keys() == trained and not any(name.startswith("text_") for name in trained)
    weight = "visual_projection.weight"
    assert (final[weight] - history[-1][weight]).abs().max() > 1e-4
    recalls = [entry["eval_mean_recall"] for entry in trainer.state.log_history if "eval_mean_recall" in entry]
    assert len(recalls) == 2 and recalls[-1] == trainer.evaluate()["eval_mean_recall"]


def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(whole, tmp_path):
    folder, trainer, history = whole
    resumed, later = run(tmp_path / "resumed", folder / "checkpoint-2")
    ours, theirs = resumed.model.state_dict(), trainer.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert all(torch.equal(later[-1][name], history[-1][name]) for name in theirs)
    at_its_end, _ = run(tmp_path / "end", folder / "checkpoint-4")
    assert all(torch.equal(at_its_end.model.state_dict()[name], theirs[name]) for name in theirs)


def test_the_best_model_is_the_average_of_the_best_checkpoint(tmp_path):
    flags = dict(eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, greater_is_better=False)
    trainer, _ = run(
        tmp_path, save_total_limit=1, with_evaluation=True, metric_for_best_model="eval_mean_recall", **flags
    )
    saved = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(trainer.model.state_dict()[name], tensor) for name, tensor in saved.items())


def test_resuming_with_the_average_switched_on_or_off_is_refused(whole, plain, tmp_path):
    with pytest.raises(ValueError, match="was saved with ema_decay"):
        run(tmp_path / "a", whole[0] / "checkpoint-2", ema_decay=None)
    with pytest.raises(ValueError, match="has no trained_weights.pt.*Leave out ema_decay=0.75"):
        run(tmp_path / "b", plain[0] / "checkpoint-2")
    with pytest.raises(ValueError, match="this run trains other parameters.*such as text_.*resume with the same flags"):
        WeightAverage(DECAY).begin(make_trainer(tmp_path / "c").model, str(whole[0] / "checkpoint-2"))


def test_a_skipped_step_leaves_the_average_as_it_is(tmp_path):
    trainer = make_trainer(tmp_path, ema_decay=DECAY)
    trainer.create_optimizer()
    trainer.optimizer = trainer.accelerator.prepare(trainer.optimizer)
    average = trainer.weight_average
    average.begin(trainer.model)
    before = trainer.model.visual_projection.weight.detach().clone()
    with torch.no_grad():
        trainer.model.visual_projection.weight.add_(1.0)
    trainer._skips_step = True
    trainer.finish_step()
    average.use_average()
    assert torch.equal(trainer.model.visual_projection.weight, before)
    average.use_trained()
    trainer._skips_step = False
    trainer.finish_step()
    average.use_average()
    torch.testing.assert_close(trainer.model.visual_projection.weight, before + (1 - DECAY))


def test_values_and_optimizers_that_do_not_fit_are_refused(tmp_path):
    with pytest.raises(ValueError, match="ema_decay=1.0: choose a value between 0 and 1"):
        arguments(tmp_path, ema_decay=1.0)
    with pytest.raises(ValueError, match="optim='schedule_free_adamw' averages the weights itself"):
        make_trainer(tmp_path, ema_decay=DECAY, optim="schedule_free_adamw")
    trainer = make_trainer(tmp_path, ema_decay=DECAY)
    trainer.is_fsdp_enabled = True
    with pytest.raises(ValueError, match="ema_decay=0.75: the average needs whole weights.*use DDP"):
        trainer._prepare_model()
    assert WeightAverage(DECAY).update() is None  # before a run there is nothing to average
