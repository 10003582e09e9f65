# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Conversion of SigLIP and SigLIP 2 from OpenCLIP and from transformers, and back, against the originals."""

import json

import open_clip
import pytest
import siglip_cases
import timm
import torch
from conversion_cases import open_clip_folder
from safetensors.torch import load_file
from siglip_cases import (
    LENGTH,
    SIGLIP_TEXTS,
    TIMM_KEYS,
    TIMM_NAME,
    open_clip_siglip,
    open_clip_siglip_folder,
    siglip_cfg_of,
    siglip_folder,
)
from transformers import AutoModel, AutoProcessor, AutoTokenizer, Siglip2Config, SiglipModel

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.conversion import open_clip_configurations as configs
from modeling_mlip.conversion import parity, processors, siglip_processors, tables, transformers_configurations
from modeling_mlip.conversion.checkpoints import convert, convert_checkpoint, empty_model
from modeling_mlip.conversion.convert import main
from modeling_mlip.conversion.export import export_checkpoint
from modeling_mlip.conversion.timm_towers import TIMM_TOWERS
from modeling_mlip.evaluation.visualize.inspection import offsets_by_word

NASTY_TEXTS = [
    "", " ", "!", "...", "a photo of a cat", "A Photo, of_two (CATS)!!", "snake_case_word", "  a \t photo\n of  ",
    "</s>", "a </s> cat", "<pad><unk> <eos> cat", "caf\u00e9 CAF\u00c9 cafe\u0301", "\u4e00\u53ea\u732b \U0001f431",
    "\u039f\u0394\u039f\u03a3 \u03a3\u03a3", "\u0130stanbul STRASSE \u00df", "it\u2019s \u201cso\u201d", "3.14 & 50%",
    "\u2581a\u2581cat", "-".join("abc"), "cat " * 30,
]  # fmt: skip


@pytest.fixture(autouse=True)
def timm_tower(monkeypatch):
    monkeypatch.setitem(TIMM_TOWERS, TIMM_NAME, TIMM_KEYS)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    return {
        "siglip": siglip_cases.t5_tokenizer(),
        "siglip2": siglip_cases.gemma_tokenizer(),
        "without_projection": siglip_cases.t5_tokenizer(),
        "sentencepiece": siglip_cases.sentencepiece_tokenizer(folder),
    }


# OpenCLIP


@pytest.mark.parametrize("variant", SIGLIP_TEXTS)
@torch.no_grad()
def test_converted_siglip_equals_open_clip_and_comes_back_to_the_bit(tmp_path, variant, tokenizers):
    source = open_clip_siglip_folder(tmp_path / variant, variant, tokenizers[variant])
    ours, processor = convert_checkpoint(source)
    theirs = open_clip_siglip(variant)
    images, ids = parity.random_inputs(ours.config, seed=1)
    output, expected = ours(input_ids=ids, pixel_values=images), theirs.get_logits(images, ids)[0]
    torch.testing.assert_close(output.image_embeds, theirs.encode_image(images, normalize=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, theirs.encode_text(ids, normalize=True), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.logits_per_image, expected, atol=1e-5, rtol=0)
    assert ours.config.instance_loss == "sigmoid" and ours.config.logit_bias_init_value == -10

    export_checkpoint(ours, processor, tmp_path / "back")
    back = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    state = load_file(source / "open_clip_model.safetensors")
    assert state.keys() == back.keys()
    assert all(torch.equal(state[key], back[key]) for key in state)
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'back'}")
    torch.testing.assert_close(loaded.eval().get_logits(images, ids)[0], expected, atol=1e-5, rtol=0)


def test_all_26_siglip_configurations_are_known_by_name_and_come_back():
    theirs = {name: open_clip.get_model_config(name) for name in open_clip.list_models() if name[:3] == "ViT"}
    theirs = {name: cfg for name, cfg in theirs.items() if "SigLIP" in name}
    assert len(theirs) == 26
    for name, model_cfg in theirs.items():
        ours = configs.mlip_config_of_open_clip(model_cfg)
        back = configs.open_clip_of_mlip_config(MLIPConfig(**ours))
        assert configs.mlip_config_of_open_clip(back) == ours, name
        assert back["vision_cfg"] == model_cfg["vision_cfg"], name


