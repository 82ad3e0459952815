"""Look through a data set before training on it; the exit code is 1 if something has to be mended.

denseclip check-data path/to/data_set --full
"""

import argparse
import os
import sys
import time
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers.hf_argparser import string_to_bool

from ..options import DataArguments
from .arguments import HelpFormatter, one_sentence_errors


if TYPE_CHECKING:
    from ..data import SegmentationData


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
    help_text = "Measure how many training samples a second one worker, and one per core, read."
    parser.add_argument("--speed", action="store_true", help=help_text)
    return parser.parse_args(argv)


@one_sentence_errors
def main(argv: list[str] | None = None) -> int:
    options = vars(parse(argv))
    from datasets import Dataset

    from ..data import check_dataset, load_segmentation_dataset

    full, max_samples, speed = (options.pop(name) for name in ("full", "max_samples", "speed"))
    data = load_segmentation_dataset(
        options.pop("dataset"), options.pop("dataset_config"), **options, read_first=False
    )
    report = check_dataset(data, full=full, max_samples=max_samples)
    print(report)
    if speed and report.ok and isinstance(data.train, Dataset):
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        for workers in sorted({1, cores}):
            rate = samples_per_second(data, workers)
            print(f"{rate:.1f} training samples of 512 x 512 pixels a second with {workers} data-loader workers.")
    return 0 if report.ok else 1


def samples_per_second(data: "SegmentationData", workers: int, seconds: float = 5.0) -> float:
    """
    How many samples of the training split a number of processes read and augment in a second, in random order.

    Files that were read shortly before come from memory, not from the disk.
    """
    from torch.utils.data import DataLoader, RandomSampler

    from ..transforms import AugmentedDataset, TrainTransform

    samples = AugmentedDataset(data.train, TrainTransform(ignore_index=data.ignore_index))
    order = RandomSampler(samples, replacement=True, num_samples=1 << 30)
    loader = iter(DataLoader(samples, batch_size=None, sampler=order, num_workers=workers))
    for _ in range(4 * workers):  # leave out what workers have read ahead
        next(loader)
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < seconds:
        next(loader)
        count += 1
    return count / passed


if __name__ == "__main__":
    sys.exit(main())
