# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""LoRA, frozen parts, learning rates by layer and the warm-up of the head: what trains, how fast, and what is saved."""

import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import pairs_batch, small_model
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from training_cases import make_processor, make_rows
from transformers import AutoModel

from modeling_mlip import MLIPModel
from modeling_mlip.training import MLIPTrainer, MLIPTrainingArguments
from modeling_mlip.training.fine_tuning import describe_recipe
from modeling_mlip.training.lora import adapted_layers, add_adapters, merged_state_dict
from modeling_mlip.training.trained_parameters import (
    base_learning_rate,
    count_blocks,
    count_blocks_above,
    freeze_parameters,
)

PROCESSOR = make_processor()
GATE = "vision_model.frequency.gate"


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> str:
    """A folder with the model that all runs start from."""
    folder = tmp_path_factory.mktemp("start")
    tokenizer = PROCESSOR.tokenizer
    text = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text |= {"vocab_size": len(tokenizer)}
    small_model(vision={"num_hidden_layers": 2, "patch_size": 8}, text=text).save_pretrained(folder)
    return str(folder)


def make_arguments(folder: Path | str, **arguments) -> MLIPTrainingArguments:
    settings = {"max_steps": 2, "per_device_train_batch_size": 6, "logging_steps": 1, "save_strategy": "no"}
    return MLIPTrainingArguments(str(folder), use_cpu=True, report_to="none", **{**settings, **arguments})


def make_trainer(start: str, folder: Path | str, new_parameters=(), objective=None, **arguments) -> MLIPTrainer:
    return MLIPTrainer(
        MLIPModel.from_pretrained(start).train(),
        make_arguments(folder, **arguments),
        train_dataset=make_rows(12),
        processing_class=PROCESSOR,
        new_parameters=new_parameters,
        objective=objective,
    )


def changed_names(start: str, state: dict[str, torch.Tensor]) -> set[str]:
    before = load_file(f"{start}/model.safetensors")
    assert before.keys() == state.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, state[name])}


