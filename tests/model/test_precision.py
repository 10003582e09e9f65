# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Half precision, autocast, quantisation, several devices and gradient checkpointing."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import open_gate, pairs_batch, small_config, small_model
from model_cases import assert_same_gradient
from torch._subclasses.fake_tensor import FakeTensorMode

from modeling_mlip import (
    MLIPModel,
)
from modeling_mlip.losses import PairEmbeddings


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_outputs_are_close_to_float32(batch, dtype):
    model = open_gate(small_model(vision={"merge_ratio": 0.0}))
    exact = model(**batch, return_loss=True)
    half_batch = {**batch, "pixel_values": batch["pixel_values"].to(dtype)}
    half = model.to(dtype)(**half_batch, return_loss=True)
    assert half.image_embeds.dtype == dtype
    torch.testing.assert_close(half.image_embeds.float(), exact.image_embeds, rtol=0, atol=0.05)
    torch.testing.assert_close(half.loss.float(), exact.loss, rtol=0.05, atol=0)
    model.set_merge_ratio(0.5)
    merged = model(**half_batch, return_loss=True)
    assert merged.vision_model_output.last_hidden_state.dtype == dtype
    assert torch.isfinite(merged.loss)


def test_gradients_under_autocast_are_finite(batch):
    model = open_gate(small_model(vision={"merge_ratio": 0.5})).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch, return_loss=True).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("merge_method", ["mlip", "elip"])
def test_autocast_keeps_sizes_and_the_residual_stream_in_float32(merge_method):
    vision = {"merge_ratio": 0.7, "merge_method": merge_method, "merge_layers": [0], "image_size": 128}
    tower = small_model(vision=vision).vision_model
    streams: list[torch.Tensor] = []
    tower.encoder.layers[0].layer_norm2.register_forward_pre_hook(lambda module, inputs: streams.append(inputs[0]))
    tower.encoder.layers[0].self_attn.register_forward_hook(lambda module, inputs, outputs: streams.append(outputs[0]))
    before: list[torch.Tensor] = []
    tower.encoder.layers[0].register_forward_pre_hook(lambda module, inputs: before.append(inputs[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = tower(torch.randn(2, 3, 128, 128), output_token_map=True)
    patches = torch.zeros(2, output.token_sizes.shape[1]).scatter_add(1, output.token_map, torch.ones(2, 1024))
    assert output.token_sizes.dtype == torch.float32
    assert torch.equal(output.token_sizes, patches)
    alone = output.token_sizes.gather(1, output.token_map) == 1  # patches that merged with no other
    unmerged = (before[0] + streams[0])[:, 1:]
    merged = streams[1][:, 1:].gather(1, output.token_map[..., None].expand(-1, -1, 32))
    assert alone.any() and torch.equal(merged[alone], unmerged[alone])


def test_the_model_runs_on_the_meta_device():
    batch = {name: pairs_batch()[name].to("meta") for name in ("pixel_values", "input_ids")}
    assert small_model(vision={"merge_ratio": 0.5}).to("meta")(**batch).logits_per_image.shape == (5, 5)


def test_int8_layers_give_similar_embeddings(batch):
    model = open_gate(small_model(vision={"merge_ratio": 0.5}))
    exact = model(**batch).image_embeds
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    embeds = quantised(**batch).image_embeds
    assert (embeds * exact).sum(dim=-1).min() > 0.9 and not torch.equal(embeds, exact)


def test_initialisation_skips_layers_without_a_weight():
    model = small_model(vision={"merge_ratio": 0.5})
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = None
    for module in model.modules():
        model._init_weights(module)


def test_a_model_on_two_devices_moves_tensors_between_them():
    """Fake tensors replace two GPUs: devices are checked, and nothing is computed."""
    layers = [f"vision_model.encoder.layers.{layer}" for layer in range(4)]
    first = ("text_model", "vision_model.embeddings", "vision_model.pre_layrnorm", "logit_scale", *layers[:3])
    placed = ["text_model", *(f"vision_model.{name}" for name in ("embeddings", "pre_layrnorm", "frequency")), *layers]
    with FakeTensorMode():
        model = MLIPModel(small_config(vision={"merge_ratio": 0.5})).eval()
        modules = dict(model.named_modules())
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            owner, _, key = name.rpartition(".")
            moved = torch.empty(
                tensor.shape, dtype=tensor.dtype, device="cuda:0" if name.startswith(first) else "cuda:1"
            )
            is_parameter = key in modules[owner]._parameters
            setattr(modules[owner], key, torch.nn.Parameter(moved) if is_parameter else moved)
        placed += ["vision_model.post_layernorm", *(name for name in modules if name.endswith("_projection"))]
        for name in placed:
            device = "cuda:0" if name.startswith(first) else "cuda:1"
            add_hook_to_module(modules[name], AlignDevicesHook(execution_device=device, place_submodules=False))
        batch = {key: torch.empty_like(value, device="cuda:0") for key, value in pairs_batch().items()}
        features = model.get_image_features(batch["pixel_values"], output_token_map=True)
        outputs = model(**batch, image_ids=torch.empty(5, dtype=torch.long, device="cuda:0"), return_pairs=True)
        loss_names = instance_loss_names(model, outputs.pairs)
    assert features.token_map.device == features.pooler_output.device == torch.device("cuda:1")
    assert loss_names == {"spatial_loss", "frequency_loss", "loss"}


def instance_loss_names(model: MLIPModel, pairs: PairEmbeddings) -> set[str]:
    """Without the token loss, which reads the values of a tensor; fake tensors have none."""
    return set(model.compute_losses(pairs._replace(tokens=None)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(batch, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        model = open_gate(small_model(vision={"merge_ratio": 0.6})).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
            assert model.vision_model.encoder.layers[0].gradient_checkpointing
        model(**batch, return_loss=True).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_same_gradient(gradients[1][name], gradient, name)
