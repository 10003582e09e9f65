# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""TODO docstring."""

from collections.abc import Callable

import datasets
import evaluate
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import logging

RECALL_AT = (1, 5, 10)


TIE = 1e-6  # cosines closer than this are equal: float32 rounds them differently from one batch size to the next


MAX_SCORES = 2**24  # scores held at once


# (q,) queries and the (q, K) candidate keys of each -> (q, K) scores that order these anew
Rescore = Callable[[Tensor, Tensor], Tensor]


def rank_of_right(
    queries: Tensor,
    keys: Tensor,
    query_group: Tensor,
    key_group: Tensor,
    pairs: tuple[Tensor, Tensor],
    top: int = 0,
    rescore: Rescore | None = None,
) -> Tensor:
    """Counts, for each query, the wrong keys that score at least as high as its best right key.

    Args:
        queries: (Q, D), normalised.
        keys: (K, D), normalised.
        query_group: (Q,) long, from 0.
        key_group: (K,) long, from 0.
        pairs: two (P,) long: key k is right for query q if (query_group[q], key_group[k]) is one of these pairs.
        top: how many candidates `rescore` orders anew; a right key that is not among them keeps its rank.
        rescore: their new scores; without it the scores are final.

    Returns:
        (Q,) long; 0 is first place. A score that is not a number counts as a miss.
    """
    num_key_groups = int(key_group.max()) + 1
    num_query_groups = int(torch.cat([query_group, pairs[0]]).max()) + 1  # some may have no query
    chunk = max(1, MAX_SCORES // len(keys))
    ranks = []
    starts = range(0, len(queries), chunk)
    for start in logging.tqdm(starts, desc="Ranks", unit="block", disable=len(starts) == 1):
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
        rank = ahead.sum(dim=1)

        # Step (3): the same among the first candidates by their new scores; a right one that ties is no candidate yet
        if rescore is not None:
            pessimistic = torch.where(right, scores.nan_to_num(-torch.inf) - TIE, scores.nan_to_num(torch.inf))
            candidates = pessimistic.topk(min(top, len(keys)), dim=1).indices  # (q, K)
            rows = torch.arange(start, start + len(candidates), device=candidates.device)
            scores = rescore(rows, candidates)  # (q, K)
            right = right.gather(1, candidates)
            best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)
            ahead = ~right & ~(scores < best - TIE)
            rank = torch.where(right.any(dim=1), ahead.sum(dim=1), rank)
        ranks.append(rank)
    return torch.cat(ranks)


def retrieval_metrics(
    image_embeds: Tensor,
    text_embeds: Tensor,
    caption_image: Tensor,
    caption_ids: Tensor | None = None,
    top: int = 0,
    rescore: tuple[Rescore, Rescore] | None = None,
) -> dict[str, float]:
    """Recall@1, @5 and @10 both ways, in percent.

    An image finds its text if any of its captions, or one equal to them, is among the first k; a caption finds its
    image if any image that has this caption is. An image without a caption is a wrong answer to others, and no query.

    Args:
        image_embeds: (I, D), any length.
        text_embeds: (T, D), any length.
        caption_image: (T,) long, the image that each caption belongs to.
        caption_ids: (T,) long, the same for equal captions; without it all captions count as different.
        top: how many candidates are ranked again by `rescore`.
        rescore: new scores of candidates: of images, with captions as candidates, and the other way round.

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

    of_images: Rescore | None = None
    of_captions: Rescore | None = None
    if rescore is not None:
        score_images, of_captions = rescore

        def of_images(rows: Tensor, candidates: Tensor) -> Tensor:
            return score_images(asking[rows], candidates)

    ranks = {
        "image_to_text": rank_of_right(
            images[asking], texts, asking, caption_ids, (caption_image, caption_ids), top, of_images
        ),
        "text_to_image": rank_of_right(
            texts, images, caption_ids, every_image, (caption_ids, caption_image), top, of_captions
        ),
    }
    metrics = {f"{way}_recall@{k}": percent_within(rank, k) for way, rank in ranks.items() for k in RECALL_AT}
    return {**metrics, "mean_recall": sum(metrics.values()) / len(metrics)}


def zero_shot_metrics(
    image_embeds: Tensor, labels: Tensor, class_embeds: Tensor, class_ids: Tensor | None = None
) -> dict[str, float]:
    """Zero-shot accuracy as `accuracy_metrics`.

    Args:
        image_embeds: (I, D), any length.
        labels: (I,) long, from 0 to C - 1.
        class_embeds: (C, D), any length, as `class_embeddings` returns them.
        class_ids: (C,) long, the same for classes of one name, which are one answer; without it all are different.
    """
    num_classes = len(class_embeds)
    if len(labels) == 0 or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(
            f"labels={labels.tolist()[:10]} (the first ten): give at least one, from 0 to {num_classes - 1}, "
            "the index of the class name."
        )
    images, classes = normalize(image_embeds.float(), dim=-1), normalize(class_embeds.float(), dim=-1)
    every_class = torch.arange(num_classes, device=labels.device)
    ids = every_class if class_ids is None else class_ids.unique(return_inverse=True)[1]
    rank = rank_of_right(images, classes, labels, ids, (every_class, ids))
    return accuracy_metrics(rank, labels, num_classes)


def accuracy_metrics(rank: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """`accuracy@1`, `accuracy@5` with more than five classes, and `mean_per_class_accuracy`, the mean over the classes
    that occur of the share of their images with rank 0; in percent.

    Args:
        rank: (I,) long, how many wrong classes are ahead of the right one.
        labels: (I,) long.
    """
    metrics = {f"accuracy@{k}": percent_within(rank, k) for k in (1, 5) if k == 1 or num_classes > k}
    per_class = [percent_within(rank[labels == label], 1) for label in labels.unique()]
    return {**metrics, "mean_per_class_accuracy": sum(per_class) / len(per_class)}


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


class ZeroShotAccuracy(evaluate.Metric):
    """`zero_shot_metrics` as a module of `evaluate`, for images that come batch by batch. It needs no network.

    Example:

    ```python
    >>> import torch

    >>> accuracy = ZeroShotAccuracy(keep_in_memory=True)
    >>> accuracy.add_batch(image_embeds=torch.eye(2), labels=[0, 1])
    >>> accuracy.compute(class_embeds=torch.eye(2))["accuracy@1"]
    100.0
    ```"""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Top-1, top-5 and mean per class accuracy of zero-shot classification, in percent.",
            citation="",
            inputs_description="One row per image: its embedding and its label. To `compute`: class_embeds (C, D).",
            features=datasets.Features(
                {"image_embeds": datasets.Sequence(datasets.Value("float32")), "labels": datasets.Value("int64")}
            ),
        )

    def _compute(self, image_embeds: list[list[float]], labels: list[int], class_embeds: Tensor) -> dict[str, float]:
        return zero_shot_metrics(torch.tensor(image_embeds), torch.tensor(labels), torch.as_tensor(class_embeds))
