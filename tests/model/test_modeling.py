# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""modeling_mlip.py against transformers' CLIP with the same weights, and token merging against plain references."""

import math

import pytest
import torch
from conftest import open_gate, small_config, small_model
from model_cases import MLIP_PARAMETERS, assert_same_gradient, clip_and_mlip

from modeling_mlip import (
    MLIPForImageClassification,
    MLIPModel,
    MLIPTextModel,
    MLIPTextModelWithProjection,
    MLIPVisionModel,
    MLIPVisionModelWithProjection,
)
from modeling_mlip.losses import MAX_LOGIT_SCALE
from modeling_mlip.token_merging import unmerge

# Equal to CLIP


@pytest.mark.parametrize("frequency_layers", [0, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_merging_outputs_and_gradients_equal_those_of_clip(batch, frequency_layers, attention):
    theirs, ours = clip_and_mlip(frequency_layers=frequency_layers, merge_ratio=0.0)
    for model in (theirs, ours):
        model.set_attn_implementation(attention)
    expected = theirs(**batch, return_loss=True)
    outputs = ours(**batch, return_loss=True)
    for name in ("image_embeds", "text_embeds", "logits_per_image", "logits_per_text"):
        torch.testing.assert_close(outputs[name], expected[name], rtol=0, atol=1e-5)
    torch.testing.assert_close(outputs.spatial_loss, expected.loss, rtol=0, atol=1e-5)
    expected.loss.backward()
    outputs.spatial_loss.backward()
    gradients = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        assert_same_gradient(gradients[name].grad, parameter.grad, name)


def test_the_first_two_tuple_outputs_of_the_vision_tower_are_those_of_clip(batch):
    model = small_model(vision={"merge_ratio": 0.5}).vision_model
    outputs = model(batch["pixel_values"])
    first, second = model(batch["pixel_values"], return_dict=False)[:2]
    assert torch.equal(first, outputs.last_hidden_state)
    assert torch.equal(second, outputs.pooler_output)


def test_return_dict_false_in_the_configuration_gives_tuples_of_the_same_values(batch):
    model = open_gate(small_model(vision={"merge_ratio": 0.5}))
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    text = MLIPTextModelWithProjection(model.config.text_config).eval()
    vision = MLIPVisionModelWithProjection(model.config.vision_config).eval()
    classifier = MLIPForImageClassification(small_config(num_labels=3)).eval()
    cases = [
        (model, {**batch, "return_loss": True}),
        (text, {"input_ids": ids}),
        (vision, {"pixel_values": pixels}),
        (classifier, {"pixel_values": pixels, "labels": torch.tensor([0, 1, 2, 0, 1])}),
    ]
    expected = [module(**inputs) for module, inputs in cases]
    for (module, inputs), outputs in zip(cases, expected, strict=True):
        for part in module.modules():
            if hasattr(part, "config"):
                part.config.return_dict = False
        values = module(**inputs)
        assert isinstance(values, tuple) and len(values) == len(outputs)
        assert torch.equal(values[0], outputs[0])


def test_a_frequency_gate_of_zero_leaves_the_outputs_bit_equal(batch):
    with_stage = small_model()
    without = small_model(vision={"frequency_layers": 0})
    without.load_state_dict(with_stage.state_dict(), strict=False)
    a, b = (model.get_image_features(batch["pixel_values"]) for model in (with_stage, without))
    assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    opened = open_gate(with_stage).get_image_features(batch["pixel_values"])
    assert not torch.allclose(opened.last_hidden_state, b.last_hidden_state)


def test_a_frequency_gate_of_zero_has_a_gradient(batch):
    model = small_model(frequency_loss_weight=0.0, token_loss_weight=0.0)
    model(**batch, return_loss=True).loss.backward()
    assert model.vision_model.frequency.gate.grad.abs().min() > 0


@pytest.mark.parametrize("merge_ratio", [0.0, 0.5])
def test_every_parameter_has_a_gradient(batch, merge_ratio):
    model = open_gate(small_model(vision={"merge_ratio": merge_ratio})).train()
    model(**batch, return_loss=True).loss.backward()
    unmoved = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    # The bias of the keys adds the same number to all logits of a query, which softmax ignores.
    assert not [name for name in unmoved if "k_proj.bias" not in name]


def test_frequency_features_do_not_depend_on_position_or_strength_within_a_patch():
    """For patches with amplitudes far above `POWER_FLOOR`. The patch embedding depends on position and strength."""
    model = small_model(vision={"patch_size": 8})
    torch.manual_seed(0)
    patches = 50 * torch.randn(2, 3, 4, 4, 8, 8)
    variants = {"original": patches, "shifted": patches.roll((3, 2), dims=(4, 5)), "stronger": 20 * patches}
    variants["different"] = 50 * torch.randn_like(patches)
    images = {name: x.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32) for name, x in variants.items()}
    features = {name: model.vision_model(pixels).frequency_hidden_state for name, pixels in images.items()}
    torch.testing.assert_close(features["shifted"], features["original"], rtol=0, atol=1e-4)
    torch.testing.assert_close(features["stronger"], features["original"], rtol=0, atol=0.02)
    assert (features["different"] - features["original"]).abs().max() > 0.1
    embedded = {name: model.vision_model.embeddings(pixels) for name, pixels in images.items()}
    assert all((embedded[name] - embedded["original"]).abs().max() > 1 for name in ("shifted", "stronger"))


def test_parts_that_the_configuration_leaves_out_have_no_parameters():
    model = small_model(vision={"frequency_layers": 0}, token_loss_weight=0.0)
    assert not [name for name, _ in model.named_parameters() if any(part in name for part in MLIP_PARAMETERS)]


# Merging


def test_merging_keeps_the_configured_fraction_and_sizes_count_every_patch(batch):
    model = open_gate(small_model(vision={"merge_ratio": 0.7}))
    outputs = model.get_image_features(batch["pixel_values"], output_token_map=True)
    num_left = round(64 * 0.3)
    assert outputs.last_hidden_state.shape == (5, 1 + num_left, 32)
    assert outputs.frequency_hidden_state.shape == (5, num_left, 8)
    assert outputs.token_sizes.shape == (5, num_left)
    assert (outputs.token_sizes.sum(dim=1) == 64).all()
    assert outputs.token_map.shape == (5, 64)
    for sizes, token_map in zip(outputs.token_sizes, outputs.token_map, strict=True):
        assert token_map.bincount(minlength=num_left).tolist() == sizes.tolist()
    grid = unmerge(outputs.last_hidden_state[:, 1:], outputs.token_map).unflatten(1, (8, 8))
    assert grid.shape == (5, 8, 8, 32)


@pytest.mark.parametrize("merge_method", ["mlip", "ward", "tome", "elip"])
@pytest.mark.parametrize("frequency_layers", [0, 2])
def test_eager_equals_sdpa_with_merging(batch, merge_method, frequency_layers):
    vision = {"merge_ratio": 0.6, "merge_method": merge_method, "frequency_layers": frequency_layers}
    model = small_model(vision=vision)
    if frequency_layers:
        open_gate(model)
    outputs = {}
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        outputs[attention] = model.vision_model(batch["pixel_values"], output_token_map=True)
    assert torch.equal(outputs["eager"].token_map, outputs["sdpa"].token_map)
    torch.testing.assert_close(outputs["eager"].last_hidden_state, outputs["sdpa"].last_hidden_state, rtol=0, atol=1e-5)


def test_merging_equal_patches_changes_no_embedding():
    """With log(size) in attention, a merged token counts as the equal tokens that it replaces."""
    model = small_model(vision={"frequency_layers": 0, "merge_layers": [0]})
    with torch.no_grad():  # without position embeddings, all patches of a uniform image are equal
        model.vision_model.embeddings.position_embedding.weight.zero_()
    plain = torch.randn(2, 3, 1, 1).expand(2, 3, 32, 32)
    whole = model.get_image_features(plain).pooler_output
    model.set_merge_ratio(0.9)
    merged = model.get_image_features(plain)
    assert merged.last_hidden_state.shape[1] == 1 + 6
    torch.testing.assert_close(merged.pooler_output, whole, rtol=0, atol=1e-5)


def test_hidden_states_and_attentions_have_the_number_of_tokens_of_their_layer(batch):
    model = small_model(vision={"merge_ratio": 0.5})
    model.set_attn_implementation("eager")
    outputs = model(**batch, output_hidden_states=True, output_attentions=True).vision_model_output
    tokens = [65, 65, 52, 41, 33]  # merge layers 1, 2 and 3 of 4, each keeping about 0.5 ** (1 / 3)
    assert [states.shape for states in outputs.hidden_states] == [(5, length, 32) for length in tokens]
    assert [weights.shape for weights in outputs.attentions] == [(5, 4, n, n) for n in tokens[:-1]]
    outputs.hidden_states[0].retain_grad()
    outputs.attentions[0].retain_grad()
    outputs.pooler_output.sum().backward()
    assert outputs.hidden_states[0].grad.abs().sum() > 0
    assert outputs.attentions[0].grad.abs().sum() > 0


def test_set_merge_ratio_works_on_every_class_and_refuses_invalid_values(batch):
    pixels = batch["pixel_values"]
    config = small_config()
    for model in (
        MLIPModel(config),
        MLIPVisionModel(config.vision_config),
        MLIPVisionModelWithProjection(config.vision_config),
        MLIPForImageClassification(config),
    ):
        tower = getattr(model, "vision_model", model)
        model.set_merge_ratio(0.5)
        assert tower(pixels).token_sizes.shape[1] == 32
        for invalid in (1.0, -0.1, 0.999):
            with pytest.raises(Exception, match="merge_ratio"):
                model.set_merge_ratio(invalid)
        assert tower(pixels).token_sizes.shape[1] == 32  # a refused value changes nothing
        model.set_merge_ratio(0)
        assert tower(pixels).token_sizes.shape[1] == 64
    with pytest.raises(ValueError, match="no vision tower"):
        MLIPTextModel(config.text_config).set_merge_ratio(0.5)


def test_an_image_merges_the_same_alone_and_in_a_batch(batch):
    model = open_gate(small_model(vision={"merge_ratio": 0.6}))
    together = model.get_image_features(batch["pixel_values"], output_token_map=True)
    for index in range(5):
        alone = model.get_image_features(batch["pixel_values"][index : index + 1], output_token_map=True)
        assert torch.equal(alone.token_map[0], together.token_map[index])
        torch.testing.assert_close(alone.pooler_output[0], together.pooler_output[index], rtol=0, atol=1e-5)


def test_a_large_importance_weight_merges_the_tokens_with_the_least_class_attention(batch):
    """At a weight far above all similarities, importance alone ranks the pairs."""
    vision = {"merge_ratio": 0.25, "merge_importance_weight": 1e4, "merge_layers": [1], "frequency_layers": 0}
    model = small_model(vision=vision)
    model.set_attn_implementation("eager")
    outputs = model.vision_model(batch["pixel_values"], output_token_map=True, output_attentions=True)
    attention = outputs.attentions[1].mean(dim=1)[:, 0, 1:]  # the layer that merges: the class token's row
    for index in range(5):
        proposers = torch.arange(1, 64, 2)
        gone = proposers[attention[index, proposers].argsort()[:16]]  # the 16 of 32 with the least attention
        survivors = torch.tensor([patch for patch in range(64) if patch not in gone])
        assert outputs.token_map[index, survivors].tolist() == list(range(48))


@pytest.mark.parametrize("use_class_token", [True, False])
@pytest.mark.parametrize("frequency_layers", [0, 1])
def test_without_importance_the_tokens_merge_as_at_a_weight_that_rounding_removes(
    batch, use_class_token, frequency_layers
):
    """At weight 0 the tower leaves the importance out. At 1e-30 it computes it, and no float32 similarity changes."""
    vision = {"merge_ratio": 0.6, "use_class_token": use_class_token, "frequency_layers": frequency_layers}
    vision |= {"pooling": "class" if use_class_token else "mean"}
    losses = {} if frequency_layers else {"frequency_loss_weight": 0.0, "token_loss_frequency": False}
    without, negligible = (
        small_model(vision={**vision, "merge_importance_weight": weight}, **losses) for weight in (0, 1e-30)
    )
    attended = []
    for model in (without, negligible):
        match = model.vision_model.encoder.layers[1]._match
        model.vision_model.encoder.layers[1]._match = lambda patches, guide, *rest, match=match: (
            attended.append(guide[1] is not None) or match(patches, guide, *rest)
        )
    ours, theirs = (
        model.get_image_features(batch["pixel_values"], output_token_map=True) for model in (without, negligible)
    )
    assert attended == [False, True]
    assert torch.equal(ours.token_map, theirs.token_map)
    assert torch.equal(ours.pooler_output, theirs.pooler_output)


def test_elip_equals_keeping_the_most_attended_tokens_of_clip_and_fusing_the_others(batch):
    """One merge written out with the modules of CLIP; later layers add log(size) of the fused token to their logits."""
    theirs, ours = clip_and_mlip(frequency_layers=0, merge_ratio=0.75, merge_method="elip", merge_layers=[1])
    theirs.set_attn_implementation("eager")
    theirs, ours = theirs.double(), ours.double()
    pixels = batch["pixel_values"].double()
    tower = theirs.vision_model
    states = tower.pre_layrnorm(tower.embeddings(pixels))
    bias = None
    for index, layer in enumerate(tower.encoder.layers):
        attended, weights = layer.self_attn(layer.layer_norm1(states), attention_mask=bias)
        states = states + attended
        if index == 1:
            attention = weights.mean(dim=1)[:, 0, 1:]
            rows = []
            for image in range(5):
                stay = attention[image].topk(15).indices.sort().values
                fused = torch.tensor([token for token in range(64) if token not in stay])
                share = attention[image, fused] / attention[image, fused].sum()
                patches = states[image, 1:]
                rows.append(torch.cat([states[image, :1], patches[stay], (share @ patches[fused])[None]]))
            states = torch.stack(rows)
            bias = torch.zeros(17, dtype=torch.float64)
            bias[-1] = torch.tensor(49.0).log()
        states = states + layer.mlp(layer.layer_norm2(states))
    expected = theirs.visual_projection(tower.post_layernorm(states[:, 0]))
    torch.testing.assert_close(ours.get_image_features(pixels).pooler_output, expected, rtol=0, atol=1e-6)


def test_captions_guide_elip_in_training_and_never_in_evaluation(batch):
    model = small_model(vision={"merge_ratio": 0.6, "merge_method": "elip"})
    other = {**batch, "input_ids": batch["input_ids"].roll(1, 0), "attention_mask": batch["attention_mask"].roll(1, 0)}

    def token_maps(model, batch):
        return model(**batch, return_loss=True, output_token_map=True).vision_model_output.token_map

    assert torch.equal(token_maps(model, batch), token_maps(model, other))
    assert not torch.equal(token_maps(model.train(), batch), token_maps(model, other))
    model.config.vision_config.merge_caption_weight = 0
    unguided = token_maps(model, batch)
    assert torch.equal(unguided, token_maps(model, other))
    assert torch.equal(unguided, token_maps(model.eval(), batch))


def test_at_caption_weight_1_elip_keeps_the_tokens_with_the_most_attention_from_the_caption(batch):
    """The caption alone guides the merge; its query is computed here from the projection weights."""
    vision = {"merge_ratio": 0.5, "merge_method": "elip", "merge_layers": [2], "merge_caption_weight": 1.0}
    model = small_model(vision=vision)
    text_embeds = torch.nn.functional.normalize(model.get_text_features(batch["input_ids"]).pooler_output, dim=-1)
    outputs = model.get_image_features(
        batch["pixel_values"], text_embeds=text_embeds, output_token_map=True, output_hidden_states=True
    )
    layer, states = model.vision_model.encoder.layers[2], outputs.hidden_states[2]
    direction = text_embeds @ model.visual_projection.weight * model.vision_model.post_layernorm.weight
    # The LayerNorm removes the length, so any multiple of the direction gives the same query.
    query = layer.self_attn.q_proj(layer.layer_norm1(direction * 100)).view(5, 4, 8)
    keys = layer.self_attn.k_proj(layer.layer_norm1(states)).view(5, 65, 4, 8)
    attention = (torch.einsum("bhd,bshd->bhs", query, keys) * 8**-0.5).softmax(dim=-1).mean(dim=1)[:, 1:]
    for image in range(5):
        stay = attention[image].topk(31).indices.sort().values
        assert outputs.token_map[image, stay].tolist() == list(range(31))


def test_other_image_sizes_work_with_interpolated_positions_only(batch):
    model = open_gate(small_model(vision={"merge_ratio": 0.5}))
    larger = torch.nn.functional.interpolate(batch["pixel_values"], size=(48, 40))
    outputs = model.get_image_features(larger, interpolate_pos_encoding=True, output_token_map=True)
    assert outputs.token_map.shape == (5, 120)
    assert outputs.token_sizes.shape == (5, 60)
    same = model.get_image_features(batch["pixel_values"], interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(same, model.get_image_features(batch["pixel_values"]).pooler_output, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="do not match image_size=32"):
        model.get_image_features(larger)
    with pytest.raises(ValueError, match="not divisible by patch_size=4"):
        model.get_image_features(larger[..., :39], interpolate_pos_encoding=True)


def test_mean_pooling_is_weighted_by_size(batch):
    vision = {"pooling": "mean", "use_pre_layernorm": False, "layer_scale_init_value": 0.1, "merge_ratio": 0.5}
    model = small_model(vision=vision)
    outputs = model.vision_model(batch["pixel_values"], output_token_map=True)
    patches = unmerge(outputs.last_hidden_state[:, 1:], outputs.token_map)
    expected = model.vision_model.post_layernorm(patches.mean(dim=1))
    torch.testing.assert_close(outputs.pooler_output, expected, rtol=0, atol=1e-5)


# Parameters and modules


def test_scalar_parameters_returns_every_scalar_and_only_temperatures_are_clamped():
    class WithOffset(MLIPModel):
        def __init__(self, config):
            super().__init__(config)
            self.offset = torch.nn.Parameter(torch.tensor(50.0))

    model = WithOffset(small_config())
    scales = ["logit_scale", "frequency_logit_scale", "token_logit_scale"]
    assert list(model.scalar_parameters()) == [*scales, "offset"]
    assert list(small_model(vision={"frequency_layers": 0}, token_loss_weight=0).scalar_parameters()) == scales[:1]
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
        model.token_logit_scale.fill_(-9.0)
    model.clamp_logit_scales()
    assert model.logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)
    assert model.token_logit_scale.item() == -9 and model.offset.item() == 50
    assert model.logit_scale.requires_grad


def test_a_sigmoid_model_has_biases_in_its_logits_and_scales_without_a_maximum(batch):
    keys = {"instance_loss": "sigmoid", "logit_scale_init_value": 5.0, "logit_bias_init_value": -13}
    model = MLIPModel(small_config(**keys)).eval()
    biases = {name: scalar.item() for name, scalar in model.scalar_parameters().items() if "bias" in name}
    assert biases == {"logit_bias": -13, "frequency_logit_bias": -13}
    model.clamp_logit_scales()
    assert model.logit_scale.item() == model.frequency_logit_scale.item() == 5
    assert model.token_logit_scale.item() == pytest.approx(MAX_LOGIT_SCALE)  # this loss is InfoNCE
    outputs = model(**batch)
    expected = outputs.text_embeds @ outputs.image_embeds.t() * math.exp(5) - 13
    torch.testing.assert_close(outputs.logits_per_text, expected)
    assert MLIPModel(small_config()).logit_bias is None


@pytest.mark.parametrize("vision", [{}, {"frequency_layers": 0}, {"use_class_token": False, "pooling": "mean"}])
def test_every_module_that_may_not_be_split_is_in_the_model(vision):
    """FSDP in accelerate refuses a model that lacks one of them."""
    model = small_model(vision=vision)
    class_names = {type(module).__name__ for module in model.modules()}
    assert {"CLIPTextEmbeddings", "MLIPTextLayer", "MLIPVisionLayer"} <= set(model._no_split_modules) <= class_names
