# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""modeling_mlip.py against transformers' CLIP on the same weights, and against itself where one path is plain."""

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import TEXT, VISION, open_gate, pairs_batch, small_config, small_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, CLIPConfig, CLIPModel

from modeling_mlip import (
    MLIPConfig,
    MLIPForImageClassification,
    MLIPModel,
    MLIPTextModel,
    MLIPTextModelWithProjection,
    MLIPVisionConfig,
    MLIPVisionModel,
    MLIPVisionModelWithProjection,
)
from modeling_mlip.losses import PairEmbeddings
from modeling_mlip.token_merging import unmerge

OWN_PARTS = ("frequency", "token_visual", "token_text", "token_logit")


def clip_and_mlip(**vision) -> tuple[CLIPModel, MLIPModel]:
    """A random CLIP model and an MLIP model with its weights."""
    torch.manual_seed(0)
    clip = CLIPModel(CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=24)).eval()
    with torch.no_grad():
        for parameter in clip.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    ours = MLIPModel(small_config(vision)).eval()
    missing, unexpected = ours.load_state_dict(clip.state_dict(), strict=False)
    assert not unexpected
    assert all(any(part in key for part in OWN_PARTS) for key in missing)
    return clip, ours


# Equal to CLIP


def assert_same_gradient(found, expected, name):
    """To 1e-5 of its largest element where that exceeds 1: processors round sums of float32 differently."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(float(expected.abs().max()), 1), msg=name)


def joined_model(weight: float = 0.5):
    """A model whose image embeddings are of both domains; its gate is closed, so that the domains are apart."""
    return small_model(vision={"merge_ratio": 0.5, "frequency_embed_weight": weight})


@pytest.mark.parametrize("frequency_layers", [0, 2])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_without_merging_it_is_clip_in_outputs_and_gradients(batch, frequency_layers, attention):
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


def test_the_tuple_of_the_tower_begins_as_clips(batch):
    model = small_model(vision={"merge_ratio": 0.5}).vision_model
    outputs = model(batch["pixel_values"])
    first, second = model(batch["pixel_values"], return_dict=False)[:2]
    assert torch.equal(first, outputs.last_hidden_state)
    assert torch.equal(second, outputs.pooler_output)


def test_a_closed_gate_changes_nothing_to_the_bit(batch):
    with_stage = small_model()
    without = small_model(vision={"frequency_layers": 0})
    without.load_state_dict(with_stage.state_dict(), strict=False)
    a, b = (model.get_image_features(batch["pixel_values"]) for model in (with_stage, without))
    assert torch.equal(a.last_hidden_state, b.last_hidden_state)
    opened = open_gate(with_stage).get_image_features(batch["pixel_values"])
    assert not torch.allclose(opened.last_hidden_state, b.last_hidden_state)


def test_the_closed_gate_has_a_gradient(batch):
    model = small_model(frequency_loss_weight=0.0, token_loss_weight=0.0)
    model(**batch, return_loss=True).loss.backward()
    assert model.vision_model.frequency.gate.grad.abs().min() > 0


@pytest.mark.parametrize("merge_ratio", [0.0, 0.5])
def test_every_parameter_learns(batch, merge_ratio):
    model = open_gate(small_model(vision={"merge_ratio": merge_ratio})).train()
    model(**batch, return_loss=True).loss.backward()
    unmoved = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    # The bias of keys moves all scores of a query alike.
    assert not [name for name in unmoved if "k_proj.bias" not in name]


def test_the_frequency_stage_sees_which_frequencies_a_patch_holds_neither_where_nor_how_strong():
    """Of patches well above the floor of the logarithm; the tower's own embedding sees all of it."""
    model = small_model(vision={"patch_size": 8})
    torch.manual_seed(0)
    patches = 50 * torch.randn(2, 3, 4, 4, 8, 8)
    variants = {"as they are": patches, "moved": patches.roll((3, 2), dims=(4, 5)), "stronger": 20 * patches}
    variants["others"] = 50 * torch.randn_like(patches)
    images = {name: x.permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32) for name, x in variants.items()}
    seen = {name: model.vision_model(pixels).frequency_hidden_state for name, pixels in images.items()}
    torch.testing.assert_close(seen["moved"], seen["as they are"], rtol=0, atol=1e-4)
    torch.testing.assert_close(seen["stronger"], seen["as they are"], rtol=0, atol=0.02)
    assert (seen["others"] - seen["as they are"]).abs().max() > 0.1
    embedded = {name: model.vision_model.embeddings(pixels) for name, pixels in images.items()}
    assert all((embedded[name] - embedded["as they are"]).abs().max() > 1 for name in ("moved", "stronger"))


