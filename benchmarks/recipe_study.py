# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Recipes of fine-tuning: what each gains on new data, and what it loses on the data of the starting model.

    python benchmarks/recipe_study.py --old flickr8k --old_files train.parquet validation.parquet \\
        --new noto-emoji --new_files train.parquet test.parquet --folder runs/fine-tuning

It trains a CLIP model of the configuration `tiny` on the old data, and fine-tunes it on the new data with each recipe
and seed. WiSE-FT interpolates between the weights at the start and at the end, as `mlip interpolate` does. The
reference pairs of a recipe are the training pairs of the old data. Data sets are those of the study, see
study/study_data.py.

Then it turns merging on in the starting model, with and without distillation. For a starting model that was trained
without merging:

    python benchmarks/recipe_study.py --old noto-emoji --old_files train.parquet test.parquet \\
        --new noto-emoji --new_files train.parquet test.parquet --folder runs/unmerged --recipes \\
        --config_name nano --start_merge_ratio 0 --pretraining_steps 160 --result_file runs/merging.json

Of each validation split, the first half is reported, and the second half chooses the alpha of interpolation. Runs that
are in the result file are not repeated.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPProcessor, set_seed

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.evaluation.interpolation import choose_alpha, interpolate_weights
from modeling_mlip.hub.configurations import named_config, override_config
from modeling_mlip.hub.formatting import format_table
from modeling_mlip.training.arguments import MLIPTrainingArguments
from modeling_mlip.training.trainer import MLIPTrainer

sys.path.insert(0, str(Path(__file__).parent / "study"))
from run import CLIP, MAX_SEQ_LENGTH, describe_processor, evaluate_arm, flatten, write_record  # noqa: E402
from study_data import InMemoryPairs, load_study_data, read_study_data  # noqa: E402

RESULT_FILE = Path(__file__).parent / "results" / "recipe_study.json"
PLAIN = "plain fine-tuning"
RECIPES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "LoRA": {"lora_rank": 16, "learning_rate": 3e-3},
    "LiT (image tower frozen)": {"freeze": "image"},
    "layer decay": {"layer_decay": 0.65},
    "EMA": {"ema_decay": 0.97},
    "self-distillation": {"keep_weight": 2.0},
    "self-distillation, weight 10": {"keep_weight": 10.0},
    "self-distillation, weight 30": {"keep_weight": 30.0},
    "self-distillation, references": {"keep_weight": 2.0, "reference_weight": 30.0},
}
DISTILLED = {"distill_unmerged": 10.0, "freeze": "text"}
# Ways to turn merging on.
MERGING_RECIPES: dict[str, dict[str, Any]] = {
    "distilled": DISTILLED,
    "fine-tuned": {},
    "distilled, learning rate 5e-4": {**DISTILLED, "learning_rate": 5e-4},
    "fine-tuned, learning rate 5e-4": {"learning_rate": 5e-4},
    "distilled, weight 100, learning rate 5e-4": {**DISTILLED, "distill_unmerged": 100.0, "learning_rate": 5e-4},
}
PATCH_SIZE = 8  # that of "tiny"
ALPHAS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Recipes whose end is interpolated with the start, and the name of the result.
INTERPOLATED = {
    PLAIN: "WiSE-FT",
    "self-distillation": "self-distillation and WiSE-FT",
    "self-distillation, weight 10": "self-distillation, weight 10, and WiSE-FT",
    "self-distillation, weight 30": "self-distillation, weight 30, and WiSE-FT",
    "self-distillation, references": "self-distillation, references, and WiSE-FT",
}
SETTINGS = {
    "pretraining": {"max_steps": 200, "per_device_train_batch_size": 128, "learning_rate": 1e-3},
    "fine_tuning": {"max_steps": 120, "per_device_train_batch_size": 64, "learning_rate": 1e-3},
    "merging": {"max_steps": 20, "per_device_train_batch_size": 128, "learning_rate": 1e-4},
    "fine_tuning_merge_ratio": 0.5,
    "merging_ratios": [0.5, 0.7],
}


class Data:
    """A data set in memory: its pairs to train on, and the halves of its validation split."""

    def __init__(self, name: str, files: list[str]):
        # The mean of several recalls has less noise than recall@1.
        self.augmented = read_study_data(name, *files)
        self.data = replace(self.augmented, recall_at=(1, 5, 10), shift=0)
        loaded = load_study_data(self.data)
        self.images, self.captions = loaded["train"]
        images, captions = loaded["validation"]
        half = len(images) // 2
        self.halves = {
            "reported": {"validation": (images[:half], captions[:half]), "labels": {}},
            "choice": {"validation": (images[half:], captions[half:]), "labels": {}},
        }

    def pairs(self) -> InMemoryPairs:
        return InMemoryPairs(self.images, self.captions, self.augmented)

    def measure(self, model: MLIPModel, tokenizer: Any, half: str = "reported") -> float:
        """The mean of recall@1, @5 and @10 in both directions, in percent, on one half of the validation split."""
        return evaluate_arm(self.data, model, tokenizer, self.halves[half], bf16=False)["mean_recall"]


