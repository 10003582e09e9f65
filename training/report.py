# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What a run leaves for people to read: tables, learning curves, a retrieval picture, a model card, an HTML report.

Nothing here computes or invents a figure: what is not given is left out.
"""

import base64
import html
import io
import mimetypes
import os
import re
import tempfile
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image
from torch import Tensor

from modeling_mlip import MLIPConfig

# Beside the folder of this file, both in a checkout and where setup.cfg installs it.
MODEL_CARD_TEMPLATE = Path(__file__).parent.parent / "model_card.md"

PIPELINE_TAG = "zero-shot-image-classification"
MERGE_RATIOS_PICTURE = "merge_ratios.png"
# Markers of the points of `plot_pareto`, one for each merge ratio.
MARKERS = "osD^vPXhp<>d"
BASELINE_MARKER = "*"
# What stands around the part of a card that `add_to_model_card` writes.
EVALUATIONS = ("<!-- evaluations -->", "<!-- end of evaluations -->")

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


def plot_pareto(rows: list[dict[str, Any]], metric: str, path: str | Path) -> None:
    """Draws accuracy over images per second and over FLOPs as a PNG: a line for each method, a marker for each ratio.

    Args:
        rows: of `mlip benchmark`: `method`, `merge_ratio` (`None` for a model that is a single point),
            `images_per_second` with its quartiles `images_per_second_low` and `_high`, `gflops_per_image`, and the
            metric. A row of ratio 0 with method "none" belongs to every line.
        metric: the key of the rows that is drawn, in percent.
    """
    ratios = sorted({row["merge_ratio"] for row in rows if row["merge_ratio"] is not None})
    marker_of = dict(zip(ratios, MARKERS, strict=False))
    start = [row for row in rows if row["method"] == "none"]
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"] != "none")) or ["none"]
    figure = Figure(figsize=(10, 4.8), layout="constrained")
    all_axes = figure.subplots(1, 2, sharey=True)
    handles = []
    for number, method in enumerate(methods):
        color = f"C{number}"
        own = [row for row in rows if row["method"] == method]
        single = own[0]["merge_ratio"] is None
        line = own if single or method == "none" else sorted(start + own, key=lambda row: row["merge_ratio"])
        for axes, key in zip(all_axes, ("images_per_second", "gflops_per_image"), strict=True):
            x, y = [row[key] for row in line], [row[metric] for row in line]
            axes.plot(x, y, color=color, linewidth=1.5, zorder=2)
            for row in line:
                style = {"color": "#444444" if row["method"] == "none" else color, "markeredgecolor": "white"}
                marker = BASELINE_MARKER if single else marker_of[row["merge_ratio"]]
                size = 15 if single else 12 - 2.5 * number  # of points in one place each shows its rim
                axes.plot(row[key], row[metric], marker=marker, markersize=max(size, 5), zorder=3 + number, **style)
            if key == "images_per_second":
                spread = [
                    [row[key] - row[f"{key}_low"] for row in line],
                    [row[f"{key}_high"] - row[key] for row in line],
                ]
                axes.errorbar(x, y, xerr=spread, fmt="none", ecolor=color, alpha=0.5, capsize=2, zorder=1)
        handles.append(Line2D([], [], color=color, marker=BASELINE_MARKER if single else None, label=method))
    for ratio in ratios:
        handles.append(
            Line2D([], [], color="#444444", linestyle="none", marker=marker_of[ratio], label=f"merge ratio {ratio:g}")
        )
    for axes, label in zip(
        all_axes, ("images per second (bars: quartiles)", "GFLOPs per image, fewer to the right"), strict=True
    ):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.margins(0.08)
    all_axes[0].set_ylabel(f"{metric.replace('_', ' ')} (%)")
    all_axes[1].invert_xaxis()  # cheaper to the right, as in the panel beside it
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    write_atomically(path, buffer.getvalue())


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a whole file or nothing: what was there stays until the new one is complete."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


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
    "add_to_model_card",
    "format_table",
    "plot_learning_curves",
    "plot_merge_ratios",
    "plot_pareto",
    "retrieval_picture",
    "write_atomically",
    "write_model_card",
    "write_report",
]
