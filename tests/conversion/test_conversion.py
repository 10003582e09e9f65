# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Conversion of whole models: equal to the original, back to the bit, and what MLIP adds."""

import importlib
import json
import sys

import open_clip
import pytest
import torch
from conversion_cases import VARIANTS, clip_folder, model_cfg_of, open_clip_folder, open_clip_model
from processes import run_in_fork
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor, CLIPModel

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.conversion import open_clip_configurations as configs
from modeling_mlip.conversion import parity, tables, transformers_configurations
from modeling_mlip.conversion.checkpoints import convert, convert_checkpoint
from modeling_mlip.conversion.convert import main
from modeling_mlip.conversion.export import export_checkpoint
from modeling_mlip.conversion.speedup import choose_merging
from modeling_mlip.hub.text_context import stretch_positions


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_converted_model_equals_open_clip(tmp_path, variant):
    ours, _ = convert_checkpoint(open_clip_folder(tmp_path / variant, variant))
    theirs = open_clip_model(variant)
    images, ids = parity.random_inputs(ours.config, seed=1)
    output = ours(input_ids=ids, pixel_values=images)
    torch.testing.assert_close(output.image_embeds, theirs.encode_image(images, normalize=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, theirs.encode_text(ids, normalize=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits_per_image, theirs.get_logits(images, ids)[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("variant", "no_causal_mask"), [("worldwide", True), ("clipa", False)])
@torch.no_grad()
def test_a_text_tower_that_reads_padding_gives_the_embeddings_of_open_clip_for_any_padding(
    tmp_path, monkeypatch, variant, no_causal_mask
):
    vision, text, model = VARIANTS[variant]
    monkeypatch.setitem(VARIANTS, variant, (vision, {**text, "no_causal_mask": no_causal_mask}, model))
    ours, processor = convert_checkpoint(open_clip_folder(tmp_path / variant, variant))
    texts = ["a red cat", "a photo of two dogs"]
    ids = processor.tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    expected = open_clip_model(variant).encode_text(ids)
    for batch in (texts, texts[:1]):
        inputs = processor(text=batch, padding=True, return_tensors="pt")
        assert "attention_mask" in inputs and inputs.input_ids.shape[1] < ids.shape[1]
        features = ours.get_text_features(**inputs).pooler_output
        torch.testing.assert_close(features, expected[: len(batch)], atol=1e-5, rtol=0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_open_clip_comes_back_to_the_bit(tmp_path, variant):
    source = open_clip_folder(tmp_path / variant, variant)
    ours, processor = convert_checkpoint(source)
    export_checkpoint(ours, processor, tmp_path / "back")
    theirs = load_file(source / "open_clip_model.safetensors")
    back = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    assert theirs.keys() == back.keys()
    assert all(torch.equal(theirs[key], back[key]) for key in theirs)
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'back'}")
    images, ids = parity.random_inputs(ours.config)
    expected = open_clip_model(variant).get_logits(images, ids)[0]
    torch.testing.assert_close(loaded.eval().get_logits(images, ids)[0], expected, atol=1e-5, rtol=0)


def test_all_45_configurations_are_known_by_name_and_come_back():
    def plain(cfg):
        vision, text = cfg["vision_cfg"], cfg["text_cfg"]
        own_vision = "timm_model_name" not in vision and isinstance(vision["layers"], int)
        return own_vision and "hf_model_name" not in text and "multimodal_cfg" not in cfg

    theirs = {name: cfg for name in open_clip.list_models() if plain(cfg := open_clip.get_model_config(name))}
    assert len(theirs) == 45
    for name, model_cfg in theirs.items():
        assert configs.model_cfg_of_name(name) == model_cfg
        ours = configs.mlip_config_of_open_clip(model_cfg)
        back = configs.open_clip_of_mlip_config(MLIPConfig(**ours))
        assert configs.mlip_config_of_open_clip(back) == ours, name


@pytest.mark.parametrize("eos_token_id", [99, 2])
@torch.no_grad()
def test_clip_of_transformers_is_equal_and_comes_back_to_the_bit(tmp_path, eos_token_id):
    source, theirs = clip_folder(tmp_path / "clip", eos_token_id)
    ours, processor = convert_checkpoint(source)
    assert ours.config.text_config.eos_token_id == 99
    images, ids = parity.random_inputs(ours.config, seed=1)
    expected = theirs(input_ids=ids, pixel_values=images).logits_per_image
    torch.testing.assert_close(ours(input_ids=ids, pixel_values=images).logits_per_image, expected, atol=1e-5, rtol=0)

    export_checkpoint(ours, processor, tmp_path / "back", format="clip")
    back = CLIPModel.from_pretrained(tmp_path / "back")
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    torch.testing.assert_close(back(input_ids=ids, pixel_values=images).logits_per_image, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_comes_back_to_the_bit(tmp_path, dtype):
    source, theirs = clip_folder(tmp_path / "clip")
    theirs.to(dtype).save_pretrained(source)
    ours, processor = convert_checkpoint(source)
    assert {parameter.dtype for parameter in ours.parameters()} == {dtype}
    export_checkpoint(ours, processor, tmp_path / "back", format="clip")
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(tensor, back[key]) for key, tensor in load_file(source / "model.safetensors").items())


def test_own_parts_start_where_fine_tuning_starts_sensibly(tmp_path):
    source, _ = clip_folder(tmp_path / "clip")
    keys = dict(merge_ratio=0.5, merge_layers=[1], frequency_hidden_size=16)
    keys |= dict(token_loss_weight=0.1, token_loss_frequency=True)
    ours, _ = convert_checkpoint(source, **keys)
    assert ours.config.merge_ratio == 0.5 and ours.config.merge_layers == [1]
    assert ours.config.vision_config.frequency_hidden_size == 16
    assert not ours.vision_model.frequency.gate.any()
    assert torch.equal(ours.token_visual_projection.weight, ours.visual_projection.weight)
    assert torch.equal(ours.token_text_projection.weight, ours.text_projection.weight)
    assert 0 < ours.token_frequency_projection.weight.std() < ours.token_visual_projection.weight.std()
    for own in (ours.token_logit_scale, ours.frequency_logit_scale):  # what they scale is not trained yet
        assert own.item() == pytest.approx(ours.config.logit_scale_init_value)
    assert all(torch.isfinite(parameter).all() and not parameter.is_meta for parameter in ours.parameters())
    again, _ = convert_checkpoint(source, **keys)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_parity_report_sees_a_wrong_activation_and_a_wrong_bias(tmp_path):
    source, _ = clip_folder(tmp_path / "clip")
    conversion = convert(source)
    assert conversion.report.passed
    ours = conversion.model
    oracle = parity.clip_oracle(transformers_configurations.clip_of_mlip_config(ours.config), tables_of(ours))
    ours.vision_model.encoder.layers[1].mlp.fc2.bias.data[0] += 0.01
    assert not parity.compare(ours, oracle).passed
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["hidden_act"] = "gelu"
    wrong = transformers_configurations.mlip_config_of_clip(CLIPModel.config_class(**config))
    wrong = parity.clip_oracle(wrong, tables_of(ours))
    report = parity.compare(ours, wrong)
    assert not report.passed and "FAILED" in str(report)


def tables_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items() if not tables.is_own(name)}


# The command


def test_command_converts_there_and_back_into_one_folder_for_both(tmp_path, capsys):
    source = open_clip_folder(tmp_path / "source")
    main([str(source), str(tmp_path / "mlip"), "--merge-ratio", "0.5", "--merge-layers", "1", "--merge-method", "tome"])
    assert "passed" in capsys.readouterr().out
    report = json.loads((tmp_path / "mlip" / "conversion_report.json").read_text())
    assert report["parity"]["mlip"]["passed"]
    assert "max |difference|" in (tmp_path / "mlip" / "README.md").read_text()
    ours = AutoModel.from_pretrained(tmp_path / "mlip")
    assert isinstance(ours, MLIPModel) and ours.config.merge_ratio == 0.5 and ours.config.merge_method == "tome"
    assert AutoProcessor.from_pretrained(tmp_path / "mlip").tokenizer("a!").input_ids[1:-1] == [320, 256]

    main([str(tmp_path / "mlip"), str(tmp_path / "both"), "--to", "both"])
    assert "merging (merge_ratio=0.5) is off there" in capsys.readouterr().out
    images, ids = parity.random_inputs(ours.config)
    expected = open_clip_model("plain").get_logits(images, ids)[0]
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'both'}")
    torch.testing.assert_close(theirs.eval().get_logits(images, ids)[0], expected, atol=1e-5, rtol=0)
    clip = CLIPModel.from_pretrained(tmp_path / "both")
    logits = clip(input_ids=ids, pixel_values=images).logits_per_image
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_command_chooses_the_merging_for_a_speedup(tmp_path, capsys):
    source = open_clip_folder(tmp_path / "source")
    main([str(source), str(tmp_path / "mlip"), "--speedup", "1.2"])
    config = AutoModel.from_pretrained(tmp_path / "mlip").config
    chosen = choose_merging(config.vision_config, 1.2)
    assert (config.merge_ratio, config.merge_layers) == (chosen["merge_ratio"], chosen["merge_layers"])
    assert f"For 1.2 times fewer FLOPs: --merge_ratio {config.merge_ratio}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--speedup 2.0 chooses --merge_ratio and --merge_layers"):
        main([str(source), str(tmp_path / "other"), "--speedup", "2", "--merge_ratio", "0.5"])
    assert not (tmp_path / "other").exists()


