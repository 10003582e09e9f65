# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""MLIP (arXiv 2406.01460) as a Transformers model: CLIP with a frequency stage, token merging and three losses.

The mathematics is in `frequency.py`, `token_merging.py` and `losses.py`; the modules here call it. Parameter names
follow transformers' CLIP, so that CLIP weights load by name. With the frequency gate at zero and `merge_ratio=0` the
model computes the same embeddings as CLIP.

Axes: B images, N patches, M patch tokens after merging, K prefix tokens (the class token: 1 or 0), D hidden size, F
hidden size of the frequency stage, P width of the shared embedding space, T captions, L caption tokens, h attention
heads, d width of a head.
"""

import copy
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import (
    CLIPMLP,
    CLIPAttention,
    CLIPEncoder,
    CLIPEncoderLayer,
    CLIPPreTrainedModel,
    CLIPTextEmbeddings,
    CLIPTextModelOutput,
    CLIPVisionEmbeddings,
    eager_attention_forward,
)
from transformers.models.m2m_100.modeling_m2m_100 import M2M100Encoder
from transformers.models.roberta.modeling_roberta import RobertaModel
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.models.xlm_roberta.modeling_xlm_roberta import XLMRobertaModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, maybe_autocast, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_mlip import MLIPConfig, MLIPTextConfig, MLIPVisionConfig
from .frequency import apply_spectral_filter, half_spectrum_shape, log_amplitude, resize_spectral_filter
from .losses import (
    MAX_LOGIT_SCALE,
    PairColumns,
    PairEmbeddings,
    caption_keys,
    multi_level_loss,
    to_device,
)
from .rotary import patch_positions, rotate, rotation_of
from .token_merging import (
    assignment_matrix,
    compose,
    fuse_least_important,
    joint_similarity_features,
    match_tokens,
    match_tokens_by_cost,
    merge_matrix,
    merge_schedule,
    merge_sizes,
    merge_tokens,
    z_score,
)
from .token_similarity import TokenEmbeddings

# Hidden size of the MLP of a frequency block, relative to the hidden size of the block.
FREQUENCY_MLP_RATIO = 2
# Maximum fraction of tokens removed per matching round. At ToMe's fraction, one half, every second token has to merge,
# even if no other token is similar to it. Recall@1 in single runs: 57.9 at 1/2, 61.0 at 1/4 (docs/results.md).
MAX_SHARE_PER_ROUND = 0.25
# Rounds of matching in each merging layer for `merge_method="ward"` (benchmarks/results/training_free_merging.json).
WARD_ROUNDS = 4


# Outputs


@dataclass
class MLIPVisionOutput(BaseModelOutputWithPooling):
    r"""Output of the vision tower.

    Args:
        last_hidden_state: `(B, K + M, D)`, the prefix tokens and the merged patch tokens, before the post-LayerNorm.
        pooler_output: `(B, D)` from the tower, `(B, P)` from `get_image_features`.
        frequency_hidden_state: `(B, M, F)`, frequency features of the merged tokens; `None` without a frequency stage.
        frequency_pooler_output: `(B, F)`, pooled over all patches before merging.
        token_sizes: `(B, M)` float32, the number of patches that each token replaces.
        token_map: `(B, N)` int64, the index of the token that each patch became part of, or -1 if `patch_dropout`
            dropped the patch in training; only with `output_token_map=True`.
        hidden_states: a tuple of layers + 1 tensors `(B, K + tokens, D)`; the number of tokens falls with merging.
        attentions: a tuple with one tensor `(B, h, K + tokens, K + tokens)` for each layer, with the number of tokens
            at the input of the layer.
    """

    frequency_hidden_state: torch.Tensor | None = None
    frequency_pooler_output: torch.Tensor | None = None
    token_sizes: torch.Tensor | None = None
    token_map: torch.Tensor | None = None


@dataclass
class MLIPVisionModelOutput(ModelOutput):
    r"""Output of `MLIPVisionModelWithProjection`.

    Args:
        image_embeds: `(B, P)`, not normalised.
        last_hidden_state: as in `MLIPVisionOutput`, like the fields that follow.
    """

    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    token_sizes: torch.Tensor | None = None
    token_map: torch.Tensor | None = None


@dataclass
class MLIPOutput(ModelOutput):
    r"""Output of `MLIPModel`.

    Args:
        loss: scalar, the weighted sum of the three losses below; only with `return_loss=True`.
        spatial_loss: scalar, InfoNCE or the sigmoid loss between spatial and text embeddings.
        frequency_loss: scalar, the same between frequency and text embeddings.
        token_loss: scalar, InfoNCE over token-level scores.
        logits_per_image: `(B, T)`, cosine similarities times exp(`logit_scale`), plus `logit_bias` with the sigmoid
            loss.
        logits_per_text: `(T, B)`, the transpose of `logits_per_image`.
        text_embeds: `(T, P)`, normalised.
        image_embeds: `(B, P)`, normalised: the spatial embedding plus `frequency_embed_weight` times the frequency
            embedding.
        frequency_embeds: `(B, P)`, normalised; `None` without a frequency loss.
        pairs: `losses.PairEmbeddings`, the inputs of the losses; only with `return_pairs=True`.
        text_model_output: output of the text tower.
        vision_model_output: output of the vision tower.
    """

    loss: torch.Tensor | None = None
    spatial_loss: torch.Tensor | None = None
    frequency_loss: torch.Tensor | None = None
    token_loss: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None
    logits_per_text: torch.Tensor | None = None
    text_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    frequency_embeds: torch.Tensor | None = None
    pairs: PairEmbeddings | None = None
    text_model_output: BaseModelOutputWithPooling | None = None
    vision_model_output: MLIPVisionOutput | None = None

    def to_tuple(self) -> tuple[Any]:
        return tuple(value.to_tuple() if isinstance(value, ModelOutput) else value for value in self.values())


# Frequency stage


class MLIPFrequencyBlock(nn.Module):
    """F <- F + irfft2(K * rfft2(LN(F))), F <- F + MLP(LN(F))."""

    def __init__(self, config: MLIPVisionConfig):
        super().__init__()
        size, side = config.frequency_hidden_size, config.image_size // config.patch_size
        self.config = config
        self.layer_norm1 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        # K as pairs of real and imaginary part, because `.half()` does not convert complex parameters.
        self.spectral_filter = nn.Parameter(torch.empty(*half_spectrum_shape(side, side), size, 2))
        self.layer_norm2 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(size, FREQUENCY_MLP_RATIO * size)
        self.activation_fn = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(FREQUENCY_MLP_RATIO * size, size)

    def forward(self, states: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        side = self.config.image_size // self.config.patch_size
        spectral_filter = resize_spectral_filter(self.spectral_filter, grid, width=side)
        patches = self.layer_norm1(states).unflatten(1, grid)  # (B, N, F) -> (B, H, W, F)
        states = states + apply_spectral_filter(patches, spectral_filter).flatten(1, 2)
        return states + self.fc2(self.activation_fn(self.fc1(self.layer_norm2(states))))


class MLIPFrequencyStage(nn.Module):
    """Computes frequency features of every patch, and adds them to the patch embeddings through a learned gate.

    The input is the normalised log-amplitude spectrum of each patch. It says which frequencies a patch contains, but
    not where in the patch, and not how strong they are overall. The gate starts at zero, so the stage changes no
    embedding before training.
    """

    def __init__(self, config: MLIPVisionConfig):
        super().__init__()
        self.config = config
        size = config.frequency_hidden_size
        num_amplitudes = config.num_channels * math.prod(half_spectrum_shape(config.patch_size, config.patch_size))
        self.input_projection = nn.Linear(num_amplitudes, size)
        self.layers = nn.ModuleList([MLIPFrequencyBlock(config) for _ in range(config.frequency_layers)])
        self.layer_norm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.query = nn.Parameter(torch.empty(size))
        self.output_projection = nn.Linear(size, config.hidden_size)
        self.gate = nn.Parameter(torch.empty(config.hidden_size))

    def forward(
        self, pixel_values: torch.Tensor, grid: tuple[int, int]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(B, 3, height, width)` -> the summand for the patch embeddings `(B, N, D)`, the frequency features
        `(B, N, F)` and their attention-weighted mean `(B, F)`."""
        pixel_values = pixel_values.to(self.gate.dtype)  # quantisation leaves the dtype of the gate alone
        amplitude = log_amplitude(pixel_values, self.config.patch_size)
        states = self.input_projection(nn.functional.layer_norm(amplitude, amplitude.shape[-1:]))
        for layer in self.layers:
            states = layer(states, grid)
        states = self.layer_norm(states)
        weights = (states @ self.query * states.shape[-1] ** -0.5).softmax(dim=-1)  # (B, N)
        pooled = (weights[:, None, :] @ states)[:, 0]  # (B, 1, N) @ (B, N, F) -> (B, F)
        return self.gate * self.output_projection(states), states, pooled


# Patch embedding


