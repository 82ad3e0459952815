"""A released DenseCLIP checkpoint as a model directory.

`python scripts/convert_original_denseclip.py CHECKPOINT.pth OUTPUT_DIR [--options OPTIONS.json] [--tokenizer NAME]`
"""

import argparse
import json
from pathlib import Path

from denseclip_hf.conversion import DEFAULT_TOKENIZER, convert_release, sha256_of
from denseclip_hf.training.run_directory import one_sentence_errors


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="the released .pth; nothing in it is executed")
    parser.add_argument("output_dir", help="a new directory, written whole or not at all")
    parser.add_argument("--options", help="JSON file: options of the original's model that the checkpoint lacks")
    parser.add_argument("--tokenizer", default=DEFAULT_TOKENIZER, help="CLIP's, directory or Hub name (%(default)s)")
    parser.add_argument("--classes", help="JSON file of class names, if the checkpoint has none or others are wanted")
    args = parser.parse_args(argv)
    options = json.loads(Path(args.options).read_text(encoding="utf-8")) if args.options else None
    model = convert_release(args.checkpoint, args.output_dir, args.tokenizer, options, args.classes)
    print(f"{model.num_parameters() / 1e6:.3f} M parameters, {model.config.num_labels} classes")
    for file in sorted(Path(args.output_dir).iterdir()):
        print(f"sha256 {sha256_of(file)}  {file.name}")
    print(f"The model is in {args.output_dir}")


if __name__ == "__main__":
    main()
