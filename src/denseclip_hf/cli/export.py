"""A model to run elsewhere.

    denseclip export MODEL OUTPUT_DIR --format onnx [--size 512 512]
    denseclip export MODEL OUTPUT_DIR --quantize int8 --calibration FOLDER_OF_IMAGES
    denseclip export CLIP OUTPUT_DIR --words "sky,a red car"

Formats: onnx and torch_export (programs), frozen (a model directory without the text tower, for the Auto classes). A
program has the class embeddings folded in or, with --words, takes those of any words as an input.
"""

import argparse
from pathlib import Path

from ..devices import DTYPES
from ..files import new_directory
from ..options import MAX_SIDE, PROGRAMS
from .arguments import HelpFormatter, names, one_sentence_errors


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="a saved model, directory or Hub name")
    parser.add_argument("output_dir", help="a new directory, written whole or not at all")
    parser.add_argument("--format", choices=[*PROGRAMS, "frozen"], default="onnx", help="what is written")
    parser.add_argument("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="the only size of images")
    parser.add_argument("--max_side", type=int, default=MAX_SIDE, help="longest side of an image")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of the weights of a program")
    parser.add_argument(
        "--words", type=names, help="take any words, for a CLIP or a decoder of any words; these are written beside"
    )
    parser.add_argument("--opset", type=int, help="of ONNX (default: PyTorch's)")
    parser.add_argument("--quantize", choices=["int8"], help="of ONNX: compute in 8 bits where that is faster")
    parser.add_argument("--calibration", metavar="FOLDER", help="images like those to come, some 50, for --quantize")
    args = parser.parse_args(argv)
    of_programs = args.size or args.max_side != MAX_SIDE or args.dtype != "float32" or args.words
    if (args.format == "frozen" and of_programs) or (args.format != "onnx" and (args.opset or args.quantize)):
        parser.error(
            "--size, --max_side, --dtype and --words are for programs, --opset and --quantize for ONNX alone: leave "
            "them out"
        )
    if bool(args.quantize) != bool(args.calibration) or (args.quantize and args.dtype not in ("float32", "fp32")):
        parser.error("--quantize needs --calibration and weights in float32")
    from transformers import AutoTokenizer

    from ..inference import load_model
    from ..model.loading_denseclip import load_pretrained
    from ..sharing import check_export, export, export_frozen, quantize
    from ..words import WordReader

    model, processor = load_model(args.model, "fp32")
    with new_directory(args.output_dir) as directory:
        if args.format == "frozen":
            export_frozen(model, processor, args.model, directory, Path(args.output_dir).name)
            print(f"{model.num_parameters() / 1e6:.1f} M parameters")
        else:
            size = (args.size[0], args.size[1]) if args.size else None
            options = {"size": size, "dtype": args.dtype, "max_side": args.max_side}
            embeds = words = None
            if args.words:
                reader = WordReader(model, load_pretrained(AutoTokenizer, args.model), processor)
                embeds = reader.encode(tuple(args.words))
                words = dict(zip(args.words, embeds, strict=True))
            path = export(model, processor, directory, args.format, args.opset, words, **options)
            said = f"largest difference of a logit {check_export(model, path, size, embeds):.2e}"
            if args.quantize:
                kept = quantize(model, processor, path, args.calibration, size, embeds)
                said += f"; in int8 {kept:.2%} of the calibration images' places keep their class"
            print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {said}")
    print(f"Written to {args.output_dir}")


if __name__ == "__main__":
    main()
