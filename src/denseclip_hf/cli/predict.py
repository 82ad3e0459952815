"""Segment images and videos.

    denseclip predict photo.jpg folder "more/*.png" --model MODEL --output_dir OUT [--words "sky,a red car"]

MODEL is a trained segmenter or, with --words, any CLIP.

Writes for each image a mask (indexed PNG), an overlay with a legend and, as asked, heat maps of score maps, and into
`manifest.jsonl` a line: its files, or the problem. The same command goes on where it stopped. On several devices:
`accelerate launch -m denseclip_hf.cli.predict ...` shares the images out, each process with a manifest of its own.

The exit code is 1 if something could not be segmented, such as an image of more than 89 million pixels (178 million
with --native_resolution) or 256 MiB from an address. A video's frames are images too (needs `pip install av`); of an
animation (GIF, WebP) the first is taken.
"""

import argparse
import os
import sys
from dataclasses import fields
from datetime import timedelta
from typing import TYPE_CHECKING

from ..devices import LOADING_DTYPES, device_of
from ..options import WindowOptions, WordOptions
from .arguments import DataclassParser, log_to_terminal, names, one_sentence_errors


if TYPE_CHECKING:
    from ..inference import Segmenter


def make_parser(description: str | None, output_dir: str) -> DataclassParser:
    """The flags of a command that segments files, but for those that say into which classes."""
    usage = "%(prog)s INPUT ... [--option VALUE ...]"
    parser = DataclassParser([WordOptions, WindowOptions], description, usage)
    parser.add_argument("inputs", nargs="+", help="files, folders, patterns, http(s) addresses")
    parser.add_argument("--model", required=True, help="directory, or name on the Hub")
    parser.add_argument("--output_dir", default=output_dir, help="where masks and overlays go")
    parser.add_argument(
        "--score_maps",
        type=names,
        default=[],
        help="classes or words to draw heat maps of: car,tree, or a file (text with one a line, JSON, YAML, CSV)",
    )
    parser.add_argument("--tokenizer", help="CLIP's tokenizer; by default the model's own")
    parser.add_argument(
        "--native_resolution", action="store_true", help="segment large images in windows, without resizing them first"
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
    parser.add_argument("--overwrite", action="store_true", help="segment all again, and replace files that are there")
    return parser


def load_segmenter(args: argparse.Namespace, words: list[str]) -> "Segmenter":
    """The model of `args`, asked for `words` (phrasings with | between them) or for its own classes."""
    from transformers import AutoTokenizer

    from ..inference import Segmenter, load_model
    from ..model.loading_denseclip import load_pretrained
    from ..words import set_options

    options = WordOptions(**{option.name: getattr(args, option.name) for option in fields(WordOptions)})
    windows = WindowOptions(args.inference_mode, args.crop_size, args.stride)
    device = device_of(args.device)
    model, image_processor = load_model(args.model, args.dtype)
    model.to(device)
    set_options(model, windows.settings())
    needs_tokenizer = words or not set(args.score_maps) <= set(model.config.label2id)
    tokenizer = load_pretrained(AutoTokenizer, args.tokenizer or args.model) if needs_tokenizer else None
    asked = {"certainty": args.certainty, "native_resolution": args.native_resolution}
    classes = [[text.strip() for text in word.split("|")] for word in words]
    return Segmenter(model, image_processor, tokenizer, classes, args.score_maps, options, **asked)


def run(args: argparse.Namespace, words: list[str]) -> int:
    """Segment what `args` name and write the results; the exit code."""
    from ..inference import Summary, find_sources, predict_sources

    rank, world = 0, 1
    found, summary = find_sources(args.inputs), Summary()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        import torch
        from accelerate import PartialState
        from accelerate.utils import broadcast_object_list, gather_object

        # They tell each other names and numbers alone, by way of the CPU. The first to end waits for the last.
        state = PartialState(cpu=True, timeout=timedelta(days=30))
        if torch.cuda.is_available():
            torch.cuda.set_device(state.local_process_index % torch.cuda.device_count())
        rank, world = state.process_index, state.num_processes
        (found,) = broadcast_object_list([found])  # a file may have come since
    sources, problems = found
    if sources:
        options = {
            k: getattr(args, k) for k in ("batch_size", "opacity", "overwrite", "timeout", "every", "max_frames")
        }
        options |= {"rank": rank, "world": world, "progress": rank == 0}
        summary = predict_sources(load_segmenter(args, words), sources, args.output_dir, **options)
    summaries = [summary] if world == 1 else gather_object([summary])
    if rank:
        return 0  # the first reports for all
    done, skipped = sum(one.done for one in summaries), sum(one.skipped for one in summaries)
    problems += [problem for one in summaries for problem in one.problems]
    for problem in problems:
        print(problem, file=sys.stderr)
    earlier = f" ({skipped} were there already)" if skipped else ""
    print(f"{done} segmented into {args.output_dir}{earlier}, {len(problems)} problems.")
    return 1 if problems or not done + skipped else 0


@one_sentence_errors
def main(argv: list[str] | None = None) -> int:
    log_to_terminal()
    parser = make_parser(__doc__, "outputs/predictions")
    which = "segment these words (or phrasings: person|pedestrian) instead of the model's classes; commas between them"
    parser.add_argument("--words", type=names, default=[], help=which)
    args = parser.parse_args(argv)
    return run(args, args.words)


if __name__ == "__main__":
    sys.exit(main())
