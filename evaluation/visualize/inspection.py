# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Runs a model on one image and a caption, and records its merging stages, token importance and word similarities."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPProcessor, PreTrainedTokenizerBase

from modeling_mlip import MLIPModel
from modeling_mlip.frequency import apply_spectral_filter
from modeling_mlip.token_merging import compose, z_score

# Letters and digits, also around a hyphen or an apostrophe; other punctuation belongs to no word.
WORD = re.compile(r"\w+(?:[-'’]\w+)*")


@dataclass(frozen=True)
class Stage:
    """A layer at which tokens may merge, of N patches.

    Args:
        before: `(N,)` int64, patch -> token at the input of the layer.
        after: `(N,)` int64, patch -> token after merging; equal to `before` where nothing merges.
        spatial: `(tokens before,)`, attention of the class token to each token, the mean over heads; of a tower without
            a class token, the mean over all tokens as queries.
        frequency: `(tokens before,)`, cos(F_i, f), the mean over the patches of a token; `None` without the frequency
            stage.
    """

    layer: int
    before: Tensor
    after: Tensor
    spatial: Tensor
    frequency: Tensor | None

    def importance(self) -> dict[str, Tensor]:
        """The maps to draw: z-scores over tokens, each `(N,)`, in which a patch has the value of its token."""
        scores = {"spatial": z_score(self.spatial[None])[0]}
        if self.frequency is not None:
            scores["frequency"] = z_score(self.frequency[None])[0]
            scores["both"] = (scores["spatial"] + scores["frequency"]) / 2
        return {name: score[self.before] for name, score in scores.items()}


@dataclass(frozen=True)
class Word:
    """A word of the caption.

    Args:
        tokens: the tokens of the word.
        similarity: `(N,)`, cosine with the image token of each patch, the mean over the word's tokens.
    """

    text: str
    tokens: list[str]
    similarity: Tensor


@dataclass(frozen=True)
class Inspection:
    """One image, and what the model computed from it.

    Args:
        crop: `(height, width, 3)` uint8, the preprocessed image without normalisation.
        grid: patches in a column and in a row, (H, W).
        num_tokens: number of patch tokens at the input of each layer, and after the last layer.
        stages: the layers at which tokens may merge, whether they merge or not.
        cosine: cosine similarity of image and caption; `None` without a caption.
        logit: the cosine times the temperature.
        words: `None` without a caption or without token-level projections.
        num_truncated: number of words of the caption that the text tower does not read completely.
    """

    crop: np.ndarray
    grid: tuple[int, int]
    num_tokens: list[int]
    stages: list[Stage]
    cosine: float | None = None
    logit: float | None = None
    words: list[Word] | None = None
    num_truncated: int = 0


@dataclass
class _Recording:
    """Intermediate values that are not in the model's output: assignments by layer, and frequency scores `(N,)`."""

    assignments: dict[int, Tensor]
    frequency: Tensor | None = None


