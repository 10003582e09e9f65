# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip visualize`: what a saved model does with an image, as pictures and as one HTML page for each image.

    mlip visualize runs/mine --image cat.png --caption "a cat on a mat" --output_dir pictures
    mlip visualize runs/mine --image photos --merge_ratio 0.7 --merge_method tome --output_dir pictures

NAME.html shows together what lies beside it: NAME_regions.png, which patches became one token at each merging stage;
NAME_importance.png, what guides the merging; NAME_words.png, how each word of the caption agrees with each token; and
filters.png, the learned filters of the frequency stage. What a model or a call does not have is left out, and the page
says why.
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
from modeling_mlip.data.items import read_image
from modeling_mlip.hub.configurations import override_config, saved_config
from modeling_mlip.hub.loading import load_pretrained, load_processor

from .inspection import Observation, filter_magnitudes, observe
from .pictures import Section, draw_filters, draw_importance, draw_regions, draw_words, write_page

FILTERS = "filters.png"
PICTURES = ("regions", "importance", "words")  # NAME_regions.png and so on


# 1. What is drawn, and said


def sections(model: MLIPModel, seen: Observation, name: str, folder: Path, filters: Path) -> list[Section]:
    """Draws into `folder` what there is of one image, and says what there is not; `filters` are drawn already."""
    config = model.config.vision_config
    regions, importance, words = (folder / f"{name}_{kind}.png" for kind in PICTURES)
    found = []

    title = "Which patches became one token"
    if config.merge_ratio == 0:
        found.append(Section(title, missing="Nothing merges at merge_ratio=0. Give --merge_ratio, for example 0.5."))
    else:
        draw_regions(
            regions,
            seen.crop,
            [(f"after layer {s.layer}", s.after.view(seen.grid).numpy()) for s in seen.stages],
        )
        found.append(
            Section(
                title,
                regions,
                "Above, each token in the mean colour of its patches. Below, the patches of merged tokens tinted, one "
                "tint for each token: parts of a token need not touch. Patches without a tint are still alone.",
            )
        )

    maps = [(f"layer {s.layer}\n{len(s.spatial)} tokens", s.importance()) for s in seen.stages]
    draw_importance(
        importance,
        [(label, {k: v.view(seen.grid).numpy() for k, v in scores.items()}) for label, scores in maps],
    )
    text = (
        "Spatial: the attention that the class token pays to each token, the mean over heads. "
        "Frequency: the cosine between the frequency features of the token and those of the image, the mean over the "
        "patches of a token. Both: their mean, which tells 'mlip' which tokens to spare. In standard deviations from "
        "the mean over tokens, before the stage merges; patches show the value of their token, and all maps share one "
        "scale."
    )
    if config.merge_method == "elip":
        text += " The merge method of this call, 'elip', goes by the spatial map alone."
    elif config.merge_method != "mlip":
        text += f" The merge method of this call, {config.merge_method!r}, goes by none of them."
    if config.frequency_layers == 0:
        text += " Frequency and both are left out: the model has no frequency stage (frequency_layers=0)."
    found.append(Section("Importance", importance, text))

    title = "Words and tokens"
    if seen.cosine is None:
        found.append(Section(title, missing="No caption was given. Give one as --caption."))
    elif seen.words is None:
        found.append(
            Section(
                title,
                missing="The model has no token-level projections (token_loss_weight=0). Train one with "
                "--token_loss_weight 0.1, for example.",
            )
        )
    elif not seen.words:
        found.append(Section(title, missing="No letter or digit of the caption reaches the model."))
    else:
        draw_words(
            words,
            seen.crop,
            [(word.text, word.similarity.view(seen.grid).numpy()) for word in seen.words],
        )
        text = (
            "Cosine similarity between each word and each image token, laid over the image; patches show the value of "
            "their token, and all words share one scale. A word of several tokens is their mean. A token of the "
            "caption has read the words before it, not those after it."
        )
        if not model.config.text_config.use_causal_mask:
            text = text.replace("the words before it, not those after it", "the whole caption")
        if seen.num_truncated:
            text += f" {seen.num_truncated} words did not fit into the text tower."
        rows = [
            {
                "word": word.text,
                "its tokens": " ".join(token.removesuffix("</w>") for token in word.tokens),
                "highest": float(word.similarity.max()),
                "mean over patches": float(word.similarity.mean()),
            }
            for word in seen.words
        ]
        found.append(Section(title, words, text, rows))

    title = "Filters of the frequency stage"
    if config.frequency_layers == 0:
        found.append(Section(title, missing="The model has no frequency stage (frequency_layers=0)."))
    else:
        text = (
            "Magnitude of the learned filter K of each block over the whole spectrum, the lowest frequency in the "
            "middle: the mean over channels, and the channels whose magnitude varies most. The same for every image."
        )
        if not model.vision_model.frequency.gate.any():
            text += " The gate of the stage is zero: its features do not enter the spatial stream, as after conversion."
        found.append(Section(title, filters, text))
    return found


def settings(source: str, model: MLIPModel, seen: Observation, image: str, caption: str | None) -> list[dict[str, Any]]:
    """Rows of what was run, and the similarity."""
    config = model.config.vision_config
    num_patches, num_left = seen.num_tokens[0], seen.num_tokens[-1]
    rows = {
        "model": source,
        "image": image,
        "caption": caption,
        "cosine similarity": None if seen.cosine is None else f"{seen.cosine:.4f}",
        "logit": None if seen.logit is None else f"{seen.logit:.2f}",
        "patches": f"{seen.grid[0]} x {seen.grid[1]} of {config.patch_size} px",
        "patch tokens": f"{num_patches} before the first layer, {num_left} after the last",
        "merge ratio": str(config.merge_ratio),
        "merge method": config.merge_method if config.merge_ratio else None,
        "merge layers": ", ".join(map(str, config.resolved_merge_layers)) if config.merge_ratio else None,
        "frequency stage": f"{config.frequency_layers} blocks of width {config.frequency_hidden_size}"
        if config.frequency_layers
        else "none",
    }
    return [{"setting": name, "value": value} for name, value in rows.items() if value is not None]


