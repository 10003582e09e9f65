# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The configuration, processor and model that a run starts from."""

import pytest
from conftest import small_config, small_model
from training_cases import make_captions, make_processor

from modeling_mlip.hub.configurations import NAMED_CONFIGS, named_config, override_config
from modeling_mlip.training.starting_point import build_config, build_model, build_processor


@pytest.mark.parametrize("name", NAMED_CONFIGS)
def test_named_configurations_are_what_their_names_say(name):
    config = named_config(name)
    vision = config.vision_config
    if name.startswith("vit-"):
        size, patch = name.split("-")[1:]
        assert vision.patch_size == int(patch)
        assert (vision.hidden_size, vision.num_hidden_layers) == {"b": (768, 12), "l": (1024, 24)}[size]
    assert vision.projection_dim == config.text_config.projection_dim == config.projection_dim
    assert vision.frequency_embed_weight == 0.5  # a model that starts from CLIP's weights has 0, so it embeds as CLIP


def test_overrides_change_the_configuration_that_has_the_key_and_unknown_ones_are_refused():
    changed = override_config(small_config(), {"merge_ratio": 0.5, "token_loss_weight": 0, "projection_dim": 16})
    assert changed.vision_config.merge_ratio == 0.5
    assert changed.token_loss_weight == 0
    assert changed.text_config.projection_dim == changed.vision_config.projection_dim == 16
    with pytest.raises(ValueError, match="merge_rato"):
        override_config(small_config(), {"merge_rato": 0.5})


@pytest.mark.parametrize("names", [{}, {"model_name_or_path": "a", "config_name": "tiny"}])
def test_a_run_starts_from_exactly_one_model_or_configuration(names):
    with pytest.raises(ValueError, match="give one of them"):
        build_config(**names)


def test_a_new_processor_needs_a_tokenizer_or_captions():
    config = build_config(config_name="tiny")
    with pytest.raises(ValueError, match="neither tokenizer_name nor captions"):
        build_processor(config)
    processor = build_processor(config, captions=make_captions(20))
    assert processor.image_processor.crop_size["height"] == 64
    model, new_parameters = build_model(config, processor.tokenizer)
    assert not new_parameters
    assert model.config.text_config.vocab_size == len(processor.tokenizer)
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id


def test_a_saved_model_and_its_processor_take_another_image_size(tmp_path):
    model, processor = small_model(), make_processor()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    folder = str(tmp_path)
    for overrides, size in ((None, 32), ({"image_size": 48}, 48)):
        config = build_config(model_name_or_path=folder, overrides=overrides)
        for tokenizer_name in (None, folder):
            loaded = build_processor(config, model_name_or_path=folder, tokenizer_name=tokenizer_name)
            assert loaded.image_processor.crop_size["height"] == size
            assert loaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()


def test_a_tokenizer_with_more_tokens_than_the_saved_model_is_refused(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="leave out tokenizer_name"):
        build_model(model.config, make_processor().tokenizer, model_name_or_path=str(tmp_path))


def test_the_parameters_that_the_saved_model_lacks_are_new(tmp_path):
    processor = make_processor()
    tokens = {"vocab_size": len(processor.tokenizer)}
    model = small_model(vision={"frequency_layers": 0}, text=tokens, token_loss_frequency=False)
    model.save_pretrained(tmp_path)
    for overrides in ({}, {"frequency_layers": 1, "frequency_loss_weight": 0.5}, {"image_size": 48}):
        config = build_config(model_name_or_path=str(tmp_path), overrides=overrides)
        larger, new_parameters = build_model(config, processor.tokenizer, model_name_or_path=str(tmp_path))
        names = {name for name, _ in larger.named_parameters()}
        assert new_parameters == names - {name for name, _ in model.named_parameters()}
        assert ("vision_model.frequency.gate" in new_parameters) == ("frequency_layers" in overrides)
