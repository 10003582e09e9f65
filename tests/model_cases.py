# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Models that several files of tests/model share, and the comparison of gradients."""

import torch
from conftest import TEXT, VISION, small_config
from transformers import CLIPConfig, CLIPModel

from modeling_mlip import MLIPModel

# The names of MLIP's parameters that CLIP lacks contain one of these.
MLIP_PARAMETERS = ("frequency", "token_visual", "token_text", "token_logit")
# Vision keys of a tower without a class token.
WITHOUT_CLASS_TOKEN = {"use_class_token": False, "pooling": "mean"}


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
    assert all(any(part in key for part in MLIP_PARAMETERS) for key in missing)
    return clip, ours


def assert_same_gradient(gradient, expected, name):
    """Within 1e-5, or 1e-5 of the largest element if that exceeds 1."""
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-5 * max(float(expected.abs().max()), 1), msg=name)


def assert_every_parameter_has_a_gradient(model):
    """All but the biases of keys, which change no attention."""
    without = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().sum() == 0]
    assert not [name for name in without if "k_proj.bias" not in name]


def unit(*shape: int) -> torch.Tensor:
    """Random vectors of length 1, in float64."""
    return torch.nn.functional.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)
