"""Segmentation data sets: a folder, ADE20K, Cityscapes, or anything `datasets` loads, in one form."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import numpy as np

from .classes import ClassTable, Color, parse_classes
from .folders import Row, read_folder, split_names
from .reading import SampleReader


logger = logging.getLogger(__name__)

Rows: TypeAlias = datasets.Dataset | datasets.IterableDataset
Splits: TypeAlias = Mapping[str, Rows]

IMAGE_COLUMNS = ("image", "images", "img", "picture", "photo", "pixel_values")
LABEL_COLUMNS = (
    *("mask", "masks", "label", "labels", "annotation", "annotations", "annotated", "segmentation", "segmentations"),
    *("segmentation_mask", "semantic_segmentation", "semantic_mask", "seg_map", "segmentation_map", "label_map"),
    *("label_image", "ground_truth", "gt"),
)
# Files by which a folder is one that `datasets` itself can load.
DATASETS_PATTERNS = ("**/*.parquet", "**/*.arrow", "**/metadata.jsonl", "**/*.csv", "**/*.tar", "dataset_dict.json")


@dataclass
class SegmentationData:
    """
    A segmentation data set, ready for [`AugmentedDataset`] and for evaluation.

    `train[i]` and `validation[i]` give `{"image": RGB PIL image, "mask": (h, w) integer array of class ids}`, decoded
    when asked for; a streaming data set gives the same when iterated. All methods of `datasets` remain
    (`select`, `shuffle`, …).

    Args:
        train, validation: the samples; None where there are none.
        id2label: class names by id 0…K − 1.
        palette: K colors (r, g, b), 0…255.
        ignore_index: id of pixels without a class.
        do_reduce_labels: whether stored masks hold 0 for no class and n for class n − 1; samples are shifted already.
        reader: how files become samples.
        split_names: what the data set calls "train" and "validation".
        left_out: by "train" and "validation", what of the files is not used, in words.
    """

    train: Rows | None
    validation: Rows | None
    id2label: dict[int, str]
    palette: list[Color]
    ignore_index: int
    do_reduce_labels: bool
    reader: SampleReader = field(repr=False)
    split_names: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)

    @property
    def label2id(self) -> dict[str, int]:
        """Class ids by name."""
        return {name: index for index, name in self.id2label.items()}

    def ids_of(self, names: Sequence[str]) -> list[int]:
        """
        The ids of some classes.

        Raises:
            ValueError: if one of `names` is no class.
        """
        if unknown := [name for name in names if name not in self.label2id]:
            raise ValueError(f"{unknown[0]!r} is none of the classes {', '.join(self.label2id)}: correct its name.")
        return [self.label2id[name] for name in names]

    def without(self, names: Sequence[str]) -> "SegmentationData":
        """
        The same data as if nobody had named some classes: their pixels have no class, the others' ids close the gaps.

        Raises:
            ValueError: if one of `names` is no class, or fewer than two are left.
        """
        left_out = self.ids_of(names)
        kept = [index for index in self.id2label if index not in left_out]
        _refuse_one_class([self.id2label[index] for index in kept])
        # Pixels without a class come last.
        ids = np.full(len(self.id2label) + 1, self.ignore_index)
        ids[kept] = np.arange(len(kept))

        def renumbered(mask: np.ndarray) -> np.ndarray:
            known = (mask >= 0) & (mask < len(self.id2label))
            return ids[np.where(known, mask, len(self.id2label))].astype(mask.dtype)

        def read(batch: dict[str, list]) -> dict[str, list]:
            samples = self.reader(batch)
            return {**samples, "mask": [renumbered(mask) for mask in samples["mask"]]}

        def changed(rows: Rows | None) -> Rows | None:
            if isinstance(rows, datasets.IterableDataset):
                return rows.map(lambda row: {**row, "mask": renumbered(np.asarray(row["mask"]))})
            return rows and rows.with_transform(read)

        return replace(
            self,
            train=changed(self.train),
            validation=changed(self.validation),
            id2label={new: self.id2label[old] for new, old in enumerate(kept)},
            palette=[self.palette[index] for index in kept],
        )


def load_segmentation_dataset(
    path_or_name: str | Path | Rows | Splits,
    config_name: str | None = None,
    *,
    train_split: str | None = None,
    validation_split: str | None = None,
    validation_fraction: float = 0.1,
    classes: Mapping | Sequence[str] | str | Path | None = None,
    ignore_index: int | None = None,
    do_reduce_labels: bool | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    streaming: bool = False,
    shuffle_buffer: int = 0,
    revision: str | None = None,
    skip_unpaired: bool = False,
    read_first: bool = True,
) -> SegmentationData:
    """
    Load a segmentation data set.

    Args:
        path_or_name: one of
            - a folder in one of the layouts of docs/data.md, such as SPLIT/images and SPLIT/masks, files paired
              by name, with the class names in classes.json;
            - a folder written by `save_to_disk`, a folder `datasets` can load, or the name of one on the Hub;
            - a `Dataset`, `IterableDataset` or mapping of them by split.
        config_name: configuration of a Hub data set.
        train_split, validation_split: names of the splits; the usual names by default.
        validation_fraction: without a validation split, about this share of the training samples is held out, the
            same ones on every call (not from a stream); 0 holds none out.
        classes: class names where the data does not name them, or to replace those: a list, a mapping from id to
            name, a mapping with the keys of classes.json, a JSON file of these, or names with commas between them.
        ignore_index: id of pixels without a class (default: what the data says, or 255).
        do_reduce_labels: whether 0 means no class and n the class n − 1 (default: what the data says, or False).
        image_column, label_column: columns of a `datasets` data set; detected from the features by default.
        streaming: read a Hub data set while iterating instead of downloading it first.
        shuffle_buffer: a stream's training samples are drawn from a buffer of this many, still encoded, anew in each
            epoch of an [`AugmentedStream`]; 0 takes them as they come.
        revision: version of a Hub data set.
        skip_unpaired: leave out files of a folder that have no partner, in place of refusing them.
        read_first: read the first sample of each split now, and as many masks as it takes to see that they show
            classes, so that what is wrong shows early.

    Raises:
        FileNotFoundError, ValueError: with one sentence that names the file and the remedy, when files are missing,
            unpaired or unreadable, the class names unknown, or the first sample of a split does not fit them; when
            there is one class alone, or no mask shows any.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; give a share from 0 to below 1.")
    root = _folder_of(path_or_name)
    files = None
    if root and not _saved_to_disk(root):
        files = read_folder(root, train_split, validation_split, validation_fraction, skip_unpaired)
    splits: Splits
    if files:
        names, known, left_out = files.names, files.classes, files.left_out
        splits = {kind: _rows_of_files(rows) for kind, rows in files.rows.items() if rows}
    else:
        loaded = _load_rows(root or path_or_name, config_name, streaming, revision)
        names, left_out = split_names(loaded, train_split, validation_split), {}
        picked = _with_held_out({kind: loaded[name] for kind, name in names.items()}, validation_fraction)
        splits, feature_names = _standard_columns(picked, image_column, label_column, root)
        # Names that are given may mend what is wrong with the data set's own.
        own = feature_names and classes is None
        known = parse_classes(feature_names, "the data set's label column") if own else None
    table = _class_table(known, classes, path_or_name)
    reader = _reader(table, known, path_or_name, ignore_index, do_reduce_labels)
    if "validation" not in names and "validation" in splits:
        logger.info("No validation split: %d of the training samples are held out.", len(splits["validation"]))
    for kind, sentences in left_out.items():
        for sentence in sentences:
            logger.warning("Left out of %s: %s.", names[kind], sentence)
    if read_first:
        reader.refuse_unusable(splits.values())
    train = splits.get("train")
    if shuffle_buffer > 1 and isinstance(train, datasets.IterableDataset):
        splits = {**splits, "train": train.shuffle(seed=0, buffer_size=shuffle_buffer)}
    ready: dict[str, Rows] = {}
    for kind, rows in splits.items():
        is_stream = isinstance(rows, datasets.IterableDataset)
        ready[kind] = rows.map(reader.read_row) if is_stream else rows.with_transform(reader)
    return SegmentationData(
        ready.get("train"),
        ready.get("validation"),
        table.id2label,
        table.colors,
        reader.ignore_index,
        reader.do_reduce_labels,
        reader,
        names,
        left_out,
    )


