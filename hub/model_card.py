# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The model card: every README.md that training, conversion and evaluation write for a saved model."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from modeling_mlip import MLIPConfig

from .atomic_files import write_atomically
from .formatting import format_table
from .results import ZERO_SHOT_TASK, Result, hub_results, results_by_merge_ratio, results_list

# The template lies beside the folder of this file, in a checkout and in an installed package.
MODEL_CARD_TEMPLATE = Path(__file__).parent.parent / "model_card.md"
MERGE_RATIOS_PICTURE = "merge_ratios.png"
# Marks around the section of a card that `add_to_model_card` writes.
EVALUATIONS_START, EVALUATIONS_END = "<!-- evaluations -->", "<!-- end of evaluations -->"


def write_model_card(
    folder: str | Path,
    *,
    results: Sequence[Result],
    config: MLIPConfig | None,
    dataset: str | None,
    base_model: str | None,
    training: Mapping[str, Any],
    curves: str | None,
    merge_ratios: Sequence[Result] | None = None,
    measured_on: str | None = None,
    conversion: Mapping[str, Any] | None = None,
    interpolation: str | None = None,
    name: str | None = None,
) -> Path:
    """Writes the README.md of a saved model from the template model_card.md, with the Hub's metadata.

    The card names no path of this machine: of a path it shows the last part.

    Args:
        folder: the saved model.
        results: what was measured; empty if nothing was.
        config: the configuration; `None` for a folder in another format than MLIP's, whose card has no usage example.
        dataset: the training data: a Hub id ("owner/name", which the Hub links), a path or a name.
        base_model: the model that training or conversion started from, likewise.
        training: settings to show; empty for a model that was not trained here.
        curves: name of a picture in the folder; left out if the file does not exist.
        merge_ratios: results at several merge ratios, each with "merge_ratio" in its setting; they become a table and a
            picture.
        measured_on: the data of `results`, likewise; `dataset` if not given.
        conversion: for a converted folder: "source" (str), "notes" (list of str) and "reports" (list of str, parity
            reports as text). Only "source" is required.
        interpolation: for interpolated weights, the text of a section in Markdown.
        name: the name of the model; without it the name of the folder, so give it for a temporary folder.

    Returns:
        the path of the README.md.
    """
    folder = Path(folder).resolve()
    name = name or folder.name
    measured_on = measured_on or dataset
    if merge_ratios:
        plot_merge_ratios(merge_ratios, folder / MERGE_RATIOS_PICTURE)
    dataset_id = _hub_id(dataset)
    metadata = hub_results(results, shown_name(measured_on) or "") if measured_on else []
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=ZERO_SHOT_TASK,
        license=_license(base_model),
        tags=["mlip", "clip"],
        base_model=_hub_id(base_model),
        datasets=[dataset_id] if dataset_id and training else None,
        model_name=name if metadata else None,
        eval_results=metadata or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(MODEL_CARD_TEMPLATE),
        model_name=name,
        base_model_name=shown_name(base_model),
        dataset_name=shown_name(measured_on),
        conversion=conversion and _shown_conversion(conversion),
        interpolation=interpolation,
        curves=curves if curves and (folder / curves).is_file() else None,
        **_config_values(config, trained=bool(training)),
        **_tables(results, training, merge_ratios),
    )
    path = folder / "README.md"
    write_atomically(path, str(card).rstrip() + "\n")
    return path


def add_to_model_card(folder: str | Path, results: Sequence[Result], *, dataset: str, name: str | None = None) -> Path:
    """Adds results to the card of a saved model, to its metadata and as a table.

    A second evaluation on the same data set, split and merge ratio replaces the first.

    Args:
        folder: the saved model with its README.md.
        results: results with a split.
        dataset: the data set that was evaluated, as in `write_model_card`.
        name: the name of the model, likewise.

    Returns:
        the path of the README.md.

    Raises:
        ValueError: for a result without a split.
    """
    for result in results:
        if result.split is None:
            raise ValueError(f"{result.name} has no split: name the split that was evaluated, as evaluate(split=...).")
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    new = hub_results(results, shown_name(dataset) or dataset)
    replaced = {(result.dataset_name, result.dataset_split, result.metric_name) for result in new}
    kept = [
        result
        for result in card.data.eval_results or []
        if (result.dataset_name, result.dataset_split, result.metric_name) not in replaced
    ]
    card.data.eval_results = kept + new
    card.data.model_name = card.data.model_name or name or Path(folder).resolve().name
    rows = [
        {"data set": result.dataset_name, "split": result.dataset_split, "metric": result.metric_name}
        | {"%": result.metric_value}
        for result in card.data.eval_results
        if result.dataset_split  # results of training have no split, and a table of their own
    ]
    section = f"{EVALUATIONS_START}\n## Evaluations\n\n{format_table(rows, markdown=True)}\n{EVALUATIONS_END}"
    before, start, after = card.text.partition(EVALUATIONS_START)
    if start:
        card.text = before + section + after.partition(EVALUATIONS_END)[2]
    else:
        before, limits, after = card.text.partition("\n## Limits")
        card.text = f"{before.rstrip()}\n\n{section}\n{limits}{after}"
    write_atomically(path, str(card))
    return path


