"""Look through a data set before training on it; the exit code is 1 if something has to be mended.

python scripts/check_data.py path/to/data_set --full
"""

import argparse
import sys

from denseclip_hf.data import load_segmentation_dataset
from denseclip_hf.data_check import check_dataset
from denseclip_hf.runs import one_sentence_errors


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", help="folder, or name of a data set on the Hub")
    parser.add_argument("--dataset_config", dest="config_name", help="configuration of a Hub data set")
    parser.add_argument("--classes", help="class names: a JSON or text file (one a line), or names with commas")
    parser.add_argument("--train_split", help="name of the training split")
    parser.add_argument("--validation_split", help="name of the validation split")
    parser.add_argument("--image_column", help="column with the pictures")
    parser.add_argument("--label_column", help="column with the masks")
    parser.add_argument("--ignore_index", type=int, help="id of pixels without a class (default: 255)")
    parser.add_argument(
        "--do_reduce_labels",
        action=argparse.BooleanOptionalAction,
        help="whether 0 means no class in the masks and the classes count from 1",
    )
    parser.add_argument("--streaming", action="store_true", help="read a Hub data set without downloading it first")
    parser.add_argument("--full", action="store_true", help="look at every sample")
    parser.add_argument("--max_samples", type=int, default=50, help="samples per split without --full (default: 50)")
    return parser.parse_args()


@one_sentence_errors
def main() -> int:
    options = vars(parse_arguments())
    full, max_samples = options.pop("full"), options.pop("max_samples")
    data = load_segmentation_dataset(options.pop("dataset"), **options, read_first=False)
    report = check_dataset(data, full=full, max_samples=max_samples)
    print(report)
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
