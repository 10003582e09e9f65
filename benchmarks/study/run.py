# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The study: CLIP, FLIP, growing images, ToMe, ELIP, MLIP and MLIP without each of its parts, at equal compute and at
equal steps.

    python benchmarks/study/run.py --data noto-emoji --train_file train.parquet --validation_file test.parquet
    python benchmarks/study/run.py --data shapes
    python benchmarks/study/run.py --data flickr8k --train_file train.parquet --validation_file validation.parquet
    python benchmarks/study/figures.py

A data set is a JSON file, see study_data.py; `--data my-data.json` takes one of yours. All arms use `MLIPTrainer`, the
configuration of the data set, the same data, schedule and initialisation. They differ in the overrides in `ARMS`.

Compute is the CPU time of training steps on one core. `calibrate` measures it for the requested arms and CLIP in turn,
and counts their FLOPs. An arm at equal compute trains for as many steps as fit into CLIP's time. Decoding is not
measured: images are decoded once, before training, and augmented in batches. Runs that are in the result file are not
repeated, so an interrupted study resumes, and arms can be added to it.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from study_data import PIXEL_MEAN, PIXEL_STD, InMemoryPairs, StudyData, augment, load_study_data, read_study_data
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPImageProcessor, CLIPProcessor, TrainerCallback, set_seed

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.data.caption_tokenizer import train_tokenizer
from modeling_mlip.evaluation.embedding import class_embeddings, evaluating
from modeling_mlip.evaluation.metrics import retrieval_metrics, zero_shot_metrics
from modeling_mlip.hub.configurations import named_config, override_config
from modeling_mlip.training.arguments import MLIPTrainingArguments
from modeling_mlip.training.objective import Objective
from modeling_mlip.training.schedules import StepSchedule, resize_images
from modeling_mlip.training.trainer import MLIPTrainer

RESULTS = Path(__file__).parent / "results"
CLIP = {"frequency_layers": 0, "frequency_loss_weight": 0, "token_loss_weight": 0}
# The two parts of MLIP that are off by default, because they gained no recall. "MLIP" is the default.
PARTS = {"token_loss_weight": 0.1, "merge_importance_weight": 0.1}
HALF = {"merge_ratio": 0.5}
FALLING = {"start_merge_ratio": 0.9}  # a training argument, not a configuration key
# Keys of an arm that are training arguments; all others are configuration keys.
SCHEDULE = ("start_merge_ratio", "start_patch_dropout", "steps_without_patch_dropout", "start_image_size")
ARMS: dict[str, dict[str, Any]] = {
    "CLIP": CLIP,
    "FLIP": {**CLIP, "patch_dropout": 0.5, "steps_without_patch_dropout": 0.1},
    "FLIP, falling dropout": {**CLIP, "patch_dropout": 0.5, "start_patch_dropout": 0.9},
    "Growing images": {**CLIP, "start_image_size": 32},
    "CLIP + ToMe": {**CLIP, **HALF, "merge_method": "tome"},
    "CLIP + ToMe, falling ratio": {**CLIP, **HALF, **FALLING, "merge_method": "tome"},
    "ELIP": {**CLIP, **HALF, "merge_method": "elip"},
    "MLIP": {**HALF, **FALLING},
    "MLIP, all parts": {**PARTS, **HALF, **FALLING},
    "MLIP, all parts but frequency": {**PARTS, **HALF, **FALLING, "frequency_layers": 0, "frequency_loss_weight": 0},
    "MLIP, all parts but token loss": {**PARTS, **HALF, **FALLING, "token_loss_weight": 0},
    "MLIP, all parts but guide": {**PARTS, **HALF, **FALLING, "merge_importance_weight": 0},
    "MLIP, all parts but falling ratio": {**PARTS, **HALF},
    "MLIP, all parts but merging": PARTS,
    "MLIP, all parts, at 0.3": {**PARTS, "merge_ratio": 0.3, **FALLING},
    "MLIP, all parts, at 0.7": {**PARTS, "merge_ratio": 0.7, **FALLING},
    "MLIP but frequency": {**HALF, **FALLING, "frequency_layers": 0, "frequency_loss_weight": 0},
    "MLIP, SPARC token loss": {**HALF, **FALLING, "token_loss_type": "sparc", "token_loss_weight": 0.5},
    "MLIP, patch dropout": {**HALF, "start_patch_dropout": 0.8},
}
INFERENCE_RATIOS = (0.0, 0.3, 0.5, 0.7)
# Arms that are evaluated at every ratio of INFERENCE_RATIOS.
ARMS_AT_ALL_RATIOS = (
    *("MLIP", "MLIP, all parts", "MLIP, all parts but merging"),
    *("MLIP, all parts, at 0.3", "MLIP, all parts, at 0.7"),
)
# Values of frequency_embed_weight; arms with a frequency embedding are evaluated at all of them.
EMBED_WEIGHTS = (0.0, 0.25, 0.5, 1.0)
EVALUATION_COPIES = 4  # the validation images and 3 augmented copies: the mean has less noise
MAX_SEQ_LENGTH = 32
IMAGES_AT_ONCE, CAPTIONS_AT_ONCE = 100, 1000