def test_the_table_of_timm_towers_equals_timm():
    for name, keys in TIMM_TOWERS.items():
        if name == TIMM_NAME or "siglip" not in name:
            continue
        with torch.device("meta"):
            theirs = timm.create_model(name, num_classes=0, depth=1)
        block = theirs.blocks[0]
        assert {
            "hidden_size": theirs.embed_dim,
            "intermediate_size": block.mlp.fc1.out_features,
            "num_attention_heads": block.attn.num_heads,
            "image_size": theirs.patch_embed.img_size[0],
            "patch_size": theirs.patch_embed.patch_size[0],
            "layer_norm_eps": block.norm1.eps,
            "use_class_token": theirs.cls_token is not None,
        }.items() <= keys.items(), name
        assert theirs.attn_pool.mlp.fc1.out_features == keys["intermediate_size"] and theirs.attn_pool.norm.eps == 1e-6
        tanh = getattr(block.mlp.act, "approximate", None) == "tanh" or "Tanh" in type(block.mlp.act).__name__
        assert tanh == (keys["hidden_act"] == "gelu_pytorch_tanh"), name
        assert type(theirs.attn_pool.mlp.act) is type(block.mlp.act)
        assert theirs.patch_embed.num_patches == (keys["image_size"] // keys["patch_size"]) ** 2, name


# transformers


@pytest.mark.parametrize(("tokenizer", "image_size"), [("sentencepiece", 32), ("siglip2", 35)])
@torch.no_grad()
def test_siglip_of_transformers_is_equal_and_comes_back_to_the_bit(tmp_path, tokenizer, image_size, tokenizers):
    source, theirs = siglip_folder(tmp_path / "siglip", tokenizers[tokenizer], image_size)
    ours, processor = convert_checkpoint(source)
    images, ids = parity.random_inputs(ours.config, seed=1)
    expected = theirs(input_ids=ids, pixel_values=images)
    output = ours(input_ids=ids, pixel_values=images)
    for name in ("image_embeds", "text_embeds", "logits_per_image"):
        torch.testing.assert_close(getattr(output, name), getattr(expected, name), atol=1e-5, rtol=0)

    export_checkpoint(ours, processor, tmp_path / "back", format="siglip")
    back = SiglipModel.from_pretrained(tmp_path / "back")
    assert theirs.state_dict().keys() == load_file(tmp_path / "back" / "model.safetensors").keys()
    assert all(torch.equal(tensor, back.state_dict()[key]) for key, tensor in theirs.state_dict().items())
    logits = back(input_ids=ids, pixel_values=images).logits_per_image
    torch.testing.assert_close(logits, expected.logits_per_image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_and_is_compared_in_float32(tmp_path, dtype, tokenizers):
    source, theirs = siglip_folder(tmp_path / "siglip", tokenizers["siglip2"])
    theirs.to(dtype).save_pretrained(source)
    conversion = convert(source)
    assert {parameter.dtype for parameter in conversion.model.parameters()} == {dtype}
    assert conversion.report.worst < 1e-5


def test_open_clip_to_transformers_through_the_command(tmp_path, capsys, tokenizers):
    source = open_clip_siglip_folder(tmp_path / "source", "siglip", tokenizers["siglip"])
    main([str(source), str(tmp_path / "mlip"), "--merge-ratio", "0.5", "--merge-layers", "1"])
    ours, processor = AutoModel.from_pretrained(tmp_path / "mlip"), AutoProcessor.from_pretrained(tmp_path / "mlip")
    assert isinstance(ours, MLIPModel) and ours.config.merge_ratio == 0.5 and ours.config.merge_method == "ward"
    assert ours.config.instance_loss == "sigmoid"
    main([str(tmp_path / "mlip"), str(tmp_path / "both"), "--to", "both"])
    assert "merging (merge_ratio=0.5) is off there" in capsys.readouterr().out
    images, ids = parity.random_inputs(ours.config)
    expected = open_clip_siglip().get_logits(images, ids)[0]
    siglip = SiglipModel.from_pretrained(tmp_path / "both")
    logits = siglip(input_ids=ids, pixel_values=images).logits_per_image
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    exported = AutoProcessor.from_pretrained(tmp_path / "both")
    texts = exported(text=["a cat", "two dogs"], padding="max_length", truncation=True, return_tensors="pt")
    assert list(texts) == ["input_ids"]  # SiglipModel would not attend to padding with a mask
    assert torch.equal(texts.input_ids, ids_of(processor.tokenizer, ["a cat", "two dogs"]))


def test_a_model_trained_with_info_nce_is_exported_with_a_bias_of_0(tmp_path, tokenizers):
    source, theirs = siglip_folder(tmp_path / "siglip", tokenizers["siglip2"])
    ours, processor = convert_checkpoint(source)
    config = MLIPConfig.from_dict(ours.config.to_dict() | {"instance_loss": "info_nce"})
    state = {name: tensor for name, tensor in ours.state_dict().items() if not name.endswith("logit_bias")}
    fine_tuned = MLIPModel(config).eval()
    fine_tuned.load_state_dict(state)
    notes = export_checkpoint(fine_tuned, processor, tmp_path / "back", format="siglip")
    assert any("logit_bias is 0" in note for note in notes)
    assert SiglipModel.from_pretrained(tmp_path / "back").logit_bias.item() == 0


@pytest.mark.parametrize(
    ("tower", "key", "value"),
    [("vision_config", "hidden_act", "gelu"), ("text_config", "hidden_act", "gelu"),
     ("vision_config", "layer_norm_eps", 1e-3), ("text_config", "layer_norm_eps", 1e-3)],
)  # fmt: skip
def test_parity_sees_a_wrong_activation_and_a_wrong_epsilon(tmp_path, tower, key, value, tokenizers):
    source, theirs = siglip_folder(tmp_path / "siglip", tokenizers["siglip2"])
    ours, _ = convert_checkpoint(source)
    wrong = theirs.config.to_dict()
    wrong[tower][key] = value
    assert parity.compare(ours, parity.siglip_oracle(theirs.config.to_dict(), theirs.state_dict())).passed
    assert not parity.compare(ours, parity.siglip_oracle(wrong, theirs.state_dict())).passed


# Tokenizers and images


def ids_of(tokenizer, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids


@pytest.mark.parametrize("variant", ["siglip", "siglip2"])
def test_token_ids_equal_open_clip(tmp_path, variant, tokenizers):
    tokenizers[variant].save_pretrained(tmp_path)
    theirs = open_clip.tokenizer.HFTokenizer(str(tmp_path), context_length=LENGTH, clean="canonicalize")(NASTY_TEXTS)
    ours = processors.tokenizer_of(siglip_cfg_of(variant)["text_cfg"], tmp_path)
    ours.save_pretrained(tmp_path / "saved")
    for tokenizer in (ours, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        for text, our_ids, their_ids in zip(NASTY_TEXTS, ids_of(tokenizer, NASTY_TEXTS), theirs, strict=True):
            assert our_ids.tolist() == their_ids.tolist(), text


@pytest.mark.parametrize("kind", ["sentencepiece", "siglip2"])
def test_token_ids_and_pixels_equal_transformers(tmp_path, kind, tokenizers):
    source, _ = siglip_folder(tmp_path / "siglip", tokenizers[kind])
    theirs = AutoProcessor.from_pretrained(source)
    main([str(source), str(tmp_path / "mlip")])
    ours = AutoProcessor.from_pretrained(tmp_path / "mlip")
    options = dict(padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
    assert torch.equal(ids_of(ours.tokenizer, NASTY_TEXTS), theirs.tokenizer(NASTY_TEXTS, **options).input_ids)
    images = [torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in ((50, 40), (32, 32), (20, 90))]
    expected = theirs.image_processor(images, return_tensors="pt").pixel_values
    assert torch.equal(ours.image_processor(images, return_tensors="pt").pixel_values, expected)
    config = MLIPConfig.from_pretrained(tmp_path / "mlip").text_config
    assert config.pad_token_id == theirs.tokenizer.pad_token_id
    assert config.eos_token_id == theirs.tokenizer.eos_token_id
    back = siglip_processors.siglip_processor_of(ours)
    assert torch.equal(back.image_processor(images, return_tensors="pt").pixel_values, expected)


@torch.no_grad()
def test_captions_of_any_padding_have_the_embedding_of_full_padding(tmp_path, tokenizers):
    source, theirs = siglip_folder(tmp_path / "siglip", tokenizers["sentencepiece"])
    ours, processor = convert_checkpoint(source)
    texts = ["a red cat", "dogs"]
    expected = theirs.get_text_features(ids_of(processor.tokenizer, texts)).pooler_output
    features = ours.get_text_features(**processor(text=texts, padding=True, return_tensors="pt")).pooler_output
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_sentinels_beyond_the_vocabulary_are_admitted_and_other_tokens_are_not(tokenizers):
    tokenizer = siglip_cases.t5_tokenizer()
    size = len(tokenizer)
    assert not processors.surplus_tokens(tokenizer, size)
    tokenizer.add_tokens(["<extra_id_0>"])
    assert not processors.surplus_tokens(tokenizer, size)
    tokenizer.add_tokens(["zebra"])
    assert processors.surplus_tokens(tokenizer, size) == ["zebra"]


def test_words_of_a_caption_have_the_tokens_of_a_tokenizer_without_offsets(tokenizers):
    tokenizer, caption = tokenizers["sentencepiece"], "two red dogs, and a cat"
    ids = tokenizer(caption).input_ids
    offsets = offsets_by_word(tokenizer, caption, len(ids))
    pieces = tokenizer.convert_ids_to_tokens(ids)
    assert offsets[-1] == (0, 0) and len(offsets) == len(ids)
    for start, end in set(offsets[:-1]):
        word = "".join(piece for piece, place in zip(pieces, offsets, strict=True) if place == (start, end))
        assert word == "\u2581" + caption[start:end].strip(",")


# Refusals


def refusal(tmp_path, model_cfg: dict) -> str:
    folder = tmp_path / "refused"
    folder.mkdir(exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    (folder / "open_clip_model.safetensors").write_bytes(b"")  # weights are not read
    with pytest.raises(ValueError) as error:
        main([str(folder), str(tmp_path / "mlip")])
    assert not (tmp_path / "mlip").exists() and "\n" not in str(error.value)
    return str(error.value)


def test_towers_that_are_not_supported_are_named_and_nothing_is_written(tmp_path):
    for name, tower in {
        "convnext_base_w": "convnext_base",
        "ViTamin-L": "vitamin_large_224",
        "RN50": "ResNet image tower",
        "mt5-base-ViT-B-32": "google/mt5-base",
    }.items():
        message = refusal(tmp_path, open_clip.get_model_config(name))
        assert tower in message and "MLIP converts" in message
    cfg = siglip_cfg_of("siglip")
    gap = cfg | {"vision_cfg": cfg["vision_cfg"] | {"timm_model_name": "vit_base_patch16_siglip_gap_224"}}
    assert "vit_base_patch16_siglip_gap_224" in refusal(tmp_path, gap)
    average = cfg | {"vision_cfg": cfg["vision_cfg"] | {"timm_pool": "avg"}}
    assert f"{TIMM_NAME} with timm_pool='avg'" in refusal(tmp_path, average)
    hybrid, naflex, registers = "vit_base_r50_s16_224", "naflexvit_base_patch16_siglip", "vit_base_patch14_reg4_dinov2"
    for name in (hybrid, naflex, registers):
        other = cfg | {"vision_cfg": cfg["vision_cfg"] | {"timm_model_name": name}}
        assert f"the timm image tower {name} is not supported; MLIP converts" in refusal(tmp_path, other)
    larger = cfg | {"vision_cfg": cfg["vision_cfg"] | {"image_size": 64}}
    assert f"image_size=64, but the timm image tower {TIMM_NAME} takes 32 pixels" in refusal(tmp_path, larger)


def test_naflex_and_a_tower_without_head_are_refused(tmp_path, tokenizers):
    source, theirs = siglip_folder(tmp_path / "siglip", tokenizers["siglip2"])
    content = json.loads((source / "config.json").read_text())
    content["vision_config"]["vision_use_head"] = False
    (source / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="without its pooling head .*is not supported"):
        main([str(source), str(tmp_path / "mlip")])
    Siglip2Config().save_pretrained(source)
    with pytest.raises(ValueError, match="NaFlex, model_type 'siglip2'.*fixed resolution"):
        main([str(source), str(tmp_path / "mlip")])
    assert not (tmp_path / "mlip").exists()


def test_what_the_other_format_does_not_have_is_named(tmp_path, tokenizers):
    source, _ = siglip_folder(tmp_path / "siglip", tokenizers["siglip2"])
    ours, processor = convert_checkpoint(source)
    with pytest.raises(ValueError, match=f"{TIMM_NAME} has hidden_act='gelu', the model 'gelu_pytorch_tanh'"):
        export_checkpoint(ours, processor, tmp_path / "back")
    with pytest.raises(ValueError, match="attention pooling.*without class token.*a logit bias"):
        export_checkpoint(ours, processor, tmp_path / "back", format="clip")
    plain, processor = convert_checkpoint(open_clip_folder(tmp_path / "plain"))
    with pytest.raises(ValueError, match="SiglipModel does not have a class token.*a causal text tower"):
        export_checkpoint(plain, processor, tmp_path / "back", format="siglip")
    assert not (tmp_path / "back").exists()
    keys = transformers_configurations.mlip_config_of_siglip(SiglipModel.from_pretrained(source).config)
    keys["vision_config"] |= {"num_hidden_layers": 1}
    with pytest.raises(ValueError, match="OpenCLIP has no image tower like this"):
        configs.open_clip_of_mlip_config(MLIPConfig(**keys))


def test_every_name_of_transformers_siglip_has_a_row():
    config = transformers_configurations.mlip_config_of_siglip(siglip_cases.transformers_siglip().config)
    ours = {name for name in empty_model(MLIPConfig(**config)).state_dict() if not tables.is_own(name)}
    rows = [(name,) if isinstance(name, str) else name for name in tables.SIGLIP.values()]
    assert {tables._split_layer(name)[0] for name in ours} == {name for row in rows for name in row}
