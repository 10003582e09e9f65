# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

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
    """Evaluation mode without gradients; afterwards the mode is the one before."""
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
    """The tokens of a data set as a model embeds them, for `token_rescore`; in float16, captions without padding.

    Args:
        image_tokens: I of (M, P), normalised.
        image_weights: I of (M,).
        text_tokens: T of (L, P), normalised, those alone that count.
    """

    image_tokens: list[Tensor]
    image_weights: list[Tensor]
    text_tokens: list[Tensor]


@dataclass
class EncodedPairs:
    """A data set as a model embeds it: I images, T captions.

    Args:
        image_embeds: (I, D) float32 on the CPU, normalised.
        text_embeds: (T, D) float32 on the CPU, normalised; T = 0 for images without captions.
        caption_image: (T,) long, the image that each caption belongs to.
        caption_ids: (T,) long, the same for captions of the same tokens.
        image_rows: (I,) long, the place of each image in the data set, the skipped ones counted.
        skipped: the images and captions that could not be used.
        num_truncated: captions longer than the context.
        labels: (I, C) long, where the batches bring labels: one for each label column.
        tokens: where they were asked for.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    caption_image: Tensor
    caption_ids: Tensor
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
    """Embeds every image and every caption of batches made by `EvaluationCollator`, or by `LabelCollator`.

    Captions go through the model in slices of at most as many as the batch has images, so memory does not depend on the
    number of captions per image. Rows with captions whose `image_ids` are equal are one image with the captions of all.

    Args:
        model: has `get_image_features` and `get_text_features`.
        with_tokens: keeps the tokens of both sides too; of an `MLIPModel` with the token-level loss alone.
        budget: counts what is skipped, and stops when it is too much.
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
    """`encode_pairs` of several settings of the vision tower in one pass: data are read, and captions embedded, once.

    Args:
        variants: each sets the model to one setting.
    """
    images: list[list[Tensor]] = [[] for _ in variants]
    texts, caption_image, caption_ids, image_rows, labels, skipped = [], [], [], [], [], []
    bank = TokenBank([], [], [])
    id_of_tokens: dict[tuple[int, ...], int] = {}
    place_of_image: dict[Any, int] = {}
    num_rows = num_truncated = 0
    with evaluating(model):
        for batch in logging.tqdm(dataloader, desc=description, unit="batch"):
            skipped += batch["skipped"]
            num_truncated += batch["num_truncated"]
            batch_size = len(batch["pixel_values"])
            rows = batch["kept"] + num_rows
            num_rows += batch_size + len(batch["skipped"])
            if budget is not None:
                budget.add(batch["skipped"], seen=batch_size + len(batch["skipped"]))
            if batch_size == 0:  # everything in it was skipped
                continue
            # Rows of one image are one image with all their captions; of images with labels alone each row counts.
            keys = batch["image_ids"].tolist() if "image_ids" in batch else [("row", row) for row in rows.tolist()]
            new = [at for at, key in enumerate(keys) if key not in place_of_image and key not in keys[:at]]
            for at in new:
                place_of_image[keys[at]] = len(place_of_image)
            places = torch.tensor([place_of_image[key] for key in keys])
            if new:
                image_rows.append(rows[new])
                pixel_values = batch["pixel_values"][new].to(device)
                for embeds, set_variant in zip(images, variants, strict=True):
                    set_variant()
                    vision_outputs = model.get_image_features(pixel_values=pixel_values)
                    embeds.append(normalize(vision_outputs.pooler_output.float(), dim=-1).cpu())
            if "labels" in batch:
                labels.append(batch["labels"][new])
            if "input_ids" not in batch:
                continue
            for ids, mask in zip(
                batch["input_ids"].split(batch_size), batch["attention_mask"].split(batch_size), strict=True
            ):
                ids, mask = ids.to(device), mask.to(device)
                text_outputs = model.get_text_features(input_ids=ids, attention_mask=mask)
                texts.append(normalize(text_outputs.pooler_output.float(), dim=-1).cpu())
                for caption, present in zip(ids.cpu(), mask.cpu(), strict=True):
                    tokens = tuple(caption[present.bool()].tolist())
                    caption_ids.append(id_of_tokens.setdefault(tokens, len(id_of_tokens)))
                if with_tokens:
                    found = model.token_embeddings(vision_outputs, text_outputs, ids, model.caption_mask_of(ids, mask))
                    bank.text_tokens += [
                        t[m].half().cpu() for t, m in zip(found.text_tokens, found.text_mask, strict=True)
                    ]
            if with_tokens and new:
                bank.image_tokens += found.image_tokens.half().cpu().unbind()
                bank.image_weights += found.image_weights.cpu().unbind()
            caption_image.append(places[batch["caption_image"].cpu()])
    if not place_of_image:
        raise ValueError(f"Nothing to evaluate: no image and caption left, {len(skipped)} skipped: {skipped[:5]}.")
    none = torch.empty(0, dtype=torch.long)
    return [
        EncodedPairs(
            image_embeds=torch.cat(embeds),
            text_embeds=torch.cat(texts) if texts else embeds[0].new_empty(0, embeds[0].shape[1]),
            caption_image=torch.cat(caption_image) if caption_image else none,
            caption_ids=torch.tensor(caption_ids, dtype=torch.long),
            image_rows=torch.cat(image_rows),
            skipped=skipped,
            num_truncated=num_truncated,
            labels=torch.cat(labels) if labels else None,
            tokens=bank if with_tokens else None,
        )
        for embeds in images
    ]