# One run


def build_arm_model(arm: str, tokenizer: Any, data: StudyData, attn_implementation: str = "eager") -> MLIPModel:
    """Build the configuration of the data set, changed as an arm says, with the special ids of the tokenizer."""
    overrides = data.model | {name: value for name, value in ARMS[arm].items() if name not in SCHEDULE}
    config = named_config(data.config)
    if data.image_size != config.vision_config.image_size:
        overrides["image_size"] = data.image_size
    config = override_config(config, overrides)
    text = config.text_config.to_dict() | {
        name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")
    }
    config = MLIPConfig(**{**config.to_dict(), "text_config": {**text, "vocab_size": len(tokenizer)}})
    return MLIPModel._from_config(config, attn_implementation=attn_implementation)


def longest_caption(data: StudyData) -> int:
    """Tokens after which captions are cut off."""
    return min(MAX_SEQ_LENGTH, named_config(data.config).text_config.max_position_embeddings)


def attention_on(device: str) -> str:
    return "eager" if device == "cpu" else "sdpa"


def prepare_threads() -> None:
    """One thread: as many runs as cores go on beside each other."""
    torch.set_num_threads(1)


def read_device_clock(device: str) -> float:
    """CPU seconds of this process, or wall-clock seconds after the device has finished."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def train_arm(
    data: StudyData,
    arm: str,
    seed: int,
    steps: int,
    bf16: bool,
    device: str = "cpu",
    num_evaluations: int = 0,
    objective: Objective | None = None,
) -> dict[str, Any]:
    """Train and evaluate one arm; return its entry of the result file.

    Args:
        num_evaluations: number of evaluations during training, evenly spaced; "curve" holds their metrics.
        objective: losses of the run; `None` gives those of the model.
    """
    prepare_threads()
    set_seed(seed)
    loaded = load_study_data(data)
    images, captions = loaded["train"]
    tokenizer = train_tokenizer(flatten(captions), max_seq_length=longest_caption(data))
    size = {"height": data.image_size, "width": data.image_size}
    image_processor = CLIPImageProcessor(
        size=size, crop_size=size, image_mean=[PIXEL_MEAN] * 3, image_std=[PIXEL_STD] * 3
    )
    model = build_arm_model(arm, tokenizer, data, attention_on(device))

    def measure() -> dict[str, float]:
        return evaluate_arm(data, model, tokenizer, loaded, bf16)

    curve = CurveCallback(measure, [round(steps * n / num_evaluations) for n in range(1, num_evaluations)], device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MLIPTrainer(
            model,
            training_arguments(data, arm, seed, steps, bf16, folder, device),
            train_dataset=InMemoryPairs(images.to(device), captions, data),
            processing_class=CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer),
            callbacks=[curve],
            objective=objective,
        )
        start = read_device_clock(device)
        trainer.train()
    seconds_name = "cpu_seconds" if device == "cpu" else "seconds"
    seconds = read_device_clock(device) - start - curve.seconds
    run = {"arm": arm, "seed": seed, "steps": steps, seconds_name: round(seconds, 1)}
    run |= evaluate_settings(arm, model, measure)
    if num_evaluations:
        run["curve"] = {**curve.metrics, str(steps): {name: run[name] for name in measured_names(run)}}
    return run


class CurveCallback(TrainerCallback):
    """Evaluates a run during training, as it is evaluated at its end.

    Args:
        measure: returns the metrics of the model.
        steps: the training steps after which it is called.
    """

    def __init__(self, measure: Callable[[], dict[str, float]], steps: list[int], device: str):
        self.measure, self.steps, self.device = measure, set(steps), device
        self.metrics: dict[str, dict[str, float]] = {}
        self.seconds = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step not in self.steps:
            return
        start = read_device_clock(self.device)
        with torch.random.fork_rng():
            self.metrics[str(state.global_step)] = self.measure()
        self.seconds += read_device_clock(self.device) - start


def measured_names(run: dict[str, Any]) -> list[str]:
    """The metrics of a run."""
    return [name for name in run if "recall" in name or name.endswith("_accuracy")]


def training_arguments(
    data: StudyData, arm: str, seed: int, steps: int, bf16: bool, folder: str, device: str = "cpu"
) -> MLIPTrainingArguments:
    return MLIPTrainingArguments(
        folder,
        max_steps=steps,
        **{name: value for name, value in ARMS[arm].items() if name in SCHEDULE},
        per_device_train_batch_size=data.batch,
        learning_rate=data.learning_rate,
        seed=seed,
        bf16=bf16,
        use_cpu=device == "cpu",
        dataloader_pin_memory=False,  # the images are on the device
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=steps,
    )


def evaluate_settings(arm: str, model: MLIPModel, measure: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """Evaluate a trained model as it was trained, at other merge ratios and at other weights.

    Args:
        measure: returns the metrics of the model in its present setting.

    Returns:
        The metrics in the trained setting; "at_ratio", and with a frequency embedding "at_embed_weight", hold those of
        each setting.
    """
    trained_ratio = ARMS[arm].get("merge_ratio", 0)
    at_ratio = {}
    if arm in ARMS_AT_ALL_RATIOS:
        for ratio in sorted({*INFERENCE_RATIOS, model.config.merge_ratio}):
            model.set_merge_ratio(ratio)
            at_ratio[f"{ratio:g}"] = measure()
        metrics = at_ratio[f"{trained_ratio:g}"]
    else:
        metrics = at_ratio["trained"] = measure()
    model.set_merge_ratio(trained_ratio)
    at_weight, trained_weight = {}, model.config.frequency_embed_weight
    for weight in EMBED_WEIGHTS if trained_weight else ():
        model.config.frequency_embed_weight = weight
        at_weight[f"{weight:g}"] = metrics if weight == trained_weight else measure()
    return {**metrics, "at_ratio": at_ratio, **({"at_embed_weight": at_weight} if at_weight else {})}


def evaluate_arm(
    data: StudyData, model: MLIPModel, tokenizer: Any, loaded: dict[str, Any], bf16: bool
) -> dict[str, float]:
    """Recall in both directions, averaged over copies of the validation images, and zero-shot accuracies, in percent.

    Returns:
        `text_to_image_recall@k`, `image_to_text_recall@k` and their mean `recall@k` for each k of `recall_at`;
        `mean_recall`, the mean over several k; `COLUMN_accuracy` for each label column.
    """
    images, captions = loaded["validation"]
    generator = torch.Generator().manual_seed(0)
    copies = [images.float() / 255]
    if data.shift:
        amounts = (data.shift / 2, data.scale / 2, data.colour / 2)
        copies += [augment(copies[0], *amounts, generator) for _ in range(EVALUATION_COPIES - 1)]
    texts = flatten(captions)
    encoded = tokenizer(texts, padding=True, truncation=True, max_length=longest_caption(data), return_tensors="pt")
    caption_image = torch.repeat_interleave(torch.tensor([len(each) for each in captions]))
    first_place = {text: place for place, text in reversed(list(enumerate(texts)))}
    caption_ids = torch.unique(torch.tensor([first_place[text] for text in texts]), return_inverse=True)[1]
    normalize = torch.nn.functional.normalize
    recalls, image_embeds = [], []
    device = model.device.type
    with evaluating(model), torch.autocast(device, torch.bfloat16, enabled=bf16):
        slices = zip(
            *(encoded[name].to(device).split(CAPTIONS_AT_ONCE) for name in ("input_ids", "attention_mask")), strict=True
        )
        embeds = [model.get_text_features(ids, attention_mask=mask).pooler_output for ids, mask in slices]
        text_embeds = normalize(torch.cat(embeds).float(), dim=-1).cpu()
        for copy in copies:
            slices = ((pixels.to(device) - PIXEL_MEAN) / PIXEL_STD for pixels in copy.split(IMAGES_AT_ONCE))
            embeds = [model.get_image_features(pixels).pooler_output for pixels in slices]
            image_embeds.append(normalize(torch.cat(embeds).float(), dim=-1).cpu())
            recalls.append(retrieval_metrics(image_embeds[-1], text_embeds, caption_image, caption_ids))
    metrics = mean_recalls(recalls, data.recall_at)
    for name, (labels, class_names) in loaded["labels"].items():
        classes = class_embeddings(model, tokenizer, class_names, [data.zero_shot[name]], device, longest_caption(data))
        metrics[f"{name}_accuracy"] = zero_shot_metrics(image_embeds[0], labels, classes.cpu())["accuracy@1"]
    return {name: round(value, 2) for name, value in metrics.items()}


def mean_recalls(recalls: list[dict[str, float]], recall_at: tuple[int, ...]) -> dict[str, float]:
    """The mean over copies of each recall, over both directions, and over the k of `recall_at` if there are several."""
    means: dict[str, float] = {}
    for k in recall_at:
        names = (f"text_to_image_recall@{k}", f"image_to_text_recall@{k}")
        both = {name: statistics.mean(recall[name] for recall in recalls) for name in names}
        means |= {**both, f"recall@{k}": statistics.mean(both.values())}
    if len(recall_at) > 1:
        means["mean_recall"] = statistics.mean(means[f"recall@{k}"] for k in recall_at)
    return means


def flatten(captions: list[list[str]]) -> list[str]:
    return [caption for image_captions in captions for caption in image_captions]


# Equal compute


def calibrate(
    data: StudyData, arms: list[str], rounds: int, bf16: bool, device: str = "cpu"
) -> dict[str, dict[str, float]]:
    """The cost of a training step of each arm.

    The settings of some arms change during training. Their cost is the mean at 1/6, 3/6 and 5/6 of the run.

    Returns:
        "step_seconds": CPU seconds, the median over rounds, in each of which all arms take one step.
        "step_gflops": matrix products, convolutions and attention of the forward and the backward pass.
    """
    prepare_threads()
    set_seed(0)
    images, captions = load_study_data(data)["train"]
    tokenizer = train_tokenizer(flatten(captions), max_seq_length=longest_caption(data))
    texts = [image_captions[0] for image_captions in captions[: data.batch]]
    batch = dict(tokenizer(texts, padding=True, truncation=True, max_length=longest_caption(data), return_tensors="pt"))
    batch["pixel_values"] = (images[: data.batch].float() / 255 - PIXEL_MEAN) / PIXEL_STD
    batch = {name: values.to(device) for name, values in batch.items()}
    models = {arm: build_arm_model(arm, tokenizer, data, attention_on(device)).to(device).train() for arm in arms}
    optimizers = {arm: torch.optim.AdamW(model.parameters(), lr=1e-5) for arm, model in models.items()}
    schedules = {
        arm: StepSchedule(model, training_arguments(data, arm, 0, 7, False, "unused", device))
        for arm, model in models.items()
    }
    seconds: dict[str, list[list[float]]] = {arm: [] for arm in arms}
    gflops: dict[str, list[float]] = {arm: [] for arm in arms}
    for number in tqdm(range(rounds + 1), desc="calibration"):
        for arm, model in models.items():
            seconds[arm].append([])
            for step in (1, 3, 5):
                with schedules[arm].applied(step, 7) as settings:
                    inputs = batch
                    if settings.image_size is not None:
                        pixel_values = resize_images(batch["pixel_values"], settings.image_size)
                        inputs = {**batch, "pixel_values": pixel_values, "interpolate_pos_encoding": True}
                    if number == 0:
                        with FlopCounterMode(display=False) as counter:
                            time_step(model, optimizers[arm], inputs, bf16)
                        gflops[arm].append(counter.get_total_flops() / 1e9)
                    else:
                        seconds[arm][-1].append(time_step(model, optimizers[arm], inputs, bf16))
    medians = {
        arm: [statistics.median(values) for values in zip(*of_rounds[1:], strict=True)]
        for arm, of_rounds in seconds.items()
    }
    return {
        "step_seconds": {arm: statistics.mean(values) for arm, values in medians.items()},
        "step_gflops": {arm: round(statistics.mean(values), 3) for arm, values in gflops.items()},
    }


def read_costs(path: Path, data: StudyData, arms: list[str]) -> dict[str, Any]:
    """The costs of a training step that another result file holds, the mean over all its calibrations.

    Returns:
        "step_seconds" and "step_gflops", and "costs_of": the machine of that file and its calibrations.

    Raises:
        ValueError: if the file holds another data set, or no costs of an arm.
    """
    record = json.loads(path.read_text())
    if record.get("data") != data.record():
        raise ValueError(f"--costs_of {path}: its runs have other settings than --data {data.name}; choose its file.")
    if missing := [arm for arm in arms if arm not in record.get("step_seconds", {})]:
        raise ValueError(f"--costs_of {path} has no step time of {', '.join(missing)}; calibrate them there first.")
    calibrations = [record["step_seconds"], *record.get("repeated_step_seconds", [])]
    shares = {
        arm: statistics.mean(each[arm] / each["CLIP"] for each in calibrations if arm in each)
        for arm in record["step_seconds"]
    }
    return {
        "costs_of": {"machine": record["machine"], "calibrations": calibrations},
        "step_seconds": {arm: share * record["step_seconds"]["CLIP"] for arm, share in shares.items()},
        "step_gflops": record.get("step_gflops", {}),  # older files have none
    }


def add_costs(record: dict[str, Any], costs: dict[str, dict[str, float]]) -> None:
    """Adds the costs of new arms to a record. Times are scaled, so that CLIP keeps its time and ratios are those of one
    calibration."""
    known = record.setdefault("step_seconds", {})
    factor = known.get("CLIP", costs["step_seconds"]["CLIP"]) / costs["step_seconds"]["CLIP"]
    for arm, seconds in costs["step_seconds"].items():
        known.setdefault(arm, seconds * factor)
    record.setdefault("step_gflops", {}).update(costs["step_gflops"])


def time_step(model: MLIPModel, optimizer: torch.optim.Optimizer, batch: dict[str, Any], bf16: bool) -> float:
    """Seconds of one training step by `read_device_clock`."""
    device = model.device.type
    start = read_device_clock(device)
    with torch.autocast(device, torch.bfloat16, enabled=bf16):
        loss = model(**batch, return_loss=True).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return read_device_clock(device) - start


def clip_steps(record: dict[str, Any]) -> int:
    """Training steps of CLIP: those of the data set, or those that fit into `--seconds_per_run`."""
    if "seconds_per_run" in record:
        return max(round(record["seconds_per_run"] / record["step_seconds"]["CLIP"]), 1)
    return record["data"]["steps"]


def steps_of(record: dict[str, Any], arm: str, equal: str) -> int:
    """Training steps of an arm: as many as CLIP ("steps"), those that fit into CLIP's time ("compute"), into 60 % of it
    ("short"), or into five times as much ("long")."""
    seconds, steps = record["step_seconds"], clip_steps(record)
    affordable = steps * seconds["CLIP"] / seconds[arm]
    return {
        "steps": steps,
        "compute": round(affordable),
        "short": round(0.6 * affordable),
        "long": round(5 * affordable),
    }[equal]


# All runs


def parse_study_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="Name of a file in benchmarks/study/data, or a .json file.")
    parser.add_argument("--train_file", help="Pairs to train on, instead of the source of the data set.")
    parser.add_argument("--validation_file", help="Pairs to evaluate on, instead of the source of the data set.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="Run only these arms.")
    parser.add_argument(
        "--equal",
        nargs="+",
        choices=["compute", "steps", "short", "long"],
        default=["compute", "steps"],
        help="Steps of an arm: those that fit into CLIP's time, as many as CLIP, those that fit into 60 %% of "
        "CLIP's time, or into five times as much.",
    )
    parser.add_argument("--evaluations", type=int, default=0, help="Evaluate so many times during a run.")
    parser.add_argument("--parallel", type=int, default=max(os.cpu_count() or 1, 1), help="Number of runs at a time.")
    parser.add_argument("--calibration_rounds", type=int, default=10)
    parser.add_argument(
        "--calibrate_again",
        action="store_true",
        help="Measure the step times of the arms once more and add them to the result file, without a run.",
    )
    parser.add_argument(
        "--costs_of",
        type=Path,
        help="A result file whose step times give the steps of each arm, instead of a calibration on this machine. "
        "Then a GPU trains as many steps as a CPU does at equal compute.",
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="cuda: times are by the clock.")
    parser.add_argument("--seconds_per_run", type=float, help="Of CLIP, instead of the steps of the data set.")
    parser.add_argument("--no_bf16", dest="bf16", action="store_false", help="Train in float32.")
    parser.add_argument("--run", nargs=3, metavar=("ARM", "SEED", "STEPS"), help="Do one run and print it as JSON.")
    parser.add_argument("--output_dir", type=Path, default=RESULTS, help="Folder of the result file.")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    flags = parse_study_flags(arguments)
    if flags.evaluations < 0:
        raise SystemExit(f"error: --evaluations {flags.evaluations}: choose 0 or more.")
    try:
        data = read_study_data(flags.data, flags.train_file, flags.validation_file)
        costs = read_costs(flags.costs_of, data, flags.arms) if flags.costs_of else {}
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    if flags.run:
        arm, seed, steps = flags.run
        print(json.dumps(train_arm(data, arm, int(seed), int(steps), flags.bf16, flags.device, flags.evaluations)))
        return

    path = flags.output_dir / f"{data.name}.json"
    record = start_record(path, data, flags.bf16, flags.device)
    if flags.seconds_per_run is not None:
        record["seconds_per_run"] = flags.seconds_per_run
    machine = {"machine": describe_processor() if flags.device == "cpu" else describe_gpu(), "bf16": flags.bf16}
    if costs:
        record = {**machine, **record, **costs}
        write_record(path, record)
    uncalibrated = [arm for arm in flags.arms if arm not in record.get("step_seconds", {})]
    if uncalibrated:
        arms = list(dict.fromkeys(["CLIP", *uncalibrated]))
        add_costs(record, calibrate(data, arms, flags.calibration_rounds, flags.bf16, flags.device))
        record = {**machine, **record}
        write_record(path, record)
    if flags.calibrate_again:
        arms = list(dict.fromkeys(["CLIP", *flags.arms]))
        costs = calibrate(data, arms, flags.calibration_rounds, flags.bf16, flags.device)
        record.setdefault("repeated_step_seconds", []).append(costs["step_seconds"])
        write_record(path, record)
        return
    do_runs(run_in_process(__file__, arguments), missing_runs(record, flags), flags.parallel, record, path)


def run_in_process(program: str, arguments: list[str]) -> Callable[[tuple], dict[str, Any]]:
    """A function that does one run in a process of one thread: `program` with `arguments` and `--run`."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TQDM_DISABLE": "1"}

    def start_run(run: tuple) -> dict[str, Any]:
        command = [sys.executable, program, *arguments, "--run", *map(str, run)]
        finished = subprocess.run(command, env=environment, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"{run} failed:\n{finished.stderr[-3000:]}")
        return json.loads(finished.stdout.splitlines()[-1])

    return start_run


