# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The figures that a run logs: means of losses, pairs per second of training alone, tokens of each layer."""

import time

import pytest
import torch
from accelerate import Accelerator

from modeling_mlip.training.training_log import TrainingLog


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_losses_are_means_over_the_finite_steps():
    log = TrainingLog("cpu")
    for value, total in ((1.0, 2.0), (5.0, torch.nan), (3.0, 4.0)):
        log.add_batch(num_pairs=2, num_truncated=1)
        log.add_losses({"any_loss": torch.tensor(value), "loss": torch.tensor(total)})
    logs = log.summarize(Accelerator(cpu=True))
    assert logs["any_loss"] == 2.0 and logs["truncated_captions"] == 3.0 and "loss" not in logs
    log.add_batch(num_pairs=2, num_truncated=0)
    log.add_losses({"any_loss": torch.tensor(torch.inf), "loss": torch.tensor(torch.inf)})
    assert "any_loss" not in log.summarize(Accelerator(cpu=True))


def test_time_of_evaluation_and_saving_does_not_count(clock):
    log = TrainingLog("cpu")
    log.add_batch(num_pairs=10, num_truncated=0)
    clock[0] += 2
    with log.paused():
        clock[0] += 1000
    log.add_batch(num_pairs=10, num_truncated=0)
    clock[0] += 3
    assert log.summarize(Accelerator(cpu=True))["images_per_second"] == 20 / 5
    with log.paused():
        clock[0] += 1000
    log.add_batch(num_pairs=8, num_truncated=0)
    clock[0] += 2
    assert log.summarize(Accelerator(cpu=True))["images_per_second"] == 8 / 2
    assert log.total_pairs == 28


def test_tokens_are_those_of_the_last_step():
    log = TrainingLog("cpu")
    log.add_batch(num_pairs=1, num_truncated=0)
    log.set_tokens(64, [8, 0, 16])
    log.set_tokens(64, [32, 0, 0])
    logs = log.summarize(Accelerator(cpu=True))
    assert [logs[f"vision_tokens_layer_{n}"] for n in range(3)] == [32, 32, 32]