def test_what_the_configuration_leaves_out_is_not_made():
    model = small_model(vision={"frequency_layers": 0}, token_loss_weight=0.0)
    assert not [name for name, _ in model.named_parameters() if any(part in name for part in OWN_PARTS)]


# Merging


def test_merging_keeps_the_promised_share_and_counts_every_patch(batch):
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


@pytest.mark.parametrize("merge_method", ["mlip", "tome", "elip"])
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


def test_equal_patches_merge_without_loss():
    """With the size term, merging tokens that are equal changes nothing that another token sees."""
    model = small_model(vision={"frequency_layers": 0, "merge_layers": [0]})
    with torch.no_grad():  # without positions, the patches of a plain image stay equal
        model.vision_model.embeddings.position_embedding.weight.zero_()
    plain = torch.randn(2, 3, 1, 1).expand(2, 3, 32, 32)
    whole = model.get_image_features(plain).pooler_output
    model.set_merge_ratio(0.9)
    merged = model.get_image_features(plain)
    assert merged.last_hidden_state.shape[1] == 1 + 6
    torch.testing.assert_close(merged.pooler_output, whole, rtol=0, atol=1e-5)


def test_hidden_states_and_attentions_follow_the_shrinking_sequence(batch):
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


def test_set_merge_ratio_acts_at_once_on_every_class_and_refuses_nonsense(batch):
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
        for nonsense in (1.0, -0.1, 0.999):
            with pytest.raises(Exception, match="merge_ratio"):
                model.set_merge_ratio(nonsense)
        assert tower(pixels).token_sizes.shape[1] == 32  # a refused value changes nothing
        model.set_merge_ratio(0)
        assert tower(pixels).token_sizes.shape[1] == 64
    with pytest.raises(ValueError, match="no vision tower"):
        MLIPTextModel(config.text_config).set_merge_ratio(0.5)


def test_an_image_merges_alike_alone_and_in_a_batch(batch):
    model = open_gate(small_model(vision={"merge_ratio": 0.6}))
    together = model.get_image_features(batch["pixel_values"], output_token_map=True)
    for index in range(5):
        alone = model.get_image_features(batch["pixel_values"][index : index + 1], output_token_map=True)
        assert torch.equal(alone.token_map[0], together.token_map[index])
        torch.testing.assert_close(alone.pooler_output[0], together.pooler_output[index], rtol=0, atol=1e-5)


def test_the_guide_protects_what_the_class_token_attends_to(batch):
    """A weight far above all similarities: the tokens that propose and stay are those of the most attention."""
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


def test_elip_is_keeping_by_class_attention_and_fusing_the_rest_in_transformers_clip(batch):
    """One stage, written out in CLIP's own modules: the layers after it see the size of the fused token."""
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
                rest = torch.tensor([token for token in range(64) if token not in stay])
                share = attention[image, rest] / attention[image, rest].sum()
                patches = states[image, 1:]
                rows.append(torch.cat([states[image, :1], patches[stay], (share @ patches[rest])[None]]))
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


def test_the_caption_pulls_elip_towards_its_own_direction(batch):
    """With the caption alone as the guide, tokens that attend most are those that the caption's query finds."""
    vision = {"merge_ratio": 0.5, "merge_method": "elip", "merge_layers": [2], "merge_caption_weight": 1.0}
    model = small_model(vision=vision)
    text_embeds = torch.nn.functional.normalize(model.get_text_features(batch["input_ids"]).pooler_output, dim=-1)
    outputs = model.get_image_features(
        batch["pixel_values"], text_embeds=text_embeds, output_token_map=True, output_hidden_states=True
    )
    layer, states = model.vision_model.encoder.layers[2], outputs.hidden_states[2]
    direction = text_embeds @ model.visual_projection.weight * model.vision_model.post_layernorm.weight
    # The LayerNorm takes the length away, so any multiple of the direction asks the same.
    query = layer.self_attn.q_proj(layer.layer_norm1(direction * 100)).view(5, 4, 8)
    keys = layer.self_attn.k_proj(layer.layer_norm1(states)).view(5, 65, 4, 8)
    attention = (torch.einsum("bhd,bshd->bhs", query, keys) * 8**-0.5).softmax(dim=-1).mean(dim=1)[:, 1:]
    for image in range(5):
        stay = attention[image].topk(31).indices.sort().values
        assert outputs.token_map[image, stay].tolist() == list(range(31))