def plot_merge_ratios(results: Sequence[Result], path: str | Path) -> None:
    """Draws each figure over the merge ratio as a PNG.

    Args:
        results: each has "merge_ratio" in its setting.
    """
    from matplotlib.figure import Figure  # `mlip convert` and `mlip push` work without matplotlib

    curves: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        curves.setdefault(result.title, []).append((result.setting["merge_ratio"], result.value))
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for title, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=f"{title} (%)", marker="o")
    axes.set_xlabel("merge ratio")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=100)


# Values of the template


def _tables(
    results: Sequence[Result], training: Mapping[str, Any], merge_ratios: Sequence[Result] | None
) -> dict[str, Any]:
    """The tables of the template in Markdown; `None` for an empty one."""
    tables = {
        "metrics_table": results_list(results),
        "training_table": [{"setting": key, "value": str(value)} for key, value in training.items()],
        "merge_ratios_table": results_by_merge_ratio(merge_ratios or []),
    }
    return {
        **{name: format_table(rows, markdown=True) if rows else None for name, rows in tables.items()},
        "merge_ratios_picture": MERGE_RATIOS_PICTURE,
    }


def _config_values(config: MLIPConfig | None, trained: bool) -> dict[str, Any]:
    """What the template shows of a configuration."""
    if config is None:
        return {"settings": None, "merge_ratio": None, "image_size": None, "max_tokens": None}
    return {
        "settings": format_table(_settings(config, trained), markdown=True),
        "merge_ratio": config.vision_config.merge_ratio,
        "image_size": config.vision_config.image_size,
        "max_tokens": config.text_config.max_position_embeddings,
    }


def _settings(config: MLIPConfig, trained: bool) -> list[dict[str, str]]:
    """Rows of the architecture, and of the losses if the model was trained here."""
    vision = config.vision_config
    settings = {
        "vision tower": f"{vision.num_hidden_layers} layers of width {vision.hidden_size}, "
        f"{vision.image_size} px in patches of {vision.patch_size}",
        "merge ratio": f"{vision.merge_ratio} of the patch tokens, in layers {vision.resolved_merge_layers}"
        if vision.merge_ratio
        else "0 (no token is merged)",
        "merge method": vision.merge_method,
        "frequency stage": f"{vision.frequency_layers} layers of width {vision.frequency_hidden_size}"
        if vision.frequency_layers
        else "none",
    }
    if vision.frequency_embed_weight:
        settings["image embedding"] = f"spatial + {vision.frequency_embed_weight} x frequency"
    if trained:
        settings["losses"] = _losses(config)
    return [{"setting": key, "value": value} for key, value in settings.items()]


def _losses(config: MLIPConfig) -> str:
    """The loss parts with their weights."""
    has_frequency_tokens = config.token_loss_frequency and config.vision_config.frequency_layers
    token_features = "spatial and frequency" if has_frequency_tokens else "spatial"
    losses = ["image-caption InfoNCE"]
    if config.has_frequency_loss:
        losses.append(f"{config.frequency_loss_weight} x frequency-caption InfoNCE")
    if config.token_loss_weight:
        losses.append(f"{config.token_loss_weight} x token-level InfoNCE ({token_features} features)")
    return " + ".join(losses)


def _shown_conversion(conversion: Mapping[str, Any]) -> dict[str, Any]:
    """Source, notes and reports of a conversion, in which a local source is shown by its last part."""
    source = str(conversion["source"])
    shown = shown_name(source) or source

    def without_path(text: str) -> str:
        text = text.replace(str(Path(source).absolute()), shown)
        return text.replace(source, shown) if "/" in source else text

    return {
        "source": shown,
        "notes": [without_path(note) for note in conversion.get("notes", [])],
        "reports": [without_path(report) for report in conversion.get("reports", [])],
    }


def _hub_id(name: str | None) -> str | None:
    """The name if it can be a Hub id, "owner/name", and is not a file or folder of this machine."""
    return name if name and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name).exists() else None


def _license(base_model: str | None) -> str | None:
    """Apache-2.0 without a base model; else the license on the base model's card, if the card can be read."""
    if base_model is None:
        return "apache-2.0"
    try:
        return ModelCard.load(Path(base_model) / "README.md" if Path(base_model).is_dir() else base_model).data.license
    except (OSError, ValueError):
        return None


def shown_name(name: str | None) -> str | None:
    """A Hub id as it is; the last part of a path."""
    return _hub_id(name) or (Path(name).resolve().name if name else None)
