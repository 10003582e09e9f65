# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Configurations of MLIP (arXiv 2406.01460): every setting that changes the mathematics, with its default.

They extend transformers' CLIP configurations, so every CLIP key keeps its name, its meaning and its default.
"""

import copy
import math
from typing import Any

import transformers
from packaging.version import Version

# Checked before the imports below, which fail on other versions. The same range is in setup.cfg, but a model on the Hub
# has only this file.
if not Version("5.21") <= Version(transformers.__version__) < Version("6"):
    raise ImportError(
        f"MLIP needs transformers >=5.21, <6, and {transformers.__version__} is installed; "
        "pip install 'transformers>=5.21,<6'."
    )

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers import AutoConfig, PreTrainedConfig  # noqa: E402
from transformers.configuration_utils import SubConfigSpec  # noqa: E402
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig  # noqa: E402
from transformers.utils import logging  # noqa: E402

logger = logging.get_logger(__name__)

MERGE_METHODS = ("mlip", "tome", "elip", "ward")
TOKEN_LOSS_TYPES = ("filip", "sparc")
INSTANCE_LOSSES = ("info_nce", "sigmoid")
# `model_type` of the encoders of transformers that a text tower may consist of.
TEXT_ENCODERS = ("roberta", "xlm-roberta", "m2m_100")
CLIP_VOCABULARY = 49408
# Vision keys that MLIPConfig also accepts and exposes; the vision config stores them.
VISION_SHORTCUTS = ("merge_ratio", "merge_layers", "merge_method", "frequency_layers", "frequency_embed_weight")
# `model_type` -> Auto class -> model class, for the saved `config.json`.
AUTO_MODELS = {
    "mlip": {
        "AutoModel": "MLIPModel",
        "AutoModelForZeroShotImageClassification": "MLIPModel",
        "AutoModelForImageClassification": "MLIPForImageClassification",
    },
    "mlip_text_model": {"AutoModel": "MLIPTextModel"},
    "mlip_vision_model": {"AutoModel": "MLIPVisionModel"},
}


class NamesAutoClasses:
    """Writes every Auto class of `AUTO_MODELS` to `config.json`; transformers alone writes one."""

    def save_pretrained(self, save_directory, **kwargs):
        self.auto_map = {auto: f"modeling_mlip.{model}" for auto, model in AUTO_MODELS[self.model_type].items()}
        super().save_pretrained(save_directory, **kwargs)


def repair_eos_token_id(text_config: dict[str, Any]) -> dict[str, Any]:
    """Corrects the special token ids of a CLIP text configuration that was written before transformers 4.31.

    Such configurations have `eos_token_id=2`, and CLIP then pools at the largest token id of a caption, which is EOS.

    Args:
        text_config: the keys of a CLIP text configuration.

    Returns:
        The keys with the real `eos_token_id` and `bos_token_id`; the same dictionary if nothing needs correction.
    """
    if text_config.get("eos_token_id", CLIPTextConfig().eos_token_id) != 2:
        return text_config
    last = min(text_config.get("vocab_size", CLIP_VOCABULARY), CLIP_VOCABULARY) - 1  # added tokens come after EOS
    return {**text_config, "eos_token_id": last, "bos_token_id": last - 1}


@strict
class MLIPTextConfig(NamesAutoClasses, CLIPTextConfig):
    r"""Text tower: CLIP's, with keys that SigLIP and some OpenCLIP checkpoints need.

    Args:
        encoder_config: configuration of an encoder of transformers in place of CLIP's text transformer: RoBERTa,
            XLM-RoBERTa, or the encoder of M2M-100 (NLLB). `hidden_size`, `num_hidden_layers` and `num_attention_heads`
            are taken from it; `vocab_size` and the special token ids are those of this configuration.
            `max_position_embeddings` is the longest caption in tokens.
        pooling: `"eos"` takes the state at the first `eos_token_id`, so that text after it does not count, as in CLIP;
            `"last"` takes the state at the last position, after padding the ids to `max_position_embeddings` (CLIPA);
            `"class"` appends a learned token to the ids, padded likewise, and takes its state. No token attends to a
            token that follows a `pad_token_id` (CoCa).
            With `encoder_config`: `"mean"` takes the mean over the tokens without padding, `"class"` the state at the
            first position.
        use_causal_mask: `False` lets every token attend to every other one, after padding the ids to
            `max_position_embeddings`, so that padding counts (CLIPA, SigLIP, MobileCLIP2-L).
        use_text_projection: `False` takes the pooled state as the embedding, so `hidden_size` must be `projection_dim`.
        text_projection_bias: adds a bias to the projection (SigLIP).
        text_projection_hidden_size: width of a hidden layer with GELU in the projection, without biases (OpenCLIP's
            RoBERTa); `None` makes the projection linear.
        layer_scale_init_value: initial value of a learned scale for each channel of both residual branches; `None`
            leaves it out.

    Source: the keys of CLIP are described in `transformers.CLIPTextConfig`.
    """

    model_type = "mlip_text_model"
    base_config_key = "text_config"

    sub_configs_defaults = {"encoder_config": SubConfigSpec(AutoConfig, model_type=TEXT_ENCODERS[0], optional=True)}

    encoder_config: dict | PreTrainedConfig | None = None
    pooling: str = "eos"
    use_causal_mask: bool = True
    use_text_projection: bool = True
    text_projection_bias: bool = False
    text_projection_hidden_size: int | None = None
    layer_scale_init_value: float | int | None = None
    initializer_factor: float | int = 1.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        if isinstance(self.encoder_config, PreTrainedConfig):
            for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
                setattr(self, name, getattr(self.encoder_config, name))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        is_clip = config_dict.get("model_type") == CLIPTextConfig.model_type
        return super().from_dict(repair_eos_token_id(config_dict) if is_clip else config_dict, **kwargs)

    def validate_pooling(self):
        if self.encoder_config is None:
            _validate_choice("pooling", self.pooling, ("eos", "last", "class"))
            if self.pooling == "class" and not self.use_causal_mask:
                raise ValueError("use_causal_mask=False: pooling='class' needs a causal text tower; set it to True.")
        else:
            _validate_choice("encoder_config.model_type", self.encoder_config.model_type, TEXT_ENCODERS)
            _validate_choice("pooling", self.pooling, ("mean", "class"))
            if self.use_causal_mask:
                raise ValueError(
                    "use_causal_mask=True: the encoder of encoder_config attends in both directions; set it to False."
                )
        if not isinstance(self.eos_token_id, int):
            raise ValueError(f"eos_token_id={self.eos_token_id!r}: give the one token id that captions end with.")
        if self.text_projection_bias and not self.use_text_projection:
            raise ValueError(
                "text_projection_bias=True needs use_text_projection=True; set text_projection_bias=False."
            )
        if self.text_projection_hidden_size is not None:
            _validate_at_least(self, 1, "text_projection_hidden_size")
            if self.text_projection_bias or not self.use_text_projection:
                raise ValueError(
                    f"text_projection_hidden_size={self.text_projection_hidden_size} needs use_text_projection=True "
                    "and text_projection_bias=False; set them, or text_projection_hidden_size=None."
                )
        _validate_at_least(self, 1, "vocab_size", "max_position_embeddings", "num_hidden_layers")


@strict
class MLIPVisionConfig(NamesAutoClasses, CLIPVisionConfig):
    r"""Vision tower: CLIP's, with a frequency stage and token merging.

    Args:
        merge_ratio: fraction of the patch tokens that merging removes, `0 <= merge_ratio < 1`, for any image size. 0
            gives exactly the tower without merging.
        merge_layers: layers, counted from 0, in which tokens merge between attention and MLP. `None`: three layers
            spread over the depth, see `resolved_merge_layers`.
        merge_method: `"mlip"` (similarity in both domains, guided by importance), `"ward"` (lowest Ward cost of the
            hidden states, for towers that were trained without merging), `"tome"` (Bolya et al. 2023,
            arXiv 2210.09461: similarity of attention keys only) or `"elip"` (Guo et al. 2023, arXiv 2309.16738: keeps
            the tokens with the most attention and fuses all others into one).
        merge_caption_weight: fraction of the caption in the state whose attention ranks the tokens; only for `"elip"`,
            in training.
        merge_importance_weight: weight of one standard deviation of importance (the guide) against cosine similarity
            when pairs are ranked. It is 0 by default, which leaves importance out, because the guide gained no recall
            in the study (docs/results.md); 0.1 is the weight studied.
        patch_dropout: fraction of the patch tokens that training drops at random before the encoder (FLIP, Li et al.
            2023, arXiv 2212.00794), `0 <= patch_dropout < 1`; merging removes `merge_ratio` of the others. Evaluation
            keeps all patches, and the frequency stage sees all patches.
        frequency_layers: number of blocks of the frequency stage; 0 removes the stage.
        frequency_hidden_size: hidden size of the frequency stage; `None` is a quarter of `hidden_size`.
        frequency_embed_weight: weight of the frequency embedding in the image embedding, in which the spatial embedding
            has weight 1. 0 is CLIP's image embedding. No loss depends on it, so it may be changed after training.
            `MLIPConfig` refuses a weight above 0 without a frequency loss.
        use_class_token: `False` leaves out the class token, as SigLIP does. The patch embedding of such a tower has a
            bias, and the importance of a token is the attention that it receives from all tokens.
        pooling: `"class"` takes the class token; `"mean"` takes the mean of the patch tokens, weighted by size (CLIPA);
            `"attention"` takes the output of an attention layer with a learned query and an MLP, which follow the
            post-LayerNorm and count each token by its size (SigLIP); `"cross_attention"` takes the output of an
            attention layer with a learned query of width `projection_dim`, which precedes the post-LayerNorm (CoCa).
        use_pre_layernorm: `False` leaves out the LayerNorm before the encoder (CLIPA, SigLIP).
        use_visual_projection: `False` takes the pooled state as the embedding, as SigLIP does, so `hidden_size` must be
            `projection_dim`.
        visual_projection_bias: adds a bias to the projection (EVA and Perception Encoder in OpenCLIP).
        pooling_num_heads: attention heads of `pooling="attention"` and `"cross_attention"`; `None` is
            `num_attention_heads`.
        pooling_num_queries: learned queries of `pooling="cross_attention"`. The first one gives the embedding; CoCa's
            caption decoder, which MLIP does not have, reads the others.
        pooling_intermediate_size: width of the MLP of `pooling="attention"`; `None` is `intermediate_size`.
        crop_to_patches: `True` admits an `image_size` that is not divisible by `patch_size`: the pixels at the right
            and bottom edge that fill no patch are not used (SigLIP with 384 pixels and patches of 14).
        use_conv_stem: embeds each patch by three convolutions of strides 4, 2 and `patch_size` / 8 with BatchNorm and
            `hidden_act` between them, whose kernels do not overlap, and leaves out the position embedding of the class
            token (MobileCLIP-B).
        use_patch_bias: adds a bias to the patch embedding; `None` is `not use_class_token`.
        use_key_bias: `False` leaves out the bias of the attention keys (EVA).
        use_gated_mlp: multiplies the activation of a second linear map into the MLP; with `hidden_act="silu"` it is
            SwiGLU (EVA-02).
        use_sub_layernorm: adds a LayerNorm before the output projections of attention and MLP (EVA-02).
        use_residual_post_norm: the LayerNorms of a layer follow attention and MLP, within the residual branches,
            instead of preceding them (EVA-02-E).
        rotary_grid_size: rotates queries and keys of patches by their positions, with coordinates scaled to a grid of
            this number of rows and columns, usually that of the pretraining (EVA-02, Perception Encoder); `None` does
            not rotate. A merged token has the position that `rotary_merged_position` says.
        rotary_offset: coordinate of the first row and column; 1 in most Perception Encoders.
        rotary_axes: order of the coordinates over the channels: `"yx"` (EVA-02) or `"xy"` (Perception Encoder).
        rotary_merged_position: position of a merged token: `"largest"`, the position of the largest of the tokens that
            merged, the first one of equally large tokens; or `"mean"` of the positions of its patches, which changed
            embeddings more (docs/method.md).
        layer_scale_init_value: initial value of a learned scale for each channel of both residual branches; `None`
            leaves it out.

    Source: MLIP, arXiv 2406.01460; the keys of CLIP are described in `transformers.CLIPVisionConfig`.
    """

    model_type = "mlip_vision_model"
    base_config_key = "vision_config"

    merge_ratio: float | int = 0.0
    merge_layers: list[int] | None = None
    merge_method: str = "mlip"
    merge_importance_weight: float | int = 0.0
    merge_caption_weight: float | int = 0.5
    patch_dropout: float | int = 0.0
    frequency_layers: int = 2
    frequency_hidden_size: int | None = None
    frequency_embed_weight: float | int = 0.0
    use_class_token: bool = True
    pooling: str = "class"
    use_pre_layernorm: bool = True
    use_visual_projection: bool = True
    visual_projection_bias: bool = False
    pooling_num_heads: int | None = None
    pooling_intermediate_size: int | None = None
    pooling_num_queries: int = 256
    crop_to_patches: bool = False
    use_conv_stem: bool = False
    use_patch_bias: bool | None = None
    use_key_bias: bool = True
    use_gated_mlp: bool = False
    use_sub_layernorm: bool = False
    use_residual_post_norm: bool = False
    rotary_grid_size: int | None = None
    rotary_offset: float | int = 0.0
    rotary_axes: str = "yx"
    rotary_merged_position: str = "largest"
    layer_scale_init_value: float | int | None = None
    initializer_factor: float | int = 1.0

    def __post_init__(self, **kwargs):
        if self.frequency_hidden_size is None:
            self.frequency_hidden_size = self.hidden_size // 4
        super().__post_init__(**kwargs)

    @property
    def num_prefix_tokens(self) -> int:
        """K, the number of tokens before the patch tokens: 1, the class token, or 0."""
        return int(self.use_class_token)

    @property
    def pooled_size(self) -> int:
        """The width of the pooled state."""
        return self.projection_dim if self.pooling == "cross_attention" else self.hidden_size

    @property
    def has_patch_bias(self) -> bool:
        """Whether the patch embedding has a bias."""
        return not self.use_class_token if self.use_patch_bias is None else self.use_patch_bias

    @property
    def resolved_merge_layers(self) -> list[int]:
        """The layers in which tokens merge: `merge_layers`, or those at 1/4, 1/2 and 3/4 of the depth."""
        if self.merge_layers is not None:
            return sorted(self.merge_layers)
        return sorted({self.num_hidden_layers * quarter // 4 for quarter in (1, 2, 3)})

    def count_kept_patches(self, num_patches: int) -> int:
        """The number of patches of an image that `patch_dropout` keeps in training, at least 1."""
        return max(round(num_patches * (1 - self.patch_dropout)), 1)

    def validate_geometry(self):
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r}: give one integer; images and patches are square.")
        _validate_at_least(self, 1, "image_size", "patch_size", "num_hidden_layers", "frequency_hidden_size")
        if self.image_size % self.patch_size and not self.crop_to_patches or self.image_size < self.patch_size:
            below = self.image_size // self.patch_size * self.patch_size
            raise ValueError(
                f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}; "
                f"the nearest sizes that are: {[size for size in (below, below + self.patch_size) if size]}."
            )
        _validate_choice("pooling", self.pooling, ("class", "mean", "attention", "cross_attention"))
        if self.pooling == "class" and not self.use_class_token:
            raise ValueError(
                "pooling='class' needs use_class_token=True; choose pooling='mean' or 'attention' without class token."
            )
        if self.visual_projection_bias and not self.use_visual_projection:
            raise ValueError(
                "visual_projection_bias=True needs use_visual_projection=True; set visual_projection_bias=False."
            )
        for name in ("pooling_num_heads", "pooling_intermediate_size"):
            if getattr(self, name) is not None:
                _validate_at_least(self, 1, name)
        if self.use_conv_stem and (self.patch_size % 8 or self.hidden_size % 4 or not self.use_class_token):
            raise ValueError(
                f"use_conv_stem=True needs patch_size={self.patch_size} divisible by 8, hidden_size={self.hidden_size} "
                f"divisible by 4, and use_class_token=True; change them, or set use_conv_stem=False."
            )
        _validate_at_least(self, 1, "pooling_num_queries")
        is_shared = self.pooling == "cross_attention"
        pooled_name = "projection_dim" if is_shared else "hidden_size"
        num_heads = self.pooling_num_heads or self.num_attention_heads
        if (is_shared or self.pooling_num_heads is not None) and self.pooled_size % num_heads:
            raise ValueError(
                f"pooling_num_heads={self.pooling_num_heads} does not divide {pooled_name}={self.pooled_size}; choose "
                "a divisor."
            )
        if self.frequency_layers < 0:
            raise ValueError(f"frequency_layers={self.frequency_layers}: choose 0 (no frequency stage) or more.")
        if not 0 <= self.frequency_embed_weight < math.inf:
            raise ValueError(
                f"frequency_embed_weight={self.frequency_embed_weight}: choose 0 (the spatial embedding alone) or more."
            )

    def validate_rotary(self):
        _validate_choice("rotary_axes", self.rotary_axes, ("yx", "xy"))
        _validate_choice("rotary_merged_position", self.rotary_merged_position, ("largest", "mean"))
        if self.rotary_grid_size is None:
            return
        _validate_at_least(self, 1, "rotary_grid_size")
        head_width = self.hidden_size // self.num_attention_heads
        if head_width % 4:
            raise ValueError(
                f"rotary_grid_size={self.rotary_grid_size} needs attention heads of a width divisible by 4, not "
                f"{head_width}; change hidden_size={self.hidden_size} or "
                f"num_attention_heads={self.num_attention_heads}, or set rotary_grid_size=None."
            )

    def validate_merging(self):
        if not 0 <= self.merge_ratio < 1:
            raise ValueError(
                f"merge_ratio={self.merge_ratio} is not a fraction of the tokens: choose 0 <= merge_ratio < 1, "
                "for example 0.5 to remove half of the patch tokens."
            )
        num_patches = (self.image_size // self.patch_size) ** 2
        if round(num_patches * (1 - self.merge_ratio)) < 1:
            raise ValueError(
                f"merge_ratio={self.merge_ratio} leaves none of the {num_patches} patch tokens; "
                f"choose at most {1 - 1 / num_patches:.3f}, larger images or smaller patches."
            )
        num_kept = self.count_kept_patches(num_patches)
        if 0 < self.patch_dropout < 1 and round(num_kept * (1 - self.merge_ratio)) < 1:
            raise ValueError(
                f"patch_dropout={self.patch_dropout} keeps {num_kept} of {num_patches} patches in training, and "
                f"merge_ratio={self.merge_ratio} leaves none of them; lower one of the two."
            )
        if not 0 <= self.patch_dropout < 1:
            raise ValueError(
                f"patch_dropout={self.patch_dropout}: choose 0 <= patch_dropout < 1, for example 0.5 to train on half "
                "of the patches."
            )
        _validate_choice("merge_method", self.merge_method, MERGE_METHODS)
        if not 0 <= self.merge_caption_weight <= 1:
            raise ValueError(f"merge_caption_weight={self.merge_caption_weight}: choose a fraction from 0 to 1.")
        if not 0 <= self.merge_importance_weight < math.inf:
            raise ValueError(
                f"merge_importance_weight={self.merge_importance_weight}: choose 0 (none) or a positive weight."
            )
        for layer in self.merge_layers if self.merge_layers is not None else []:
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"merge_layers={self.merge_layers}: layer {layer} does not exist; with "
                    f"num_hidden_layers={self.num_hidden_layers} choose from 0 to {self.num_hidden_layers - 1}."
                )
        if self.merge_layers is not None and len(set(self.merge_layers)) < max(len(self.merge_layers), 1):
            raise ValueError(f"merge_layers={self.merge_layers}: give at least one layer, and each layer once.")


@strict
class MLIPConfig(NamesAutoClasses, PreTrainedConfig):
    r"""Both towers and the losses.

    Args:
        text_config: `MLIPTextConfig`, or a dictionary of its keys.
        vision_config: `MLIPVisionConfig`, or a dictionary of its keys. `merge_ratio`, `merge_layers`, `merge_method`,
            `frequency_layers` and `frequency_embed_weight` may also be passed to, read from and set on this
            configuration; the vision configuration stores them.
        projection_dim: width of the embedding space that both towers share; also set on their configurations.
        logit_scale_init_value: initial value of the three `logit_scale` parameters, log(1/0.07); log(10) = 2.3026 in
            SigLIP.
        instance_loss: kind of the spatial and the frequency loss: `"info_nce"` (CLIP), or `"sigmoid"` (SigLIP, Zhai et
            al. 2023, arXiv 2303.15343), which classifies each pair of an image and a caption by itself and adds a
            learned bias to the logits. It does not change the token-level loss.
        logit_bias_init_value: initial value of the biases of the sigmoid loss.
        initializer_factor: factor on the standard deviation of the initial projections; each tower has its own factor.
        frequency_loss_weight: weight of the loss between frequency and caption embeddings; 0 leaves the loss out.
        token_loss_weight: weight of the token-level loss; 0 leaves the loss out. It is 0 by default, because the loss
            gained no recall in the study (docs/results.md). `mlip visualize` and reranking need a weight above 0.
        token_loss_type: `"filip"` compares the tokens of every image with those of every caption (late interaction,
            arXiv 2111.07783); `"sparc"` compares, within each pair, every caption token with the image tokens that are
            similar to it (arXiv 2401.09865), at a cost linear in the batch.
        token_loss_group_size: only for `"filip"`: maximum number of consecutive pairs of a batch that the token-level
            loss compares with each other. `None` compares all pairs, which costs more than both towers from some
            hundreds of pairs on.
        token_loss_frequency: adds the frequency features to the image tokens of the token-level loss.

    Example:

    ```python
    >>> from modeling_mlip import MLIPConfig, MLIPModel

    >>> config = MLIPConfig(merge_ratio=0.5)
    >>> config.vision_config.merge_ratio
    0.5
    >>> model = MLIPModel(config)
    ```"""

    model_type = "mlip"
    sub_configs_defaults = {"vision_config": MLIPVisionConfig, "text_config": MLIPTextConfig}

    text_config: dict | MLIPTextConfig | None = None
    vision_config: dict | MLIPVisionConfig | None = None
    projection_dim: int = 512
    logit_scale_init_value: float | int = 2.6592
    instance_loss: str = "info_nce"
    logit_bias_init_value: float | int = -10.0
    initializer_factor: float | int = 1.0
    frequency_loss_weight: float | int = 1.0
    token_loss_weight: float | int = 0.0
    token_loss_type: str = "filip"
    token_loss_group_size: int | None = 32
    token_loss_frequency: bool = False

    def __post_init__(self, **kwargs):
        shortcuts = {key: kwargs.pop(key) for key in VISION_SHORTCUTS if key in kwargs}
        if shortcuts:
            vision = self.vision_config
            vision = vision.to_dict() if isinstance(vision, PreTrainedConfig) else copy.copy(vision or {})
            self.vision_config = {**vision, **shortcuts}
        super().__post_init__(**kwargs)
        for name in ("text_config", "vision_config"):
            if getattr(self, name).projection_dim != self.projection_dim:
                tower = copy.copy(getattr(self, name))
                tower.projection_dim = self.projection_dim
                setattr(self, name, tower)

    @property
    def has_frequency_loss(self) -> bool:
        """Whether the model has a frequency embedding: a frequency stage and a loss that trains its projection."""
        return self.vision_config.frequency_layers > 0 and self.frequency_loss_weight > 0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if config_dict.get("model_type") == CLIPConfig.model_type and config_dict.get("text_config"):
            config_dict = {**config_dict, "text_config": repair_eos_token_id(config_dict["text_config"])}
        keys = set(kwargs)
        loaded = super().from_dict(config_dict, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # with `return_unused_kwargs`
        if keys & {"frequency_layers", "frequency_loss_weight"} and "frequency_embed_weight" not in keys:
            config.drop_unused_frequency_embed_weight()
        config.validate_frequency_embed_weight()
        return loaded

    def drop_unused_frequency_embed_weight(self) -> None:
        """Sets `frequency_embed_weight` to 0, with a warning, if there is no frequency embedding to weigh."""
        vision = self.vision_config
        if vision.frequency_embed_weight and not self.has_frequency_loss:
            logger.warning(
                f"frequency_embed_weight={vision.frequency_embed_weight} becomes 0: without a frequency stage and its "
                "loss there is no frequency embedding."
            )
            vision.frequency_embed_weight = 0.0

    @classmethod
    def from_clip_config(cls, clip_config: CLIPConfig, **overrides) -> "MLIPConfig":
        """The MLIP configuration of a CLIP model, with this class's defaults for the keys that CLIP lacks."""
        text, vision = repair_eos_token_id(clip_config.text_config.to_dict()), clip_config.vision_config.to_dict()
        for tower in (text, vision):
            tower.pop("model_type")
        return cls(
            text_config=text,
            vision_config=vision,
            projection_dim=clip_config.projection_dim,
            **overrides,
        )

    def validate_frequency_embed_weight(self):
        if self.frequency_embed_weight and not self.has_frequency_loss:
            raise ValueError(
                f"frequency_embed_weight={self.frequency_embed_weight} needs a frequency embedding, which "
                f"frequency_layers={self.frequency_layers} and frequency_loss_weight={self.frequency_loss_weight} "
                "leave out; set frequency_embed_weight=0, or both of the others above 0."
            )

    def validate_projections(self):
        for tower, name in ((self.vision_config, "use_visual_projection"), (self.text_config, "use_text_projection")):
            is_shared = tower.pooling == "cross_attention"  # then the pooled state has the width of the shared space
            if not getattr(tower, name) and not is_shared and tower.hidden_size != self.projection_dim:
                raise ValueError(
                    f"{name}=False needs hidden_size={tower.hidden_size} of that tower to equal "
                    f"projection_dim={self.projection_dim}; set {name}=True, or make the two equal."
                )

    def validate_losses(self):
        _validate_choice("instance_loss", self.instance_loss, INSTANCE_LOSSES)
        for name in ("frequency_loss_weight", "token_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: choose 0 (leaves the loss out) or a positive weight.")
        _validate_choice("token_loss_type", self.token_loss_type, TOKEN_LOSS_TYPES)
        if self.token_loss_group_size is not None and self.token_loss_group_size < 2:
            raise ValueError(
                f"token_loss_group_size={self.token_loss_group_size}: choose 2 or more pairs, or None for all pairs of "
                "the batch."
            )


def _vision_shortcut(key: str) -> property:
    def get(self):
        return getattr(self.vision_config, key)

    def set(self, value):
        changed = copy.copy(self.vision_config)
        setattr(changed, key, value)
        changed.validate()  # on a copy, so that a refused value leaves the configuration unchanged
        setattr(self.vision_config, key, value)

    return property(get, set)


for _key in VISION_SHORTCUTS:
    setattr(MLIPConfig, _key, _vision_shortcut(_key))

# A saved configuration includes its code, so that it loads where this package is not installed.
for _config in (MLIPTextConfig, MLIPVisionConfig, MLIPConfig):
    _config.register_for_auto_class()


def _validate_at_least(config: PreTrainedConfig, least: int, *names: str) -> None:
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)}: choose {least} or more.")


def _validate_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(map(repr, choices))}.")


__all__ = ["MLIPConfig", "MLIPTextConfig", "MLIPVisionConfig"]
