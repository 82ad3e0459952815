"""A released DenseCLIP checkpoint as a model directory.

`python scripts/convert_original_denseclip.py CHECKPOINT.pth OUTPUT_DIR [--config_file CONFIG.py] [--tokenizer NAME]`
"""

import argparse

from denseclip_hf.conversion.release import convert_release
from denseclip_hf.conversion.weights import DEFAULT_TOKENIZER
from denseclip_hf.training.run_directory import one_sentence_errors


@one_sentence_errors
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="the released .pth; nothing in it is executed")
    parser.add_argument("output_dir", help="a new directory, written whole or not at all")
    parser.add_argument("--config_file", help="the original config (a Python file, read but not executed)")
    parser.add_argument("--tokenizer", default=DEFAULT_TOKENIZER, help="CLIP's, directory or Hub name (%(default)s)")
    parser.add_argument("--classes", help="JSON file of class names, if the checkpoint has none or others are wanted")
    args = parser.parse_args(argv)
    report = convert_release(**vars(args))
    print(f"{report}\nThe model is in {args.output_dir}")


if __name__ == "__main__":
    main()
