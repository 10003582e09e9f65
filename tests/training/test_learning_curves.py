# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Learning curves show what was logged."""

from matplotlib.figure import Figure
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


def drawn_figure(log, path, monkeypatch) -> Figure:
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *args, **options: figures.append(figure))
    plot_learning_curves(log, path)
    return figures[0]


def test_values_logged_once_are_bars_and_no_cell_is_empty(tmp_path, monkeypatch):
    once = [
        {"step": 3, "loss": 2.5, "token_loss": 1.5},
        {"step": 3, "logit_scale": 14.0},
        {"step": 3, "eval_recall": 50.0},
    ]
    loss, scale, recall = drawn_figure(once, tmp_path / "curves.png", monkeypatch).axes
    assert [bar.get_width() for bar in loss.patches] == [2.5, 1.5] and not loss.lines
    assert loss.get_xlabel() == "logged once, in step 3"
    assert [text.get_text() for text in loss.texts] == ["2.5", "1.5"]
    figure = recall.figure
    figure.draw_without_rendering()
    assert recall.get_position().width > 1.5 * scale.get_position().width
    twice = [*once, {"step": 6, "loss": 2.0, "token_loss": 1.0}]
    loss = drawn_figure(twice, tmp_path / "curves.png", monkeypatch).axes[0]
    assert len(loss.lines) == 2 and not loss.patches
