# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The study: CLIP, CLIP with ToMe, ELIP, MLIP and MLIP without each of its parts, at equal steps and at equal compute.

    python benchmarks/study/run.py --data noto-emoji --train_file train.parquet --validation_file test.parquet
    python benchmarks/study/run.py --data shapes
    python benchmarks/study/figures.py

Every arm is the same program (`MLIPTrainer`, `tiny`), data, schedule and initialisation; what differs is the part of
the configuration that `ARMS` names. Compute is CPU time of training steps on one core: `calibrate` measures all arms in
turn, and an arm at equal compute trains for as many steps as CLIP's time buys. Decoding is left out: images are decoded
once and augmented in batches. What is done is not done again, so an interrupted study goes on.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import DatasetDict, concatenate_datasets
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPProcessor, set_seed

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.data.items import read_image
from modeling_mlip.data.shapes import ATTRIBUTES, PROMPTS
from modeling_mlip.data.sources import load_pairs
from modeling_mlip.evaluation.embedding import class_embeddings, evaluating
from modeling_mlip.evaluation.metrics import retrieval_metrics, zero_shot_metrics
from modeling_mlip.hub.configurations import named_config, override_config
from modeling_mlip.training.arguments import MLIPTrainingArguments
from modeling_mlip.training.trainer import MLIPTrainer

RESULTS = Path(__file__).parent / "results"
CLIP = {"frequency_layers": 0, "frequency_loss_weight": 0, "token_loss_weight": 0}
HALF = {"merge_ratio": 0.5}
FALLING = {"start_merge_ratio": 0.9}  # an argument of training, not a key of the configuration
ARMS: dict[str, dict[str, Any]] = {
    "CLIP": CLIP,
    "CLIP + ToMe": {**CLIP, **HALF, "merge_method": "tome"},
    "CLIP + ToMe, falling ratio": {**CLIP, **HALF, **FALLING, "merge_method": "tome"},
    "ELIP": {**CLIP, **HALF, "merge_method": "elip"},
    "MLIP": {**HALF, **FALLING},
    "MLIP, no frequency": {**HALF, **FALLING, "frequency_layers": 0, "frequency_loss_weight": 0},
    "MLIP, no token loss": {**HALF, **FALLING, "token_loss_weight": 0},
    "MLIP, no guide": {**HALF, **FALLING, "merge_importance_weight": 0},
    "MLIP, no falling ratio": HALF,
    "MLIP, no merging": {},
    "MLIP at 0.3": {"merge_ratio": 0.3, **FALLING},
    "MLIP at 0.7": {"merge_ratio": 0.7, **FALLING},
}
INFERENCE_RATIOS = (0.0, 0.3, 0.5, 0.7)
# Evaluated at all of them.
SWEPT = ("MLIP", "MLIP, no merging", "MLIP at 0.3", "MLIP at 0.7")
# What the frequency embedding counts in that of an image; every arm that has one is evaluated at all of them.
EMBED_WEIGHTS = (0.0, 0.25, 0.5, 1.0)
# Pairs per step, peak learning rate, CLIP's steps, and what augmentation does: shift in image sides, scale, colour.
DATA: dict[str, dict[str, Any]] = {
    "noto-emoji": {"batch": 128, "learning_rate": 5e-4, "steps": 300, "shift": 0.125, "scale": 0.15, "colour": 0.2},
    "shapes": {"batch": 64, "learning_rate": 1e-3, "steps": 500, "shift": 0.0, "scale": 0.0, "colour": 0.0},
}
SPLIT_SEED = 0
EVALUATION_COPIES = 4  # of the held-out images: as they are, and shifted and scaled, to narrow the noise
MEAN, STD = 0.5, 0.27


class CachedPairs(Dataset):
    """Images decoded once, uint8 `(N, 3, S, S)`; a batch is augmented as a whole."""

    def __init__(self, images: torch.Tensor, captions: list[str], shift: float, scale: float, colour: float):
        self.images, self.captions = images, captions
        self.shift, self.scale, self.colour = shift, scale, colour

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        pixels = augment(self.images[indices].float() / 255, self.shift, self.scale, self.colour)
        return [
            {"pixel_values": image, "captions": [self.captions[i]], "image_id": str(i), "where": f"row {i}"}
            for image, i in zip((pixels - MEAN) / STD, indices, strict=True)
        ]


