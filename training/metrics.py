# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""How good a model is: retrieval recall and zero-shot accuracy.

Reading order: the rank of the right answer (where everything is decided), the metrics on embeddings, the same recall as
a module of `evaluate`, and the loops that get embeddings from a model.

Ties never favour the right answer: a wrong one that scores the same counts as ahead of it. A model that maps everything
to one point therefore scores 0, not 100.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import evaluate
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_mlip import MLIPModel

RECALL_AT = (1, 5, 10)
TIE = 1e-6  # cosines closer than this are equal: float32 rounds them differently from one batch size to the next
MAX_SCORES = 2**24  # scores held at once


def rank_of_right(
    queries: Tensor, keys: Tensor, query_group: Tensor, key_group: Tensor, pairs: tuple[Tensor, Tensor]
) -> Tensor:
    """Counts, for each query, the wrong keys that score at least as high as its best right key.

    Args:
        queries: (Q, D), normalised.
        keys: (K, D), normalised.
        query_group: (Q,) long, from 0.
        key_group: (K,) long, from 0.
        pairs: two (P,) long: key k is right for query q if (query_group[q], key_group[k]) is one of these pairs.

    Returns:
        (Q,) long; 0 is first place. A score that is not a number counts as a miss.
    """
    num_key_groups = int(key_group.max()) + 1
    num_query_groups = int(query_group.max()) + 1
    chunk = max(1, MAX_SCORES // len(keys))
    ranks = []
    for start in range(0, len(queries), chunk):
        # Step (1): which keys are right, q for queries of this chunk and g for their distinct groups
        groups, row = query_group[start : start + chunk].unique(return_inverse=True)  # (g,), (q,)
        row_of_group = query_group.new_full((num_query_groups,), -1)
        row_of_group[groups] = torch.arange(len(groups), device=row.device)
        pair_row = row_of_group[pairs[0]]
        here = pair_row >= 0
        related = torch.zeros(len(groups), num_key_groups, dtype=torch.bool, device=row.device)
        related[pair_row[here], pairs[1][here]] = True
        right = related[row][:, key_group]  # (q, K)

        # Step (2): what is ahead of the best of them; written as "not below" so that a NaN is ahead
        scores = queries[start : start + chunk] @ keys.T  # (q, D) @ (D, K) -> (q, K)
        best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)  # (q, 1)
        ahead = ~right & ~(scores < best - TIE)
        ranks.append(ahead.sum(dim=1))
    return torch.cat(ranks)


def retrieval_metrics(
    image_embeds: Tensor, text_embeds: Tensor, caption_image: Tensor, caption_ids: Tensor | None = None
) -> dict[str, float]:
    """Recall@1, @5 and @10 both ways, in percent.

    An image finds its text if any of its captions, or one equal to them, is among the first k; a caption finds its
    image if any image that has this caption is. An image without a caption is a wrong answer to others, and no query.

    Args:
        image_embeds: (I, D), any length.
        text_embeds: (T, D), any length.
        caption_image: (T,) long, the image that each caption belongs to.
        caption_ids: (T,) long, the same for equal captions; without it all captions count as different.

    Returns:
        `image_to_text_recall@k` and `text_to_image_recall@k`, and `mean_recall`, the mean of the six.
    """
    num_images, num_captions = len(image_embeds), len(text_embeds)
    if num_captions == 0 or len(caption_image) != num_captions:
        raise ValueError(
            f"{num_captions} captions with {len(caption_image)} entries in caption_image: give at least one caption, "
            "and for each the index of its image."
        )
    if not 0 <= int(caption_image.min()) <= int(caption_image.max()) < num_images:
        raise ValueError(
            f"caption_image holds {int(caption_image.min())} to {int(caption_image.max())}; "
            f"with {num_images} images it takes 0 to {num_images - 1}."
        )
    if caption_ids is None:
        caption_ids = torch.arange(num_captions, device=caption_image.device)
    else:
        caption_ids = caption_ids.unique(return_inverse=True)[1]
    images, texts = normalize(image_embeds.float(), dim=-1), normalize(text_embeds.float(), dim=-1)
    asking = caption_image.unique()
    every_image = torch.arange(num_images, device=caption_image.device)

    ranks = {
        "image_to_text": rank_of_right(images[asking], texts, asking, caption_ids, (caption_image, caption_ids)),
        "text_to_image": rank_of_right(texts, images, caption_ids, every_image, (caption_ids, caption_image)),
    }
    metrics = {f"{way}_recall@{k}": percent_within(rank, k) for way, rank in ranks.items() for k in RECALL_AT}
    return {**metrics, "mean_recall": sum(metrics.values()) / len(metrics)}


def zero_shot_metrics(image_embeds: Tensor, labels: Tensor, class_embeds: Tensor) -> dict[str, float]:
    """Zero-shot accuracy@1, and @5 with more than five classes, in percent.

    Args:
        image_embeds: (I, D), any length.
        labels: (I,) long, from 0 to C - 1.
        class_embeds: (C, D), any length, as `class_embeddings` returns them.
    """
    num_classes = len(class_embeds)
    if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels={labels.tolist()[:10]} (the first ten): give at least one, from 0 to {num_classes - 1}, "
            "the index of the class name."
        )
    images, classes = normalize(image_embeds.float(), dim=-1), normalize(class_embeds.float(), dim=-1)
    every_class = torch.arange(num_classes, device=labels.device)
    rank = rank_of_right(images, classes, labels, every_class, (every_class, every_class))
    return {f"accuracy@{k}": percent_within(rank, k) for k in (1, 5) if k == 1 or num_classes > k}


