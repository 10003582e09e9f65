# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves for people to read: tables, learning curves, a retrieval picture, a model card, an HTML report.

Nothing here computes or invents a figure: what is not given is left out.
"""

import base64
import html
import mimetypes
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from modeling_mlip import MLIPConfig

# Beside the folder of this file, both in a checkout and where setup.cfg installs it.
MODEL_CARD_TEMPLATE = Path(__file__).parent.parent / "model_card.md"

MERGE_RATIOS_PICTURE = "merge_ratios.png"

# Title of a panel, and the keys of the log that it shows.
PANELS = (
    ("Loss", r"(eval_)?loss|(spatial|frequency|token)_loss"),
    ("Learning rate", r"learning_rate"),
    ("Logit scale", r"(frequency_|token_)?logit_scale"),
    ("Retrieval recall (%)", r"eval_.*recall.*"),
    ("Zero-shot accuracy (%)", r"eval_.*accuracy.*"),
)

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin-bottom: 1.5rem; }
th, td { padding: 0.25rem 0.9rem; border-bottom: 1px solid #ddd; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; }
"""


def format_value(value: Any) -> str:
    """Two decimals for a float, two digits for a small one, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float):  # numpy's float64 too
        return f"{value:.2g}" if 0 < abs(value) < 0.1 else f"{value:.2f}"
    return str(value)


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def format_table(rows: list[dict[str, Any]], columns: Sequence[str] | None = None, *, markdown: bool = False) -> str:
    """Aligned text: numbers to the right, everything else to the left.

    Args:
        columns: the keys to show, in order; all that occur, if not given. A row may lack some.
    """
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    cells = [list(columns)] + [[" ".join(format_value(row.get(key)).split()) for key in columns] for row in rows]
    if markdown:
        cells = [[cell.replace("|", r"\|") for cell in line] for line in cells]
    widths = [max(3, *(len(line[n]) for line in cells)) for n in range(len(columns))]
    numeric = [any(is_number(row.get(key)) for row in rows) for key in columns]

    rule = [
        "-" * (width - 1) + (":" if right and markdown else "-") for width, right in zip(widths, numeric, strict=True)
    ]
    aligned = [
        [c.rjust(width) if right else c.ljust(width) for c, width, right in zip(line, widths, numeric, strict=True)]
        for line in cells
    ]
    aligned.insert(1, rule)
    if markdown:
        return "\n".join("| " + " | ".join(line) + " |" for line in aligned)
    return "\n".join("  ".join(line).rstrip() for line in aligned)


def plot_learning_curves(log_history: list[dict[str, Any]], path: str | Path) -> None:
    """Draws the Trainer's `log_history` over steps as a PNG; writes nothing if there is nothing to draw."""
    panels = []
    for title, pattern in PANELS:
        curves: dict[str, list[tuple[int, float]]] = {}
        for entry in log_history:
            for key in filter(re.compile(pattern).fullmatch, entry):
                curves.setdefault(key, []).append((entry["step"], entry[key]))
        if curves:
            panels.append((title, curves))
    if not panels:
        return

    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.4 * columns, 4 * rows), layout="constrained")
    all_axes = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (title, curves) in zip(all_axes, panels, strict=False):
        for key, points in curves.items():
            axes.plot(*zip(*points, strict=True), label=key, marker="o" if len(points) < 30 else None, markersize=3)
        axes.set_title(title)
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    for axes in all_axes:  # the last cell of an odd number of panels
        axes.axis("off")
    figure.savefig(path, format="png", dpi=100)


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