class MLIPStemLayer(nn.Module):
    """A convolution whose kernels do not overlap, with BatchNorm and an activation if it is not the last one."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, hidden_act: str, is_last: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=stride, stride=stride, bias=is_last)
        self.norm = nn.Identity() if is_last else nn.BatchNorm2d(out_channels)
        self.activation_fn = nn.Identity() if is_last else ACT2FN[hidden_act]

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.activation_fn(self.norm(self.conv(pixels)))


class MLIPConvStem(nn.Sequential):
    """The patch embedding of MobileCLIP-B: `(B, 3, height, width)` -> `(B, D, H, W)`, each patch by itself.

    Source: `vit_base_mci_224` of timm 1.0.
    """

    def __init__(self, config: MLIPVisionConfig):
        quarter, strides = config.hidden_size // 4, (4, 2, config.patch_size // 8)
        channels = (config.num_channels, quarter, quarter, config.hidden_size)
        super().__init__(
            *(
                MLIPStemLayer(channels[index], channels[index + 1], strides[index], config.hidden_act, index == 2)
                for index in range(3)
            )
        )

    @property
    def weight(self) -> torch.Tensor:
        """The weight of the last convolution, whose dtype the embeddings read."""
        last: Any = self[-1]
        return last.conv.weight


class MLIPStemVisionEmbeddings(SiglipVisionEmbeddings):
    """The embeddings of MobileCLIP-B: `MLIPConvStem`, position embeddings of the patches, and a class token."""

    def __init__(self, config: MLIPVisionConfig):
        super().__init__(config)
        self.patch_embedding = MLIPConvStem(config)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = False) -> torch.Tensor:
        patches = super().forward(pixel_values, interpolate_pos_encoding)
        return torch.cat([self.class_embedding.expand(patches.shape[0], 1, -1), patches], dim=1)


# Encoder layers


def split_prefix(states: torch.Tensor, num_prefix_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`(B, K + M, C)` -> the K prefix tokens `(B, K, C)` and the M patch tokens `(B, M, C)`."""
    return states[:, :num_prefix_tokens], states[:, num_prefix_tokens:]


