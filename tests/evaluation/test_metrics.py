# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Recall against a naive one, ties, duplicates, and embeddings that do not depend on the batch."""

import socket

import numpy as np
import pytest
import torch
from conftest import open_gate, pairs_batch, small_model
from sklearn.metrics import balanced_accuracy_score
from transformers import CLIPConfig, CLIPModel

from modeling_mlip.evaluation import embedding, metrics
from modeling_mlip.evaluation.classifiers import few_shot_accuracy
from modeling_mlip.evaluation.embedding import class_embeddings, encode_pairs, encode_variants
from modeling_mlip.evaluation.metrics import (
    RetrievalRecall,
    ZeroShotAccuracy,
    accuracy_metrics,
    retrieval_metrics,
    zero_shot_metrics,
)
from modeling_mlip.evaluation.token_rescoring import token_rescore
from modeling_mlip.token_similarity import token_scores

EOS = 59


def naive_recall(image_embeds, text_embeds, caption_image, caption_ids) -> dict[str, float]:
    """In float64, one query at a time: sorted with wrong answers first among equals, then the first k are looked at."""
    images = image_embeds.double() / image_embeds.double().norm(dim=1, keepdim=True)
    texts = text_embeds.double() / text_embeds.double().norm(dim=1, keepdim=True)
    captions = list(zip(caption_image.tolist(), caption_ids.tolist(), strict=True))
    found = {}
    for k in (1, 5, 10):
        hits = []
        for i in sorted({image for image, _ in captions}):
            own = {caption for image, caption in captions if image == i}
            order = sorted(
                range(len(texts)), key=lambda t: (-round(float(images[i] @ texts[t]), 6), captions[t][1] in own)
            )
            hits.append(any(captions[t][1] in own for t in order[:k]))
        found[f"image_to_text_recall@{k}"] = 100 * sum(hits) / len(hits)
        hits = []
        for t, (_, caption) in enumerate(captions):
            right = {image for image, other in captions if other == caption}
            order = sorted(range(len(images)), key=lambda i: (-round(float(images[i] @ texts[t]), 6), i in right))
            hits.append(any(i in right for i in order[:k]))
        found[f"text_to_image_recall@{k}"] = 100 * sum(hits) / len(hits)
    found["mean_recall"] = sum(found.values()) / 6
    return found


def noisy_pairs(num_images=40, num_captions=90, seed=0):
    """Captions scattered over the images, some images with none, some captions equal, none of them sorted."""
    generator = torch.Generator().manual_seed(seed)
    image_embeds = torch.randn(num_images, 8, generator=generator)
    caption_image = torch.randint(num_images, (num_captions,), generator=generator)
    caption_ids = torch.randint(num_captions, (num_captions,), generator=generator)
    text_embeds = image_embeds[caption_image] + 0.8 * torch.randn(num_captions, 8, generator=generator)
    return image_embeds, text_embeds, caption_image, caption_ids


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("max_scores", [1, 1000, 2**24])
def test_recall_equals_the_naive_one_whatever_the_chunk(seed, max_scores, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_SCORES", max_scores)
    image_embeds, text_embeds, caption_image, caption_ids = noisy_pairs(seed=seed)
    ours = retrieval_metrics(image_embeds, text_embeds, caption_image, caption_ids)
    assert ours == pytest.approx(naive_recall(image_embeds, text_embeds, caption_image, caption_ids))
    assert 20 < ours["mean_recall"] < 90  # or the comparison says little
    different = torch.arange(len(caption_ids))
    ours = retrieval_metrics(image_embeds, text_embeds, caption_image)
    assert ours == pytest.approx(naive_recall(image_embeds, text_embeds, caption_image, different))


def test_any_caption_of_an_image_is_a_hit_and_each_caption_is_a_query():
    image_embeds = torch.eye(2)
    text_embeds = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.1, 1.0]])  # the second caption of image 0 looks like image 1
    found = retrieval_metrics(image_embeds, text_embeds, torch.tensor([0, 0, 1]))
    assert (
        found["image_to_text_recall@1"] == 50
    )  # image 0 finds its first caption; image 1 finds the caption of image 0
    assert found["text_to_image_recall@1"] == pytest.approx(200 / 3)


