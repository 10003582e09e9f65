# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Conversion of the contrastive towers of CoCa, against OpenCLIP's own CoCa."""

import json

import open_clip
import pytest
import torch
from conversion_cases import SPECIAL, TEXT, VISION, WORDS, randomize, word_tokenizer
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor

from modeling_mlip import MLIPConfig, MLIPForImageClassification, MLIPModel
from modeling_mlip.configuration_mlip import MERGE_METHODS
from modeling_mlip.conversion import open_clip_configurations as configs
from modeling_mlip.conversion import parity, tables
from modeling_mlip.conversion.checkpoints import convert_checkpoint, empty_model
from modeling_mlip.conversion.convert import main
from modeling_mlip.conversion.export import export_checkpoint
from modeling_mlip.hub.text_context import check_stretchable

TOKENIZER = "bert-base-uncased"
# `embed_dim`: with the width of the image tower, OpenCLIP joins the projections of the pooling in one matrix.
EMBED_DIMS = (24, VISION["width"])


def coca_cfg_of(embed_dim: int) -> dict:
    """OpenCLIP's model_cfg of a small CoCa."""
    vision = VISION | {
        "attentional_pool": True,
        "attn_pooler_heads": 3,
        "attn_pooler_queries": 7,
        "output_tokens": True,
    }
    text = TEXT | {"vocab_size": 200, "embed_cls": True, "output_tokens": True, "hf_tokenizer_name": TOKENIZER}
    decoder = TEXT | {"width": embed_dim, "heads": 2, "layers": 1}
    return {"embed_dim": embed_dim, "multimodal_cfg": decoder, "vision_cfg": vision, "text_cfg": text,
            "custom_text": True}  # fmt: skip


def open_clip_coca(embed_dim: int):
    torch.manual_seed(0)
    theirs = open_clip.CoCa(**{key: value for key, value in coca_cfg_of(embed_dim).items() if key != "custom_text"})
    randomize(theirs.eval())
    return theirs


def coca_folder(folder, embed_dim: int = 24):
    """An OpenCLIP folder, and OpenCLIP's model with these weights."""
    theirs = open_clip_coca(embed_dim)
    folder.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": coca_cfg_of(embed_dim)}))
    save_file(theirs.state_dict(), folder / "open_clip_model.safetensors")
    word_tokenizer(SPECIAL[TOKENIZER]).save_pretrained(folder)
    return folder, theirs


@pytest.mark.parametrize("embed_dim", EMBED_DIMS)
@torch.no_grad()
def test_converted_towers_equal_coca_and_come_back_to_the_bit(tmp_path, embed_dim):
    source, theirs = coca_folder(tmp_path / "source", embed_dim)
    ours, processor = convert_checkpoint(source)
    images, ids = parity.random_inputs(ours.config, seed=1)
    ids = torch.cat([ids, parity.captions_of_all_lengths(ours.config, False, seed=1)])
    output = ours(input_ids=ids, pixel_values=images)
    torch.testing.assert_close(output.image_embeds, theirs.encode_image(images), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.text_embeds, theirs.encode_text(ids), atol=1e-5, rtol=0)

    export_checkpoint(ours, processor, tmp_path / "back")
    back = load_file(tmp_path / "back" / "open_clip_model.safetensors")
    state = load_file(source / "open_clip_model.safetensors")
    assert {name for name in state if not name.startswith("text_decoder.")} == back.keys()
    assert all(torch.equal(state[key], back[key]) for key in back)
    loaded, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'back'}")
    torch.testing.assert_close(loaded.eval().encode_text(ids, normalize=True), theirs.encode_text(ids))
    torch.testing.assert_close(loaded.encode_image(images, normalize=True), theirs.encode_image(images))


@torch.no_grad()
def test_saved_model_gives_the_embeddings_of_coca_for_texts_of_any_padding(tmp_path, capsys):
    source, theirs = coca_folder(tmp_path / "source")
    main([str(source), str(tmp_path / "mlip")])
    assert "CoCa's caption decoder was left out" in capsys.readouterr().out
    ours, processor = AutoModel.from_pretrained(tmp_path / "mlip"), AutoProcessor.from_pretrained(tmp_path / "mlip")
    texts = ["", *(" ".join(WORDS[:count]) for count in (1, 4, 8)), "a! cat!", "cat " * 20]
    ids = open_clip.tokenizer.HFTokenizer(str(source), context_length=12)(texts)
    for padding in (True, "max_length"):
        features = ours.get_text_features(
            **processor(text=texts, padding=padding, truncation=True, return_tensors="pt")
        )
        torch.testing.assert_close(features.pooler_output, theirs.encode_text(ids, normalize=False), atol=1e-5, rtol=0)
    assert features.last_hidden_state.shape == (6, 13, TEXT["width"])


