"""A model to run elsewhere.

    denseclip export MODEL OUTPUT_DIR --format onnx [--size 512 512]
    denseclip export CLIP OUTPUT_DIR --words "sky,a red car"

Formats: onnx and torch_export (programs), frozen (a model directory without the text tower, for the Auto classes). A
program has the class embeddings folded in or, with --words, takes those of any words as an input.
"""

import argparse
from pathlib import Path

from ..devices import DTYPES
from ..files import new_directory
from .arguments import HelpFormatter, names, one_sentence_errors


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="a saved model, directory or Hub name")
    parser.add_argument("output_dir", help="a new directory, written whole or not at all")
    parser.add_argument("--format", choices=["onnx", "torch_export", "frozen"], default="onnx", help="what is written")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="the only size of images")
    parser.add_argument("--max_side", type=int, help="longest side of an image (default: 4096)")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights of a program")
    parser.add_argument(
        "--words", type=names, help="take any words, for a CLIP or a decoder of any words; these are written beside"
    )
    parser.add_argument("--opset", type=int, help="of ONNX (default: PyTorch's)")
    args = parser.parse_args(argv)
    of_programs = args.size or args.max_side is not None or args.dtype != "float32" or args.words
    if (args.format == "frozen" and of_programs) or (args.format != "onnx" and args.opset):
        parser.error(
            "--size, --max_side, --dtype and --words are for programs, --opset for ONNX alone: leave them out"
        )
    from transformers import AutoTokenizer

    from ..inference import load_model
    from ..model.loading_denseclip import load_pretrained
    from ..sharing import check_export, export, export_frozen
    from ..words import WordReader

    model, processor = load_model(args.model, "fp32")
    with new_directory(args.output_dir) as directory:
        if args.format == "frozen":
            export_frozen(model, processor, args.model, directory, Path(args.output_dir).name)
            print(f"{model.num_parameters() / 1e6:.1f} M parameters")
        else:
            size = (args.size[0], args.size[1]) if args.size else None
            options = {"size": size, "dtype": args.dtype}
            if args.max_side is not None:
                options["max_side"] = args.max_side
            embeds = words = None
            if args.words:
                reader = WordReader(model, load_pretrained(AutoTokenizer, args.model), processor)
                embeds = reader.encode(tuple(args.words))
                words = dict(zip(args.words, embeds, strict=True))
            path = export(model, processor, directory, args.format, args.opset, words, **options)
            difference = check_export(model, path, size, embeds)
            megabytes = path.stat().st_size / 1e6
            print(f"{path.name}: {megabytes:.1f} MB, largest difference of a logit {difference:.2e}")
    print(f"Written to {args.output_dir}")


if __name__ == "__main__":
    main()