@pytest.mark.parametrize("value", [1.0, 0.0, float("nan")])
def test_constant_and_nan_embeddings_score_zero(value):
    found = retrieval_metrics(torch.full((30, 7), value), torch.full((60, 7), value), torch.arange(60) % 30)
    assert set(found.values()) == {0}
    assert zero_shot_metrics(torch.full((30, 7), value), torch.arange(30) % 6, torch.full((6, 7), value)) == {
        "accuracy@1": 0,
        "accuracy@5": 0,
        "mean_per_class_accuracy": 0,
    }


def test_nan_is_a_miss_even_where_every_answer_is_right_or_among_the_first_k():
    nan = torch.full((1, 4), float("nan"))
    assert set(retrieval_metrics(nan, nan, torch.tensor([0])).values()) == {0}  # no wrong answer is ahead of it
    three = torch.full((3, 4), float("nan"))
    assert set(retrieval_metrics(three, three, torch.arange(3)).values()) == {0}  # three answers, and k = 5
    good = torch.eye(3)
    not_a_score = (lambda rows, candidates: torch.full(candidates.shape, float("nan")),) * 2
    assert set(retrieval_metrics(good, good, torch.arange(3), None, 1, not_a_score).values()) == {0}


def test_a_classifier_whose_scores_are_nan_scores_nothing(monkeypatch):
    from sklearn.linear_model import LogisticRegression

    monkeypatch.setattr(
        LogisticRegression, "predict_log_proba", lambda self, rows: np.full((len(rows), len(self.classes_)), np.nan)
    )
    labels = torch.arange(12) % 6
    found = few_shot_accuracy(torch.randn(12, 4), labels, torch.randn(12, 4), labels, 6, shots=2, seeds=2)
    assert found == {"accuracy@1": 0, "accuracy_spread": 0}


def test_no_image_has_no_accuracy():
    none = torch.empty(0, dtype=torch.long)
    with pytest.raises(ValueError, match="Got 0 ranks"):
        accuracy_metrics(none, none, 3)
    with pytest.raises(ValueError, match="seeds=0"):
        few_shot_accuracy(torch.eye(2), torch.arange(2), torch.eye(2), torch.arange(2), 2, shots=1, seeds=0)


def test_float_rounding_is_a_tie():
    torch.manual_seed(0)
    constant = torch.randn(1, 64)
    image_embeds, text_embeds = constant.repeat(50, 1), constant + 1e-7 * torch.randn(50, 64)
    assert retrieval_metrics(image_embeds, text_embeds, torch.arange(50))["mean_recall"] == 0


def test_equal_captions_count_as_one():
    image_embeds, caption_image = torch.eye(3), torch.arange(3)
    text_embeds = torch.tensor([[1.0, 0.2, 0.0], [1.0, 0.2, 0.0], [0.0, 0.0, 1.0]])  # images 0 and 1: the same caption
    with_ids = retrieval_metrics(image_embeds, text_embeds, caption_image, torch.tensor([7, 7, 3]))
    assert with_ids["mean_recall"] == 100
    without = retrieval_metrics(image_embeds, text_embeds, caption_image)
    assert without["image_to_text_recall@1"] == pytest.approx(100 / 3)
    assert without["text_to_image_recall@1"] == pytest.approx(200 / 3)


