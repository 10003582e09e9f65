# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Small models and batches that several tests share; no test reaches the network."""

import multiprocessing
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from modeling_mlip import MLIPConfig, MLIPModel

# Processes of the start method "forkserver" are forks of one that has imported this, once for all tests.
multiprocessing.set_forkserver_preload(["modeling_mlip.training.trainer"])

VISION = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    image_size=32,
    patch_size=4,
    projection_dim=24,
)
TEXT = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=64,
    max_position_embeddings=12,
    projection_dim=24,
    bos_token_id=62,
    eos_token_id=63,
    pad_token_id=63,
)


def small_config(vision: dict | None = None, text: dict | None = None, **model_keys) -> MLIPConfig:
    return MLIPConfig(
        vision_config={**VISION, "merge_importance_weight": 0.1, **(vision or {})},
        text_config={**TEXT, **(text or {})},
        projection_dim=24,
        # Every part, all pairs.
        **{"token_loss_weight": 0.1, "token_loss_frequency": True, "token_loss_group_size": None, **model_keys},
    )


def small_model(seed: int = 0, vision: dict | None = None, text: dict | None = None, **model_keys) -> MLIPModel:
    """A random model whose every parameter matters: zeros and ones of the initialisation are moved, but the gate."""
    torch.manual_seed(seed)
    model = MLIPModel(small_config(vision, text, **model_keys)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "logit_scale" not in name and "gate" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def open_gate(model: MLIPModel) -> MLIPModel:
    with torch.no_grad():
        model.vision_model.frequency.gate.normal_()
    return model


def pairs_batch(num_pairs: int = 5, length: int = 8, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random images and captions of different lengths, padded with EOS."""
    generator = torch.Generator().manual_seed(seed)
    input_ids = torch.randint(0, 62, (num_pairs, length), generator=generator)
    input_ids[:, 0] = TEXT["bos_token_id"]
    lengths = torch.randint(4, length + 1, (num_pairs,), generator=generator)
    attention_mask = (torch.arange(length)[None] < lengths[:, None]).long()
    input_ids[torch.arange(num_pairs), lengths - 1] = TEXT["eos_token_id"]
    input_ids[attention_mask == 0] = TEXT["pad_token_id"]
    pixel_values = torch.randn(num_pairs, 3, 32, 32, generator=generator)
    return {"pixel_values": pixel_values, "input_ids": input_ids, "attention_mask": attention_mask}


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    return pairs_batch()


# At the end: it takes the above from here.
from data_cases import empty_cache, tokenizer, transform  # noqa: E402, F401
from evaluation_cases import files, sources, splits  # noqa: E402, F401
from train_command_cases import drawn, trained  # noqa: E402, F401
