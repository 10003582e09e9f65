# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Recall of retrieval and accuracy of classification, as functions and as metrics of the library `evaluate`."""

from collections.abc import Callable

import datasets
import evaluate
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers.utils import logging

DIRECTIONS = ("image_to_text", "text_to_image")
RECALL_AT = (1, 5, 10)
ACCURACY_AT = (1, 5)
TIE = 1e-6  # cosines closer than this count as equal: their last digits depend on the batch size
MAX_SCORES = 2**24  # scores held in memory at once
MISS = 2**31  # rank of a right key whose score is NaN
# Groups of captions by their length in tokens, BOS and EOS included: name -> shortest and longest. CLIP uses about the
# first 20 tokens of a caption (Zhang et al. 2024, arXiv 2403.15378), and its context has 77.
LENGTH_GROUPS = {"up_to_20_tokens": (0, 20), "21_to_77_tokens": (21, 77), "above_77_tokens": (78, 2**31)}


# (q,) queries and the (q, K) candidate keys of each -> (q, K) scores that order these anew
Rescore = Callable[[Tensor, Tensor], Tensor]


def ranks_of_right_keys(
    queries: Tensor,
    keys: Tensor,
    query_group: Tensor,
    key_group: Tensor,
    pairs: tuple[Tensor, Tensor],
    top: int = 0,
    rescore: Rescore | None = None,
) -> Tensor:
    """For each query, the number of wrong keys that score at least as high as its best right key.

    Args:
        queries: (Q, D), normalised.
        keys: (K, D), normalised.
        query_group: (Q,) long, from 0.
        key_group: (K,) long, from 0.
        pairs: two (P,) long: key k is right for query q if (query_group[q], key_group[k]) is one of these pairs.
        top: number of candidates that `rescore` orders again; a right key that is not among them keeps its rank.
        rescore: new scores of the candidates; without it the cosines are final.

    Returns:
        (Q,) long; 0 is the first place. A query whose right keys have a NaN score is a miss at every k.
    """
    num_key_groups = int(key_group.max()) + 1
    num_query_groups = int(torch.cat([query_group, pairs[0]]).max()) + 1  # some groups may have no query
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

        # Step (2): the wrong keys ahead of the best right key; "not below" counts a NaN as ahead
        scores = queries[start : start + chunk] @ keys.T  # (q, D) @ (D, K) -> (q, K)
        rank = _count_ahead(scores, right)  # (q,)

        # Step (3): the same among the first candidates by their new scores; on a tie a wrong key is a candidate first
        if rescore is not None:
            pessimistic = torch.where(right, scores.nan_to_num(-torch.inf) - TIE, scores.nan_to_num(torch.inf))
            candidates = pessimistic.topk(min(top, len(keys)), dim=1).indices  # (q, K)
            rows = torch.arange(start, start + len(candidates), device=candidates.device)
            scores = rescore(rows, candidates)  # (q, K)
            right = right.gather(1, candidates)
            rank = torch.where(right.any(dim=1), _count_ahead(scores, right), rank)
        ranks.append(rank)
    return torch.cat(ranks)


def _count_ahead(scores: Tensor, right: Tensor) -> Tensor:
    """Wrong keys that are not below the best right key, `(q,)`; `MISS` where the best right score is NaN.

    Args:
        scores: (q, K).
        right: (q, K) bool.
    """
    best = scores.masked_fill(~right, -torch.inf).amax(dim=1, keepdim=True)  # (q, 1)
    ahead = ~right & ~(scores < best - TIE)
    return ahead.sum(dim=1).masked_fill(best[:, 0].isnan(), MISS)


