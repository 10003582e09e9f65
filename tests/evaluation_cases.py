# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Drawn images as files of several kinds, and small saved models of every kind, for evaluation and benchmark."""

import json

import pytest
import torch
from conftest import TEXT, VISION, small_config
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.data.shapes import shapes_dataset
from modeling_mlip.hub.cli import main as mlip
from modeling_mlip.hub.model_card import write_model_card
from modeling_mlip.hub.results import Result

OPEN_CLIP_CFG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture(scope="session")
def splits():
    return shapes_dataset(num_train=120, num_validation=40)


@pytest.fixture(scope="session")
def sources(splits, tmp_path_factory) -> dict[str, str]:
    """Saved models: an MLIP one with and one without the token-level loss, a CLIP one, and an open_clip one."""
    import open_clip

    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(splits["train"]["caption"], max_seq_length=20, vocab_size=600)
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**TEXT, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 20}
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)
    torch.manual_seed(0)
    models = {
        "mlip": MLIPModel(small_config(text=text, vision={"merge_ratio": 0.5})),
        "plain": MLIPModel(small_config(text=text, token_loss_weight=0)),
        "clip": CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
    write_model_card(
        folder / "mlip",
        results=[Result("retrieval", "recall", 1, 1.0, prefix="text_to_image")],
        config=MLIPConfig(),
        dataset="shapes",
        base_model=None,
        training={"steps": 1},
        curves=None,
    )
    local = folder / "open_clip"
    local.mkdir()
    (local / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP_CFG, "preprocess_cfg": {}}))
    torch.save(open_clip.CLIP(**OPEN_CLIP_CFG).state_dict(), local / "open_clip_pytorch_model.bin")
    return {name: str(folder / name) for name in models} | {"open_clip": f"open_clip:local-dir:{local}"}


@pytest.fixture(scope="session")
def files(splits, tmp_path_factory) -> dict[str, str]:
    """Paths of the drawn images: pairs as parquet, and images in a folder for each class."""
    folder = tmp_path_factory.mktemp("files")
    paths = {}
    for name, rows in splits.items():
        paths[name] = str(folder / f"{name}.parquet")
        rows.to_parquet(paths[name])
        for number, row in enumerate(rows):
            class_folder = folder / "images" / name / f"big_{rows.features['texture'].int2str(row['texture'])}"
            class_folder.mkdir(parents=True, exist_ok=True)
            row["image"].save(class_folder / f"{number:03}.png")
    return {**paths, "images": str(folder / "images")}


def run_evaluate(source: str, tmp_path, *flags: str) -> dict:
    """Runs `mlip evaluate`; returns its JSON with the results as name -> value."""
    output = tmp_path / "out.json"
    assert mlip(["evaluate", "--model_name_or_path", source, "--output_file", str(output), *flags]) == 0
    content = json.loads(output.read_text())
    return content | {result["name"]: result["value"] for result in content.pop("results")}
