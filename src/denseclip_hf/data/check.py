"""Looking through a data set before training on it."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import datasets
import numpy as np

from .loading import Rows, SegmentationData
from .reading import SampleReader, name_of, remarks


# An image whose long side is resized to 2048 pixels then has 32, the stride of the coarsest map, on its short side.
MAX_ASPECT = 64


@dataclass
class SplitReport:
    """
    What was found in one split.

    Args:
        num_samples: samples in the split; None for a stream.
        num_checked: samples looked at.
        sizes: (width, height) in pixels of each sample that was sound.
        pixels_per_class: K counts.
        images_per_class: K counts of masks that show the class.
        void_pixels: pixels without a class.
        void_masks: masks in which no pixel has a class.
        problems: one sentence per sample that cannot be used, or one about all of them.
        remarks: what does not keep the split from being used, but may not be meant: files that are left out, bands
            and pages that are not read.
    """

    num_samples: int | None
    pixels_per_class: np.ndarray
    images_per_class: np.ndarray
    num_checked: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    void_pixels: int = 0
    void_masks: int = 0
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    @property
    def num_pixels(self) -> int:
        """Pixels of the sound samples, with and without a class."""
        return self.void_pixels + int(self.pixels_per_class.sum())

    @property
    def void_share(self) -> float:
        """Share of the pixels that have no class, 0…1; NaN if there are none."""
        return self.void_pixels / self.num_pixels if self.num_pixels else float("nan")


@dataclass
class DatasetReport:
    """The reports by split; `str()` gives a table."""

    id2label: dict[int, str]
    splits: dict[str, SplitReport]

    @property
    def problems(self) -> list[str]:
        """One sentence per sample that cannot be used."""
        return [f"{name}: {problem}" for name, split in self.splits.items() for problem in split.problems]

    @property
    def unseen_classes(self) -> list[str]:
        """Names of classes that no mask looked at shows."""
        counts = [split.images_per_class for split in self.splits.values()]
        return [name for index, name in self.id2label.items() if not any(count[index] for count in counts)]

    @property
    def ok(self) -> bool:
        """Whether every sample looked at can be used."""
        return not self.problems

    def __str__(self) -> str:
        width = max(len("(no class)"), *map(len, self.id2label.values()))

        def line(number: object, name: str, cells: list[str]) -> str:
            return f"{number:>4} {name:<{width}}" + "".join(f"{cell:>22}" for cell in cells)

        splits = list(self.splits.values())
        lines = [_heading(name, split) for name, split in self.splits.items()]
        lines += ["", line("", "", list(self.splits)), line("id", "class", ["pixels    masks"] * len(splits))]
        lines += [line(i, name, [_cell(split, i) for split in splits]) for i, name in self.id2label.items()]
        lines += [line("", "(no class)", [f"{split.void_share:.2%}{'':9}" for split in splits]), ""]
        lines += [f"{name}: {remark}." for name, split in self.splits.items() for remark in split.remarks]
        if self.unseen_classes:
            lines += [f"In none of the masks looked at: {', '.join(self.unseen_classes)}.", ""]
        lines += [f"Problems: {len(self.problems)}", *_by_kind(self.problems)] if self.problems else ["No problems."]
        return "\n".join(lines)


def _by_kind(problems: list[str]) -> Iterator[str]:
    """The first three problems of each kind, which differ in names and numbers only, and the others' files."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kind = " ".join(word for word in problem.split() if not re.search(r"[\d/\\]|\.\w", word))
        kinds.setdefault(kind, []).append(problem)
    for alike in kinds.values():
        yield from alike[:3]
        if rest := alike[3:]:
            files = [re.search(r"[/\\]([^/\\]+?\.\w+) ", problem) for problem in rest]
            names = [file[1] if file else problem.split(": ")[1] for file, problem in zip(files, rest, strict=True)]
            yield f"… and {len(rest)} more of this kind: {', '.join(names)}"


def _heading(name: str, split: SplitReport) -> str:
    of_all = "" if split.num_samples is None else f" of {split.num_samples}"
    if not split.sizes:
        return f"{name}: {split.num_checked}{of_all} samples looked at, none of them sound"
    sizes = np.array(split.sizes)
    low, middle, high = (f"{w}x{h}" for w, h in np.quantile(sizes, (0, 0.5, 1), axis=0).round().astype(int))
    size = f"all {low}" if low == high else f"{low} to {high}, median {middle}"
    void = f", {split.void_masks} masks without any class" if split.void_masks else ""
    return f"{name}: {split.num_checked}{of_all} samples looked at, {size} pixels{void}"


