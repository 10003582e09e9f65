# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""The processors of MLIP and of transformers' SigLIP: the same pixels and token ids, in the classes of each."""

import copy

from transformers import CLIPImageProcessor, CLIPProcessor, SiglipImageProcessor, SiglipProcessor

# Settings that both image processors have.
SHARED = ("do_resize", "do_rescale", "do_normalize", "rescale_factor", "image_mean", "image_std")


def mlip_processor_of_siglip(processor: CLIPProcessor | SiglipProcessor, image_size: int, length: int) -> CLIPProcessor:
    """The processor of a converted SigLIP model: a `CLIPImageProcessor` without crop, and the tokenizer as it is.

    The tokenizer gets the length of the text tower, if it allows more, and pads at the end, where the tower was trained
    with padding.

    Raises:
        ValueError: if the image processor does not give square images of `image_size`.
    """
    images, tokenizer = processor.image_processor, processor.tokenizer
    size = {key: value for key, value in dict(images.size).items() if value}
    if size != {"height": image_size, "width": image_size}:
        raise ValueError(
            f"the image processor resizes to {size}, but the model takes images of {image_size} x {image_size}: "
            "configuration and preprocessor_config.json belong to different models."
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, length)
    tokenizer.padding_side = "right"
    return CLIPProcessor(
        CLIPImageProcessor(
            size=size,
            crop_size=size,
            do_center_crop=False,
            resample=int(images.resample),
            **{name: getattr(images, name) for name in SHARED},
        ),
        tokenizer,
    )


def siglip_processor_of(processor: CLIPProcessor) -> SiglipProcessor:
    """The inverse of `mlip_processor_of_siglip`, for any processor that does not crop.

    The tokenizer gives no attention mask, which `SiglipModel` would use: SigLIP was trained with attention to padding.

    Raises:
        ValueError: if the image processor crops.
    """
    images, tokenizer = processor.image_processor, copy.deepcopy(processor.tokenizer)
    size = {key: value for key, value in dict(images.size).items() if value}
    if set(size) != {"height", "width"}:
        raise ValueError(f"SiglipImageProcessor resizes to height and width, and this image processor to {size}.")
    tokenizer.model_input_names = ["input_ids"]
    tokenizer.init_kwargs["model_input_names"] = ["input_ids"]  # what is saved
    settings = {name: getattr(images, name) for name in SHARED}
    return SiglipProcessor(SiglipImageProcessor(size=size, resample=int(images.resample), **settings), tokenizer)
