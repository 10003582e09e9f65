# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""losses.py and token_similarity.py against loops over pairs, and against the loss of transformers' CLIP."""

import math

import pytest
import torch
from model_cases import unit
from open_clip.loss import SigLipLoss
from transformers import SiglipConfig, SiglipModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from modeling_mlip.losses import (
    MAX_LOGIT_SCALE,
    PairEmbeddings,
    SigmoidColumns,
    SigmoidRows,
    caption_keys,
    grouped_token_loss,
    info_nce,
    instance_loss,
    multi_level_loss,
    positive_pairs,
    positive_targets,
    sigmoid_loss,
    sigmoid_losses,
    temperature,
    to_device,
    token_loss,
)
from modeling_mlip.token_similarity import TokenEmbeddings, token_scores


def tokens_of(I: int, M: int, T: int, L: int, P: int = 6) -> tuple[torch.Tensor, ...]:
    """Random tokens; the mask of caption i holds its first 1 + i % L tokens."""
    weights = torch.rand(I, M, dtype=torch.float64)
    mask = torch.arange(L)[None] <= (torch.arange(T) % L)[:, None]
    return unit(I, M, P), weights / weights.sum(dim=1, keepdim=True), unit(T, L, P), mask


def scores_by_loop(image_tokens, image_weights, text_tokens, text_mask):
    by_image = torch.zeros(len(image_tokens), len(text_tokens), dtype=torch.float64)
    by_text = torch.zeros_like(by_image)
    for i in range(len(image_tokens)):
        for j in range(len(text_tokens)):
            similarity = image_tokens[i] @ text_tokens[j][text_mask[j]].t()
            by_image[i, j] = (image_weights[i] * similarity.max(dim=1).values).sum()
            by_text[i, j] = similarity.max(dim=0).values.mean()
    return by_image, by_text


def test_every_tensor_of_a_nested_structure_moves_and_types_stay():
    tensor = torch.ones(2)
    tokens = TokenEmbeddings(tensor, tensor, tensor, tensor > 0)
    pairs = PairEmbeddings(tensor, tensor, tensor.long(), image_keys=None, tokens=tokens)
    structure = {"pairs": pairs, "rows": [tensor, (tensor, None)], "count": 3}
    moved = to_device(structure, torch.device("meta"))
    assert type(moved["pairs"]) is PairEmbeddings and type(moved["pairs"].tokens) is TokenEmbeddings
    assert type(moved["rows"]) is list and type(moved["rows"][1]) is tuple
    assert moved["count"] == 3 and moved["pairs"].image_keys is None and moved["rows"][1][1] is None
    tensors = [x for x in (*moved["pairs"], *moved["pairs"].tokens, moved["rows"][0], moved["rows"][1][0])]
    tensors = [x for x in tensors if isinstance(x, torch.Tensor)]
    assert len(tensors) == 9 and all(x.device.type == "meta" for x in tensors)
    assert tensor.device.type == "cpu"


def test_distinct_pairs_give_the_loss_of_clip():
    torch.manual_seed(0)
    images, texts, logit_scale = unit(7, 5), unit(7, 5), torch.tensor(2.5)
    keys = [torch.arange(7)]
    ours = instance_loss(images, texts, logit_scale, positive_targets(keys, keys))
    theirs = image_text_contrastive_loss(logit_scale.exp() * texts @ images.t())
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_equal_captions_and_equal_images_are_positives():
    captions, images = torch.tensor([5, 5, 7, 8]), torch.tensor([1, 2, 3, 2])
    targets = positive_targets([captions, images], [captions, images])
    third = 1 / 3
    expected = [[0.5, 0.5, 0, 0], [third, third, 0, third], [0, 0, 1, 0], [0, 0.5, 0, 0.5]]
    torch.testing.assert_close(targets, torch.tensor(expected))


def test_an_equal_caption_has_no_gradient_as_a_negative():
    keys = [torch.tensor([0, 0, 1])]
    confident = torch.tensor([[9.0, 9.0, -99.0], [9.0, 9.0, -99.0], [-99.0, -99.0, 9.0]], requires_grad=True)
    (soft,) = torch.autograd.grad(info_nce(confident, positive_targets(keys, keys)), confident)
    (hard,) = torch.autograd.grad(info_nce(confident, torch.eye(3)), confident)
    assert soft.abs().max() < 1e-6
    assert hard[0, 1] > 0.1  # with hard targets, the equal caption is a negative


