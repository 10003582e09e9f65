# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""Pixels equal those of the processor and of the calls in the README and the model card."""

import pickle
import time

import numpy as np
import pytest
import torch
from data_cases import encoded, image_dataset, pairs, picture
from PIL import Image, ImageOps
from transformers import CLIPImageProcessor

from modeling_mlip.data import load_image
from modeling_mlip.data.images import augmentation, image_transform, read_image
from modeling_mlip.data.shapes import shapes_dataset


@pytest.mark.parametrize("size", [(32, 32), (48, 40), (20, 70), (33, 32)])
def test_transform_equals_the_processor(size, transform):
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    image = picture(1, size)
    theirs = processor(images=[image, image], return_tensors="pt")["pixel_values"][1]
    ours = transform(image)
    assert ours.shape == (3, 32, 32) and ours.dtype == torch.float32
    assert torch.equal(ours, theirs)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    assert torch.equal(transform(pixels), theirs)


def test_a_decoded_item_holds_the_processors_pixels(transform):
    image = picture(2, (40, 36))
    item = pairs(image_dataset([encoded(image)], ["a"]), transform)[0]
    assert torch.equal(item["pixel_values"], transform(image))


def test_transparent_images_are_placed_on_white():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    clear.putpixel((0, 0), (255, 0, 0, 255))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.putpixel((0, 0), 1)
    for data in (encoded(clear), encoded(palette, transparency=0)):
        pixels = np.asarray(read_image(data, None))
        assert pixels[0, 0].tolist() == [255, 0, 0] and pixels[3, 3].tolist() == [255, 255, 255]


