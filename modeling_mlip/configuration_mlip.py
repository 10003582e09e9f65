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
from transformers import PreTrainedConfig  # noqa: E402
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig  # noqa: E402
from transformers.utils import logging  # noqa: E402

logger = logging.get_logger(__name__)

MERGE_METHODS = ("mlip", "tome", "elip", "ward")
TOKEN_LOSS_TYPES = ("filip", "sparc")
INSTANCE_LOSSES = ("info_nce", "sigmoid")
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
        pooling: `"eos"` takes the state at the first `eos_token_id`, so that text after it does not count, as in CLIP;
            `"last"` takes the state at the last position, after padding the ids to `max_position_embeddings` (CLIPA).
        use_causal_mask: `False` lets every token attend to every other one, including padding (CLIPA, SigLIP).
        use_text_projection: `False` takes the pooled state as the embedding, so `hidden_size` must be `projection_dim`.
        text_projection_bias: adds a bias to the projection (SigLIP).
        layer_scale_init_value: initial value of a learned scale for each channel of both residual branches; `None`
            leaves it out.

    Source: the keys of CLIP are described in `transformers.CLIPTextConfig`.
    """

    model_type = "mlip_text_model"
    base_config_key = "text_config"

    pooling: str = "eos"
    use_causal_mask: bool = True
    use_text_projection: bool = True
    text_projection_bias: bool = False
    layer_scale_init_value: float | int | None = None
    initializer_factor: float | int = 1.0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        is_clip = config_dict.get("model_type") == CLIPTextConfig.model_type
        return super().from_dict(repair_eos_token_id(config_dict) if is_clip else config_dict, **kwargs)

    def validate_pooling(self):
        _validate_choice("pooling", self.pooling, ("eos", "last"))
        if not isinstance(self.eos_token_id, int):
            raise ValueError(f"eos_token_id={self.eos_token_id!r}: give the one token id that captions end with.")
        if self.text_projection_bias and not self.use_text_projection:
            raise ValueError(
                "text_projection_bias=True needs use_text_projection=True; set text_projection_bias=False."
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
            post-LayerNorm and count each token by its size (SigLIP).
        use_pre_layernorm: `False` leaves out the LayerNorm before the encoder (CLIPA, SigLIP).
        use_visual_projection: `False` takes the pooled state as the embedding, as SigLIP does, so `hidden_size` must be
            `projection_dim`.
        crop_to_patches: `True` admits an `image_size` that is not divisible by `patch_size`: the pixels at the right
            and bottom edge that fill no patch are not used (SigLIP with 384 pixels and patches of 14).
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
    crop_to_patches: bool = False
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
        _validate_choice("pooling", self.pooling, ("class", "mean", "attention"))
        if self.pooling == "class" and not self.use_class_token:
            raise ValueError(
                "pooling='class' needs use_class_token=True; choose pooling='mean' or 'attention' without class token."
            )
        if self.frequency_layers < 0:
            raise ValueError(f"frequency_layers={self.frequency_layers}: choose 0 (no frequency stage) or more.")
        if not 0 <= self.frequency_embed_weight < math.inf:
            raise ValueError(
                f"frequency_embed_weight={self.frequency_embed_weight}: choose 0 (the spatial embedding alone) or more."
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
            if not getattr(tower, name) and tower.hidden_size != self.projection_dim:
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
