# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Each argument of transformers' Trainer works with `MLIPTrainer` or is refused, as docs/training-arguments.md says."""

import dataclasses
import inspect
import math
import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import small_model
from datasets import IterableDataset
from training_cases import make_processor, make_rows
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import SchedulerType, get_last_checkpoint

from modeling_mlip.training import MLIPTrainer, MLIPTrainingArguments
from modeling_mlip.training.argument_checks import (
    REFUSED_ACCELERATOR_VALUES,
    REFUSED_TRAINER_ARGUMENTS,
    REFUSED_VALUES,
    RETRIEVAL_METRICS,
    check_training_arguments,
)
from modeling_mlip.training.checkpoint import check_checkpoint

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "training-arguments.md"
PROCESSOR = make_processor()
FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}


def make_arguments(folder: Path, **arguments) -> MLIPTrainingArguments:
    defaults = {"max_steps": 2, "per_device_train_batch_size": 6, "logging_steps": 1, "save_strategy": "no"}
    return MLIPTrainingArguments(str(folder), use_cpu=True, report_to="none", **{**defaults, **arguments})


def make_trainer(folder: Path, arguments: dict, train=None, evaluation=None, **trainer_arguments) -> MLIPTrainer:
    tokenizer = PROCESSOR.tokenizer
    text = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return MLIPTrainer(
        small_model(text={**text, "vocab_size": len(tokenizer)}).train(),
        make_arguments(folder, **arguments),
        train_dataset=make_rows(12) if train is None else train,
        eval_dataset=evaluation,
        processing_class=PROCESSOR,
        **trainer_arguments,
    )


# Refused

REFUSED_EXAMPLES = {
    "label_smoothing_factor": 0.1,
    "average_tokens_across_devices": False,
    "label_names": ["labels"],
    "remove_unused_columns": True,
    "train_sampling_strategy": "group_by_length",
    "length_column_name": "size",
    "auto_find_batch_size": True,
    "neftune_noise_alpha": 5.0,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "prediction_loss_only": True,
    "eval_do_concat_batches": False,
    "eval_use_gather_object": True,
    "eval_accumulation_steps": 2,
    "include_for_metrics": ["inputs"],
    "batch_eval_metrics": True,
    "include_num_input_tokens_seen": "all",
    "parallelism_config": object(),
    "dataloader_in_order": False,
    "ddp_static_graph": True,
    "debug": "underflow_overflow",
}


def test_every_refused_argument_has_an_example():
    assert set(REFUSED_EXAMPLES) == set(REFUSED_VALUES)


@pytest.mark.parametrize("name", [name for name in REFUSED_VALUES if name in FIELDS])
def test_a_refused_value_is_named_in_one_line_before_the_model_is_touched(name, tmp_path):
    args = make_arguments(tmp_path / "out", **{name: REFUSED_EXAMPLES[name]})
    with pytest.raises(ValueError, match=f"^{name}=") as caught:
        MLIPTrainer(None, args, train_dataset=make_rows(12), processing_class=PROCESSOR)
    message = str(caught.value)
    assert "\n" not in message and "allowed" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", REFUSED_VALUES)
def test_the_default_value_is_allowed(name, tmp_path):
    allowed = REFUSED_VALUES[name][0]
    value = getattr(make_arguments(tmp_path), name, allowed[0])
    assert value in allowed


@pytest.mark.parametrize("name, value", [("split_batches", True), ("dispatch_batches", True), ("even_batches", False)])
def test_a_refused_value_of_accelerator_config_is_named(name, value, tmp_path):
    assert name in REFUSED_ACCELERATOR_VALUES
    args = make_arguments(tmp_path, accelerator_config={name: value})
    with pytest.raises(ValueError, match=rf"^accelerator_config\.{name}={value}"):
        check_training_arguments(args, has_eval_dataset=False)


