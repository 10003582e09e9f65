# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip export` writes ONNX files that compute what the saved model computes, at its merge ratio."""

import numpy as np
import onnxruntime
import pytest
import torch
from conftest import small_model
from transformers import AutoModel, CLIPProcessor

from modeling_mlip import MLIPConfig
from modeling_mlip.conversion.onnx_export import IMAGE_FILE, TEXT_FILE, ImageEncoder, export_encoder
from modeling_mlip.hub.cli import main as mlip


@torch.no_grad()
def test_the_command_writes_both_towers_at_a_merge_ratio(sources, splits, tmp_path, capsys):
    # The export takes seconds for each layer, so the model has one layer in each tower.
    source, target = tmp_path / "model", tmp_path / "onnx"
    processor = CLIPProcessor.from_pretrained(sources["mlip"])
    text = MLIPConfig.from_pretrained(sources["mlip"]).text_config.to_dict() | {"num_hidden_layers": 1}
    vision = {"num_hidden_layers": 1, "merge_layers": [0], "frequency_layers": 1, "merge_ratio": 0.5}
    small_model(vision=vision, text=text).save_pretrained(source)
    processor.save_pretrained(source)
    assert mlip(["export", str(source), "--to", "onnx", "--merge_ratio", "0.25", "--output_dir", str(target)]) == 0
    assert f"{IMAGE_FILE}: largest difference to the model" in capsys.readouterr().out
    rows = splits["validation"].select(range(5))
    processor = CLIPProcessor.from_pretrained(target)
    inputs = processor(
        text=list(rows["caption"]), images=list(rows["image"]), padding="max_length", return_tensors="np"
    )
    model = AutoModel.from_pretrained(source, merge_ratio=0.25).eval()
    expected = model(**{name: torch.from_numpy(value) for name, value in inputs.items()})
    for file, names in ((IMAGE_FILE, ["pixel_values"]), (TEXT_FILE, ["input_ids", "attention_mask"])):
        [embeds] = onnxruntime.InferenceSession(target / file).run(None, {name: inputs[name] for name in names})
        ours = embeds / np.linalg.norm(embeds, axis=-1, keepdims=True)
        theirs = expected.image_embeds if file == IMAGE_FILE else expected.text_embeds
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-4)


def test_a_file_that_computes_something_else_is_refused(monkeypatch, tmp_path):
    class Session:
        def __init__(self, *args, **options):
            pass

        def run(self, names, inputs):
            return [np.ones((3, 4), np.float32)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    monkeypatch.setattr(torch.onnx, "export", lambda *args, **options: None)
    encoder = ImageEncoder(None)
    monkeypatch.setattr(encoder, "forward", lambda pixel_values: torch.eye(3, 4))
    examples = [{"pixel_values": torch.zeros(n, 1)} for n in (2, 3)]
    with pytest.raises(ValueError, match="image_embeds.onnx differs from the model by 1.0e.00"):
        export_encoder(encoder, examples, "image_embeds", tmp_path / "image_embeds.onnx")
