# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""An objective sums named losses, owns the state of its parts, and leaves the saved model as it is."""

import copy
from pathlib import Path

import pytest
import torch
from conftest import pairs_batch, small_model
from safetensors.torch import load_file
from torch import nn
from training_cases import make_processor, make_rows
from transformers import AutoModel

from modeling_mlip import MLIPModel
from modeling_mlip.training import MLIPTrainer, MLIPTrainingArguments
from modeling_mlip.training.distributed import Exchange
from modeling_mlip.training.objective import ModelLosses, Objective, ObjectivePart


class Decoder(ObjectivePart):
    """A part with a decoder that is trained and a teacher that follows the model."""

    name = "decoder"

    def __init__(self, model: MLIPModel, weight: float = 0.5):
        super().__init__(weight)
        width = model.config.projection_dim
        self.decoder = nn.Linear(width, width)
        self.teacher = copy.deepcopy(model.visual_projection).requires_grad_(False)

    def rows(self, model, outputs, inputs):
        pooled = outputs.vision_model_output.pooler_output.detach()
        return {"image": self.decoder(outputs.image_embeds), "target": nn.functional.normalize(pooled, dim=-1)}

    def forward(self, model, rows, columns):
        return {"decoder_loss": (rows["image"] - rows["target"]).square().mean()}

    @torch.no_grad()
    def on_step_end(self, model):
        self.teacher.weight.lerp_(model.visual_projection.weight, 0.1)


class Constant(ObjectivePart):
    def __init__(self, name: str, losses: dict[str, float], weight: float = 1.0):
        super().__init__(weight)
        self.name, self.losses = name, losses

    def rows(self, model, outputs, inputs):
        return None

    def forward(self, model, rows, columns):
        return {name: torch.tensor(value) for name, value in self.losses.items()}


def make_trainer(folder: Path, with_decoder: bool = True, **arguments) -> MLIPTrainer:
    torch.manual_seed(0)
    processor = make_processor()
    tokenizer = processor.tokenizer
    text = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model = small_model(text={**text, "vocab_size": len(tokenizer)}).train()
    parts = [ModelLosses(), *([Decoder(model)] if with_decoder else [])]
    args = MLIPTrainingArguments(
        str(folder),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=6,
        **{"max_steps": 4, "save_steps": 2, "logging_steps": 1, **arguments},
    )
    return MLIPTrainer(model, args, make_rows(12), processing_class=processor, objective=Objective(parts))


def test_the_total_is_the_weighted_sum_of_the_named_losses():
    model, exchange = small_model(), Exchange(5)
    objective = Objective([ModelLosses(), Constant("one", {"one_loss": 2.0}, weight=0.25)])
    batch = pairs_batch()
    _, rows = objective.compute_rows(model, batch)
    losses = objective(model, rows, exchange)
    expected = model(**batch, return_loss=True)
    for name in ("spatial_loss", "frequency_loss", "token_loss"):
        assert torch.equal(losses[name], expected[name])
    torch.testing.assert_close(losses["loss"], expected.loss + 0.5, rtol=0, atol=1e-6)


def test_names_that_are_taken_are_refused():
    with pytest.raises(ValueError, match=r"got the parts \['a', 'a'\]"):
        Objective([Constant("a", {}), Constant("a", {})])
    with pytest.raises(ValueError, match="at least one part"):
        Objective([])
    for second in ({"x": 2.0}, {"loss": 2.0}):
        objective = Objective([Constant("a", {"x": 1.0}), Constant("b", second)])
        with pytest.raises(ValueError, match="part 'b' returns"):
            objective(small_model(), {"a": None, "b": None}, Exchange(1))
    with pytest.raises(ValueError, match="returned no loss"):
        Objective([Constant("a", {})])(small_model(), {"a": None}, Exchange(1))


def test_a_token_loss_scope_that_is_unknown_is_refused():
    with pytest.raises(ValueError, match="token_loss_scope='everywhere'.*global, local"):
        ModelLosses("everywhere")


def test_state_of_training_is_in_checkpoints_and_not_in_the_saved_model(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    decoder = trainer.training_objective.parts["decoder"]
    before = {name: tensor.clone() for name, tensor in trainer.training_objective.state_dict().items()}
    trainer.train()
    trainer.save_model()
    after = trainer.training_objective.state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before)  # decoder and teacher
    checkpoint = torch.load(tmp_path / "run" / "checkpoint-4" / "objective.pt", weights_only=True)
    assert all(torch.equal(checkpoint["objective"][name], after[name]) for name in after)
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint-4"):
        assert load_file(folder / "model.safetensors").keys() == small_model().state_dict().keys()
        loaded = AutoModel.from_pretrained(folder)
        weight = trainer.model.visual_projection.weight
        assert torch.equal(loaded.visual_projection.weight, weight)
    logs = [entry for entry in trainer.state.log_history if "decoder_loss" in entry]
    assert len(logs) == 4 and logs[-1]["decoder_loss"] < logs[0]["decoder_loss"]
    assert decoder.decoder.weight.grad is None  # cleared after the last step


@pytest.mark.parametrize("mini_batch_size", [None, 4])
def test_a_resumed_run_ends_with_the_bits_of_an_undisturbed_one(tmp_path, mini_batch_size):
    whole = make_trainer(tmp_path / "whole", mini_batch_size=mini_batch_size)
    whole.train()
    resumed = make_trainer(tmp_path / "resumed", mini_batch_size=mini_batch_size)
    with torch.no_grad():  # what it starts with must not matter
        resumed.training_objective.parts["decoder"].decoder.weight.zero_()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for ours, theirs in ((resumed.model, whole.model), (resumed.training_objective, whole.training_objective)):
        states = ours.state_dict(), theirs.state_dict()
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_resuming_with_an_objective_that_the_checkpoint_lacks_is_refused(tmp_path):
    make_trainer(tmp_path / "run", with_decoder=False).train()
    trainer = make_trainer(tmp_path / "other")
    with pytest.raises(ValueError, match="has no objective.pt"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))


def test_the_stock_trainer_trains_the_losses_of_the_model(tmp_path):
    from transformers import Trainer, TrainingArguments

    batch = pairs_batch(6)
    items = [{name: tensor[i] for name, tensor in batch.items()} | {"return_loss": True} for i in range(6)]
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", max_steps=3, logging_steps=1,
                             remove_unused_columns=False, save_strategy="no")  # fmt: skip

    def collate(rows):
        return {name: torch.stack([row[name] for row in rows]) for name in batch} | {"return_loss": True}

    trainer = Trainer(small_model(), args, train_dataset=items, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]


def test_compute_loss_returns_the_outputs_of_the_model(tmp_path):
    trainer = make_trainer(tmp_path)
    inputs = trainer.data_collator([trainer.train_dataset[n] for n in range(6)])
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert torch.equal(loss, outputs.loss) and torch.equal(outputs["loss"], loss)
    assert outputs.image_embeds.shape == (6, 24) and outputs["decoder_loss"].ndim == 0
