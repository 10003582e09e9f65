# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""How good a model is: retrieval recall and accuracy.

Reading order: the rank of the right answer (where everything is decided), the metrics on embeddings, the same as
modules of `evaluate`, the loops that get embeddings from a model, and re-ranking by tokens.

Ties never favour the right answer: a wrong one that scores the same counts as ahead of it. A model that maps everything
to one point therefore scores 0, not 100.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import datasets
import evaluate
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from modeling_mlip import MLIPModel
from modeling_mlip.losses import TokenEmbeddings, temperature, token_scores

from .data import SkipBudget, tokenize
from .templates import check_templates, fill

RECALL_AT = (1, 5, 10)
TIE = 1e-6  # cosines closer than this are equal: float32 rounds them differently from one batch size to the next
MAX_SCORES = 2**24  # scores held at once
PROMPTS_AT_ONCE = 256

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


def token_rescore(model: MLIPModel, encoded: EncodedPairs, weight: float) -> tuple[Rescore, Rescore]:
    """Scores for `retrieval_metrics` that add what the tokens say: the cosine of the embeddings times its learned
    temperature, plus `weight` times the late-interaction score of the same direction times its own.

    Args:
        model: that `encoded` is of, with tokens.
        weight: 0 leaves the order of the candidates as it was.

    Source: FILIP (Yao et al. 2022, arXiv 2111.07783) for the score of tokens.
    """
    bank = encoded.tokens
    if bank is None:
        raise ValueError("The tokens were not kept; call encode_pairs(..., with_tokens=True).")
    device = model.device
    scale, token_scale = temperature(model.logit_scale).item(), temperature(model.token_logit_scale).item()

    def tokens_of(images: list[int], captions: list[int]) -> TokenEmbeddings:
        text = [bank.text_tokens[caption].float() for caption in captions]
        weights = [bank.image_weights[image] for image in images]
        embeddings = TokenEmbeddings(
            image_tokens=torch.stack([bank.image_tokens[image].float() for image in images]),
            image_weights=torch.stack(weights),
            text_tokens=nn.utils.rnn.pad_sequence(text, batch_first=True),
            text_mask=nn.utils.rnn.pad_sequence([tokens.new_ones(len(tokens)) for tokens in text], True).bool(),
        )
        return TokenEmbeddings(*(tensor.to(device) for tensor in embeddings))

    @torch.inference_mode()
    def of_images(rows: Tensor, candidates: Tensor) -> Tensor:
        scores = torch.einsum("qd,qkd->qk", encoded.image_embeds[rows], encoded.text_embeds[candidates])
        tokens = [
            token_scores(*tokens_of([image], captions))[0][0].cpu()  # (1, K) -> (K,)
            for image, captions in zip(rows.tolist(), candidates.tolist(), strict=True)
        ]
        return scale * scores + weight * token_scale * torch.stack(tokens)

    @torch.inference_mode()
    def of_captions(rows: Tensor, candidates: Tensor) -> Tensor:
        scores = torch.einsum("qd,qkd->qk", encoded.text_embeds[rows], encoded.image_embeds[candidates])
        tokens = [
            token_scores(*tokens_of(images, [caption]))[1][:, 0].cpu()  # (K, 1) -> (K,)
            for caption, images in zip(rows.tolist(), candidates.tolist(), strict=True)
        ]
        return scale * scores + weight * token_scale * torch.stack(tokens)

    return of_images, of_captions


__all__ = [
    "EncodedPairs",
    "RetrievalRecall",
    "ZeroShotAccuracy",
    "accuracy_metrics",
    "class_embeddings",
    "encode_pairs",
    "encode_variants",
    "retrieval_metrics",
    "token_rescore",
    "zero_shot_metrics",
]
