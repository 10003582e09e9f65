# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The token loss within each pair (SPARC, arXiv 2401.09865) against its formula, written as loops in float64."""

import math

import pytest
import torch
from model_cases import unit

from modeling_mlip import MLIPConfig
from modeling_mlip.losses import PairEmbeddings, aligned_token_loss, multi_level_loss
from modeling_mlip.token_similarity import TokenEmbeddings, aligned_image_tokens


@pytest.fixture
def tokens() -> TokenEmbeddings:
    """Three pairs of 7 image tokens and 4, 2 and 1 caption tokens, the caption tokens not always in front."""
    torch.manual_seed(0)
    weights = torch.randint(1, 4, (3, 7)).double()
    mask = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 0], [1, 0, 0, 0]]).bool()
    return TokenEmbeddings(unit(3, 7, 6), weights / weights.sum(dim=1, keepdim=True), unit(3, 4, 6), mask)


def aligned_by_loop(image: torch.Tensor, sizes: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    similarities = [float(patch @ word) for patch in image]
    low, high = min(similarities), max(similarities)
    scaled = [(value - low) / (high - low) for value in similarities]
    kept = [value if value >= 1 / len(image) else 0.0 for value in scaled]
    mean = sum(value * float(size) * patch for value, size, patch in zip(kept, sizes, image, strict=True))
    return mean / mean.norm()


def test_the_loss_equals_the_formula_of_sparc(tokens):
    scale, losses = 5.0, []
    for image, sizes, caption, mask in zip(*tokens, strict=True):
        words = caption[mask]
        aligned = torch.stack([aligned_by_loop(image, sizes, word) for word in words])
        logits = scale * words @ aligned.t()
        target = torch.arange(len(words))
        cross_entropy = torch.nn.functional.cross_entropy
        losses.append((cross_entropy(logits, target) + cross_entropy(logits.t(), target)) / 2)
        pair = TokenEmbeddings(image[None], sizes[None], words[None], mask[mask][None])
        torch.testing.assert_close(aligned_image_tokens(pair), aligned[None])
    loss = aligned_token_loss(tokens, torch.tensor(math.log(scale), dtype=torch.float64))
    torch.testing.assert_close(loss, torch.stack(losses).mean())


def test_gradients_equal_finite_differences(tokens):
    def loss(image_tokens, text_tokens, logit_scale):
        return aligned_token_loss(tokens._replace(image_tokens=image_tokens, text_tokens=text_tokens), logit_scale)

    inputs = (tokens.image_tokens, tokens.text_tokens, torch.tensor(1.0, dtype=torch.float64))
    assert torch.autograd.gradcheck(loss, tuple(tensor.clone().requires_grad_() for tensor in inputs))


def test_tokens_outside_the_mask_change_neither_the_loss_nor_a_gradient(tokens):
    loss = aligned_token_loss(tokens, torch.tensor(2.0))
    text = torch.where(tokens.text_mask[..., None], tokens.text_tokens, 1e3 * tokens.text_tokens).requires_grad_()
    padded = aligned_token_loss(tokens._replace(text_tokens=text), torch.tensor(2.0))
    torch.testing.assert_close(padded, loss)
    padded.backward()
    assert torch.equal(text.grad[~tokens.text_mask], torch.zeros_like(text.grad[~tokens.text_mask]))


def test_equal_similarities_and_half_precision_give_finite_losses_and_gradients(tokens):
    image = unit(3, 1, 6).expand(-1, 7, -1)
    for dtype in (torch.float64, torch.bfloat16):
        same = TokenEmbeddings(image.to(dtype).clone().requires_grad_(), *(tokens[1:3]), tokens.text_mask)
        loss = aligned_token_loss(same, torch.tensor(2.0, requires_grad=True))
        loss.backward()
        assert loss.isfinite() and same.image_tokens.grad.isfinite().all()


def test_the_configuration_chooses_the_token_loss(tokens):
    pairs = PairEmbeddings(unit(3, 6), unit(3, 6), torch.arange(3), tokens=tokens)
    scale = torch.tensor(2.0, dtype=torch.float64)
    losses = multi_level_loss(pairs, scale, token_logit_scale=scale, token_loss_weight=0.5, token_loss_type="sparc")
    torch.testing.assert_close(losses["token_loss"], aligned_token_loss(tokens, scale))
    torch.testing.assert_close(losses["loss"], losses["spatial_loss"] + 0.5 * losses["token_loss"])
    with pytest.raises(Exception, match="token_loss_type='softmax'.*filip.*sparc"):
        MLIPConfig(token_loss_type="softmax")
