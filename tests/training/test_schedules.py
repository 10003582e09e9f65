# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Settings that change from step to step: patch dropout and image size, through `MLIPTrainer`."""

import pytest
import torch
from torch import nn
from training_cases import make_processor, make_rows

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.hub.configurations import named_config, override_config
from modeling_mlip.training.arguments import MLIPTrainingArguments
from modeling_mlip.training.schedules import StepSchedule, resize_images
from modeling_mlip.training.trainer import MLIPTrainer


@pytest.fixture(scope="module")
def processor():
    return make_processor()


def make_trainer(tmp_path, processor, max_steps=4, config=None, **arguments) -> MLIPTrainer:
    """A tower of 16 patches of 8 pixels."""
    small = dict(image_size=32, hidden_size=48, num_hidden_layers=2, merge_layers=[0])
    config = override_config(named_config("tiny"), {**small, **(config or {})})
    text = {**config.text_config.to_dict(), "vocab_size": len(processor.tokenizer)}
    model = MLIPModel(MLIPConfig(**{**config.to_dict(), "text_config": text}))
    args = MLIPTrainingArguments(
        str(tmp_path),
        use_cpu=True,
        report_to="none",
        per_device_train_batch_size=4,
        max_steps=max_steps,
        logging_steps=1,
        **arguments,
    )
    return MLIPTrainer(model, args, train_dataset=make_rows(16), processing_class=processor)


def tokens_of_each_pass(trainer: MLIPTrainer) -> list[int]:
    counts: list[int] = []
    trainer.model.vision_model.register_forward_hook(
        lambda module, args, output: counts.append(output.token_sizes.shape[1])
    )
    trainer.train()
    return counts


def test_patch_dropout_falls_in_a_line_and_ends_before_the_last_steps(tmp_path, processor):
    trainer = make_trainer(
        tmp_path,
        processor,
        config={"patch_dropout": 0.25},
        start_patch_dropout=0.75,
        steps_without_patch_dropout=1,
        save_steps=2,
    )
    assert tokens_of_each_pass(trainer) == [4, 8, 12, 16]
    logged = [entry["vision_tokens_layer_1"] for entry in trainer.state.log_history if "vision_tokens_layer_1" in entry]
    assert logged == [4, 8, 12, 16]
    assert trainer.model.config.vision_config.patch_dropout == 0.25


def test_merging_removes_its_share_of_the_patches_that_dropout_keeps(tmp_path, processor):
    settings = {"patch_dropout": 0.5, "merge_ratio": 0.5}
    assert tokens_of_each_pass(make_trainer(tmp_path, processor, max_steps=1, config=settings)) == [4]


def test_the_image_grows_by_whole_patches(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, start_image_size=16, max_steps=6)
    assert tokens_of_each_pass(trainer) == [4, 4, 9, 9, 16, 16]


def test_the_last_images_have_their_own_size_where_a_tower_crops_to_patches(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, start_image_size=16, config={"image_size": 36, "crop_to_patches": True})
    assert [trainer.schedule.at(step, 3).image_size for step in range(3)] == [16, 24, 36]


def test_mini_batches_with_patch_dropout_and_small_images_give_the_gradients_of_the_whole_batch(tmp_path, processor):
    """Both passes of a mini-batch drop the same patches."""
    gradients = []
    for size in (None, 2):
        torch.manual_seed(0)
        trainer = make_trainer(
            tmp_path, processor, mini_batch_size=size, start_image_size=16, config={"patch_dropout": 0.5}
        )
        model = trainer.model.double()
        # The same patches for the whole batch and for its mini-batches.
        model.vision_model._kept_patches = lambda states: torch.tensor([[1, 2]]).expand(len(states), -1)
        batch = next(iter(trainer.get_train_dataloader()))
        batch["pixel_values"] = batch["pixel_values"].double()
        trainer.current_gradient_accumulation_steps = 1
        trainer.training_step(model, batch)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-9, atol=1e-12)


def test_patch_dropout_selects_the_embeddings_of_random_patches_in_training_alone():
    config = override_config(named_config("tiny"), dict(image_size=32, patch_dropout=0.5, frequency_layers=0))
    tower = MLIPModel(config).vision_model
    pixels = torch.randn(2, 3, 32, 32)
    seen = []
    tower.encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        tower.eval()(pixels)
        everything = seen[0]
        outputs = [tower.train()(pixels, output_token_map=True) for _ in range(2)]
    assert everything.shape[1] == 1 + 16
    for states, output in zip(seen[1:], outputs, strict=True):
        assert states.shape[1] == 1 + 8
        assert torch.equal(states[:, 0], everything[:, 0])
        for image in range(2):
            kept = (output.token_map[image] >= 0).nonzero()[:, 0]
            assert torch.equal(states[image, 1:], everything[image, 1:][kept])
    assert not torch.equal(outputs[0].token_map, outputs[1].token_map)


def test_resized_images_are_those_of_an_antialiasing_resize():
    image = torch.rand(1, 3, 64, 64)
    pooled = nn.functional.interpolate(image, size=(16, 16), mode="bilinear", antialias=True)
    assert torch.equal(resize_images(image, 16), pooled)
    assert resize_images(image, 64) is image


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"start_image_size": 20}, "start_image_size=20: choose a multiple of patch_size=8 from 8 to image_size=32"),
        ({"start_image_size": 40}, "start_image_size=40: choose a multiple"),
        ({"start_patch_dropout": 1.0}, "start_patch_dropout=1.0: patch_dropout=1.0: choose"),
        ({"start_patch_dropout": 0.9, "start_merge_ratio": 0.9}, "leaves none of them; lower one"),
        ({"start_image_size": 8, "start_merge_ratio": 0.9}, "start_merge_ratio=0.9, start_image_size=8: .*leaves none"),
        ({"steps_without_patch_dropout": 3}, "steps_without_patch_dropout=3 has no effect"),
        ({"steps_without_patch_dropout": -1, "start_patch_dropout": 0.5}, "choose 0 or more"),
    ],
)
def test_a_schedule_that_cannot_start_is_refused(tmp_path, processor, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path / "run", processor, **arguments)
    assert not (tmp_path / "run").exists()


def test_the_schedule_returns_the_settings_of_the_model(tmp_path, processor):
    trainer = make_trainer(tmp_path, processor, start_merge_ratio=0.5, start_patch_dropout=0.5)
    schedule = StepSchedule(trainer.model, trainer.args)
    with schedule.applied(0, 10) as settings:
        assert (settings.merge_ratio, settings.patch_dropout) == (0.5, 0.5)
        assert trainer.model.config.merge_ratio == 0.5
    assert trainer.model.config.merge_ratio == trainer.model.config.vision_config.patch_dropout == 0
