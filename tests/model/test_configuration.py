# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""configuration_mlip.py: defaults, refused values, and keys that both configurations share."""

import pytest
import torch
from conftest import TEXT, VISION
from transformers import (
    AutoConfig,
)

from modeling_mlip import (
    MLIPConfig,
    MLIPModel,
    MLIPVisionConfig,
    MLIPVisionModelWithProjection,
)


def test_merge_keys_are_stored_in_the_vision_configuration_only(tmp_path):
    config = MLIPConfig(merge_ratio=0.5, merge_layers=[2, 5], merge_method="tome", frequency_layers=0)
    vision = config.vision_config
    assert (vision.merge_ratio, vision.merge_layers, vision.merge_method, vision.frequency_layers) == (
        *(0.5, [2, 5], "tome", 0),
    )
    assert "merge_ratio" not in config.to_dict()
    config.merge_ratio = 0.25
    assert vision.merge_ratio == 0.25
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vision_config.to_dict() == vision.to_dict()


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"merge_ratio": 1.0}, "merge_ratio=1.0"),
        ({"merge_ratio": -0.1}, "merge_ratio=-0.1"),
        ({"merge_ratio": "half"}, "half"),
        ({"merge_layers": [12]}, "layer 12 does not exist"),
        ({"merge_layers": []}, "at least one layer"),
        ({"merge_layers": [3, 3]}, "each layer once"),
        ({"merge_method": "best"}, "'best' is unknown; choose one of 'mlip', 'tome', 'elip'"),
        ({"frequency_layers": -1}, "frequency_layers=-1"),
        ({"frequency_embed_weight": -0.5}, "frequency_embed_weight=-0.5"),
        ({"frequency_embed_weight": float("nan")}, "frequency_embed_weight=nan"),
        ({"vision_config": {"image_size": 225}}, r"image_size=225 is not divisible by patch_size=32.*\[224, 256\]"),
        ({"vision_config": {"pooling": "max"}}, "pooling='max'"),
        ({"text_config": {"pooling": "first"}}, "pooling='first'"),
        ({"token_loss_weight": -1}, "token_loss_weight=-1"),
        ({"token_loss_weight": float("inf")}, "token_loss_weight=inf"),
        ({"frequency_loss_weight": float("nan")}, "frequency_loss_weight=nan"),
        ({"instance_loss": "softmax"}, "instance_loss='softmax' is unknown; choose one of 'info_nce', 'sigmoid'"),
        ({"vision_config": {"frequency_hidden_size": 0}}, "frequency_hidden_size=0: choose 1 or more"),
        ({"vision_config": {"merge_importance_weight": float("nan")}}, "merge_importance_weight=nan"),
        ({"vision_config": {"merge_importance_weight": -1}}, "merge_importance_weight=-1"),
        ({"vision_config": {"patch_size": 0}}, "patch_size=0: choose 1 or more"),
        ({"vision_config": {"image_size": -32}}, "image_size=-32: choose 1 or more"),
        ({"vision_config": {"num_hidden_layers": 0}}, "num_hidden_layers=0: choose 1 or more"),
        ({"text_config": {"eos_token_id": [63, 62]}}, r"eos_token_id=\[63, 62\]: give the one token id"),
        ({"text_config": {"eos_token_id": None}}, "eos_token_id=None: give the one token id"),
    ],
)
def test_bad_configurations_are_refused_with_the_value(keys, message):
    with pytest.raises(Exception, match=message):
        MLIPConfig(**keys)


def test_integers_are_accepted_for_float_keys():
    keys = {"layer_scale_init_value": 1, "initializer_factor": 1}
    config = MLIPConfig(vision_config=keys, text_config=keys, initializer_factor=1)
    assert config.vision_config.layer_scale_init_value == 1


def test_towers_have_the_projection_dim_of_the_whole_model(tmp_path):
    model = MLIPModel(MLIPConfig(vision_config=VISION | {"projection_dim": 512}, text_config=TEXT, projection_dim=40))
    model.save_pretrained(tmp_path)
    tower = MLIPVisionModelWithProjection.from_pretrained(tmp_path)
    assert torch.equal(tower.visual_projection.weight, model.visual_projection.weight)
    vision = MLIPVisionConfig(**VISION)
    MLIPConfig(vision_config=vision, projection_dim=40)
    assert vision.projection_dim == 24  # the argument is not changed


def test_a_refused_value_leaves_the_configuration_unchanged():
    config = MLIPConfig(merge_ratio=0.5)
    with pytest.raises(Exception, match=r"merge_ratio=1\.5"):
        config.merge_ratio = 1.5
    assert config.merge_ratio == 0.5
