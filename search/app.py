# Copyright 2026 The MLIP authors. Licensed under the Apache License, Version 2.0.
"""`mlip app`: a local page that classifies images, searches a collection, and shows what merging does.

    mlip app runs/mine
    mlip app runs/mine embeddings --port 8000

The page needs Gradio: pip install 'modeling-mlip[app]'. It is open to this machine only.
"""

import argparse
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from PIL import Image

from modeling_mlip.data.images import load_image
from modeling_mlip.hub.errors import error_line, is_user_error
from modeling_mlip.hub.extras import require_modules
from modeling_mlip.hub.flag_help import FlagHelpFormatter

from .app_session import AppSession
from .search_command import image_path

HOST = "127.0.0.1"
DEFAULT_RATIO = 0.5
LARGEST_RATIO = 0.9


def build_page(session: AppSession) -> Any:
    """The page, a `gradio.Blocks`.

    Raises:
        ImportError: if Gradio is not installed.
    """
    require_modules("The page", "app", "gradio")
    import gradio as gr

    with gr.Blocks(title="MLIP", analytics_enabled=False) as page:
        gr.Markdown(f"# {Path(session.encoder.name).name}")
        with gr.Tab("Classify"):
            _add_classification(gr, session)
        with gr.Tab("Merging"):
            _add_merging(gr, session)
        if session.index is not None:
            with gr.Tab("Search"):
                _add_search(gr, session, has_captions=session.index.metadata["caption_column"] is not None)
    return page


def _add_classification(gr: Any, session: AppSession) -> None:
    image, labels = _image_and_labels(gr)
    button = gr.Button("Classify", variant="primary")
    output = gr.Label(label="Probability of each label")
    classify = _shown(gr, lambda image, labels: session.classify(_require_image(image), labels))
    button.click(classify, [image, labels], output, api_name="classify")


def _add_merging(gr: Any, session: AppSession) -> None:
    image, labels = _image_and_labels(gr)
    start = session.saved_ratio or DEFAULT_RATIO
    ratio = gr.Slider(0, LARGEST_RATIO, value=start, step=0.05, label="Share of patch tokens merged away")
    button = gr.Button("Show", variant="primary")
    summary = gr.Markdown()
    picture = gr.Image(type="pil", show_label=False, interactive=False)
    title = "Scores at the chosen ratio, and at ratio 0"
    table = gr.Dataframe(
        headers=["label", "chosen", "at 0"],
        label=title,
        interactive=False,
        wrap=True,
        column_widths=["50%", "25%", "25%"],
    )
    inputs, outputs = [image, labels, ratio], [summary, picture, table]
    report = _shown(gr, lambda *values: format_report(session, *values))
    button.click(report, inputs, outputs, api_name="merging")
    ratio.release(report, inputs, outputs, api_name=False)


def _add_search(gr: Any, session: AppSession, has_captions: bool) -> None:
    words = gr.Textbox(label="Words", placeholder="a red circle")
    image = gr.Image(label="or an image", type="pil", height=240)
    button = gr.Button("Search", variant="primary")
    gallery = gr.Gallery(show_label=False, columns=4, height="auto", object_fit="contain")
    columns = ["id", "score", *(["caption"] if has_captions else [])]
    table = gr.Dataframe(headers=columns, label="Results", interactive=False)
    search = _shown(gr, lambda *values: find_images_and_rows(session, *values))
    button.click(search, [words, image], [gallery, table], api_name="search")
    words.submit(search, [words, image], [gallery, table], api_name=False)


def format_report(
    session: AppSession, image: Image.Image | None, labels: str, merge_ratio: float
) -> tuple[str, Image.Image, list[list[str]]]:
    """The summary, the picture and the table of scores of the tab "Merging"."""
    report = session.inspect_merging(_require_image(image), labels, merge_ratio)
    summary = (
        f"{report.num_patches} patches → {report.num_tokens} tokens; **{report.milliseconds:.1f} ms** per image, "
        f"{report.milliseconds_unmerged:.1f} ms without merging "
        f"({report.milliseconds_unmerged / report.milliseconds:.2f} times as fast)"
    )
    rows = [[name, f"{score:.3f}", f"{report.scores_unmerged[name]:.3f}"] for name, score in report.scores.items()]
    return summary, report.picture, rows


def find_images_and_rows(
    session: AppSession, words: str, image: Image.Image | None
) -> tuple[list[tuple[Image.Image, str]], list[list[str]]]:
    """The gallery and the table of the tab "Search". The gallery shows the hits that are local image files."""
    hits = session.search(words, image)
    metadata = session.require_index().metadata
    files = [(hit, image_path(metadata, hit.id)) for hit in hits]
    gallery = [(load_image(str(file)), f"{hit.id}  {hit.score:.3f}") for hit, file in files if file is not None]
    has_captions = metadata["caption_column"] is not None
    rows = [[hit.id, f"{hit.score:.4f}", *([hit.caption or ""] if has_captions else [])] for hit in hits]
    return gallery, rows


def _image_and_labels(gr: Any) -> tuple[Any, Any]:
    image = gr.Image(label="Image", type="pil", height=320)
    labels = gr.Textbox(label="Labels, separated by commas", placeholder="a red circle, a blue star")
    return image, labels


def _require_image(image: Image.Image | None) -> Image.Image:
    if image is None:
        raise ValueError("Choose an image first.")
    return image


def _shown(gr: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose errors that a user can act on are shown on the page."""

    @wraps(function)
    def call(*values: Any) -> Any:
        try:
            return function(*values)
        except Exception as error:
            if not is_user_error(error):
                raise
            raise gr.Error(error_line(error)) from error

    return call


def main(arguments: list[str] | None = None) -> None:
    """Raises ValueError, OSError and ImportError in one line that says what to do."""
    parser = argparse.ArgumentParser(
        prog="mlip app",
        description=__doc__,
        formatter_class=FlagHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", help="A saved MLIP model: a folder or a Hub id.")
    parser.add_argument("index", nargs="?", help="A folder that mlip embed wrote with this model, to search.")
    parser.add_argument("--port", type=int, default=7860, help="Port of the page.")
    flags = parser.parse_args(arguments)
    require_modules("The page", "app", "gradio")  # before the model is loaded
    build_page(AppSession(flags.model, flags.index)).launch(server_name=HOST, server_port=flags.port)


if __name__ == "__main__":
    main()