def start_record(path: Path, data: StudyData, bf16: bool, device: str = "cpu") -> dict[str, Any]:
    """Read the result file, or begin a new one. Arms that are new since then are added to it.

    Raises:
        SystemExit: if the result file holds runs with other settings.
    """
    device_entry = {} if device == "cpu" else {"device": device}  # result files of a CPU have no such entry
    new_record = {"arms": {}, "data": data.record(), **device_entry, "runs": []}
    record = json.loads(path.read_text()) if path.exists() else new_record
    changed = [arm for arm, settings in record["arms"].items() if ARMS.get(arm) != settings]
    is_other = record["data"] != data.record() or record.get("device", "cpu") != device
    if changed or is_other or record.get("bf16", bf16) != bf16:
        raise SystemExit(f"{path} holds runs with other settings; move it to another folder to start again.")
    return {**record, "arms": ARMS}


def missing_runs(record: dict[str, Any], flags: argparse.Namespace) -> list[tuple[str, int, int]]:
    """The requested runs (arm, seed, steps) that are not in the record."""
    finished = {(run["arm"], run["seed"], run["steps"]) for run in record["runs"]}
    requested = [
        (arm, seed, steps_of(record, arm, equal)) for equal in flags.equal for seed in flags.seeds for arm in flags.arms
    ]
    return [run for run in dict.fromkeys(requested) if run not in finished]


def do_runs(start_run: Callable, runs: list[tuple], parallel: int, record: dict[str, Any], path: Path) -> None:
    """Do all runs and write each to the result file when it ends.

    After a run fails, no other run starts. Runs that have started are finished and written.
    """
    with ThreadPoolExecutor(parallel) as pool:
        futures = [pool.submit(start_run, run) for run in runs]
        failure = None
        for future in tqdm(as_completed(futures), total=len(futures), desc="runs"):
            if future.cancelled():
                continue
            failure = failure or future.exception()
            if failure is not None:
                for waiting in futures:
                    waiting.cancel()
            if future.exception() is None:
                record["runs"].append(future.result())
                write_record(path, record)
    if failure is not None:
        raise failure


def write_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n")
    temporary.replace(path)


def describe_processor() -> str:
    """Model of the processor and version of torch, on Linux."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line for line in lines if "model name" in line), "?: ?")
    return f"{cpu.partition(': ')[2]} ({platform.machine()}), one core for each run; torch {torch.__version__}"


def describe_gpu() -> str:
    return f"{torch.cuda.get_device_name()}; torch {torch.__version__}"


if __name__ == "__main__":
    main()