def trained_names(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# Frozen parts


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_frozen_tower_and_its_projections_keep_their_values_and_the_other_tower_trains(side, start, tmp_path):
    trainer = make_trainer(start, tmp_path, freeze=side, mini_batch_size=4)
    trainer.train()
    changed = changed_names(start, trainer.model.state_dict())
    of_image = {name for name in changed if name.startswith(("vis", "frequency_proj", "token_vis", "token_freq"))}
    of_text = {name for name in changed if name.startswith(("text", "token_text"))}
    frozen, trained = (of_image, of_text) if side == "image" else (of_text, of_image)
    assert not frozen
    assert "logit_scale" in changed and any(".layers.0." in name for name in trained)


def test_freeze_layers_freezes_the_first_blocks_and_what_comes_before_them_in_each_tower():
    model = small_model()
    frozen = freeze_parameters(model, make_arguments("unused", freeze_layers=2), frozenset({GATE}))
    blocks = {".".join(name.split(".")[:4]) for name in frozen if "encoder" in name}
    assert blocks == {f"{tower}_model.encoder.layers.{index}" for tower in ("vision", "text") for index in (0, 1)}
    others = {name.rpartition(".")[0] for name in frozen if "encoder" not in name}
    assert {"vision_model.pre_layrnorm", "text_model.embeddings.token_embedding"} <= others
    assert all("embeddings" in name or "pre_layrnorm" in name or "frequency" in name for name in others)
    trained = trained_names(model)
    assert GATE in trained and "vision_model.post_layernorm.weight" in trained and "visual_projection.weight" in trained
    assert not trained & set(frozen)


RECIPES = {
    "LiT": {"freeze": "image"},
    "text tower frozen": {"freeze": "text"},
    "first blocks frozen": {"freeze_layers": 1},
    "LoRA": {"lora_rank": 2},
    "LoRA with a new gate": {"lora_rank": 2, "new_parameters": [GATE]},
    "LoRA on one tower with checkpointing": {"lora_rank": 2, "freeze": "image", "activation_checkpointing": True},
    "reentrant checkpointing": {
        "freeze_layers": 1,
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"use_reentrant": True},
    },
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_trained_parameter_has_a_gradient_so_that_ddp_waits_for_none(recipe, start, tmp_path):
    trainer = make_trainer(start, tmp_path, **RECIPES[recipe])
    if trainer.args.activation_checkpointing:
        trainer.model.activation_checkpointing_enable(trainer.args.activation_checkpointing_kwargs)
    trainer.current_gradient_accumulation_steps = 1
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.training_step(trainer.model, batch)
    without = [name for name, p in trainer.model.named_parameters() if (p.grad is not None) != p.requires_grad]
    assert not without


# Learning rates


def test_layer_decay_of_embeddings_blocks_and_head_is_that_of_timm():
    """The final LayerNorm has the rate of the head, as in BEiT; timm gives it that of the last block."""
    model = small_model()
    decay, blocks = 0.7, count_blocks(model)
    theirs = VisionTransformer(img_size=32, patch_size=4, embed_dim=16, depth=4, num_heads=2, pre_norm=True)
    scales = {
        id(parameter): group["lr_scale"]
        for group in param_groups_layer_decay(theirs, layer_decay=decay)
        for parameter in group["params"]
    }
    layers = "vision_model.encoder.layers"
    pairs = {
        "vision_model.embeddings.patch_embedding.weight": theirs.patch_embed.proj.weight,
        "vision_model.embeddings.position_embedding.weight": theirs.pos_embed,
        "vision_model.pre_layrnorm.weight": theirs.norm_pre.weight,
        **{f"{layers}.{index}.mlp.fc1.weight": theirs.blocks[index].mlp.fc1.weight for index in range(4)},
        "visual_projection.weight": theirs.head.weight,
    }
    for name, parameter in pairs.items():
        model.get_parameter(name)
        assert decay ** count_blocks_above(name, blocks) == pytest.approx(scales[id(parameter)]), name
    assert count_blocks_above("vision_model.post_layernorm.weight", blocks) == 0
    assert count_blocks_above("text_model.encoder.layers.0.mlp.fc1.weight", blocks) == 2
    assert count_blocks_above("text_model.encoder.encoder.layer.0.output.dense.weight", blocks) == 2  # RoBERTa
    assert count_blocks_above("text_model.encoder.embeddings.word_embeddings.weight", blocks) == 3


def test_each_parameter_moves_at_its_own_rate_and_the_log_has_the_rate_of_the_head(start, tmp_path):
    """One step of sign descent moves every weight by its learning rate."""
    trainer = make_trainer(
        start,
        tmp_path,
        new_parameters=[GATE],
        max_steps=1,
        warmup_steps=0,
        learning_rate=1e-3,
        layer_decay=0.5,
        new_parameters_learning_rate=0.1,
        weight_decay=0.0,
        adam_epsilon=1e-30,
        max_grad_norm=0,
    )
    trainer.train()
    before = load_file(f"{start}/model.safetensors")
    expected = {
        "visual_projection.weight": 1e-3,
        "logit_scale": 1e-3,
        "text_model.final_layer_norm.weight": 1e-3,
        "vision_model.encoder.layers.1.mlp.fc1.weight": 5e-4,
        "text_model.encoder.layers.0.mlp.fc1.bias": 2.5e-4,
        "vision_model.embeddings.class_embedding": 1.25e-4,
        "vision_model.frequency.input_projection.weight": 1.25e-4,
        GATE: 0.1,
    }
    for name, rate in expected.items():
        moved = (trainer.model.state_dict()[name] - before[name]).abs()
        torch.testing.assert_close(moved[moved > 0].median().item(), rate, rtol=0.01, atol=0)
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(1e-3)
    assert base_learning_rate(trainer.optimizer) == trainer.optimizer.param_groups[0]["lr"]


def test_the_towers_wait_during_the_head_warmup_whose_length_may_be_a_fraction(start, tmp_path):
    trainer = make_trainer(start, tmp_path, [GATE], max_steps=3, head_warmup_steps=0.67, warmup_steps=0)
    changed = []
    finish_step = trainer.finish_step

    def record_step():
        finish_step()
        names = changed_names(start, trainer.model.state_dict())
        changed.append({name for name in names if name.startswith(("vision_model", "text_model"))})

    trainer.finish_step = record_step
    trainer.train()
    assert changed[:2] == [{GATE}, {GATE}] and any(".layers.0." in name for name in changed[2])
    assert {"visual_projection.weight", "text_projection.weight", "logit_scale"} <= changed_names(
        start, trainer.model.state_dict()
    )


# LoRA


def randomise_adapters(model: MLIPModel) -> None:
    torch.manual_seed(1)
    for layer in adapted_layers(model).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)