@pytest.mark.parametrize("name", REFUSED_TRAINER_ARGUMENTS)
def test_a_function_that_would_never_be_called_is_refused(name, tmp_path):
    with pytest.raises(ValueError, match=f"^{name}=.*(objective|predict)"):
        make_trainer(tmp_path, {}, **{name: lambda *args: None})


REFUSED_COMBINATIONS = {
    "evaluation without data": ({"eval_strategy": "epoch"}, False, "eval_dataset"),
    "evaluation at the start without data": ({"eval_on_start": True}, False, "eval_on_start=True needs"),
    "best model without evaluation": ({"load_best_model_at_end": True}, True, "load_best_model_at_end=True follows"),
    "best checkpoint without evaluation": ({"save_strategy": "best"}, True, "save_strategy='best' follows"),
    "loss as metric": ({"eval_strategy": "epoch", "metric_for_best_model": "loss"}, True, "eval_mean_recall"),
    "misspelled metric": ({"eval_strategy": "epoch", "metric_for_best_model": "recal"}, True, "eval_mean_recall"),
    "fused optimizer": ({"optim": "adalomo"}, False, "optim='adalomo'"),
    "layerwise optimizer": ({"optim": "galore_adamw_layerwise"}, False, "optim='galore_adamw_layerwise'"),
    "cache and mini-batches": ({"torch_empty_cache_steps": 1, "mini_batch_size": 2}, False, "has no effect"),
}


@pytest.mark.parametrize("case", REFUSED_COMBINATIONS)
def test_arguments_that_contradict_each_other_are_refused(case, tmp_path):
    arguments, has_eval_dataset, message = REFUSED_COMBINATIONS[case]
    args = make_arguments(tmp_path, **arguments)
    with pytest.raises(ValueError, match=message):
        check_training_arguments(args, has_eval_dataset=has_eval_dataset)


@pytest.mark.parametrize("name, message", [("wandb", "not installed"), ("tensorbord", "is unknown")])
def test_a_reporter_that_cannot_report_is_refused(name, message, tmp_path):
    args = MLIPTrainingArguments(str(tmp_path), use_cpu=True, report_to=name)
    with pytest.raises(ValueError, match=f"report_to='{name}'.*{message}|report_to='{name}': its package is {message}"):
        check_training_arguments(args, has_eval_dataset=False)


def test_arguments_of_transformers_itself_are_refused(tmp_path):
    with pytest.raises(ValueError, match="give MLIPTrainingArguments"):
        check_training_arguments(TrainingArguments(str(tmp_path), use_cpu=True), has_eval_dataset=False)


def test_settings_that_leave_no_batch_or_that_a_stream_ignores_are_refused(tmp_path):
    check = check_training_arguments
    args = make_arguments(tmp_path, dataloader_drop_last=True)
    check(args, has_eval_dataset=False, train_dataset=make_rows(6))
    with pytest.raises(ValueError, match="5 rows and a batch 6"):
        check(args, has_eval_dataset=False, train_dataset=make_rows(5))
    stream = IterableDataset.from_generator(lambda: iter([{"a": 1}]))
    for argument in ({"data_seed": 1}, {"train_sampling_strategy": "sequential"}):
        with pytest.raises(ValueError, match=f"{next(iter(argument))}=.*stream"):
            check(make_arguments(tmp_path, **argument), has_eval_dataset=False, train_dataset=stream)


def test_errors_of_transformers_are_one_line(tmp_path):
    with pytest.raises(ValueError, match="save and eval strategy to match") as caught:
        make_arguments(tmp_path, load_best_model_at_end=True, eval_strategy="epoch", save_strategy="steps")
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="lr_scheduler_kwargs='file.json': give a dictionary"):
        make_arguments(tmp_path, lr_scheduler_kwargs="file.json")


# Works

SCHEDULER_KWARGS = {
    "cosine_with_min_lr": {"min_lr": 1e-5},
    "cosine_warmup_with_min_lr": {"min_lr": 1e-5},
    "warmup_stable_decay": {"num_decay_steps": 1},
}


