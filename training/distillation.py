# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Distillation from a frozen copy of the starting model, and the objective that the arguments of training ask for.

Three uses of one part: fine-tuning that stays close to the starting model on the training pairs (`keep_weight`) and on
reference pairs (`reference_weight`), and training with merged tokens towards the embeddings of the same model without
merging (`distill_unmerged`; CrossGET, Shi et al. 2023, arXiv 2305.17455).
"""

import copy
import hashlib
from typing import Any

import torch
from torch import nn

from modeling_mlip import MLIPModel
from modeling_mlip.losses import info_nce, temperature

from .arguments import MLIPTrainingArguments
from .distributed import Exchange
from .objective import ModelLosses, Objective, ObjectivePart
from .reference_pairs import ENTRIES, PREFIX
from .short_caption_loss import ShortCaptionLoss


class Distillation(ObjectivePart):
    """A loss between the embeddings of the trained model and those of a frozen model, the teacher.

    The teacher is part of neither the saved model nor a checkpoint: a resumed run builds it again from the starting
    model. A checkpoint contains a digest of its weights.

    Args:
        name: of the part; its loss is called `{name}_loss`.
        teacher: used in evaluation mode; it must share no parameter with the trained model.
        merge_ratio: at which the teacher runs.
        loss_type: "features", see `feature_loss`, or "similarities", see `similarity_loss`.
        weight: factor of the loss.
        with_text: also compares caption embeddings. If false, the captions of the similarities are the teacher's.
        prefix: of the batch entries to compare on; "reference_" for those of `ReferenceCollator`, which take another
            pass through both towers.
    """

    teacher_digest: torch.Tensor

    def __init__(
        self,
        name: str,
        teacher: MLIPModel,
        merge_ratio: float,
        loss_type: str = "features",
        weight: float = 1.0,
        with_text: bool = True,
        prefix: str = "",
    ):
        super().__init__(weight)
        self.name = name
        self.merge_ratio = merge_ratio
        self.loss_type = loss_type
        self.with_text = with_text
        self.prefix = prefix
        self.input_names = tuple(f"{prefix}{entry}" for entry in ENTRIES) if prefix else ()
        self.target_names = (f"{name}_image_embeds", f"{name}_text_embeds")
        self._teacher = (teacher.eval().requires_grad_(False),)  # a tuple: not a module of this part, see above
        self.register_buffer("teacher_digest", weights_digest(teacher))

    @property
    def teacher(self) -> MLIPModel:
        return self._teacher[0]

    @torch.no_grad()
    def targets(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
        """The teacher's normalised embeddings, each `(R, P)`; `None` for captions that the loss does not need."""
        self.teacher.set_merge_ratio(self.merge_ratio)
        pixel_values, input_ids, attention_mask = (inputs.get(f"{self.prefix}{entry}") for entry in ENTRIES)
        interpolates = not self.prefix and inputs.get("interpolate_pos_encoding", False)
        images = self.teacher.get_image_features(pixel_values, interpolate_pos_encoding=interpolates)
        text_embeds = None
        if self.with_text or self.loss_type == "similarities":
            texts = self.teacher.get_text_features(input_ids, attention_mask)
            text_embeds = nn.functional.normalize(at_least_float32(texts.pooler_output), dim=-1)
        image_embeds = nn.functional.normalize(at_least_float32(images.pooler_output), dim=-1)
        return dict(zip(self.target_names, (image_embeds, text_embeds), strict=True))

    def rows(self, model: nn.Module, outputs: Any, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
        target_images, target_texts = (inputs[name] for name in self.target_names)
        if self.prefix:
            outputs = model(**{entry: inputs[f"{self.prefix}{entry}"] for entry in ENTRIES})
        return {
            "images": at_least_float32(outputs.image_embeds),
            "texts": at_least_float32(outputs.text_embeds) if self.with_text else target_texts,
            "target_images": target_images,
            "target_texts": target_texts,
        }

    def columns(self, model: nn.Module, rows: dict[str, Any], exchange: Exchange) -> dict[str, Any] | None:
        return exchange.gather(rows) if self.loss_type == "similarities" else None

    def forward(
        self, model: nn.Module, rows: dict[str, Any], columns: dict[str, Any] | None
    ) -> dict[str, torch.Tensor]:
        kinds = ("images", "texts") if self.with_text else ("images",)
        with torch.autocast(rows["images"].device.type, enabled=False):
            if columns is None:
                losses = [feature_loss(rows[kind], rows[f"target_{kind}"]) for kind in kinds]
            else:
                scale = self.teacher.logit_scale
                losses = [
                    similarity_loss(rows, columns, scale, "images", "texts"),
                    similarity_loss(rows, columns, scale, "texts", "images"),
                ]
        return {f"{self.name}_loss": torch.stack(losses).mean()}

    def train(self, mode: bool = True) -> "Distillation":
        super().train(mode)
        self.teacher.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> "Distillation":
        self.teacher._apply(fn)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, torch.Tensor], prefix: str, *args: Any) -> None:
        saved = state_dict.get(f"{prefix}teacher_digest")
        if saved is not None and not torch.equal(saved.cpu(), self.teacher_digest.cpu()):
            raise ValueError(
                f"The run that is resumed has distilled ({self.name}) from a model with other weights than those that "
                "this run starts from: give the same starting model, the same seed and the same configuration."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)


