"""Segment images into any words, without training.

    denseclip words photo.jpg --model openai/clip-vit-base-patch16 --labels sky "a red car" "person|pedestrian"

MODEL is a CLIP as it is (or SigLIP, MetaCLIP 2, TIPSv2), or a trained segmenter. Everything else is as in
`denseclip predict`: masks, overlays and `classes.json` are written into the output directory.
"""

import sys

from .arguments import log_to_terminal, one_sentence_errors
from .predict import make_parser, run


@one_sentence_errors
def main(argv: list[str] | None = None) -> int:
    log_to_terminal()
    parser = make_parser(__doc__, "outputs/words")
    parser.add_argument(
        "--labels",
        nargs="+",
        required=True,
        help="a word or sentence for each class, or several with | between them, of which each pixel takes the best",
    )
    args = parser.parse_args(argv)
    return run(args, args.labels)


if __name__ == "__main__":
    sys.exit(main())
