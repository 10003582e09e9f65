# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Print the tables of the study and draw its figures, from the files in `benchmarks/study/results`.

python benchmarks/study/figures.py
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from run import clip_steps, steps_of
from study_data import StudyData, read_study_data

from modeling_mlip.hub.formatting import format_table

FOLDER = Path(__file__).parent
IMAGES = FOLDER.parent.parent / "docs" / "images"
SHOWN = (
    *("text_to_image_recall@1", "image_to_text_recall@1", "recall@1", "mean_recall"),
    *("colour_accuracy", "texture_accuracy", "shape_accuracy"),
)


def mean_and_spread(values: list[float]) -> str:
    """Mean and standard deviation as text."""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def runs_by_arm(record: dict[str, Any], equal: str) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm with the number of steps that `run.steps_of` gives for "steps", "compute", "short" or
    "long"."""
    runs_of: dict[str, list[dict[str, Any]]] = {}
    for arm in (arm for arm in record["arms"] if arm in record["step_seconds"]):
        steps = steps_of(record, arm, equal)
        runs = [run for run in record["runs"] if run["arm"] == arm and run["steps"] == steps]
        if runs:
            runs_of[arm] = sorted(runs, key=lambda run: run["seed"])
    return runs_of


def metrics_table(record: dict[str, Any], equal: str) -> list[dict[str, Any]]:
    """One row for each arm: steps, step time, and the mean and standard deviation of each metric over seeds."""
    rows = []
    for arm, runs in runs_by_arm(record, equal).items():
        row: dict[str, Any] = {"": arm, "seeds": len(runs), "steps": runs[0]["steps"]}
        row["step time / CLIP's"] = record["step_seconds"][arm] / record["step_seconds"]["CLIP"]
        if repeated := [each[arm] / each["CLIP"] for each in record.get("repeated_step_seconds", []) if arm in each]:
            row["measured again"] = ", ".join(f"{share:.2f}" for share in repeated)
        if arm in (gflops := record.get("step_gflops", {})):
            row["FLOPs of a run / CLIP's"] = gflops[arm] * row["steps"] / (gflops["CLIP"] * clip_steps(record))
        for name in SHOWN:
            if name in runs[0]:
                row[name.replace("_", " ")] = mean_and_spread([run[name] for run in runs])
        rows.append(row)
    return rows


def ratio_table(record: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """A metric of MLIP arms, trained for CLIP's time, at merge ratios set after training."""
    rows = []
    for arm, runs in runs_at_ratios(record).items():
        values = {
            ratio: mean_and_spread([run["at_ratio"][ratio][metric] for run in runs]) for ratio in runs[0]["at_ratio"]
        }
        rows.append(
            {"trained as": arm, "seeds": len(runs), **{f"at {ratio}": value for ratio, value in values.items()}}
        )
    return rows


def runs_at_ratios(record: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The runs of each arm at equal compute that were evaluated at merge ratios other than that of training."""
    runs_of = {
        arm: [run for run in runs if "trained" not in run["at_ratio"]]
        for arm, runs in runs_by_arm(record, "compute").items()
    }
    return {arm: runs for arm, runs in runs_of.items() if runs}


def weight_table(record: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """A metric of all arms, trained for CLIP's time, at values of `frequency_embed_weight` set after training."""
    rows = []
    for arm, runs in runs_by_arm(record, "compute").items():
        if weights := runs[0].get("at_embed_weight"):
            values = {weight: [run["at_embed_weight"][weight][metric] for run in runs] for weight in weights}
            rows.append({"": arm, **{f"weight {weight}": mean_and_spread(each) for weight, each in values.items()}})
    return rows


def device_suffix(record: dict[str, Any]) -> str:
    """What distinguishes the figure of a GPU's runs from that of a CPU's."""
    return "_gpu" if record.get("device") == "cuda" else ""


def draw_study(record: dict[str, Any], data: StudyData, folder: Path) -> Path | None:
    """Draw every run at equal compute on the left, and the metric over the merge ratio on the right. `None` if
    there are not two arms to compare."""
    if len(runs_of := runs_by_arm(record, "compute")) < 2:
        return None
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), width_ratios=[1.4, 1], layout="constrained")
    draw_arms(left, runs_of, data)
    if "costs_of" in record:
        left.set_title(f"{data.name}: equal training compute of a CPU, trained on a GPU")
    draw_ratios(right, runs_at_ratios(record), data)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"study_{data.name}{device_suffix(record)}.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_arms(axes: Axes, runs_of: dict[str, list[dict[str, Any]]], data: StudyData) -> None:
    for place, (arm, runs) in enumerate(reversed(runs_of.items())):
        values = [run[data.metric] for run in runs]
        colour = "tab:orange" if arm.startswith("MLIP") else "tab:blue"
        axes.plot(statistics.mean(values), place, "|", color=colour, markersize=24, markeredgewidth=2)
        axes.plot(values, [place] * len(values), "o", color=colour, alpha=0.6, markersize=7)
    axes.set_yticks(range(len(runs_of)), list(reversed(runs_of)))
    axes.grid(axis="y", alpha=0.3)
    axes.set_xlabel(f"{data.metric_label}, % (point: one seed, line: mean)")
    axes.set_title(f"{data.name}: equal training compute")


