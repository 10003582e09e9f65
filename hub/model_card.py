# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

import re
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure

from modeling_mlip import MLIPConfig

from .atomic_files import write_atomically
from .formatting import format_table

# Beside the folder of this file, both in a checkout and where setup.cfg installs it.
MODEL_CARD_TEMPLATE = Path(__file__).parent.parent / "model_card.md"


PIPELINE_TAG = "zero-shot-image-classification"


MERGE_RATIOS_PICTURE = "merge_ratios.png"


# What stands around the part of a card that `add_to_model_card` writes.
EVALUATIONS = ("<!-- evaluations -->", "<!-- end of evaluations -->")


def plot_merge_ratios(rows: list[dict[str, float]], path: str | Path) -> None:
    """Draws each other key of the rows over their "merge ratio" as a PNG."""
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for key in [key for key in rows[0] if key.endswith("(%)")]:
        axes.plot([row["merge ratio"] for row in rows], [row[key] for row in rows], label=key, marker="o")
    axes.set_xlabel("merge ratio")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(path, format="png", dpi=100)


def write_model_card(
    folder: str | Path,
    *,
    metrics: dict[str, float],
    config: MLIPConfig,
    dataset: str | None,
    base_model: str | None,
    training: dict[str, Any],
    curves: str | None,
    merge_ratios: list[dict[str, float]] | None = None,
    measured_on: str | None = None,
) -> Path:
    """Fills `model_card.md` into the README.md of a saved model, with the Hub's metadata.

    Args:
        folder: the saved model; its name becomes the model's.
        metrics: what was measured, in percent, as `mlip train` and `mlip evaluate` write it; recalls and accuracies are
            taken, with or without "eval_".
        dataset: what was trained on: a Hub id ("owner/name", which the Hub then links), a path or a name;
            of a path the last part is shown.
        base_model: likewise, what training started from.
        training: settings to show, as they are; empty for a model that was not trained here.
        curves: a picture in the folder; left out if it is not there.
        merge_ratios: what was measured at several ratios, as rows with a "merge ratio" and "... (%)"; drawn as well.
        measured_on: likewise, what was measured on; `dataset` if not given.
    """
    folder = Path(folder).resolve()
    measured_on = measured_on or dataset
    if merge_ratios:
        plot_merge_ratios(merge_ratios, folder / MERGE_RATIOS_PICTURE)
    measured = _measured(metrics)
    dataset_id = _hub_id(dataset)
    results = _eval_results(measured, measured_on) if measured_on else []
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag=PIPELINE_TAG,
        license=_license(base_model),
        tags=["mlip", "clip"],
        base_model=_hub_id(base_model),
        datasets=[dataset_id] if dataset_id and training else None,
        model_name=folder.name if results else None,
        eval_results=results or None,
    )
    card = ModelCard.from_template(
        card_data,
        template_path=str(MODEL_CARD_TEMPLATE),
        model_name=folder.name,
        base_model_name=_shown_name(base_model),
        dataset_name=_shown_name(measured_on),
        settings=format_table(_settings(config, trained=bool(training)), markdown=True),
        merge_ratio=config.vision_config.merge_ratio,
        metrics_table=measured and format_table([{"metric": k, "%": v} for k, v in measured.items()], markdown=True),
        training_table=training
        and format_table([{"setting": k, "value": str(v)} for k, v in training.items()], markdown=True),
        curves=curves if curves and (folder / curves).is_file() else None,
        merge_ratios_table=merge_ratios and format_table(merge_ratios, markdown=True),
        merge_ratios_picture=MERGE_RATIOS_PICTURE,
        image_size=config.vision_config.image_size,
        max_tokens=config.text_config.max_position_embeddings,
    )
    path = folder / "README.md"
    card.save(path)
    return path


def add_to_model_card(folder: str | Path, results: dict[str, Any]) -> Path:
    """Adds what `mlip evaluate` measured to the card of a saved model, to its metadata and as a table.

    A second evaluation on the same data, split and merge ratio replaces the first.

    Args:
        folder: the saved model with its README.md.
        results: the metrics in percent, with `dataset`, `split` and `merge_ratio`.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path)
    new = _eval_results(
        _measured(results), results["dataset"], results["split"], f" at merge ratio {results['merge_ratio']:g}"
    )
    replaced = {(result.dataset_name, result.dataset_split, result.metric_name) for result in new}
    kept = [
        result
        for result in card.data.eval_results or []
        if (result.dataset_name, result.dataset_split, result.metric_name) not in replaced
    ]
    card.data.eval_results = kept + new
    card.data.model_name = card.data.model_name or Path(folder).resolve().name
    rows = [
        {"data set": result.dataset_name, "split": result.dataset_split, "metric": result.metric_name}
        | {"%": result.metric_value}
        for result in card.data.eval_results
        if result.dataset_split  # those of training have a table of their own
    ]
    start, end = EVALUATIONS
    section = f"{start}\n## Evaluations\n\n{format_table(rows, markdown=True)}\n{end}"
    before, found, rest = card.text.partition(start)
    if found:
        card.text = before + section + rest.partition(end)[2]
    else:
        before, limits, rest = card.text.partition("\n## Limits")
        card.text = f"{before.rstrip()}\n\n{section}\n{limits}{rest}"
    write_atomically(path, str(card))
    return path


def _measured(metrics: dict[str, Any]) -> dict[str, float]:
    return {
        key.removeprefix("eval_"): round(float(value), 2)
        for key, value in metrics.items()
        if "recall" in key or "accuracy" in key
    }


def _eval_results(
    measured: dict[str, float], dataset: str, split: str | None = None, setting: str = ""
) -> list[EvalResult]:
    """The metadata of each metric; `setting` goes to its name."""
    shown = _shown_name(dataset) or dataset
    return [
        EvalResult(
            task_type=_task(key),
            dataset_type=shown,
            dataset_name=shown,
            dataset_split=split,
            metric_type="recall" if "recall" in key else "accuracy",
            metric_name=f"{key.replace('_', ' ')} (%){setting}",
            metric_value=value,
        )
        for key, value in measured.items()
    ]


def _task(metric: str) -> str:
    if "recall" in metric:
        return "image-text-retrieval"
    return "image-classification" if metric.startswith(("linear_probe", "few_shot")) else PIPELINE_TAG


def _hub_id(name: str | None) -> str | None:
    """The name if it can be one of the Hub: "owner/name", and no file or folder of this machine."""
    return name if name and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) and not Path(name).exists() else None


def _license(base_model: str | None) -> str | None:
    """Apache-2.0 for what starts from nothing; else what the base model says on its card, if that can be read."""
    if base_model is None:
        return "apache-2.0"
    try:
        return ModelCard.load(Path(base_model) / "README.md" if Path(base_model).is_dir() else base_model).data.license
    except (OSError, ValueError):
        return None


def _shown_name(name: str | None) -> str | None:
    return _hub_id(name) or (Path(name).resolve().name if name else None)


def _settings(config: MLIPConfig, trained: bool) -> list[dict[str, str]]:
    vision = config.vision_config
    token_features = "spatial and frequency" if config.token_loss_frequency and vision.frequency_layers else "spatial"
    losses = ["image-caption InfoNCE"]
    if config.has_frequency_loss:
        losses.append(f"{config.frequency_loss_weight} x frequency-caption InfoNCE")
    if config.token_loss_weight:
        losses.append(f"{config.token_loss_weight} x token-level InfoNCE ({token_features} features)")
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
        settings["losses"] = " + ".join(losses)
    return [{"setting": key, "value": value} for key, value in settings.items()]
