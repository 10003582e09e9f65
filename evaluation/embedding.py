# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Embeds a data set with a model: images, captions, class prompts, and tokens for re-ranking."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_mlip import MLIPModel
from modeling_mlip.data.collators import tokenize
from modeling_mlip.data.skip_budget import SkipBudget

from .templates import check_templates, fill

PROMPTS_AT_ONCE = 256


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; restores the previous mode at the end."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def class_embeddings(
    model: MLIPModel,
    tokenizer: PreTrainedTokenizerBase,
    class_names: Sequence[str],
    templates: Sequence[str],
    device: torch.device | str,
    max_seq_length: int,
) -> Tensor:
    """One embedding per class: the normalised mean of its normalised prompts.

    Args:
        model: has `get_text_features`.
        templates: prompts with `{}` for the class name, such as "a photo of a {}.".

    Returns:
        (C, D) float32 on the CPU.

    Raises:
        ValueError: if there is no template, or one has no `{}`.

    Source: OpenCLIP's `build_zero_shot_classifier`.
    """
    check_templates(templates)
    prompts = [fill(template, name) for name in class_names for template in templates]
    embeds = []
    with evaluating(model):
        starts = range(0, len(prompts), PROMPTS_AT_ONCE)
        for start in logging.tqdm(starts, desc="Prompts", unit="batch", disable=len(starts) == 1):
            input_ids, mask, _ = tokenize(tokenizer, prompts[start : start + PROMPTS_AT_ONCE], max_seq_length)
            features = model.get_text_features(input_ids=input_ids.to(device), attention_mask=mask.to(device))
            embeds.append(normalize(features.pooler_output.float(), dim=-1).cpu())
    return normalize(torch.cat(embeds).unflatten(0, (len(class_names), len(templates))).mean(dim=1), dim=-1)


@dataclass
class TokenBank:
    """The tokens of a data set in float16, for `token_rescore`. Captions are stored without padding.

    Args:
        image_tokens: I of (M, P), normalised.
        image_weights: I of (M,).
        text_tokens: T of (L, P), normalised, without BOS and padding.
    """

    image_tokens: list[Tensor]
    image_weights: list[Tensor]
    text_tokens: list[Tensor]


