"""Look through a data set before training on it; the exit code is 1 if something has to be mended.

denseclip check-data path/to/data_set --full
"""

import argparse
import sys
from dataclasses import fields
from typing import Any

from transformers.hf_argparser import string_to_bool

from ..data import check_dataset, load_segmentation_dataset
from ..training.recipe import DataArguments
from .arguments import HelpFormatter, one_sentence_errors


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("dataset", help="A folder, or the name of a data set on the Hub.")
    helps = {option.name: option.metadata["help"] for option in fields(DataArguments)}
    for name in ("dataset_config", "classes", "train_split", "validation_split", "image_column", "label_column"):
        parser.add_argument(f"--{name}", help=helps[name])
    parser.add_argument("--ignore_index", type=int, help=helps["ignore_index"])
    yes: dict[str, Any] = {"nargs": "?", "const": True, "type": string_to_bool}  # as training and evaluation read it
    parser.add_argument("--do_reduce_labels", **yes, help=helps["do_reduce_labels"])
    parser.add_argument("--skip_unpaired", **yes, default=False, help=helps["skip_unpaired"])
    parser.add_argument("--streaming", **yes, default=False, help=helps["streaming"])
    parser.add_argument("--full", action="store_true", help="Look at every sample.")
    parser.add_argument("--max_samples", type=int, default=50, help="Samples per split without --full.")
    return parser.parse_args(argv)


@one_sentence_errors
def main(argv: list[str] | None = None) -> int:
    options = vars(parse(argv))
    full, max_samples = options.pop("full"), options.pop("max_samples")
    data = load_segmentation_dataset(
        options.pop("dataset"), options.pop("dataset_config"), **options, read_first=False
    )
    report = check_dataset(data, full=full, max_samples=max_samples)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
