"""A released DenseCLIP checkpoint as a model directory.

`python scripts/convert_original_denseclip.py CHECKPOINT.pth OUTPUT_DIR [--config_file CONFIG.py] [--tokenizer NAME]`
"""

import argparse
import sys

from denseclip_hf.checkpoints import DEFAULT_TOKENIZER
from denseclip_hf.original_release import convert_release


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="the released .pth; nothing in it is executed")
    parser.add_argument("output_dir", help="a new directory, written whole or not at all")
    parser.add_argument("--config_file", help="the original config (a Python file, read but not executed)")
    parser.add_argument("--tokenizer", default=DEFAULT_TOKENIZER, help="CLIP's, directory or Hub name (%(default)s)")
    parser.add_argument("--classes", help="JSON file of class names, if the checkpoint has none or others are wanted")
    args = parser.parse_args(argv)
    try:
        report = convert_release(**vars(args))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{report}\nThe model is in {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