def test_exif_orientation_and_16_bit_grey_are_respected():
    image = Image.new("RGB", (16, 8), "white")
    image.paste("black", (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side: rotate clockwise
    upright = read_image(encoded(image, "JPEG", exif=exif), None)
    assert upright.size == (8, 16)
    assert np.asarray(upright)[2].max() < 50 and np.asarray(upright)[13].min() > 200

    grey = read_image(encoded(Image.fromarray(np.full((4, 4), 128 * 256, dtype=np.uint16))), None)
    assert np.asarray(grey).tolist() == np.full((4, 4, 3), 128).tolist()


def test_augmentation_is_mild_and_never_flips():
    image = Image.new("RGB", (64, 64), "white")
    image.paste("black", (8, 24, 24, 40))  # on the left
    lefts, sizes, whites = [], [], set()
    for seed in range(50):
        torch.manual_seed(seed)
        pixels = augmentation(64)(image).float().mean(dim=0)
        assert pixels.shape == (64, 64)
        dark = pixels < 100
        assert pixels[:, 40:].min() > 150  # the edge is repeated, so there is no black border
        whites.add(pixels[0, 63].item())
        lefts.append(dark.any(dim=0).nonzero().min().item())
        sizes.append(dark.any(dim=0).sum().item())
    assert len(whites) > 10 and 200 < min(whites) < 240
    assert min(lefts) < 6 and 10 < max(lefts) < 24
    assert 12 <= min(sizes) < 16 < max(sizes) <= 20


def test_augmentation_of_a_photo_keeps_its_proportions():
    image = Image.new("RGB", (300, 200), "white")
    image.paste("black", (130, 80, 170, 120))
    torch.manual_seed(0)
    dark = augmentation(64)(image).float().mean(dim=0) < 100
    height, width = dark.any(dim=1).sum().item(), dark.any(dim=0).sum().item()
    assert 9 <= height <= 16 and abs(height - width) <= 1


def test_items_are_fast(transform):
    dataset = pairs(shapes_dataset(200, 0)["train"], transform, training=True, augmentation=augmentation(64))
    start = time.process_time()
    assert len([dataset[index] for index in range(200)]) == 200
    assert time.process_time() - start < 3  # 0.13 s


# One definition of pixels


def turned_jpeg() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(3, (40, 33)), "JPEG", exif=exif)


def with_alpha(mode: str) -> bytes:
    image = picture(4, (40, 33)).convert(mode)
    image.putalpha(Image.fromarray(np.arange(40 * 33, dtype=np.uint8).reshape(33, 40)))
    return encoded(image)


def transparent_palette() -> bytes:
    return encoded(picture(5, (40, 33)).quantize(16), transparency=3)


def grey_16_bits() -> bytes:
    return encoded(Image.fromarray(np.arange(40 * 33, dtype=np.uint16).reshape(33, 40) * 49))


def float_tiff(low: float, high: float) -> bytes:
    return encoded(Image.fromarray(np.linspace(low, high, 40 * 33, dtype=np.float32).reshape(33, 40)), "TIFF")


FILES_OF_8_BITS = {
    "plain": encoded(picture(6, (40, 33))),
    "turned by EXIF": turned_jpeg(),
    "RGBA": with_alpha("RGB"),
    "LA": with_alpha("L"),
    "transparent palette": transparent_palette(),
    "palette": encoded(picture(7, (40, 33)).quantize(16)),
    "one bit": encoded(picture(8, (40, 33)).convert("1")),
    "CMYK": encoded(picture(9, (40, 33)).convert("CMYK"), "TIFF"),
    "transparent colour": encoded(Image.new("RGB", (40, 33), "red"), transparency=(255, 0, 0)),
}
FILES = {**FILES_OF_8_BITS, "16-bit grey": grey_16_bits(), "float TIFF": float_tiff(0, 1)}


@pytest.mark.parametrize("kind", FILES)
def test_items_hold_the_pixels_that_a_users_processor_makes_of_load_image(kind, tmp_path, transform):
    path = tmp_path / "picture"
    path.write_bytes(FILES[kind])
    theirs = transform.image_processor(images=load_image(str(path)), return_tensors="pt")["pixel_values"][0]
    assert theirs.std() > 0.1 or kind == "transparent colour"
    for image in (FILES[kind], str(path)):
        [item] = pairs(image_dataset([image], ["a"]), transform)
        assert torch.equal(item["pixel_values"], theirs)
    with Image.open(path) as opened:
        assert np.array_equal(np.asarray(load_image(opened)), np.asarray(load_image(FILES[kind])))


@pytest.mark.parametrize("kind", FILES_OF_8_BITS)
def test_pillow_and_the_processor_alone_give_the_same_pixels_of_8_bit_images(kind, tmp_path, transform):
    """What a reader of the model card calls, without this package."""
    path = tmp_path / "picture"
    path.write_bytes(FILES_OF_8_BITS[kind])
    upright = ImageOps.exif_transpose(Image.open(path))
    theirs = transform.image_processor(images=upright, return_tensors="pt")["pixel_values"][0]
    assert torch.equal(transform(read_image(None, str(path))), theirs)


def test_16_bit_grey_and_floats_keep_their_brightness():
    grey = np.asarray(load_image(grey_16_bits()))
    assert grey[0, 0].tolist() == [0, 0, 0] and grey[-1, -1].tolist() == [(1319 * 49) >> 8] * 3
    floats = np.asarray(load_image(float_tiff(0, 1)))
    assert floats.min() == 0 and floats.max() == 255 and abs(floats.mean() - 127.5) < 1


@pytest.mark.parametrize(
    "data, reason",
    [
        (float_tiff(0, 255), "float pixels lie between 0 and 255"),
        (float_tiff(-1, 1), "float pixels lie between -1 and 1"),
        (float_tiff(0, np.nan), "float pixels lie between nan"),
        (encoded(Image.fromarray(np.full((4, 4), 200, dtype=np.int32)), "TIFF"), "32-bit pixels between 200 and 200"),
        (encoded(Image.fromarray(np.full((4, 4), 200, dtype=np.uint16))), "16-bit pixels lie between 200 and 200"),
    ],
)
def test_an_image_of_unknown_range_is_skipped_with_the_reason_and_never_black(data, reason, transform):
    [item] = pairs(image_dataset([data], ["a"]), transform)
    assert reason in item["error"] and "save it with 8 bits" in item["error"]


def test_a_black_image_of_16_bits_is_black():
    assert np.asarray(load_image(encoded(Image.fromarray(np.zeros((4, 4), dtype=np.uint16))))).max() == 0


def test_the_transform_can_be_pickled(transform):
    image = picture(2, (40, 36))
    copied = pickle.loads(pickle.dumps(image_transform(transform.image_processor)))
    assert torch.equal(copied(image), transform(image))
