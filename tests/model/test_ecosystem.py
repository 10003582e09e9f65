# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""MLIP with other software: compilers, exporters, accelerate, PEFT, pipelines, attention backends, CLIP_benchmark."""

import shutil

import pytest
import torch
from accelerate import dispatch_model, infer_auto_device_map
from conftest import open_gate, pairs_batch, small_config, small_model
from PIL import Image
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoImageProcessor, CLIPImageProcessor, CLIPProcessor, Trainer, TrainingArguments, pipeline
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_mlip import MLIPForImageClassification, MLIPModel
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.evaluation.clip_benchmark import load_mlip

EXPORTED = ("logits_per_image", "image_embeds", "text_embeds")
CAPTIONS = ["a red circle", "a blue square", "a green star"]


def tiny_model() -> MLIPModel:
    """A small model with every part: one merging layer and a gate that is not zero."""
    vision = {"merge_ratio": 0.5, "num_hidden_layers": 2, "frequency_layers": 1}
    return open_gate(small_model(vision=vision, text={"num_hidden_layers": 1}))


class ThreeOutputs(torch.nn.Module):
    def __init__(self, model: MLIPModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values, input_ids, attention_mask):
        outputs = self.model(pixel_values=pixel_values, input_ids=input_ids, attention_mask=attention_mask)
        return tuple(outputs[name] for name in EXPORTED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model with its processor."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = train_tokenizer(CAPTIONS, max_seq_length=40, vocab_size=530)
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 40, "bos_token_id": tokenizer.bos_token_id}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    open_gate(small_model(vision={"merge_ratio": 0.5}, text=text)).save_pretrained(path)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=images, tokenizer=tokenizer).save_pretrained(path)
    return str(path)


@pytest.fixture
def image() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((40, 36))


# Compilers and exporters


@torch.no_grad()
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_model_compiles_as_one_graph_and_once_for_all_batches(backend):
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler")
    torch._dynamo.reset()
    model = tiny_model()
    module = ThreeOutputs(model) if backend == "aot_eager" else model.vision_model
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(module, fullgraph=True, backend=counter)
    for seed in range(3):
        batch = pairs_batch(seed=seed)
        if backend == "aot_eager":
            ours, plain = compiled(**batch), module(**batch)
        else:
            ours, plain = (m(batch["pixel_values"]).pooler_output for m in (compiled, module))
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)
    assert counter.frame_count == 1


@torch.no_grad()
@pytest.mark.parametrize("merge_method", ["mlip", "ward"])
def test_torch_and_onnx_exports_work_with_any_batch_size(merge_method, tmp_path):
    import onnxruntime

    model = tiny_model()
    model.vision_model.config.merge_method = merge_method
    module = ThreeOutputs(model).eval()
    batch = pairs_batch(3)
    shapes = {name: {0: torch.export.Dim("batch")} for name in batch}
    program = torch.export.export(module, (), batch, dynamic_shapes=shapes)
    session = None
    if merge_method == "ward":  # tests/conversion/test_onnx_export.py has "mlip"
        torch.onnx.export(program, dynamo=True, verbose=False).save(tmp_path / "model.onnx")
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    for num_pairs in (1, 3, 7):
        batch = pairs_batch(num_pairs, seed=num_pairs)
        expected = module(**batch)
        for name, ours, theirs in zip(EXPORTED, program.module()(**batch), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5, msg=name)
        inputs = {name: value.numpy() for name, value in batch.items()}
        for ours, theirs in zip(session.run(None, inputs), expected, strict=True) if session is not None else ():
            torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=0, atol=1e-4)


# Placement and adapters


@torch.no_grad()
def test_a_device_map_splits_no_layer(folder, batch, tmp_path):
    model = MLIPModel.from_pretrained(folder).eval()
    expected = model(**batch).logits_per_image
    placed = MLIPModel.from_pretrained(folder, device_map="auto").eval()
    assert torch.equal(placed(**batch).logits_per_image, expected)
    half = sum(p.numel() * p.element_size() for p in model.parameters()) // 2
    device_map = infer_auto_device_map(
        model, max_memory={"cpu": half, "disk": 2**30}, no_split_module_classes=model._no_split_modules
    )
    assert set(device_map.values()) == {"cpu", "disk"}
    whole = [name for name, module in model.named_modules() if type(module).__name__ in model._no_split_modules]
    assert not [key for key in device_map for name in whole if key.startswith(f"{name}.")]
    spread = dispatch_model(model, device_map, main_device="cpu", offload_dir=tmp_path)
    torch.testing.assert_close(spread(**batch).logits_per_image, expected, rtol=0, atol=1e-6)