def train_in_place(
    model: MLIPModel,
    processor: CLIPProcessor,
    data: Data,
    seed: int,
    references: Data | None = None,
    **arguments: Any,
) -> float:
    """Train a model in place. Returns the processor seconds."""
    with tempfile.TemporaryDirectory() as folder:
        args = MLIPTrainingArguments(
            folder,
            **arguments,
            seed=seed,
            use_cpu=True,
            save_strategy="no",
            report_to="none",
            logging_steps=20,
        )
        trainer = MLIPTrainer(
            model,
            args,
            train_dataset=data.pairs(),
            processing_class=processor,
            reference_dataset=references.pairs() if references is not None else None,
        )
        start = time.process_time()
        trainer.train()
    return round(time.process_time() - start, 1)


def pretrain(old: Data, folder: Path, start: dict[str, Any], arguments: dict[str, Any]) -> float | None:
    """Train the starting model and save it, unless the folder holds it. Returns the processor seconds.

    Args:
        start: `config_name`, and the merge ratio of the first step, which falls to 0: `start_merge_ratio`, 0 for no
            merging.
        arguments: of training.
    """
    if (folder / "config.json").is_file():
        return None
    set_seed(0)
    tokenizer = train_tokenizer(flatten(old.captions), max_seq_length=MAX_SEQ_LENGTH)
    size = {"height": old.data.image_size, "width": old.data.image_size}
    processor = CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), tokenizer)
    sizes = {"image_size": old.data.image_size, "patch_size": PATCH_SIZE}
    config = override_config(named_config(start["config_name"]), {**CLIP, **sizes})
    text = config.text_config.to_dict() | {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    text |= {"vocab_size": len(tokenizer), "max_position_embeddings": MAX_SEQ_LENGTH}
    config = MLIPConfig(**{**config.to_dict(), "text_config": text})
    model = MLIPModel._from_config(config, attn_implementation="eager")
    schedule = {"start_merge_ratio": start["start_merge_ratio"] or None}
    seconds = train_in_place(model, processor, old, 0, **arguments, **schedule)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return seconds


class RecipeStudy:
    """The starting model, both data sets and the result file."""

    def __init__(self, old: Data, new: Data, folder: Path, path: Path, settings: dict[str, Any]):
        self.old, self.new, self.folder, self.path, self.settings = old, new, folder, path, settings
        self.processor = CLIPProcessor.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.record = json.loads(path.read_text()) if path.is_file() else {"settings": settings, "runs": []}

    def load(self, merge_ratio: float) -> MLIPModel:
        model = MLIPModel.from_pretrained(self.folder, attn_implementation="eager")
        model.set_merge_ratio(merge_ratio)
        return model

    def measure(self, model: MLIPModel, half: str = "reported") -> dict[str, float]:
        return {name: getattr(self, name).measure(model, self.tokenizer, half) for name in ("new", "old")}

    def has(self, recipe: str, seed: int) -> bool:
        return any((run["recipe"], run["seed"]) == (recipe, seed) for run in self.record["runs"])

    def add(self, recipe: str, seed: int, **values: Any) -> None:
        self.record["runs"].append({"recipe": recipe, "seed": seed, **values})
        write_record(self.path, self.record)
        print(self.record["runs"][-1], flush=True)

    def fine_tune(self, recipe: str, seed: int) -> None:
        """Run one recipe on the new data, and interpolate between the start and its end if `INTERPOLATED` says so."""
        is_interpolated = recipe not in INTERPOLATED or self.has(INTERPOLATED[recipe], seed)
        if self.has(recipe, seed) and is_interpolated:
            return
        set_seed(seed)
        model = self.load(self.settings["fine_tuning_merge_ratio"])
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        arguments = self.settings["fine_tuning"] | RECIPES[recipe]
        references = self.old if "reference_weight" in arguments else None
        seconds = train_in_place(model, self.processor, self.new, seed, references, **arguments)
        if not self.has(recipe, seed):
            self.add(recipe, seed, arguments=RECIPES[recipe], cpu_seconds=seconds, **self.measure(model))
        if is_interpolated:
            return
        end = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        by_alpha = {}
        for alpha in ALPHAS:
            model.load_state_dict(interpolate_weights(start, end, alpha))
            by_alpha[alpha] = tuple(self.measure(model, "choice").values())
        alpha = choose_alpha(by_alpha)
        model.load_state_dict(interpolate_weights(start, end, alpha))
        chosen_on = {f"{value:g}": accuracies for value, accuracies in by_alpha.items()}
        self.add(INTERPOLATED[recipe], seed, alpha=alpha, chosen_on=chosen_on, **self.measure(model))

    def turn_merging_on(self, merge_ratio: float, name: str, seed: int) -> None:
        """Train the starting model at a merge ratio on its own data, by an entry of `MERGING_RECIPES`."""
        recipe = f"merging at {merge_ratio:g}, {name}"
        if self.has(recipe, seed):
            return
        set_seed(seed)
        model = self.load(merge_ratio)
        arguments = self.settings["merging"] | MERGING_RECIPES[name]
        seconds = train_in_place(model, self.processor, self.old, seed, **arguments)
        recall = self.old.measure(model, self.tokenizer)
        self.add(recipe, seed, arguments=MERGING_RECIPES[name], cpu_seconds=seconds, old=recall)


def summarize(runs: list[dict[str, Any]]) -> list[dict[str, str]]:
    """One row for each recipe: means and standard deviations over seeds, and shares of what plain fine-tuning gains and
    loses."""
    by_recipe: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        by_recipe.setdefault(run["recipe"], []).append(run)
    [start] = by_recipe[f"start at {SETTINGS['fine_tuning_merge_ratio']:g}"]

    def change(recipe: str, name: str) -> float:
        return statistics.mean(run[name] for run in by_recipe[recipe]) - start[name]

    def share(recipe: str, name: str) -> str:
        plain = change(PLAIN, name)
        return f"{100 * change(recipe, name) / plain:.0f} %" if plain else ""

    rows = []
    for recipe, of_recipe in by_recipe.items():
        row = {"recipe": recipe, "seeds": str(len(of_recipe))}
        for name in ("new", "old"):
            values = [run[name] for run in of_recipe if name in run]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            row[name] = f"{statistics.mean(values):.2f}{spread}" if values else ""
        if PLAIN in by_recipe and (recipe in RECIPES or recipe in INTERPOLATED.values()):
            row["gain / plain's"] = share(recipe, "new")
            row["loss / plain's"] = share(recipe, "old")
        rows.append(row)
    return rows


def build_settings(config_name: str, start_merge_ratio: float, pretraining_steps: int | None) -> dict[str, Any]:
    """`SETTINGS` with the starting model; `pretraining_steps` also sets the steps that turn merging on, a tenth."""
    settings = {**SETTINGS, "start": {"config_name": config_name, "start_merge_ratio": start_merge_ratio}}
    if pretraining_steps is not None:
        for name, steps in (("pretraining", pretraining_steps), ("merging", pretraining_steps // 10)):
            settings[name] = {**SETTINGS[name], "max_steps": steps}
    return settings


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("old", "new"):
        parser.add_argument(f"--{name}", required=True, help=f"The {name} data: a name in study/data or a .json file.")
        parser.add_argument(
            f"--{name}_files",
            nargs=2,
            metavar=("TRAIN", "VALIDATION"),
            required=True,
            help=f"The two files of the {name} data.",
        )
    parser.add_argument("--folder", type=Path, required=True, help="Folder of the starting model, trained if empty.")
    parser.add_argument("--config_name", default="tiny", help="Configuration of the starting model.")
    parser.add_argument("--start_merge_ratio", type=float, default=0.9, help="Merge ratio of its first step.")
    parser.add_argument("--pretraining_steps", type=int, help="Its training steps; a tenth of them turn merging on.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=list(RECIPES), help="Recipes to run.")
    parser.add_argument("--no_merging", dest="merging", action="store_false", help="Leave out the runs of merging.")
    parser.add_argument("--result_file", type=Path, default=RESULT_FILE)
    flags = parser.parse_args(arguments)
    settings = build_settings(flags.config_name, flags.start_merge_ratio, flags.pretraining_steps)
    torch.set_num_threads(1)
    old, new = Data(flags.old, flags.old_files), Data(flags.new, flags.new_files)
    seconds = pretrain(old, flags.folder, settings["start"], settings["pretraining"])
    study = RecipeStudy(old, new, flags.folder, flags.result_file, settings)
    study.record["machine"] = describe_processor()
    if seconds is not None:
        study.record["pretraining_cpu_seconds"] = seconds
    ratios = (0.0, *settings["merging_ratios"])
    for ratio in ratios if not study.has("start at 0", 0) else ():
        study.add(f"start at {ratio:g}", 0, **study.measure(study.load(ratio)))
    for seed in flags.seeds:
        for recipe in flags.recipes:
            study.fine_tune(recipe, seed)
    for seed in flags.seeds if flags.merging else ():
        for ratio in settings["merging_ratios"]:
            for name in MERGING_RECIPES:
                study.turn_merging_on(ratio, name, seed)
    print(format_table(summarize(study.record["runs"])))


if __name__ == "__main__":
    main()