def augment(
    images: torch.Tensor, shift: float, scale: float, colour: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """Moves, scales and recolours each image `(B, 3, S, S)` of values 0 to 1 by its own random amount; white beyond."""
    B = len(images)
    zoom, x, y, brightness, contrast = 2 * torch.rand(5, B, generator=generator) - 1
    if shift or scale:
        theta = torch.zeros(B, 2, 3)
        theta[:, 0, 0] = theta[:, 1, 1] = 1 + scale * zoom
        theta[:, :, 2] = 2 * shift * torch.stack([x, y], dim=1)
        grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
        images = 1 - torch.nn.functional.grid_sample(1 - images, grid, align_corners=False)
    if colour:
        brightness, contrast = (1 + colour * amount[:, None, None, None] for amount in (brightness, contrast))
        images = ((images * brightness - 0.5) * contrast + 0.5).clamp(0, 1)
    return images


def load(flags: argparse.Namespace) -> dict[str, Any]:
    """Both splits as uint8 images `(N, 3, S, S)` and captions, with the labels of the drawn shapes."""
    files = {"train_file": flags.train_file, "validation_file": flags.validation_file}
    splits = load_pairs(dataset_name="shapes") if flags.data == "shapes" else load_pairs(**files)
    if flags.data == "noto-emoji":
        splits = fresh_split(splits)
    found: dict[str, Any] = {}
    for split, rows in splits.items():
        images = [image if hasattr(image, "mode") else read_image(image["bytes"], None) for image in rows["image"]]
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        captions = [text if isinstance(text, str) else text[0] for text in rows["caption"]]
        found[split] = (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), captions)
    if flags.data == "shapes":
        found["labels"] = {name: torch.tensor(splits["validation"][name][:]) for name in PROMPTS}
    return found


def fresh_split(splits: DatasetDict) -> DatasetDict:
    """As many held-out pairs as the published split has, drawn from its training pairs, the rest to train on.

    The method and its settings were chosen on the published held-out pairs, so they can confirm nothing. As there,
    every word of a held-out caption occurs in training.
    """
    train, chosen_on = splits["train"], splits["validation"]
    words, others = ([set(text.lower().split()) for text in rows["caption"]] for rows in (train, chosen_on))
    left = Counter(word for own in words + others for word in own)  # captions of those to train on that have a word
    held_out: list[int] = []
    for row in np.random.default_rng(SPLIT_SEED).permutation(len(train)).tolist():
        if len(held_out) < len(chosen_on) and all(left[word] > 1 for word in words[row]):
            held_out.append(row)
            left.subtract(words[row])
    rest = sorted(set(range(len(train))) - set(held_out))
    return DatasetDict(
        train=concatenate_datasets([train.select(rest), chosen_on]), validation=train.select(sorted(held_out))
    )


