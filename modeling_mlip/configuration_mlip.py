# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Configurations of MLIP (arXiv 2406.01460): everything that changes the mathematics, each default once.

They extend transformers' CLIP configurations, so every CLIP key keeps its name, its meaning and its default.
"""

import copy
import math
from typing import Any

import transformers
from packaging.version import Version

# Said before the imports below fail of it; the same range as in setup.cfg, which what is on the Hub comes without.
if not Version("5.17") <= Version(transformers.__version__) < Version("6"):
    raise ImportError(
        f"MLIP needs transformers >=5.17, <6, and {transformers.__version__} is installed; "
        "pip install 'transformers>=5.17,<6'."
    )

from huggingface_hub.dataclasses import strict  # noqa: E402
from transformers import PreTrainedConfig  # noqa: E402
from transformers.models.clip.configuration_clip import CLIPConfig, CLIPTextConfig, CLIPVisionConfig  # noqa: E402

MERGE_METHODS = ("mlip", "tome", "elip")
CLIP_VOCABULARY = 49408
# Vision keys that MLIPConfig takes and shows as its own; their one home is the vision config.
VISION_SHORTCUTS = ("merge_ratio", "merge_layers", "merge_method", "frequency_layers", "frequency_embed_weight")
# Which model each Auto class makes of a configuration, here and where only the saved files are; by `model_type`.
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
    """A configuration whose `config.json` names every Auto class; transformers by itself writes one of a model's."""

    def save_pretrained(self, save_directory, **kwargs):
        self.auto_map = {auto: f"modeling_mlip.{model}" for auto, model in AUTO_MODELS[self.model_type].items()}
        super().save_pretrained(save_directory, **kwargs)