def test_interpolated_positions_take_other_image_sizes(batch):
    model = open_gate(small_model(vision={"merge_ratio": 0.5}))
    larger = torch.nn.functional.interpolate(batch["pixel_values"], size=(48, 40))
    outputs = model.get_image_features(larger, interpolate_pos_encoding=True, output_token_map=True)
    assert outputs.token_map.shape == (5, 120)
    assert outputs.token_sizes.shape == (5, 60)
    same = model.get_image_features(batch["pixel_values"], interpolate_pos_encoding=True).pooler_output
    torch.testing.assert_close(same, model.get_image_features(batch["pixel_values"]).pooler_output, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="match model"):
        model.get_image_features(larger)
    with pytest.raises(ValueError, match="not divisible by patch_size=4"):
        model.get_image_features(larger[..., :39], interpolate_pos_encoding=True)


# Both domains in one embedding


def test_the_image_embedding_is_the_weighted_sum_of_both_domains(batch):
    model = joined_model()
    alone = joined_model(0.0)
    joined, spatial = model(**batch, return_loss=True), alone(**batch, return_loss=True)
    expected = spatial.image_embeds.double() + 0.5 * spatial.frequency_embeds.double()
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(joined.image_embeds.double(), expected, rtol=0, atol=1e-6)
    assert (joined.image_embeds - spatial.image_embeds).abs().max() > 0.01
    logits = model.logit_scale.exp() * joined.image_embeds @ joined.text_embeds.t()
    torch.testing.assert_close(joined.logits_per_image, logits, rtol=0, atol=1e-5)
    # Features keep the length of CLIP's, to within what the other domain adds.
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), joined.image_embeds, rtol=0, atol=1e-6)
    lengths = alone.get_image_features(batch["pixel_values"]).pooler_output.norm(dim=-1)
    ratio = features.norm(dim=-1) / lengths
    assert (ratio > 0.5).all() and (ratio < 1.5).all()


def test_each_domain_keeps_its_own_loss(batch):
    """The weight is no part of training: it may be chosen afterwards."""
    gradients, losses = [], []
    for weight in (0.0, 0.5):
        model = joined_model(weight).train()
        outputs = model(**batch, return_loss=True)
        outputs.loss.backward()
        losses.append([outputs.loss, outputs.spatial_loss, outputs.frequency_loss, outputs.token_loss])
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[0] == losses[1]
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_vision_tower_embeds_as_the_whole_model(batch, tmp_path, weight):
    model = joined_model()
    model.config.frequency_embed_weight = weight  # from the next call on, and in what is saved
    model.save_pretrained(tmp_path)
    embeds = MLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()(batch["pixel_values"]).image_embeds
    assert torch.equal(embeds, model.get_image_features(batch["pixel_values"]).pooler_output)
    assert torch.equal(embeds, joined_model(weight).get_image_features(batch["pixel_values"]).pooler_output)


def test_a_domain_that_the_model_lacks_is_refused(batch):
    model = small_model(frequency_loss_weight=0)
    tower = MLIPVisionModelWithProjection(small_config().vision_config)
    for other in (model, tower):
        other.config.frequency_embed_weight = 0.5
    for call in (model.get_image_features, tower):
        with pytest.raises(ValueError, match="frequency_embed_weight=0.5.*without a frequency embedding"):
            call(batch["pixel_values"])


@pytest.mark.parametrize("keys", [{"frequency_loss_weight": 0}, {"frequency_layers": 0}])
def test_what_no_loss_trains_is_no_part_of_the_embedding(keys):
    vision = MLIPVisionConfig(**VISION, frequency_embed_weight=0.5)
    config = MLIPConfig(vision_config=vision, text_config=TEXT)
    assert config.frequency_embed_weight == 0.5 and config.has_frequency_loss
    config = MLIPConfig(vision_config=vision, text_config=TEXT, **keys)
    assert config.frequency_embed_weight == 0 and not config.has_frequency_loss
    assert vision.frequency_embed_weight == 0.5  # the caller's own stays