def retrieval_picture(
    path: str | Path,
    images: Sequence[Image.Image | np.ndarray],
    captions: Sequence[str],
    image_embeds: Tensor,
    text_embeds: Tensor,
    num_queries: int = 6,
    top: int = 5,
) -> None:
    """Draws, for captions spread evenly over the data, the images that score highest; the right ones framed green.

    Args:
        images: N pictures.
        captions: N, each of the image in the same place; images of equal captions are all right.
        image_embeds: (N, D), normalised.
        text_embeds: (N, D), normalised.
    """
    queries = np.linspace(0, len(captions) - 1, min(num_queries, len(captions))).round().astype(int).tolist()
    found = (text_embeds[queries] @ image_embeds.T).topk(min(top, len(images)), dim=1).indices.tolist()  # (Q, top)

    rows, columns = len(found), 1 + len(found[0])
    figure = Figure(figsize=(1.7 * columns + 0.8, 1.75 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={"width_ratios": [1.5] + [1] * (columns - 1)})
    for line, query, ranked in zip(grid, queries, found, strict=True):
        caption = textwrap.shorten(captions[query], 120, placeholder=" ...")
        line[0].text(0, 0.5, textwrap.fill(caption, 24), va="center", fontsize=11, parse_math=False)
        line[0].axis("off")
        for axes, index in zip(line[1:], ranked, strict=True):
            picture = images[index]
            axes.imshow(picture.convert("RGB") if isinstance(picture, Image.Image) else picture, cmap="gray")
            axes.set(xticks=[], yticks=[])
            right = captions[index] == captions[query]
            for spine in axes.spines.values():
                spine.set(color="#15a03c" if right else "#cccccc", linewidth=5 if right else 1)
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
) -> Path:
    """Fills `model_card.md` into the README.md of a saved model, with the Hub's metadata.

    Args:
        folder: the saved model; its name becomes the model's.
        metrics: what was measured, in percent; recalls and accuracies are taken, with or without "eval_".
        dataset: what was trained and measured on: a Hub id ("owner/name", which the Hub then links), a path or a name;
            of a path the last part is shown.
        base_model: likewise, what training started from.
        training: settings to show, as they are; empty for a model that was not trained here.
        curves: a picture in the folder; left out if it is not there.
        merge_ratios: what was measured at several ratios, as rows with a "merge ratio" and "... (%)"; drawn as well.
    """
    folder = Path(folder).resolve()
    if merge_ratios:
        plot_merge_ratios(merge_ratios, folder / MERGE_RATIOS_PICTURE)
    measured = {
        key.removeprefix("eval_"): round(float(value), 2)
        for key, value in metrics.items()
        if "recall" in key or "accuracy" in key
    }
    dataset_name, dataset_id = _shown_name(dataset), _hub_id(dataset)
    results = [
        EvalResult(
            task_type="image-text-retrieval" if "recall" in key else "zero-shot-image-classification",
            dataset_type=dataset_id or dataset_name,
            dataset_name=dataset_name,
            metric_type="recall" if "recall" in key else "accuracy",
            metric_name=f"{key.replace('_', ' ')} (%)",
            metric_value=value,
        )
        for key, value in measured.items()
        if dataset_name
    ]
    card_data = ModelCardData(
        library_name="transformers",
        pipeline_tag="zero-shot-image-classification",
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
        dataset_name=dataset_name,
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
    if config.frequency_loss_weight and vision.frequency_layers:
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
    if trained:
        settings["losses"] = " + ".join(losses)
    return [{"setting": key, "value": value} for key, value in settings.items()]


def write_report(
    folder: str | Path,
    title: str,
    tables: list[tuple[str, list[dict[str, Any]]]],
    pictures: list[tuple[str, str | Path]],
) -> Path:
    """Writes report.html: one file with everything in it, pictures too.

    Args:
        tables: heading and rows of each; a row may lack some keys.
        pictures: caption and file of each.
    """
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, rows in tables:
        body.append(f"<h2>{html.escape(heading)}</h2>\n{html_table(rows)}")
    for caption, picture in pictures:
        kind = mimetypes.guess_type(picture)[0] or "image/png"
        data = base64.b64encode(Path(picture).read_bytes()).decode()
        alt = html.escape(caption)
        body.append(f'<h2>{alt}</h2>\n<img alt="{alt}" src="data:{kind};base64,{data}">')
    path = Path(folder) / "report.html"
    path.write_text(
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n" + "\n".join(body) + "\n</body>\n</html>\n",
        encoding="utf-8",
    )
    return path


def html_table(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    head = "".join(f"<th>{html.escape(key)}</th>" for key in columns)
    lines = []
    for row in rows:
        values = [row.get(key) for key in columns]
        lines.append(
            "".join(f"<td{' class=number' * is_number(v)}>{html.escape(format_value(v))}</td>" for v in values)
        )
    return f"<table>\n<tr>{head}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


__all__ = [
    "format_table",
    "plot_learning_curves",
    "plot_merge_ratios",
    "retrieval_picture",
    "write_model_card",
    "write_report",
]
