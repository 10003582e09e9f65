# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Conversion of OpenCLIP models with Hugging Face text towers (RoBERTa, XLM-RoBERTa, NLLB), against OpenCLIP's own."""

import json

import hugging_face_cases
import open_clip
import pytest
import torch
from conversion_cases import WORDS
from hugging_face_cases import TEXTS, hugging_face_cfg_of, hugging_face_folder
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoModel, AutoProcessor, AutoTokenizer

from modeling_mlip import MLIPConfig, MLIPModel, MLIPTextModelWithProjection
from modeling_mlip.conversion import open_clip_configurations as configs
from modeling_mlip.conversion import parity, tables
from modeling_mlip.conversion.checkpoints import convert_checkpoint, empty_model
from modeling_mlip.conversion.convert import main
from modeling_mlip.conversion.export import export_checkpoint
from modeling_mlip.conversion.hugging_face_towers import ENCODERS

NAMES = ("roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32", "xlm-roberta-large-ViT-H-14", "nllb-clip-base",
         "nllb-clip-base-siglip", "nllb-clip-large", "nllb-clip-large-siglip")  # fmt: skip


@pytest.fixture(autouse=True)
def encoders(monkeypatch):
    for name, keys in hugging_face_cases.ENCODERS.items():
        monkeypatch.setitem(ENCODERS, name, keys)


@pytest.mark.parametrize("variant", TEXTS)
@torch.no_grad()
def test_converted_model_equals_open_clip_and_comes_back_to_the_bit(tmp_path, variant):
    source, theirs = hugging_face_folder(tmp_path / "source", variant)
    ours, processor = convert_checkpoint(source)
    images, ids = parity.random_inputs(ours.config, seed=1)
    ids = torch.cat([ids, parity.captions_of_all_lengths(ours.config, False, seed=1)])
    output, expected = ours(input_ids=ids, pixel_values=images), theirs.encode_text(ids, normalize=True)
    torch.testing.assert_close(output.image_embeds, theirs.encode_image(images, normalize=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, expected, atol=1e-5, rtol=0)

    export_checkpoint(ours, processor, tmp_path / "back")
    back = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    state = load_file(source / "open_clip_model.safetensors")
    assert state.keys() == back.keys()
    assert all(torch.equal(state[key], back[key]) for key in state)
    content = json.loads((tmp_path / "back" / "open_clip_config.json").read_text())["model_cfg"]
    assert content["text_cfg"] == {"hf_proj_type": "mlp"} | hugging_face_cfg_of(variant)["text_cfg"]
    assert bool(content.get("quick_gelu")) == (variant == "roberta")


@torch.no_grad()
def test_saved_model_gives_the_embeddings_of_open_clip_for_texts_and_merges(tmp_path, capsys):
    source, theirs = hugging_face_folder(tmp_path / "source", "roberta")
    main([str(source), str(tmp_path / "mlip"), "--merge-ratio", "0.5", "--merge-layers", "1"])
    assert "text tower 2 x 32 (200 tokens, mean pooling)" in capsys.readouterr().out
    ours, processor = AutoModel.from_pretrained(tmp_path / "mlip"), AutoProcessor.from_pretrained(tmp_path / "mlip")
    assert isinstance(ours, MLIPModel)
    texts = [" ".join(WORDS[:count]) for count in (0, 1, 4, 8)]
    tokenizer = open_clip.tokenizer.HFTokenizer(str(source), context_length=12)
    expected = theirs.encode_text(tokenizer(texts))
    features = ours.get_text_features(**processor(text=texts, padding=True, return_tensors="pt")).pooler_output
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)
    tower = MLIPTextModelWithProjection.from_pretrained(tmp_path / "mlip")
    ids = processor(text=texts, padding="max_length", return_tensors="pt").input_ids
    assert torch.equal(ids, tokenizer(texts))
    torch.testing.assert_close(tower(ids).text_embeds, expected, atol=1e-5, rtol=0)
    vision = ours.vision_model(torch.randn(2, 3, 32, 32), output_token_map=True)
    assert vision.token_sizes.shape == (2, 8) and vision.token_map.shape == (2, 16)
    outputs = ours(input_ids=ids, pixel_values=torch.randn(4, 3, 32, 32), output_hidden_states=True)
    assert len(outputs.text_model_output.hidden_states) == 3


