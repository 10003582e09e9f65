# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Merging by the code of ToMe's and PiToMe's authors, inside the tower of this package.

The code is imported from clones of their repositories, which this project does not contain (CC BY-NC 4.0):

    git clone https://github.com/facebookresearch/ToMe && git clone https://github.com/hchautran/PiToMe

Their matching replaces the matching of a layer. Layers, numbers of tokens and attention stay those of the tower.
"""

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from modeling_mlip import MLIPVisionModel

# Merges `(B, 1 + N, C)` to `(B, 1 + M, C)`; made by the original code.
Merge = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class OriginalMatching:
    """The matching of an original.

    Args:
        match: `(keys, states, layer, num_layers, num_removed)` -> `Merge`. Keys `(B, 1 + N, d)` are means over heads,
            states `(B, 1 + N, D)` follow the attention. The class token comes first.
        merge_source: the original's function of this name, which tracks the patches of each token.
        uses_sizes: whether attention counts a merged token as the patches that it replaces.
    """

    match: Callable[[torch.Tensor, torch.Tensor, int, int, int], Merge]
    merge_source: Callable[..., torch.Tensor]
    uses_sizes: bool = True


def import_merge_file(folder: str | Path, file: str, names: tuple[str, ...]) -> ModuleType:
    """The module of one source file of a clone, without the rest of its package.

    Raises:
        OSError: if the folder does not contain the file.
        ValueError: if the file does not define one of `names`.
    """
    path = Path(folder) / file
    if not path.is_file():
        raise OSError(f"{folder} does not contain {file}; give the folder of the cloned repository.")
    spec = importlib.util.spec_from_file_location(path.parent.name + "_merge", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    missing = [name for name in names if not hasattr(module, name)]
    if missing:
        raise ValueError(f"{path} does not define {', '.join(missing)}; give a clone of the original repository.")
    return module


def tome_matchings(folder: str | Path) -> dict[str, OriginalMatching]:
    """ToMe as in its `tome/patch/timm.py` at commit af95e4b: bipartite matching of keys, proportional attention."""
    code = import_merge_file(folder, "tome/merge.py", ("bipartite_soft_matching", "merge_source"))

    def match(keys: torch.Tensor, states: torch.Tensor, layer: int, num_layers: int, num_removed: int) -> Merge:
        return code.bipartite_soft_matching(keys, num_removed, class_token=True)[0]

    return {"tome (own code)": OriginalMatching(match, code.merge_source)}


def pitome_matchings(folder: str | Path) -> dict[str, OriginalMatching]:
    """PiToMe as in two of its patches at commit 550b5de, with their margins and `alpha` 1.

    `algo/pitome/patch/deit.py` compares keys; its margin falls from 0.75 in the first layer towards 0, and the first
    half of the layers matches by `pitome_bsm`. `algo/pitome/patch/clip.py` compares states; its margin falls from 0.95.
    Both leave the sizes out of the attention. A third matching adds them to the first.
    """
    code = import_merge_file(folder, "algo/pitome/merge.py", ("pitome_vision", "merge_source"))

    def match(
        metric: torch.Tensor, margin: float, layer: int, num_layers: int, num_removed: int, **flags: Any
    ) -> Merge:
        num_tokens = metric.shape[1] - 1
        ratio = 1 - (num_removed + 0.5) / num_tokens  # `pitome_vision` rounds down
        margin -= margin * layer / num_layers
        return code.pitome_vision(metric, ratio=ratio, margin=margin, class_token=True, **flags)

    def match_keys(keys: torch.Tensor, states: torch.Tensor, layer: int, num_layers: int, num_removed: int) -> Merge:
        return match(keys, 0.75, layer, num_layers, num_removed, use_bsm_pitome=layer < (num_layers + 1) // 2)

    def match_states(keys: torch.Tensor, states: torch.Tensor, layer: int, num_layers: int, num_removed: int) -> Merge:
        return match(states, 0.95, layer, num_layers, num_removed)

    return {
        "pitome (own code)": OriginalMatching(match_keys, code.merge_source, uses_sizes=False),
        "pitome (own code), sizes": OriginalMatching(match_keys, code.merge_source),
        "pitome (own code), CLIP": OriginalMatching(match_states, code.merge_source, uses_sizes=False),
        "pitome (own code), CLIP, sizes": OriginalMatching(match_states, code.merge_source),
    }


@contextmanager
def merging_by(tower: MLIPVisionModel, matching: OriginalMatching) -> Iterator[None]:
    """Within this context, `matching` chooses the tokens that `tower` merges."""
    layers, method = tower.encoder.layers, tower.config.merge_method
    tower.config.merge_method = "tome"  # which gives the matching the keys
    hooks = []
    for n, layer in enumerate(layers):
        layer._match = partial(_match_by_original, matching, n, len(layers))
        if not matching.uses_sizes:
            hooks.append(layer.self_attn.register_forward_pre_hook(_without_mask, with_kwargs=True))
    try:
        yield
    finally:
        tower.config.merge_method = method
        for layer in layers:
            del layer._match
        for hook in hooks:
            hook.remove()


def merge_product_flops(tower: MLIPVisionModel, num_patches: int) -> int:
    """FLOPs of the matrix products by which `tower` averages tokens; the originals index instead."""
    flops = 0
    for num_removed in tower.encoder.tokens_removed(num_patches):
        if num_removed > 0:
            flops += 2 * num_patches * (num_patches - num_removed) * tower.config.hidden_size
            num_patches -= num_removed
    return flops


def _match_by_original(
    matching: OriginalMatching,
    layer: int,
    num_layers: int,
    patches: torch.Tensor,
    guide: tuple[torch.Tensor, torch.Tensor],
    frequency_states: torch.Tensor | None,
    frequency_importance: torch.Tensor | None,
    sizes: torch.Tensor,
    num_removed: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`MLIPVisionLayer._match` with an original matching.

    Raises:
        ValueError: if more than half of the tokens are to be removed.
    """
    num_patches = patches.shape[1]
    if 2 * num_removed > num_patches:
        raise ValueError(
            f"The original code cannot remove {num_removed} of {num_patches} tokens in one layer: at most half; "
            "choose a lower ratio or more layers."
        )
    # The originals never compare the class token, so its place can hold ones.
    keys, states = (torch.nn.functional.pad(tokens, (0, 0, 1, 0), value=1.0) for tokens in (guide[0], patches.float()))
    merge = matching.match(keys, states, layer, num_layers, num_removed)
    sources = matching.merge_source(merge, states)  # (B, 1 + M, 1 + N), 1 where an old token became part of a new one
    return sources[:, 1:, 1:].argmax(dim=1), sizes


def _without_mask(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    return args, {**kwargs, "attention_mask": None}