@pytest.mark.parametrize("name", [member.value for member in SchedulerType])
def test_every_learning_rate_schedule_works(name, tmp_path):
    arguments = {"lr_scheduler_type": name, "eval_strategy": "steps", "eval_steps": 1}
    trainer = make_trainer(
        tmp_path, {**arguments, "lr_scheduler_kwargs": SCHEDULER_KWARGS.get(name)}, evaluation=make_rows(4)
    )
    trainer.train()
    assert len([entry for entry in trainer.state.log_history if "learning_rate" in entry]) == 2


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_torch_fused", "sgd", "adafactor", "adagrad", "rmsprop"])
@pytest.mark.parametrize("mini_batch_size", [None, 2])
def test_optimizers_of_torch_and_transformers_change_the_weights(name, mini_batch_size, tmp_path):
    trainer = make_trainer(tmp_path, {"optim": name, "mini_batch_size": mini_batch_size, "warmup_steps": 0})
    before = trainer.model.visual_projection.weight.detach().clone()
    trainer.train()
    assert not torch.equal(before, trainer.model.visual_projection.weight)


def logs_of(trainer: MLIPTrainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def group(trainer: MLIPTrainer) -> dict:
    return trainer.optimizer.param_groups[0]


ACTIVATION_CHECKPOINTING = (
    "activation_checkpointing" if "activation_checkpointing" in FIELDS else "gradient_checkpointing"
)
# Arguments -> what a run of two steps then shows.
WORKING = {
    "num_train_epochs": ({"num_train_epochs": 3, "max_steps": -1}, lambda t: t.state.global_step == 6),
    "max_steps": ({"max_steps": 3}, lambda t: t.state.global_step == 3),
    "learning_rate": ({"learning_rate": 0.125}, lambda t: group(t)["initial_lr"] == 0.125),
    "weight_decay": ({"weight_decay": 0.25}, lambda t: group(t)["weight_decay"] == 0.25),
    "adam_beta1": ({"adam_beta1": 0.5}, lambda t: group(t)["betas"] == (0.5, 0.98)),
    "adam_beta2": ({"adam_beta2": 0.5}, lambda t: group(t)["betas"] == (0.9, 0.5)),
    "adam_epsilon": ({"adam_epsilon": 0.5}, lambda t: group(t)["eps"] == 0.5),
    "optim_args": ({"optim": "rmsprop", "optim_args": "alpha=0.5"}, lambda t: group(t)["alpha"] == 0.5),
    "warmup_steps": ({"warmup_steps": 2}, lambda t: logs_of(t, "learning_rate")[0] == 0),
    "gradient_accumulation_steps": ({"gradient_accumulation_steps": 2}, lambda t: t.state.epoch == 2),
    "bf16": ({"bf16": True}, lambda t: t.accelerator.mixed_precision == "bf16"),
    "activation_checkpointing": (
        {ACTIVATION_CHECKPOINTING: True},
        lambda t: getattr(t.model, f"is_{ACTIVATION_CHECKPOINTING}"),
    ),
    "activation_checkpointing_kwargs": (
        {ACTIVATION_CHECKPOINTING: True, f"{ACTIVATION_CHECKPOINTING}_kwargs": {"use_reentrant": False}},
        lambda t: getattr(t.model, f"is_{ACTIVATION_CHECKPOINTING}"),
    ),
    "torch_compile": ({"torch_compile": True, "torch_compile_backend": "eager"}, lambda t: t.args.torch_compile),
    "torch_empty_cache_steps": ({"torch_empty_cache_steps": 1}, lambda t: True),
    "logging_strategy": ({"logging_strategy": "epoch", "max_steps": 4}, lambda t: len(logs_of(t, "loss")) == 2),
    "logging_first_step": ({"logging_first_step": True, "logging_steps": 5}, lambda t: len(logs_of(t, "loss")) == 1),
    "logging_nan_inf_filter": ({"logging_nan_inf_filter": False}, lambda t: len(logs_of(t, "loss")) == 2),
    "include_num_input_tokens_seen": (
        {"include_num_input_tokens_seen": "non_padding"},
        lambda t: 2 * 6 * 4 < t.state.num_input_tokens_seen <= 2 * 6 * 12,
    ),
    "log_level": ({"log_level": "error", "log_level_replica": "error"}, lambda t: True),
    "disable_tqdm": ({"disable_tqdm": True}, lambda t: "ProgressCallback" not in t.callback_handler.callback_list),
    "eval_delay": (
        {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 2},
        lambda t: len(logs_of(t, "eval_mean_recall")) == 1,
    ),
    "eval_on_start": ({"eval_on_start": True}, lambda t: len(logs_of(t, "eval_mean_recall")) == 1),
    "greater_is_better": (
        {
            **{"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "best"},
            **{"metric_for_best_model": "text_to_image_recall@10", "greater_is_better": False},
        },
        lambda t: t.state.best_metric == min(logs_of(t, "eval_text_to_image_recall@10")),
    ),
    "full_determinism": ({"full_determinism": True}, lambda t: torch.are_deterministic_algorithms_enabled()),
    "train_sampling_strategy": ({"train_sampling_strategy": "sequential"}, lambda t: True),
    "dataloader_drop_last": (
        {"dataloader_drop_last": True, "per_device_train_batch_size": 5, "max_steps": -1, "num_train_epochs": 1},
        lambda t: t.state.global_step == 2,
    ),
    "dataloader_num_workers": (
        {"dataloader_num_workers": 1, "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True},
        lambda t: t.get_train_dataloader().prefetch_factor == 3,
    ),
    "dataloader_multiprocessing_context": (
        {"dataloader_num_workers": 1, "dataloader_multiprocessing_context": "forkserver"},
        lambda t: t.get_train_dataloader().multiprocessing_context.get_start_method() == "forkserver",
    ),
    "dataloader_pin_memory": ({"dataloader_pin_memory": False}, lambda t: not t.get_train_dataloader().pin_memory),
    "accelerator_config": (
        {"accelerator_config": {"use_seedable_sampler": False}},
        lambda t: not t.accelerator.use_seedable_sampler,
    ),
    "skip_memory_metrics": ({"skip_memory_metrics": False}, lambda t: logs_of(t, "train_mem_cpu_alloc_delta")),
}


@pytest.fixture
def without_determinism():
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", WORKING)
def test_an_argument_of_transformers_works(name, tmp_path, without_determinism):
    arguments, shows = WORKING[name]
    trainer = make_trainer(tmp_path, arguments, evaluation=make_rows(4))
    result = trainer.train()
    assert math.isfinite(result.training_loss)
    assert shows(trainer)


def test_compiled_and_checkpointed_training_computes_the_same_losses(tmp_path):
    losses = []
    settings = ({}, {"torch_compile": True, "torch_compile_backend": "eager"}, {ACTIVATION_CHECKPOINTING: True})
    for arguments in settings:
        trainer = make_trainer(tmp_path, arguments)
        trainer.train()
        losses.append(logs_of(trainer, "loss"))
    for other in losses[1:]:
        assert other == pytest.approx(losses[0], rel=1e-4)


def test_the_gradient_is_clipped_to_max_grad_norm(tmp_path):
    trainer = make_trainer(
        tmp_path, {"optim": "sgd", "max_grad_norm": 1e-9, "learning_rate": 1.0, "warmup_steps": 0, "weight_decay": 0}
    )
    before = trainer.model.visual_projection.weight.detach().clone()
    trainer.train()
    torch.testing.assert_close(trainer.model.visual_projection.weight, before, rtol=0, atol=1e-8)
    assert logs_of(trainer, "grad_norm")[0] > 0.01


def test_data_seed_alone_sets_the_order_of_the_data(tmp_path):
    orders = []
    for seed, data_seed in ((1, 5), (2, 5), (1, 6)):
        trainer = make_trainer(tmp_path, {"seed": seed, "data_seed": data_seed})
        orders.append([batch["names"] for batch in trainer.get_train_dataloader()])
    assert orders[0] == orders[1] != orders[2]


def test_a_checkpoint_requested_by_a_signal_is_complete(tmp_path):
    trainer = make_trainer(tmp_path, {"enable_jit_checkpoint": True, "max_steps": 4})
    callback = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "JITCheckpointCallback")
    callback.jit_manager.is_checkpoint_requested = True
    trainer.train()
    last = get_last_checkpoint(str(tmp_path))
    check_checkpoint(last)
    assert trainer.state.global_step < 4
    assert not list(tmp_path.rglob("checkpoint-is-incomplete.txt"))


class CountSteps(TrainerCallback):
    def __init__(self):
        self.steps = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.steps += 1


def test_callbacks_and_own_optimizers_are_used(tmp_path):
    counter = CountSteps()
    options = (torch.optim.SGD, {"lr": 0.25})
    trainer = make_trainer(tmp_path, {}, callbacks=[counter], optimizer_cls_and_kwargs=options)
    trainer.train()
    assert counter.steps == 2
    assert isinstance(trainer.optimizer.optimizer, torch.optim.SGD)


def test_the_metrics_of_evaluation_are_those_that_may_choose_the_best_model(tmp_path):
    trainer = make_trainer(tmp_path, {}, evaluation=make_rows(12))
    metrics = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert {name for name in metrics if "recall" in name} == set(RETRIEVAL_METRICS)


# The document


def document_rows(title: str) -> dict[str, tuple[str, str]]:
    """Argument -> (status, remark) of the table below a heading."""
    section = DOCUMENT.read_text(encoding="utf-8").partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| `")
    ]
    return {cell[0].strip("`"): (cell[1], cell[2]) for cell in cells}


NEXT_STEP = (
    "transformers {version} has arguments that docs/training-arguments.md does not list: {names}. Try each with "
    "MLIPTrainer; add a row to the table, and a test in WORKING or an entry in argument_checks.REFUSED_VALUES."
)


def test_the_document_lists_every_argument_of_the_installed_transformers():
    new = set(FIELDS) - set(document_rows("TrainingArguments"))
    assert not new, NEXT_STEP.format(version=transformers.__version__, names=", ".join(sorted(new)))
    new = set(inspect.signature(Trainer.__init__).parameters) - {"self"} - set(document_rows("Trainer"))
    assert not new, NEXT_STEP.format(version=transformers.__version__, names=", ".join(sorted(new)))


def test_the_document_says_refused_where_the_trainer_refuses():
    rows = document_rows("TrainingArguments")
    assert {name for name, (status, _) in rows.items() if status == "refused"} == set(REFUSED_VALUES)
    rows = document_rows("Trainer")
    assert {name for name, (status, _) in rows.items() if status == "refused"} == set(REFUSED_TRAINER_ARGUMENTS)
    statuses = {status for status, _ in (document_rows("TrainingArguments") | rows).values()}
    assert statuses <= {"works", "refused", "command", "untested"}


def test_every_test_that_the_document_names_exists():
    text = DOCUMENT.read_text(encoding="utf-8")
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    for name in set(re.findall(r"\btest_\w+", text)):
        assert f"def {name}(" in tests or (list((ROOT / "tests").rglob(f"{name}.py"))), name
    rows = document_rows("TrainingArguments")
    assert set(WORKING) <= set(rows)
    for name, (status, remark) in rows.items():
        if status == "works":
            assert name in WORKING or "test_" in remark, f"{name}: name the test that shows it."