def test_merging_trains_every_parameter_and_a_merged_token_counts_as_its_patches(tmp_path):
    source, _ = coca_folder(tmp_path / "source")
    ours, _ = convert_checkpoint(source, merge_ratio=0.5, merge_layers=[1], token_loss_weight=0.1)
    images, ids = torch.randn(3, 3, 32, 32), parity.random_inputs(ours.config)[1]
    for merge_method in MERGE_METHODS:
        ours.config.merge_method = ours.vision_model.config.merge_method = merge_method
        ours.zero_grad()
        ours.train()(input_ids=ids, pixel_values=images, return_loss=True).loss.backward()
        assert all(parameter.grad is not None for parameter in ours.parameters())
        vision = ours.eval().vision_model(images, output_token_map=True)
        assert vision.token_map.shape == (3, 16) and vision.token_sizes.sum(dim=1).eq(16).all()
    # The head gives the same result for a token of size n and for n equal tokens of size 1.
    head, states = ours.vision_model.head.double(), torch.randn(2, 4, VISION["width"], dtype=torch.float64)
    size_bias = torch.tensor([1.0, 1.0, 3.0, 1.0], dtype=torch.float64).log().expand(2, 1, 1, 4)
    repeated = states[:, [0, 1, 2, 2, 2, 3]]
    torch.testing.assert_close(head(states, size_bias), head(repeated, None))


def test_token_level_and_classifier_start_from_the_map_of_one_token_to_the_embedding(tmp_path):
    source, _ = coca_folder(tmp_path / "source")
    ours, _ = convert_checkpoint(source, token_loss_weight=0.1)
    ours = ours.double()
    head, token = ours.vision_model.head, torch.randn(1, 5, VISION["width"], dtype=torch.float64)
    # Of one token alone, softmax gives all attention to it, so the pooled state is linear in its normalised state.
    states = head(token[:, :1], None) - head(torch.zeros_like(token[:, :1]), None)
    offset = head.layernorm(torch.zeros_like(token[:, :1]))
    mapped = (head.layernorm(token[:, 0]) - offset[:, 0]) @ head.linear_map().T
    torch.testing.assert_close(states, mapped)
    layernorm = torch.diag(ours.vision_model.post_layernorm.weight)
    expected = ours.visual_projection.weight @ layernorm @ head.linear_map()
    torch.testing.assert_close(ours.token_visual_projection.weight, expected, atol=1e-6, rtol=1e-5)
    ours.float().save_pretrained(tmp_path / "mlip")
    classifier = MLIPForImageClassification.from_pretrained(tmp_path / "mlip", num_labels=3)
    assert classifier(torch.randn(2, 3, 32, 32)).logits.shape == (2, 3)


def test_configurations_of_coca_come_back_without_the_decoder():
    names = {name for name in open_clip.list_models() if "multimodal_cfg" in open_clip.get_model_config(name)}
    assert names == {"coca_ViT-B-32", "coca_ViT-L-14", "coca_base", "coca_roberta-ViT-B-32"}
    for name in names:
        ours = configs.mlip_config_of_open_clip(open_clip.get_model_config(name))
        back = configs.open_clip_of_mlip_config(MLIPConfig(**ours))
        assert configs.mlip_config_of_open_clip(back) == ours and "multimodal_cfg" not in back, name


@pytest.mark.parametrize("embed_dim", EMBED_DIMS)
def test_every_parameter_of_the_towers_has_a_row(embed_dim):
    config = MLIPConfig(**configs.mlip_config_of_open_clip(coca_cfg_of(embed_dim)))
    names = {name for name in empty_model(config).state_dict() if not tables.is_own(name)}
    shapes = {name: torch.Size([2]) for name in names}
    theirs = {key.removeprefix("text.") for key in open_clip_coca(embed_dim).state_dict()}
    back = tables.from_mlip(
        {name: torch.empty(shape) for name, shape in shapes.items()}, tables.open_clip_table(config)
    )
    assert back.keys() == {name for name in theirs if not name.startswith(tables.DECODER)}


def test_what_is_not_supported_is_named(tmp_path):
    cfg = coca_cfg_of(24)
    for tower, keys, message in (
        ("vision_cfg", {"attentional_pool": "parallel"}, "attentional_pool='parallel' and pool_type='tok'"),
        ("vision_cfg", {"pool_type": "avg", "final_ln_after_pool": True}, "attentional_pool=True and pool_type='avg'"),
        ("text_cfg", {"no_causal_mask": True}, "embed_cls, pool_type='argmax' and no_causal_mask=True"),
    ):
        with pytest.raises(ValueError, match=f"{message} is not supported; MLIP converts"):
            configs.mlip_config_of_open_clip(cfg | {tower: cfg[tower] | keys})
    source, _ = coca_folder(tmp_path / "source")
    ours, processor = convert_checkpoint(source)
    for format, message in (("clip", "cross_attention pooling of the image tower; .*a class token of the text tower"),
                            ("siglip", "an image tower without attention pooling")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            export_checkpoint(ours, processor, tmp_path / "back", format=format)
    with pytest.raises(ValueError, match="reads the padding .pooling='class'"):
        check_stretchable(ours.config.text_config, 20)
    ours.config.text_config._attn_implementation = "flash_attention_2"
    ours.text_model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='flash_attention_2' is not supported by a text tower"):
        ours.get_text_features(torch.zeros(1, 12, dtype=torch.long))
    text = configs.mlip_config_of_open_clip(cfg)["text_config"]
    with pytest.raises(StrictDataclassError, match="pooling='class' needs a causal text tower"):
        MLIPConfig(projection_dim=24, text_config=text | {"use_causal_mask": False})
    vision = configs.mlip_config_of_open_clip(cfg)["vision_config"]
    with pytest.raises(StrictDataclassError, match="pooling_num_heads=5 does not divide projection_dim=24"):
        MLIPConfig(projection_dim=24, vision_config=vision | {"pooling_num_heads": 5})
    assert isinstance(ours, MLIPModel)
