# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Every model class, every attention kernel and the training step on a GPU, in bfloat16 and float16.

`pytest -m gpu` runs these tests alone. `MLIP_GPU_TESTS_DEVICE=cpu` runs them on a CPU, to check the tests themselves.
"""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import open_gate, pairs_batch, small_config, small_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention
from training_cases import make_processor, make_rows
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import modeling_mlip
from modeling_mlip import MLIPModel
from modeling_mlip.training import MLIPTrainer, MLIPTrainingArguments

DEVICE = os.environ.get("MLIP_GPU_TESTS_DEVICE", "cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="no CUDA device"),
]
needs_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="the CPU has no such kernel or gradient scaler")
CLASSES = (
    "MLIPModel",
    "MLIPVisionModel",
    "MLIPTextModel",
    "MLIPVisionModelWithProjection",
    "MLIPTextModelWithProjection",
    "MLIPForImageClassification",
)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
# Layer 0 sees the same states with every kernel, so that all of them merge the same tokens.
MERGING = {"merge_ratio": 0.5, "merge_layers": [0]}


def build(name: str, merge_ratio: float = 0.0) -> torch.nn.Module:
    """A random model of a class in float32 on the CPU."""
    torch.manual_seed(0)
    config = small_config(vision={**MERGING, "merge_ratio": merge_ratio})
    part = config.text_config if "Text" in name else config.vision_config if "Vision" in name else config
    return getattr(modeling_mlip, name)(part).eval()


def inputs_of(name: str, device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    keys = ("input_ids", "attention_mask") if "Text" in name else ("pixel_values",)
    keys = ("pixel_values", "input_ids", "attention_mask") if name == "MLIPModel" else keys
    batch = {key: pairs_batch()[key].to(device) for key in keys}
    return {key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()}


def main_output(outputs) -> torch.Tensor:
    names = ("image_embeds", "text_embeds", "logits", "pooler_output")
    return next(outputs[name] for name in names if name in outputs)


def assert_same_direction(ours: torch.Tensor, theirs: torch.Tensor, least: float) -> None:
    ours, theirs = ours.detach().float().cpu().flatten(1), theirs.detach().float().cpu().flatten(1)
    assert cosine_similarity(ours, theirs, dim=1).min() > least


# Every class


@DTYPES
@pytest.mark.parametrize("name", CLASSES)
def test_forward_and_backward_are_close_to_float32_on_the_cpu(name, dtype):
    results = []
    for device, kind in (("cpu", torch.float32), (DEVICE, dtype)):
        model = build(name).to(device, kind)
        output = main_output(model(**inputs_of(name, device, kind)))
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(device)
        (output.float() * direction).sum().backward()
        gradients = [p.grad.float().cpu().flatten() for p in model.parameters() if p.grad is not None]
        results.append((output, torch.cat(gradients)))
    (expected, expected_gradient), (ours, our_gradient) = results
    assert_same_direction(ours, expected, 0.99)
    assert (our_gradient - expected_gradient).norm() < 0.1 * expected_gradient.norm()


@DTYPES
@pytest.mark.parametrize("name", CLASSES)
def test_a_merging_model_is_finite_forward_and_backward(name, dtype):
    model = build(name, merge_ratio=0.5).to(DEVICE, dtype)
    main_output(model(**inputs_of(name, DEVICE, dtype))).float().square().mean().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("name", CLASSES)
def test_a_saved_model_loads_with_the_same_outputs(name, dtype, tmp_path):
    model = build(name, merge_ratio=0.5).to(DEVICE, dtype)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype, device_map=DEVICE).eval()
    inputs = inputs_of(name, DEVICE, dtype)
    assert torch.equal(main_output(loaded(**inputs)), main_output(model(**inputs)))


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("name", CLASSES)
def test_a_compiled_model_gives_close_outputs(name, dtype):
    torch._dynamo.reset()
    model, inputs = build(name).to(DEVICE, dtype), inputs_of(name, DEVICE, dtype)
    assert_same_direction(main_output(torch.compile(model)(**inputs)), main_output(model(**inputs)), 0.99)


@torch.no_grad()
@DTYPES
def test_a_compiled_model_merges(dtype):
    torch._dynamo.reset()
    model, inputs = build("MLIPVisionModel", 0.5).to(DEVICE, dtype), inputs_of("MLIPVisionModel", DEVICE, dtype)
    outputs = torch.compile(model)(**inputs)
    assert torch.equal(outputs.token_sizes.sum(dim=1).cpu(), torch.full((5,), 64.0))
    assert torch.isfinite(outputs.pooler_output).all()


class OneOutput(torch.nn.Module):
    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return main_output(self.model(**inputs))


@torch.no_grad()
@DTYPES
@pytest.mark.parametrize("name", CLASSES)
def test_an_exported_model_gives_the_same_outputs(name, dtype):
    module, inputs = OneOutput(build(name, 0.5).to(DEVICE, dtype)), inputs_of(name, DEVICE, dtype)
    program = torch.export.export(module, (), inputs)
    assert_same_direction(program.module()(**inputs), module(**inputs), 0.999)


# Attention


def attend_by_flash(module, queries, keys, values, attention_mask, scaling, dropout=0.0, **kwargs):
    """torch's own flash kernel, which takes no bias."""
    assert attention_mask is None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        outputs = scaled_dot_product_attention(queries, keys, values, dropout_p=dropout, scale=scaling)
    return outputs.transpose(1, 2), None


