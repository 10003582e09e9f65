# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Exported models give the embeddings of the MLIP model for texts with added tokens, and name no local path."""

import json

import open_clip
import pytest
import torch
from conftest import small_config
from conversion_cases import clip_folder, open_clip_folder
from transformers import CLIPConfig

from modeling_mlip import MLIPConfig
from modeling_mlip.conversion import processors
from modeling_mlip.conversion.checkpoint_sources import read_source
from modeling_mlip.conversion.checkpoints import _build_config, convert_checkpoint
from modeling_mlip.conversion.convert import main
from modeling_mlip.conversion.export import export_checkpoint
from modeling_mlip.conversion.open_clip_configurations import model_cfg_of_name, open_clip_of_mlip_config
from modeling_mlip.conversion.transformers_configurations import clip_of_mlip_config, mlip_config_of_clip
from modeling_mlip.hub.configurations import override_config, pretrained_config
from modeling_mlip.hub.verification import local_path_in


def add_token(model, processor, token: str):
    """The same model with one more row in its vocabulary."""
    config = model.config.to_dict()
    config["text_config"]["vocab_size"] += 1
    larger = type(model)(MLIPConfig.from_dict(config)).eval()
    state = model.state_dict()
    name = "text_model.embeddings.token_embedding.weight"
    state[name] = torch.cat([state[name], 0.1 * torch.randn(1, state[name].shape[1])])
    larger.load_state_dict(state)
    assert processor.tokenizer.add_tokens([token]) == 1
    return larger, processor


@torch.no_grad()
def test_an_added_token_gives_the_same_embedding_in_open_clip(tmp_path):
    model, processor = add_token(*convert_checkpoint(open_clip_folder(tmp_path / "source")), "zyxgadget")
    notes = export_checkpoint(model, processor, tmp_path / "out")
    assert any("hf_tokenizer_name" in note for note in notes)
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    texts = ["a photo of a zyxgadget", "zyxgadget and cats", "two cats"]
    ids = processor.tokenizer(texts, padding=True, return_tensors="pt").input_ids
    assert 49408 in ids
    expected = torch.nn.functional.normalize(model.get_text_features(input_ids=ids).pooler_output, dim=-1)
    actual = theirs.eval().encode_text(tokenizer(texts), normalize=True)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_a_tokenizer_with_other_ids_in_open_clip_is_refused(tmp_path, monkeypatch):
    model, processor = add_token(*convert_checkpoint(open_clip_folder(tmp_path / "source")), "zyxgadget")
    monkeypatch.setattr("modeling_mlip.conversion.export.text_cfg_of", lambda tokenizer: {})  # OpenCLIP's own
    with pytest.raises(ValueError, match="other token ids.*zyxgadget"):
        export_checkpoint(model, processor, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    model, processor = convert_checkpoint(open_clip_folder(tmp_path / "source"))
    processor.tokenizer.add_tokens(["zyxgadget"])
    with pytest.raises(ValueError, match="the tokenizer has 49409 tokens, the model only 49408"):
        export_checkpoint(model, processor, tmp_path / "out", format="clip")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_with_values_that_are_not_finite_is_not_exported(tmp_path, value):
    source, _ = clip_folder(tmp_path / "clip")
    model, processor = convert_checkpoint(source)
    model.text_projection.weight.data[0, 0] = value
    with pytest.raises(ValueError, match="NaN or infinite values in text_projection.weight"):
        export_checkpoint(model, processor, tmp_path / "out", format="clip")


def test_no_file_that_convert_writes_names_a_local_path(tmp_path):
    clip, _ = clip_folder(tmp_path / "clip")
    worldwide = open_clip_folder(tmp_path / "worldwide", "worldwide")
    for number, source in enumerate((clip, worldwide, open_clip_folder(tmp_path / "plain"))):
        main([str(source), str(tmp_path / f"mlip-{number}")])
        main([str(tmp_path / f"mlip-{number}"), str(tmp_path / f"export-{number}"), "--to", "open_clip"])
    written = [path for folder in tmp_path.glob("*-?") for path in folder.rglob("*") if path.is_file()]
    assert len(written) > 30
    for path in written:
        assert str(tmp_path).encode() not in path.read_bytes(), path
        if path.suffix in (".json", ".md") and path.name != "tokenizer.json":
            assert local_path_in(path.read_text()) is None, path
    content = json.loads((tmp_path / "export-0" / "open_clip_config.json").read_text())
    assert content["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == processors.UNKNOWN_TOKENIZER


@pytest.mark.parametrize("overrides", [{"hidden_size": 96}, {"hidden_size": 96, "intermediate_size": 200}])
def test_conversion_and_training_apply_the_same_override(tmp_path, overrides):
    source, _ = clip_folder(tmp_path / "clip")
    converted = _build_config(read_source(source), overrides).vision_config
    trained = override_config(pretrained_config(str(source)), overrides).vision_config
    for key in ("hidden_size", "intermediate_size", "frequency_hidden_size"):
        assert getattr(converted, key) == getattr(trained, key), key
    assert converted.intermediate_size == overrides.get("intermediate_size", 384)


@pytest.mark.parametrize("vocab_size", [100, 49408, 49500])
def test_conversion_and_training_repair_old_special_ids_alike(vocab_size):
    text = {"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1}
    clip = CLIPConfig(text_config=text)
    converted = MLIPConfig(**mlip_config_of_clip(clip)).text_config
    trained = MLIPConfig.from_clip_config(clip).text_config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        assert getattr(converted, name) == getattr(trained, name), name
    assert converted.eos_token_id == min(vocab_size, 49408) - 1 and converted.bos_token_id == converted.eos_token_id - 1


def test_a_name_without_open_clip_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "open_clip", None)
    with pytest.raises(ImportError, match=r"pip install 'modeling-mlip\[openclip\]'"):
        model_cfg_of_name("ViT-B-32")


def test_a_tower_without_a_class_token_or_a_counterpart_is_refused():
    config = small_config(vision={"use_class_token": False, "pooling": "mean"})
    with pytest.raises(ValueError, match="OpenCLIP has no image tower like this.*mlip push"):
        open_clip_of_mlip_config(config)
    with pytest.raises(ValueError, match="CLIPModel does not have mean pooling.*without class token"):
        clip_of_mlip_config(config)
