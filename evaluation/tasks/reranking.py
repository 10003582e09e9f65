# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Re-ranking: retrieval whose first candidates are ordered again by their tokens."""

import math
from dataclasses import dataclass, field
from typing import Any

from modeling_mlip import MLIPModel
from modeling_mlip.hub.results import Result

from ..encoders import Encoder
from ..evaluation_split import EvaluationSplit
from ..metrics import retrieval_metrics
from ..token_rescoring import token_rescore
from .retrieval import retrieval_results
from .task import Encodings, Task


@dataclass
class RerankingOptions:
    """Re-ranking of retrieval candidates."""

    rerank: int = field(
        default=0,
        metadata={"help": "Retrieval: number of candidates to rank again by their tokens; 0 turns re-ranking off."},
    )
    rerank_weight: float = field(
        default=1.0,
        metadata={"help": "Weight of the token score beside the embedding score; each has its learned temperature."},
    )

    def __post_init__(self):
        if self.rerank < 0:
            raise ValueError(f"rerank={self.rerank}: choose 0 or more.")
        if not (math.isfinite(self.rerank_weight) and self.rerank_weight >= 0):
            raise ValueError(f"rerank_weight={self.rerank_weight}: choose a finite number of 0 or more.")


class Reranking(Task):
    """Recall after the first `rerank` candidates of each query are ordered by embeddings and tokens."""

    name = "reranking"
    Options = RerankingOptions
    needs_captions = True
    needs_tokens = True

    def is_requested(self, is_captioned: bool, label_columns: list[str]) -> bool:
        return self.options.rerank > 0

    def prepare(self, encoder: Encoder, split: EvaluationSplit) -> None:
        """Raises ValueError for a model without the token level, or without candidates."""
        if self.options.rerank < 1:
            raise ValueError("rerank=0: choose the number of candidates to rank again, such as 20.")
        model = encoder.model
        if isinstance(model, MLIPModel) and model.token_visual_projection is not None:
            return
        weight = getattr(getattr(model, "config", None), "token_loss_weight", None)
        reason = "is not an MLIP model" if weight is None else f"has token_loss_weight={weight}"
        raise ValueError(
            f"Re-ranking compares tokens, and {encoder.name} {reason}, so it has no token projections; leave out "
            "rerank, or train an MLIP model with token_loss_weight above 0."
        )

    def metrics(self, encoder: Encoder, split: EvaluationSplit, encodings: Encodings, encoded: Any) -> list[Result]:
        pairs = encodings.pairs
        metrics = retrieval_metrics(
            pairs.image_embeds,
            pairs.text_embeds,
            pairs.caption_image,
            pairs.caption_ids,
            self.options.rerank,
            token_rescore(encoder.model, pairs, self.options.rerank_weight),
        )
        setting = {"rerank": self.options.rerank, "rerank_weight": self.options.rerank_weight}
        return retrieval_results(metrics, task=self.name, name_suffix="_reranked", setting=setting)