def test_recall_by_length_is_the_recall_of_the_captions_of_that_length_among_all_images():
    pairs = noisy_pairs()
    num_captions = len(pairs[1])
    lengths = torch.randint(5, 40, (num_captions,), generator=torch.Generator().manual_seed(0))
    lengths[:5] = torch.tensor([20, 21, 77, 78, 300])
    found = retrieval_metrics(*pairs, caption_lengths=lengths)
    whole = retrieval_metrics(*pairs)
    assert {name: found.pop(name) for name in whole} == whole
    groups = {"up_to_20": lengths <= 20, "21_to_77": (lengths > 20) & (lengths < 78), "above_77": lengths > 77}
    images, texts, caption_image, caption_ids = pairs
    scores = torch.nn.functional.cosine_similarity(texts[:, None], images[None], dim=-1)  # (T, I)
    owners = (caption_ids[:, None] == caption_ids).float() @ torch.eye(len(images))[caption_image] > 0  # (T, I)
    for k in (1, 5, 10):
        is_hit = owners.gather(1, scores.topk(k, dim=1).indices).any(dim=1)
        for name, inside in groups.items():
            value = found.pop(f"text_to_image_{name}_tokens_recall@{k}")
            assert value == pytest.approx(100 * is_hit[inside].float().mean().item())
    assert not found


def test_captions_of_one_length_group_have_no_recall_of_their_own():
    pairs = noisy_pairs()
    lengths = torch.full((len(pairs[1]),), 20)
    assert retrieval_metrics(*pairs, caption_lengths=lengths) == retrieval_metrics(*pairs)


def test_zero_shot_accuracy_equals_topk():
    torch.manual_seed(0)
    labels, class_embeds = torch.randint(9, (200,)), torch.randn(9, 16)
    image_embeds = class_embeds[labels] + 2 * torch.randn(200, 16)
    order = torch.nn.functional.cosine_similarity(image_embeds[:, None], class_embeds[None], dim=-1).argsort(1, True)
    theirs = {f"accuracy@{k}": 100 * (order[:, :k] == labels[:, None]).any(1).double().mean().item() for k in (1, 5)}
    theirs["mean_per_class_accuracy"] = 100 * balanced_accuracy_score(labels, order[:, 0])
    assert zero_shot_metrics(image_embeds, labels, class_embeds) == pytest.approx(theirs)
    assert list(zero_shot_metrics(image_embeds, labels % 5, class_embeds[:5])) == [
        "accuracy@1",
        "mean_per_class_accuracy",
    ]


def test_bad_indices_are_named():
    with pytest.raises(ValueError, match="caption_image holds 0 to 2; with 2 images it takes 0 to 1"):
        retrieval_metrics(torch.eye(2), torch.ones(2, 2), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="at least one caption"):
        retrieval_metrics(torch.eye(2), torch.ones(0, 2), torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="from 0 to 1"):
        zero_shot_metrics(torch.eye(2), torch.tensor([0, -1]), torch.eye(2))


def test_evaluate_module_equals_the_function_without_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    torch.manual_seed(0)
    image_embeds = torch.randn(20, 6)
    text_embeds = image_embeds[:, None] + torch.randn(20, 3, 6)
    captions = [[f"caption {(3 * image + n) % 50}" for n in range(3)] for image in range(20)]
    recall = RetrievalRecall(keep_in_memory=True)
    for part in (slice(0, 13), slice(13, 20)):
        recall.add_batch(image_embeds=image_embeds[part], text_embeds=text_embeds[part], captions=captions[part])
    caption_ids = torch.tensor([int(caption.split()[1]) for row in captions for caption in row])
    caption_image = torch.arange(20).repeat_interleave(3)
    assert recall.compute() == retrieval_metrics(image_embeds, text_embeds.flatten(0, 1), caption_image, caption_ids)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": EOS + 1,
        "max_position_embeddings": 16,
        "bos_token_id": 1,
        "eos_token_id": EOS,
        "pad_token_id": EOS,
    }
    vision = {"image_size": 16, "patch_size": 8, "attention_dropout": 0.5}
    return CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=24))


def collate(pixel_values, captions) -> dict:
    """What `EvaluationCollator` makes, padded to the longest caption of the batch."""
    flat = [(image, caption) for image, own in enumerate(captions) for caption in own]
    length = max((len(caption) for _, caption in flat), default=0)
    return {
        "pixel_values": pixel_values,
        "input_ids": torch.tensor([caption + [EOS] * (length - len(caption)) for _, caption in flat]),
        "attention_mask": torch.tensor([[1] * len(caption) + [0] * (length - len(caption)) for _, caption in flat]),
        "caption_image": torch.tensor([image for image, _ in flat], dtype=torch.long),
        "caption_lengths": torch.tensor([len(caption) for _, caption in flat], dtype=torch.long),
        "kept": torch.arange(len(pixel_values)),  # one more came after them, and was skipped
        "skipped": [f"after image {len(pixel_values)}"],
        "num_truncated": 2,
    }


