# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip search`: the images or captions of a collection that are nearest to words or to an image.

    mlip search embeddings "a red circle"
    mlip search embeddings --image photo.jpg --top_k 20
    mlip search embeddings "a red circle" --output found.html

The first search builds an index beside the embeddings.
"""

import argparse
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from modeling_mlip.data.images import load_image, read_image_file
from modeling_mlip.evaluation.encoders import Encoder
from modeling_mlip.evaluation.html_page import Section, write_page
from modeling_mlip.hub.flag_help import FlagHelpFormatter
from modeling_mlip.hub.formatting import format_table

from .embed import embed_captions, embed_inputs
from .vector_index import Hit, VectorIndex, load_index_encoder

THUMBNAIL = (224, 224)  # pixels


def search_words(index: VectorIndex, encoder: Encoder, words: str, top_k: int = 10) -> list[Hit]:
    """The rows of the index nearest to a caption.

    Raises:
        ValueError: if the words are blank or `top_k` is not positive.
    """
    if not words.strip():
        raise ValueError("The words to search for are empty; give some, or an image.")
    return index.search(embed_captions(encoder, [words.strip()])[0].cpu().numpy(), top_k)


def search_image(index: VectorIndex, encoder: Encoder, image: Image.Image, top_k: int = 10) -> list[Hit]:
    """The rows of the index nearest to an RGB image."""
    pixel_values = torch.stack([encoder.transform(image)])
    return index.search(embed_inputs(encoder, {"pixel_values": pixel_values})[0].cpu().numpy(), top_k)


def image_path(metadata: dict[str, Any], row_id: str) -> Path | None:
    """The local image file of a row, if its id names one.

    Args:
        metadata: the content of embeddings.json.
    """
    if metadata["root"] is None or metadata["content"] != "images":
        return None
    path = Path(metadata["root"], row_id)
    return path if path.is_file() else None


def write_hits(path: str | Path, title: str, hits: list[Hit], metadata: dict[str, Any]) -> None:
    """Write hits as an HTML page, with a thumbnail of each hit that is a local image file.

    Raises:
        OSError: if the page cannot be written.
    """
    with tempfile.TemporaryDirectory() as folder:
        sections = []
        for number, hit in enumerate(hits, 1):
            file, thumbnail = image_path(metadata, hit.id), None
            if file is not None:
                image = load_image(os.fspath(file))
                image.thumbnail(THUMBNAIL)
                thumbnail = Path(folder, f"{number}.png")
                image.save(thumbnail)
            text = f"score {hit.score:.4f}" + (f"; {hit.caption}" if hit.caption else "")
            sections.append(Section(f"{number}. {hit.id}", picture=thumbnail, text=text))
        write_page(path, title, sections)


def format_hits(hits: list[Hit]) -> str:
    """A table of the hits."""
    rows = [{"id": hit.id, "score": f"{hit.score:.4f}", "caption": hit.caption} for hit in hits]
    has_captions = any(hit.caption is not None for hit in hits)
    return format_table(rows, ["id", "score", *(["caption"] if has_captions else [])])


def main(arguments: list[str] | None = None) -> None:
    """Raises ValueError, OSError and ImportError in one line that says what to do."""
    parser = argparse.ArgumentParser(
        prog="mlip search",
        description=__doc__,
        formatter_class=FlagHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("index", help="A folder that mlip embed wrote.")
    parser.add_argument("words", nargs="?", help="The words to search for.")
    parser.add_argument("--image", help="An image file to search for, instead of words.")
    parser.add_argument("--top_k", type=int, default=10, help="Number of results.")
    parser.add_argument("--model", help="Where the model of the embeddings is now, if it was moved.")
    parser.add_argument("--output", help="Also write the results to this HTML file, with small images.")
    flags = parser.parse_args(arguments)
    if (flags.words is None) == (flags.image is None):
        raise ValueError("Give either words or --image FILE to search for.")
    image = None if flags.image is None else read_image_file(flags.image)
    index = VectorIndex(flags.index)
    encoder = load_index_encoder(index.metadata, flags.model)
    if image is None:
        hits = search_words(index, encoder, flags.words, flags.top_k)
    else:
        hits = search_image(index, encoder, image, flags.top_k)
    print(format_hits(hits))
    if flags.output is not None:
        write_hits(flags.output, f"Search for {flags.words or flags.image}", hits, index.metadata)


if __name__ == "__main__":
    main()