def test_merged_weights_are_those_of_peft(start):
    model = MLIPModel.from_pretrained(start)
    args = make_arguments("unused", lora_rank=3, lora_alpha=5.0, freeze_layers=1)
    add_adapters(model, args)
    layers = list(adapted_layers(model))
    assert len(layers) == 2 * 6 and all(".layers.1." in name for name in layers)
    assert trained_names(model) == {f"{name}.lora_{letter}.default.weight" for name in layers for letter in "AB"}
    randomise_adapters(model)
    merged = merged_state_dict(model, model.state_dict())
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=layers)
    theirs = peft.get_peft_model(MLIPModel.from_pretrained(start), config)
    theirs.load_state_dict({f"base_model.model.{name}": tensor for name, tensor in model.state_dict().items()})
    expected = theirs.merge_and_unload().state_dict()
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], expected[name]) for name in expected)


@pytest.fixture(scope="module")
def adapted(start, tmp_path_factory) -> tuple[MLIPTrainer, Path]:
    """A finished run of LoRA with an average of the weights, and its folder."""
    folder = tmp_path_factory.mktemp("runs") / "lora"
    trainer = make_trainer(start, folder, **LORA)
    trainer.train()
    trainer.save_model()
    return trainer, folder


LORA = {
    "lora_rank": 2,
    "new_parameters": [GATE],
    "max_steps": 3,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 2,
    "ema_decay": 0.5,
}


def test_a_run_of_lora_leaves_a_plain_model_that_differs_in_the_adapted_layers_and_new_parameters(adapted, start):
    trainer, folder = adapted
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()) and type(trainer.model) is MLIPModel
    changed = changed_names(start, load_file(folder / "model.safetensors"))
    assert changed - {GATE} == {f"{name}.weight" for name in adapted_layer_names()} and GATE in changed
    state = trainer.model.state_dict()  # merged in memory too
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert (folder / "modeling_mlip.py").is_file() and not (folder / "adapter_config.json").exists()


def adapted_layer_names() -> set[str]:
    linear = [f"self_attn.{letter}_proj" for letter in ("q", "k", "v", "out")] + ["mlp.fc1", "mlp.fc2"]
    return {
        f"{tower}_model.encoder.layers.{index}.{name}"
        for tower in ("vision", "text")
        for index in (0, 1)
        for name in linear
    }


