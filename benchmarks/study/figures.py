# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Tables and figures of the study, from its results: `python benchmarks/study/figures.py` prints and draws them all."""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from modeling_mlip.hub.formatting import format_table

sys.path.insert(0, str(Path(__file__).parent))
from run import steps_of  # noqa: E402

FOLDER = Path(__file__).parent
IMAGES = FOLDER.parent.parent / "docs" / "images"
# What the figure and the table over merge ratios show; shapes are learned by no arm, colours by all.
MEASURES = {
    "noto-emoji": ("recall@1", "recall@1, mean of both directions"),
    "shapes": ("texture_accuracy", "textures told"),
}
SHOWN = (
    *("text_to_image_recall@1", "image_to_text_recall@1", "recall@1"),
    *("colour_accuracy", "texture_accuracy", "shape_accuracy"),
)


def mean_and_spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def arms_of(record: dict[str, Any], equal: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm with the steps that `run.py` gives it, see there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for arm in record["arms"]:
        wanted = steps_of(record, arm, equal)
        runs = [run for run in record["runs"] if run["arm"] == arm and run["steps"] == wanted]
        if runs:
            found[arm] = sorted(runs, key=lambda run: run["seed"])
    return found


def table(record: dict[str, Any], equal: str) -> list[dict[str, Any]]:
    rows = []
    for arm, runs in arms_of(record, equal).items():
        row: dict[str, Any] = {"": arm, "seeds": len(runs), "steps": runs[0]["steps"]}
        row["step time / CLIP's"] = record["step_seconds"][arm] / record["step_seconds"]["CLIP"]
        for name in SHOWN:
            if name in runs[0]:
                row[name.replace("_", " ")] = mean_and_spread([run[name] for run in runs])
        rows.append(row)
    return rows


def ratio_table(record: dict[str, Any], measure: str) -> list[dict[str, Any]]:
    """Accuracy of MLIP arms, trained for CLIP's time, at merge ratios chosen after training."""
    rows = []
    for arm, runs in arms_of(record, "compute").items():
        ratios = [ratio for ratio in runs[0]["at_ratio"] if ratio != "trained"]
        if ratios:
            values = {ratio: mean_and_spread([run["at_ratio"][ratio][measure] for run in runs]) for ratio in ratios}
            rows.append({"trained as": arm, **{f"at {ratio}": value for ratio, value in values.items()}})
    return rows


def weight_table(record: dict[str, Any], measure: str) -> list[dict[str, Any]]:
    """Accuracy, trained for CLIP's time, for what the frequency embedding counts in that of an image."""
    rows = []
    for arm, runs in arms_of(record, "compute").items():
        if weights := runs[0].get("at_embed_weight"):
            values = {weight: [run["at_embed_weight"][weight][measure] for run in runs] for weight in weights}
            rows.append({"": arm, **{f"weight {weight}": mean_and_spread(each) for weight, each in values.items()}})
    return rows


def draw(record: dict[str, Any], name: str) -> Path:
    """Left, every run at equal compute; right, accuracy over the merge ratio chosen after training."""
    measure, label = MEASURES[name]
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=[1.4, 1], layout="constrained")
    compute = arms_of(record, "compute")
    for place, (arm, runs) in enumerate(reversed(compute.items())):
        values = [run[measure] for run in runs]
        colour = "tab:orange" if arm.startswith("MLIP") else "tab:blue"
        left.plot(statistics.mean(values), place, "|", color=colour, markersize=24, markeredgewidth=2)
        left.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markersize=7)
    left.set_yticks(range(len(compute)), list(reversed(compute)))
    left.grid(axis="y", alpha=0.3)
    left.set_xlabel(f"{label}, % (a point for each seed, a line at their mean)")
    left.set_title(f"{name}: the same training compute")
    for row, (arm, runs) in enumerate(compute.items()):
        ratios = [ratio for ratio in runs[0]["at_ratio"] if ratio != "trained"]
        if ratios:
            means = [statistics.mean(run["at_ratio"][ratio][measure] for run in runs) for ratio in ratios]
            style = {"MLIP": "MLIP (trained at 0.5)", "MLIP, no merging": "MLIP (trained without merging)"}
            right.plot([float(ratio) for ratio in ratios], means, "o-", label=style.get(arm, arm), color=f"C{row}")
    right.set_xlabel("merge ratio at inference")
    right.set_ylabel(f"{label}, %")
    right.set_title("the ratio changed after training")
    right.legend(fontsize=8)
    IMAGES.mkdir(exist_ok=True)
    path = IMAGES / f"study_{name}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def main() -> None:
    for results in sorted((FOLDER / "results").glob("*.json")):
        record = json.loads(results.read_text())
        print(f"# {results.stem}: {record['machine']}\n")
        for equal, title in (
            ("compute", "Equal compute"),
            ("steps", "Equal steps"),
            ("short", "60 % of CLIP's compute"),
        ):
            if rows := table(record, equal):
                print(f"{title}:\n{format_table(rows)}\n")
        measure, label = MEASURES[results.stem]
        print(f"At other merge ratios than in training, {label}:\n{format_table(ratio_table(record, measure))}\n")
        print(f"By frequency_embed_weight, {label}:\n{format_table(weight_table(record, measure))}\n")
        print(f"drawn: {draw(record, results.stem)}\n")


if __name__ == "__main__":
    main()