def test_command_stretches_the_context_of_captions(tmp_path, monkeypatch):
    monkeypatch.setitem(VARIANTS, "longer", ({}, {"context_length": 30}, {}))
    source = open_clip_folder(tmp_path / "source", "longer")
    main([str(source), str(tmp_path / "mlip"), "--max-seq-length", "50"])
    model, processor = AutoModel.from_pretrained(tmp_path / "mlip"), AutoProcessor.from_pretrained(tmp_path / "mlip")
    assert model.config.text_config.max_position_embeddings == processor.tokenizer.model_max_length == 50
    weight = load_file(source / "open_clip_model.safetensors")["positional_embedding"]
    stretched = model.text_model.embeddings.position_embedding.weight
    torch.testing.assert_close(stretched, stretch_positions(weight, 50), rtol=0, atol=0)
    assert "stretched from 30 to 50 tokens" in (tmp_path / "mlip" / "README.md").read_text()


@pytest.mark.parametrize("use", ["gate", "frequency_embed_weight"])
def test_a_used_frequency_stage_is_dropped_only_on_request(tmp_path, use):
    source, _ = clip_folder(tmp_path / "clip")
    ours, processor = convert_checkpoint(source)
    if use == "gate":
        ours.vision_model.frequency.gate.data += 0.1
    else:
        ours.config.frequency_embed_weight = 0.5
    with pytest.raises(ValueError, match="drop_frequency"):
        export_checkpoint(ours, processor, tmp_path / "back", format="clip")
    assert not (tmp_path / "back").exists()
    notes = export_checkpoint(ours, processor, tmp_path / "back", format="clip", drop_frequency=True)
    assert any("is in use" in note for note in notes)
    CLIPModel.from_pretrained(tmp_path / "back")