@torch.no_grad()
def inspect_image(
    model: MLIPModel, processor: CLIPProcessor, image: Image.Image, caption: str | None = None
) -> Inspection:
    """Runs the model on one image, and on a caption if there is one.

    Args:
        model: with attention implementation "eager", the only one that returns attention weights.
        image: an RGB image.
    """
    config = model.config.vision_config
    pixel_values = processor.image_processor(images=image, return_tensors="pt")["pixel_values"].to(model.device)
    grid = (pixel_values.shape[2] // config.patch_size, pixel_values.shape[3] // config.patch_size)
    outputs: dict[str, Any] = {"output_attentions": True, "output_token_map": True}

    # Step (1): run the model
    text: dict[str, Any] = {}
    with _record(model) as recording:
        if caption is None:
            vision = model.get_image_features(pixel_values=pixel_values, **outputs)
        else:
            text = _tokenize(model, processor, caption)
            inputs = {name: text[name].to(model.device) for name in ("input_ids", "attention_mask")}
            output = model(**inputs, pixel_values=pixel_values, return_pairs=True, **outputs)
            vision = output.vision_model_output

    # Step (2): the stages
    stages, num_tokens, token_map = _stages(model, vision.attentions, recording, num_patches=grid[0] * grid[1])
    inspection = Inspection(_uncropped(pixel_values[0], processor), grid, num_tokens, stages)
    if caption is None:
        return inspection

    # Step (3): the caption
    places_of_words, num_truncated = caption_words(caption, text["offset_mapping"][0].tolist())
    words = None
    if output.pairs.tokens is not None:
        tokens = output.pairs.tokens
        similarity = (tokens.text_tokens[0] @ tokens.image_tokens[0].T).float().cpu()[:, token_map]  # (L, N)
        names = processor.tokenizer.convert_ids_to_tokens(text["input_ids"][0].tolist())
        words = [
            Word(word, [names[place] for place in places], similarity[places].mean(dim=0))
            for word, places in places_of_words
        ]
    return replace(
        inspection,
        cosine=float(output.image_embeds[0] @ output.text_embeds[0]),
        logit=float(output.logits_per_image[0, 0]),
        words=words,
        num_truncated=num_truncated,
    )


@contextmanager
def _record(model: MLIPModel) -> Iterator[_Recording]:
    """Records the merge assignments and the frequency scores of the first image during a forward pass."""
    recording = _Recording({})

    def keep_assignment(module: nn.Module, args: Any, output: tuple[Tensor | None, ...], index: int) -> None:
        if output[-1] is not None:
            recording.assignments[index] = output[-1].cpu()

    def keep_frequency(module: nn.Module, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        _, states, pooled = output
        cosine = nn.functional.cosine_similarity(states.float(), pooled.float()[:, None], dim=-1)
        recording.frequency = cosine[0].cpu()

    layers = model.vision_model.encoder.layers
    hooks = [layer.register_forward_hook(partial(keep_assignment, index=n)) for n, layer in enumerate(layers)]
    if model.vision_model.frequency is not None:
        hooks.append(model.vision_model.frequency.register_forward_hook(keep_frequency))
    try:
        yield recording
    finally:
        for hook in hooks:
            hook.remove()


def _tokenize(model: MLIPModel, processor: CLIPProcessor, caption: str) -> dict[str, Any]:
    """`input_ids` and `attention_mask` `(1, L)`, and `offset_mapping` `(1, L, 2)`."""
    tokenizer = processor.tokenizer
    text = tokenizer(
        caption,
        truncation=True,
        max_length=model.config.text_config.max_position_embeddings,
        return_offsets_mapping=tokenizer.is_fast,
        return_attention_mask=True,
        return_tensors="pt",
    )
    if not tokenizer.is_fast:
        text["offset_mapping"] = torch.tensor([offsets_by_word(tokenizer, caption, text["input_ids"].shape[1])])
    return text


def offsets_by_word(tokenizer: PreTrainedTokenizerBase, caption: str, num_tokens: int) -> list[tuple[int, int]]:
    """(start, end) in the caption for each of L tokens, of a tokenizer that does not give offsets: those of the word
    between spaces that a token belongs to; (0, 0) for the tokens after the last word.

    In sentencepiece no token crosses a space, so the tokens of a caption are those of its words.
    """
    offsets = []
    for match in re.finditer(r"\S+", caption):
        offsets += [match.span()] * len(tokenizer(match.group(), add_special_tokens=False)["input_ids"])
    offsets = offsets[: num_tokens - 1]  # the last token is EOS
    return offsets + [(0, 0)] * (num_tokens - len(offsets))


def _stages(
    model: MLIPModel, attentions: tuple[Tensor, ...], recording: _Recording, num_patches: int
) -> tuple[list[Stage], list[int], Tensor]:
    """The stages, the number of tokens at each layer and after the last, and the final token of each patch `(N,)`."""
    config = model.config.vision_config
    token_map = torch.arange(num_patches)
    stages, num_tokens = [], [num_patches]
    for index in range(len(model.vision_model.encoder.layers)):
        after = token_map
        if index in recording.assignments:
            after = compose(token_map[None], recording.assignments[index])[0]
        if index in config.resolved_merge_layers:
            attention = attentions[index][0].float().cpu().mean(dim=0)  # (K + tokens, K + tokens)
            num_prefix = config.num_prefix_tokens  # K; without prefix tokens all tokens are queries
            attention = attention[: num_prefix or None].mean(dim=0)[num_prefix:]  # (tokens,)
            scores = None if recording.frequency is None else _token_means(recording.frequency, token_map)
            stages.append(Stage(index, token_map, after, attention, scores))
        num_tokens.append(int(after.max()) + 1)
        token_map = after
    return stages, num_tokens, token_map


def _token_means(values: Tensor, token_map: Tensor) -> Tensor:
    """Values of patches `(N,)` to values of tokens `(tokens,)`: the mean over the patches of each token."""
    sizes = torch.bincount(token_map)
    return torch.zeros(len(sizes)).index_add(0, token_map, values) / sizes


def _uncropped(pixel_values: Tensor, processor: CLIPProcessor) -> np.ndarray:
    """Undoes the normalisation of the processor: `(3, height, width)` to `(height, width, 3)` uint8."""
    settings, pixels = processor.image_processor, pixel_values.float().cpu()
    if settings.do_normalize:
        mean, std = (torch.tensor(values)[:, None, None] for values in (settings.image_mean, settings.image_std))
        pixels = pixels * std + mean
    if settings.do_rescale:
        pixels = pixels / settings.rescale_factor
    return pixels.round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def caption_words(caption: str, offsets: list[list[int]]) -> tuple[list[tuple[str, list[int]]], int]:
    """The words of a caption with the places of their tokens, and the number of words that truncation has cut.

    Args:
        offsets: (start, end) of each token in `caption`, as the tokenizer returns them; (0, 0) for BOS and EOS.
    """
    words, num_truncated = [], 0
    last_end = max((end for _, end in offsets), default=0)
    for match in WORD.finditer(caption):
        places = [n for n, (start, end) in enumerate(offsets) if start < match.end() and end > match.start()]
        if places:
            words.append((match.group(), places))
        num_truncated += match.end() > last_end
    return words, num_truncated


def filter_magnitudes(model: MLIPModel) -> list[np.ndarray]:
    """|K| of each block of the frequency stage over the whole spectrum, `(H, W, channels)`, with frequency 0 at
    `[H // 2, W // 2]`.

    It is the spectrum of the filter's response to an impulse. So it shows how the filter acts, also in the two columns
    of the half spectrum that hold each frequency twice: there the transform uses the mean of one value and the
    conjugate of the other.
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