# Precision and memory


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(batch, dtype):
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


def test_autocast_trains(batch):
    model = open_gate(small_model(vision={"merge_ratio": 0.5})).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch, return_loss=True).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("merge_method", ["mlip", "elip"])
def test_autocast_leaves_sizes_and_the_residual_stream_in_float32(merge_method):
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


def test_it_runs_on_the_meta_device_as_clip_does():
    batch = {name: pairs_batch()[name].to("meta") for name in ("pixel_values", "input_ids")}
    assert small_model(vision={"merge_ratio": 0.5}).to("meta")(**batch).logits_per_image.shape == (5, 5)


def test_layers_of_int8_keep_it_running(batch):
    model = open_gate(small_model(vision={"merge_ratio": 0.5}))
    exact = model(**batch).image_embeds
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=torch.qint8)
    found = quantised(**batch).image_embeds
    assert (found * exact).sum(dim=-1).min() > 0.9 and not torch.equal(found, exact)


def test_a_layer_whose_weight_is_gone_is_not_initialised():
    model = small_model(vision={"merge_ratio": 0.5})
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.weight = None
    for module in model.modules():
        model._init_weights(module)


def test_a_model_on_two_devices_moves_what_it_needs():
    """Fake tensors stand in for two GPUs: devices are checked, and nothing is computed."""
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
        found = model(**batch, image_ids=torch.empty(5, dtype=torch.long, device="cuda:0"), return_pairs=True)
        embeds = instance_loss_on_one_device(model, found.pairs)
    assert features.token_map.device == features.pooler_output.device == torch.device("cuda:1")
    assert embeds == {"spatial_loss", "frequency_loss", "loss"}


def instance_loss_on_one_device(model: MLIPModel, pairs: PairEmbeddings) -> set[str]:
    """The token loss reads lengths, which fake tensors do not have."""
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


# Text


def test_padding_and_bos_never_count(batch):
    model = small_model()
    with torch.no_grad():
        pairs = model(**batch, return_pairs=True).pairs
    eos = (batch["input_ids"] == TEXT["eos_token_id"]).int().argmax(dim=1)
    for mask, last in zip(pairs.tokens.text_mask, eos.tolist(), strict=True):
        assert mask.tolist() == [False] + [True] * last + [False] * (7 - last)
    # Longer padding, with or without a mask: the same loss, which a token that counts would change.
    longer = torch.nn.functional.pad(batch["input_ids"], (0, 4), value=TEXT["pad_token_id"])
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 4))
    loss = model(**batch, return_loss=True).loss
    for extra in ({"attention_mask": mask}, {"attention_mask": None}):
        other = model(pixel_values=batch["pixel_values"], input_ids=longer, return_loss=True, **extra).loss
        torch.testing.assert_close(other, loss, rtol=0, atol=1e-5)


@pytest.mark.parametrize("images, captions", [(1, 5), (5, 1), (3, 5)])
def test_losses_refuse_images_and_captions_that_are_no_pairs(batch, images, captions):
    inputs = {"pixel_values": batch["pixel_values"][:images], "input_ids": batch["input_ids"][:captions]}
    model = small_model()
    message = f"'pixel_values': {images}, 'input_ids': {captions}.*repeat an image for each of its captions"
    with pytest.raises(ValueError, match=message):
        model(**inputs, return_loss=True)
    with pytest.raises(ValueError, match="'image_ids': 4"):
        model(**batch, image_ids=torch.arange(4), return_loss=True)
    assert model(**inputs).logits_per_image.shape == (images, captions)


def test_equal_captions_and_images_are_positives_in_the_model(batch):
    model = small_model()
    batch["input_ids"][1], batch["attention_mask"][1] = batch["input_ids"][0], batch["attention_mask"][0]
    outputs = model(**batch, return_loss=True, return_pairs=True)
    assert outputs.pairs.caption_keys[0] == outputs.pairs.caption_keys[1]
    assert len(outputs.pairs.caption_keys.unique()) == 4
    with_ids = model(**batch, image_ids=torch.tensor([1, 2, 3, 3, 4]), return_loss=True)
    assert not torch.allclose(with_ids.loss, outputs.loss)


