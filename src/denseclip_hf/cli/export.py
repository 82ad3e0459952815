"""A model to run elsewhere.

    denseclip export MODEL OUTPUT_DIR --format onnx [--image photo.jpg]

Formats: onnx and torch_export (programs with the class embeddings folded in), frozen (a model directory without the
text tower, for the Auto classes).
"""

import argparse
from pathlib import Path

from PIL import Image

from ..files import new_directory
from ..inference import load_model
from ..inference.sources import Source, read_picture
from ..sharing.export import FILES, check_export, export, export_frozen
from .arguments import HelpFormatter, one_sentence_errors


def drawn() -> Image.Image:
    linear, radial = Image.linear_gradient("L"), Image.radial_gradient("L")
    return Image.merge("RGB", [linear, radial, linear.rotate(90)]).resize((320, 256))


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("model", help="a saved model, directory or Hub name")
    parser.add_argument("output_dir", help="a new directory, written whole or not at all")
    parser.add_argument("--format", choices=[*FILES, "frozen"], default="onnx", help="what is written")
    parser.add_argument("--image", help="picture that the result is checked on (default: a drawn one)")
    args = parser.parse_args(argv)
    image = read_picture(Source(args.image, "image")) if args.image else drawn()
    model, processor = load_model(args.model, "fp32")
    with new_directory(args.output_dir) as directory:
        if args.format == "frozen":
            export_frozen(model, processor, args.model, directory, Path(args.output_dir).name)
            print(f"{model.num_parameters() / 1e6:.1f} M parameters")
        else:
            path = export(model, processor, directory, args.format)
            difference = check_export(model, processor, path, image)
            size = path.stat().st_size / 1e6
            print(f"{path.name}: {size:.1f} MB, largest difference of a logit {difference:.2e}")
    print(f"Written to {args.output_dir}")


if __name__ == "__main__":
    main()