def mend_eos(text_config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a CLIP text tower with the right `eos_token_id`: early configurations say 2, and CLIP then pools at
    the largest id of a text, which is its EOS."""
    if text_config.get("eos_token_id", CLIPTextConfig().eos_token_id) != 2:
        return text_config
    last = min(text_config.get("vocab_size", CLIP_VOCABULARY), CLIP_VOCABULARY) - 1  # tokens added later come after it
    return {**text_config, "eos_token_id": last, "bos_token_id": last - 1}


@strict
class MLIPTextConfig(NamesAutoClasses, CLIPTextConfig):
    r"""Text tower: CLIP's, with three keys that some OpenCLIP checkpoints need.

    Args:
        pooling: `"eos"` takes the state at the first `eos_token_id`; `"last"` the one at the last position, after
            padding the ids to `max_position_embeddings` (CLIPA).
        use_causal_mask: `False` lets every token see every other, padding included, as CLIPA was trained.
        layer_scale_init_value: start of a learned per-channel scale on both residual branches; `None` leaves it out.

    Source: the keys of CLIP are described in `transformers.CLIPTextConfig`.
    """

    model_type = "mlip_text_model"
    base_config_key = "text_config"

    pooling: str = "eos"
    use_causal_mask: bool = True
    layer_scale_init_value: float | int | None = None
    initializer_factor: float | int = 1.0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        is_clip = config_dict.get("model_type") == CLIPTextConfig.model_type
        return super().from_dict(mend_eos(config_dict) if is_clip else config_dict, **kwargs)

    def validate_pooling(self):
        _validate_choice("pooling", self.pooling, ("eos", "last"))
        if not isinstance(self.eos_token_id, int):
            raise ValueError(f"eos_token_id={self.eos_token_id!r}: give the one id that texts end with.")
        _validate_at_least(self, 1, "vocab_size", "max_position_embeddings", "num_hidden_layers")


@strict
class MLIPVisionConfig(NamesAutoClasses, CLIPVisionConfig):
    r"""Vision tower: CLIP's, with a frequency stage and token merging.

    Args:
        merge_ratio: share of the patch tokens that is gone after the last layer, `0 <= merge_ratio < 1`, for any image
            size. 0 gives exactly the unmerged tower.
        merge_layers: layers (counted from 0) between whose attention and MLP tokens merge. `None`: three stages spread
            over the depth.
        merge_method: `"mlip"` (similarity in both domains, guided by importance), `"tome"` (Bolya et al. 2023,
            arXiv 2210.09461: attention keys alone) or `"elip"` (Guo et al. 2023, arXiv 2309.16738: the tokens that the
            class token attends to stay, one token is made of the rest).
        merge_caption_weight: share of the caption in what asks for important tokens, `"elip"` in training.
        merge_importance_weight: what one standard deviation of importance counts against cosine similarity when pairs
            are ranked; 0 leaves the guide out.
        frequency_layers: blocks of the frequency stage; 0 removes it.
        frequency_hidden_size: its width; `None` is a quarter of `hidden_size`.
        frequency_embed_weight: what the frequency embedding counts for beside the spatial one, which counts 1, in the
            embedding of an image. 0 is CLIP's: the spatial one alone. It changes no loss, so it may be set after
            training; `MLIPConfig` makes it 0 where no loss trains a frequency embedding.
        pooling: `"class"` takes the class token; `"mean"` the mean over patch tokens, weighted by size (CLIPA).
        use_pre_layernorm: `False` leaves out the LayerNorm before the encoder (CLIPA).
        layer_scale_init_value: start of a learned per-channel scale on both residual branches; `None` leaves it out.

    Source: MLIP, arXiv 2406.01460; the keys of CLIP are described in `transformers.CLIPVisionConfig`.
    """

    model_type = "mlip_vision_model"
    base_config_key = "vision_config"

    merge_ratio: float | int = 0.0
    merge_layers: list[int] | None = None
    merge_method: str = "mlip"
    merge_importance_weight: float | int = 0.1
    merge_caption_weight: float | int = 0.5
    frequency_layers: int = 2
    frequency_hidden_size: int | None = None
    frequency_embed_weight: float | int = 0.0
    pooling: str = "class"
    use_pre_layernorm: bool = True
    layer_scale_init_value: float | int | None = None
    initializer_factor: float | int = 1.0

    def __post_init__(self, **kwargs):
        if self.frequency_hidden_size is None:
            self.frequency_hidden_size = self.hidden_size // 4
        super().__post_init__(**kwargs)

    @property
    def resolved_merge_layers(self) -> list[int]:
        """Where tokens merge: `merge_layers`, or a quarter, a half and three quarters of the depth."""
        if self.merge_layers is not None:
            return sorted(self.merge_layers)
        return sorted({self.num_hidden_layers * quarter // 4 for quarter in (1, 2, 3)})

    def validate_geometry(self):
        for name in ("image_size", "patch_size"):
            if not isinstance(getattr(self, name), int):
                raise ValueError(f"{name}={getattr(self, name)!r}: MLIP takes square images and patches, one integer.")
        _validate_at_least(self, 1, "image_size", "patch_size", "num_hidden_layers", "frequency_hidden_size")
        if self.image_size % self.patch_size:
            below = self.image_size // self.patch_size * self.patch_size
            raise ValueError(
                f"image_size={self.image_size} is not divisible by patch_size={self.patch_size}; "
                f"the nearest sizes that are: {[size for size in (below, below + self.patch_size) if size]}."
            )
        _validate_choice("pooling", self.pooling, ("class", "mean"))
        if self.frequency_layers < 0:
            raise ValueError(f"frequency_layers={self.frequency_layers}: choose 0 (no frequency stage) or more.")
        if not 0 <= self.frequency_embed_weight < math.inf:
            raise ValueError(
                f"frequency_embed_weight={self.frequency_embed_weight}: choose 0 (the spatial embedding alone) or more."
            )

    def validate_merging(self):
        if not 0 <= self.merge_ratio < 1:
            raise ValueError(
                f"merge_ratio={self.merge_ratio} is not a share of tokens: choose 0 <= merge_ratio < 1, "
                "for example 0.5 to merge half of the patch tokens away."
            )
        num_patches = (self.image_size // self.patch_size) ** 2
        if round(num_patches * (1 - self.merge_ratio)) < 1:
            raise ValueError(
                f"merge_ratio={self.merge_ratio} leaves none of {num_patches} patch tokens; "
                f"choose at most {1 - 1 / num_patches:.3f}, larger images or smaller patches."
            )
        _validate_choice("merge_method", self.merge_method, MERGE_METHODS)
        if not 0 <= self.merge_caption_weight <= 1:
            raise ValueError(f"merge_caption_weight={self.merge_caption_weight}: choose a share from 0 to 1.")
        if not 0 <= self.merge_importance_weight < math.inf:
            raise ValueError(
                f"merge_importance_weight={self.merge_importance_weight}: choose 0 (no guide) or a positive weight."
            )
        for layer in self.merge_layers if self.merge_layers is not None else []:
            if not 0 <= layer < self.num_hidden_layers:
                raise ValueError(
                    f"merge_layers={self.merge_layers}: layer {layer} does not exist; with "
                    f"num_hidden_layers={self.num_hidden_layers} choose from 0 to {self.num_hidden_layers - 1}."
                )
        if self.merge_layers is not None and len(set(self.merge_layers)) < max(len(self.merge_layers), 1):
            raise ValueError(f"merge_layers={self.merge_layers}: name at least one layer, and each once.")


@strict
class MLIPConfig(NamesAutoClasses, PreTrainedConfig):
    r"""Both towers and the losses.

    Args:
        text_config: `MLIPTextConfig`, or a dictionary of its keys.
        vision_config: `MLIPVisionConfig`, or a dictionary of its keys. `merge_ratio`, `merge_layers`, `merge_method`,
            `frequency_layers` and `frequency_embed_weight` may also be given to, read from and set on this config,
            which hands them on.
        projection_dim: width of the space that both towers share; handed on to their configurations.
        logit_scale_init_value: start of the three temperatures, log(1/0.07).
        initializer_factor: scales the standard deviation of the initial projections; each tower has its own.
        frequency_loss_weight: weight of InfoNCE between the frequency embedding and the caption; 0 leaves it out.
        token_loss_weight: weight of the token-level loss; 0 leaves it out.
        token_loss_group_size: pairs that the token-level loss compares with each other, groups of consecutive ones in
            the batch; `None` compares all, which from some hundreds of pairs on costs more than both towers.
        token_loss_frequency: whether the tokens of the token-level loss contain the frequency features; they did no
            good where it was tried, being shallow and a shortcut.

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
    initializer_factor: float | int = 1.0
    frequency_loss_weight: float | int = 1.0
    token_loss_weight: float | int = 0.1
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
        if self.vision_config.frequency_embed_weight and not self.has_frequency_loss:
            self.vision_config = copy.copy(self.vision_config)
            self.vision_config.frequency_embed_weight = 0.0

    @property
    def has_frequency_loss(self) -> bool:
        """Whether there is a frequency embedding: a stage, and a loss that trains its projection."""
        return self.vision_config.frequency_layers > 0 and self.frequency_loss_weight > 0

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        if config_dict.get("model_type") == CLIPConfig.model_type and config_dict.get("text_config"):
            config_dict = {**config_dict, "text_config": mend_eos(config_dict["text_config"])}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def from_clip_config(cls, clip_config: CLIPConfig, **overrides) -> "MLIPConfig":
        """The same model as an MLIP one, with this class's defaults for what CLIP does not have."""
        text, vision = mend_eos(clip_config.text_config.to_dict()), clip_config.vision_config.to_dict()
        for tower in (text, vision):
            tower.pop("model_type")
        return cls(
            text_config=text,
            vision_config=vision,
            projection_dim=clip_config.projection_dim,
            **overrides,
        )

    def validate_losses(self):
        for name in ("frequency_loss_weight", "token_loss_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)}: choose 0 (loss left out) or a positive weight.")
        if self.token_loss_group_size is not None and self.token_loss_group_size < 2:
            raise ValueError(
                f"token_loss_group_size={self.token_loss_group_size}: choose 2 or more pairs to compare, or None for "
                "all of the batch."
            )


def _vision_shortcut(key: str) -> property:
    def get(self):
        return getattr(self.vision_config, key)

    def set(self, value):
        changed = copy.copy(self.vision_config)
        setattr(changed, key, value)
        changed.validate()  # before the change, so that a refused value leaves the config as it was
        setattr(self.vision_config, key, value)

    return property(get, set)


for _key in VISION_SHORTCUTS:
    setattr(MLIPConfig, _key, _vision_shortcut(_key))

# What is saved carries the code, so that it loads where this package is not installed.
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