def percent_within(rank: Tensor, k: int) -> float:
    return 100 * (rank < k).double().mean().item()


class RetrievalRecall(evaluate.Metric):
    """`retrieval_metrics` as a module of `evaluate`, for embeddings that come batch by batch. It needs no network.

    Example:

    ```python
    >>> import torch

    >>> recall = RetrievalRecall(keep_in_memory=True)
    >>> embeds = torch.eye(2)
    >>> recall.add_batch(image_embeds=embeds, text_embeds=embeds[:, None], captions=[["a cat"], ["a dog"]])
    >>> recall.compute()["mean_recall"]
    100.0
    ```"""

    def _info(self) -> evaluate.MetricInfo:
        vector = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Recall@1, @5 and @10 of image-text retrieval, in percent.",
            citation="",
            inputs_description="One row per image: its embedding, the embeddings of its captions, and its captions.",
            features=datasets.Features(
                {
                    "image_embeds": vector,
                    "text_embeds": datasets.Sequence(vector),
                    "captions": datasets.Sequence(datasets.Value("string")),
                }
            ),
        )

    def _compute(
        self, image_embeds: list[list[float]], text_embeds: list[list[list[float]]], captions: list[list[str]]
    ) -> dict[str, float]:
        caption_ids: dict[str, int] = {}
        return retrieval_metrics(
            torch.tensor(image_embeds),
            torch.tensor([embed for embeds in text_embeds for embed in embeds]),
            torch.tensor([image for image, embeds in enumerate(text_embeds) for _ in embeds]),
            torch.tensor([caption_ids.setdefault(text, len(caption_ids)) for texts in captions for text in texts]),
        )


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
        templates: prompts with `{}` for the class name, such as "a photo of a {}.".

    Returns:
        (C, D) float32 on the CPU.

    Source: OpenCLIP's `build_zero_shot_classifier`.
    """
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"template={template!r} has no {{}} for the class name, as in 'a photo of a {{}}.'.")
    embeds = []
    with evaluating(model):
        for name in class_names:
            tokens = tokenizer(
                [template.format(name) for template in templates],
                padding="max_length",
                truncation=True,
                max_length=max_seq_length,
                return_tensors="pt",
            ).to(device)
            prompts = model.get_text_features(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            embeds.append(normalize(prompts.float(), dim=-1).mean(dim=0).cpu())  # (P, D) -> (D,)
    return normalize(torch.stack(embeds), dim=-1)


@dataclass
class EncodedPairs:
    """A data set as a model embeds it: I images, T captions.

    Args:
        image_embeds: (I, D) float32 on the CPU, normalised.
        text_embeds: (T, D) float32 on the CPU, normalised.
        caption_image: (T,) long, the image that each caption belongs to.
        caption_ids: (T,) long, the same for captions of the same tokens.
        image_rows: (I,) long, the place of each image in the data set, the skipped ones counted.
        skipped: the images and captions that could not be used.
        num_truncated: captions longer than the context.
    """

    image_embeds: Tensor
    text_embeds: Tensor
    caption_image: Tensor
    caption_ids: Tensor
    image_rows: Tensor
    skipped: list[str]
    num_truncated: int


def encode_pairs(
    model: MLIPModel, dataloader: Iterable[dict], device: torch.device | str, description: str
) -> EncodedPairs:
    """Embeds every image and every caption of batches made by `EvaluationCollator`.

    Captions go through the model in slices of at most as many as the batch has images, so memory does not depend on the
    number of captions per image.
    """
    images, texts, caption_image, caption_ids, image_rows, skipped = [], [], [], [], [], []
    id_of_tokens: dict[tuple[int, ...], int] = {}
    num_images = num_rows = num_truncated = 0
    with evaluating(model):
        for batch in logging.tqdm(dataloader, desc=description, unit="batch"):
            skipped += batch["skipped"]
            num_truncated += batch["num_truncated"]
            batch_size = len(batch["pixel_values"])
            image_rows.append(batch["kept"] + num_rows)
            num_rows += batch_size + len(batch["skipped"])
            if batch_size == 0:  # everything in it was skipped
                continue
            features = model.get_image_features(pixel_values=batch["pixel_values"].to(device))
            images.append(normalize(features.pooler_output.float(), dim=-1).cpu())
            for ids, mask in zip(
                batch["input_ids"].split(batch_size), batch["attention_mask"].split(batch_size), strict=True
            ):
                features = model.get_text_features(input_ids=ids.to(device), attention_mask=mask.to(device))
                texts.append(normalize(features.pooler_output.float(), dim=-1).cpu())
                for caption, present in zip(ids, mask, strict=True):
                    tokens = tuple(caption[present.bool()].tolist())
                    caption_ids.append(id_of_tokens.setdefault(tokens, len(id_of_tokens)))
            caption_image.append(batch["caption_image"].cpu() + num_images)
            num_images += batch_size
    if not images:
        raise ValueError(f"Nothing to evaluate: no image and caption left, {len(skipped)} skipped: {skipped[:5]}.")
    return EncodedPairs(
        image_embeds=torch.cat(images),
        text_embeds=torch.cat(texts),
        caption_image=torch.cat(caption_image),
        caption_ids=torch.tensor(caption_ids),
        image_rows=torch.cat(image_rows),
        skipped=skipped,
        num_truncated=num_truncated,
    )


__all__ = [
    "EncodedPairs",
    "RetrievalRecall",
    "class_embeddings",
    "encode_pairs",
    "retrieval_metrics",
    "zero_shot_metrics",
]
