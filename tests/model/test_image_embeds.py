# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The image embedding of both domains, and the checks of its weight."""

import pytest
import torch
from conftest import VISION, small_config, small_model
from transformers.utils import logging

from modeling_mlip import (
    MLIPConfig,
    MLIPModel,
    MLIPVisionConfig,
    MLIPVisionModelWithProjection,
)
from modeling_mlip.hub.configurations import override_config


def joined_model(weight: float = 0.5):
    """A model with both domains in its image embedding and a frequency gate of zero."""
    return small_model(vision={"merge_ratio": 0.5, "frequency_embed_weight": weight})


def test_the_image_embedding_is_the_weighted_sum_of_both_domains(batch):
    model = joined_model()
    alone = joined_model(0.0)
    joined, spatial = model(**batch, return_loss=True), alone(**batch, return_loss=True)
    expected = spatial.image_embeds.double() + 0.5 * spatial.frequency_embeds.double()
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(joined.image_embeds.double(), expected, rtol=0, atol=1e-6)
    assert (joined.image_embeds - spatial.image_embeds).abs().max() > 0.01
    logits = model.logit_scale.exp() * joined.image_embeds @ joined.text_embeds.t()
    torch.testing.assert_close(joined.logits_per_image, logits, rtol=0, atol=1e-5)
    # The features have about the length of CLIP's features.
    features = model.get_image_features(batch["pixel_values"]).pooler_output
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), joined.image_embeds, rtol=0, atol=1e-6)
    lengths = alone.get_image_features(batch["pixel_values"]).pooler_output.norm(dim=-1)
    ratio = features.norm(dim=-1) / lengths
    assert (ratio > 0.5).all() and (ratio < 1.5).all()


def test_losses_and_gradients_do_not_depend_on_the_frequency_embed_weight(batch):
    """So the weight may be chosen after training."""
    gradients, losses = [], []
    for weight in (0.0, 0.5):
        model = joined_model(weight).train()
        outputs = model(**batch, return_loss=True)
        outputs.loss.backward()
        losses.append([outputs.loss, outputs.spatial_loss, outputs.frequency_loss, outputs.token_loss])
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert losses[0] == losses[1]
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_vision_tower_alone_gives_the_embeddings_of_the_whole_model(batch, tmp_path, weight):
    model = joined_model()
    model.config.frequency_embed_weight = weight  # applies to the next call and to the saved configuration
    model.save_pretrained(tmp_path)
    embeds = MLIPVisionModelWithProjection.from_pretrained(tmp_path).eval()(batch["pixel_values"]).image_embeds
    assert torch.equal(embeds, model.get_image_features(batch["pixel_values"]).pooler_output)
    assert torch.equal(embeds, joined_model(weight).get_image_features(batch["pixel_values"]).pooler_output)


def test_a_weight_for_a_missing_frequency_embedding_is_refused_in_forward(batch):
    model = small_model(frequency_loss_weight=0)
    tower = MLIPVisionModelWithProjection(small_config().vision_config)
    for other in (model, tower):
        other.config.frequency_embed_weight = 0.5
    for call in (model.get_image_features, tower):
        with pytest.raises(ValueError, match="frequency_embed_weight=0.5.*without a frequency embedding"):
            call(batch["pixel_values"])


WITHOUT_FREQUENCY_LOSS = [{"frequency_loss_weight": 0}, {"frequency_layers": 0}]


@pytest.mark.parametrize("keys", WITHOUT_FREQUENCY_LOSS)
def test_a_weight_for_a_frequency_embedding_that_no_loss_trains_is_refused(keys):
    message = "frequency_embed_weight=0.5 needs a frequency embedding.*set frequency_embed_weight=0"
    with pytest.raises(Exception, match=message):
        MLIPConfig(frequency_embed_weight=0.5, **keys)
    vision = MLIPVisionConfig(**VISION, frequency_embed_weight=0.5)
    assert MLIPConfig(vision_config=vision).frequency_embed_weight == 0.5
    with pytest.raises(Exception, match=message):
        MLIPConfig(vision_config=vision, **keys)
    assert MLIPConfig(frequency_embed_weight=0, **keys).frequency_embed_weight == 0


@pytest.mark.parametrize("keys", WITHOUT_FREQUENCY_LOSS)
def test_a_model_loaded_without_its_frequency_loss_drops_the_weight_with_a_warning(batch, keys, tmp_path, caplog):
    model = joined_model()
    model.save_pretrained(tmp_path)
    with caplog.at_level("WARNING", logger="transformers"):
        logging.enable_propagation()
        loaded = MLIPModel.from_pretrained(tmp_path, **keys).eval()
        logging.disable_propagation()
    assert "frequency_embed_weight=0.5 becomes 0" in caplog.text
    assert loaded.config.frequency_embed_weight == 0
    model.config.frequency_embed_weight = 0.0
    for either in (model, loaded):
        either.set_merge_ratio(0)  # merging depends on the frequency stage
    assert torch.equal(loaded(**batch).image_embeds, model(**batch).image_embeds)
    loaded.save_pretrained(tmp_path / "again")
    assert MLIPConfig.from_pretrained(tmp_path / "again").frequency_embed_weight == 0
    with pytest.raises(Exception, match="frequency_embed_weight=0.25 needs a frequency embedding"):
        MLIPModel.from_pretrained(tmp_path, frequency_embed_weight=0.25, **keys)


@pytest.mark.parametrize("keys", WITHOUT_FREQUENCY_LOSS)
def test_an_override_without_the_frequency_loss_drops_the_weight_unless_it_is_given(keys):
    config = small_config(vision={"frequency_embed_weight": 0.5})
    assert override_config(config, keys).frequency_embed_weight == 0
    with pytest.raises(Exception, match="frequency_embed_weight=0.25 needs a frequency embedding"):
        override_config(config, {**keys, "frequency_embed_weight": 0.25})