def _folder_of(source: object) -> Path | None:
    """The folder that a data set is in; None for the name of one on the Hub, and for rows."""
    if not isinstance(source, (str, Path)):
        return None
    root = Path(source).expanduser()
    if root.is_dir():
        return root.resolve()
    if isinstance(source, Path) or source.startswith((".", "/", "~")):
        raise FileNotFoundError(f"{root} is no folder; give the folder that holds the data set.")
    return None


def _saved_to_disk(root: Path) -> bool:
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def _rows_of_files(rows: list[Row]) -> datasets.Dataset:
    features = datasets.Features({name: datasets.Image(decode=False) for name in ("image", "mask")})
    return datasets.Dataset.from_dict({"image": [i for i, _ in rows], "mask": [m for _, m in rows]}, features)


def _load_rows(
    source: str | Path | Rows | Splits, config_name: str | None, streaming: bool, revision: str | None
) -> Splits:
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return {"train": source}
    if isinstance(source, Mapping):
        return source
    if isinstance(source, Path) and not any(next(source.glob(pattern), None) for pattern in DATASETS_PATTERNS):
        inside = sorted(path.name for path in source.iterdir() if not path.name.startswith("."))
        raise FileNotFoundError(
            f"{source} holds no data set that is recognized, but {', '.join(inside[:8]) or 'nothing'}"
            f"{', …' if len(inside) > 8 else ''}; put images into SPLIT/images and masks into SPLIT/masks, or take "
            "another of the layouts in docs/data.md."
        )
    if isinstance(source, Path) and _saved_to_disk(source):
        loaded = datasets.load_from_disk(str(source))
    else:
        loaded = datasets.load_dataset(str(source), config_name, streaming=streaming, revision=revision)
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _with_held_out(picked: dict[str, Rows], fraction: float) -> dict[str, Rows]:
    """The training and validation rows, the latter held out of the former where no split is for them."""
    rows = picked.get("train")
    if "validation" not in picked and isinstance(rows, datasets.Dataset) and fraction and len(rows) > 1:
        held_out = rows.train_test_split(test_size=max(1, round(fraction * len(rows))), seed=0)
        picked = {"train": held_out["train"], "validation": held_out["test"]}
    return picked