def test_training_reaches_every_parameter_and_the_vocabulary_may_grow(tmp_path):
    source, _ = hugging_face_folder(tmp_path / "source", "nllb")
    ours, _ = convert_checkpoint(source, token_loss_weight=0.1, merge_ratio=0.5, merge_layers=[1])
    ours.resize_token_embeddings(203, mean_resizing=False)
    images, ids = torch.randn(3, 3, 32, 32), parity.random_inputs(ours.config)[1]
    ours.train()(input_ids=ids, pixel_values=images, return_loss=True).loss.backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
    ours.save_pretrained(tmp_path / "larger")
    assert MLIPModel.from_pretrained(tmp_path / "larger").get_input_embeddings().num_embeddings == 203


def test_all_7_configurations_are_known_by_name_and_come_back():
    for name in NAMES:
        model_cfg = open_clip.get_model_config(name)
        ours = configs.mlip_config_of_open_clip(model_cfg)
        config = MLIPConfig(**ours)
        assert configs.mlip_config_of_open_clip(configs.open_clip_of_mlip_config(config)) == ours, name
    assert config.text_config.hidden_size == 1024 and config.text_config.num_hidden_layers == 24
    others = {
        name for name in open_clip.list_models() if "hf_model_name" in open_clip.get_model_config(name)["text_cfg"]
    }
    assert others - set(NAMES) == {"coca_roberta-ViT-B-32", "mt5-base-ViT-B-32", "mt5-xl-ViT-H-14"}


@pytest.mark.parametrize("variant", TEXTS)
def test_every_parameter_of_the_encoder_has_a_row(variant):
    config = MLIPConfig(**configs.mlip_config_of_open_clip(hugging_face_cfg_of(variant)))
    names = {tables._split_layer(name)[0] for name in empty_model(config).text_model.state_dict()}
    rows = {name for name in tables.open_clip_table(config).values() if str(name).startswith("text_model.")}
    assert {f"text_model.{name}" for name in names} == rows


def test_a_text_tower_that_is_not_supported_is_named_and_nothing_is_written(tmp_path):
    source, _ = hugging_face_folder(tmp_path / "source", "xlm-roberta")
    cfg = hugging_face_cfg_of("xlm-roberta")
    for keys, message in (
        ({"hf_model_name": "google/mt5-base"}, "the Hugging Face text tower google/mt5-base is not supported; MLIP"),
        ({"hf_pooler_type": "cls_pooler"}, "test/xlm with hf_pooler_type='cls_pooler' .* supported are 'mean_pooler'"),
        ({"hf_proj_type": None}, r"hf_proj_type=None is not supported; .*\(None only for embed_dim=32\)"),
    ):
        content = {"model_cfg": cfg | {"text_cfg": cfg["text_cfg"] | keys}}
        (source / "open_clip_config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message) as error:
            main([str(source), str(tmp_path / "mlip")])
        assert "\n" not in str(error.value) and not (tmp_path / "mlip").exists()
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.pad_token = "<unk>"
    tokenizer.save_pretrained(source)
    (source / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    with pytest.raises(ValueError, match="pads with the token id 1, but its tokenizer with 3"):
        convert_checkpoint(source)


def test_what_other_formats_do_not_have_is_named(tmp_path):
    source, _ = hugging_face_folder(tmp_path / "source", "roberta")
    ours, processor = convert_checkpoint(source)
    for format in ("clip", "siglip"):
        with pytest.raises(ValueError, match="an encoder of transformers as text tower"):
            export_checkpoint(ours, processor, tmp_path / "back", format=format)
    config = MLIPConfig.from_dict(ours.config.to_dict())
    config.text_config.encoder_config.intermediate_size = 41
    with pytest.raises(ValueError, match="OpenCLIP has no roberta text tower like this"):
        configs.open_clip_of_mlip_config(config)


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"pooling": "eos"}, "pooling='eos' is unknown; choose one of 'mean', 'class'"),
     ({"use_causal_mask": True}, "use_causal_mask=True: .*set it to False"),
     ({"encoder_config": {"model_type": "bert"}}, "encoder_config.model_type='bert' is unknown"),
     ({"text_projection_bias": True}, "text_projection_hidden_size=28 needs .*text_projection_bias=False")],
)  # fmt: skip
def test_settings_that_do_not_fit_the_encoder_are_refused(keys, message):
    text = configs.mlip_config_of_open_clip(hugging_face_cfg_of("roberta"))["text_config"]
    with pytest.raises(StrictDataclassError, match=message):
        MLIPConfig(projection_dim=24, text_config=text | keys)