def test_a_non_causal_tower_pooled_at_the_last_position_sees_all_positions(batch):
    text = {"pooling": "last", "use_causal_mask": False, "pad_token_id": 0}
    model = small_model(text=text)
    ids = batch["input_ids"][:, :6]
    padded = torch.nn.functional.pad(ids, (0, 6), value=0)
    short, whole = model.text_model(ids), model.text_model(padded)
    torch.testing.assert_close(short.pooler_output, whole.pooler_output, rtol=0, atol=0)
    assert torch.equal(whole.pooler_output, whole.last_hidden_state[:, -1])
    changed = ids.clone()
    changed[:, 5] = 7
    first = model.text_model(changed).last_hidden_state[:, 0]
    assert not torch.allclose(first, short.last_hidden_state[:, 0])  # the first position sees the last
    assert torch.isfinite(model(pixel_values=batch["pixel_values"], input_ids=ids, return_loss=True).loss)


def test_a_tower_pooled_at_the_last_position_refuses_what_it_would_cut_or_misplace(batch):
    model = small_model(text={"pooling": "last"})
    with pytest.raises(ValueError, match=r"15 tokens.*max_position_embeddings=12"):
        model.text_model(torch.randint(0, 62, (2, 15)))
    with pytest.raises(ValueError, match="position_ids"):
        model.text_model(batch["input_ids"], position_ids=torch.arange(8)[None])


def test_a_prepared_mask_passes_as_it_is(batch):
    clip, ours = clip_and_mlip()
    mask = torch.full((8, 8), -torch.inf).triu(1)[None, None].expand(5, 1, -1, -1)
    found, expected = (model.text_model(batch["input_ids"], attention_mask=mask) for model in (ours, clip))
    torch.testing.assert_close(found.last_hidden_state, expected.last_hidden_state, rtol=0, atol=1e-5)


def test_mean_pooling_is_weighted_by_size(batch):
    vision = {"pooling": "mean", "use_pre_layernorm": False, "layer_scale_init_value": 0.1, "merge_ratio": 0.5}
    model = small_model(vision=vision)
    outputs = model.vision_model(batch["pixel_values"], output_token_map=True)
    patches = unmerge(outputs.last_hidden_state[:, 1:], outputs.token_map)
    expected = model.vision_model.post_layernorm(patches.mean(dim=1))
    torch.testing.assert_close(outputs.pooler_output, expected, rtol=0, atol=1e-5)


# Saving and loading


def test_saved_and_reloaded_is_equal_to_the_bit(batch, tmp_path):
    model = open_gate(small_model(vision={"merge_ratio": 0.5}))
    expected = model(**batch, return_loss=True)
    model.save_pretrained(tmp_path)
    for auto_class in (MLIPModel, AutoModel, AutoModelForZeroShotImageClassification):
        loaded, report = auto_class.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(loaded, MLIPModel)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        outputs = loaded.eval()(**batch, return_loss=True)
        for name in ("loss", "image_embeds", "text_embeds", "frequency_embeds", "token_loss"):
            assert torch.equal(outputs[name], expected[name]), name
    assert AutoModel.from_pretrained(tmp_path, merge_ratio=0.25).config.merge_ratio == 0.25


def test_towers_load_from_the_whole_model(batch, tmp_path):
    model = open_gate(small_model(vision={"merge_ratio": 0.5}))
    model.save_pretrained(tmp_path)
    pixels, ids = batch["pixel_values"], batch["input_ids"]
    vision_output, text_output = model.vision_model(pixels), model.text_model(ids)
    vision = MLIPVisionModel.from_pretrained(tmp_path).eval()(pixels)
    assert torch.equal(vision.last_hidden_state, vision_output.last_hidden_state)
    text = MLIPTextModel.from_pretrained(tmp_path).eval()(ids)
    assert torch.equal(text.last_hidden_state, text_output.last_hidden_state)
    embeds = MLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()(pixels).image_embeds
    assert torch.equal(embeds, model.get_image_features(pixels).pooler_output)
    embeds = MLIPTextModelWithProjection.from_pretrained(tmp_path).eval()(ids).text_embeds
    assert torch.equal(embeds, model.get_text_features(ids).pooler_output)
    classifier = MLIPForImageClassification.from_pretrained(tmp_path, num_labels=3).eval()
    hidden = classifier.vision_model(pixels).last_hidden_state
    assert torch.equal(hidden, vision_output.last_hidden_state)
    assert classifier(pixels, labels=torch.tensor([0, 1, 2, 0, 1])).loss.isfinite()


