# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""What a model makes of one image and a caption, looked on from outside: stages of merging, importance, words."""

import re
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPProcessor

from modeling_mlip import MLIPModel
from modeling_mlip.frequency import apply_spectral_filter
from modeling_mlip.token_merging import compose, z_score

# Letters and digits, also around a hyphen or an apostrophe; other punctuation belongs to no word.
WORD = re.compile(r"\w+(?:[-'’]\w+)*")


@dataclass(frozen=True)
class Stage:
    """A layer at which tokens may merge, of N patches.

    Args:
        before: `(N,)` int64, patch -> token as the layer receives them.
        after: `(N,)` int64, patch -> token once they are merged; the same where nothing merges.
        spatial: `(tokens before,)`, attention of the class token to each token, the mean over heads.
        frequency: `(tokens before,)`, cos(F_i, f), of a merged token the mean over its patches; `None` without the
            frequency stage.
    """

    layer: int
    before: Tensor
    after: Tensor
    spatial: Tensor
    frequency: Tensor | None

    def importance(self) -> dict[str, Tensor]:
        """The maps to draw, as z-scores over tokens, each `(N,)`: patches have the value of their token."""
        scores = {"spatial": z_score(self.spatial[None])[0]}
        if self.frequency is not None:
            scores["frequency"] = z_score(self.frequency[None])[0]
            scores["both"] = (scores["spatial"] + scores["frequency"]) / 2
        return {name: score[self.before] for name, score in scores.items()}


@dataclass(frozen=True)
class Word:
    """A word of the caption: its `tokens`, and its mean `similarity` `(N,)` with the image token of each patch."""

    text: str
    tokens: list[str]
    similarity: Tensor


@dataclass(frozen=True)
class Observation:
    """One image as the model sees it.

    Args:
        crop: `(height, width, 3)` uint8, the preprocessed image, un-normalised.
        grid: patches in a column and in a row, (H, W).
        num_tokens: patch tokens that the attention of each layer sees, and the number after the last layer.
        stages: where tokens may merge, whether they do or not.
        cosine: cosine similarity of image and caption; `None` without a caption.
        logit: the same, scaled by the temperature.
        words: `None` without a caption or token-level projections.
        num_truncated: words of the caption beyond what the text tower reads.
    """

    crop: np.ndarray
    grid: tuple[int, int]
    num_tokens: list[int]
    stages: list[Stage]
    cosine: float | None = None
    logit: float | None = None
    words: list[Word] | None = None
    num_truncated: int = 0