def test_lora_on_the_attention_projections_is_saved_and_loaded(folder, batch, tmp_path):
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = peft.get_peft_model(MLIPModel.from_pretrained(folder), config)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * (4 + 2)  # A and B, queries and values, layers of both towers
    model(**batch, return_loss=True).loss.backward()
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in trained)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(MLIPModel.from_pretrained(folder), tmp_path).eval()
    plain = MLIPModel.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = model.eval()(**batch).image_embeds
        assert torch.equal(again(**batch).image_embeds, expected)
        assert not torch.allclose(plain(**batch).image_embeds, expected)


# Pipelines


def test_zero_shot_image_classification(folder, image):
    classify = pipeline("zero-shot-image-classification", model=folder)
    outputs = classify([image, image], candidate_labels=["circle", "square"])
    assert sorted(row["label"] for row in outputs[0]) == ["circle", "square"]
    assert sum(row["score"] for row in outputs[0]) == pytest.approx(1, abs=1e-5)
    assert outputs[0] == outputs[1]


def test_image_feature_extraction(folder, image):
    tower = MLIPModel.from_pretrained(folder).vision_model.eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    features = pipeline("image-feature-extraction", model=tower, image_processor=processor)(image, return_tensors=True)
    assert features.shape == (1, 1 + 32, 32)


def test_image_classification(folder, image):
    torch.manual_seed(0)
    model = MLIPForImageClassification(small_config(vision={"merge_ratio": 0.5}, num_labels=3)).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    outputs = pipeline("image-classification", model=model, image_processor=processor)([image] * 3, batch_size=2)
    assert [len(rows) for rows in outputs] == [3, 3, 3]
    assert {row["label"] for row in outputs[0]} == {"LABEL_0", "LABEL_1", "LABEL_2"}


# Attention backends


def attend_without_bias(module, queries, keys, values, attention_mask, scaling, dropout=0.0, **kwargs):
    """Stands for flash attention: no bias, heads whose width is divisible by 8."""
    assert attention_mask is None and queries.shape[-1] % 8 == values.shape[-1] % 8 == 0
    outputs = (queries @ keys.transpose(2, 3) * scaling).softmax(dim=-1) @ values
    return outputs.transpose(1, 2), None


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 0.1)])
def test_a_kernel_that_takes_no_bias_attends_in_proportion_to_size(monkeypatch, dtype, tolerance):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "flash_stand_in", attend_without_bias)
    tower = small_model(vision={"merge_ratio": 0.5}).vision_model.eval()
    pixel_values = pairs_batch()["pixel_values"]
    expected = tower(pixel_values).pooler_output
    tower.to(dtype)
    sdpa = tower(pixel_values.to(dtype)).pooler_output
    tower.config._attn_implementation_internal = "flash_stand_in"
    fused = tower(pixel_values.to(dtype)).pooler_output
    torch.testing.assert_close(fused, sdpa, rtol=0, atol=tolerance)
    torch.testing.assert_close(fused.float(), expected.float(), rtol=0, atol=max(tolerance, 1e-5))


# CLIP_benchmark


@torch.no_grad()
def test_clip_benchmark_loads_a_folder_at_a_merge_ratio(folder, image):
    model, transform, tokenizer = load_mlip(folder, "0.25")
    assert model.model.config.merge_ratio == 0.25
    assert model.encode_image(transform(image)[None]).shape == (1, 24)
    tokens = tokenizer(["a red circle", "a circle " * 40])
    assert tokens.shape == (2, 40)
    assert tokens[1, -1] == model.model.config.text_config.eos_token_id
    assert model.encode_text(tokens).shape == (2, 24)
    assert load_mlip(folder)[0].model.config.merge_ratio == 0.5
    with pytest.raises(ValueError, match="pretrained='openai'.*such as 0.5"):
        load_mlip(folder, "openai")


@pytest.mark.parametrize("merge_ratio", [0, 0.5])
def test_a_classifier_has_the_same_gradient_norm_with_accumulated_batches(tmp_path, merge_ratio):
    pixels = pairs_batch(num_pairs=8)["pixel_values"]
    rows = [{"pixel_values": image, "labels": number % 3} for number, image in enumerate(pixels)]
    norms = []
    for batch_size in (8, 2):
        torch.manual_seed(0)
        model = MLIPForImageClassification(small_config(vision={"merge_ratio": merge_ratio}, num_labels=3))
        arguments = TrainingArguments(
            str(tmp_path / str(batch_size)),
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=8 // batch_size,
            logging_steps=1,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        )
        trainer = Trainer(model, arguments, train_dataset=rows)
        trainer.train()
        norms.append(trainer.state.log_history[0]["grad_norm"])
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
