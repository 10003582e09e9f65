# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Scores of retrieval candidates from their tokens, for re-ranking."""

import torch
from torch import Tensor, nn

from modeling_mlip import MLIPModel
from modeling_mlip.losses import temperature
from modeling_mlip.token_similarity import TokenEmbeddings, token_scores

from .embedding import EncodedPairs
from .metrics import Rescore


def token_rescore(model: MLIPModel, encoded: EncodedPairs, weight: float) -> tuple[Rescore, Rescore]:
    """Candidate scores for `retrieval_metrics`: exp(logit_scale) * cosine + weight * exp(token_logit_scale) * late
    interaction, each direction with its own late-interaction score.

    Args:
        model: the model that computed `encoded`.
        encoded: with tokens.
        weight: 0 keeps the order by cosine.

    Returns:
        scores of caption candidates for images, and of image candidates for captions.

    Raises:
        ValueError: if `encoded` holds no tokens.

    Source: FILIP (Yao et al. 2022, arXiv 2111.07783) for the score of tokens.
    """
    bank = encoded.tokens
    if bank is None:
        raise ValueError("The tokens were not kept; call encode_pairs(..., with_tokens=True).")
    device = model.device
    has_maximum = model.config.instance_loss == "info_nce"
    scale = (temperature(model.logit_scale) if has_maximum else model.logit_scale.exp()).item()
    token_scale = temperature(model.token_logit_scale).item()

    def gather_tokens(images: list[int], captions: list[int]) -> TokenEmbeddings:
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
    def score_captions(rows: Tensor, candidates: Tensor) -> Tensor:
        scores = torch.einsum("qd,qkd->qk", encoded.image_embeds[rows], encoded.text_embeds[candidates])
        tokens = [
            token_scores(*gather_tokens([image], captions))[0][0].cpu()  # (1, K) -> (K,)
            for image, captions in zip(rows.tolist(), candidates.tolist(), strict=True)
        ]
        return scale * scores + weight * token_scale * torch.stack(tokens)

    @torch.inference_mode()
    def score_images(rows: Tensor, candidates: Tensor) -> Tensor:
        scores = torch.einsum("qd,qkd->qk", encoded.text_embeds[rows], encoded.image_embeds[candidates])
        tokens = [
            token_scores(*gather_tokens(images, [caption]))[1][:, 0].cpu()  # (K, 1) -> (K,)
            for caption, images in zip(rows.tolist(), candidates.tolist(), strict=True)
        ]
        return scale * scores + weight * token_scale * torch.stack(tokens)

    return score_captions, score_images
