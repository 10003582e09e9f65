# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The settings of the vision tower that change from step to step, so that early steps are cheap: the merge ratio, patch
dropout (FLIP, arXiv 2212.00794) and the image size (RECLIP, arXiv 2304.06028; CLIPA, arXiv 2305.07017)."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from modeling_mlip import MLIPModel
from modeling_mlip.hub.errors import error_line
from modeling_mlip.token_merging import merge_schedule

from .arguments import MLIPTrainingArguments


@dataclass(frozen=True)
class StepSettings:
    """What one training step uses.

    Args:
        merge_ratio: fraction of the patch tokens that merging removes.
        patch_dropout: fraction of the patch tokens dropped before the encoder.
        image_size: side of the images in pixels; `None` leaves the images as they are.
    """

    merge_ratio: float
    patch_dropout: float
    image_size: int | None = None


class StepSchedule:
    """Computes the settings of every step, and applies them to the model and to the images of the step.

    Args:
        model: its configuration gives the settings of the last step.
        args: `start_merge_ratio`, `start_patch_dropout`, `start_image_size` and `steps_without_patch_dropout`.

    Raises:
        ValueError: if a setting is out of range, or leaves no patch tokens.
    """

    def __init__(self, model: MLIPModel, args: MLIPTrainingArguments):
        self.args = args
        self.vision = model.vision_model.config
        self.image_size, self.patch_size = self.vision.image_size, self.vision.patch_size
        self._check_image_size()
        self._check_steps_without_patch_dropout()
        self._check_first_step()

    def _check_first_step(self) -> None:
        names = ("start_merge_ratio", "start_patch_dropout", "start_image_size")
        given = {name: getattr(self.args, name) for name in names if getattr(self.args, name) is not None}
        if not given:
            return
        first, vision = self.at(0, 2), self.vision
        size = self.image_size if first.image_size is None else first.image_size
        try:
            with self._set(first):
                num_patches = vision.count_kept_patches((size // self.patch_size) ** 2)
                merge_schedule(num_patches, first.merge_ratio, len(vision.resolved_merge_layers))
        except (StrictDataclassError, ValueError) as error:
            shown = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"{shown}: {error_line(error)}") from error

    def _check_image_size(self) -> None:
        start, patch = self.args.start_image_size, self.patch_size
        if start is not None and (start % patch or not patch <= start <= self.image_size):
            raise ValueError(
                f"start_image_size={start}: choose a multiple of patch_size={patch} from {patch} to "
                f"image_size={self.image_size}."
            )

    def _check_steps_without_patch_dropout(self) -> None:
        steps = self.args.steps_without_patch_dropout
        has_dropout = self.vision.patch_dropout > 0 or self.args.start_patch_dropout is not None
        if not 0 <= steps < math.inf:
            raise ValueError(f"steps_without_patch_dropout={steps}: choose 0 or more; below 1 is a fraction of all.")
        if steps and not has_dropout:
            raise ValueError(
                f"steps_without_patch_dropout={steps} has no effect: set patch_dropout or start_patch_dropout, or "
                "leave it out."
            )

    def at(self, step: int, max_steps: int) -> StepSettings:
        """The settings of step `step`, counted from 0, of `max_steps`. Call it outside `applied`, which changes the
        settings that this starts from."""
        args, vision = self.args, self.vision
        progress = min(step / max(max_steps - 1, 1), 1.0)
        without = args.steps_without_patch_dropout
        num_with_dropout = max_steps - round(without * max_steps if without < 1 else without)
        dropout_progress = min(step / max(num_with_dropout - 1, 1), 1.0)
        patch_dropout = _between(args.start_patch_dropout, vision.patch_dropout, dropout_progress)
        return StepSettings(
            merge_ratio=_between(args.start_merge_ratio, vision.merge_ratio, progress),
            patch_dropout=patch_dropout if step < num_with_dropout else 0.0,
            image_size=self._image_size_at(progress),
        )

    def _image_size_at(self, progress: float) -> int | None:
        """The side grows by one patch at a time, and each size has the same number of steps."""
        if self.args.start_image_size is None:
            return None
        start, end = self.args.start_image_size // self.patch_size, self.image_size // self.patch_size
        side = min(start + int(progress * (end - start + 1)), end)
        return self.image_size if side == end else self.patch_size * side  # with `crop_to_patches` the two differ

    @contextmanager
    def applied(self, step: int, max_steps: int) -> Iterator[StepSettings]:
        """Sets the model to the settings of a step; its own settings return afterwards."""
        settings = self.at(step, max_steps)
        with self._set(settings):
            yield settings

    @contextmanager
    def _set(self, settings: StepSettings) -> Iterator[None]:
        vision, own = self.vision, (self.vision.merge_ratio, self.vision.patch_dropout)
        try:
            vision.merge_ratio, vision.patch_dropout = settings.merge_ratio, settings.patch_dropout
            vision.validate()
            yield
        finally:
            vision.merge_ratio, vision.patch_dropout = own


def _between(start: float | None, end: float, progress: float) -> float:
    return end if start is None else start + (end - start) * progress


def resize_images(pixel_values: torch.Tensor, image_size: int) -> torch.Tensor:
    """`(B, 3, height, width)` -> `(B, 3, image_size, image_size)`, bilinear with antialiasing."""
    size = (image_size, image_size)
    if pixel_values.shape[-2:] == size:
        return pixel_values
    return nn.functional.interpolate(pixel_values, size=size, mode="bilinear", antialias=True)