def retrieval_metrics(
    image_embeds: Tensor,
    text_embeds: Tensor,
    caption_image: Tensor,
    caption_ids: Tensor | None = None,
    top: int = 0,
    rescore: tuple[Rescore, Rescore] | None = None,
    caption_lengths: Tensor | None = None,
) -> dict[str, float]:
    """Recall@1, @5 and @10 in both directions, in percent.

    Image to text is a hit if any caption of the image, or a caption equal to one of them, is among the first k. Text to
    image is a hit if any image that has this caption is among the first k. An image without a caption is a key and no
    query.

    Args:
        image_embeds: (I, D), any length.
        text_embeds: (T, D), any length.
        caption_image: (T,) long, the index of each caption's image.
        caption_ids: (T,) long, equal for equal captions; without it all captions count as different.
        top: number of candidates that `rescore` ranks again.
        rescore: two functions that return new scores of candidates: captions for images, then images for captions.
        caption_lengths: (T,) long, tokens of each caption.

    Returns:
        `image_to_text_recall@k` and `text_to_image_recall@k`, and `mean_recall`, the mean of the six. With
        `caption_lengths` also `text_to_image_{group}_recall@k`, the recall of the captions of each of `LENGTH_GROUPS`
        among all images, if at least two groups have captions.

    Raises:
        ValueError: without a caption, or if `caption_image` does not fit the embeddings.
    """
    _check_caption_image(len(image_embeds), len(text_embeds), caption_image)
    if caption_ids is None:
        caption_ids = torch.arange(len(text_embeds), device=caption_image.device)
    else:
        caption_ids = caption_ids.unique(return_inverse=True)[1]
    images, texts = normalize(image_embeds.float(), dim=-1), normalize(text_embeds.float(), dim=-1)
    captioned = caption_image.unique()  # the images that are queries
    every_image = torch.arange(len(image_embeds), device=caption_image.device)

    of_images: Rescore | None = None
    of_captions: Rescore | None = None
    if rescore is not None:
        score_images, of_captions = rescore

        def of_images(rows: Tensor, candidates: Tensor) -> Tensor:
            return score_images(captioned[rows], candidates)

    ranks = {
        "image_to_text": ranks_of_right_keys(
            images[captioned], texts, captioned, caption_ids, (caption_image, caption_ids), top, of_images
        ),
        "text_to_image": ranks_of_right_keys(
            texts, images, caption_ids, every_image, (caption_ids, caption_image), top, of_captions
        ),
    }
    metrics = {
        f"{direction}_recall@{k}": percent_within(ranks[direction], k) for direction in DIRECTIONS for k in RECALL_AT
    }
    by_length = {} if caption_lengths is None else recall_by_length(ranks["text_to_image"], caption_lengths)
    return {**metrics, "mean_recall": sum(metrics.values()) / len(metrics), **by_length}


def recall_by_length(ranks: Tensor, caption_lengths: Tensor) -> dict[str, float]:
    """Recall from text to image for captions of each of `LENGTH_GROUPS`; empty if one group has all captions.

    Args:
        ranks: (T,) long, of the captions.
        caption_lengths: (T,) long, in tokens.
    """
    members = {
        name: (caption_lengths >= shortest) & (caption_lengths <= longest)
        for name, (shortest, longest) in LENGTH_GROUPS.items()
    }
    members = {name: inside for name, inside in members.items() if inside.any()}
    if len(members) < 2:
        return {}
    return {
        f"text_to_image_{name}_recall@{k}": percent_within(ranks[inside], k)
        for name, inside in members.items()
        for k in RECALL_AT
    }


def _check_caption_image(num_images: int, num_captions: int, caption_image: Tensor) -> None:
    """Raises ValueError if `caption_image` does not give each caption its image."""
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


def zero_shot_metrics(
    image_embeds: Tensor, labels: Tensor, class_embeds: Tensor, class_ids: Tensor | None = None
) -> dict[str, float]:
    """Zero-shot accuracy, as `accuracy_metrics` returns it.

    Args:
        image_embeds: (I, D), any length.
        labels: (I,) long, from 0 to C - 1.
        class_embeds: (C, D), any length, as `class_embeddings` returns them.
        class_ids: (C,) long, equal for classes with equal names, which count as one answer; without it all are
            different.

    Raises:
        ValueError: without an image, or if a label is no class.
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
    rank = ranks_of_right_keys(images, classes, labels, ids, (every_class, ids))
    return accuracy_metrics(rank, labels, num_classes)


def accuracy_metrics(rank: Tensor, labels: Tensor, num_classes: int) -> dict[str, float]:
    """Accuracies in percent, from the rank of the right class of each image.

    Args:
        rank: (I,) long, number of wrong classes ahead of the right one.
        labels: (I,) long.

    Returns:
        `accuracy@1`; `accuracy@5` if there are more than five classes; `mean_per_class_accuracy`, the accuracy@1 of
        each class that occurs, averaged over classes.

    Raises:
        ValueError: without an image.
    """
    metrics = {f"accuracy@{k}": percent_within(rank, k) for k in ACCURACY_AT if k == 1 or num_classes > k}
    per_class = [percent_within(rank[labels == label], 1) for label in labels.unique()]
    return {**metrics, "mean_per_class_accuracy": sum(per_class) / len(per_class)}


def percent_within(rank: Tensor, k: int) -> float:
    """Share of ranks `(N,)` below k, in percent.

    Raises:
        ValueError: for N = 0, of which there is no mean.
    """
    if len(rank) == 0:
        raise ValueError("Got 0 ranks: an accuracy or a recall needs at least one image.")
    return 100 * (rank < k).double().mean().item()


class RetrievalRecall(evaluate.Metric):
    """`retrieval_metrics` as a metric of the library `evaluate`, for embeddings batch by batch. It needs no network.

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
    """`zero_shot_metrics` as a metric of the library `evaluate`, for images batch by batch. It needs no network.

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