def _standard_columns(
    splits: dict[str, Rows], image_column: str | None, label_column: str | None, root: Path | None
) -> tuple[dict[str, Rows], list[str]]:
    """The splits with the columns `image` and `mask` alone, images undecoded, and the class names they carry."""
    names: list[str] = []
    standard: dict[str, Rows] = {}
    for split, rows in splits.items():
        if isinstance(rows, datasets.IterableDataset) and rows.features is None:
            rows = rows._resolve_features()
        features = rows.features
        image, label = _columns(features, image_column, label_column)
        names = names or _names_in(features[label])
        rows = rows.with_format(None).select_columns([image, label])
        for column in (image, label):
            if _is_text(features[column]) and root is not None:
                rows = rows.map(lambda row, column=column: {column: str(root / row[column])})  # paths in a CSV file
            if isinstance(features[column], datasets.Image) or _is_text(features[column]):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        renamed = {old: new for old, new in ((image, "image"), (label, "mask")) if old != new}
        standard[split] = rows.rename_columns(renamed) if renamed else rows
    return standard, names


def _columns(features: Mapping[str, Any], image: str | None, label: str | None) -> tuple[str, str]:
    """The image column and the mask column."""
    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    paths = [name for name, feature in features.items() if _is_text(feature)]
    if label is None:
        maps = [name for name, feature in features.items() if name in paths or _may_be_mask(feature)]
        labels = [name for name in maps if name != image and name.lower() in LABEL_COLUMNS]
        # Two images, one of which is called image: the other is the mask.
        others = [name for name in images if name != image and name.lower() not in IMAGE_COLUMNS]
        label = _only(labels) or (None if labels else _only(others))
    if image is None:
        candidates = [name for name in images if name != label]
        named = [name for name in (*candidates, *paths) if name != label and name.lower() in IMAGE_COLUMNS]
        image = _only(named) or _only(candidates)
    if image is None or label is None or image == label or not {image, label} <= set(features):
        raise ValueError(
            f"Which columns hold images and masks? The data set has {', '.join(features)}; "
            "set image_column and label_column to two of them."
        )
    return image, label