def draw_curves(record: dict[str, Any], data: StudyData, folder: Path) -> Path | None:
    """Draw the metric during the runs that were evaluated in between, over compute. `None` if there are none."""
    runs = [run for run in record["runs"] if "curve" in run]
    if not runs:
        return None
    seconds, budget = record["step_seconds"], record["step_seconds"]["CLIP"] * clip_steps(record)
    figure, axes = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    for run in sorted(runs, key=lambda run: list(record["arms"]).index(run["arm"])):
        steps = sorted(map(int, run["curve"]))
        compute = [step * seconds[run["arm"]] / budget for step in steps]
        axes.plot(compute, [run["curve"][str(step)][data.metric] for step in steps], "o-", label=run["arm"])
    axes.set_xlabel(f"compute, in multiples of {clip_steps(record)} steps of CLIP")
    axes.set_ylabel(f"{data.metric_label}, %")
    axes.set_title(f"{data.name}: validation during training")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"study_{data.name}{device_suffix(record)}_curves.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def draw_ratios(axes: Axes, runs_of: dict[str, list[dict[str, Any]]], data: StudyData) -> None:
    for arm, runs in runs_of.items():
        ratios = sorted(runs[0]["at_ratio"], key=float)
        means = [statistics.mean(run["at_ratio"][ratio][data.metric] for run in runs) for ratio in ratios]
        axes.plot([float(ratio) for ratio in ratios], means, "o-", label=arm)
    axes.set_xlabel("merge ratio at inference")
    axes.set_ylabel(f"{data.metric_label}, %")
    axes.set_title("merge ratio set after training")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(fontsize=8)


def print_study(record: dict[str, Any], data: StudyData) -> None:
    print(f"# {data.name}: {record['machine']}\n")
    if "costs_of" in record:
        print(f"Steps at equal compute: mean of {len(record['costs_of']['calibrations'])} calibrations on "
              f"{record['costs_of']['machine']}\n")  # fmt: skip
    titles = {
        **{"compute": "Equal compute", "steps": "Equal steps"},
        **{"short": "60 % of CLIP's compute", "long": "Five times CLIP's compute"},
    }
    for equal, title in titles.items():
        if rows := metrics_table(record, equal):
            print(f"{title}:\n{format_table(rows)}\n")
    for title, rows in (
        ("Merge ratio set after training", ratio_table(record, data.metric)),
        ("frequency_embed_weight set after training", weight_table(record, data.metric)),
    ):
        if rows:
            print(f"{title}, {data.metric_label}:\n{format_table(rows)}\n")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=FOLDER / "results", help="Folder of the result files.")
    parser.add_argument("--output_dir", type=Path, default=IMAGES, help="Folder for the figures.")
    flags = parser.parse_args(arguments)
    for path in sorted([*flags.results.glob("*.json"), *flags.results.glob("gpu/*.json")]):
        record = json.loads(path.read_text())
        data = read_study_data(path.stem)
        print_study(record, data)
        for path in (draw_study(record, data, flags.output_dir), draw_curves(record, data, flags.output_dir)):
            if path is not None:
                print(f"Figure written to {path}\n")


if __name__ == "__main__":
    main()
