# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Images from files to pixel values: one loader, the processor's transform and the augmentation of training.

Training, evaluation and users who call `processor(images=load_image(path))` get the same pixel values.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass

import fsspec
import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms import v2
from transformers import CLIPImageProcessor

# Formats in which Pillow reads 16-bit grey as mode "I"; in other formats the values of mode "I" have no known range.
FORMATS_OF_16_BITS = ("PNG", "PPM")


def load_image(source: str | bytes | Image.Image) -> Image.Image:
    """Load an image as RGB with 8 bits per channel, exactly as training and evaluation do.

    The image is turned upright by its EXIF orientation and placed on white where it is transparent. 16-bit grey is
    scaled to 8 bits, and so are float pixels between 0 and 1.

    Args:
        source: a path, a URL, the bytes of an image file, or a PIL image.

    Raises:
        OSError: if there is no such file, or it is not an image.
        ValueError: if the range of the pixels is unknown.
    """
    if isinstance(source, Image.Image):
        return convert_to_rgb(source)
    if isinstance(source, bytes):
        return read_image(source, None)
    return read_image(None, source)


def read_image(data: bytes | None, path: str | None) -> Image.Image:
    """Read an image as `load_image` does, from the bytes of a file, or from a path or URL where `data` is None."""
    if data is None:
        if not path:
            raise ValueError("there is no image")
        data = _read_bytes(path)
    image: Image.Image = Image.open(io.BytesIO(data))
    image.load()
    return convert_to_rgb(image)


def read_image_file(path: str) -> Image.Image:
    """Read an image that a user named, as `load_image` does.

    Args:
        path: a path or URL.

    Raises:
        OSError: naming the file, if it does not exist or cannot be read.
        ValueError: naming the file, if it is not an image.
    """
    try:
        data = _read_bytes(path)
    except OSError as error:
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else OSError
        raise kind(f"image={path}: {error.strerror or error}; give an image that can be read.") from error
    try:
        return read_image(data, None)
    except Exception as error:  # decoders raise exceptions of many types
        raise ValueError(
            f"image={path}: not an image that can be read ({type(error).__name__}); give a complete PNG, JPEG, "
            "WebP or another format that Pillow reads, or leave it out."
        ) from error


def _read_bytes(path: str) -> bytes:
    """The content of a path or URL."""
    with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
        content: bytes = file.read()
    return content


def convert_to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image upright, place it on white, and convert it to RGB with 8 bits per channel."""
    file_format = image.format  # the turned image has none
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        image = _scale_to_8_bits(image, file_format)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _scale_to_8_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """Scale grey pixels of 16 bits or of floats, which `convert("RGB")` would clip to white or black."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (0 <= low and high <= 1):  # also where a value is NaN
            raise ValueError(f"its float pixels lie between {low:g} and {high:g}, not 0 and 1; save it with 8 bits")
        scaled = (values * 255 + 0.5).astype(np.uint8)
    else:
        if image.mode == "I" and file_format not in FORMATS_OF_16_BITS:
            raise ValueError(f"it has 32-bit pixels between {low} and {high} of no known range; save it with 8 bits")
        scaled = (values >> 8).astype(np.uint8)
        if high > 0 and scaled.max() == 0:
            raise ValueError(f"its 16-bit pixels lie between {low} and {high} of 65535, all black; save it with 8 bits")
    return Image.fromarray(scaled)


@dataclass(frozen=True)
class ImageTransform:
    """Maps one image, PIL or uint8 (3, H, W), to the pixel values (3, H, W) that the processor gives."""

    image_processor: CLIPImageProcessor

    def __call__(self, image: Image.Image | torch.Tensor) -> torch.Tensor:
        return self.image_processor(images=image, return_tensors="pt")["pixel_values"][0]


def image_transform(image_processor: CLIPImageProcessor) -> Callable[[Image.Image | torch.Tensor], torch.Tensor]:
    """Return the function that maps one image, PIL or uint8 (3, H, W), to the processor's pixel values (3, H, W).

    It can be pickled, so that dataloader workers may be started by any method.
    """
    return ImageTransform(image_processor)


class Augmentation(torch.nn.Module):
    """Shifts, scales and brightens a PIL image for training; returns uint8 (3, S, S), the input of `image_transform`.

    It does not flip, because captions say left and right. It is mild enough for drawings.

    Args:
        image_size: S, in pixels.
        shift: largest shift, as a fraction of the shorter side.
        scale: largest relative change of size.
        brightness: largest relative change of brightness.
        contrast: largest relative change of contrast.
    """

    def __init__(self, image_size: int, shift: float, scale: float, brightness: float, contrast: float):
        super().__init__()
        self.image_size = image_size
        self.shift, self.scale, self.brightness, self.contrast = shift, scale, brightness, contrast

    def forward(self, image: Image.Image) -> torch.Tensor:
        pixels = v2.functional.pil_to_tensor(image)
        _, H, W = pixels.shape
        down, right, zoom, brightness, contrast = torch.empty(5).uniform_(-1, 1).tolist()

        # Step (1): cut a square window around the centre, shifted and scaled. Outside the image, its edge is repeated.
        side = min(H, W)
        window = round(side / (1 + self.scale * zoom))
        top = round((H - window) / 2 + self.shift * down * side)
        left = round((W - window) / 2 + self.shift * right * side)
        rows = torch.arange(top, top + window).clamp(0, H - 1)
        columns = torch.arange(left, left + window).clamp(0, W - 1)
        pixels = pixels.index_select(1, rows).index_select(2, columns)
        size = [self.image_size, self.image_size]
        pixels = v2.functional.resize(pixels, size, interpolation=v2.InterpolationMode.BICUBIC, antialias=True).float()

        # Step (2): change the brightness, then the contrast around the mean. torchvision's ColorJitter does the same
        # but takes ten times as long, because its floor operation starts all threads even for small images.
        brightness, contrast = 1 + self.brightness * brightness, 1 + self.contrast * contrast
        offset = pixels.mean().item() * brightness * (1 - contrast)
        return pixels.mul_(brightness * contrast).add_(offset + 0.5).clamp_(0, 255).to(torch.uint8)


def augmentation(image_size: int) -> Augmentation:
    """Return the default augmentation."""
    return Augmentation(image_size, shift=1 / 8, scale=0.15, brightness=0.2, contrast=0.2)