def _is_text(feature: object) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _may_be_mask(feature: object) -> bool:
    """Whether a column can hold one id per pixel: an image, or a list of lists."""
    return isinstance(feature, (datasets.Image, datasets.Array2D)) or hasattr(_inner(feature), "feature")


def _inner(feature: Any) -> Any:
    return getattr(feature, "feature", None)


def _names_in(feature: Any) -> list[str]:
    """The names of a ClassLabel somewhere inside `feature`."""
    while feature is not None and not isinstance(feature, datasets.ClassLabel):
        feature = _inner(feature)
    return list(feature.names or []) if feature is not None else []


def _class_table(known: ClassTable | None, given: Any, source: object) -> ClassTable:
    """What the caller gave, filled up from what the data says."""
    if given is None:
        if known is None:
            where = f" of {source}" if isinstance(source, (str, Path)) else ""
            raise ValueError(
                f"The class names{where} are unknown; give `classes`, or put classes.json into the folder."
            )
        return known
    table = parse_classes(given)
    if known is None:
        return table
    same_count = len(known.id2label) == len(table.id2label)
    return ClassTable(
        table.id2label,
        table.palette or (known.palette if same_count else None),
        table.ignore_index if table.ignore_index is not None else known.ignore_index,
        table.do_reduce_labels if table.do_reduce_labels is not None else known.do_reduce_labels,
        table.ignore_colors or known.ignore_colors,
        table.id_map or known.id_map,
    )


def _refuse_one_class(names: list[str]) -> None:
    if len(names) < 2:
        raise ValueError(
            f"{', '.join(names) or 'nothing'} is the only class, so every pixel would be one: name what else there is "
            "as well, for instance as background, and give its pixels an id of their own."
        )


def _reader(
    table: ClassTable, known: ClassTable | None, source: object, ignore_index: int | None, reduce: bool | None
) -> SampleReader:
    """How to read masks of these classes; refuses classes and options that contradict each other."""
    names = table.id2label
    _refuse_one_class(list(names.values()))
    if ignore_index is None:
        ignore_index = 255 if table.ignore_index is None else table.ignore_index
    reduce = bool(table.do_reduce_labels) if reduce is None else reduce
    if 0 <= ignore_index < len(names) + reduce:
        raise ValueError(
            f"ignore_index is {ignore_index}, but that is the id of a class ({names[max(ignore_index - reduce, 0)]}): "
            f"set ignore_index to an id that none of the {len(names)} classes has, such as 65535."
        )
    if known and known.id_map and len(known.id2label) != len(names):
        raise ValueError(
            f"{source} has {len(known.id2label)} classes, but {len(names)} names are given: give one for each of "
            f"{', '.join(known.id2label.values())}."
        )
    return SampleReader(len(names), ignore_index, reduce, table.palette, table.ignore_colors, table.id_map)


__all__ = ["SegmentationData", "load_segmentation_dataset"]