@dataclass
class EncodedPairs:
    """The embeddings of a data set of I images and T captions.

    Args:
        image_embeds: (I, D) float32 on the CPU, normalised.
        text_embeds: (T, D) float32 on the CPU, normalised; T = 0 for images without captions.
        caption_image: (T,) long, the index of each caption's image.
        caption_ids: (T,) long, equal for captions with equal tokens.
        caption_lengths: (T,) long, tokens of each caption before it was shortened to the context.
        image_rows: (I,) long, the row of each image in the data set; skipped rows are counted too.
        skipped: the rows that could not be used, as "where: why".
        num_truncated: number of captions longer than the context.
        labels: (I, C) long, one for each label column, if the batches hold labels.
        tokens: only if they were requested.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    caption_image: Tensor
    caption_ids: Tensor
    caption_lengths: Tensor
    image_rows: Tensor
    skipped: list[str]
    num_truncated: int
    labels: Tensor | None = None
    tokens: TokenBank | None = None


def encode_pairs(
    model: MLIPModel,
    dataloader: Iterable[dict],
    device: torch.device | str,
    description: str,
    with_tokens: bool = False,
    budget: SkipBudget | None = None,
) -> EncodedPairs:
    """Embeds every image and every caption of the batches that `EvaluationCollator` or `LabelCollator` makes.

    Captions go through the model in slices no larger than the number of images in the batch, so memory does not depend
    on the number of captions per image. Rows with captions and equal `image_ids` count as one image with all captions.

    Args:
        model: has `get_image_features` and `get_text_features`.
        description: text of the progress bar.
        with_tokens: also keep the tokens of images and captions; needs an `MLIPModel` with the token-level loss.
        budget: counts skipped rows and raises ValueError if there are too many.

    Raises:
        ValueError: if no image is left.
    """
    return encode_variants(model, dataloader, device, description, [lambda: None], with_tokens, budget)[0]


def encode_variants(
    model: MLIPModel,
    dataloader: Iterable[dict],
    device: torch.device | str,
    description: str,
    variants: Sequence[Callable[[], None]],
    with_tokens: bool = False,
    budget: SkipBudget | None = None,
) -> list[EncodedPairs]:
    """`encode_pairs` for several settings of the vision tower in one pass: data are read and captions embedded once.

    Args:
        variants: functions without arguments, each of which sets the model to one setting.

    Returns:
        one `EncodedPairs` for each variant; they share the tensors of captions.

    Raises:
        ValueError: if no image is left.
    """
    encoding = _Encoding(model, device, variants, with_tokens)
    with evaluating(model):
        for batch in logging.tqdm(dataloader, desc=description, unit="batch"):
            if budget is not None:
                budget.add(batch["skipped"], seen=len(batch["pixel_values"]) + len(batch["skipped"]))
            encoding.add(batch)
    return encoding.finish()


class _Encoding:
    """Collects the embeddings of `encode_variants` batch by batch."""

    def __init__(
        self,
        model: MLIPModel,
        device: torch.device | str,
        variants: Sequence[Callable[[], None]],
        with_tokens: bool,
    ):
        self.model, self.device, self.variants, self.with_tokens = model, device, variants, with_tokens
        self.image_embeds: list[list[Tensor]] = [[] for _ in variants]
        text_tokens: list[Tensor] = []  # shared: the variants do not change the text tower
        self.banks = [TokenBank([], [], text_tokens) for _ in variants]
        self.text_embeds: list[Tensor] = []
        self.caption_image: list[Tensor] = []
        self.caption_ids: list[int] = []
        self.caption_lengths: list[Tensor] = []
        self.image_rows: list[Tensor] = []
        self.labels: list[Tensor] = []
        self.skipped: list[str] = []
        self.num_rows = self.num_truncated = 0
        self._index_of_image: dict[Any, int] = {}
        self._id_of_tokens: dict[tuple[int, ...], int] = {}
        self._vision_outputs: list[Any] = []  # of the last batch that had a new image, one for each variant

    def add(self, batch: dict[str, Any]) -> None:
        """Embeds one batch."""
        self.skipped += batch["skipped"]
        self.num_truncated += batch["num_truncated"]
        batch_size = len(batch["pixel_values"])
        rows = batch["kept"] + self.num_rows
        self.num_rows += batch_size + len(batch["skipped"])
        if batch_size == 0:
            return
        image_of_row, new = self._register_images(batch, rows)
        if new:
            self.image_rows.append(rows[new])
            self._add_images(batch["pixel_values"][new].to(self.device))
        if "labels" in batch:
            self.labels.append(batch["labels"][new])
        if "input_ids" in batch:
            self._add_captions(batch["input_ids"], batch["attention_mask"], batch_size, has_new_images=bool(new))
            self.caption_image.append(image_of_row[batch["caption_image"].cpu()])
            self.caption_lengths.append(batch["caption_lengths"].cpu())

    def _register_images(self, batch: dict[str, Any], rows: Tensor) -> tuple[Tensor, list[int]]:
        """The image index of each row of the batch `(B,)`, and the places of images that did not occur before."""
        # Rows with equal image ids are one image. Labelled images have no ids: each row is an image.
        keys = batch["image_ids"].tolist() if "image_ids" in batch else [("row", row) for row in rows.tolist()]
        new = [at for at, key in enumerate(keys) if key not in self._index_of_image and key not in keys[:at]]
        for at in new:
            self._index_of_image[keys[at]] = len(self._index_of_image)
        return torch.tensor([self._index_of_image[key] for key in keys]), new

    def _add_images(self, pixel_values: Tensor) -> None:
        self._vision_outputs = []
        for embeds, set_variant in zip(self.image_embeds, self.variants, strict=True):
            set_variant()
            outputs = self.model.get_image_features(pixel_values=pixel_values)
            embeds.append(normalize(outputs.pooler_output.float(), dim=-1).cpu())
            if self.with_tokens:
                self._vision_outputs.append(outputs)

    def _add_captions(self, input_ids: Tensor, attention_mask: Tensor, slice_size: int, has_new_images: bool) -> None:
        """Embeds captions `(T, L)`, `slice_size` at a time, and the tokens of the new images beside the first slice."""
        slices = zip(input_ids.split(slice_size), attention_mask.split(slice_size), strict=True)
        for number, (ids, mask) in enumerate(slices):
            ids, mask = ids.to(self.device), mask.to(self.device)
            outputs = self.model.get_text_features(input_ids=ids, attention_mask=mask)
            self.text_embeds.append(normalize(outputs.pooler_output.float(), dim=-1).cpu())
            for caption, present in zip(ids.cpu(), mask.cpu(), strict=True):
                tokens = tuple(caption[present.bool()].tolist())
                self.caption_ids.append(self._id_of_tokens.setdefault(tokens, len(self._id_of_tokens)))
            if self.with_tokens:
                self._add_tokens(outputs, ids, mask, with_images=has_new_images and number == 0)

    def _add_tokens(self, text_outputs: Any, input_ids: Tensor, attention_mask: Tensor, with_images: bool) -> None:
        caption_mask = self.model.caption_mask_of(input_ids, attention_mask)
        for number, (bank, vision_outputs) in enumerate(zip(self.banks, self._vision_outputs, strict=True)):
            if number > 0 and not with_images:
                break
            embeddings = self.model.token_embeddings(vision_outputs, text_outputs, input_ids, caption_mask)
            if number == 0:
                bank.text_tokens += [
                    tokens[kept].half().cpu()
                    for tokens, kept in zip(embeddings.text_tokens, embeddings.text_mask, strict=True)
                ]
            if with_images:
                bank.image_tokens += embeddings.image_tokens.half().cpu().unbind()
                bank.image_weights += embeddings.image_weights.cpu().unbind()

    def finish(self) -> list[EncodedPairs]:
        """The embeddings of all batches, one `EncodedPairs` for each variant."""
        if not self._index_of_image:
            raise ValueError(
                f"Nothing to evaluate: no image and caption left, {len(self.skipped)} skipped: {self.skipped[:5]}."
            )
        no_index = torch.empty(0, dtype=torch.long)
        return [
            EncodedPairs(
                image_embeds=torch.cat(embeds),
                text_embeds=torch.cat(self.text_embeds)
                if self.text_embeds
                else embeds[0].new_empty(0, embeds[0].shape[1]),
                caption_image=torch.cat(self.caption_image) if self.caption_image else no_index,
                caption_ids=torch.tensor(self.caption_ids, dtype=torch.long),
                caption_lengths=torch.cat(self.caption_lengths) if self.caption_lengths else no_index,
                image_rows=torch.cat(self.image_rows),
                skipped=self.skipped,
                num_truncated=self.num_truncated,
                labels=torch.cat(self.labels) if self.labels else None,
                tokens=bank if self.with_tokens else None,
            )
            for embeds, bank in zip(self.image_embeds, self.banks, strict=True)
        ]