@pytest.mark.parametrize("variant", ["clipa", "layer_scale", "worldwide"])
def test_what_transformers_clip_cannot_compute_is_refused(tmp_path, variant):
    ours, processor = convert_checkpoint(open_clip_folder(tmp_path / variant, variant))
    obstacle = {"clipa": "mean pooling", "layer_scale": "LayerScale", "worldwide": "eos_token_id=2"}[variant]
    with pytest.raises(ValueError, match=obstacle):
        export_checkpoint(ours, processor, tmp_path / "back", format="clip")
    assert not (tmp_path / "back").exists()


def test_conversion_does_without_open_clip(tmp_path):
    source, _ = clip_folder(tmp_path / "clip")

    def convert_without_open_clip() -> int:
        for name in [name for name in sys.modules if name.startswith(("open_clip", "modeling_mlip.conversion"))]:
            del sys.modules[name]
        sys.modules["open_clip"] = None
        importlib.import_module("modeling_mlip.conversion.convert").main([str(source), str(tmp_path / "mlip")])
        return 0

    status = run_in_fork(convert_without_open_clip, tmp_path / "log.txt")
    printed = (tmp_path / "log.txt").read_text()
    assert status == 0, printed
    assert "Parity with transformers" in printed


def test_an_mlip_folder_is_read_strictly(tmp_path):
    source, _ = clip_folder(tmp_path / "clip")
    main([str(source), str(tmp_path / "mlip"), "--merge-ratio", "0.5"])
    first, _ = convert_checkpoint(tmp_path / "mlip")
    again, _ = convert_checkpoint(tmp_path / "mlip", merge_ratio=0.25)
    assert again.config.merge_ratio == 0.25 and first.config.merge_ratio == 0.5
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    with pytest.raises(ValueError, match=r"frequency.*but the config asks for"):
        convert_checkpoint(tmp_path / "mlip", frequency_hidden_size=16)
    state = load_file(tmp_path / "mlip" / "model.safetensors")
    del state["vision_model.frequency.gate"]
    save_file(state, tmp_path / "mlip" / "model.safetensors")
    with pytest.raises(ValueError, match=r"asks for vision_model\.frequency\.gate"):
        convert_checkpoint(tmp_path / "mlip")


def test_unknown_override_is_named(tmp_path):
    source, _ = clip_folder(tmp_path / "clip")
    with pytest.raises(ValueError, match=r"merge_rate=0\.5: not a key"):
        convert_checkpoint(source, merge_rate=0.5)
    with pytest.raises(ValueError, match=r"merge_ratio=1\.5 is not a fraction"):
        convert_checkpoint(source, merge_ratio=1.5)


def test_tables_are_one_to_one():
    for table in (tables.OPEN_CLIP, tables.CLIP):
        names = [name for row in table.values() for name in ((row,) if isinstance(row, str) else row)]
        assert len(names) == len(set(names))


def test_model_cfg_of_variants_is_complete():
    assert all({"embed_dim", "vision_cfg", "text_cfg"} <= set(model_cfg_of(variant)) for variant in VARIANTS)