@DTYPES
@pytest.mark.parametrize("kernel", ["sdpa", "flash", pytest.param("flex_attention", marks=needs_cuda)])
def test_each_attention_kernel_gives_the_embeddings_and_gradients_of_eager(monkeypatch, kernel, dtype):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash", attend_by_flash)
    pixels, results = pairs_batch()["pixel_values"].to(DEVICE, dtype), {}
    for name in ("eager", kernel):
        tower = small_model(vision={**MERGING, "num_attention_heads": 2}).vision_model.to(DEVICE, dtype)
        tower.config._attn_implementation_internal = name
        outputs = tower(pixels)
        outputs.pooler_output.float().square().mean().backward()
        results[name] = (outputs, tower.encoder.layers[1].self_attn.q_proj.weight.grad)
    assert torch.equal(results[kernel][0].token_sizes, results["eager"][0].token_sizes)
    torch.testing.assert_close(results[kernel][0].pooler_output, results["eager"][0].pooler_output, rtol=0.02, atol=0.1)
    assert_same_direction(results[kernel][1][None], results["eager"][1][None], 0.95)


# Training


def train_steps(bf16: bool, merge_ratio: float) -> torch.Tensor:
    """The losses of 20 steps of AdamW on one batch."""
    model = open_gate(small_model(vision={"merge_ratio": merge_ratio})).to(DEVICE).train()
    batch = {name: values.to(DEVICE) for name, values in pairs_batch(16).items()}
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(20):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=bf16):
            loss = model(**batch, return_loss=True).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach().float())
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("merge_ratio", [0.0, 0.5])
def test_twenty_autocast_steps_have_the_losses_of_float32_within_the_error_of_bfloat16(merge_ratio):
    exact, half = (train_steps(bf16, merge_ratio) for bf16 in (False, True))
    torch.testing.assert_close(half, exact, rtol=0.1, atol=0.05)
    assert exact[-1] < 0.9 * exact[0] and half[-1] < 0.9 * half[0]


def step_trainer(folder: Path, **arguments) -> MLIPTrainer:
    """A trainer that is ready for `training_step`."""
    model = small_model(vision={"merge_ratio": 0.5}).train()
    args = MLIPTrainingArguments(str(folder), use_cpu=DEVICE == "cpu", report_to="none", **arguments)
    trainer = MLIPTrainer(model, args, train_dataset=[None] * 99, processing_class=SimpleNamespace(tokenizer=None))
    trainer.current_gradient_accumulation_steps = 1
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(model, trainer.optimizer)
    return trainer


def test_mini_batches_have_the_gradients_of_the_whole_batch(tmp_path):
    gradients = []
    for size in (None, 3):
        trainer = step_trainer(tmp_path, mini_batch_size=size)
        trainer.training_step(trainer.model_wrapped, pairs_batch(8))
        gradients.append({name: p.grad for name, p in trainer.model.named_parameters()})
    for name, expected in gradients[0].items():
        largest = max(float(expected.abs().max()), 1)
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=1e-4 * largest, msg=name)


PROCESSOR = make_processor()


def run_trainer(folder: Path, resume: bool = False, **arguments) -> MLIPModel:
    tokenizer = PROCESSOR.tokenizer
    text = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = small_model(vision={"merge_ratio": 0.5}, text={**text, "vocab_size": len(tokenizer)}).train()
    settings = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 6, "logging_steps": 1, **arguments}
    args = MLIPTrainingArguments(str(folder), use_cpu=DEVICE == "cpu", report_to="none", **settings)
    trainer = MLIPTrainer(model, args, train_dataset=make_rows(12), processing_class=PROCESSOR)
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
    return trainer.model


def test_a_resumed_run_ends_with_the_weights_of_an_undisturbed_run(tmp_path):
    whole = run_trainer(tmp_path, bf16=True).state_dict()
    resumed = run_trainer(tmp_path, resume=True, bf16=True).state_dict()
    for name, expected in whole.items():  # index addition on a GPU has no fixed order
        torch.testing.assert_close(resumed[name], expected, rtol=0, atol=1e-4, msg=name)


@needs_cuda
def test_float16_training_with_the_gradient_scaler_is_finite(tmp_path):
    model = run_trainer(tmp_path, fp16=True)
    assert all(torch.isfinite(p).all() for p in model.parameters())