def test_a_checkpoint_of_lora_loads_as_a_model_and_resumes_to_the_same_weights(adapted, start, tmp_path):
    _, folder = adapted
    checkpoint = tmp_path / "checkpoint-2"
    shutil.copytree(folder / "checkpoint-2", checkpoint)
    _, report = AutoModel.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(report.values())
    again = make_trainer(start, tmp_path, **LORA)
    again.train(resume_from_checkpoint=str(checkpoint))
    again.save_model()
    expected, found = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_run_of_lora_is_not_resumed_with_other_adapters_or_from_another_model(adapted, start, tmp_path):
    checkpoint = str(adapted[1] / "checkpoint-2")
    for changes, message in (
        ({"lora_rank": 3}, "contains other parameters than this run trains"),
        ({"freeze": "image"}, "contains other parameters than this run trains"),
        ({"lora_rank": None}, "was saved with lora_rank, and this run has lora_rank=None"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(start, tmp_path, **{**LORA, **changes}).train(resume_from_checkpoint=checkpoint)
    trainer = make_trainer(start, tmp_path, **LORA)
    with torch.no_grad():
        trainer.model.visual_projection.weight.add_(1)
    with pytest.raises(ValueError, match="was not trained from this model: visual_projection.weight differs"):
        trainer.train(resume_from_checkpoint=checkpoint)


def test_a_second_call_of_train_starts_new_adapters_from_the_merged_weights(adapted):
    trainer, _ = adapted
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.args.save_strategy = "no"
    trainer.train()
    after = trainer.model.state_dict()
    assert before.keys() == after.keys()
    layer = "text_model.encoder.layers.0.mlp.fc1"
    assert not torch.equal(before[f"{layer}.weight"], after[f"{layer}.weight"])
    assert torch.equal(before[f"{layer}.bias"], after[f"{layer}.bias"])


def test_a_kept_adapter_loads_with_peft_on_the_starting_model_and_resumes(start, tmp_path):
    flags = {"lora_rank": 2, "keep_adapter": True, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(start, tmp_path / "run", **flags)
    trainer.train()
    trainer.save_model()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    batch = pairs_batch()
    batch["input_ids"][:, -1] = trainer.model.config.text_config.eos_token_id
    with torch.no_grad():
        expected = trainer.model.eval()(**batch).logits_per_image
        model = peft.PeftModel.from_pretrained(MLIPModel.from_pretrained(start), tmp_path / "run").eval()
        assert torch.equal(model(**batch).logits_per_image, expected)
        assert not torch.allclose(MLIPModel.from_pretrained(start).eval()(**batch).logits_per_image, expected)
    again = make_trainer(start, tmp_path / "again", **flags)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))
    again.save_model()
    found, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("again", "run"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_best_checkpoint_of_lora_is_the_model_at_the_end(start, tmp_path):
    choice = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    args = make_arguments(tmp_path, lora_rank=2, load_best_model_at_end=True, learning_rate=1e-2, **choice)
    trainer = MLIPTrainer(
        MLIPModel.from_pretrained(start),
        args,
        train_dataset=make_rows(12),
        eval_dataset=make_rows(6),
        processing_class=PROCESSOR,
    )
    trainer.train()
    best = load_file(f"{trainer.state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(tensor, best[name]) for name, tensor in trainer.model.state_dict().items())


def test_the_recipe_names_the_arguments_that_differ_from_their_defaults():
    assert describe_recipe(make_arguments("unused")) == {}
    arguments = {"lora_rank": 4, "freeze": "text", "head_warmup_steps": 0.5}
    assert describe_recipe(make_arguments("unused", **arguments)) == arguments
    assert make_arguments("unused", lora_rank=4).lora_alpha == 8
    assert describe_recipe(make_arguments("unused", lora_rank=4, lora_alpha=3.0)) == {"lora_rank": 4, "lora_alpha": 3.0}


# Refused

WRONG = {
    "rank 0": ({"lora_rank": 0}, "lora_rank=0: choose 1 or more"),
    "alpha without rank": ({"lora_alpha": 4.0}, "lora_alpha=4.0 has no effect without lora_rank"),
    "adapter without rank": ({"keep_adapter": True}, "keep_adapter=True has no effect without lora_rank"),
    "negative alpha": ({"lora_rank": 2, "lora_alpha": -1.0}, "lora_alpha=-1.0: choose a finite number above 0"),
    "unknown tower": ({"freeze": "audio"}, "freeze='audio': choose one of image, text"),
    "negative layers": ({"freeze_layers": -1}, "freeze_layers=-1: choose a finite number, 0 or more"),
    "too many layers": ({"freeze_layers": 3}, "freeze_layers=3: choose at most 2"),
    "growing decay": ({"layer_decay": 1.5}, "layer_decay=1.5: choose a value above 0 and at most 1"),
    "negative rate": ({"new_parameters_learning_rate": -1.0}, "new_parameters_learning_rate=-1.0: choose a finite"),
    "rate that is no number": (
        {"new_parameters_learning_rate": float("nan")},
        "new_parameters_learning_rate=nan: choose",
    ),
    "nothing new": ({"new_parameters_learning_rate": 1e-3}, "new_parameters_learning_rate=0.001 has no effect"),
    "negative warm-up": ({"head_warmup_steps": -0.5}, "head_warmup_steps=-0.5: choose a finite number, 0 or more"),
    "warm-up of nothing": ({"head_warmup_steps": 2, "lora_rank": 2}, "nothing would train"),
    "no block for adapters": ({"lora_rank": 2, "freeze_layers": 2}, "leaves no block for lora_rank=2"),
    "adapter with new parameters": (
        {"lora_rank": 2, "keep_adapter": True, "new_parameters": [GATE]},
        "an adapter cannot contain the 1 parameters",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_or_contradiction_is_named_in_one_line_before_anything_is_written(case, start, tmp_path):
    arguments, message = WRONG[case]
    with pytest.raises(ValueError, match=message) as caught:
        make_trainer(start, tmp_path / "out", **arguments)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_optimizer_of_ones_own_has_learning_rates_of_its_own(start, tmp_path):
    model = MLIPModel.from_pretrained(start)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="layer_decay=0.5 has no effect on optimizers="):
        MLIPTrainer(
            model,
            make_arguments(tmp_path / "out", layer_decay=0.5),
            train_dataset=make_rows(12),
            processing_class=PROCESSOR,
            optimizers=(optimizer, None),
        )