def test_soft_targets_are_a_cross_entropy():
    torch.manual_seed(0)
    logits, targets = torch.randn(4, 6, dtype=torch.float64), torch.rand(4, 6, dtype=torch.float64).softmax(dim=1)
    expected = torch.nn.functional.cross_entropy(logits, targets)
    torch.testing.assert_close(info_nce(logits, targets), expected)


def test_half_precision_logits_are_summed_in_float32():
    logits = torch.full((2, 5000), 10.0, dtype=torch.float16)
    targets = torch.zeros(2, 5000)
    targets[:, 0] = 1
    assert info_nce(logits, targets) == pytest.approx(math.log(5000), rel=1e-6)


def test_distinct_pairs_give_the_sigmoid_loss_of_siglip_and_open_clip_with_gradients():
    torch.manual_seed(0)
    tower = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                 patch_size=4, vocab_size=30, max_position_embeddings=6)  # fmt: skip
    siglip = SiglipModel(SiglipConfig(text_config=tower, vision_config=tower)).double().eval()
    scale, bias = siglip.logit_scale, siglip.logit_bias
    with torch.no_grad():
        scale.fill_(math.log(117))  # above CLIP's maximum
        bias.fill_(-12.9)
    inputs = {"input_ids": torch.randint(2, 30, (5, 6)), "pixel_values": torch.randn(5, 3, 8, 8).double()}
    outputs = siglip(**inputs, return_loss=True)
    images, texts = outputs.image_embeds, outputs.text_embeds
    pairs = PairEmbeddings(images, texts, caption_keys=torch.arange(5), image_keys=torch.arange(5))
    ours = multi_level_loss(pairs, scale[0], logit_bias=bias[0])["loss"]
    torch.testing.assert_close(ours, outputs.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, SigLipLoss()(images, texts, scale[0].exp(), bias[0]), rtol=1e-12, atol=0)
    wanted = [scale, bias, images, texts, siglip.vision_model.embeddings.patch_embedding.weight]
    our_gradients = torch.autograd.grad(ours, wanted, retain_graph=True)
    their_gradients = torch.autograd.grad(outputs.loss, wanted)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(our_gradient, their_gradient, rtol=1e-9, atol=1e-12)


def test_the_sigmoid_loss_with_duplicates_equals_a_loop_over_pairs():
    torch.manual_seed(0)
    images, frequency, texts = unit(6, 8), unit(6, 8), unit(6, 8)
    captions, image_ids = torch.tensor([0, 1, 0, 3, 4, 5]), torch.tensor([9, 8, 7, 6, 8, 5])
    scales = [torch.tensor(value, dtype=torch.float64) for value in (2.0, 1.5)]
    biases = [torch.tensor(value, dtype=torch.float64) for value in (-3.0, 0.5)]

    def loop(embeds, scale, bias):
        total = 0.0
        for i in range(6):
            for j in range(6):
                logit = math.exp(scale) * float(embeds[i] @ texts[j]) + float(bias)
                z = 1 if captions[i] == captions[j] or image_ids[i] == image_ids[j] else -1
                total -= math.log(1 / (1 + math.exp(-z * logit)))
        return total / 6

    expected = [loop(*given) for given in zip((images, frequency), scales, biases, strict=True)]
    pairs = PairEmbeddings(images, texts, captions, image_ids, frequency_embeds=frequency)
    losses = multi_level_loss(
        pairs, *scales, logit_bias=biases[0], frequency_logit_bias=biases[1], frequency_loss_weight=0.3
    )
    assert [float(losses["spatial_loss"]), float(losses["frequency_loss"])] == pytest.approx(expected, rel=1e-12)
    assert float(losses["loss"]) == pytest.approx(expected[0] + 0.3 * expected[1], rel=1e-12)
    rows = SigmoidRows([images, frequency], scales, biases, [captions, image_ids])
    blocks = [slice(0, 1), slice(1, 4), slice(4, 6)]  # the losses of blocks of captions add up
    in_blocks = sum(sigmoid_losses(rows, SigmoidColumns(texts[b], [captions[b], image_ids[b]])) for b in blocks)
    assert in_blocks.tolist() == pytest.approx(expected, rel=1e-12)


