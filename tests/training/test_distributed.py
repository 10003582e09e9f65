# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The gradients of several processes, of mini-batches and of both equal those of one process with one large batch.

    python tests/training/test_distributed.py    # the table of docs/training.md

Float64, on the CPU, through `MLIPTrainer.training_step`. Each number of processes is started once for all its cases.
The cases "toy part" show that the suite holds for a part of the objective that is defined in this file alone. The same
processes count what they send, for benchmarks/exchange_cost.py.
"""

import functools
import inspect
import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from accelerate.state import AcceleratorState, DistributedType
from conftest import open_gate, pairs_batch, small_model
from torch.distributed.fsdp import FSDPModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from modeling_mlip import MLIPModel
from modeling_mlip.losses import PairEmbeddings, positive_targets, token_loss, token_scores
from modeling_mlip.training.arguments import MLIPTrainingArguments
from modeling_mlip.training.distributed import Exchange
from modeling_mlip.training.mini_batches import RandomState, join_rows, split_rows
from modeling_mlip.training.objective import ModelLosses, Objective, ObjectivePart
from modeling_mlip.training.short_caption_loss import ShortCaptionLoss
from modeling_mlip.training.trainer import NO_DECAY, MLIPTrainer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from exchange_cost import Shapes, count_sent, global_tokens_sent, info_nce_sent, keys_sent, sigmoid_sent  # noqa: E402

NUM_PAIRS = 11
SHARES = {1: [11], 2: [4, 7], 3: [2, 4, 5]}  # pairs of each process
MINI_BATCH_SIZES = {1: 4, 2: 3, 3: 3}  # which cut a share into mini-batches of different sizes
STEPS = 10  # of AdamW; some cases take two
FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "cpu_ram_efficient_loading": False}}
# Arguments of fine-tuning, by name.
RECIPES = {
    "LoRA": {"lora_rank": 2, "lora_alpha": 3.0, "layer_decay": 0.5},
    "frozen parts": {"freeze": "text", "freeze_layers": 1, "layer_decay": 0.5},
}


class ToyPart(ObjectivePart):
    """A part with a parameter for the rows, one for the loss, a buffer, and rows of nested tensors."""

    name = "toy"

    def __init__(self):
        super().__init__(weight=0.5)
        generator = torch.Generator().manual_seed(5)
        self.projection = torch.nn.Parameter(torch.randn(24, 3, generator=generator, dtype=torch.float64))
        self.scale = torch.nn.Parameter(torch.tensor(0.7, dtype=torch.float64))
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def rows(self, model, outputs, inputs):
        tokens = outputs.vision_model_output.last_hidden_state  # (R, 1 + M, D)
        return {"image": [outputs.image_embeds @ self.projection], "tokens": (tokens.square(), None), "n": inputs["n"]}

    def forward(self, model, rows, columns):
        scores = rows["image"][0] @ columns["image"][0].t() * self.scale  # (R, C)
        sizes = rows["tokens"][0].mean(dim=(1, 2)) * columns["tokens"][0].mean()  # (R,)
        return {"toy_loss": scores.logsumexp(dim=1).mean() + (sizes * rows["n"]).mean()}

    input_names = ("n",)

    def on_step_end(self, model):
        self.num_steps += 1


class ShortCaptions(ShortCaptionLoss):
    """The loss of short captions on captions made of the batch, with fewer components than there are pairs."""

    input_names = ("n",)

    def __init__(self):
        super().__init__(weight=0.5, num_components=4)

    def rows(self, model, outputs, inputs):
        input_ids = inputs["input_ids"].clone()
        input_ids[:, 1] = inputs["n"].long() % 5
        return super().rows(
            model, outputs, {"short_input_ids": input_ids, "short_attention_mask": inputs["attention_mask"]}
        )


def cases(world_size: int, quick: bool) -> dict[str, dict]:
    """name -> what differs from one plain pass over captions that all differ; quick: most take two steps."""
    split = {"mini_batch_size": MINI_BATCH_SIZES[world_size]}
    duplicates = {"duplicates": True}
    chosen: dict[str, dict] = {
        "plain": {},
        "plain, duplicates": duplicates,
        "mini-batches": split,
        "mini-batches, duplicates": {**duplicates, **split},
        "plain, toy part": {"toy": True},
        "mini-batches, toy part": {"toy": True, **split},
        "plain, short captions": {"short": True},
        "mini-batches, short captions": {"short": True, **split},
        "plain, duplicates, sigmoid": {**duplicates, "sigmoid": True},
        "mini-batches, duplicates, sigmoid": {**duplicates, **split, "sigmoid": True},
    }
    if world_size == 2:
        both = {**duplicates, **split, "steps": 2}
        accumulated = {**both, "gradient_accumulation_steps": 2}
        chosen |= {
            "mini-batches, duplicates, tokens local": {**both, "token_loss_scope": "local"},
            "mini-batches, duplicates, tokens in groups": {**both, "group_size": 2},
            "mini-batches, duplicates, accumulated": accumulated,
            "mini-batches, duplicates, checkpointing": {**both, "activation_checkpointing": True},
            "mini-batches, duplicates, LoRA": {**both, "recipe": "LoRA"},
            "mini-batches, duplicates, frozen parts": {**both, "recipe": "frozen parts"},
            "plain, duplicates, FSDP2": {**duplicates, "steps": 2, **FSDP},
            "mini-batches, duplicates, accumulated, FSDP2": {**accumulated, **FSDP},
            "plain, toy part, FSDP2": {"toy": True, "steps": 2, **FSDP},
            "mini-batches, short captions, sigmoid, FSDP2": {"short": True, "sigmoid": True, **both, **FSDP},
            "mini-batches, accumulated, toy part, FSDP2": {"toy": True, **accumulated, **FSDP},
            "mini-batches, duplicates, LoRA, FSDP2": {**both, "recipe": "LoRA", **FSDP},
            "mini-batches, duplicates, frozen parts, FSDP2": {**both, "recipe": "frozen parts", **FSDP},
        }
    if world_size == 3:
        chosen |= {
            "plain, toy part, FSDP2": {"toy": True, "steps": 2, **FSDP},
            "mini-batches, toy part, FSDP2": {"toy": True, "steps": 2, **split, **FSDP},
        }
    if quick:
        chosen |= {name: {**case, "steps": 2} for name, case in chosen.items() if name != "mini-batches, duplicates"}
    return chosen


def make_model(dropout: float = 0.0, group_size: int | None = None, sigmoid: bool = False) -> MLIPModel:
    tower = {"attention_dropout": dropout}
    vision = {"merge_ratio": 0.5, "num_hidden_layers": 3, "patch_size": 8, **tower}
    instance_loss = "sigmoid" if sigmoid else "info_nce"
    model = small_model(vision=vision, text=tower, token_loss_group_size=group_size, instance_loss=instance_loss)
    return open_gate(model).double().train()


def randomise_adapters(model: MLIPModel) -> None:
    """B is zero at the start of LoRA, and A has no gradient then."""
    generator = torch.Generator().manual_seed(3)
    for _, parameter in sorted((name, p) for name, p in model.named_parameters() if "lora_" in name):
        with torch.no_grad():
            parameter.normal_(std=0.1, generator=generator)


def apply_recipe(model: MLIPModel, recipe: str | None) -> dict[str, float]:
    """Makes the parameters of a recipe train, and no others. Returns the learning rate of each, by name."""
    if recipe == "LoRA":
        layers = ["q_proj", "k_proj", "v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"]
        peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=3, target_modules=layers), model)
        randomise_adapters(model)
    elif recipe == "frozen parts":
        frozen = ("text", "token_text", "vision_model.embeddings", "vision_model.pre", "vision_model.frequency.")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith((*frozen, "vision_model.encoder.layers.0.")))
    rates = {}
    for name in (name for name, parameter in model.named_parameters() if parameter.requires_grad):
        depth = 2 if name.startswith("text") else 3
        block = name.partition(".layers.")[2][:1] if "encoder" in name else None
        rates[name] = 1e-3 * (0.5 ** (depth - int(block)) if recipe and block else 1)
    return rates


def make_batch(duplicates: bool, seed: int = 0) -> dict[str, torch.Tensor]:
    batch = pairs_batch(NUM_PAIRS, seed=seed)
    batch["pixel_values"] = batch["pixel_values"].double()
    image_ids = torch.arange(NUM_PAIRS)
    if duplicates:  # of a caption and of an image, with two and with three processes in different ones
        batch["input_ids"][10], batch["attention_mask"][10] = batch["input_ids"][0], batch["attention_mask"][0]
        image_ids[9] = image_ids[1]
    return {**batch, "image_ids": image_ids, "n": torch.arange(NUM_PAIRS).double()}


def share_of(batch: dict[str, torch.Tensor], rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """The share of a process, padded to its own longest caption, as the collator hands it on."""
    share = {name: tensor.split(SHARES[world_size])[rank] for name, tensor in batch.items()}
    longest = int(share["attention_mask"].sum(dim=1).max())
    for name in ("input_ids", "attention_mask"):
        share[name] = share[name][:, :longest]
    return {**share, "names": ["?"] * len(share["image_ids"]), "skipped": [], "num_truncated": 0}


class ModelLossesOnly(ModelLosses):
    """The model's losses on batches that also hold the toy part's input."""

    input_names = ("n",)


def make_trainer(model: MLIPModel, toy: bool = False, short: bool = False, **arguments) -> MLIPTrainer:
    """A trainer that is ready for `training_step`."""
    args = MLIPTrainingArguments(
        "unused",
        use_cpu=True,
        ddp_backend="gloo" if "WORLD_SIZE" in os.environ else None,
        report_to="none",
        learning_rate=1e-3,
        per_device_train_batch_size=NUM_PAIRS,
        **arguments,
    )
    further = [*([ToyPart()] if toy else []), *([ShortCaptions()] if short else [])]
    objective = Objective([ModelLossesOnly(args.token_loss_scope), *further])
    trainer = MLIPTrainer(
        model,
        args,
        train_dataset=[None] * 99,
        processing_class=SimpleNamespace(tokenizer=None),
        objective=objective,
    )
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    randomise_adapters(model)
    if args.activation_checkpointing:
        model.activation_checkpointing_enable()
    trainer.create_optimizer()
    trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(model, trainer.optimizer)
    return trainer


def accumulate(trainer: MLIPTrainer, batches: list[dict[str, torch.Tensor]]) -> None:
    """The backward passes of one step, as `Trainer` runs them."""
    rank, world_size = trainer.args.process_index, trainer.args.world_size
    for i, batch in enumerate(batches):
        is_last = i == len(batches) - 1
        trainer.accelerator.gradient_state._set_sync_gradients(is_last)
        share = share_of(batch, rank, world_size)
        if is_last:
            trainer.training_step(trainer.model_wrapped, share)
        else:
            with trainer.accelerator.no_sync(trainer.model_wrapped):
                trainer.training_step(trainer.model_wrapped, share)


def step(trainer: MLIPTrainer) -> None:
    """The optimizer step, as `Trainer` runs it."""
    trainer.optimizer.step()
    trainer.finish_step()
    trainer.optimizer.zero_grad()


def parameters_of(model: torch.nn.Module, objective: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    named = {**dict(model.named_parameters()), **dict(objective.named_parameters())}
    return {name: parameter for name, parameter in named.items() if parameter.requires_grad}


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def run_case(
    duplicates: bool = False,
    steps: int = STEPS,
    group_size: int | None = None,
    toy: bool = False,
    short: bool = False,
    sigmoid: bool = False,
    recipe: str | None = None,
    **arguments,
) -> dict[str, dict[str, torch.Tensor]]:
    """Gradients of the first step and weights after the last one."""
    AcceleratorState._reset_state()
    arguments |= RECIPES.get(recipe or "", {})
    trainer = make_trainer(make_model(group_size=group_size, sigmoid=sigmoid), toy, short, **arguments)
    model = trainer.accelerator.unwrap_model(trainer.model_wrapped)
    assert isinstance(model, FSDPModule) == ("fsdp" in arguments)
    parameters = parameters_of(model, trainer.training_objective)
    gradients = {}
    for number in range(steps):
        seeds = range(number, number + arguments.get("gradient_accumulation_steps", 1))
        accumulate(trainer, [make_batch(duplicates, seed) for seed in seeds])
        if number == 0:
            gradients = {name: whole(parameter.grad) for name, parameter in parameters.items()}
        step(trainer)
    if toy:
        assert int(trainer.training_objective.parts["toy"].num_steps) == steps
    return {"gradients": gradients, "weights": {name: whole(weight) for name, weight in parameters.items()}}


def let_accelerate_shard_on_the_cpu() -> None:
    """There accelerate ignores its FSDP plugin; what it does with it elsewhere, and torch's FSDP, work all the same."""
    start = AcceleratorState.__init__

    def start_with_plugin(self, *args, fsdp_plugin=None, **kwargs):
        start(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

    AcceleratorState.__init__ = start_with_plugin


class ShapeRecorder(TorchDispatchMode):
    """Collects the shapes of all tensors that are computed, in the backward pass too."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        outputs = function(*args, **(kwargs or {}))
        self.shapes |= {tuple(leaf.shape) for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor)}
        return outputs


def measure_exchanges(rank: int, world_size: int) -> dict[tuple[bool, bool], tuple[int, int, bool]]:
    """(sigmoid, global tokens) -> bytes and collectives that the losses of this process take, and whether a tensor had
    the shape of all its scores."""
    measured = {}
    for sigmoid in (False, True):
        for has_global_tokens in (False, True):
            model = make_model(group_size=None if has_global_tokens else 2, sigmoid=sigmoid)
            batch = share_of(make_batch(duplicates=True), rank, world_size)
            inputs = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask", "image_ids")}
            pairs = model(**inputs, return_pairs=True).pairs
            rows = tree_map_only(
                torch.Tensor, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, pairs
            )
            part, exchange = ModelLosses(), Exchange(len(batch["image_ids"]))
            with count_sent() as sent, ShapeRecorder() as recorder:
                columns = part.columns(model, rows, exchange)
                torch.stack(list(part(model, rows, columns).values())).sum().backward()
            has_all_scores = (exchange.num_rows, NUM_PAIRS) in recorder.shapes
            measured[sigmoid, has_global_tokens] = (sent["num_bytes"], sent["num_exchanges"], has_all_scores)
    return measured


def check_exchanges(world_size: int, folder: Path) -> None:
    """What each process sent is what benchmarks/exchange_cost.py computes from the shapes."""
    rows = SHARES[world_size]
    longest = int(make_batch(duplicates=True)["attention_mask"].sum(dim=1).max())
    shapes = Shapes(width=24, text_tokens=longest, float_bytes=8)
    for rank in range(world_size):
        measured = torch.load(folder / f"exchanges-{world_size}-{rank}.pt")
        for (sigmoid, has_global_tokens), (num_bytes, num_exchanges, has_all_scores) in measured.items():
            given = rows, rank, shapes
            expected = [keys_sent(*given), sigmoid_sent(*given) if sigmoid else info_nce_sent(*given, 3)]
            expected += [global_tokens_sent(*given)] if has_global_tokens else []
            assert num_bytes == sum(sent.num_bytes for sent in expected), (sigmoid, has_global_tokens)
            assert num_exchanges == sum(sent.num_exchanges for sent in expected), (sigmoid, has_global_tokens)
            assert has_all_scores == (has_global_tokens or not sigmoid)


def run_process(rank: int, world_size: int, quick: bool, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    let_accelerate_shard_on_the_cpu()
    results = {name: run_case(**case) for name, case in cases(world_size, quick).items()}
    torch.save(results, f"{folder}/{world_size}-{rank}.pt")
    torch.save(measure_exchanges(rank, world_size), f"{folder}/exchanges-{world_size}-{rank}.pt")
    dist.destroy_process_group()


def run_processes(world_size: int, quick: bool, folder: str) -> list[dict[str, dict[str, dict[str, torch.Tensor]]]]:
    """For each process, its results by case."""
    if world_size == 1:
        return [{name: run_case(**case) for name, case in cases(1, quick).items()}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = (world_size, quick, port, folder)
    torch.multiprocessing.start_processes(run_process, given, nprocs=world_size, start_method="forkserver")
    return [torch.load(f"{folder}/{world_size}-{rank}.pt") for rank in range(world_size)]


@functools.cache
def reference(
    duplicates: bool = False,
    steps: int = STEPS,
    group_size: int | None = None,
    gradient_accumulation_steps: int = 1,
    local_tokens_of: int | None = None,
    toy: bool = False,
    short: bool = False,
    sigmoid: bool = False,
    recipe: str | None = None,
) -> dict[str, dict[str, torch.Tensor]]:
    """The same by one plain batch in one process, without trainer, wrapper, exchange or mini-batch."""
    model = make_model(group_size=group_size, sigmoid=sigmoid)
    rates = apply_recipe(model, recipe)
    parts = [*([ToyPart()] if toy else []), *([ShortCaptions()] if short else [])]
    parameters = parameters_of(model, Objective(parts or [ModelLosses()]))
    has_no_decay = {
        name for name, p in parameters.items() if any(word in name for word in NO_DECAY) or name == "parts.toy.scale"
    }
    groups = [
        {"params": [p], "weight_decay": 0.0 if name in has_no_decay else 0.1, "lr": rates.get(name, 1e-3)}
        for name, p in parameters.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98))
    gradients = {}
    for step in range(steps):
        for seed in range(step, step + gradient_accumulation_steps):
            batch = make_batch(duplicates, seed)
            if local_tokens_of is not None:
                del batch["n"]
                loss = local_token_loss(model, model(**batch, return_pairs=True).pairs, local_tokens_of)
            else:
                n = batch.pop("n")
                outputs = model(**batch, return_loss=True, return_pairs=True)
                loss = outputs.loss
                for part in parts:
                    rows = part.rows(model, outputs, {**batch, "n": n})
                    [part_loss] = part(model, rows, rows).values()
                    loss = loss + 0.5 * part_loss
            (loss / gradient_accumulation_steps).backward()
        if step == 0:
            gradients = {name: parameter.grad.clone() for name, parameter in parameters.items()}
        optimizer.step()
        optimizer.zero_grad()
    return {"gradients": gradients, "weights": {name: whole(weight) for name, weight in parameters.items()}}


def reference_of(case: dict, world_size: int) -> dict[str, dict[str, torch.Tensor]]:
    known = {name: case[name] for name in inspect.signature(reference).parameters if name in case}
    return reference(**known, local_tokens_of=world_size if case.get("token_loss_scope") == "local" else None)


def local_token_loss(model: MLIPModel, pairs: PairEmbeddings, world_size: int) -> torch.Tensor:
    """The loss where the token level compares only the pairs of one process, by hand."""
    instance = model.compute_losses(pairs._replace(tokens=None))["loss"]
    token, start = 0.0, 0
    for count in SHARES[world_size]:
        rows = slice(start, start + count)
        keys = [pairs.caption_keys[rows], pairs.image_keys[rows]]
        scores = token_scores(*(tensor[rows] for tensor in pairs.tokens))
        token += token_loss(*scores, model.token_logit_scale, positive_targets(keys, keys)) * count / NUM_PAIRS
        start += count
    return instance + model.config.token_loss_weight * token


def largest_difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    assert found.keys() == expected.keys()
    return max((found[name] - expected[name]).abs().max().item() for name in expected)


@pytest.mark.parametrize("world_size", SHARES)
def test_gradients_and_weights_equal_those_of_one_large_batch(world_size, tmp_path):
    by_rank = run_processes(world_size, quick=True, folder=str(tmp_path))
    for name, case in cases(world_size, quick=True).items():
        expected = reference_of(case, world_size)
        for results in by_rank:
            assert largest_difference(results[name]["gradients"], expected["gradients"]) < 1e-9, name
            assert largest_difference(results[name]["weights"], expected["weights"]) < 1e-9, name
            for kind, tensors in results[name].items():  # and all processes agree to the bit
                assert all(torch.equal(tensors[key], by_rank[0][name][kind][key]) for key in tensors), (name, kind)
    if world_size > 1:
        check_exchanges(world_size, tmp_path)
    else:
        assert all(measured[:2] == (0, 0) for measured in measure_exchanges(0, 1).values())


def test_the_reference_would_notice_a_loss_within_the_process():
    """What the test above compares with is far from what each process would compute alone."""
    whole_batch = reference(duplicates=True, steps=1)["gradients"]
    within = reference(duplicates=True, steps=1, local_tokens_of=2)["gradients"]
    assert largest_difference(whole_batch, within) > 1e-4


def test_dropout_of_the_second_pass_is_that_of_the_first():
    batch, seed = make_batch(duplicates=True), 7
    model = make_model(dropout=0.3)
    trainer = make_trainer(model, mini_batch_size=4)
    torch.manual_seed(seed)
    accumulate(trainer, [batch])
    drawn_after = torch.rand(3)

    plain = make_model(dropout=0.3)  # the same mini-batches, all their graphs kept
    torch.manual_seed(seed)
    del batch["n"]
    parts = [plain(**mini_batch, return_pairs=True).pairs for mini_batch in split_rows(batch, 3)]
    assert torch.equal(torch.rand(3), drawn_after)  # the second pass draws no random numbers of its own
    plain.compute_losses(join_rows(parts))["loss"].backward()
    gradients = [{name: parameter.grad for name, parameter in m.named_parameters()} for m in (model, plain)]
    assert largest_difference(*gradients) < 1e-12
    before = gradients[0]["visual_projection.weight"].clone()
    trainer.optimizer.zero_grad()
    accumulate(trainer, [make_batch(duplicates=True)])  # other random numbers, other gradients
    assert (model.visual_projection.weight.grad - before).abs().max() > 1e-4


def test_one_mini_batch_is_the_plain_step_dropout_included():
    gradients = []
    for size, batch_size in ((None, NUM_PAIRS), (NUM_PAIRS, NUM_PAIRS + 1)):
        model = make_model(dropout=0.3)
        trainer = make_trainer(model, mini_batch_size=size)
        trainer.args.per_device_train_batch_size = batch_size
        torch.manual_seed(3)
        accumulate(trainer, [make_batch(duplicates=True)])
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert largest_difference(*gradients) < 1e-12


def test_mini_batches_take_bfloat16_and_a_frozen_tower():
    gradients = []
    for size in (None, 4):
        AcceleratorState._reset_state()
        model = make_model().float()
        model.text_model.requires_grad_(False)
        model.logit_scale.requires_grad_(False)
        batch = make_batch(duplicates=True)
        batch["pixel_values"] = batch["pixel_values"].float()
        accumulate(make_trainer(model, mini_batch_size=size, bf16=True), [batch])
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    AcceleratorState._reset_state()
    plain, split = (torch.cat([gradient.flatten() for gradient in found.values()]) for found in gradients)
    assert torch.nn.functional.cosine_similarity(plain, split, dim=0) > 0.999
    torch.testing.assert_close(split.norm(), plain.norm(), rtol=0.01, atol=0)


def test_a_random_state_replays_and_leaves_no_trace():
    state = RandomState(torch.zeros(1))
    first, then = torch.rand(2), torch.get_rng_state()
    with state.replayed():
        assert torch.equal(torch.rand(2), first)
    assert torch.equal(torch.get_rng_state(), then)


def main() -> None:
    """Prints the table of docs/training.md."""
    import tempfile

    print(f"| processes | case | largest difference of a gradient | of a weight after {STEPS} (*: 2) steps |")
    print("| --- | --- | --- | --- |")
    for world_size in SHARES:
        with tempfile.TemporaryDirectory() as folder:
            by_rank = run_processes(world_size, quick=False, folder=folder)
        for name, case in cases(world_size, quick=False).items():
            expected = reference_of(case, world_size)
            worst = [
                max(largest_difference(results[name][kind], expected[kind]) for results in by_rank)
                for kind in ("gradients", "weights")
            ]
            print(f"| {world_size} | {name} | {worst[0]:.1e} | {worst[1]:.1e}{'*' * ('steps' in case)} |")


if __name__ == "__main__":
    sys.exit(main())