def test_embeddings_ids_and_metrics_do_not_depend_on_the_batch(model):
    generator = torch.Generator().manual_seed(1)
    pixel_values = torch.randn(11, 3, 16, 16, generator=generator)
    captions = [
        [[1, *torch.randint(2, 5, (length % 4,), generator=generator).tolist(), EOS] for length in range(image % 3, 7)]
        for image in range(11)
    ]
    encoded = []
    for batch_size in (1, 4, 11):
        starts = range(0, 11, batch_size)
        batches = [collate(pixel_values[at : at + batch_size], captions[at : at + batch_size]) for at in starts]
        model.train()
        encoded.append(encode_pairs(model, batches, "cpu", "encode"))
        assert model.training
    one, four, eleven = encoded
    flat = [(image, tuple(caption)) for image, own in enumerate(captions) for caption in own]
    assert one.caption_image.tolist() == [image for image, _ in flat]
    same = [[first == second for _, second in flat] for _, first in flat]
    assert (one.caption_ids[:, None] == one.caption_ids).tolist() == same
    assert len(set(one.caption_ids.tolist())) < len(flat)
    for other in (four, eleven):
        torch.testing.assert_close(other.image_embeds, one.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(other.text_embeds, one.text_embeds, atol=1e-5, rtol=0)
        assert other.caption_ids.tolist() == one.caption_ids.tolist()
        assert other.caption_image.tolist() == one.caption_image.tolist()
        found, expected = (
            retrieval_metrics(pairs.image_embeds, pairs.text_embeds, pairs.caption_image, pairs.caption_ids)
            for pairs in (other, one)
        )
        assert found == expected
    torch.testing.assert_close(one.text_embeds.norm(dim=1), torch.ones(len(flat)))
    assert four.image_rows.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 10, 11, 12]
    assert (four.num_truncated, four.skipped) == (6, ["after image 4", "after image 4", "after image 3"])


def test_classes_without_an_image_are_wrong_answers_alone():
    assert zero_shot_metrics(torch.eye(3)[:1], torch.tensor([0]), torch.eye(3))["accuracy@1"] == 100
    assert zero_shot_metrics(torch.eye(3)[2:], torch.tensor([0]), torch.eye(3))["accuracy@1"] == 0


def test_classes_of_one_name_are_one_answer():
    embeds = torch.eye(5)[[0, 1, 2, 3, 3]]  # two classes of one name
    images = torch.eye(5)[[0, 1, 2, 3, 3]]
    labels = torch.arange(5)
    assert zero_shot_metrics(images, labels, embeds)["accuracy@1"] == 60
    assert zero_shot_metrics(images, labels, embeds, torch.tensor([0, 1, 2, 3, 3]))["accuracy@1"] == 100
    assert zero_shot_metrics(images.roll(1, dims=0), labels, embeds, torch.tensor([0, 1, 2, 3, 3]))["accuracy@1"] == 20


def test_no_batch_of_captions_is_larger_than_that_of_images(model, monkeypatch):
    sizes = []
    plain = model.get_text_features
    monkeypatch.setattr(
        model,
        "get_text_features",
        lambda input_ids, **kwargs: sizes.append(len(input_ids)) or plain(input_ids, **kwargs),
    )
    encode_pairs(model, [collate(torch.randn(2, 3, 16, 16), [[[1, 2, EOS]] * 5] * 2)], "cpu", "encode")
    assert sizes == [2] * 5


def test_a_data_set_without_a_usable_image_is_an_error(model):
    with pytest.raises(ValueError, match="Nothing to evaluate.*after image 0"):
        encode_pairs(model, [collate(torch.empty(0, 3, 16, 16), [])], "cpu", "encode")