def test_the_sigmoid_loss_of_bfloat16_embeddings_is_computed_in_float32():
    torch.manual_seed(0)
    images, texts = unit(40, 16).bfloat16(), unit(40, 16).bfloat16()
    positives = positive_pairs([torch.arange(40)], [torch.arange(40)])
    scalars = torch.tensor(2.3), torch.tensor(-10.0)
    expected = sigmoid_loss(images.double(), texts.double(), *scalars, positives)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = sigmoid_loss(images, texts, *scalars, positives)
    assert ours.dtype == torch.float32
    assert float(ours) == pytest.approx(float(expected), rel=1e-6)


def test_temperature_is_clamped_at_100():
    assert temperature(torch.tensor(math.log(1 / 0.07))) == pytest.approx(1 / 0.07)
    assert temperature(torch.tensor(20.0)) == pytest.approx(100)


@pytest.mark.parametrize("start", [MAX_LOGIT_SCALE, 4.7])
def test_a_clamped_scale_still_has_a_gradient(start):
    """OpenCLIP's checkpoints have a scale at the maximum, and the trainer clamps scales to it."""
    scale = torch.tensor(start, requires_grad=True)
    temperature(scale).backward()
    assert scale.grad.item() == pytest.approx(100)  # d exp(s) / ds at the cap


def test_caption_keys_ignore_padding_and_differ_between_captions():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 50, (2000, 6), generator=generator)
    keys = caption_keys(ids, torch.ones(2000, 6, dtype=torch.bool))
    assert len(keys.unique()) == len(ids.unique(dim=0))
    padded = torch.cat([ids, torch.randint(0, 50, (2000, 3), generator=generator)], dim=1)
    mask = (torch.arange(9) < 6).expand(2000, 9)
    assert torch.equal(caption_keys(padded, mask), keys)
    assert not torch.equal(caption_keys(ids.flip(1), torch.ones(2000, 6, dtype=torch.bool)), keys)  # order counts


def test_token_scores_equal_a_loop_over_pairs():
    torch.manual_seed(0)
    tokens = tokens_of(I=4, M=5, T=6, L=3)
    for ours, theirs in zip(token_scores(*tokens), scores_by_loop(*tokens), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_block_elements", [1, 50, 200, 419])
def test_token_scores_in_blocks_equal_plain_ones_with_gradients(max_block_elements):
    torch.manual_seed(0)
    image_tokens, image_weights, text_tokens, mask = tokens_of(I=5, M=4, T=7, L=3)
    results = []
    for block in (max_block_elements, 10**9):
        inputs = [x.clone().requires_grad_() for x in (image_tokens, image_weights, text_tokens)]
        by_image, by_text = token_scores(inputs[0], inputs[1], inputs[2], mask, max_block_elements=block)
        gradients = torch.autograd.grad((by_image.sin() + by_text.cos()).sum(), inputs)
        results.append((by_image, by_text, *gradients))
    for chunked, plain in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain, rtol=0, atol=1e-12)


@pytest.mark.parametrize("max_block_elements", [30, 10**9])
def test_gradients_of_the_token_loss_equal_finite_differences(max_block_elements):
    torch.manual_seed(0)
    image_tokens, image_weights, text_tokens, mask = tokens_of(I=3, M=4, T=3, L=3, P=4)
    targets = torch.eye(3, dtype=torch.float64)

    def loss(image_tokens, image_weights, text_tokens, logit_scale):
        scores = token_scores(image_tokens, image_weights, text_tokens, mask, max_block_elements)
        return token_loss(*scores, logit_scale, targets)

    inputs = [image_tokens, image_weights, text_tokens, torch.tensor(1.0, dtype=torch.float64)]
    assert torch.autograd.gradcheck(loss, [x.requires_grad_() for x in inputs])


