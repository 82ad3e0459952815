"""Segment images and videos.

    denseclip predict photo.jpg folder "more/*.png" --model MODEL --output_dir OUT

Writes for each image a mask (indexed PNG), an overlay with a legend and, as asked, heat maps of score maps. The exit
code is 1 if something could not be segmented, such as an image of more than 89 million pixels (178 million with
--native_resolution) or 256 MiB from an address. A video's frames are images too (needs `pip install av`); of an
animation (GIF, WebP) the first is taken.
"""

import argparse
import sys

from transformers import AutoTokenizer

from ..data import parse_classes
from ..devices import device_of
from ..inference import LOADING_DTYPES, Segmenter, find_sources, load_model, predict_sources
from ..model.loading_denseclip import load_pretrained
from ..model.modeling_denseclip import ZERO_SHOT_TEMPLATES
from .arguments import HelpFormatter, log_to_terminal, one_sentence_errors


def names(text: str) -> list[str]:
    """Names with commas between them, or those of a file that [`parse_classes`] reads (which may hold commas)."""
    if "," in text:
        return [name.strip() for name in text.split(",")]
    try:
        return list(parse_classes(text).id2label.values())
    except (OSError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("inputs", nargs="+", help="files, folders, patterns, http(s) addresses")
    parser.add_argument("--model", required=True, help="directory, or name on the Hub")
    parser.add_argument("--output_dir", default="outputs/predictions", help="where masks and overlays go")
    parser.add_argument(
        "--score_maps",
        type=names,
        default=[],
        help="classes or words to draw heat maps of: car,tree, or a file (text with one a line, JSON, YAML, CSV)",
    )
    which = "segment these words, from score maps alone; given likewise; classes.json says which id is which"
    parser.add_argument("--words", type=names, default=[], help=which)
    parser.add_argument(
        "--templates", action="store_true", help="put words into CLIP-like sentences (untrained models)"
    )
    parser.add_argument("--tokenizer", help="CLIP's tokenizer; by default the model's own")
    parser.add_argument("--inference_mode", choices=["whole", "slide"], help="by default what the model's config says")
    parser.add_argument(
        "--native_resolution", action="store_true", help="segment large images in windows, without resizing them first"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        default=0.0,
        help="pixels whose class is less probable (0 to 1) get id 255, none",
    )
    parser.add_argument(
        "--certainty", action="store_true", help="write the probability of each pixel's class, as gray levels"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="images of one size run together")
    parser.add_argument("--dtype", choices=list(LOADING_DTYPES), default="auto", help="of the model")
    parser.add_argument("--device", default="auto", help="auto (a GPU if there is one), cpu, or a device of torch")
    parser.add_argument("--opacity", type=float, default=0.6, help="of the colors over images, 0 to 1")
    parser.add_argument("--every", type=int, default=1, help="of videos, take every Nth frame")
    parser.add_argument("--max_frames", type=int, help="of videos, take at most N frames")
    parser.add_argument(
        "--timeout", type=float, default=20.0, help="seconds that all of an image from an address may take"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that are there")
    return parser.parse_args(argv)


def load_segmenter(args: argparse.Namespace) -> Segmenter:
    device = device_of(args.device)
    model, image_processor = load_model(args.model, args.dtype)
    model.to(device)
    if args.inference_mode:
        model.config.inference_mode = args.inference_mode
    new_words = set(args.words + args.score_maps) - (set() if args.words else set(model.config.label2id))
    tokenizer = load_pretrained(AutoTokenizer, args.tokenizer or args.model) if new_words else None
    templates = ZERO_SHOT_TEMPLATES if args.templates else None
    return Segmenter(
        model,
        image_processor,
        tokenizer,
        args.words,
        args.score_maps,
        templates,
        threshold=args.threshold,
        certainty=args.certainty,
        native_resolution=args.native_resolution,
    )


@one_sentence_errors
def main(argv: list[str] | None = None) -> int:
    log_to_terminal()
    args = parse_arguments(argv)
    sources, problems = find_sources(args.inputs)
    done = 0
    if sources:
        options = {
            k: getattr(args, k) for k in ("batch_size", "opacity", "overwrite", "timeout", "every", "max_frames")
        }
        summary = predict_sources(load_segmenter(args), sources, args.output_dir, **options)
        done, problems = summary.done, [*problems, *summary.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{done} segmented into {args.output_dir}, {len(problems)} problems.")
    return 1 if problems or not done else 0


if __name__ == "__main__":
    sys.exit(main())