def build_model(arm: str, tokenizer: Any) -> MLIPModel:
    overrides = {name: value for name, value in ARMS[arm].items() if name != "start_merge_ratio"}
    config = override_config(named_config("tiny"), overrides)
    text = config.text_config.to_dict() | {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = MLIPConfig(**{**config.to_dict(), "text_config": {**text, "vocab_size": len(tokenizer)}})
    return MLIPModel._from_config(config, attn_implementation="eager")


def calibrate(flags: argparse.Namespace) -> dict[str, float]:
    """CPU seconds of a training step of each arm: the median of rounds in which all arms take turns.

    Of an arm whose merge ratio falls, the mean over three points of its way.
    """
    torch.set_num_threads(1)
    set_seed(0)
    settings, (images, captions) = DATA[flags.data], load(flags)["train"]
    tokenizer = train_tokenizer(captions, max_seq_length=32)
    batch = settings["batch"]
    text = tokenizer(captions[:batch], padding=True, truncation=True, max_length=32, return_tensors="pt")
    pixels = (images[:batch].float() / 255 - MEAN) / STD
    models = {arm: build_model(arm, tokenizer).train() for arm in ARMS}
    optimizers = {arm: torch.optim.AdamW(model.parameters(), lr=1e-5) for arm, model in models.items()}
    seconds: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for _ in tqdm(range(flags.calibration_rounds + 1), desc="calibration"):
        for arm, model in models.items():
            own, start_ratio = ARMS[arm].get("merge_ratio", 0), ARMS[arm].get("start_merge_ratio")
            ratios = [own] if start_ratio is None else [start_ratio + (own - start_ratio) * k / 6 for k in (1, 3, 5)]
            taken = []
            for ratio in ratios:
                model.set_merge_ratio(ratio)
                start = time.process_time()
                with torch.autocast("cpu", torch.bfloat16, enabled=flags.bf16):
                    loss = model(**text, pixel_values=pixels, return_loss=True).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizers[arm].step()
                optimizers[arm].zero_grad()
                taken.append(time.process_time() - start)
            seconds[arm].append(taken)
    return {
        arm: statistics.mean(statistics.median(values) for values in zip(*rounds[1:], strict=True))
        for arm, rounds in seconds.items()
    }


def train_one(flags: argparse.Namespace, arm: str, seed: int, steps: int) -> dict[str, Any]:
    """Trains an arm and evaluates it along the way and at the end; all that the results keep of a run."""
    torch.set_num_threads(1)
    set_seed(seed)
    settings, data = DATA[flags.data], load(flags)
    images, captions = data["train"]
    tokenizer = train_tokenizer(captions, max_seq_length=32)
    size = {"height": 64, "width": 64}
    image_processor = CLIPImageProcessor(size=size, crop_size=size, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    model = build_model(arm, tokenizer)
    dataset = CachedPairs(images, captions, settings["shift"], settings["scale"], settings["colour"])
    with tempfile.TemporaryDirectory() as folder:
        trainer = MLIPTrainer(
            model,
            MLIPTrainingArguments(
                folder,
                max_steps=steps,
                start_merge_ratio=ARMS[arm].get("start_merge_ratio"),
                per_device_train_batch_size=settings["batch"],
                learning_rate=settings["learning_rate"],
                seed=seed,
                bf16=flags.bf16,
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=steps,
            ),
            train_dataset=dataset,
            processor=CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer),
        )
        start = time.process_time()
        trainer.train()
    trained = time.process_time() - start
    ratios = sorted({*INFERENCE_RATIOS, model.config.merge_ratio}) if arm in SWEPT else [None]
    at = {}
    for ratio in ratios:
        if ratio is not None:
            model.set_merge_ratio(ratio)
        at["trained" if ratio is None else f"{ratio:g}"] = evaluate(flags, model, tokenizer, data)
    own = ARMS[arm].get("merge_ratio", 0)
    measured = at[f"{own:g}"] if arm in SWEPT else at["trained"]
    model.set_merge_ratio(own)
    at_weight, trained_weight = {}, model.config.frequency_embed_weight
    for weight in EMBED_WEIGHTS if trained_weight else ():
        model.config.frequency_embed_weight = weight
        at_weight[f"{weight:g}"] = measured if weight == trained_weight else evaluate(flags, model, tokenizer, data)
    run = {"arm": arm, "seed": seed, "steps": steps, "cpu_seconds": round(trained, 1)}
    return {**run, **measured, "at_ratio": at, **({"at_embed_weight": at_weight} if at_weight else {})}


def evaluate(flags: argparse.Namespace, model: MLIPModel, tokenizer: Any, data: dict[str, Any]) -> dict[str, float]:
    """Recall@1 both ways, the mean over copies of the held-out images, and zero-shot accuracies for the shapes."""
    settings, (images, captions) = DATA[flags.data], data["validation"]
    generator = torch.Generator().manual_seed(0)
    copies = [images.float() / 255]
    if settings["shift"]:
        amounts = (settings["shift"] / 2, settings["scale"] / 2, settings["colour"] / 2)
        copies += [augment(copies[0], *amounts, generator) for _ in range(EVALUATION_COPIES - 1)]
    text = tokenizer(captions, padding=True, truncation=True, max_length=32, return_tensors="pt")
    caption_ids = torch.unique(torch.tensor([captions.index(text) for text in captions]), return_inverse=True)[1]
    normalize = torch.nn.functional.normalize
    rows, embeds = [], []
    with evaluating(model), torch.autocast("cpu", torch.bfloat16, enabled=flags.bf16):
        text_embeds = normalize(model.get_text_features(**text).pooler_output.float(), dim=-1)
        for copy in copies:
            parts = [model.get_image_features((part - MEAN) / STD).pooler_output for part in copy.split(100)]
            embeds.append(normalize(torch.cat(parts).float(), dim=-1))
            rows.append(retrieval_metrics(embeds[-1], text_embeds, torch.arange(len(captions)), caption_ids))
    names = ("text_to_image_recall@1", "image_to_text_recall@1")
    found = {name: statistics.mean(row[name] for row in rows) for name in names}
    found["recall@1"] = statistics.mean(found.values())
    for name, labels in data.get("labels", {}).items():
        classes = class_embeddings(model, tokenizer, ATTRIBUTES[name], [PROMPTS[name]], "cpu", 32)
        found[f"{name}_accuracy"] = zero_shot_metrics(embeds[0], labels, classes)["accuracy@1"]
    return {name: round(value, 2) for name, value in found.items()}


def machine() -> str:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?: ?")
    return f"{cpu.partition(': ')[2]} ({platform.machine()}), one core for each run; torch {torch.__version__}"


def steps_of(record: dict[str, Any], arm: str, equal: str) -> int:
    """Steps of an arm: CLIP's ("steps"), what CLIP's time buys ("compute"), or what 60 % of it buys ("short")."""
    seconds, steps = record["step_seconds"], record["data"]["steps"]
    bought = steps * seconds["CLIP"] / seconds[arm]
    return {"steps": steps, "compute": round(bought), "short": round(0.6 * bought)}[equal]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, required=True)
    parser.add_argument("--train_file", help="Pairs to train on, for noto-emoji.")
    parser.add_argument("--validation_file", help="Pairs to evaluate on, for noto-emoji.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="Only these.")
    parser.add_argument(
        "--equal",
        nargs="+",
        choices=["compute", "steps", "short"],
        default=["compute", "steps"],
        help="Train for the steps that CLIP's time buys, for CLIP's steps, or for those that 60 % of its time buys.",
    )
    parser.add_argument("--parallel", type=int, default=max(os.cpu_count() or 1, 1), help="Runs at a time.")
    parser.add_argument("--calibration_rounds", type=int, default=10)
    parser.add_argument("--no_bf16", dest="bf16", action="store_false", help="Train in float32.")
    parser.add_argument("--run", nargs=3, metavar=("ARM", "SEED", "STEPS"), help="One run, printed as JSON.")
    flags = parser.parse_args()
    if flags.data == "noto-emoji" and not (flags.train_file and flags.validation_file):
        parser.error("--data noto-emoji needs --train_file and --validation_file.")
    if flags.run:
        print(json.dumps(train_one(flags, flags.run[0], int(flags.run[1]), int(flags.run[2]))))
        return

    path = RESULTS / f"{flags.data}.json"
    record = json.loads(path.read_text()) if path.exists() else {"arms": ARMS, "data": DATA[flags.data], "runs": []}
    if record["arms"] != ARMS or record["data"] != DATA[flags.data] or record.get("bf16", flags.bf16) != flags.bf16:
        raise SystemExit(f"{path} was measured with other settings; move it away to measure again.")
    if "step_seconds" not in record:
        record |= {"machine": machine(), "bf16": flags.bf16, "step_seconds": calibrate(flags)}
        write(path, record)
    done = {(run["arm"], run["seed"], run["steps"]) for run in record["runs"]}
    runs = [
        (arm, seed, steps_of(record, arm, equal)) for equal in flags.equal for seed in flags.seeds for arm in flags.arms
    ]
    waiting = [run for run in dict.fromkeys(runs) if run not in done]
    program = [arg for arg in sys.argv[1:] if arg != "--no_bf16"] + ([] if flags.bf16 else ["--no_bf16"])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

    def start(run: tuple[str, int, int]) -> dict[str, Any]:
        command = [sys.executable, __file__, *program, "--run", *map(str, run)]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"{run} failed:\n{finished.stderr[-3000:]}")
        return json.loads(finished.stdout.splitlines()[-1])

    carry_out(start, waiting, flags.parallel, record, path)


def carry_out(start: Callable, waiting: list[tuple], parallel: int, record: dict[str, Any], path: Path) -> None:
    """Does all runs, and keeps each as it finishes; after one that fails, those that are on their way still."""
    with ThreadPoolExecutor(parallel) as pool:
        running = [pool.submit(start, run) for run in waiting]
        failed = None
        for finished in tqdm(as_completed(running), total=len(running), desc="runs"):
            if finished.cancelled():
                continue
            failed = failed or finished.exception()
            if failed is not None:
                for run in running:
                    run.cancel()
            if finished.exception() is None:
                record["runs"].append(finished.result())
                write(path, record)
    if failed is not None:
        raise failed


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(record, indent=1) + "\n")
    aside.replace(path)


if __name__ == "__main__":
    main()