@torch.no_grad()
def observe(model: MLIPModel, processor: CLIPProcessor, image: Image.Image, caption: str | None = None) -> Observation:
    """Runs the model, whose attention must be "eager", on one image and looks on."""
    device, config = model.device, model.config.vision_config
    pixel_values = processor.image_processor(images=image, return_tensors="pt")["pixel_values"].to(device)
    grid = (pixel_values.shape[2] // config.patch_size, pixel_values.shape[3] // config.patch_size)
    asked: dict[str, Any] = {"output_attentions": True, "output_token_map": True}

    # Step (1): run it; assignments and frequency features are not in the output
    assignments: dict[int, Tensor] = {}
    frequency: list[Tensor] = []

    def keep_assignment(module: nn.Module, args: Any, output: tuple[Tensor | None, ...], index: int) -> None:
        if output[-1] is not None:
            assignments[index] = output[-1].cpu()

    def keep_frequency(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, states, pooled = output
        frequency.append(nn.functional.cosine_similarity(states.float(), pooled.float()[:, None], dim=-1)[0].cpu())

    layers = model.vision_model.encoder.layers
    hooks = [layer.register_forward_hook(partial(keep_assignment, index=n)) for n, layer in enumerate(layers)]
    if model.vision_model.frequency is not None:
        hooks.append(model.vision_model.frequency.register_forward_hook(keep_frequency))
    try:
        if caption is None:
            vision = model.get_image_features(pixel_values=pixel_values, **asked)
        else:
            text = processor.tokenizer(
                caption,
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
                return_offsets_mapping=True,
                return_tensors="pt",
            )
            offsets = text.pop("offset_mapping")[0].tolist()
            inputs = {name: text[name].to(device) for name in ("input_ids", "attention_mask")}
            output = model(**inputs, pixel_values=pixel_values, return_pairs=True, **asked)
            vision = output.vision_model_output
    finally:
        for hook in hooks:
            hook.remove()

    # Step (2): what each stage had and did
    token_map = torch.arange(grid[0] * grid[1])
    num_tokens, stages = [len(token_map)], []
    for index in range(len(layers)):
        after = compose(token_map[None], assignments[index])[0] if index in assignments else token_map
        if index in config.resolved_merge_layers:
            attention = vision.attentions[index][0].float().cpu()  # (h, 1 + tokens, 1 + tokens)
            scores = _token_means(frequency[0], token_map) if frequency else None
            stages.append(Stage(index, token_map, after, attention.mean(dim=0)[0, 1:], scores))
        num_tokens.append(int(after.max()) + 1)
        token_map = after
    seen = Observation(_uncropped(pixel_values[0], processor), grid, num_tokens, stages)
    if caption is None:
        return seen

    # Step (3): the caption
    words, num_truncated = caption_words(caption, offsets)
    aligned = None
    if output.pairs.tokens is not None:
        tokens = output.pairs.tokens
        similarity = (tokens.text_tokens[0] @ tokens.image_tokens[0].T).float().cpu()[:, token_map]  # (L, N)
        names = processor.tokenizer.convert_ids_to_tokens(text["input_ids"][0].tolist())
        aligned = [
            Word(word, [names[place] for place in places], similarity[places].mean(dim=0)) for word, places in words
        ]
    return Observation(
        seen.crop,
        grid,
        num_tokens,
        stages,
        cosine=float(output.image_embeds[0] @ output.text_embeds[0]),
        logit=float(output.logits_per_image[0, 0]),
        words=aligned,
        num_truncated=num_truncated,
    )


def _token_means(values: Tensor, token_map: Tensor) -> Tensor:
    """`(N,)` of patches to `(tokens,)`, each the mean over its patches."""
    sizes = torch.bincount(token_map)
    return torch.zeros(len(sizes)).index_add(0, token_map, values) / sizes


def _uncropped(pixel_values: Tensor, processor: CLIPProcessor) -> np.ndarray:
    """`(3, height, width)` as the processor gives it to `(height, width, 3)` uint8."""
    settings, pixels = processor.image_processor, pixel_values.float().cpu()
    if settings.do_normalize:
        mean, std = (torch.tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
        pixels = pixels * std + mean
    if settings.do_rescale:
        pixels = pixels / settings.rescale_factor
    return pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def caption_words(caption: str, offsets: list[list[int]]) -> tuple[list[tuple[str, list[int]]], int]:
    """The words of a caption with the places of their tokens, and how many words have lost some to truncation.

    Args:
        offsets: (start, end) in `caption` of each token, as the tokenizer tells; (0, 0) for BOS and EOS.
    """
    words, num_truncated = [], 0
    read = max((end for _, end in offsets), default=0)
    for found in WORD.finditer(caption):
        places = [n for n, (start, end) in enumerate(offsets) if start < found.end() and end > found.start()]
        if places:
            words.append((found.group(), places))
        num_truncated += found.end() > read
    return words, num_truncated


def filter_magnitudes(model: MLIPModel) -> list[np.ndarray]:
    """|K| of each block of the frequency stage over the whole spectrum, `(H, W, channels)`, frequency 0 at
    `[H // 2, W // 2]`.

    It is read off at what the filter makes of one bright patch. So it is what the filter does, also at the two columns
    where a half spectrum holds each frequency twice and the transform takes the mean of one and the conjugate other.
    """
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    magnitudes = []
    for block in model.vision_model.frequency.layers:
        spectral_filter = block.spectral_filter.detach().double().cpu()
        impulse = torch.zeros(1, side, side, spectral_filter.shape[2], dtype=torch.float64)
        impulse[:, 0, 0] = 1
        spectrum = torch.fft.fft2(apply_spectral_filter(impulse, spectral_filter)[0], dim=(0, 1))
        magnitudes.append(torch.fft.fftshift(spectrum.abs(), dim=(0, 1)).numpy())
    return magnitudes