def test_masked_tokens_change_no_score():
    torch.manual_seed(0)
    image_tokens, image_weights, text_tokens, mask = tokens_of(I=3, M=4, T=3, L=3)
    before = token_scores(image_tokens, image_weights, text_tokens, mask)
    changed = torch.where(mask[..., None], text_tokens, unit(3, 3, 6))
    assert not torch.equal(changed, text_tokens)
    for a, b in zip(before, token_scores(image_tokens, image_weights, changed, mask), strict=True):
        assert torch.equal(a, b)


def test_a_merged_token_has_the_weight_of_the_patches_that_it_replaces():
    torch.manual_seed(0)
    patches, _, text_tokens, mask = tokens_of(I=2, M=6, T=3, L=4)
    patches[:, 3:] = patches[:, :1]  # four equal patches
    plain = token_scores(patches, torch.full((2, 6), 1 / 6, dtype=torch.float64), text_tokens, mask)
    sizes = torch.tensor([[4.0, 1, 1]] * 2, dtype=torch.float64)
    merged = token_scores(patches[:, :3], sizes / 6, text_tokens, mask)
    for a, b in zip(plain, merged, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    torch.manual_seed(0)
    image_tokens, image_weights, text_tokens, mask = tokens_of(I=4, M=5, T=4, L=3)
    pairs = PairEmbeddings(
        image_embeds=unit(4, 6),
        text_embeds=unit(4, 6),
        caption_keys=torch.arange(4),
        frequency_embeds=unit(4, 6),
        tokens=TokenEmbeddings(image_tokens, image_weights, text_tokens, mask),
    )
    scales = [torch.tensor(value) for value in (1.0, 2.0, 3.0)]
    parts = multi_level_loss(pairs, *scales, frequency_loss_weight=0.3, token_loss_weight=0.7)
    expected = parts["spatial_loss"] + 0.3 * parts["frequency_loss"] + 0.7 * parts["token_loss"]
    torch.testing.assert_close(parts["loss"], expected)
    targets = torch.eye(4)
    torch.testing.assert_close(
        parts["frequency_loss"], instance_loss(pairs.frequency_embeds, pairs.text_embeds, scales[1], targets)
    )
    by_image, by_text = scores_by_loop(image_tokens, image_weights, text_tokens, mask)
    rows = torch.nn.functional.cross_entropy(scales[2].exp() * by_image, torch.arange(4))
    columns = torch.nn.functional.cross_entropy(scales[2].exp() * by_text.t(), torch.arange(4))
    torch.testing.assert_close(parts["token_loss"], (rows + columns) / 2)
    spatial_only = multi_level_loss(pairs._replace(frequency_embeds=None, tokens=None), scales[0])
    assert set(spatial_only) == {"spatial_loss", "loss"}


def test_a_grouped_token_loss_is_the_mean_of_the_losses_of_its_groups():
    torch.manual_seed(0)
    normalize = torch.nn.functional.normalize
    image_tokens = normalize(torch.randn(11, 4, 6, dtype=torch.float64), dim=-1).requires_grad_()
    text_tokens = normalize(torch.randn(11, 5, 6, dtype=torch.float64), dim=-1)
    mask = torch.arange(5) < torch.randint(1, 6, (11, 1))
    weights, keys = torch.full((11, 4), 0.25, dtype=torch.float64), [torch.tensor([0, 1, 0, 3, 4, 5, 5, 7, 8, 9, 10])]
    tokens = TokenEmbeddings(image_tokens, weights, text_tokens, mask)
    scale = torch.tensor(2.0, dtype=torch.float64)
    expected = 0
    for start, end in ((0, 4), (4, 8), (8, 11)):  # 11 pairs in groups of at most 4
        part = slice(start, end)
        targets = positive_targets([keys[0][part]], [keys[0][part]])
        scores = token_scores(image_tokens[part], weights[part], text_tokens[part], mask[part])
        expected = expected + token_loss(*scores, scale, targets) * (end - start) / 11
    outputs = grouped_token_loss(tokens, keys, scale, 4)
    torch.testing.assert_close(outputs, expected, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss, image_tokens, retain_graph=True)[0] for loss in (outputs, expected)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-12)
    whole = token_loss(*token_scores(*tokens), scale, positive_targets(keys, keys))
    torch.testing.assert_close(grouped_token_loss(tokens, keys, scale, None), whole, rtol=0, atol=1e-12)
    assert abs(float(outputs - whole)) > 1e-3
