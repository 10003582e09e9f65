# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Learning curves show what was logged."""

from PIL import Image

from modeling_mlip.training.learning_curves import plot_learning_curves


def test_curves_are_drawn_for_what_was_logged_only(tmp_path):
    path = tmp_path / "curves.png"
    plot_learning_curves([{"step": 10, "train_runtime": 3.0, "train_loss": 2.0}], path)
    assert not path.exists()
    log = [{"step": step, "loss": 1 / step, "token_loss": 2 / step, "epoch": 1.0} for step in range(1, 9)]
    plot_learning_curves(log, path)
    one_panel = Image.open(path).size
    plot_learning_curves(log + [{"step": 8, "eval_mean_recall": 50.0}, {"step": 8, "logit_scale": 14.0}], path)
    three_panels = Image.open(path).size
    assert three_panels == (2 * one_panel[0], 2 * one_panel[1])