def tokens_per_layer(seen: Observation) -> list[dict[str, int]]:
    return [
        {"layer": layer, "attention sees": before, "MLP sees": after}
        for layer, (before, after) in enumerate(zip(seen.num_tokens, seen.num_tokens[1:], strict=False))
    ]


# 2. The command


def find_images(path: str) -> list[Path]:
    """The image itself, or those of a folder by their endings, each read once, so that a bad one stops the run early.

    Raises:
        ValueError, OSError: if it is not there, is no image, or holds none.
    """
    source = Path(path)
    if source.is_dir():
        endings = Image.registered_extensions()
        files = sorted(file for file in source.iterdir() if file.suffix.lower() in endings and file.is_file())
        if not files:
            raise ValueError(f"--image {path}: this folder holds no image; give an image or a folder of images.")
    elif source.is_file():
        files = [source]
    else:
        raise FileNotFoundError(f"--image {path}: no such file; give an image or a folder of images.")
    for file in files:
        try:
            read_image(None, str(file))
        except Exception as error:  # decoders raise whatever they like
            raise ValueError(
                f"--image {file}: not an image that can be read ({type(error).__name__}); give a whole PNG, JPEG, WebP "
                "or another format that Pillow knows, or take it out of the folder."
            ) from error
    return files


def page_names(files: list[Path]) -> list[str]:
    """A name for the pictures of each file: without its ending, unless two files differ in nothing else."""
    stems = Counter(file.stem for file in files)
    return [file.stem if stems[file.stem] == 1 else file.name for file in files]


def load_model(name_or_path: str, overrides: dict[str, Any]) -> tuple[MLIPModel, CLIPProcessor]:
    """A saved `MLIPModel` with some keys of its configuration changed, and its processor.

    Raises:
        ValueError, OSError: if it is another kind of model, is damaged, or has no such configuration.
    """
    saved = saved_config(name_or_path, {MLIPConfig.model_type: MLIPConfig})
    if saved.architectures and MLIPModel.__name__ not in saved.architectures:
        raise ValueError(
            f"{name_or_path} holds {' and '.join(saved.architectures)}; give a saved MLIPModel, which has both towers."
        )
    config = override_config(saved, overrides)
    # "eager" is the one attention that tells its weights.
    model = load_pretrained(name_or_path, config, attn_implementation="eager").eval()
    return model, load_processor(name_or_path)


def visualize(
    source: str, images: list[Path], output_dir: str | Path, caption: str | None = None, **overrides: Any
) -> dict[Path, Observation]:
    """Draws every image, one after another; what stands in `output_dir` is whole at any time.

    Args:
        source: a folder or Hub id of an `MLIPModel`.
        overrides: keys of its configuration to change, such as `merge_ratio`.

    Returns:
        what was seen of each image, by its page.
    """
    target = Path(output_dir)
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"--output_dir {output_dir} is a file; choose a folder.")
    model, processor = load_model(source, overrides)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    target.mkdir(parents=True, exist_ok=True)
    pages = {}
    aside = Path(tempfile.mkdtemp(prefix=".visualize.", dir=target))
    try:
        if model.vision_model.frequency is not None:
            draw_filters(aside / FILTERS, filter_magnitudes(model))
            os.replace(aside / FILTERS, target / FILTERS)
        names = page_names(images)
        for file, name in tqdm(list(zip(images, names, strict=True)), unit="image", disable=len(images) == 1):
            seen = observe(model, processor, read_image(None, str(file)), caption)
            found = sections(model, seen, name, aside, target / FILTERS)
            tables = [
                ("Settings", settings(source, model, seen, file.name, caption)),
                ("Patch tokens in each layer", tokens_per_layer(seen)),
            ]
            write_page(aside / f"{name}.html", f"What the model sees of {file.name}", found, tables)
            for kind in PICTURES:
                picture = aside / f"{name}_{kind}.png"
                if picture.exists():
                    os.replace(picture, target / picture.name)
                else:  # of an earlier call
                    (target / picture.name).unlink(missing_ok=True)
            os.replace(aside / f"{name}.html", target / f"{name}.html")
            pages[target / f"{name}.html"] = seen
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return pages


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="mlip visualize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="A saved MLIP model, a folder or a Hub id; CLIP comes through 'mlip convert'.")
    parser.add_argument("--image", required=True, help="An image, or a folder of images.")
    parser.add_argument("--caption", help="A text to compare every image with, word by word.")
    parser.add_argument(
        "--merge_ratio", type=float, help="Share of patch tokens merged away; as the model was saved if not given."
    )
    parser.add_argument("--merge_method", help=f"{', '.join(MERGE_METHODS)}; as the model was saved if not given.")
    parser.add_argument("--output_dir", required=True, help="The folder that the pages and pictures go to.")
    flags = parser.parse_args(arguments)
    overrides = {name: getattr(flags, name) for name in ("merge_ratio", "merge_method")}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    images = find_images(flags.image)
    pages = visualize(flags.model, images, flags.output_dir, flags.caption, **overrides)
    for page, seen in pages.items():
        similarity = "" if seen.cosine is None else f", similarity {seen.cosine:.4f}"
        print(f"{page}: {seen.num_tokens[0]} patches -> {seen.num_tokens[-1]} tokens{similarity}")


if __name__ == "__main__":
    main()
