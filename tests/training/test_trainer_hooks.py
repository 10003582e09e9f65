# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What `MLIPTrainer` overrides and uses of transformers' Trainer exists in the installed version and is called there.

A hook that transformers renames would otherwise be ignored without an error.
"""

import ast
import inspect
import textwrap

import pytest
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer, TrainerCallback

from modeling_mlip.training.checkpoint import InterruptibleTrainer, ResumeCallback
from modeling_mlip.training.retrieval_evaluation import RetrievalEvaluationMixin
from modeling_mlip.training.trainer import MLIPTrainer, SaveCodeFiles, StepCallback

OURS = (RetrievalEvaluationMixin, InterruptibleTrainer, MLIPTrainer)
# Overridden method -> the methods of Trainer that must call it, with the number of positional arguments of the call.
CALLED_FROM = {
    "_save_checkpoint": {"_maybe_log_save_evaluate": 2},
    "call_model_init": {"train": 1},
    "compute_loss": {"training_step": 2},
    "create_optimizer": {"_prepare_for_training": 0},
    "evaluate": {"_evaluate": 0},
    "evaluation_loop": {"evaluate": 1, "predict": 1},
    "get_batch_samples": {"_run_epoch": 3},
    "get_decay_parameter_names": {"create_optimizer": 1},
    "get_eval_dataloader": {"evaluate": 1},
    "get_test_dataloader": {"predict": 1},
    "get_train_dataloader": {"_inner_training_loop": 0},
    "log": {"_maybe_log_save_evaluate": 2, "evaluate": 1},
    "save_model": {"_save_checkpoint": 1},
    "training_step": {"_run_epoch": 3},
    "create_model_card": {"push_to_hub": 0},
    "train": {},
}
# Private methods of Trainer that are called but not overridden -> their parameters.
USED = {
    "_get_output_dir": ["trial"],
    "_prepare_inputs": ["inputs"],
    "_push_from_checkpoint": ["checkpoint_folder"],
}


def overridden_methods() -> dict[str, type]:
    """Names that our trainers define and transformers' Trainer has."""
    return {
        name: owner
        for owner in OURS
        for name, value in vars(owner).items()
        if inspect.isfunction(value) and hasattr(Trainer, name) and not name.startswith("__")
    }


def calls_in(method: str, name: str) -> list[ast.Call]:
    """Calls of `self.name(...)` in the source of a method of Trainer."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(getattr(Trainer, method))))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == name]


def test_the_table_lists_every_overridden_method():
    assert set(overridden_methods()) == set(CALLED_FROM)
    assert [name for name in CALLED_FROM if name.startswith("_")] == ["_save_checkpoint"]


@pytest.mark.parametrize("name", CALLED_FROM)
def test_an_overridden_method_takes_the_parameters_of_the_original(name):
    ours, theirs = (inspect.signature(getattr(owner, name)).parameters for owner in (MLIPTrainer, Trainer))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in ours.values()):
        return  # it passes on whatever it gets
    assert list(ours) == list(theirs)


@pytest.mark.parametrize("name, method", [(name, method) for name in CALLED_FROM for method in CALLED_FROM[name]])
def test_trainer_calls_an_overridden_method_where_we_rely_on_it(name, method):
    calls = calls_in(method, name)
    assert calls, f"Trainer.{method} no longer calls {name}: find the method that replaces it"
    assert any(len(call.args) == CALLED_FROM[name][method] for call in calls)


@pytest.mark.parametrize("name", USED)
def test_private_methods_that_we_call_have_their_parameters(name):
    assert list(inspect.signature(getattr(Trainer, name)).parameters)[1:] == USED[name]


def attributes_set_by(owner: type) -> set[str]:
    """Names that the methods of a class assign to `self`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(owner)))
    targets = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)]
    return {node.attr for node in targets if isinstance(node.value, ast.Name) and node.value.id == "self"}


def test_our_attributes_have_names_that_trainer_does_not_use():
    """Trainer sets `objective` in a hyperparameter search, for example."""
    ours = set().union(*map(attributes_set_by, OURS))
    assert "training_objective" in ours and "objective" in attributes_set_by(Trainer)
    assert ours & attributes_set_by(Trainer) == {"data_collator", "model"}  # meant to be Trainer's


@pytest.mark.parametrize("callback", [ResumeCallback, StepCallback, SaveCodeFiles])
def test_every_event_of_our_callbacks_exists_and_is_fired(callback):
    events = [name for name in vars(callback) if name.startswith("on_")]
    assert events
    source = inspect.getsource(Trainer)
    for event in events:
        assert hasattr(TrainerCallback, event)
        assert f"callback_handler.{event}(" in source


def test_the_gradient_is_clipped_after_our_check_and_before_the_optimizer_step():
    source = inspect.getsource(Trainer._run_epoch)
    order = ["self.training_step(", "self._clip_grad_norm(", "on_pre_optimizer_step(", "self.optimizer.step()",
             "on_optimizer_step(", "optimizer_step_was_skipped"]  # fmt: skip
    places = [source.index(call) for call in order]
    assert places == sorted(places)


def test_accelerate_reads_the_flag_of_a_skipped_step_that_we_set():
    assert "_is_overflow" in inspect.getsource(AcceleratedOptimizer.step_was_skipped.fget)
