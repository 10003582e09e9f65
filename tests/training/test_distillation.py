# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Distillation from the starting model: its losses, its gradients in mini-batches, and its frozen teacher."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import pairs_batch, small_config
from training_cases import make_processor, make_rows

from modeling_mlip import MLIPModel
from modeling_mlip.training import MLIPTrainer, MLIPTrainingArguments
from modeling_mlip.training.distillation import Distillation, build_objective
from modeling_mlip.training.distributed import Exchange
from modeling_mlip.training.flags import parse_arguments

BOTH = {"keep_weight": 0.7, "distill_unmerged": 2.0}


cached_processor = functools.cache(make_processor)


def tiny_model(seed: int = 0, text: dict | None = None, **vision) -> MLIPModel:
    torch.manual_seed(seed)
    vision = {"num_hidden_layers": 2, "patch_size": 8, "merge_ratio": 0.5, **vision}
    model = MLIPModel(small_config(vision, text, token_loss_weight=0.0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def make_trainer(
    folder, seed: int = 0, with_evaluation: bool = False, num_references: int = 0, **changes
) -> MLIPTrainer:
    """A trainer of 12 pairs, whose model has the vocabulary of its tokenizer."""
    processor = cached_processor()
    tokenizer = processor.tokenizer
    text = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = tiny_model(seed, text={**text, "vocab_size": len(tokenizer)})
    rows = make_rows(12)
    args, eval_rows = arguments(folder, **changes), rows if with_evaluation else None
    references = make_rows(num_references) if num_references else None
    return MLIPTrainer(model, args, rows, eval_rows, processing_class=processor, reference_dataset=references)


def arguments(folder="unused", **changes) -> MLIPTrainingArguments:
    defaults = dict(
        use_cpu=True, report_to="none", max_steps=4, save_steps=2, logging_steps=1, per_device_train_batch_size=6
    )
    return MLIPTrainingArguments(str(folder), **{**defaults, **changes})


def with_references(batch: dict, references: dict) -> dict:
    """The batch with reference pairs, as `ReferenceCollator` adds them."""
    return {**batch, **{f"reference_{name}": tensor for name, tensor in references.items()}}


def losses_of(model: MLIPModel, part: Distillation, batch: dict) -> torch.Tensor:
    inputs = {**batch, **part.targets(batch)}
    outputs = model(**{name: tensor for name, tensor in batch.items() if name not in part.input_names})
    rows = part.rows(model, outputs, inputs)
    [loss] = part(model, rows, part.columns(model, rows, Exchange(len(batch["input_ids"])))).values()
    return loss


def unit(embeds: torch.Tensor) -> torch.Tensor:
    return embeds / embeds.square().sum(dim=1, keepdim=True).sqrt()


@pytest.mark.parametrize("prefix", ["", "reference_"])
@pytest.mark.parametrize("with_text", [True, False])
@pytest.mark.parametrize("loss_type", ["features", "similarities"])
def test_the_loss_equals_a_formula_in_float64(loss_type, with_text, prefix):
    model, teacher = tiny_model(0).double().eval(), tiny_model(1).double()
    batch = pairs_batch(5)
    batch["pixel_values"] = batch["pixel_values"].double()
    others = pairs_batch(5, seed=1)
    others["pixel_values"] = others["pixel_values"].double()
    inputs = with_references(others, batch) if prefix else batch
    part = Distillation("keep", teacher, 0.25, loss_type, with_text=with_text, prefix=prefix)
    found = losses_of(model, part, inputs)

    reference = tiny_model(1, merge_ratio=0.25).double().eval()
    embeds = []
    for each in (model, reference):
        images = each.get_image_features(batch["pixel_values"]).pooler_output
        texts = each.get_text_features(batch["input_ids"], batch["attention_mask"]).pooler_output
        embeds.append((unit(images), unit(texts)))
    (images, texts), (old_images, old_texts) = embeds
    texts = texts if with_text else old_texts
    if loss_type == "features":
        distances = [(images - old_images).square().sum(dim=1) / 2, (texts - old_texts).square().sum(dim=1) / 2]
        expected = torch.stack(distances[: 1 + with_text]).mean()
    else:
        scale = reference.logit_scale.exp()
        new, old = scale * images @ texts.T, scale * old_images @ old_texts.T
        expected = 0
        for ours, theirs in ((new, old), (new.T, old.T)):
            p, q = (scores.exp() / scores.exp().sum(dim=1, keepdim=True) for scores in (theirs, ours))
            expected += (p * (p / q).log()).sum(dim=1).mean() / 2
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found > 1e-3


@pytest.mark.parametrize("loss_type", ["features", "similarities"])
def test_the_loss_is_zero_for_the_teacher_itself_and_its_captions_get_a_gradient_only_with_text(loss_type):
    model, batch = tiny_model().eval(), pairs_batch(5)
    teacher = copy.deepcopy(model)
    same = losses_of(model, Distillation("keep", teacher, 0.5, loss_type), batch)
    merged = losses_of(model, Distillation("keep", teacher, 0.0, loss_type), batch)
    assert same.abs() < 1e-6 and merged > 1e-5
    for with_text in (True, False):
        part = Distillation("keep", tiny_model(1), 0.0, loss_type, with_text=with_text)
        model.zero_grad()
        losses_of(model, part, batch).backward()
        assert model.visual_projection.weight.grad.abs().sum() > 0
        assert (model.text_projection.weight.grad is not None) == with_text


class TwoProcesses(Exchange):
    """The exchange of one of two processes, which gathers the rows that are given to it."""

    def __init__(self, rows: list[int], rank: int, gathered: dict):
        self.rows, self.num_rows, self.gathered = rows, rows[rank], gathered

    def gather(self, structure):
        return self.gathered


@pytest.mark.parametrize("loss_type", ["features", "similarities"])
def test_the_mean_of_the_losses_of_two_processes_is_the_loss_of_the_whole_batch(loss_type):
    model, part = tiny_model(0).double(), Distillation("keep", tiny_model(1).double(), 0.0, loss_type)
    batch = pairs_batch(5)
    batch["pixel_values"] = batch["pixel_values"].double()
    rows = part.rows(model, model(**batch), {**batch, **part.targets(batch)})
    whole = part(model, rows, part.columns(model, rows, Exchange(5)))["keep_loss"]
    losses = []
    for rank, pairs in enumerate((slice(0, 2), slice(2, 5))):
        share, exchange = {name: tensor[pairs] for name, tensor in rows.items()}, TwoProcesses([2, 3], rank, rows)
        losses.append(exchange.row_share * part(model, share, part.columns(model, share, exchange))["keep_loss"])
    torch.testing.assert_close(sum(losses) / 2, whole, rtol=1e-12, atol=0)


def gradients(mini_batch_size: int | None, loss_type: str) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Gradients of a step with dropout in the model, and the number of pairs of each call of the teacher."""
    model = tiny_model(attention_dropout=0.0).double()
    args = arguments(mini_batch_size=mini_batch_size, keep_type=loss_type, **BOTH)
    rows = make_rows(6)
    trainer = MLIPTrainer(model, args, rows, processing_class=cached_processor(), reference_dataset=rows)
    batch = with_references(pairs_batch(6), pairs_batch(6, seed=1))
    batch |= {name: tensor.double() for name, tensor in batch.items() if tensor.is_floating_point()}
    trainer.current_gradient_accumulation_steps = 1
    teacher, calls = trainer.training_objective.parts["keep"].teacher, []
    teacher.visual_projection.weight.add_(0.1)  # so that it differs from the model
    teacher.vision_model.register_forward_hook(lambda module, inputs, output: calls.append(len(output[0])))
    trainer.training_step(model, batch)
    return {name: parameter.grad for name, parameter in model.named_parameters()}, calls


@pytest.mark.parametrize("loss_type", ["features", "similarities"])
def test_mini_batches_give_the_gradients_of_the_whole_batch_and_run_the_teacher_once(loss_type):
    (whole, calls), (split, split_calls) = gradients(None, loss_type), gradients(4, loss_type)
    assert calls == [6, 6, 6] and split_calls == [3, 3, 3, 3, 3, 3]  # each part calls the shared teacher
    for name, gradient in whole.items():
        torch.testing.assert_close(split[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_the_teacher_draws_no_random_numbers_and_stays_in_evaluation_mode():
    model = tiny_model(attention_dropout=0.5, patch_dropout=0.5)
    objective = build_objective(model, arguments(**BOTH), 0.0).train()
    before = torch.get_rng_state()
    targets = objective.add_targets(pairs_batch(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(targets["keep_image_embeds"], targets["unmerged_image_embeds"])  # both at merge ratio 0
    assert model.training and model.config.merge_ratio == 0.5


def test_a_run_leaves_the_teacher_as_it_was_and_out_of_its_files(tmp_path):
    trainers = []
    for folder, resumed in (("whole", None), ("resumed", tmp_path / "whole" / "checkpoint-2")):
        trainer = make_trainer(tmp_path / folder, num_references=5, **BOTH)
        model = trainer.model
        start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trainer.train(resume_from_checkpoint=resumed and str(resumed))
        trainers.append(trainer)
        teacher = trainer.training_objective.parts["keep"].teacher
        assert all(torch.equal(teacher.state_dict()[name], tensor) for name, tensor in start.items())
        assert not torch.equal(model.visual_projection.weight, start["visual_projection.weight"])
    whole, resumed = (trainer.model.state_dict() for trainer in trainers)
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
    assert {"keep_loss", "reference_loss", "unmerged_loss"} <= set().union(*trainers[0].state.log_history)
    state = torch.load(tmp_path / "whole" / "checkpoint-2" / "objective.pt", weights_only=True)["objective"]
    assert {name: tensor.shape for name, tensor in state.items()} == {
        "parts.keep.teacher_digest": (32,),
        "parts.reference.teacher_digest": (32,),
        "parts.unmerged.teacher_digest": (32,),
    }
    other = make_trainer(tmp_path / "other", seed=1, num_references=5, **BOTH)
    with pytest.raises(ValueError, match=r"distilled \(keep\) from a model with other weights.*same starting model"):
        other.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))


def test_arguments_choose_the_parts():
    model = tiny_model()
    assert list(build_objective(model, arguments()).parts) == ["model"]
    objective = build_objective(model, arguments(keep_type="similarities", **BOTH), 0.25)
    keep, unmerged = objective.parts["keep"], objective.parts["unmerged"]
    assert (keep.merge_ratio, keep.weight, keep.with_text, keep.loss_type) == (0.25, 0.7, True, "similarities")
    assert (unmerged.merge_ratio, unmerged.weight, unmerged.with_text) == (0.0, 2.0, False)
    [_, reference] = build_objective(model, arguments(reference_weight=3.0), 0.25, has_references=True).parts.values()
    assert (reference.name, reference.merge_ratio, reference.weight) == ("reference", 0.25, 3.0)
    assert build_objective(model, arguments(**BOTH)).parts["keep"].merge_ratio == 0.5
    with pytest.raises(ValueError, match="distill_unmerged=1.0 has no effect at merge_ratio=0.0: set merge_ratio"):
        build_objective(tiny_model(merge_ratio=0.0), arguments(distill_unmerged=1.0))
    for wrong, message in (
        ({"keep_weight": -1.0}, "keep_weight=-1.0: choose a finite number, 0 or more"),
        ({"keep_weight": float("nan")}, "keep_weight=nan: choose a finite number"),
        ({"keep_type": "x"}, "keep_type='x': choose one of features, similarities"),
    ):
        with pytest.raises(ValueError, match=message):
            arguments(**wrong)


def test_a_teacher_that_only_one_process_would_load_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, keep_weight=1.0)
    trainer.is_fsdp_enabled = True
    plugin = SimpleNamespace(cpu_ram_efficient_loading=True)
    trainer.accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match="starting weights in every process: set cpu_ram_efficient_loading to false"):
        trainer._prepare_model()


def test_the_flag_distill_unmerged_takes_a_weight_or_none():
    for flags, weight in ((["--distill_unmerged"], 1.0), (["--distill_unmerged", "5"], 5.0), ([], 0.0)):
        args = parse_arguments([*flags, "--output_dir", "runs", "--config_name", "tiny"])[2]
        assert args.distill_unmerged == weight