def select_tokens(tokens: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """`(B, N, C)` and `(B, M)` int64 -> `(B, M, C)`, the tokens with these indices."""
    return tokens.gather(1, indices[..., None].expand(-1, -1, tokens.shape[-1]))


def select_queries(states: torch.Tensor, num_prefix_tokens: int) -> torch.Tensor:
    """`(B, K + M, D)` -> `(B, Q, D)`, the tokens whose attention says which patch tokens are important: the prefix
    tokens, or all tokens of a tower without prefix tokens."""
    return states[:, :num_prefix_tokens] if num_prefix_tokens > 0 else states


def scale_branch(branch: torch.Tensor, layer_scale: torch.Tensor | None) -> torch.Tensor:
    return branch if layer_scale is None else branch * layer_scale


def sub_layernorm_of(config: MLIPVisionConfig, size: int) -> nn.LayerNorm | nn.Identity:
    """The LayerNorm before an output projection; no operation without `use_sub_layernorm`."""
    return nn.LayerNorm(size, eps=config.layer_norm_eps) if config.use_sub_layernorm else nn.Identity()


def layer_scale_parameter(config: MLIPTextConfig | MLIPVisionConfig) -> nn.Parameter | None:
    return None if config.layer_scale_init_value is None else nn.Parameter(torch.empty(config.hidden_size))


class MLIPTextLayer(CLIPEncoderLayer):
    """CLIP's encoder layer, with LayerScale if `layer_scale_init_value` is set."""

    def __init__(self, config: MLIPTextConfig):
        super().__init__(config)
        self.layer_scale1 = layer_scale_parameter(config)
        self.layer_scale2 = layer_scale_parameter(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        branch, _ = self.self_attn(self.layer_norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        hidden_states = hidden_states + scale_branch(branch, self.layer_scale1)
        branch = self.mlp(self.layer_norm2(hidden_states))
        return hidden_states + scale_branch(branch, self.layer_scale2)


def uses_importance(config: MLIPVisionConfig) -> bool:
    """Whether the importance of tokens decides which ones `merge_method="mlip"` merges."""
    return config.merge_method == "mlip" and config.merge_importance_weight > 0


def takes_bias(config: MLIPVisionConfig) -> bool:
    """Whether the attention implementation of the tower adds a bias to its logits."""
    return not any(name in config._attn_implementation for name in ("flash", "flex"))


def add_size_channel(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, size_bias: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Moves the bias of the attention logits into one more channel, for kernels that take no bias.

    The channel is 1/scale in every query and the bias in every key, so that `scale` times their product is the bias.
    Zeros fill all heads up to a width that is divisible by 8, which the kernels need.

    Args:
        queries: `(B, h, S, d)`, like `keys` and `values`.
        size_bias: `(B, 1, 1, S)`, see `log_size_bias`.
        scale: factor of the attention logits.

    Returns:
        Queries, keys and values `(B, h, S, d')`; the output of attention is in its first d channels.
    """
    width = queries.shape[-1]
    num_zeros = -(width + 1) % 8
    bias_channel = size_bias.to(keys.dtype).transpose(2, 3).expand(-1, keys.shape[1], -1, -1)  # (B, h, S, 1)
    queries = nn.functional.pad(nn.functional.pad(queries, (0, 1), value=1 / scale), (0, num_zeros))
    keys = nn.functional.pad(torch.cat([keys, bias_channel], dim=-1), (0, num_zeros))
    return queries, keys, nn.functional.pad(values, (0, 1 + num_zeros))


class MLIPVisionAttention(CLIPAttention):
    """CLIP's attention, which also computes the guide of token merging on request.

    It has rotary positions, a LayerNorm before the output projection and no bias of the keys if configured.
    """

    def __init__(self, config: MLIPVisionConfig):
        super().__init__(config)
        if not config.use_key_bias:
            self.k_proj = nn.Linear(self.embed_dim, self.embed_dim, bias=False)
        self.layer_norm = sub_layernorm_of(config, self.embed_dim)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        guide_states: torch.Tensor | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[torch.Tensor, torch.Tensor | None] | None]:
        """Attends, and computes what token merging is guided by if `guide_states` are given.

        Args:
            hidden_states: `(B, S, D)` with S = K + M.
            attention_mask: `(B, 1, 1, S)`, added to the attention logits.
            guide_states: `(B, Q, D)`, normalised states whose queries rank the patch tokens; those of the first Q
                tokens.
            rotation: of queries and keys, see `rotary.rotation_of`; `None` without rotary positions.

        Returns:
            The output `(B, S, D)`, the attention weights `(B, h, S, S)` or `None` if the backend does not return them,
            and the guide or `None`. The guide holds the keys before rotation `(B, M, d)`, averaged over heads, and the
            attention that each patch token receives from `guide_states` `(B, M)`, averaged over heads and queries;
            each is `None` if the merging does not use it. It is computed in float32 outside the attention backend, so
            that every backend merges the same tokens.
        """
        B, S, _ = hidden_states.shape
        heads = (B, S, self.num_heads, self.head_dim)
        queries = self.q_proj(hidden_states).view(heads).transpose(1, 2)  # (B, h, S, d)
        keys = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        values = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        content_keys = keys
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        inputs = (queries, keys, values, attention_mask)
        if attention_mask is not None and not takes_bias(self.config):
            inputs = (*add_size_channel(queries, keys, values, attention_mask, self.scale), None)
        attn_output, attn_weights = attend(
            self, *inputs, scaling=self.scale, dropout=self.dropout if self.training else 0.0, **kwargs
        )
        attn_output = attn_output[..., : self.head_dim]  # (B, S, h, d), without the channels that were added
        attn_output = self.out_proj(self.layer_norm(attn_output.reshape(B, S, -1)))
        guide = None
        if guide_states is not None:
            guide = self._guide(guide_states, content_keys, keys, attention_mask, rotation)
        return attn_output, attn_weights, guide

    @torch.no_grad()
    def _guide(
        self,
        guide_states: torch.Tensor,
        content_keys: torch.Tensor,
        keys: torch.Tensor,
        attention_mask: torch.Tensor | None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        num_prefix, patch_keys = self.config.num_prefix_tokens, None
        if self.config.merge_method in ("mlip", "tome"):
            _, patch_keys = split_prefix(content_keys.mean(dim=1, dtype=torch.float32), num_prefix)
        if self.config.merge_method != "elip" and not uses_importance(self.config):
            return patch_keys, None
        queries = self.q_proj(guide_states.detach()).unflatten(2, (self.num_heads, self.head_dim)).transpose(1, 2)
        if rotation is not None:
            cos, sin = rotation
            queries = rotate(queries, (cos[:, :, : queries.shape[2]], sin[:, :, : queries.shape[2]]))
        with maybe_autocast(keys.device.type, enabled=False):
            queries, keys = queries.float(), keys.float()  # (B, h, Q, d), (B, h, S, d)
            scores = queries @ keys.transpose(2, 3) * self.scale  # (B, h, Q, S)
            if attention_mask is not None:
                scores = scores + attention_mask[:, :, :1].float()
            attention = scores.softmax(dim=-1).mean(dim=1)  # (B, Q, S)
            _, patch_attention = split_prefix(attention.mean(dim=1), num_prefix)
            return patch_keys, patch_attention


class MLIPVisionMLP(nn.Module):
    """CLIP's MLP, with a gate (SwiGLU) and a LayerNorm before the output projection, each if configured.

    Source: `SwiGLU` and `Mlp` of timm 1.0.
    """

    def __init__(self, config: MLIPVisionConfig):
        super().__init__()
        size, intermediate_size = config.hidden_size, config.intermediate_size
        self.config = config
        self.activation_fn = ACT2FN[config.hidden_act]
        self.gate_proj = nn.Linear(size, intermediate_size) if config.use_gated_mlp else None
        self.fc1 = nn.Linear(size, intermediate_size)
        self.layer_norm = sub_layernorm_of(config, intermediate_size)
        self.fc2 = nn.Linear(intermediate_size, size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        states = self.fc1(hidden_states)
        if self.gate_proj is not None:
            states = self.activation_fn(self.gate_proj(hidden_states)) * states
        else:
            states = self.activation_fn(states)
        return self.fc2(self.layer_norm(states))


class MLIPVisionLayer(CLIPEncoderLayer):
    """CLIP's encoder layer, with token merging between attention and MLP.

    It has LayerScale, LayerNorms after attention and MLP, and `MLIPVisionMLP` if configured.
    """

    def __init__(self, config: MLIPVisionConfig):
        super().__init__(config)
        self.config = config
        self.self_attn = MLIPVisionAttention(config)
        if config.use_gated_mlp or config.use_sub_layernorm:
            self.mlp = MLIPVisionMLP(config)
        self.layer_scale1 = layer_scale_parameter(config)
        self.layer_scale2 = layer_scale_parameter(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None,
        frequency_states: torch.Tensor | None,
        frequency_importance: torch.Tensor | None,
        sizes: torch.Tensor,
        num_removed: int = 0,
        caption_states: torch.Tensor | None = None,
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor | None, ...]:
        """Attention, then token merging if `num_removed > 0`, then the MLP.

        Args:
            hidden_states: `(B, K + N, D)`.
            attention_mask: `(B, 1, 1, K + N)`, see `log_size_bias`; `None` before the first merge.
            frequency_states: `(B, N, F)`, or `None` without a frequency stage.
            frequency_importance: `(B, N)`, or `None` without a frequency stage or without weight in the merging.
            sizes: `(B, N)` float32, the number of patches that each token replaces.
            num_removed: number of patch tokens to remove.
            caption_states: `(B, D)`, mixed into the guide by `merge_method="elip"`.
            rotation: of the queries and keys, see `rotary.rotation_of`.

        Returns:
            `hidden_states`, `frequency_states`, `frequency_importance` and `sizes` with M = N - num_removed patch
            tokens, and the assignment `(B, N)` of the merge, or `None` if nothing merged.
        """
        is_post_norm = self.config.use_residual_post_norm
        attention_inputs = hidden_states if is_post_norm else self.layer_norm1(hidden_states)
        guide_states = None
        if num_removed > 0:
            guide_states = self._guide_states(hidden_states, attention_inputs, caption_states)
        branch, _, guide = self.self_attn(
            attention_inputs, attention_mask=attention_mask, guide_states=guide_states, rotation=rotation, **kwargs
        )
        branch = self.layer_norm1(branch) if is_post_norm else branch
        hidden_states = hidden_states + scale_branch(branch, self.layer_scale1)
        assignment = None
        if guide is not None:
            num_new = sizes.shape[1] - num_removed
            with maybe_autocast(hidden_states.device.type, enabled=False):  # keeps sizes and residuals in float32
                prefix, patches = split_prefix(hidden_states, self.config.num_prefix_tokens)
                assignment, weights = self._match(
                    patches, guide, frequency_states, frequency_importance, sizes, num_removed
                )
                matrix, totals = merge_matrix(assignment, weights, num_new)
                hidden_states = torch.cat([prefix, merge_tokens(patches, matrix)], dim=1)
                if frequency_states is not None:
                    frequency_states = merge_tokens(frequency_states, matrix)
                if frequency_importance is not None:
                    frequency_importance = merge_tokens(frequency_importance[..., None], matrix)[..., 0]
                sizes = totals if weights is sizes else merge_sizes(sizes, assignment, num_new)
        if is_post_norm:
            branch = self.layer_norm2(self.mlp(hidden_states))
        else:
            branch = self.mlp(self.layer_norm2(hidden_states))
        hidden_states = hidden_states + scale_branch(branch, self.layer_scale2)
        return hidden_states, frequency_states, frequency_importance, sizes, assignment

    @torch.no_grad()
    def _guide_states(
        self, hidden_states: torch.Tensor, attention_inputs: torch.Tensor, caption_states: torch.Tensor | None
    ) -> torch.Tensor:
        """`(B, Q, D)`: the states whose attention ranks the patch tokens; ELIP mixes the caption into them."""
        if self.config.merge_method != "elip" or caption_states is None:
            return select_queries(attention_inputs, self.config.num_prefix_tokens)
        states = select_queries(hidden_states, self.config.num_prefix_tokens)
        length = states.norm(dim=-1, keepdim=True)
        caption = nn.functional.normalize(caption_states[:, None], dim=-1).to(states.dtype) * length
        states = torch.lerp(states, caption, self.config.merge_caption_weight)
        return states if self.config.use_residual_post_norm else self.layer_norm1(states)

    @torch.no_grad()
    def _match(
        self,
        patches: torch.Tensor,
        guide: tuple[torch.Tensor | None, torch.Tensor | None],
        frequency_states: torch.Tensor | None,
        frequency_importance: torch.Tensor | None,
        sizes: torch.Tensor,
        num_removed: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The assignment `(B, N)`, and the weight `(B, N)` of each token in the mean of its merged token."""
        keys, patch_attention = guide
        if self.config.merge_method == "ward":
            features = joint_similarity_features(patches.float())
            return match_tokens_by_cost(features, sizes, num_removed, WARD_ROUNDS), sizes
        if self.config.merge_method == "elip":
            weights = patch_attention.clamp(min=torch.finfo(torch.float16).tiny)
            return fuse_least_important(patch_attention, num_removed), weights
        if self.config.merge_method == "tome":
            return match_tokens(joint_similarity_features(keys), None, num_removed), sizes
        domains, importance = [keys], None
        if frequency_states is not None:
            domains.append(frequency_states.float())
        if patch_attention is not None:
            importance = z_score(patch_attention)
            if frequency_importance is not None:
                importance = (importance + z_score(frequency_importance)) / 2
            importance = self.config.merge_importance_weight * importance
        return match_tokens(joint_similarity_features(*domains), importance, num_removed, MAX_SHARE_PER_ROUND), sizes


# Encoders


class MLIPTextClassEmbeddings(CLIPTextEmbeddings):
    """CLIP's text embeddings, with a learned class token after the caption, at a position of its own (CoCa)."""

    def __init__(self, config: MLIPTextConfig):
        longer = copy.copy(config)
        longer.max_position_embeddings += 1
        super().__init__(longer)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None) -> torch.Tensor:
        """`(T, L)` -> `(T, L + 1, D)`."""
        class_states = self.class_embedding.expand(input_ids.shape[0], 1, -1)
        inputs_embeds = torch.cat([self.token_embedding(input_ids), class_states], dim=1)
        return super().forward(inputs_embeds=inputs_embeds, position_ids=position_ids)


class MLIPTextEncoder(CLIPEncoder):
    """CLIP's encoder with layers of `MLIPTextLayer`."""

    def __init__(self, config: MLIPTextConfig):
        nn.Module.__init__(self)
        self.config = config
        self.layers = nn.ModuleList([MLIPTextLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False


class MLIPVisionEncoder(nn.Module):
    """Layers of `MLIPVisionLayer`; passes sizes, frequency features and the token map from layer to layer."""

    def __init__(self, config: MLIPVisionConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList([MLIPVisionLayer(config) for _ in range(config.num_hidden_layers)])
        self.gradient_checkpointing = False

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        frequency_states: torch.Tensor | None,
        frequency_importance: torch.Tensor | None,
        output_token_map: bool = False,
        caption_states: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MLIPVisionOutput:
        B, N = inputs_embeds.shape[0], inputs_embeds.shape[1] - self.config.num_prefix_tokens
        hidden_states = inputs_embeds
        sizes = torch.ones(B, N, device=hidden_states.device, dtype=torch.float32)
        token_map = torch.arange(N, device=hidden_states.device).expand(B, N) if output_token_map else None
        attention_mask = None
        rotation = self._rotation_of(positions)
        for layer, num_removed in zip(self.layers, self.tokens_removed(N), strict=True):
            sizes_before = sizes
            hidden_states, frequency_states, frequency_importance, sizes, assignment = layer(
                hidden_states,
                attention_mask,
                frequency_states,
                frequency_importance,
                sizes,
                num_removed,
                caption_states,
                rotation,
                **kwargs,
            )
            if assignment is not None:
                if positions is not None:
                    positions = self._merge_positions(positions, assignment, sizes_before, sizes.shape[1])
                    rotation = self._rotation_of(positions)
                attention_mask = log_size_bias(sizes, self.config.num_prefix_tokens, hidden_states.dtype)
                token_map = compose(token_map.to(assignment.device), assignment) if output_token_map else None
        return MLIPVisionOutput(
            last_hidden_state=hidden_states,
            frequency_hidden_state=frequency_states,
            token_sizes=sizes,
            token_map=token_map,
        )

    def _rotation_of(self, positions: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The rotation of queries and keys at `positions` `(B, N, 2)`; `None` without rotary positions."""
        if positions is None:
            return None
        width = self.config.hidden_size // self.config.num_attention_heads
        return rotation_of(positions, self.config.num_prefix_tokens, width)

    @torch.no_grad()
    def _merge_positions(
        self, positions: torch.Tensor, assignment: torch.Tensor, sizes: torch.Tensor, num_new: int
    ) -> torch.Tensor:
        """`(B, N, 2)` -> `(B, M, 2)`: the positions of merged tokens, by `rotary_merged_position`.

        Args:
            assignment: `(B, N)`, on any device.
            sizes: `(B, N)`, the sizes before the merge.
            num_new: M.
        """
        positions, sizes = positions.to(assignment.device), sizes.to(assignment.device)
        if self.config.rotary_merged_position == "mean":
            with maybe_autocast(assignment.device.type, enabled=False):
                matrix, _ = merge_matrix(assignment, sizes, num_new)
                return merge_tokens(positions, matrix)
        earlier = torch.arange(sizes.shape[1], device=sizes.device) / sizes.shape[1]  # below 1: it only breaks ties
        members = assignment_matrix(assignment, num_new, sizes.dtype) * (sizes + 1 - earlier)[:, None]  # (B, M, N)
        return select_tokens(positions, members.argmax(dim=-1))

    def tokens_removed(self, num_patches: int) -> list[int]:
        """The number of patch tokens that each layer removes, by the configuration and the number of patches."""
        config = self.config
        removed = [0] * config.num_hidden_layers
        if config.merge_ratio > 0:
            stages = config.resolved_merge_layers
            for layer, count in zip(stages, merge_schedule(num_patches, config.merge_ratio, len(stages)), strict=True):
                removed[layer] = count
        return removed


def log_size_bias(sizes: torch.Tensor, num_prefix_tokens: int, dtype: torch.dtype) -> torch.Tensor:
    """`(B, M)` -> `(B, 1, 1, K + M)`: log(size) for each patch token and 0 for prefix tokens. Attention adds it to its
    logits, so that a merged token counts as the patches that it replaces (proportional attention of ToMe, arXiv
    2210.09461, equation 1)."""
    return nn.functional.pad(sizes.log().to(dtype), (num_prefix_tokens, 0))[:, None, None, :]


# Pooling


class MLIPAttentionPoolingHead(nn.Module):
    """SigLIP's pooling head: a learned query attends to all tokens, and an MLP with a residual connection follows.

    Source: `SiglipMultiheadAttentionPoolingHead` of transformers, here with one Linear for each projection.
    """

    def __init__(self, config: MLIPVisionConfig):
        super().__init__()
        size = config.hidden_size
        self.config = config
        self.num_heads = config.num_attention_heads if config.pooling_num_heads is None else config.pooling_num_heads
        self.probe = nn.Parameter(torch.empty(1, 1, size))
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)
        self.layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        mlp_config = copy.copy(config)
        if config.pooling_intermediate_size is not None:
            mlp_config.intermediate_size = config.pooling_intermediate_size
        self.mlp = CLIPMLP(mlp_config)

    def forward(self, tokens: torch.Tensor, size_bias: torch.Tensor | None) -> torch.Tensor:
        """`(B, S, D)` -> `(B, D)`.

        Args:
            tokens: normalised by the post-LayerNorm.
            size_bias: `(B, 1, 1, S)`, see `log_size_bias`; `None` if nothing merged.
        """
        B, heads = tokens.shape[0], self.num_heads
        query = self.q_proj(self.probe).unflatten(2, (heads, -1)).transpose(1, 2).expand(B, -1, -1, -1)  # (B, h, 1, d)
        keys = self.k_proj(tokens).unflatten(2, (heads, -1)).transpose(1, 2)  # (B, h, S, d)
        values = self.v_proj(tokens).unflatten(2, (heads, -1)).transpose(1, 2)
        pooled = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=size_bias)  # (B, h, 1, d)
        pooled = self.out_proj(pooled.flatten(1))  # (B, D)
        return pooled + self.mlp(self.layernorm(pooled))

    def linear_map(self) -> torch.Tensor:
        """`(D, D)`: the linear part of the map from one token to the pooled state."""
        return self.out_proj.weight @ self.v_proj.weight


class MLIPCrossAttentionPoolingHead(nn.Module):
    """CoCa's pooling: a learned query of the width of the shared space attends to all tokens.

    Source: `AttentionalPooler` in
    https://github.com/mlfoundations/open_clip/blob/v3.3.0/src/open_clip/transformer.py, here with one Linear for each
    projection. Only the first query is used.
    """

    def __init__(self, config: MLIPVisionConfig):
        super().__init__()
        size, shared_size, eps = config.hidden_size, config.projection_dim, config.layer_norm_eps
        self.config = config
        self.num_heads = config.num_attention_heads if config.pooling_num_heads is None else config.pooling_num_heads
        self.query = nn.Parameter(torch.empty(config.pooling_num_queries, shared_size))
        self.layernorm_query = nn.LayerNorm(shared_size, eps=eps)
        self.layernorm = nn.LayerNorm(size, eps=eps)
        self.q_proj = nn.Linear(shared_size, shared_size)
        self.k_proj = nn.Linear(size, shared_size)
        self.v_proj = nn.Linear(size, shared_size)
        self.out_proj = nn.Linear(shared_size, shared_size)

    def forward(self, states: torch.Tensor, size_bias: torch.Tensor | None) -> torch.Tensor:
        """`(B, S, D)` -> `(B, P)`.

        Args:
            states: hidden states, not normalised.
            size_bias: `(B, 1, 1, S)`, see `log_size_bias`; `None` if nothing merged.
        """
        B, heads = states.shape[0], self.num_heads
        tokens = self.layernorm(states)
        query = self.q_proj(self.layernorm_query(self.query[None, :1]))  # (1, 1, P)
        query = query.unflatten(2, (heads, -1)).transpose(1, 2).expand(B, -1, -1, -1)  # (B, h, 1, d)
        keys = self.k_proj(tokens).unflatten(2, (heads, -1)).transpose(1, 2)  # (B, h, S, d)
        values = self.v_proj(tokens).unflatten(2, (heads, -1)).transpose(1, 2)
        pooled = nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=size_bias)  # (B, h, 1, d)
        return self.out_proj(pooled.flatten(1))

    def linear_map(self) -> torch.Tensor:
        """`(P, D)`: the linear part of the map from one normalised token to the pooled state."""
        return self.out_proj.weight @ self.v_proj.weight


def pooling_head_of(config: MLIPVisionConfig) -> MLIPAttentionPoolingHead | MLIPCrossAttentionPoolingHead | None:
    """The pooling head of a vision tower; `None` if it pools without one."""
    heads: dict[str, Any] = {"attention": MLIPAttentionPoolingHead, "cross_attention": MLIPCrossAttentionPoolingHead}
    return heads[config.pooling](config) if config.pooling in heads else None


# Models


def init_weight(layer: nn.Module, std: float) -> None:
    """Initialises the weight of a layer, unless quantisation has removed the weight."""
    if getattr(layer, "weight", None) is not None:
        init.normal_(layer.weight, std=std)


class MLIPPreTrainedModel(CLIPPreTrainedModel):
    """Initialisation of weights and `set_merge_ratio`, for every class below."""

    config: MLIPConfig
    accepts_loss_kwargs = False  # losses are means over the batch, so Trainer must divide by the accumulation steps
    base_model_prefix = "mlip"
    input_modalities: tuple[str, ...] = ("image", "text")
    _no_split_modules = [
        "CLIPTextEmbeddings",
        "MLIPTextClassEmbeddings",
        "CLIPVisionEmbeddings",
        "SiglipVisionEmbeddings",
        "MLIPStemVisionEmbeddings",
        "MLIPTextLayer",
        "MLIPVisionLayer",
        "MLIPFrequencyStage",
        "MLIPAttentionPoolingHead",
        "RobertaEmbeddings",
        "RobertaLayer",
        "XLMRobertaEmbeddings",
        "XLMRobertaLayer",
        "M2M100EncoderLayer",
    ]
    _can_record_outputs = {"hidden_states": CLIPEncoderLayer, "attentions": CLIPAttention}

    def post_init(self) -> None:
        super().post_init()
        # FSDP in accelerate raises an error for a class in `_no_split_modules` that the model has no module of.
        class_names = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = sorted(class_names.intersection(self._no_split_modules))

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # In custom code, transformers skips modules that hold no parameters themselves, such as attention, because
        # their initialisation could overwrite loaded weights. `_init_weights` below never does.
        super()._initialize_weights(module, is_custom_code=False)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialises every parameter and buffer of `module`; modules of CLIP in the way of OpenAI's CLIP.

        transformers swaps the standard deviations of the input and output projections of attention, with which training
        is much slower. Source: `initialize_parameters` in
        https://github.com/openai/CLIP/blob/d05afc436d78f1c48dc0dbf8e5980a9d471f35f6/clip/model.py#L299
        """
        super()._init_weights(module)
        factor = self.config.initializer_factor
        if isinstance(module, CLIPAttention):
            std = module.embed_dim**-0.5 * factor
            for projection in (module.q_proj, module.k_proj, module.v_proj):
                init_weight(projection, std)
            init_weight(module.out_proj, std * (2 * module.config.num_hidden_layers) ** -0.5)
        elif isinstance(module, SiglipVisionEmbeddings):
            std = module.config.initializer_range * factor
            init_weight(module.patch_embedding, std)
            init.normal_(module.position_embedding.weight, std=std)
            if isinstance(module, MLIPStemVisionEmbeddings):
                init.normal_(module.class_embedding, std=module.embed_dim**-0.5 * factor)
            init.copy_(module.position_ids, torch.arange(module.num_positions).expand((1, -1)))
        elif isinstance(module, MLIPVisionMLP):
            std = (2 * module.config.hidden_size) ** -0.5 * factor
            init_weight(module.fc1, std)
            if module.gate_proj is not None:
                init_weight(module.gate_proj, std)
            init_weight(module.fc2, (2 * module.config.hidden_size * module.config.num_hidden_layers) ** -0.5 * factor)
        elif isinstance(module, MLIPAttentionPoolingHead):
            std = module.config.hidden_size**-0.5 * factor
            init.normal_(module.probe, std=std)
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                init_weight(projection, std)
        elif isinstance(module, MLIPCrossAttentionPoolingHead):
            init.normal_(module.query, std=factor)
            for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                init_weight(projection, projection.in_features**-0.5 * factor)
        elif isinstance(module, MLIPTextClassEmbeddings):
            init.normal_(module.class_embedding, std=0.01 * factor)
        elif isinstance(module, MLIPFrequencyBlock):
            std = module.config.initializer_range * factor
            init.normal_(module.spectral_filter, std=std)
            init_weight(module.fc1, std)
            init_weight(module.fc2, std)
        elif isinstance(module, MLIPFrequencyStage):
            init_weight(module.input_projection, module.input_projection.in_features**-0.5 * factor)
            init_weight(module.output_projection, module.config.frequency_hidden_size**-0.5 * factor)
            init.normal_(module.query, std=module.config.initializer_range * factor)
            init.zeros_(module.gate)
        elif isinstance(module, MLIPTextLayer | MLIPVisionLayer):
            if module.layer_scale1 is not None:
                init.constant_(module.layer_scale1, module.self_attn.config.layer_scale_init_value)
                init.constant_(module.layer_scale2, module.self_attn.config.layer_scale_init_value)
        elif isinstance(module, MLIPModel):
            for projection in module.projections():
                init_weight(projection, projection.in_features**-0.5 * factor)
            if module.token_frequency_projection is not None:  # small, so that spatial features dominate at first
                std = 0.1 * module.token_frequency_projection.in_features**-0.5 * factor
                init_weight(module.token_frequency_projection, std)
            for name, parameter in module.scalar_parameters().items():
                if name.endswith("logit_scale"):
                    init.constant_(parameter, self.config.logit_scale_init_value)
                elif name.endswith("logit_bias"):
                    init.constant_(parameter, self.config.logit_bias_init_value)
        elif isinstance(module, MLIPVisionModelWithProjection):
            if self.config.use_visual_projection:
                init_weight(module.visual_projection, self.config.pooled_size**-0.5 * factor)
            if module.frequency_projection is not None:
                init_weight(module.frequency_projection, self.config.frequency_hidden_size**-0.5 * factor)
        elif isinstance(module, MLIPTextModelWithProjection):
            for projection in linear_layers(module.text_projection):
                init_weight(projection, projection.in_features**-0.5 * factor)
        elif isinstance(module, MLIPForImageClassification) and isinstance(module.classifier, nn.Linear):
            init_weight(module.classifier, self.config.vision_config.hidden_size**-0.5 * factor)

    def set_merge_ratio(self, merge_ratio: float) -> None:
        """Changes the fraction of patch tokens that merging removes, from the next forward call on.

        Args:
            merge_ratio: `0 <= merge_ratio < 1`; 0 turns merging off.

        Raises:
            ValueError: if `merge_ratio` is out of range or leaves no patch tokens, or if there is no vision tower.
        """
        towers = [module for module in self.modules() if isinstance(module, MLIPVisionModel)]
        if not towers:
            raise ValueError(f"{type(self).__name__} has no vision tower; call set_merge_ratio on a model with one.")
        for tower in towers:
            changed = copy.copy(tower.config)
            changed.merge_ratio = merge_ratio
            changed.validate()
            tower.config.merge_ratio = merge_ratio


def text_projection_of(config: MLIPTextConfig) -> nn.Linear | nn.Sequential | nn.Identity:
    """The map `(T, D)` -> `(T, P)` of pooled captions; no operation without `use_text_projection`."""
    if not config.use_text_projection:
        return nn.Identity()
    if config.text_projection_hidden_size is not None:
        return nn.Sequential(
            nn.Linear(config.hidden_size, config.text_projection_hidden_size, bias=False),
            nn.GELU(),
            nn.Linear(config.text_projection_hidden_size, config.projection_dim, bias=False),
        )
    return nn.Linear(config.hidden_size, config.projection_dim, bias=config.text_projection_bias)


def linear_layers(projection: nn.Module | None) -> list[nn.Linear]:
    """The linear layers of a projection, in order; none for `None` and for an Identity."""
    return [] if projection is None else [layer for layer in projection.modules() if isinstance(layer, nn.Linear)]


def visual_projection_of(config: MLIPVisionConfig) -> nn.Linear | nn.Identity:
    """The map of pooled images to `(B, P)`; no operation without `use_visual_projection`."""
    if not config.use_visual_projection:
        return nn.Identity()
    return nn.Linear(config.pooled_size, config.projection_dim, bias=config.visual_projection_bias)


def vision_embeddings_of(config: MLIPVisionConfig) -> CLIPVisionEmbeddings | SiglipVisionEmbeddings:
    """CLIP's embeddings, or SigLIP's without a class token, with or without a bias of the patch embedding; or those
    of MobileCLIP-B."""
    if config.use_conv_stem:
        return MLIPStemVisionEmbeddings(config)
    embeddings = CLIPVisionEmbeddings(config) if config.use_class_token else SiglipVisionEmbeddings(config)
    patches = embeddings.patch_embedding
    if (patches.bias is not None) != config.has_patch_bias:
        embeddings.patch_embedding = nn.Conv2d(
            patches.in_channels, patches.out_channels, patches.kernel_size, patches.stride, bias=config.has_patch_bias
        )
    return embeddings


def text_encoder_of(config: MLIPTextConfig) -> RobertaModel | XLMRobertaModel | M2M100Encoder:
    """The encoder of transformers for `encoder_config`, with the vocabulary and the special ids of `config`."""
    encoder_config = copy.copy(config.encoder_config)
    for name in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(encoder_config, name, getattr(config, name))
    if encoder_config.model_type == "m2m_100":
        return M2M100Encoder._from_config(encoder_config)
    encoder_class = RobertaModel if encoder_config.model_type == "roberta" else XLMRobertaModel
    return encoder_class._from_config(encoder_config, add_pooling_layer=False)


class MLIPTextModel(MLIPPreTrainedModel):
    """CLIP's text tower, with the pooling, mask and LayerScale that some OpenCLIP text towers use, or an encoder of
    transformers in its place (`encoder_config`)."""

    config: MLIPTextConfig
    input_modalities = ("text",)
    _input_embed_layer = "token_embedding"

    def __init__(self, config: MLIPTextConfig):
        super().__init__(config)
        if config.encoder_config is None:
            has_class_token = config.pooling == "class"
            self.embeddings = MLIPTextClassEmbeddings(config) if has_class_token else CLIPTextEmbeddings(config)
            self.encoder = MLIPTextEncoder(config)
            self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        else:
            self.encoder = text_encoder_of(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        if self.config.encoder_config is None:
            return self.embeddings.token_embedding
        return self.encoder.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        if self.config.encoder_config is None:
            self.embeddings.token_embedding = value
        else:
            self.encoder.set_input_embeddings(value)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """Encodes captions.

        Args:
            input_ids: `(T, L)`.
            attention_mask: `(T, L)`, 1 at tokens and 0 at padding; not used with `use_causal_mask=False` or
                `pooling="last"`, except with `encoder_config`, where `None` means 0 at `pad_token_id`. With a class
                token after the caption, the mask is that of CoCa, by `pad_token_id`.
            position_ids: `(T, L)`; 0 to L - 1 if `None`.

        Returns:
            `last_hidden_state` `(T, L, D)` and `pooler_output` `(T, D)`. With `pooling="last"` or
            `use_causal_mask=False`, L is `max_position_embeddings`; with a class token after the caption, one more.

        Raises:
            ValueError: without `input_ids`; if they are too long or `position_ids` are given, where L is fixed as
                above; with `encoder_config`, if `position_ids` are given.
        """
        if input_ids is None:
            raise ValueError("input_ids are missing; pass the token ids of the captions.")
        input_ids = input_ids.view(-1, input_ids.shape[-1])
        if self.config.encoder_config is None:
            return self._encode_as_clip(input_ids, attention_mask, position_ids, **kwargs)
        if position_ids is not None:
            raise ValueError("position_ids are not supported with encoder_config; leave them out.")
        return self._encode_with_transformers(input_ids, attention_mask, **kwargs)

    @can_return_tuple
    def _encode_with_transformers(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Unpack[TransformersKwargs]
    ) -> BaseModelOutputWithPooling:
        """As `forward`, with the encoder of `encoder_config`, which records its hidden states itself."""
        kwargs.pop("is_causal", None)
        for name in ("output_hidden_states", "output_attentions"):  # the encoder has a configuration of its own
            kwargs.setdefault(name, getattr(self.config, name))
        if attention_mask is None:
            attention_mask = (input_ids != self.config.pad_token_id).long()
        outputs = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
        states = outputs.last_hidden_state
        if self.config.pooling == "class":
            pooled = states[:, 0]
        else:
            pooled = (states * attention_mask[..., None]).sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)
        return BaseModelOutputWithPooling(
            last_hidden_state=states,
            pooler_output=pooled,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def _encode_as_clip(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPooling:
        """As `forward`, with CLIP's text transformer."""
        pooling, is_causal = self.config.pooling, self.config.use_causal_mask
        if pooling != "eos" or not is_causal:  # these towers were trained on captions padded to the full length
            num_padded = self.config.max_position_embeddings - input_ids.shape[1]
            if num_padded < 0:
                raise ValueError(
                    f"input_ids hold {input_ids.shape[1]} tokens, and this model takes at most "
                    f"max_position_embeddings={self.config.max_position_embeddings}; pass truncation=True and that "
                    "max_length to the tokenizer."
                )
            if position_ids is not None:
                raise ValueError(
                    f"position_ids are not supported with pooling={pooling!r} and use_causal_mask={is_causal}; leave "
                    "them out."
                )
            input_ids = nn.functional.pad(input_ids, (0, num_padded), value=self.config.pad_token_id)
        hidden_states = self.embeddings(input_ids=input_ids, position_ids=position_ids)
        kwargs.pop("is_causal", None)
        if is_causal:
            if pooling == "class":
                attention_mask = self._class_token_mask(input_ids)
            elif pooling == "last":  # as in OpenCLIP, the position that is pooled attends to the padding
                attention_mask = None
            # By position: transformers 5.24 renamed the last argument, `past_key_values`, to `cache`.
            mask = create_causal_mask(self.config, hidden_states, attention_mask, None)
        else:
            mask = None
        encoder_outputs: BaseModelOutput = self.encoder(
            inputs_embeds=hidden_states, attention_mask=mask, is_causal=is_causal, **kwargs
        )
        last_hidden_state = self.final_layer_norm(encoder_outputs.last_hidden_state)
        return BaseModelOutputWithPooling(
            last_hidden_state=last_hidden_state, pooler_output=self._pool(last_hidden_state, input_ids)
        )

    def _class_token_mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`(T, L)` -> `(T, L + 1)`, 0 at each token that follows padding, as in OpenCLIP's CoCa.

        OpenCLIP shifts the padding mask by one position, and its weights were trained so. The class token therefore
        attends to itself only if the caption has no padding, and every token attends to the first one.

        Raises:
            ValueError: if the attention backend removes the tokens that are 0, such as the class token.
        """
        if "flash" in self.config._attn_implementation:
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} is not supported by a text tower with a "
                "class token; choose 'sdpa', for example attn_implementation={'text_config': 'sdpa'}."
            )
        return nn.functional.pad((input_ids != self.config.pad_token_id).long(), (1, 0), value=1)

    def _pool(self, last_hidden_state: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        """`(T, L, D)` -> `(T, D)`: the state at the last position, or at the first EOS token.

        As in CLIP, text after the first EOS does not count. A caption without EOS is pooled at its first position.
        """
        if self.config.pooling != "eos":
            return last_hidden_state[:, -1]
        # The first EOS, because padding may have the same id. ONNX has argmax for int32, not for int64.
        position = (input_ids == self.config.eos_token_id).to(torch.int32).argmax(dim=-1)
        return last_hidden_state[torch.arange(input_ids.shape[0], device=input_ids.device), position]


class MLIPVisionModel(MLIPPreTrainedModel):
    """CLIP's vision tower with a frequency stage, and with token merging in its layers."""

    config: MLIPVisionConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    _input_embed_layer = "patch_embedding"

    def __init__(self, config: MLIPVisionConfig):
        super().__init__(config)
        size, eps = config.hidden_size, config.layer_norm_eps
        self.embeddings = vision_embeddings_of(config)
        self.pre_layrnorm = nn.LayerNorm(size, eps=eps) if config.use_pre_layernorm else nn.Identity()  # CLIP's name
        self.frequency = MLIPFrequencyStage(config) if config.frequency_layers > 0 else None
        self.encoder = MLIPVisionEncoder(config)
        self.post_layernorm = nn.LayerNorm(config.pooled_size, eps=eps)
        self.head = pooling_head_of(config)  # SigLIP's name
        self.post_init()

    @property
    def token_layernorm(self) -> nn.LayerNorm:
        """The LayerNorm of the tokens before pooling: the post-LayerNorm, or that of CoCa's pooling head."""
        return self.head.layernorm if self.config.pooling == "cross_attention" else self.post_layernorm

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = False,
        output_token_map: bool = False,
        caption_states: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MLIPVisionOutput:
        """Encodes images.

        Args:
            pixel_values: `(B, 3, height, width)`, normalised by the image processor.
            interpolate_pos_encoding: interpolates the position embeddings, for images of another size than
                `image_size`.
            output_token_map: also returns the index of the token that each patch became part of.
            caption_states: `(B, D)`, the direction of each image's caption in the space of the hidden states. It guides
                `merge_method="elip"`; the other methods ignore it.

        Raises:
            ValueError: without `pixel_values`, for an image size that differs from `image_size` without
                `interpolate_pos_encoding`, or for an image size that is not divisible by `patch_size`.
        """
        if pixel_values is None:
            raise ValueError("pixel_values are missing; pass the output of the image processor.")
        grid = self._patch_grid(pixel_values, interpolate_pos_encoding)
        # Step (1): patch, class and position embeddings and the pre-LayerNorm, as in CLIP
        hidden_states = self.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)
        hidden_states = self.pre_layrnorm(hidden_states)
        # Step (2): the frequency stage, added to the patch tokens; then patch dropout, in training
        frequency_states = pooled_frequency = frequency_importance = None
        if self.frequency is not None:
            height, width = (count * self.config.patch_size for count in grid)  # see `crop_to_patches`
            injection, frequency_states, pooled_frequency = self.frequency(pixel_values[..., :height, :width], grid)
            injection = injection.to(hidden_states.device)
            prefix, patches = split_prefix(hidden_states, self.config.num_prefix_tokens)
            hidden_states = torch.cat([prefix, patches + injection], dim=1)
            if self.config.merge_ratio > 0 and uses_importance(self.config):
                frequency_importance = self._frequency_importance(frequency_states, pooled_frequency)
        positions = self._positions(grid, hidden_states)
        kept = self._kept_patches(hidden_states)
        if kept is not None:
            prefix, patches = split_prefix(hidden_states, self.config.num_prefix_tokens)
            hidden_states = torch.cat([prefix, select_tokens(patches, kept)], dim=1)
            if frequency_states is not None:
                frequency_states = select_tokens(frequency_states, kept)
            if frequency_importance is not None:
                frequency_importance = frequency_importance.gather(1, kept)
            positions = select_tokens(positions, kept) if positions is not None else None
        # Step (3): the encoder, with token merging
        outputs = self.encoder(
            hidden_states,
            frequency_states,
            frequency_importance,
            output_token_map=output_token_map,
            caption_states=caption_states,
            positions=positions,
            **kwargs,
        )
        token_map = outputs.token_map
        if token_map is not None and kept is not None:
            token_map = token_map.new_full((len(token_map), grid[0] * grid[1]), -1).scatter(1, kept, token_map)
        # Step (4): pooling and the post-LayerNorm, as in CLIP or SigLIP
        return MLIPVisionOutput(  # a new object: fields count in the order they are set, and `outputs[1]` is pooled
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=self._pool(outputs),
            frequency_hidden_state=outputs.frequency_hidden_state,
            frequency_pooler_output=pooled_frequency,
            token_sizes=outputs.token_sizes,
            token_map=token_map,
        )

    def _positions(self, grid: tuple[int, int], hidden_states: torch.Tensor) -> torch.Tensor | None:
        """`(B, N, 2)` float32, the coordinates for rotary positions; `None` without them."""
        config = self.config
        if config.rotary_grid_size is None:
            return None
        positions = patch_positions(
            grid, config.rotary_grid_size, config.rotary_offset, config.rotary_axes == "xy", hidden_states.device
        )
        return positions.expand(hidden_states.shape[0], -1, -1)

    def _kept_patches(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """`(B, kept)` int64, the sorted indices of the patches that `patch_dropout` keeps; `None` for all."""
        if not self.training or self.config.patch_dropout == 0:
            return None
        B, N = hidden_states.shape[0], hidden_states.shape[1] - self.config.num_prefix_tokens
        num_kept = self.config.count_kept_patches(N)
        order = torch.rand(B, N, device=hidden_states.device).argsort(dim=1)
        return order[:, :num_kept].sort(dim=1).values

    def _patch_grid(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None) -> tuple[int, int]:
        height, width = pixel_values.shape[-2:]
        patch, side = self.config.patch_size, self.config.image_size
        if not interpolate_pos_encoding and (height != side or width != side):
            raise ValueError(
                f"pixel_values of {height} x {width} do not match image_size={side}; resize the images, for example "
                "with the model's image processor, or pass interpolate_pos_encoding=True."
            )
        if (height % patch or width % patch) and not self.config.crop_to_patches:
            raise ValueError(
                f"pixel_values of {height} x {width} are not divisible by patch_size={patch}; resize the images, "
                "for example with the model's image processor."
            )
        return height // patch, width // patch

    @torch.no_grad()
    def _frequency_importance(self, states: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        """`(B, N)` float32, the cosine similarity of each token's frequency features with the pooled features."""
        return nn.functional.cosine_similarity(states.float(), pooled.float()[:, None], dim=-1)

    def _pool(self, outputs: MLIPVisionOutput) -> torch.Tensor:
        """`(B, D)`, or `(B, P)` with `pooling="cross_attention"`: the post-LayerNorm precedes `pooling="attention"`,
        and follows the class token, the mean and cross-attention."""
        states, sizes, num_prefix = outputs.last_hidden_state, outputs.token_sizes, self.config.num_prefix_tokens
        if self.config.pooling == "cross_attention":
            size_bias = log_size_bias(sizes, num_prefix, states.dtype) if self.config.merge_ratio > 0 else None
            return self.post_layernorm(self.head(states, size_bias))
        if self.head is not None:
            size_bias = log_size_bias(sizes, num_prefix, states.dtype) if self.config.merge_ratio > 0 else None
            return self.head(self.post_layernorm(states), size_bias)
        prefix, patches = split_prefix(states, num_prefix)
        pooled = prefix[:, 0] if self.config.pooling == "class" else size_weighted_mean(patches, sizes)
        return self.post_layernorm(pooled)


def size_weighted_mean(tokens: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
    """`(B, M, C)` and `(B, M)` -> `(B, C)`: the mean of the tokens, each weighted by its number of patches."""
    weights = (sizes / sizes.sum(dim=1, keepdim=True)).to(tokens.dtype)
    return (weights[:, None, :] @ tokens)[:, 0]


def embed_frequency(projection: nn.Linear | None, vision_outputs: MLIPVisionOutput) -> torch.Tensor | None:
    """The frequency embedding `(B, P)`, normalised; `None` if the model has no frequency projection."""
    if projection is None:
        return None
    return nn.functional.normalize(projection(vision_outputs.frequency_pooler_output), dim=-1)


def join_embeds(
    spatial_embeds: torch.Tensor, frequency_embeds: torch.Tensor | None, frequency_weight: float
) -> torch.Tensor:
    """Adds the frequency embedding to the spatial embedding.

    Args:
        spatial_embeds: `(B, P)`.
        frequency_embeds: `(B, P)`, normalised, or `None`.
        frequency_weight: length of the added vector, relative to the length of the spatial embedding.

    Returns:
        `(B, P)`, not normalised; `spatial_embeds` itself if the weight is 0.

    Raises:
        ValueError: if the weight is not 0 and there is no frequency embedding.
    """
    if frequency_weight == 0:
        return spatial_embeds
    if frequency_embeds is None:
        raise ValueError(
            f"frequency_embed_weight={frequency_weight}, and this model was made without a frequency embedding; set it "
            "to 0, or train a model with frequency_layers and frequency_loss_weight above 0."
        )
    length = frequency_weight * spatial_embeds.norm(dim=-1, keepdim=True)
    return spatial_embeds + length * frequency_embeds.to(spatial_embeds.device)


class MLIPModel(MLIPPreTrainedModel):
    """Both towers, their projections, temperatures and losses.

    A part whose loss weight or number of layers is 0 has no parameters: its attribute is `None`.
    """

    def __init__(self, config: MLIPConfig):
        super().__init__(config)
        text_size, vision_size = config.text_config.hidden_size, config.vision_config.hidden_size
        frequency_size, shared_size = config.vision_config.frequency_hidden_size, config.projection_dim
        has_stage = config.vision_config.frequency_layers > 0
        has_token_loss = config.token_loss_weight > 0
        has_token_frequency = has_token_loss and has_stage and config.token_loss_frequency

        def projection(size: int, wanted: bool) -> nn.Linear | None:
            return nn.Linear(size, shared_size, bias=False) if wanted else None

        def logit_scale(wanted: bool = True) -> nn.Parameter | None:
            return nn.Parameter(torch.tensor(float(config.logit_scale_init_value))) if wanted else None

        def logit_bias(wanted: bool = True) -> nn.Parameter | None:
            wanted = wanted and config.instance_loss == "sigmoid"
            return nn.Parameter(torch.tensor(float(config.logit_bias_init_value))) if wanted else None

        self.text_model = MLIPTextModel._from_config(config.text_config)
        self.vision_model = MLIPVisionModel._from_config(config.vision_config)
        self.visual_projection = visual_projection_of(self.vision_model.config)
        self.text_projection = text_projection_of(self.text_model.config)
        self.frequency_projection = projection(frequency_size, config.has_frequency_loss)
        self.token_visual_projection = projection(vision_size, has_token_loss)
        self.token_text_projection = projection(text_size, has_token_loss)
        self.token_frequency_projection = projection(frequency_size, has_token_frequency)
        self.logit_scale = logit_scale()
        self.frequency_logit_scale = logit_scale(config.has_frequency_loss)
        self.token_logit_scale = logit_scale(has_token_loss)
        self.logit_bias = logit_bias()
        self.frequency_logit_bias = logit_bias(config.has_frequency_loss)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    def projections(self) -> list[nn.Linear]:
        """The layers of all projections into the shared space, except `token_frequency_projection`."""
        projections = (
            self.visual_projection,
            self.text_projection,
            self.frequency_projection,
            self.token_visual_projection,
            self.token_text_projection,
        )
        return [layer for projection in projections for layer in linear_layers(projection)]

    def scalar_parameters(self) -> dict[str, nn.Parameter]:
        """The learned scalars of the losses by attribute name, such as `logit_scale`, the log of 1 / temperature."""
        return {name: parameter for name, parameter in self.named_parameters(recurse=False) if parameter.ndim == 0}

    @torch.no_grad()
    def clamp_logit_scales(self) -> None:
        """Limits the `logit_scale` of every InfoNCE to `MAX_LOGIT_SCALE`, the range that this loss uses.

        Call it after each step of the optimizer. Other scalars are left as they are: biases, and the scales of the
        sigmoid loss, which is not limited in SigLIP either.
        """
        for name, parameter in self.scalar_parameters().items():
            has_bias = getattr(self, name.replace("scale", "bias"), None) is not None
            if name.endswith("logit_scale") and not has_bias:
                parameter.clamp_(max=MAX_LOGIT_SCALE)

    @torch.no_grad()
    def start_tokens_from_projections(self) -> None:
        """Copies the instance-level projections to the token level, to start fine-tuning from CLIP weights."""
        if self.token_visual_projection is not None:
            self.token_visual_projection.weight.copy_(self.token_to_embedding())
            weights = [layer.weight for layer in linear_layers(self.text_projection)]
            if weights:  # without the GELU of a projection with a hidden layer
                weight = functools.reduce(lambda product, weight: weight @ product, weights)
                self.token_text_projection.weight.copy_(weight)
            else:
                nn.init.eye_(self.token_text_projection.weight)

    @torch.no_grad()
    def token_to_embedding(self) -> torch.Tensor:
        """`(P, D)`: the linear part of the map from one token after `token_layernorm` to the image embedding."""
        head, layernorm = self.vision_model.head, self.vision_model.post_layernorm.weight
        if head is not None:
            pooling = head.linear_map()
            if self.config.vision_config.pooling == "cross_attention":
                pooling = layernorm[:, None] * pooling  # the post-LayerNorm follows
        else:
            pooling = torch.eye(len(layernorm), dtype=layernorm.dtype, device=layernorm.device)
        if not self.config.vision_config.use_visual_projection:
            return pooling
        projection = self.visual_projection.get_parameter("weight")
        return projection if head is None else projection @ pooling.to(projection.device)

    @can_return_tuple
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """The output of the text tower, with the caption embeddings as `pooler_output`.

        Args:
            input_ids: `(T, L)`.
            attention_mask: `(T, L)`.
            position_ids: `(T, L)`.

        Returns:
            `pooler_output` `(T, P)`, not normalised, and the other fields of the text tower.
        """
        text_outputs: BaseModelOutputWithPooling = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
        )
        text_outputs.pooler_output = self.text_projection(text_outputs.pooler_output)
        return text_outputs

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        interpolate_pos_encoding: bool = False,
        output_token_map: bool = False,
        text_embeds: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | MLIPVisionOutput:
        """The output of the vision tower, with the image embeddings as `pooler_output`.

        Args:
            pixel_values: `(B, 3, height, width)`.
            interpolate_pos_encoding: see `MLIPVisionModel`.
            output_token_map: see `MLIPVisionModel`.
            text_embeds: `(B, P)`, the embeddings of the images' own captions, which guide `merge_method="elip"`. The
                image embeddings then depend on the captions, so do not use them to measure retrieval.

        Returns:
            `MLIPVisionOutput` with `pooler_output` `(B, P)`, not normalised: the spatial embedding plus
            `frequency_embed_weight` times the frequency embedding.
        """
        vision_outputs = self._spatial_features(
            pixel_values, text_embeds, interpolate_pos_encoding, output_token_map, **kwargs
        )
        vision_outputs.pooler_output = join_embeds(
            vision_outputs.pooler_output,
            embed_frequency(self.frequency_projection, vision_outputs),
            self.vision_model.config.frequency_embed_weight,
        )
        return vision_outputs

    def _spatial_features(
        self,
        pixel_values: torch.Tensor,
        text_embeds: torch.Tensor | None,
        interpolate_pos_encoding: bool,
        output_token_map: bool,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MLIPVisionOutput:
        """`get_image_features` with the spatial embedding `(B, P)` only."""
        caption_states = None
        if text_embeds is not None:
            weight = self.token_to_embedding()  # (P, D)
            weight = weight * self.vision_model.token_layernorm.weight.detach().to(weight.device)
            caption_states = text_embeds.detach().to(weight.device) @ weight  # (B, P) @ (P, D)
        vision_outputs: MLIPVisionOutput = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_token_map=output_token_map,
            caption_states=caption_states,
            return_dict=True,
            **kwargs,
        )
        vision_outputs.pooler_output = self.visual_projection(vision_outputs.pooler_output)
        return vision_outputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        image_ids: torch.LongTensor | None = None,
        return_loss: bool | None = None,
        return_pairs: bool = False,
        interpolate_pos_encoding: bool = False,
        output_token_map: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MLIPOutput:
        """Computes image and caption embeddings, their similarities, and the losses on request.

        Args:
            input_ids: `(T, L)`.
            pixel_values: `(B, 3, height, width)`; `None` computes the captions alone, without losses.
            attention_mask: `(T, L)`.
            position_ids: `(T, L)`.
            image_ids: `(B,)` int64, equal for equal images. Pairs with equal images or equal captions are positives.
            return_loss: computes the losses of this batch, in which image i belongs to caption i.
            return_pairs: returns the inputs of the losses, for a caller that gathers them from several processes.
            interpolate_pos_encoding: see `MLIPVisionModel`.
            output_token_map: see `MLIPVisionModel`.

        Raises:
            ValueError: with `return_loss` or `return_pairs`, if the numbers of images, captions and `image_ids` differ.
        """
        if return_loss or return_pairs:
            inputs = {"pixel_values": pixel_values, "input_ids": input_ids, "image_ids": image_ids}
            counts = {name: values.shape[0] for name, values in inputs.items() if values is not None}
            if any(count != counts["pixel_values"] for count in counts.values()):
                raise ValueError(
                    f"The losses compare image i with caption i, but the batch sizes are {counts}; repeat an image for "
                    "each of its captions, and mark equal images by equal image_ids."
                )
        # Step (1): both towers; in training, caption i guides the merging of image i if merge_method is "elip"
        text_outputs: BaseModelOutputWithPooling = self.get_text_features(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            return_dict=True,  # also with `config.return_dict=False`; this output becomes a tuple at the end
            **kwargs,
        )
        text_embeds = nn.functional.normalize(text_outputs.pooler_output, dim=-1)
        if pixel_values is None and not (return_loss or return_pairs):
            return MLIPOutput(text_embeds=text_embeds, text_model_output=text_outputs)
        guided = self.training and (return_loss or return_pairs) and self.config.merge_method == "elip"
        vision_outputs = self._spatial_features(
            pixel_values, text_embeds if guided else None, interpolate_pos_encoding, output_token_map, **kwargs
        )
        # Step (2): instance-level embeddings of each domain, their sum, and the similarities
        spatial_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
        frequency_embeds = embed_frequency(self.frequency_projection, vision_outputs)
        vision_outputs.pooler_output = join_embeds(
            vision_outputs.pooler_output, frequency_embeds, self.vision_model.config.frequency_embed_weight
        )
        image_embeds = nn.functional.normalize(vision_outputs.pooler_output, dim=-1)
        logits_per_text = text_embeds @ image_embeds.t().to(text_embeds.device)
        logits_per_text = logits_per_text * self.logit_scale.exp().to(text_embeds.device)
        if self.logit_bias is not None:
            logits_per_text = logits_per_text + self.logit_bias.to(text_embeds.device)
        # Step (3): the inputs of the losses, and the losses
        pairs, losses = None, {}
        if return_loss or return_pairs:
            caption_mask = self.caption_mask_of(input_ids, attention_mask)
            tokens = None
            if self.token_visual_projection is not None:
                tokens = self.token_embeddings(vision_outputs, text_outputs, input_ids, caption_mask)
            pairs = PairEmbeddings(
                image_embeds=spatial_embeds,
                text_embeds=text_embeds,
                caption_keys=caption_keys(input_ids, caption_mask),
                image_keys=image_ids,
                frequency_embeds=frequency_embeds,
                tokens=tokens,
            )
        if return_loss:
            losses = self.compute_losses(pairs)
        return MLIPOutput(
            **losses,
            logits_per_image=logits_per_text.t(),
            logits_per_text=logits_per_text,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            frequency_embeds=frequency_embeds,
            pairs=pairs if return_pairs else None,
            text_model_output=text_outputs,
            vision_model_output=vision_outputs,
        )

    def compute_losses(self, pairs: PairEmbeddings, columns: PairColumns | None = None) -> dict[str, torch.Tensor]:
        """`losses.multi_level_loss` with the temperatures and loss weights of this model.

        Args:
            pairs: the pairs of this process, as `forward` returns them with `return_pairs=True`.
            columns: the pairs of all processes; `None` if this process is the only one.

        Returns:
            Scalars by name: `spatial_loss`, `frequency_loss` and `token_loss` if configured, and `loss`.
        """
        device = pairs.image_embeds.device
        return multi_level_loss(
            to_device(pairs, device),
            **to_device(self.scalar_parameters(), device),
            frequency_loss_weight=self.config.frequency_loss_weight,
            token_loss_weight=self.config.token_loss_weight,
            token_loss_type=self.config.token_loss_type,
            token_loss_group_size=self.config.token_loss_group_size,
            columns=columns,
        )

    def caption_mask_of(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """`(T, L)` bool, True up to and including the first EOS token."""
        is_eos = input_ids == self.config.text_config.eos_token_id
        mask = is_eos.cumsum(dim=1) - is_eos.long() == 0
        return mask if attention_mask is None else mask & attention_mask.bool()

    def token_embeddings(
        self,
        vision_outputs: MLIPVisionOutput,
        text_outputs: BaseModelOutputWithPooling,
        input_ids: torch.Tensor,
        caption_mask: torch.Tensor,
    ) -> TokenEmbeddings:
        """Normalised image and caption tokens in the shared space, with their weights and mask."""
        num_prefix = self.config.vision_config.num_prefix_tokens
        _, patches = split_prefix(vision_outputs.last_hidden_state, num_prefix)
        image_tokens = self.token_visual_projection(self.vision_model.token_layernorm(patches))  # (B, M, P)
        if self.token_frequency_projection is not None:
            frequency_tokens = self.token_frequency_projection(vision_outputs.frequency_hidden_state)
            image_tokens = image_tokens + frequency_tokens.to(image_tokens.device)
        text_tokens = self.token_text_projection(text_outputs.last_hidden_state[:, : input_ids.shape[1]])  # (T, L, P)
        sizes = vision_outputs.token_sizes
        return TokenEmbeddings(
            image_tokens=nn.functional.normalize(image_tokens, dim=-1),
            image_weights=sizes / sizes.sum(dim=1, keepdim=True),
            text_tokens=nn.functional.normalize(text_tokens, dim=-1),
            text_mask=caption_mask & (input_ids != self.config.text_config.bos_token_id),
        )


class MLIPTextModelWithProjection(MLIPPreTrainedModel):
    """The text tower and its projection into the shared space."""

    config: MLIPTextConfig
    base_model_prefix = "text_model"
    input_modalities = ("text",)

    def __init__(self, config: MLIPTextConfig):
        super().__init__(config)
        self.text_model = MLIPTextModel._from_config(config)
        self.text_projection = text_projection_of(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.text_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.text_model.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CLIPTextModelOutput:
        """`input_ids` `(T, L)` -> `text_embeds` `(T, P)`, not normalised."""
        text_outputs: BaseModelOutputWithPooling = self.text_model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, return_dict=True, **kwargs
        )
        return CLIPTextModelOutput(
            text_embeds=self.text_projection(text_outputs.pooler_output),
            last_hidden_state=text_outputs.last_hidden_state,
            hidden_states=text_outputs.hidden_states,
            attentions=text_outputs.attentions,
        )


class MLIPVisionModelWithProjection(MLIPPreTrainedModel):
    """The vision tower and its projections into the shared space."""

    config: MLIPVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: MLIPVisionConfig):
        super().__init__(config)
        self.vision_model = MLIPVisionModel._from_config(config)
        self.visual_projection = visual_projection_of(config)
        self.frequency_projection = None
        if config.frequency_layers and config.frequency_embed_weight:
            self.frequency_projection = nn.Linear(config.frequency_hidden_size, config.projection_dim, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embedding

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        output_token_map: bool = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MLIPVisionModelOutput:
        """`pixel_values` `(B, 3, height, width)` -> `image_embeds` `(B, P)`, not normalised."""
        vision_outputs: MLIPVisionOutput = self.vision_model(
            pixel_values=pixel_values,
            interpolate_pos_encoding=interpolate_pos_encoding,
            output_token_map=output_token_map,
            return_dict=True,
            **kwargs,
        )
        return MLIPVisionModelOutput(
            image_embeds=join_embeds(
                self.visual_projection(vision_outputs.pooler_output),
                embed_frequency(self.frequency_projection, vision_outputs),
                self.config.frequency_embed_weight,
            ),
            last_hidden_state=vision_outputs.last_hidden_state,
            hidden_states=vision_outputs.hidden_states,
            attentions=vision_outputs.attentions,
            token_sizes=vision_outputs.token_sizes,
            token_map=vision_outputs.token_map,
        )


class MLIPForImageClassification(MLIPPreTrainedModel):
    """The vision tower and a linear classifier on the mean of the patch tokens, weighted by their sizes.

    As in transformers' SigLIP, the LayerNorm before pooling precedes the mean if the tower pools by attention.
    """

    main_input_name = "pixel_values"
    input_modalities = ("image",)

    def __init__(self, config: MLIPConfig):
        super().__init__(config)
        self.num_labels = config.num_labels
        self.vision_model = MLIPVisionModel._from_config(config.vision_config)
        size = config.vision_config.hidden_size
        self.classifier = nn.Linear(size, config.num_labels) if config.num_labels > 0 else nn.Identity()
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_model.embeddings.patch_embedding

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ImageClassifierOutput:
        """`pixel_values` `(B, 3, height, width)` -> `logits` `(B, num_labels)`, and the loss if `labels` `(B,)` are
        given."""
        outputs: MLIPVisionOutput = self.vision_model(pixel_values, return_dict=True, **kwargs)
        _, patches = split_prefix(outputs.last_hidden_state, self.config.vision_config.num_prefix_tokens)
        if self.vision_model.head is not None:
            patches = self.vision_model.token_layernorm(patches)
        logits = self.classifier(size_weighted_mean(patches, outputs.token_sizes))
        loss = self.loss_function(labels, logits, self.config) if labels is not None else None
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


# A tower loads from the checkpoint of a whole model, in which parameter names begin with the name of the tower. In
# transformers this is registered for CLIP's towers only.
for _class, _prefix in ((MLIPTextModel, "text_model"), (MLIPVisionModel, "vision_model")):
    register_checkpoint_conversion_mapping(_class.__name__, [PrefixChange(prefix_to_remove=_prefix)], overwrite=True)

# A saved model includes its code, so that it loads where this package is not installed.
MLIPPreTrainedModel.register_for_auto_class("AutoModel")


__all__ = [
    "MLIPForImageClassification",
    "MLIPModel",
    "MLIPPreTrainedModel",
    "MLIPTextModel",
    "MLIPTextModelWithProjection",
    "MLIPVisionModel",
    "MLIPVisionModelWithProjection",
]
