# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip export` writes ONNX files that compute what the saved model computes, at its merge ratio."""

import re
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import small_model
from transformers import AutoModel, CLIPProcessor

from modeling_mlip import MLIPConfig
from modeling_mlip.conversion import onnx_export
from modeling_mlip.conversion.onnx_export import (
    IMAGE_FILE,
    TEXT_FILE,
    ImageEncoder,
    export_encoder,
    export_onnx,
    quantize_encoder,
    smallest_cosine,
)
from modeling_mlip.hub.cli import main as mlip


@torch.no_grad()
def test_the_command_writes_both_towers_at_a_merge_ratio_in_float32_and_int8(
    sources, splits, tmp_path, capsys, monkeypatch
):
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

    # int8: the export takes seconds, so the float32 files of above stand for it.
    def copy(encoder, examples, output_name, path):
        for file in target.glob(f"{path.name}*"):
            shutil.copyfile(file, path.parent / file.name)

    monkeypatch.setattr(onnx_export, "export_encoder", copy)
    quantized = tmp_path / "int8"
    assert mlip(["export", str(source), "--dtype", "int8", "--output_dir", str(quantized)]) == 0
    for line, file in zip(capsys.readouterr().out.splitlines(), (IMAGE_FILE, TEXT_FILE), strict=True):
        assert 0.99 < float(re.search(rf"{file}: .* similarity to float32 ([\d.]+)", line)[1]) < 1
        types = {node.op_type for node in onnx.load(quantized / file).graph.node}
        assert {"MatMulInteger", "DynamicQuantizeLinear"} <= types
    assert {path.name for path in target.iterdir()} - {path.name for path in quantized.iterdir()} == {
        f"{IMAGE_FILE}.data",  # the weights; those of the int8 files are in the files themselves
        f"{TEXT_FILE}.data",
    }
    with pytest.raises(ValueError, match="dtype='int4': choose one of float32, int8"):
        export_onnx(source, tmp_path / "int4", dtype="int4")


def test_int8_weights_and_inputs_follow_the_formula_of_dynamic_quantisation(tmp_path):
    rng = np.random.default_rng(0)
    inputs, weights = (rng.standard_normal(shape).astype(np.float32) for shape in ((5, 16), (16, 7)))
    shapes = (("inputs", ["batch", 16]), ("outputs", ["batch", 7]))
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape) for name, shape in shapes]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["inputs", "weights"], ["outputs"])],
        "linear",
        ends[:1],
        ends[1:],
        [onnx.numpy_helper.from_array(weights, "weights")],
    )
    opset = [onnx.helper.make_opsetid("", 17)]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tmp_path / "float.onnx")
    quantize_encoder(tmp_path / "float.onnx", tmp_path / "int8.onnx")
    [ours] = onnxruntime.InferenceSession(tmp_path / "int8.onnx").run(None, {"inputs": inputs})
    # One scale for each output channel, symmetric, 7 bits; one scale and zero point for all inputs, 8 bits.
    exact_inputs, exact_weights = inputs.astype(np.float64), weights.astype(np.float64)
    weight_scale = np.abs(exact_weights).max(axis=0) / 64
    input_scale = (exact_inputs.max() - exact_inputs.min()) / 255
    zero = np.round(-exact_inputs.min() / input_scale)
    quantized = np.clip(np.round(exact_inputs / input_scale) + zero, 0, 255) - zero
    theirs = (quantized * input_scale) @ (np.round(exact_weights / weight_scale) * weight_scale)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    assert np.abs(ours - inputs @ weights).max() > 1e-3
    products = exact_inputs @ exact_weights
    cosines = (ours * products).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(products, axis=1)
    paths = (tmp_path / "int8.onnx", tmp_path / "float.onnx")
    assert smallest_cosine(*paths, {"inputs": torch.from_numpy(inputs)}) == pytest.approx(cosines.min(), abs=1e-6)


@pytest.mark.parametrize(("cosine", "status"), [(0.95, 0), (0.5, 1), (float("nan"), 1)])
def test_an_int8_file_that_differs_is_noted_and_one_that_differs_grossly_is_refused(
    cosine, status, sources, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(onnx_export, "export_encoder", lambda *args: 0.0)
    monkeypatch.setattr(onnx_export, "quantize_encoder", lambda source, path: path.write_bytes(b"onnx"))
    monkeypatch.setattr(onnx_export, "smallest_cosine", lambda *args: cosine)
    folder = tmp_path / "int8"
    assert mlip(["export", sources["mlip"], "--dtype", "int8", "--output_dir", str(folder)]) == status
    printed = capsys.readouterr()
    if status == 0:
        assert "Note: below 0.99. Compare recall with the float32 files" in printed.out
    else:
        assert f"{IMAGE_FILE} in int8 has a cosine similarity of {cosine:.4f} to float32" in printed.err
        assert not folder.exists() and not list(tmp_path.iterdir())


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
