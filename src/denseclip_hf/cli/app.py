"""Open a page to try DenseCLIP models on one's own images.

    denseclip app                               # words of your own on a CLIP as it is, openai/clip-vit-base-patch16
    denseclip app --model outputs/demo/model    # a trained model's classes, and words

Several models can be given, by directory or by name on the Hub. Without `--model` they are read from the environment
variable DENSECLIP_MODELS (with commas between them), as a Space has it.
"""

import argparse
import logging
import os

from ..devices import LOADING_DTYPES, needed
from ..options import DEFAULT_CLIP
from .arguments import HelpFormatter, log_to_terminal, one_sentence_errors


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--model", action="append", help="directory, or name on the Hub; may be given several times")
    parser.add_argument("--examples", nargs="*", default=[], help="images to choose from: files, folders, patterns")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, or a device of torch")
    parser.add_argument("--dtype", choices=list(LOADING_DTYPES), default="auto", help="of the models")
    parser.add_argument("--host", help="address to listen at; by default GRADIO_SERVER_NAME or 127.0.0.1")
    parser.add_argument("--port", type=int, help="by default GRADIO_SERVER_PORT, or a free one from 7860")
    args = parser.parse_args(argv)
    needed("gradio", "the page", "'gradio>=6.31,<7'")
    from ..app import AppModels
    from ..app.page import build_page, launch
    from ..inference import find_sources

    log_to_terminal()
    from_environment = [name.strip() for name in os.environ.get("DENSECLIP_MODELS", "").split(",") if name.strip()]
    models = AppModels(args.model or from_environment or [DEFAULT_CLIP], args.device, args.dtype)
    sources, problems = find_sources(args.examples)
    for problem in problems:
        logging.warning(problem)
    launch(build_page(models, [source.address for source in sources]), models, args.host, args.port)


if __name__ == "__main__":
    main()
