# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The sections of a page of `mlip visualize`: each draws its picture and explains it, or says why it is missing."""

from pathlib import Path
from typing import Any

from modeling_mlip import MLIPModel

from ..html_page import Section
from .inspection import Inspection
from .pictures import draw_importance, draw_regions, draw_words

PICTURES = ("regions", "importance", "words")  # NAME_regions.png and so on


def image_sections(model: MLIPModel, inspection: Inspection, name: str, folder: Path, filters: Path) -> list[Section]:
    """Draws the pictures of one image into `folder`, and returns their sections.

    Args:
        name: first part of the names of the pictures.
        filters: the picture of the filters, which is the same for every image.
    """
    regions, importance, words = (folder / f"{name}_{kind}.png" for kind in PICTURES)
    return [
        _regions_section(model, inspection, regions),
        _importance_section(model, inspection, importance),
        _words_section(model, inspection, words),
        _filters_section(model, filters),
    ]


def _regions_section(model: MLIPModel, inspection: Inspection, path: Path) -> Section:
    title = "Merged patches"
    if model.config.vision_config.merge_ratio == 0:
        return Section(title, missing="Nothing merges at merge_ratio=0. Choose another, for example 0.5.")
    maps = [(f"after layer {stage.layer}", stage.after.view(inspection.grid).numpy()) for stage in inspection.stages]
    draw_regions(path, inspection.crop, maps)
    text = (
        "Top row: each token in the mean colour of its patches. Bottom row: the patches of merged tokens, one tint per "
        "token; the patches of a token need not touch. Patches without a tint are not merged."
    )
    return Section(title, path, text)


def _importance_section(model: MLIPModel, inspection: Inspection, path: Path) -> Section:
    config = model.config.vision_config
    maps = [
        (
            f"layer {stage.layer}\n{len(stage.spatial)} tokens",
            {kind: scores.view(inspection.grid).numpy() for kind, scores in stage.importance().items()},
        )
        for stage in inspection.stages
    ]
    draw_importance(path, maps)
    query = "class token" if config.num_prefix_tokens else "other tokens"
    text = (
        f"Spatial: the attention of the {query} to each token, the mean over heads. Frequency: the cosine between the "
        "frequency features of the token and those of the image, the mean over the patches of a token. Both: the mean "
        "of the two, by which the method 'mlip' decides which tokens to keep. Values are standard deviations from the "
        "mean over tokens, before the stage merges. A patch has the value of its token, and all maps share one scale."
    )
    if config.merge_method == "elip":
        text += " The merge method of this run, 'elip', uses the spatial map only."
    elif config.merge_method != "mlip":
        text += f" The merge method of this run, {config.merge_method!r}, uses none of them."
    elif config.merge_importance_weight == 0:
        text += " In this run importance has no weight in merging (merge_importance_weight=0)."
    if config.frequency_layers == 0:
        text += " Frequency and both are left out: the model has no frequency stage (frequency_layers=0)."
    return Section("Importance", path, text)


def _words_section(model: MLIPModel, inspection: Inspection, path: Path) -> Section:
    title = "Words and tokens"
    if inspection.cosine is None:
        return Section(title, missing="No caption was given. Give one with caption.")
    if inspection.words is None:
        return Section(
            title,
            missing="The model has no token-level projections (token_loss_weight=0). Train a model with, for example, "
            "token_loss_weight=0.1.",
        )
    if not inspection.words:
        return Section(title, missing="The caption has no letter or digit within the context of the text tower.")
    similarities = [(word.text, word.similarity.view(inspection.grid).numpy()) for word in inspection.words]
    draw_words(path, inspection.crop, similarities)
    is_causal = model.config.text_config.use_causal_mask
    context = "the words before it, not those after it" if is_causal else "the whole caption"
    text = (
        "Cosine similarity between each word and each image token, over the image; the number beside a word is the "
        "maximum. A patch has the value of its token, "
        "and all words share one scale. A word of several tokens is their mean. The embedding of a token depends on "
        f"{context}."
    )
    if inspection.num_truncated:
        text += f" {inspection.num_truncated} words were cut: the caption is longer than the context of the text tower."
    rows = [
        {
            "word": word.text,
            "tokens": " ".join(token.removesuffix("</w>") for token in word.tokens),
            "maximum": float(word.similarity.max()),
            "mean over patches": float(word.similarity.mean()),
        }
        for word in inspection.words
    ]
    return Section(title, path, text, rows)


def _filters_section(model: MLIPModel, path: Path) -> Section:
    title = "Filters of the frequency stage"
    if model.config.vision_config.frequency_layers == 0:
        return Section(title, missing="The model has no frequency stage (frequency_layers=0).")
    text = (
        "Magnitude of the learned filter K of each block over the whole spectrum, with the lowest frequency in the "
        "middle: the mean over channels, and the channels whose magnitude varies most. The same for every image."
    )
    if not model.vision_model.frequency.gate.any():
        text += " The gate of the stage is zero, as after conversion: its features do not enter the spatial stream."
    return Section(title, path, text)


def settings_section(source: str, model: MLIPModel, inspection: Inspection, image: str, caption: str | None) -> Section:
    """The model, the inputs and the merge settings, with the similarity."""
    config = model.config.vision_config
    num_patches, num_left = inspection.num_tokens[0], inspection.num_tokens[-1]
    is_merged = config.merge_ratio > 0
    layers = ", ".join(map(str, config.resolved_merge_layers))
    frequency = f"{config.frequency_layers} blocks of width {config.frequency_hidden_size}"
    values: dict[str, Any] = {
        "model": Path(source).resolve().name if Path(source).exists() else source,
        "image": image,
        "caption": caption,
        "cosine similarity": None if inspection.cosine is None else f"{inspection.cosine:.4f}",
        "logit": None if inspection.logit is None else f"{inspection.logit:.2f}",
        "patches": f"{inspection.grid[0]} x {inspection.grid[1]} of {config.patch_size} px",
        "patch tokens": f"{num_patches} before the first layer, {num_left} after the last",
        "merge ratio": str(config.merge_ratio),
        "merge method": config.merge_method if is_merged else None,
        "merge layers": layers if is_merged else None,
        "frequency stage": frequency if config.frequency_layers else "none",
    }
    rows = [{"setting": name, "value": value} for name, value in values.items() if value is not None]
    return Section("Settings", rows=rows)


def tokens_section(inspection: Inspection) -> Section:
    """The number of patch tokens in each layer."""
    pairs = zip(inspection.num_tokens, inspection.num_tokens[1:], strict=False)
    rows = [
        {"layer": layer, "tokens in attention": before, "tokens in MLP": after}
        for layer, (before, after) in enumerate(pairs)
    ]
    return Section("Patch tokens in each layer", rows=rows)
