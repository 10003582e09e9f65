# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What the page of `mlip app` does with a model, without the page: classify, search, and show merged regions."""

import re
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from modeling_mlip import MLIPModel
from modeling_mlip.data.images import convert_to_rgb
from modeling_mlip.evaluation.embedding import evaluating
from modeling_mlip.evaluation.encoders import make_encoder, set_merging
from modeling_mlip.evaluation.visualize.inspection import inspect_image
from modeling_mlip.evaluation.visualize.pictures import draw_regions
from modeling_mlip.evaluation.visualize.visualize import load_model

from .embed import embed_captions, embed_inputs, hash_model
from .search_command import search_image, search_words
from .vector_index import Hit, VectorIndex

TIMED_CALLS = 5
INSPECTION_ATTENTION = "eager"  # the only implementation that returns attention weights


@dataclass(frozen=True)
class MergeReport:
    """What a merge ratio does with one image.

    Args:
        picture: the image, and its regions after each merging stage.
        num_patches, num_tokens: patch tokens before the first and after the last layer.
        milliseconds, milliseconds_unmerged: time of the vision tower for this image, the median of a few calls.
        scores, scores_unmerged: probability of each label.
    """

    picture: Image.Image
    num_patches: int
    num_tokens: int
    milliseconds: float
    milliseconds_unmerged: float
    scores: dict[str, float]
    scores_unmerged: dict[str, float]


class AppSession:
    """A model and, if there is one, an index of its embeddings. Calls from several threads take turns.

    Args:
        source: a folder or Hub id of an `MLIPModel`.
        index: a folder that `mlip embed` wrote with this model.

    Raises:
        ValueError, OSError: if the model or the index cannot be loaded, or the index is of another model.
    """

    def __init__(self, source: str, index: str | None = None):
        model, processor = load_model(source, {})
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device)
        model.set_attn_implementation("sdpa")
        self.encoder = make_encoder(source, model, processor)
        self.processor = processor
        self.saved_ratio = self.encoder.merge_ratio
        self.index = None if index is None else VectorIndex(index)
        if self.index is not None and hash_model(model) != self.index.metadata["model_hash"]:
            raise ValueError(
                f"{index} was made by {self.index.metadata['model']} (hash {self.index.metadata['model_hash']}), and "
                f"{source} is another model; embed the collection with it: mlip embed."
            )
        self._lock = threading.Lock()

    @property
    def model(self) -> MLIPModel:
        """The model."""
        return self.encoder.model

    def classify(self, image: Image.Image, labels: str, merge_ratio: float | None = None) -> dict[str, float]:
        """The probability of each label, the softmax of the similarities with the image.

        Args:
            labels: separated by commas or line breaks.
            merge_ratio: the saved one if None.

        Raises:
            ValueError: if there is no label, or the ratio is not allowed.
        """
        names = split_labels(labels)
        with self._at_ratio(self.saved_ratio if merge_ratio is None else merge_ratio):
            return self._scores(self._pixel_values(image), names)

    def search(self, words: str, image: Image.Image | None = None, top_k: int = 12) -> list[Hit]:
        """The rows of the index nearest to an image or, without one, to words.

        Raises:
            ValueError: if there is no index, or nothing to search for.
        """
        index = self.require_index()
        with self._at_ratio(index.metadata["merge_ratio"]):
            if image is None:
                return search_words(index, self.encoder, words, top_k)
            return search_image(index, self.encoder, convert_to_rgb(image), top_k)

    def require_index(self) -> VectorIndex:
        """The index.

        Raises:
            ValueError: if there is none.
        """
        if self.index is None:
            raise ValueError("There is no index to search: start mlip app with a folder that mlip embed wrote.")
        return self.index

    def inspect_merging(self, image: Image.Image, labels: str, merge_ratio: float) -> MergeReport:
        """What a merge ratio does with an image: regions, time and scores, beside those without merging.

        Raises:
            ValueError: if there is no label, or the ratio is not allowed.
        """
        names, pixel_values = split_labels(labels), self._pixel_values(image)
        with self._at_ratio(0.0):
            scores_unmerged = self._scores(pixel_values, names)
            milliseconds_unmerged = self._time(pixel_values)
        with self._at_ratio(merge_ratio):
            scores, milliseconds = self._scores(pixel_values, names), self._time(pixel_values)
            picture, num_tokens = self._draw(image)
        return MergeReport(
            picture, num_tokens[0], num_tokens[-1], milliseconds, milliseconds_unmerged, scores, scores_unmerged
        )

    @contextmanager
    def _at_ratio(self, merge_ratio: float) -> Iterator[None]:
        """Holds the model at a merge ratio; other threads wait."""
        with self._lock:
            try:
                set_merging(self.encoder, merge_ratio)
                yield
            finally:
                set_merging(self.encoder, self.saved_ratio)

    def _pixel_values(self, image: Image.Image) -> Tensor:
        return self.encoder.transform(convert_to_rgb(image))[None]

    def _scores(self, pixel_values: Tensor, names: list[str]) -> dict[str, float]:
        similarity = embed_inputs(self.encoder, {"pixel_values": pixel_values}) @ embed_captions(self.encoder, names).T
        scores = (similarity[0] * self.model.logit_scale.detach().exp()).softmax(dim=0)
        return dict(zip(names, scores.tolist(), strict=True))

    def _time(self, pixel_values: Tensor) -> float:
        """Milliseconds of the vision tower for one image."""
        milliseconds = []
        with evaluating(self.model):
            for _ in range(TIMED_CALLS):
                start = time.perf_counter()
                self.model.get_image_features(pixel_values=pixel_values.to(self.model.device)).pooler_output.cpu()
                milliseconds.append(1000 * (time.perf_counter() - start))
        return statistics.median(milliseconds)

    def _draw(self, image: Image.Image) -> tuple[Image.Image, list[int]]:
        """The picture of the regions, and the number of tokens at each layer."""
        self.model.set_attn_implementation(INSPECTION_ATTENTION)
        try:
            inspection = inspect_image(self.model, self.processor, convert_to_rgb(image))
        finally:
            self.model.set_attn_implementation("sdpa")
        stages = [
            (f"after layer {stage.layer}", stage.after.view(inspection.grid).numpy()) for stage in inspection.stages
        ]
        if not stages or inspection.num_tokens[0] == inspection.num_tokens[-1]:
            return Image.fromarray(inspection.crop), inspection.num_tokens
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "regions.png")
            draw_regions(path, inspection.crop, stages)
            with Image.open(path) as picture:
                return picture.convert("RGB"), inspection.num_tokens


def split_labels(labels: str) -> list[str]:
    """The labels of a text, separated by commas or line breaks; each once.

    Raises:
        ValueError: if there is none.
    """
    names = list(dict.fromkeys(name.strip() for name in re.split(r"[,\n]", labels or "") if name.strip()))
    if not names:
        raise ValueError("Give labels, separated by commas: a cat, a dog.")
    return names