def test_clip_weights_load_by_name(tmp_path):
    clip, _ = clip_and_mlip()
    clip.save_pretrained(tmp_path)
    config = MLIPConfig.from_clip_config(CLIPConfig.from_pretrained(tmp_path), merge_ratio=0.0)
    ours, report = MLIPModel.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert not report["unexpected_keys"]
    assert all(any(part in key for part in OWN_PARTS) for key in report["missing_keys"])
    batch = pairs_batch()
    expected = clip(**batch)
    torch.testing.assert_close(ours.eval()(**batch).logits_per_image, expected.logits_per_image, rtol=0, atol=1e-5)
    ours.start_tokens_from_projections()
    assert torch.equal(ours.token_visual_projection.weight, clip.visual_projection.weight)


def test_an_early_clip_configuration_gets_its_real_eos():
    early = CLIPConfig(text_config={"eos_token_id": 2, "vocab_size": 49408})
    text = MLIPConfig.from_clip_config(early).text_config
    assert (text.bos_token_id, text.eos_token_id) == (49406, 49407)
    early.text_config.vocab_size = 49500  # tokens added later come after EOS
    assert MLIPConfig.from_clip_config(early).text_config.eos_token_id == 49407


def test_weights_of_an_early_clip_load_by_name_with_its_real_eos(batch, tmp_path):
    clip = CLIPModel(
        CLIPConfig(vision_config=VISION, text_config={**TEXT, "eos_token_id": 2, "pad_token_id": 1}, projection_dim=24)
    ).eval()
    clip.save_pretrained(tmp_path)
    expected = clip(**batch)
    found = MLIPModel.from_pretrained(tmp_path).eval()(**batch)
    torch.testing.assert_close(found.text_embeds, expected.text_embeds, rtol=0, atol=1e-5)
    tower = MLIPTextModel.from_pretrained(tmp_path).eval()(batch["input_ids"], batch["attention_mask"])
    expected = clip.text_model(batch["input_ids"], batch["attention_mask"])
    torch.testing.assert_close(tower.pooler_output, expected.pooler_output, rtol=0, atol=1e-5)


def test_initialisation_sets_every_parameter():
    torch.manual_seed(0)
    model = MLIPModel(small_config(vision={"layer_scale_init_value": 1e-4}))
    for name, parameter in model.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert parameter.abs().max() < 5, name
    torch.manual_seed(0)
    again = MLIPModel(small_config(vision={"layer_scale_init_value": 1e-4}))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert (model.vision_model.frequency.gate == 0).all()
    for scale in model.logit_scales().values():
        assert scale.item() == pytest.approx(2.6592)
    width, depth = 32, 4
    layer = model.vision_model.encoder.layers[1]
    joined = small_config(vision={"frequency_embed_weight": 0.5})
    joined_size = joined.vision_config.frequency_hidden_size
    expected = {  # of OpenAI's CLIP
        layer.self_attn.q_proj: width**-0.5,
        layer.self_attn.k_proj: width**-0.5,
        layer.self_attn.v_proj: width**-0.5,
        layer.self_attn.out_proj: width**-0.5 * (2 * depth) ** -0.5,
        layer.mlp.fc1: (2 * width) ** -0.5,
        layer.mlp.fc2: width**-0.5 * (2 * depth) ** -0.5,
        MLIPVisionModelWithProjection(model.config.vision_config).visual_projection: width**-0.5,
        MLIPVisionModelWithProjection(joined.vision_config).frequency_projection: joined_size**-0.5,
        MLIPTextModelWithProjection(model.config.text_config).text_projection: width**-0.5,
        MLIPForImageClassification(small_config(num_labels=50)).classifier: width**-0.5,
    }
    for linear, std in expected.items():
        assert linear.weight.std().item() == pytest.approx(std, rel=0.15)
    ratio = model.token_frequency_projection.weight.std() / model.frequency_projection.weight.std()
    assert ratio.item() == pytest.approx(0.1, rel=0.2)


