# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""ZeRO-2 trains, resumes and saves what DDP does; parts of it with stand-ins for DeepSpeed."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import small_model
from processes import run_in_fork

from modeling_mlip.losses import MAX_LOGIT_SCALE
from modeling_mlip.training.deepspeed_shards import (
    broadcasting_scalars,
    check_deepspeed_config,
    updating_master_scalars,
)
from modeling_mlip.training.trainer import MLIPTrainer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
NEEDS_DEEPSPEED = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed")


@NEEDS_DEEPSPEED
def test_two_processes_train_resume_and_save_what_ddp_does(tmp_path):
    def compare() -> int:  # benchmarks/deepspeed_engines.py
        sys.path.insert(0, str(BENCHMARKS))
        from deepspeed_engines import main as deepspeed_engines

        return deepspeed_engines(["--quick", "--output", str(tmp_path / "record.json")])

    status = run_in_fork(compare, tmp_path / "log.txt")
    assert status == 0, (tmp_path / "log.txt").read_text()
    runs = json.loads((tmp_path / "record.json").read_text())["runs"]
    assert [run["form"] for run in runs] == ["mini-batches", "resumed at step 2"]
    assert all(run["logit_scale"] < MAX_LOGIT_SCALE for run in runs)


@pytest.mark.parametrize(
    "config, has_parameters, message",
    [
        ({"optimizer": {}}, False, "sets 'optimizer'.*set optim"),
        ({"scheduler": {}}, False, "sets 'scheduler'.*lr_scheduler_type"),
        ({"zero_optimization": {"stage": 3}}, False, "ZeRO-3 does not save .*Use stage 2, or FSDP2"),
        ({"fp16": {"enabled": True}}, True, "fp16 .*Use bf16"),
    ],
)
def test_a_file_that_mlip_trainer_does_not_support_is_refused(config, has_parameters, message):
    with pytest.raises(ValueError, match=message):
        check_deepspeed_config(config, has_parameters)


def test_the_file_of_the_recipes_is_accepted():
    check_deepspeed_config(json.loads((BENCHMARKS.parent / "recipes" / "zero2.json").read_text()), True)


def test_scalars_have_an_axis_while_deepspeed_sends_the_weights_and_none_after(monkeypatch):
    """torch cannot view a tensor without axes as the bytes that DeepSpeed sends."""

    class Engine:
        module = small_model()

        def _broadcast_model(self):
            for parameter in self.module.parameters():
                parameter.data.view(torch.uint8).zero_()

    stand_in = ModuleType("deepspeed.runtime.engine")
    stand_in.DeepSpeedEngine = Engine
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.runtime", ModuleType("deepspeed.runtime"))
    monkeypatch.setitem(sys.modules, "deepspeed.runtime.engine", stand_in)
    with pytest.raises(RuntimeError, match="cannot be 0"):
        Engine()._broadcast_model()
    names = list(Engine.module.scalar_parameters())
    with broadcasting_scalars():
        Engine()._broadcast_model()
    assert names and list(Engine.module.scalar_parameters()) == names
    assert not any(parameter.any() for parameter in Engine.module.parameters())
    with pytest.raises(RuntimeError, match="cannot be 0"):
        Engine()._broadcast_model()


def test_a_limited_temperature_reaches_the_weight_that_deepspeed_optimises(monkeypatch):
    model, written = small_model(), []
    with torch.no_grad():
        model.logit_scale.fill_(5.0)
    utils = ModuleType("deepspeed.utils")
    utils.safe_set_full_fp32_param = lambda scalar, value: written.append((scalar, value))
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    monkeypatch.setitem(sys.modules, "deepspeed.utils", utils)
    with updating_master_scalars(model):
        model.clamp_logit_scales()
    [(scalar, value)] = written
    assert scalar is model.logit_scale
    assert value.shape == (1,) and value.item() == pytest.approx(MAX_LOGIT_SCALE)


def test_the_backward_pass_of_a_scalar_has_the_gradients_of_one_from_many_tensors():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    scale = torch.tensor(0.5, dtype=torch.float64).requires_grad_()
    rows = torch.randn(5, 3, generator=generator, dtype=torch.float64) @ weight
    gradient, scale_gradient = torch.randn(5, 4, generator=generator, dtype=torch.float64), torch.tensor(2.0).double()
    roots = [(rows, gradient), (scale, scale_gradient)]
    torch.autograd.backward(*zip(*roots, strict=True), retain_graph=True)
    expected, weight.grad, scale.grad = (weight.grad, scale.grad), None, None
    calls = []

    def backward(loss, **settings):
        calls.append(settings)
        loss.backward()

    engine = SimpleNamespace(backward=backward)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(deepspeed_engine_wrapped=engine))
    MLIPTrainer._deepspeed_backward(trainer, roots, synchronises=False)
    assert calls == [{"sync_gradients": False, "scale_wrt_gas": False}]
    torch.testing.assert_close((weight.grad, scale.grad), expected, rtol=1e-12, atol=0)
