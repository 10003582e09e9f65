# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Speed of MLIP as ratios against CLIP (transformers and open_clip), ToMe (on a timm ViT) and ELIP (this project's way
of merging and its authors' own), all in one run.

    python benchmarks/speed.py --config_name vit-b-16 --batch_size 1 8     # images/s of the vision tower
    python benchmarks/speed.py --training                                  # pairs/s and peak memory of a training step
    python benchmarks/speed.py --parts                                     # where the time of tower and step goes
    python benchmarks/speed.py --imports                                   # what `import modeling_mlip` takes

All take turns, round after round in a new order, so that a machine that slows down slows all of them; a ratio is taken
within a round, and the median and the range over rounds are shown. FLOPs are torch's count of products, convolutions
and attention (fused or not); FFTs, norms and sorting are time but no FLOPs. Random weights: speed does not depend on
them. `--clock cpu` counts the time that this process gets, for a machine that others work on too; use it with
OMP_NUM_THREADS=1, because waiting threads count as working.

ToMe and ELIP's own ViT are taken from the Python path where they are found:
    git clone https://github.com/facebookresearch/ToMe && git clone https://github.com/guoyang9/ELIP
    PYTHONPATH=ToMe:ELIP/ALBEF python benchmarks/speed.py
"""

import argparse
import concurrent.futures
import copy
import functools
import gc
import itertools
import json
import multiprocessing
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPVisionModel
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPVisionEmbeddings

import modeling_mlip.modeling_mlip as modeling
from modeling_mlip import MLIPConfig, MLIPModel, MLIPVisionModel
from modeling_mlip.hub.configurations import named_config, override_config
from modeling_mlip.hub.formatting import format_table

RESULTS = Path(__file__).parent / "results" / "speed.json"
CLIP, OPEN_CLIP, TIMM = "CLIP (transformers)", "CLIP (open_clip)", "ViT (timm)"
MLIP, PLAIN, ELIP, TOME = "MLIP", "MLIP, no frequency stage", "ELIP", "ToMe (timm)"
AUTHORS_ELIP = "ELIP (its authors')"
DEFAULT = "MLIP, default weights"  # those of ALL_PARTS as the configuration has them
METHODS = (CLIP, OPEN_CLIP, TIMM, PLAIN, MLIP, DEFAULT, ELIP, TOME, AUTHORS_ELIP)
PLACEMENTS = ("three", "early", "every")
CAPTION_LENGTHS = (10, 20)  # real tokens, BOS and EOS included
# ELIP is CLIP with fewer tokens: no frequency stage and CLIP's loss.
LIKE_CLIP = {"frequency_layers": 0, "frequency_loss_weight": 0.0, "token_loss_weight": 0.0}
# The parts that are off by default, so that the benchmark measures the cost of everything.
ALL_PARTS = {"token_loss_weight": 0.1, "merge_importance_weight": 0.1}
# What of the vision tower's time is whose, each without what is listed elsewhere and called from it.
TOWER_PARTS = (
    (CLIPVisionEmbeddings, "forward", "patch embedding"),
    (modeling.MLIPFrequencyStage, "forward", "frequency stage"),
    (modeling.MLIPVisionModel, "_frequency_importance", "frequency stage"),
    (modeling.MLIPVisionAttention, "forward", "attention"),
    (modeling.MLIPVisionAttention, "_guide", "matching"),
    (modeling.MLIPVisionLayer, "_match", "matching"),
    (modeling, "merge_matrix", "merging"),
    (modeling, "merge_tokens", "merging"),
    (modeling, "merge_sizes", "merging"),
    (modeling, "log_size_bias", "log of sizes"),
    (CLIPMLP, "forward", "MLP"),
)


@dataclass(frozen=True)
class Contestant:
    """What takes a turn: a method, and where it merges how much."""

    method: str
    merge_ratio: float = 0.0
    placement: str = ""  # of PLACEMENTS, where something is merged


class Bench:
    """Models of one geometry, built when they are asked for, and their inputs."""

    def __init__(self, flags: argparse.Namespace):
        torch.manual_seed(0)
        self.config = override_config(named_config(flags.config_name), ALL_PARTS)
        self.batch_size, self.flags = flags.batch_size, flags
        self.whole = flags.training or flags.parts  # both towers and losses, or the vision tower alone
        size = self.config.vision_config.image_size
        dtype = torch.bfloat16 if flags.bf16 and not self.whole else torch.float32
        self.pixels = torch.randn(self.batch_size, 3, size, size).to(flags.device, dtype)
        self.captions = {name: value.to(flags.device) for name, value in self._captions().items()}

    def _captions(self) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, both `(B, L)`, as CLIP's tokenizer pads."""
        text = self.config.text_config
        lengths = torch.randint(CAPTION_LENGTHS[0], CAPTION_LENGTHS[1] + 1, (self.batch_size, 1))
        longest = self.flags.caption_padding == "longest"
        positions = torch.arange(int(lengths.max()) if longest else text.max_position_embeddings)
        ids = torch.randint(0, text.bos_token_id, (self.batch_size, len(positions)))
        ids[:, 0] = text.bos_token_id
        ids = torch.where(positions < lengths - 1, ids, text.eos_token_id)
        return {"input_ids": ids, "attention_mask": (positions < lengths).long()}

    def _build(self, make: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        """A model with random weights, which a GPU draws much faster than the CPU."""
        with torch.device(self.flags.device):
            model = make(*args, **kwargs)
        dtype = torch.bfloat16 if self.flags.bf16 and not self.whole else torch.float32
        return model.to(self.flags.device, dtype).train(self.flags.training)

    @functools.cached_property
    def clip(self) -> nn.Module:
        text, vision = self.config.text_config.to_dict(), self.config.vision_config.to_dict()
        for keys in (text, vision):
            keys.pop("model_type")
        known = CLIPConfig()
        config = CLIPConfig(
            text_config={name: value for name, value in text.items() if hasattr(known.text_config, name)},
            vision_config={name: value for name, value in vision.items() if hasattr(known.vision_config, name)},
            projection_dim=self.config.projection_dim,
        )
        return self._build(CLIPModel, config) if self.whole else self._build(CLIPVisionModel, config.vision_config)

    @functools.cached_property
    def open_clip(self) -> nn.Module:
        import open_clip

        vision, text = self.config.vision_config, self.config.text_config
        model = self._build(
            open_clip.CLIP,
            embed_dim=self.config.projection_dim,
            vision_cfg=open_clip.CLIPVisionCfg(
                layers=vision.num_hidden_layers,
                width=vision.hidden_size,
                head_width=vision.hidden_size // vision.num_attention_heads,
                mlp_ratio=vision.intermediate_size / vision.hidden_size,
                patch_size=vision.patch_size,
                image_size=vision.image_size,
            ),
            text_cfg=open_clip.CLIPTextCfg(
                context_length=text.max_position_embeddings,
                vocab_size=text.vocab_size,
                width=text.hidden_size,
                heads=text.num_attention_heads,
                layers=text.num_hidden_layers,
            ),
            quick_gelu=vision.hidden_act == "quick_gelu",
        )
        return model if self.whole else model.visual

    def _geometry(self) -> dict[str, Any]:
        """What timm's ViT and ELIP's take alike."""
        vision = self.config.vision_config
        return {
            "img_size": vision.image_size,
            "patch_size": vision.patch_size,
            "embed_dim": vision.hidden_size,
            "depth": vision.num_hidden_layers,
            "num_heads": vision.num_attention_heads,
            "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        }

    @functools.cached_property
    def timm(self) -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        tower = self._build(
            VisionTransformer,
            **self._geometry(),
            num_classes=0,
            global_pool="token",
            pre_norm=True,
        )
        return self._with_timm_tower(tower) if self.whole else tower

    def authors_elip(self, contestant: Contestant) -> nn.Module:
        """ELIP's published ViT, after the same layers and with as many tokens left as MLIP's.

        At each stage it runs the layers up to the next one (their settings: 2, 6 and 2 layers at 2, 4 and 10) ahead of
        time without gradients, and what the class token attends to there stays.
        """
        from models.vit import VisionTransformer

        vision, removed = self.config.vision_config, self.removed(contestant)
        stages = [layer + 1 for layer, number in enumerate(removed) if number > 0]
        patches = (vision.image_size // vision.patch_size) ** 2
        left = [patches - sum(removed[:stage]) for stage in stages]
        tower = self._build(
            VisionTransformer,
            **self._geometry(),
            prune_state={
                "begin_layer": stages,
                "num_act_layers": [
                    end - start for start, end in itertools.pairwise([*stages, vision.num_hidden_layers])
                ],
                "num_keep_tokens": [count - 1 for count in left],  # beside the fused one
            },
        )
        caption = torch.randn(self.batch_size, vision.hidden_size, device=self.pixels.device, dtype=self.pixels.dtype)
        tower.forward = functools.partial(tower.forward, text_cls=caption)
        return tower

    def _with_timm_tower(self, tower: nn.Module) -> nn.Module:
        """open_clip's model with this vision tower."""
        model = share(self.open_clip)
        widths = (self.config.vision_config.hidden_size, self.config.projection_dim)
        projection = self._build(nn.Linear, *widths, bias=False)
        model.visual = nn.Sequential(tower, projection)
        return model

    @functools.cached_property
    def mlip(self) -> nn.Module:
        return self._mlip(self.config)

    @functools.cached_property
    def like_clip(self) -> nn.Module:
        return self._mlip(override_config(self.config, LIKE_CLIP))

    def _mlip(self, config: MLIPConfig) -> nn.Module:
        return self._build(MLIPModel, config) if self.whole else self._build(MLIPVisionModel, config.vision_config)

    def removed(self, contestant: Contestant) -> list[int]:
        """Tokens that each layer removes."""
        vision = copy.copy(self.config.vision_config)
        vision.merge_ratio, vision.merge_layers = contestant.merge_ratio, self._layers(contestant.placement)
        with torch.device("meta"):
            return modeling.MLIPVisionEncoder(vision).tokens_removed((vision.image_size // vision.patch_size) ** 2)

    def _layers(self, placement: str) -> list[int] | None:
        return {"early": [0, 1, 2], "every": list(range(self.config.vision_config.num_hidden_layers))}.get(placement)

    def model(self, contestant: Contestant) -> nn.Module:
        """The contestant's model; those of one method share their weights."""
        if contestant.method == AUTHORS_ELIP:
            return self.authors_elip(contestant)
        base = {CLIP: "clip", OPEN_CLIP: "open_clip", TIMM: "timm", TOME: "timm", MLIP: "mlip", DEFAULT: "mlip"}
        model = getattr(self, base.get(contestant.method, "like_clip"))
        if contestant.merge_ratio == 0:
            return model
        model = share(model)
        if contestant.method == TOME:
            import tome

            tower = model.visual[0] if self.whole else model
            tome.patch.timm(tower)
            tower.r = self.removed(contestant)
            return model
        vision = next(module for module in model.modules() if isinstance(module, MLIPVisionModel)).config
        vision.merge_ratio, vision.merge_layers = contestant.merge_ratio, self._layers(contestant.placement)
        vision.merge_method = "elip" if contestant.method == ELIP else "mlip"
        if contestant.method == DEFAULT:
            default = named_config(self.flags.config_name)
            vision.merge_importance_weight = default.vision_config.merge_importance_weight
            if self.whole:
                model.config.token_loss_weight = default.token_loss_weight
        vision.validate()
        return model

    def runner(self, contestant: Contestant, model: nn.Module) -> Callable[[], Any]:
        """What is timed: a forward pass, or forward, losses and backward."""
        if not self.flags.training:
            return torch.inference_mode()(lambda: model(self.pixels))
        is_open_clip = contestant.method in (OPEN_CLIP, TIMM, TOME)
        loss = self._open_clip_loss if is_open_clip else self._transformers_loss

        def step() -> None:
            with self.autocast():
                value = loss(model)
            value.backward()
            model.zero_grad(set_to_none=True)

        return step

    def autocast(self) -> Any:
        return torch.autocast(self.flags.device, torch.bfloat16) if self.flags.bf16 else nullcontext()

    def _transformers_loss(self, model: nn.Module) -> torch.Tensor:
        return model(pixel_values=self.pixels, **self.captions, return_loss=True).loss

    def _open_clip_loss(self, model: nn.Module) -> torch.Tensor:
        import open_clip

        ids = self.captions["input_ids"]  # which it takes at full length only
        missing = self.config.text_config.max_position_embeddings - ids.shape[1]
        ids = nn.functional.pad(ids, (0, missing), value=self.config.text_config.eos_token_id)
        return open_clip.ClipLoss()(*model(self.pixels, ids))


def share(model: nn.Module) -> nn.Module:
    """A copy that has the same weights in memory and settings of its own."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def contestants(flags: argparse.Namespace) -> list[Contestant]:
    """All that flags ask for and this machine has; what is left out is said."""
    needs = {OPEN_CLIP: ("open_clip",), TIMM: ("timm",), TOME: ("timm", "tome"), AUTHORS_ELIP: ("timm", "models.vit")}
    if flags.training:
        needs |= {TIMM: ("timm", "open_clip"), TOME: ("timm", "open_clip", "tome")}
    methods = []
    for method in METHODS:
        missing = [name for name in needs.get(method, ()) if not importable(name)]
        if method != CLIP and method not in flags.methods:
            continue
        if missing:
            print(f"{method} is left out: {', '.join(missing)} not found; see the top of {Path(__file__).name}.")
            continue
        methods.append(method)
    merging = [Contestant(m, r, p) for p in flags.placements for r in flags.merge_ratios if r > 0
               for m in (MLIP, DEFAULT, ELIP, TOME) if m in methods]  # fmt: skip
    if AUTHORS_ELIP in methods and "three" in flags.placements and not flags.training:
        merging += [Contestant(AUTHORS_ELIP, ratio, "three") for ratio in flags.merge_ratios if ratio > 0]
    return [Contestant(method) for method in methods if method not in (DEFAULT, ELIP, TOME, AUTHORS_ELIP)] + merging


def importable(name: str) -> bool:
    try:
        __import__(name)
    except ImportError:
        return False
    return True


# Clocks


def read_clock(flags: argparse.Namespace) -> float:
    if flags.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if flags.clock == "cpu" else time.perf_counter()


def turn(run: Callable[[], Any], flags: argparse.Namespace) -> float:
    """Median seconds of as many calls as fit into `--turn_seconds`, at least one."""
    taken: list[float] = []
    while not taken or sum(taken) < flags.turn_seconds:
        start = read_clock(flags)
        run()
        taken.append(read_clock(flags) - start)
    return statistics.median(taken)


def rounds_of(runners: dict[Any, Callable[[], Any]], flags: argparse.Namespace) -> dict[Any, list[float]]:
    """Seconds of each runner in each round."""
    taken: dict[Any, list[float]] = {key: [] for key in runners}
    order, shuffle = list(runners), random.Random(0).shuffle
    for number in tqdm(range(flags.rounds + 1), desc="rounds"):
        shuffle(order)
        for key in order:
            seconds = turn(runners[key], flags)
            if number > 0:  # the first round still warms up
                taken[key].append(seconds)
    return taken


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def quotient(above: list[float], below: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(above, below, strict=True)])


# What is measured


def measure_speed(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each contestant: speed, FLOPs and, in training, memory, each beside CLIP's."""
    bench, everyone = Bench(flags), contestants(flags)
    memory = peak_memory(everyone, flags) if flags.training else {}
    runners, flops = {}, {}
    for one in tqdm(everyone, desc="warm-up"):
        model = bench.model(one)
        with FlopCounterMode(display=False) as counter:
            output = bench.runner(one, model)()  # a warm-up too
        flops[one] = counter.get_total_flops()
        if one.method == TOME:
            tower = model.visual[0] if bench.whole else model
            check_tokens(bench, one, tower._tome_info["size"].shape[1])
        elif one.method == AUTHORS_ELIP:
            check_tokens(bench, one, output.shape[1])
        if flags.compile:
            model = torch.compile(model, mode=flags.compile_mode)
            for _ in range(3):  # compiles, and again where the first call left something that guards look at
                bench.runner(one, model)()
        runners[one] = bench.runner(one, model)
    taken = rounds_of(runners, flags)

    rows = []
    reference = Contestant(CLIP)
    for one in everyone:
        row: dict[str, Any] = {**asdict(one), "gflops_per_image": flops[one] / bench.batch_size / 1e9}
        row["per_second"] = bench.batch_size / statistics.median(taken[one])
        row["speed_up"] = quotient(taken[reference], taken[one])
        row["flop_ratio"] = flops[reference] / flops[one]
        tome = Contestant(TOME, one.merge_ratio, one.placement)
        if one.method in (MLIP, DEFAULT) and tome in taken:
            row["over_tome"] = quotient(taken[tome], taken[one])
        if one.method == MLIP and Contestant(PLAIN) in taken and one.merge_ratio == 0:
            row["over_no_frequency_stage"] = quotient(taken[Contestant(PLAIN)], taken[one])
        if memory:
            row["peak_mib"] = memory[one]
            row["memory_ratio"] = memory[one] / memory[reference]
        rows.append(row)
    return rows


def check_tokens(bench: Bench, contestant: Contestant, left: int) -> None:
    """That another's way of merging left as many tokens as MLIP's, the class token included."""
    vision = bench.config.vision_config
    expected = 1 + (vision.image_size // vision.patch_size) ** 2 - sum(bench.removed(contestant))
    if left != expected:
        raise RuntimeError(f"{contestant.method} left {left} tokens where MLIP leaves {expected} ({contestant}).")


def peak_memory(everyone: list[Contestant], flags: argparse.Namespace) -> dict[Contestant, float]:
    """MiB that weights, gradients and activations of one training step take. On a CPU each is measured in a process of
    its own, forked from one that has imported everything and computed nothing."""
    if flags.device == "cuda":  # torch's allocator counts what this process allocates
        return {one: peak_of_one(one, flags) for one in tqdm(everyone, desc="memory")}
    context = multiprocessing.get_context("forkserver")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        peaks = processes.map(peak_of_one, everyone, [flags] * len(everyone))
        return dict(zip(everyone, tqdm(peaks, desc="memory", total=len(everyone)), strict=True))


def peak_of_one(contestant: Contestant, flags: argparse.Namespace) -> float:
    for name in ("open_clip", "timm", "tome"):
        importable(name)  # what imports take is not asked here
    if flags.device == "cuda":
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if flags.device == "cuda" else resident_bytes("VmRSS")
    bench = Bench(flags)
    bench.runner(contestant, bench.model(contestant))()
    after = torch.cuda.max_memory_allocated() if flags.device == "cuda" else resident_bytes("VmHWM")
    return (after - before) / 2**20


def resident_bytes(field: str) -> int:
    """Of Linux, whose `ru_maxrss` a child inherits."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


class PartTimer:
    """Wraps functions from outside; each part's seconds are without those of parts called from it."""

    def __init__(self, flags: argparse.Namespace):
        self.flags = flags
        self.seconds: Counter[str] = Counter()
        self.inner: list[float] = []

    def wrap(self, function: Callable, part: str) -> Callable:
        @functools.wraps(function)
        def timed(*args, **kwargs):
            start = read_clock(self.flags)
            self.inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                took = read_clock(self.flags) - start
                self.seconds[part] += took - self.inner.pop()
                if self.inner:
                    self.inner[-1] += took

        return timed


def measure_parts(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """For each ratio and placement: shares of the vision tower's forward pass, and of a training step."""
    bench, rows = Bench(flags), []
    for placement in flags.placements:
        for ratio in flags.merge_ratios:
            contestant = Contestant(MLIP, ratio, placement if ratio else "")
            model = bench.model(contestant)
            shares = {**tower_shares(bench, model, flags), **step_shares(bench, model, flags)}
            rows += [{**asdict(contestant), "of": of, "part": part, "share": share}
                     for (of, part), share in shares.items()]  # fmt: skip
    return rows


@torch.inference_mode()
def tower_shares(bench: Bench, model: nn.Module, flags: argparse.Namespace) -> dict[tuple[str, str], Any]:
    tower = model.vision_model.eval()
    seconds: dict[str, list[float]] = {}
    tower(bench.pixels)
    for _ in tqdm(range(flags.rounds), desc="parts of the tower"):
        timer = PartTimer(flags)
        with ExitStack() as stack:
            for owner, name, part in TOWER_PARTS:
                stack.enter_context(mock.patch.object(owner, name, timer.wrap(getattr(owner, name), part)))
            timer.wrap(tower, "norms, residuals and the rest")(bench.pixels)
        whole = sum(timer.seconds.values())
        for part in dict.fromkeys(part for *_, part in TOWER_PARTS):
            seconds.setdefault(part, []).append(timer.seconds[part] / whole)
        rest = "norms, residuals and the rest"
        seconds.setdefault(rest, []).append(timer.seconds[rest] / whole)
        # The size term also makes attention take a mask: a tower with it beside one without.
        with_it = turn(lambda: tower(bench.pixels), flags)
        with mock.patch.object(modeling, "log_size_bias", lambda *_: None):
            without = turn(lambda: tower(bench.pixels), flags)
        seconds.setdefault("size term (tower less tower without it)", []).append(1 - without / with_it)
    return {("vision tower, forward", part): spread(shares) for part, shares in seconds.items()}


def step_shares(bench: Bench, model: nn.Module, flags: argparse.Namespace) -> dict[tuple[str, str], Any]:
    """Forward and backward of the towers and of each loss by itself, over those of the whole step."""
    model.train()
    with torch.no_grad(), bench.autocast():
        pairs = model(pixel_values=bench.pixels, **bench.captions, return_pairs=True).pairs

    def step(loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            with bench.autocast():
                value = loss()
            value.backward()
            model.zero_grad(set_to_none=True)

        return run

    def outputs(tower: Callable, **inputs) -> torch.Tensor:
        output = tower(**inputs)
        return output.last_hidden_state.sum() + output.pooler_output.sum()

    def one_loss(name: str, **without: None) -> torch.Tensor:
        return model.compute_losses(leaves(pairs)._replace(**without))[name]

    runners = {
        "step": step(lambda: bench._transformers_loss(model)),
        "vision tower": step(lambda: outputs(model.get_image_features, pixel_values=bench.pixels)),
        "text tower": step(lambda: outputs(model.get_text_features, **bench.captions)),
        "spatial loss": step(lambda: one_loss("spatial_loss", frequency_embeds=None, tokens=None)),
        "frequency loss": step(lambda: one_loss("frequency_loss", tokens=None)),
        "token loss": step(lambda: one_loss("token_loss", frequency_embeds=None)),
    }
    for run in runners.values():
        run()
    taken = rounds_of(runners, flags)
    whole = taken.pop("step")
    shares = {part: quotient(seconds, whole) for part, seconds in taken.items()}
    rest = [1 - sum(parts) / all_of_it for all_of_it, *parts in zip(whole, *taken.values(), strict=True)]
    shares["token projections and the rest"] = spread(rest)
    return {("training step", part): share for part, share in shares.items()}


def leaves(value: Any) -> Any:
    """The same nested tuples with leaves that take gradients."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.is_floating_point())
    return type(value)(*map(leaves, value)) if isinstance(value, tuple) else value


def measure_imports(flags: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds of imports one after the other, in fresh processes; the first of them warms the disk's cache."""
    steps = ["import torch, transformers", "from transformers import CLIPModel, CLIPProcessor", "import modeling_mlip"]
    clock = "time.process_time" if flags.clock == "cpu" else "time.perf_counter"
    program = f"import time; t = [{clock}()]\n" + "".join(f"{step}; t.append({clock}())\n" for step in steps)
    program += "print(*[after - before for before, after in zip(t, t[1:])])"
    lines = [subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True).stdout
             for _ in tqdm(range(flags.rounds + 1), desc="processes")][1:]  # fmt: skip
    seconds = zip(*(map(float, line.split()) for line in lines), strict=True)
    return [{"after what is above": step, "seconds": spread(list(s))} for step, s in zip(steps, seconds, strict=True)]


# What is shown


def flat(row: dict[str, Any], digits: int = 2) -> dict[str, Any]:
    """Spreads as text, for a table."""
    shown = {}
    for name, value in row.items():
        is_spread = isinstance(value, dict)
        shown[name.replace("_", " ")] = (
            "{median:.{d}f} ({low:.{d}f} to {high:.{d}f})".format(**value, d=digits) if is_spread else value
        )
    if "speed_up" in row:
        shown["speed-up / FLOP ratio"] = row["speed_up"]["median"] / row["flop_ratio"]
    return shown


def draw_speed(entries: list[dict[str, Any]], target: Path) -> None:
    """Speed-up over FLOP ratio, a panel for each run, with the diagonal where the clock follows the FLOPs."""
    from matplotlib.figure import Figure

    timed = [entry for entry in entries if "flop_ratio" in entry["rows"][0]]
    entries = [entry for entry in timed if any(row["merge_ratio"] > 0 for row in entry["rows"])]
    if not entries:
        return
    columns = min(3, len(entries))
    lines = -(-len(entries) // columns)
    figure = Figure(figsize=(4.6 * columns, 4.4 * lines + 0.6), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    colours = {MLIP: "tab:blue", DEFAULT: "tab:cyan", ELIP: "tab:orange", TOME: "tab:green", AUTHORS_ELIP: "tab:red"}
    markers = {"three": "o", "early": "^", "every": "s", "": "x"}
    for axis in axes[len(entries) :]:
        axis.set_axis_off()
    for axis, entry in zip(axes, entries, strict=False):
        ends = [value for row in entry["rows"] for value in (row["flop_ratio"], *row["speed_up"].values())]
        start, end = min(ends) * 0.95, max(ends) * 1.05
        axis.plot([start, end], [start, end], color="0.6", linestyle="--", linewidth=1)
        for row in entry["rows"]:
            up = row["speed_up"]
            axis.errorbar(
                row["flop_ratio"],
                up["median"],
                [[up["median"] - up["low"]], [up["high"] - up["median"]]],
                color=colours.get(row["method"], "0.3"),
                marker=markers[row["placement"]],
                markersize=5,
                linewidth=0.8,
            )
        settings = entry["settings"]
        details = [settings["precision"], describe_compilation(settings)]
        axis.set_title(
            f"{settings['config_name']}, batch {settings['batch_size']}, {settings['task']}\n({', '.join(details)})",
            fontsize=10,
        )
        axis.set_xlim(start, end)
        axis.set_ylim(start, end)
        axis.set_box_aspect(1)
        axis.set_xlabel("FLOPs of CLIP / FLOPs")
        axis.set_ylabel("speed-up over CLIP")
    for method, colour in (*colours.items(), ("no merging", "0.3")):
        axes[0].plot([], [], color=colour, marker="o", linestyle="", label=method)
    names = {"three": "three stages", "early": "layers 0, 1, 2", "every": "every layer"}
    for placement, name in names.items():
        axes[0].plot([], [], color="0.3", marker=markers[placement], linestyle="", fillstyle="none", label=name)
    axes[0].plot([], [], color="0.6", linestyle="--", label="clock follows FLOPs")
    figure.legend(loc="upper center", bbox_to_anchor=(0.5, -0.01), ncols=min(8, 4 * columns // 2), fontsize=9)
    figure.savefig(target, dpi=110, bbox_inches="tight")


def describe_compilation(settings: dict[str, Any]) -> str:
    if not settings["compile"]:
        return "eager"
    return "compiled, CUDA graphs" if settings.get("compile_mode") == "reduce-overhead" else "compiled"


def processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def describe_machine(flags: argparse.Namespace) -> dict[str, Any]:
    return {
        "device": torch.cuda.get_device_name() if flags.device == "cuda" else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def settings_of(flags: argparse.Namespace) -> dict[str, Any]:
    """What makes two runs the same measurement."""
    task = next((name for name in ("training", "parts", "imports") if getattr(flags, name)), "inference")
    shared = {"task": task, "clock": flags.clock, "machine": describe_machine(flags)}
    if flags.imports:
        return shared
    return {
        **shared,
        "config_name": flags.config_name,
        "batch_size": flags.batch_size,
        "precision": "bfloat16" if flags.bf16 else "float32",
        "compile": flags.compile,
        **({"compile_mode": flags.compile_mode} if flags.compile_mode != "default" else {}),
        "merge_ratios": flags.merge_ratios,
        "placements": flags.placements,
        **({"methods": flags.methods} if task != "parts" else {}),
        **({"caption_padding": flags.caption_padding} if task != "inference" else {}),
    }


def save(entry: dict[str, Any], target: Path) -> None:
    history = json.loads(target.read_text()) if target.exists() else []
    history = [old for old in history if old["settings"] != entry["settings"]] + [entry]
    history.sort(key=lambda e: [str(e["settings"].get(k, "")) for k in ("task", "config_name")]
                 + [e["settings"].get("batch_size", 0)])  # fmt: skip
    with tempfile.NamedTemporaryFile("w", dir=target.parent, delete=False) as file:
        file.write(json.dumps(history, indent=1) + "\n")
    os.chmod(file.name, 0o644)
    os.replace(file.name, target)
    draw_speed(history, target.with_suffix(".png"))
    print(f"written to {target}")


def parse_flags(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--training", action="store_true", help="A training step: towers, losses, backward.")
    task.add_argument("--parts", action="store_true", help="Shares of the tower's and of the step's time.")
    task.add_argument("--imports", action="store_true", help="What importing takes.")
    parser.add_argument(
        "--config_name", nargs="+", default=["vit-b-16"], help="nano, tiny, vit-b-32, vit-b-16, vit-l-14."
    )
    parser.add_argument("--batch_size", type=int, nargs="+", default=[8])
    parser.add_argument("--merge_ratios", type=float, nargs="+", default=[0.3, 0.5, 0.7])
    parser.add_argument("--placements", nargs="+", choices=PLACEMENTS, default=list(PLACEMENTS),
                        help="Three stages over the depth, layers 0 to 2, every layer.")  # fmt: skip
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="CLIP is always there.")
    parser.add_argument("--caption_padding", choices=("max_length", "longest"), default="max_length")
    parser.add_argument("--compile", action="store_true", help="torch.compile every model.")
    parser.add_argument(
        "--compile_mode",
        choices=("default", "reduce-overhead"),
        default="default",
        help="Of torch.compile; reduce-overhead replays CUDA graphs, which need no launch of each operation.",
    )
    parser.add_argument("--bf16", action="store_true", help="Weights in inference, autocast in training.")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--turn_seconds", type=float, default=0.5, help="A turn repeats short runs for this long.")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--output", type=Path, default=RESULTS)
    flags = parser.parse_args(arguments)
    if flags.compile_mode != "default" and not flags.compile:
        parser.error(f"--compile_mode {flags.compile_mode} needs --compile.")
    return flags


def main(arguments: list[str] | None = None) -> None:
    flags = parse_flags(arguments)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    combinations = [("", 0)] if flags.imports else itertools.product(flags.config_name, flags.batch_size)
    for config_name, batch_size in combinations:
        one = argparse.Namespace(**{**vars(flags), "config_name": config_name, "batch_size": batch_size})
        start = os.getloadavg()[0]
        measure = measure_imports if flags.imports else measure_parts if flags.parts else measure_speed
        rows = measure(one)
        print(format_table([flat(row, digits=3 if flags.parts else 2) for row in rows]))
        run = {"rounds": flags.rounds, "load_average": {"start": start, "end": os.getloadavg()[0]}}
        save({"settings": settings_of(one), **run, "rows": rows}, flags.output)


if __name__ == "__main__":
    main()