# Configuration


def test_merge_keys_have_one_home(tmp_path):
    config = MLIPConfig(merge_ratio=0.5, merge_layers=[2, 5], merge_method="tome", frequency_layers=0)
    vision = config.vision_config
    assert (vision.merge_ratio, vision.merge_layers, vision.merge_method, vision.frequency_layers) == (
        *(0.5, [2, 5], "tome", 0),
    )
    assert "merge_ratio" not in config.to_dict()
    config.merge_ratio = 0.25
    assert vision.merge_ratio == 0.25
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vision_config.to_dict() == vision.to_dict()


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"merge_ratio": 1.0}, "merge_ratio=1.0"),
        ({"merge_ratio": -0.1}, "merge_ratio=-0.1"),
        ({"merge_ratio": "half"}, "half"),
        ({"merge_layers": [12]}, "layer 12 does not exist"),
        ({"merge_layers": []}, "at least one layer"),
        ({"merge_layers": [3, 3]}, "each once"),
        ({"merge_method": "best"}, "'best' is unknown; choose one of 'mlip', 'tome', 'elip'"),
        ({"frequency_layers": -1}, "frequency_layers=-1"),
        ({"frequency_embed_weight": -0.5}, "frequency_embed_weight=-0.5"),
        ({"frequency_embed_weight": float("nan")}, "frequency_embed_weight=nan"),
        ({"vision_config": {"image_size": 225}}, r"image_size=225 is not divisible by patch_size=32.*\[224, 256\]"),
        ({"vision_config": {"pooling": "max"}}, "pooling='max'"),
        ({"text_config": {"pooling": "first"}}, "pooling='first'"),
        ({"token_loss_weight": -1}, "token_loss_weight=-1"),
        ({"token_loss_weight": float("inf")}, "token_loss_weight=inf"),
        ({"frequency_loss_weight": float("nan")}, "frequency_loss_weight=nan"),
        ({"vision_config": {"frequency_hidden_size": 0}}, "frequency_hidden_size=0: choose 1 or more"),
        ({"vision_config": {"merge_importance_weight": float("nan")}}, "merge_importance_weight=nan"),
        ({"vision_config": {"merge_importance_weight": -1}}, "merge_importance_weight=-1"),
        ({"vision_config": {"patch_size": 0}}, "patch_size=0: choose 1 or more"),
        ({"vision_config": {"image_size": -32}}, "image_size=-32: choose 1 or more"),
        ({"vision_config": {"num_hidden_layers": 0}}, "num_hidden_layers=0: choose 1 or more"),
        ({"text_config": {"eos_token_id": [63, 62]}}, r"eos_token_id=\[63, 62\]: give the one id"),
        ({"text_config": {"eos_token_id": None}}, "eos_token_id=None: give the one id"),
    ],
)
def test_bad_configurations_are_refused_with_the_value(keys, message):
    with pytest.raises(Exception, match=message):
        MLIPConfig(**keys)


def test_whole_numbers_are_taken_where_fractions_are():
    keys = {"layer_scale_init_value": 1, "initializer_factor": 1}
    config = MLIPConfig(vision_config=keys, text_config=keys, initializer_factor=1)
    assert config.vision_config.layer_scale_init_value == 1


def test_towers_know_the_width_of_the_shared_space(tmp_path):
    model = MLIPModel(MLIPConfig(vision_config=VISION | {"projection_dim": 512}, text_config=TEXT, projection_dim=40))
    model.save_pretrained(tmp_path)
    tower = MLIPVisionModelWithProjection.from_pretrained(tmp_path)
    assert torch.equal(tower.visual_projection.weight, model.visual_projection.weight)
    vision = MLIPVisionConfig(**VISION)
    MLIPConfig(vision_config=vision, projection_dim=40)
    assert vision.projection_dim == 24  # the caller's own stays


def test_a_refused_value_leaves_the_configuration_as_it_was():
    config = MLIPConfig(merge_ratio=0.5)
    with pytest.raises(Exception, match=r"merge_ratio=1\.5"):
        config.merge_ratio = 1.5
    assert config.merge_ratio == 0.5
