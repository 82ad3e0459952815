"""The page, made with Gradio: an image in; its classes, words, score maps and downloads out. And its API."""

import functools
import html
import logging
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio_client import utils as client_utils
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse

from ..example import draw_scene
from .answers import (
    MAX_HEAT_MAPS,
    MAX_WORDS,
    AppModels,
    annotated,
    heat_maps,
    read_upload,
    read_words,
    save_mask,
    save_overlay,
    segment,
)


logger = logging.getLogger(__name__)

MAX_FILE_SIZE = "20mb"
# Uploads at a time, and bytes of uploads and results that are kept: more are refused until some are cleared away.
MAX_UPLOADS, MAX_KEPT_BYTES = 8, 2 << 30
KEPT_SECONDS, CLEARING_SECONDS = 3600, 300  # a file's age when it is deleted, and the time between two looks
OWN_CLASSES, NEW_WORDS = "the model's classes", "words of your own"
LIMITS = (
    "Every pixel goes to the word it matches best, however poorly: give words for the rest of the scene too, or leave "
    "out what is uncertain. Outlines are coarse, because a decoder that was trained on other classes takes no part."
)


class Page(gr.Blocks):
    """A page that takes no address in place of a file: Gradio would fetch it, whole and however large."""

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        """[`gradio.Blocks.preprocess_data`]; raises `gradio.Error` for an address."""
        client_utils.traverse(inputs, _refuse_address, client_utils.is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


class UploadLimits:
    """Refuses uploads (429) while too many arrive at once, or what is kept fills too much of the disk."""

    def __init__(self, app):
        self.app, self.in_flight = app, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http" or not scope["path"].rstrip("/").endswith("/upload"):
            return await self.app(scope, receive, send)
        if self.in_flight >= MAX_UPLOADS or _kept_bytes() > MAX_KEPT_BYTES:
            return await PlainTextResponse("too many uploads: try again later.", 429)(scope, receive, send)
        self.in_flight += 1
        try:
            return await self.app(scope, receive, send)
        finally:
            self.in_flight -= 1


def _kept_bytes() -> int:
    total = 0
    for folder, _, files in os.walk(gr.utils.get_upload_folder()):
        for file in files:
            try:
                total += os.path.getsize(os.path.join(folder, file))
            except OSError:  # it has just been cleared away
                continue
    return total


def build_page(models: AppModels, examples: Sequence[str | Path] = ()) -> gr.Blocks:
    """
    The page for `models`, the first of which is loaded at once.

    Programs can ask it too, by `gradio_client`: the endpoints `/segment` and `/words` answer with a mask file and the
    names of its ids.

    Args:
        models ([`AppModels`]): to choose from.
        examples (`Sequence` of files): images to choose from; drawn scenes by default.

    Raises:
        ValueError, OSError: with one sentence, if the first model cannot be loaded.
    """
    first = models.names[0]

    def mode_of(name: str) -> dict[str, Any]:
        own = models.has_classes(name)
        return {"value": OWN_CLASSES if own else NEW_WORDS, "visible": own}

    with Page(title="DenseCLIP", analytics_enabled=False, delete_cache=(CLEARING_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown("# DenseCLIP\nEvery pixel is matched with the names of classes.")
        with gr.Row():
            with gr.Column(scale=2):
                image = gr.Image(label="Image", type="filepath", sources=["upload", "clipboard"], elem_id="image")
                # Gradio would open the file itself, and fail without saying why on what is no image or too large.
                image.preprocess = _path_of  # type: ignore
                gr.Examples([str(file) for file in examples or drawn_examples()], image, label="Examples")
                name = gr.Dropdown(models.names, value=first, label="Model", elem_id="model")
                mode = gr.Radio([OWN_CLASSES, NEW_WORDS], label="Segment into", elem_id="mode", **mode_of(first))
                with gr.Column(visible=not models.has_classes(first)) as words_part:
                    words = gr.Textbox(
                        "\n".join(models.classes(first)),
                        label=f"Words or sentences, one class a line, at most {MAX_WORDS}",
                        lines=6,
                        max_lines=16,
                        elem_id="words",
                    )
                    sentences = gr.Checkbox(
                        label='put them into CLIP\'s sentences ("a photo of a …"), for a CLIP that was not fine-tuned',
                        elem_id="sentences",
                    )
                    gr.Markdown(LIMITS)
                threshold = gr.Slider(
                    0, 1, 0, step=0.05, label="Leave out pixels whose class is less probable than", elem_id="threshold"
                )
                start = gr.Button("Segment", variant="primary", elem_id="segment")
            with gr.Column(scale=3):
                result = gr.AnnotatedImage(label="Point at a class to see it alone", format="png", elem_id="result")
                with gr.Row():
                    mask_file = gr.DownloadButton("Mask (indexed PNG)", interactive=False, elem_id="mask")
                    overlay_file = gr.DownloadButton("Overlay (PNG)", interactive=False, elem_id="painted")
                with gr.Group():
                    chosen = gr.Dropdown(
                        models.classes(first),
                        multiselect=True,
                        allow_custom_value=True,
                        max_choices=MAX_HEAT_MAPS,
                        label="Score maps: how well each place matches a class, or any words you type",
                        elem_id="chosen",
                    )
                    draw = gr.Button("Draw heat maps", elem_id="draw")
                    maps = gr.Gallery(
                        label="Heat maps, with the lowest and highest cosine",
                        columns=3,
                        height="auto",
                        object_fit="contain",
                        format="png",
                        elem_id="maps",
                    )
        # The endpoints of the API need parts of the page, which stay invisible: buttons, and places for the answers.
        mask, classes = gr.File(visible=False, label="Mask"), gr.JSON(visible=False, label="Classes")
        ask_segment, ask_words = gr.Button(visible=False), gr.Button(visible=False)

        @one_sentence
        def on_segment(image, name, mode, words, sentences, threshold):
            wanted = read_words(words) if mode == NEW_WORDS else []
            answer = segment(models, read_upload(image), name, wanted, sentences, threshold)
            folder, file = new_folder(), Path(image).name
            files = save_mask(answer, folder, file), save_overlay(answer, folder, file)
            value, colors = annotated(answer)
            buttons = [gr.DownloadButton(value=str(file), interactive=True) for file in files]
            return gr.AnnotatedImage(value=value, color_map=colors), *buttons, gr.Dropdown(choices=answer.names)

        @one_sentence
        def on_draw(image, name, mode, words, sentences, chosen):
            wanted = read_words(words) if mode == NEW_WORDS else []
            return heat_maps(models, read_upload(image), name, chosen or (), wanted, sentences)

        @one_sentence
        def on_model(name):
            classes = models.classes(name)
            return "\n".join(classes), gr.Dropdown(choices=classes, value=[]), gr.Radio(**mode_of(name))

        @one_sentence
        def on_ask(image, name, threshold, words=None, sentences=False):
            wanted = [] if words is None else read_words(words)
            answer = segment(models, read_upload(image), name, wanted, sentences, threshold)
            id2label = {str(index): label for index, label in enumerate(answer.names)}
            return str(save_mask(answer, new_folder(), Path(image).name)), {"id2label": id2label}

        # One at a time, of whatever kind.
        work: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
        own: dict[str, Any] = {**work, "api_visibility": "private"}
        question = [image, name, mode, words, sentences]
        start.click(on_segment, [*question, threshold], [result, mask_file, overlay_file, chosen], **own)
        draw.click(on_draw, [*question, chosen], maps, **own)
        name.change(on_model, name, [words, chosen, mode], show_progress_on=words, **own)
        mode.change(lambda mode: gr.Column(visible=mode == NEW_WORDS), mode, words_part, api_visibility="private")
        asked = [image, name, threshold]
        ask_segment.click(on_ask, asked, [mask, classes], api_name="segment", **work)
        ask_words.click(on_ask, [*asked, words, sentences], [mask, classes], api_name="words", **work)
    return page.queue(max_size=20, default_concurrency_limit=1)


def launch(page: gr.Blocks, models: AppModels, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is interrupted: no share link, no files but uploads and what the page made of them."""
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=MAX_FILE_SIZE,
        app_kwargs={"middleware": [Middleware(UploadLimits)]},
        allowed_paths=[],
        blocked_paths=[str(folder) for folder in models.directories],
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none from the network
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        _frontend=False,  # no self-check, with which Gradio gives up on a machine too busy to answer in 3 seconds
        quiet=True,  # it would advertise the share link
        prevent_thread_lock=True,
    )
    logger.info("The page is at %s (Ctrl-C ends it).", str(page.local_url).rstrip("/"))
    page.block_thread()


def one_sentence(function: Callable) -> Callable:
    """A handler whose `ValueError` and `OSError` visitors read as they are; other errors tell them nothing."""

    @functools.wraps(function)
    def wrapped(*args):
        try:
            return function(*args)
        except (ValueError, OSError) as error:
            logger.info("refused: %s", error)
            raise gr.Error(html.escape(str(error)), print_exception=False) from error

    return wrapped


def new_folder() -> Path:
    """A new folder, of a name that cannot be guessed, among the files that Gradio serves and clears away."""
    return Path(gr.utils.get_upload_folder()) / secrets.token_hex(20)


def drawn_examples(count: int = 4, size: tuple[int, int] = (384, 288)) -> list[Path]:
    """Files with the built-in example's first held-out scenes."""
    folder = new_folder()
    folder.mkdir(parents=True)
    files = [folder / f"scene_{index}.png" for index in range(count)]
    for index, file in enumerate(files):
        draw_scene(index, split="val", size=size).image.save(file)
    return files


def _refuse_address(file: dict[str, Any]) -> None:
    if client_utils.is_http_url_like(file["path"]):
        raise gr.Error("an address is not fetched: upload the image.", print_exception=False)


def _path_of(upload: Any) -> str | None:
    return upload and upload.path