def at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def feature_loss(embeds: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cosine similarity of normalised embeddings `(R, P)` and their targets `(R, P)`; a scalar.

    It is half of their squared distance.
    """
    return (1 - (embeds * targets.detach()).sum(dim=-1)).mean()


def similarity_loss(
    rows: dict[str, torch.Tensor], columns: dict[str, torch.Tensor], logit_scale: torch.Tensor, ours: str, others: str
) -> torch.Tensor:
    """Mean Kullback-Leibler divergence of the R distributions over C candidates from those of the targets; a scalar.

    A distribution is the softmax of the similarities of a row and all columns, at the same temperature for both.

    Args:
        rows: "images", "texts", "target_images" and "target_texts", each `(R, P)`, normalised.
        columns: the same of all processes, `(C, P)`.
        logit_scale: log of 1 / temperature.
        ours, others: "images" and "texts", or "texts" and "images".
    """
    scale = temperature(logit_scale)
    logits = scale * rows[ours] @ columns[others].t()  # (R, P) @ (P, C)
    target_logits = scale * rows[f"target_{ours}"].detach() @ columns[f"target_{others}"].detach().t()
    targets = target_logits.softmax(dim=-1)
    return info_nce(logits, targets) - info_nce(target_logits, targets)


def weights_digest(model: nn.Module) -> torch.Tensor:
    """SHA-256 of the names and values of all parameters, `(32,)` uint8."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)


def build_objective(
    model: MLIPModel,
    args: MLIPTrainingArguments,
    keep_merge_ratio: float | None = None,
    has_references: bool = False,
) -> Objective:
    """The objective of a run: the losses of the model, and if asked for, distillation from the starting model and the
    loss of short captions.

    Args:
        model: the model before training.
        keep_merge_ratio: merge ratio of the teacher of `keep_weight` and `reference_weight`; that of `model` if not
            given.
        has_references: whether the batches hold reference pairs.

    Raises:
        ValueError: for `distill_unmerged` if no step of training merges tokens.
    """
    parts: list[ObjectivePart] = [ModelLosses(args.token_loss_scope)]
    merge_ratio = model.config.vision_config.merge_ratio
    if args.distill_unmerged and not (merge_ratio or args.start_merge_ratio):
        raise ValueError(
            f"distill_unmerged={args.distill_unmerged} has no effect at merge_ratio={merge_ratio}: set merge_ratio, "
            "for example to 0.5."
        )
    if args.keep_weight or args.distill_unmerged or has_references:
        teacher = copy.deepcopy(model)  # one for all parts; each sets its merge ratio
    keep_merge_ratio = merge_ratio if keep_merge_ratio is None else keep_merge_ratio
    if args.keep_weight:
        parts.append(Distillation("keep", teacher, keep_merge_ratio, args.keep_type, args.keep_weight))
    if has_references:
        parts.append(
            Distillation("reference", teacher, keep_merge_ratio, args.keep_type, args.reference_weight, prefix=PREFIX)
        )
    if args.distill_unmerged:
        weight = float(args.distill_unmerged)
        parts.append(Distillation("unmerged", teacher, 0.0, args.keep_type, weight, with_text=False))
    if args.long_caption_column is not None:
        parts.append(ShortCaptionLoss(args.short_caption_weight))
    return Objective(parts)
