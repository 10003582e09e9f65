# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""ONNX files of converted towers that differ from CLIP's: rotary positions, attention pooling, no class token."""

import onnxruntime
import pytest
import torch
from conftest import small_model
from eva_cases import VISION_KEYS
from siglip_cases import TIMM_KEYS
from torch import nn

from modeling_mlip.conversion.onnx_export import (
    ImageEncoder,
    TextEncoder,
    example_captions,
    example_images,
    export_encoder,
)

# Keys of the tower, and the number of layers: the second one uses the positions of merged tokens.
TOWERS = {
    "eva02": (VISION_KEYS["vit_test_eva02"], 2),
    "siglip": (TIMM_KEYS | {"hidden_size": 24, "projection_dim": 24}, 1),
}
MERGING = {"merge_ratio": 0.5, "merge_layers": [0], "merge_method": "ward"}
SIGLIP_TEXT = {"pooling": "last", "use_causal_mask": False, "text_projection_bias": True, "pad_token_id": 0}


def tower_model(vision: dict, text: dict | None = None):
    text = {"num_hidden_layers": 1, **(text or {})}
    return small_model(vision={"frequency_layers": 0, **vision}, text=text, token_loss_frequency=False)


def onnx_outputs(encoder: nn.Module, path, examples: list[dict], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Embeddings of onnxruntime, for a batch of another size than those of the export."""
    export_encoder(encoder, examples, "embeds", path)
    [embeds] = onnxruntime.InferenceSession(path).run(None, {name: value.numpy() for name, value in inputs.items()})
    return torch.from_numpy(embeds)


@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_an_image_tower_with_rotary_positions_or_attention_pooling_merges_in_onnx(name, tmp_path):
    keys, num_layers = TOWERS[name]
    model = tower_model({**keys, **MERGING, "num_hidden_layers": num_layers})
    examples = [example_images(model, batch_size) for batch_size in (2, 3)]
    inputs = example_images(model, 4)
    ours = onnx_outputs(ImageEncoder(model), tmp_path / "image.onnx", examples, inputs)
    merged = model.get_image_features(**inputs).pooler_output
    torch.testing.assert_close(ours, merged, rtol=0, atol=1e-4 * merged.norm(dim=-1).max().item())
    model.set_merge_ratio(0.0)
    assert (model.get_image_features(**inputs).pooler_output - merged).abs().max() > 1e-2


@torch.no_grad()
def test_a_text_tower_that_ignores_the_mask_takes_the_same_inputs_in_onnx(tmp_path):
    model = tower_model({"num_hidden_layers": 1}, SIGLIP_TEXT)
    examples = [example_captions(model, batch_size) for batch_size in (2, 3)]
    inputs = example_captions(model, 4)
    ours = onnx_outputs(TextEncoder(model), tmp_path / "text.onnx", examples, inputs)
    theirs = model.get_text_features(inputs["input_ids"]).pooler_output
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.norm(dim=-1).max().item())