class LetterTokenizer:
    """Stands in for a tokenizer: one id per letter, between BOS and EOS."""

    pad_token_id = EOS

    def __call__(self, prompts, verbose):
        return {"input_ids": [[1, *(2 + ord(letter) % 50 for letter in prompt), EOS] for prompt in prompts]}


@pytest.mark.parametrize("at_once", [1, 4, 256])
def test_class_embedding_is_the_mean_of_normalised_prompts_whatever_the_batch(model, at_once, monkeypatch):
    monkeypatch.setattr(embedding, "PROMPTS_AT_ONCE", at_once)
    names, templates = ["cat", "dog", "owl"], ["a {}", "the big {} {x}."]
    found = class_embeddings(model, LetterTokenizer(), names, templates, "cpu", 16)
    model.eval()
    for name, embed in zip(names, found, strict=True):
        prompts = []
        for prompt in (f"a {name}", f"the big {name} {{x}}."):
            [ids] = LetterTokenizer()([prompt], False)["input_ids"]
            ids = torch.tensor([ids if len(ids) <= 16 else [*ids[:15], EOS]])
            with torch.no_grad():
                prompts.append(model.get_text_features(ids).pooler_output[0])
        mean = sum(prompt / prompt.norm() for prompt in prompts) / 2
        torch.testing.assert_close(embed, mean / mean.norm(), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="'a photo' has no {}"):
        class_embeddings(model, LetterTokenizer(), names, ["a photo"], "cpu", 16)


def test_several_settings_in_one_pass_equal_a_pass_each():
    model = small_model()
    batches = [collate(torch.randn(3, 3, 32, 32), [[[1, 2, 63]], [[1, 3, 63]], [[1, 4, 63]]]) for _ in range(2)]
    settings = [lambda: model.set_merge_ratio(0), lambda: model.set_merge_ratio(0.5)]
    together = encode_variants(model, batches, "cpu", "encode", settings)
    for apply, found in zip(settings, together, strict=True):
        apply()
        alone = encode_pairs(model, batches, "cpu", "encode")
        torch.testing.assert_close(found.image_embeds, alone.image_embeds)
        torch.testing.assert_close(found.text_embeds, alone.text_embeds)
    assert not torch.allclose(together[0].image_embeds, together[1].image_embeds)


# Re-ranking


def reranked(image_embeds, text_embeds, caption_image, fine, top):
    """One query at a time: the first `top` by the cosine, wrong ones first among equals, then these by `fine`."""
    images, texts = (torch.nn.functional.normalize(e.double(), dim=1) for e in (image_embeds, text_embeds))
    found = {}
    for way, scores, new, right in (
        ("image_to_text", images @ texts.T, fine, lambda i, t: int(caption_image[t]) == i),
        ("text_to_image", texts @ images.T, fine.T, lambda t, i: int(caption_image[t]) == i),
    ):
        for k in (1, 5, 10):
            hits = []
            for q in range(len(scores)):
                order = sorted(range(scores.shape[1]), key=lambda c: (-round(float(scores[q, c]), 6), right(q, c)))
                first = sorted(order[:top], key=lambda c: (-round(float(new[q, c]), 6), right(q, c)))
                hits.append(any(right(q, c) for c in [*first, *order[top:]][:k]))
            found[f"{way}_recall@{k}"] = 100 * sum(hits) / len(hits)
    return {**found, "mean_recall": sum(found.values()) / 6}


@pytest.mark.parametrize("top", [1, 3, 7, 1000])
@pytest.mark.parametrize("max_scores", [1, 2**24])
def test_reranking_equals_the_naive_one(top, max_scores, monkeypatch):
    monkeypatch.setattr(metrics, "MAX_SCORES", max_scores)
    image_embeds, text_embeds, caption_image, _ = noisy_pairs(num_images=25, num_captions=60)
    caption_image = torch.cat([torch.arange(25), caption_image[25:]])  # each image asks
    generator = torch.Generator().manual_seed(3)
    fine = torch.nn.functional.one_hot(caption_image, 25).T.double() + torch.randn(25, 60, generator=generator)
    rescore = (
        lambda rows, candidates: fine[rows].gather(1, candidates),
        lambda rows, candidates: fine.T[rows].gather(1, candidates),
    )
    ours = retrieval_metrics(image_embeds, text_embeds, caption_image, None, top, rescore)
    assert ours == pytest.approx(reranked(image_embeds, text_embeds, caption_image, fine, top))
    plain = retrieval_metrics(image_embeds, text_embeds, caption_image)
    assert (ours == plain) == (top == 1)