def _cell(split: SplitReport, index: int) -> str:
    share = split.pixels_per_class[index] / split.num_pixels if split.num_pixels else 0.0
    return f"{share:.2%} {split.images_per_class[index]:>8}"


def check_dataset(data: SegmentationData, *, full: bool = False, max_samples: int = 50) -> DatasetReport:
    """
    Read samples of every split completely and collect sizes, class frequencies and problems; nothing is raised for a
    sample that cannot be used.

    Args:
        data: what [`load_segmentation_dataset`] returns; with `read_first=False` there, its first samples may be bad.
        full: look at all samples.
        max_samples: otherwise, look at this many per split (at least one), evenly spaced or, of a stream, the first.
    """
    splits = {"train": data.train, "validation": data.validation}
    limit = None if full else max(max_samples, 1)
    found = {name: rows for name, rows in splits.items() if rows is not None}
    report = DatasetReport(
        data.id2label, {name: _check_split(name, rows, data, limit) for name, rows in found.items()}
    )
    seen = np.sum([split.pixels_per_class for split in report.splits.values()], axis=0)
    if report.ok and not (seen[1:] if len(seen) == 2 else seen).any():  # perhaps only in those that were looked at
        kept = [rows for rows in found.values() if isinstance(rows, datasets.Dataset)]
        if fault := data.reader.fault_of_masks(data.reader.readable_masks(kept)):
            next(iter(report.splits.values())).problems.append(fault)
    return report


def _check_split(name: str, rows: Rows, data: SegmentationData, limit: int | None) -> SplitReport:
    num_labels = len(data.id2label)
    report = SplitReport(
        len(rows) if isinstance(rows, datasets.Dataset) else None,
        np.zeros(num_labels, dtype=np.int64),
        np.zeros(num_labels, dtype=np.int64),
    )
    odd: Counter[str] = Counter()
    example: dict[str, str] = {}
    samples = _of_dataset(rows, data.reader, limit) if isinstance(rows, datasets.Dataset) else _of_stream(rows, limit)
    for position, sample, found in samples:
        report.num_checked += 1
        if isinstance(sample, Exception):
            report.problems.append(f"sample {position}: {sample}")
            continue
        mask = sample["mask"]
        labeled = mask[mask != data.ignore_index]
        counts = np.bincount(labeled, minlength=num_labels)
        report.sizes.append(sample["image"].size)
        if max(sample["image"].size) > MAX_ASPECT * min(sample["image"].size):
            report.problems.append(
                f"sample {position}: {name_of(sample['image'])} is {'x'.join(map(str, sample['image'].size))} pixels: "
                f"with a side more than {MAX_ASPECT} times the other it cannot be segmented; crop it or remove it."
            )
        report.pixels_per_class += counts
        report.images_per_class += counts > 0
        report.void_pixels += mask.size - labeled.size
        report.void_masks += not labeled.size
        odd.update(found)
        example = {remark: name_of(sample["image"]) for remark in found} | example
    report.remarks = [f"left out: {sentence}" for sentence in data.left_out.get(name, [])]
    report.remarks += [f"{count} of {report.num_checked}, such as {example[it]}: {it}" for it, count in odd.items()]
    if not report.num_checked:
        report.problems.append("the split has no samples; remove it or fill it.")
    return report


def _of_dataset(
    rows: datasets.Dataset, reader: SampleReader, limit: int | None
) -> Iterator[tuple[int, Any, list[str]]]:
    """Positions, samples and remarks, evenly spaced; the exception in place of a sample that cannot be read."""
    count = len(rows) if limit is None else min(limit, len(rows))
    undecoded = rows.with_format(None)
    for position in np.linspace(0, len(rows) - 1, count).round().astype(int).tolist():
        row = undecoded[position]
        try:
            yield position, reader.read_row(row), remarks(row["image"])
        except (ValueError, OSError) as error:
            yield position, error, []


def _of_stream(rows: datasets.IterableDataset, limit: int | None) -> Iterator[tuple[int, Any, list[str]]]:
    """Positions and samples from the start; a stream cannot go on after a sample that cannot be read."""
    position = -1
    try:
        for position, sample in enumerate(islice(rows, limit)):
            yield position, sample, []
    except (ValueError, OSError) as error:
        yield position + 1, error, []
