# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip visualize`: shows what a saved model computes from an image, as pictures and one HTML page per image.

    mlip visualize runs/mine --image cat.png --caption "a cat on a mat" --output_dir pictures
    mlip visualize runs/mine --image photos --merge_ratio 0.7 --merge_method tome --output_dir pictures

NAME.html contains the pictures that lie beside it: NAME_regions.png, the patches that each merging stage has merged;
NAME_importance.png, the importance of tokens that guides merging; NAME_words.png, the similarity of each word of the
caption with each token; and filters.png, the learned filters of the frequency stage. The page says which pictures are
missing and why.
"""

import argparse
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm.auto import tqdm
from transformers import CLIPProcessor

from modeling_mlip import MLIPConfig, MLIPModel
from modeling_mlip.configuration_mlip import MERGE_METHODS
from modeling_mlip.data.images import read_image, read_image_file
from modeling_mlip.hub.atomic_files import check_folder_is_writable
from modeling_mlip.hub.configurations import override_config, saved_config
from modeling_mlip.hub.flag_help import FlagHelpFormatter
from modeling_mlip.hub.loading import load_pretrained, load_processor

from ..html_page import write_page
from .inspection import Inspection, filter_magnitudes, inspect_image
from .pictures import draw_filters
from .sections import PICTURES, image_sections, settings_section, tokens_section

FILTERS = "filters.png"


def find_images(path: str) -> list[Path]:
    """An image file, or the images of a folder, chosen by file extension. Each is read once, to refuse a bad one early.

    Raises:
        ValueError, OSError: if the path does not exist, is not an image, or holds no image.
    """
    source = Path(path)
    if source.is_dir():
        endings = Image.registered_extensions()
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in endings and file.is_file())
        if not files:
            raise ValueError(f"image={path}: this folder holds no image; give an image or a folder of images.")
    elif source.is_file():
        files = [source]
    else:
        raise FileNotFoundError(f"image={path}: no such file; give an image or a folder of images.")
    for file in files:
        read_image_file(str(file))
    return files


def page_names(files: list[Path]) -> list[str]:
    """The name of each page: the file name without its extension, or with it if two files differ only there."""
    stems = Counter(file.stem for file in files)
    return [file.stem if stems[file.stem] == 1 else file.name for file in files]


def load_model(name_or_path: str, overrides: dict[str, Any]) -> tuple[MLIPModel, CLIPProcessor]:
    """Loads a saved `MLIPModel` with some keys of its configuration changed, and its processor.

    Raises:
        ValueError, OSError: if it is another kind of model, is damaged, or does not allow the changed configuration.
    """
    saved = saved_config(name_or_path, {MLIPConfig.model_type: MLIPConfig})
    if saved.architectures and MLIPModel.__name__ not in saved.architectures:
        raise ValueError(
            f"{name_or_path} holds {' and '.join(saved.architectures)}; give a saved MLIPModel, which has both towers."
        )
    config = override_config(saved, overrides)
    # "eager" is the only attention implementation that returns attention weights.
    model = load_pretrained(name_or_path, config, attn_implementation="eager").eval()
    return model, load_processor(name_or_path)


def visualize(
    source: str, images: list[Path], output_dir: str | Path, caption: str | None = None, **overrides: Any
) -> dict[Path, Inspection]:
    """Draws every image, one after another. Each file in `output_dir` is complete at any time.

    Args:
        source: a folder or Hub id of an `MLIPModel`.
        images: image files.
        caption: a text to compare every image with.
        overrides: keys of the configuration to change, such as `merge_ratio`.

    Returns:
        the inspection of each image, by the path of its page.

    Raises:
        ValueError, OSError: as `load_model`, or if `output_dir` is a file or cannot be written.
    """
    target = Path(output_dir)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"output_dir={output_dir} is a file; choose a folder.")
    check_folder_is_writable(target)
    model, processor = load_model(source, overrides)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    target.mkdir(parents=True, exist_ok=True)
    pages = {}
    temporary = Path(tempfile.mkdtemp(prefix=".visualize.", dir=target))
    try:
        if model.vision_model.frequency is not None:
            draw_filters(temporary / FILTERS, filter_magnitudes(model))
            os.replace(temporary / FILTERS, target / FILTERS)
        names = page_names(images)
        for file, name in tqdm(list(zip(images, names, strict=True)), unit="image", disable=len(images) == 1):
            inspection = inspect_image(model, processor, read_image(None, str(file)), caption)
            sections = [
                settings_section(source, model, inspection, file.name, caption),
                *image_sections(model, inspection, name, temporary, target / FILTERS),
                tokens_section(inspection),
            ]
            write_page(temporary / f"{name}.html", f"{file.name} in the model", sections)
            _publish(temporary, target, name)
            pages[target / f"{name}.html"] = inspection
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return pages


def _publish(temporary: Path, target: Path, name: str) -> None:
    """Moves the pictures and the page of one image, and removes pictures of an earlier run that no longer belong."""
    for kind in PICTURES:
        picture = temporary / f"{name}_{kind}.png"
        if picture.exists():
            os.replace(picture, target / picture.name)
        else:
            (target / picture.name).unlink(missing_ok=True)
    os.replace(temporary / f"{name}.html", target / f"{name}.html")


def main(arguments: list[str] | None = None) -> None:
    """Raises ValueError and OSError in one line that says what to do."""
    parser = argparse.ArgumentParser(
        prog="mlip visualize",
        description=__doc__,
        formatter_class=FlagHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", help="A saved MLIP model: a folder or a Hub id. Convert a CLIP model first: 'mlip convert'."
    )
    parser.add_argument("--image", required=True, help="An image, or a folder of images.")
    parser.add_argument("--caption", help="A text to compare every image with, word by word.")
    parser.add_argument(
        "--merge_ratio", type=float, help="Share of patch tokens to merge away; the saved ratio if not given."
    )
    parser.add_argument("--merge_method", help=f"{', '.join(MERGE_METHODS)}; the saved method if not given.")
    parser.add_argument("--output_dir", required=True, help="The folder for pages and pictures.")
    flags = parser.parse_args(arguments)
    overrides = {name: getattr(flags, name) for name in ("merge_ratio", "merge_method")}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    images = find_images(flags.image)
    pages = visualize(flags.model, images, flags.output_dir, flags.caption, **overrides)
    for page, inspection in pages.items():
        similarity = "" if inspection.cosine is None else f", similarity {inspection.cosine:.4f}"
        print(f"{page}: {inspection.num_tokens[0]} patches -> {inspection.num_tokens[-1]} tokens{similarity}")


if __name__ == "__main__":
    main()