def test_reranking_of_constant_scores_scores_zero():
    embeds = torch.ones(30, 7)
    same = (lambda rows, candidates: torch.zeros(candidates.shape),) * 2
    assert set(retrieval_metrics(embeds, embeds, torch.arange(30), None, 5, same).values()) == {0}


@pytest.mark.parametrize("instance_loss", ["info_nce", "sigmoid"])
def test_token_scores_of_reranking_are_those_of_the_loss(instance_loss):
    model = open_gate(small_model(vision={"merge_ratio": 0.5}, instance_loss=instance_loss))
    with torch.no_grad():
        model.token_logit_scale.fill_(1.5)
        if instance_loss == "sigmoid":
            model.logit_scale.fill_(5.0)  # above the maximum of InfoNCE
            model.logit_bias.fill_(0.0)  # it would change no order
    pairs = pairs_batch(6)
    batch = {**pairs, "caption_image": torch.arange(6), "kept": torch.arange(6), "skipped": [], "num_truncated": 0}
    batch["caption_lengths"] = pairs["attention_mask"].sum(dim=1)
    encoded = encode_pairs(model, [batch], "cpu", "encode", with_tokens=True)
    with torch.no_grad():
        outputs = model(**pairs, return_pairs=True)
        by_image, by_text = token_scores(*outputs.pairs.tokens)
    of_images, of_captions = token_rescore(model, encoded, weight=0.7)
    rows, candidates = torch.arange(6), torch.arange(6).expand(6, 6).flip(1)
    weight = 0.7 * torch.tensor(1.5).exp()
    expected = outputs.logits_per_image + weight * by_image
    torch.testing.assert_close(of_images(rows, candidates), expected.flip(1), atol=2e-2, rtol=0)  # kept in float16
    expected = outputs.logits_per_text + weight * by_text.T
    torch.testing.assert_close(of_captions(rows, candidates), expected.flip(1), atol=2e-2, rtol=0)


def test_tokens_of_several_settings_in_one_pass_are_those_of_a_pass_each():
    model = open_gate(small_model())
    pairs = pairs_batch(4)
    batch = {**pairs, "caption_image": torch.arange(4), "kept": torch.arange(4), "skipped": [], "num_truncated": 0}
    batch["caption_lengths"] = pairs["attention_mask"].sum(dim=1)
    settings = [lambda: model.set_merge_ratio(0), lambda: model.set_merge_ratio(0.5)]
    together = encode_variants(model, [batch, batch], "cpu", "encode", settings, with_tokens=True)
    for apply_setting, found in zip(settings, together, strict=True):
        apply_setting()
        alone = encode_pairs(model, [batch, batch], "cpu", "encode", with_tokens=True)
        for kind in ("image_tokens", "image_weights", "text_tokens"):
            ours, theirs = getattr(found.tokens, kind), getattr(alone.tokens, kind)
            assert len(ours) == len(theirs) == 8
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert len(together[0].tokens.image_tokens[0]) > len(together[1].tokens.image_tokens[0])


def test_zero_shot_module_equals_the_function_without_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    torch.manual_seed(0)
    labels, class_embeds = torch.randint(9, (50,)), torch.randn(9, 6)
    image_embeds = class_embeds[labels] + torch.randn(50, 6)
    accuracy = ZeroShotAccuracy(keep_in_memory=True)
    for part in (slice(0, 33), slice(33, 50)):
        accuracy.add_batch(image_embeds=image_embeds[part], labels=labels[part])
    found = accuracy.compute(class_embeds=class_embeds)
    assert found == zero_shot_metrics(image_embeds, labels, class_embeds)
    assert 20 < found["accuracy@1"] < 100
