"""The page of `app.py`, made with Gradio: a picture in; its classes, new words, score maps and downloads out."""

import functools
import html
import logging
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from gradio_client import utils as client_utils
from PIL import Image

from ..example import draw_scene
from .answers import (
    MAX_HEAT_MAPS,
    MAX_WORDS,
    Answer,
    AppModels,
    heat_maps,
    read_upload,
    read_words,
    save_mask,
    save_overlay,
    segment,
    shown,
)


logger = logging.getLogger(__name__)

MAX_FILE_SIZE = "20mb"
KEPT_SECONDS, CLEARING_SECONDS = 3600, 300  # how old a file becomes, and how often is looked
OWN_CLASSES, NEW_WORDS = "the model's classes", "words of your own"
LIMITS = (
    "Every pixel goes to the word it matches best, however poorly, so give words for the rest of the scene too. Words "
    "are read from score maps alone: the decoder knows only the classes it was trained with and takes no part, so "
    "outlines are coarse, and words far from those classes match less well."
)
OVERLAY = """
<p class="nothing">The segmented picture appears here.</p>
<div class="stage" hidden><img class="photo" alt="the picture"><canvas class="paint"></canvas>
<span class="tip" hidden></span></div><ul class="legend" hidden></ul>
"""
OPACITY_JS = "(value) => document.querySelector('#overlay').style.setProperty('--opacity', value)"


class Page(gr.Blocks):
    """A page that takes no address in place of a file: Gradio would fetch it, whole and however large."""

    async def preprocess_data(self, block_fn, inputs, *args, **kwargs):
        """[`gradio.Blocks.preprocess_data`]; raises `gradio.Error` for an address."""
        client_utils.traverse(inputs, _refuse_address, client_utils.is_file_obj_with_meta)
        return await super().preprocess_data(block_fn, inputs, *args, **kwargs)


def build_page(models: AppModels, examples: Sequence[str | Path] = ()) -> gr.Blocks:
    """
    The page for `models`, the first of which is loaded at once.

    Args:
        models ([`AppModels`]): to choose from.
        examples (`Sequence` of files): pictures to choose from; drawn scenes by default.

    Raises:
        ValueError, OSError: with one sentence, if the first model can not be loaded.
    """
    first, here = models.names[0], Path(__file__)
    with Page(title="DenseCLIP", analytics_enabled=False, delete_cache=(CLEARING_SECONDS, KEPT_SECONDS)) as page:
        gr.Markdown("# DenseCLIP\nEvery pixel is matched with the names of classes. Point at the result to read them.")
        last = gr.State(time_to_live=KEPT_SECONDS)
        with gr.Row():
            with gr.Column(scale=2):
                picture = gr.Image(
                    label="Picture", type="filepath", sources=["upload", "clipboard"], elem_id="picture"
                )
                # Gradio would open the file itself, and fail without saying why on what is no picture or too large.
                picture.preprocess = _path_of  # type: ignore
                gr.Examples([str(file) for file in examples or drawn_examples()], picture, label="Examples")
                name = gr.Dropdown(models.names, value=first, label="Model", elem_id="model")
                mode = gr.Radio([OWN_CLASSES, NEW_WORDS], value=OWN_CLASSES, label="Segment into", elem_id="mode")
                with gr.Column(visible=False) as words_part:
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
                start = gr.Button("Segment", variant="primary", elem_id="segment")
            with gr.Column(scale=3):
                overlay = gr.HTML(
                    html_template=OVERLAY,
                    css_template=here.with_name("overlay.css").read_text("utf-8"),
                    js_on_load=here.with_name("overlay.js").read_text("utf-8"),
                    apply_default_css=False,
                    elem_id="overlay",
                )
                opacity = gr.Slider(0, 1, 0.6, step=0.05, label="Opacity of the colours", elem_id="opacity")
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

        question = [picture, name, mode, words, sentences]
        # One at a time, of whatever kind; no part of an API.
        work: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}

        @one_sentence
        def on_segment(picture, name, mode, words, sentences, opacity):
            image = read_upload(picture)
            answer = segment(models, image, name, _words(mode, words), sentences)
            folder, file = new_folder(), Path(picture).name
            files = save_mask(answer, folder, file), save_overlay(answer, folder, file, opacity)
            kept = {"picture": picture, "mask": str(files[0]), "names": answer.names, "palette": answer.palette}
            buttons = [gr.DownloadButton(value=str(file), interactive=True) for file in files]
            return shown(answer), *buttons, gr.Dropdown(choices=answer.names), kept

        @one_sentence
        def on_opacity(kept, opacity):
            if not kept:
                return gr.skip()
            segmentation = np.asarray(Image.open(kept["mask"]))
            answer = Answer(read_upload(kept["picture"]), segmentation, kept["names"], kept["palette"])
            return gr.DownloadButton(
                value=str(save_overlay(answer, new_folder(), Path(kept["picture"]).name, opacity))
            )

        @one_sentence
        def on_draw(picture, name, mode, words, sentences, chosen):
            return heat_maps(models, read_upload(picture), name, chosen or (), _words(mode, words), sentences)

        @one_sentence
        def on_model(name):
            classes = models.classes(name)
            return "\n".join(classes), gr.Dropdown(choices=classes, value=[])

        answers = [overlay, mask_file, overlay_file, chosen, last]
        start.click(on_segment, [*question, opacity], answers, show_progress_on=overlay, **work)
        draw.click(on_draw, [*question, chosen], maps, **work)
        name.change(on_model, name, [words, chosen], show_progress_on=words, **work)
        opacity.input(None, opacity, js=OPACITY_JS)
        opacity.release(on_opacity, [last, opacity], overlay_file, show_progress="hidden", **work)
        mode.change(lambda mode: gr.Column(visible=mode == NEW_WORDS), mode, words_part, api_visibility="private")
    return page.queue(max_size=20, default_concurrency_limit=1)


def launch(page: gr.Blocks, models: AppModels, host: str | None = None, port: int | None = None) -> None:
    """Serve the page until it is interrupted: no share link, no files but uploads and what the page made of them."""
    page.launch(
        server_name=host,
        server_port=port,
        share=False,
        max_file_size=MAX_FILE_SIZE,
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
    """A new folder, of a name that can not be guessed, among the files that Gradio serves and clears away."""
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
        raise gr.Error("an address is not fetched: upload the picture.", print_exception=False)


def _path_of(upload: Any) -> str | None:
    return upload and upload.path


def _words(mode: str, words: str) -> list[str]:
    return read_words(words) if mode == NEW_WORDS else []


__all__ = ["build_page", "launch"]
