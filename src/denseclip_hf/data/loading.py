"""Segmentation data sets: a folder, ADE20K, Cityscapes, or anything `datasets` loads, in one form."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import datasets

from .folders import (
    TRAIN_FOLDERS,
    VALIDATION_FOLDERS,
    ClassTable,
    Color,
    Layout,
    Pair,
    default_palette,
    find_layout,
    hold_out,
    parse_classes,
    pick_split,
)
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
DATASETS_PATTERNS = ("**/*.parquet", "**/*.arrow", "**/metadata.jsonl", "**/metadata.csv", "*.tar", "**/*.tar")


@dataclass
class SegmentationData:
    """
    A segmentation data set, ready for [`AugmentedDataset`] and for evaluation.

    `train[i]` and `validation[i]` give `{"image": RGB PIL picture, "mask": (h, w) integer array of raw ids}`, decoded
    when asked for; a streaming data set gives the same when iterated. All methods of `datasets` remain
    (`select`, `shuffle`, …).

    Args:
        train, validation: the samples; None where there are none.
        id2label: class names by id 0…K − 1 (after `do_reduce_labels`).
        palette: K colours (r, g, b), 0…255.
        ignore_index: id of pixels without a class.
        do_reduce_labels: raw ids are 0 for no class and 1…K.
        reader: how files become samples.
    """

    train: Rows | None
    validation: Rows | None
    id2label: dict[int, str]
    palette: list[Color]
    ignore_index: int
    do_reduce_labels: bool
    reader: SampleReader = field(repr=False)

    @property
    def label2id(self) -> dict[str, int]:
        """Class ids by name."""
        return {name: index for index, name in self.id2label.items()}


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
    decode: bool = True,
    read_first: bool = True,
) -> SegmentationData:
    """
    Load a segmentation data set.

    Args:
        path_or_name: one of
            - a folder with SPLIT/images and SPLIT/masks, or images and masks, files paired by name, and classes.json;
            - the folder of ADE20K (ADEChallengeData2016) or of Cityscapes (leftImg8bit and gtFine);
            - a folder written by `save_to_disk`, a folder `datasets` can load, or the name of one on the Hub;
            - a `Dataset`, `IterableDataset` or mapping of them by split.
        config_name: configuration of a Hub data set.
        train_split, validation_split: names of the splits; the usual names by default.
        validation_fraction: without a validation split, about this share of the training samples is held out, the
            same ones on every call (not from a stream); 0 holds none out.
        classes: class names where the data does not tell them, or to replace those: a list, a mapping from id to
            name, a mapping with the keys of classes.json, a JSON file of these, or names with commas between them.
        ignore_index: id of pixels without a class (default: what the data says, or 255).
        do_reduce_labels: whether 0 means no class and n the class n − 1 (default: what the data says, or False).
        image_column, label_column: columns of a `datasets` data set; detected from the features by default.
        streaming: read a Hub data set while iterating instead of downloading it first.
        shuffle_buffer: a stream's training samples are drawn from a buffer of so many, still encoded, anew in each
            epoch of an [`AugmentedStream`]; 0 takes them as they come.
        revision: version of a Hub data set.
        decode: False leaves plain RGB JPEGs undecoded, for `TrainTransform(fast_jpeg=True)`.
        read_first: read the first sample of each split now, so that what is wrong shows early.

    Raises:
        FileNotFoundError, ValueError: with one sentence that names the file and the remedy, when files are missing,
            unpaired or unreadable, the class names unknown, or the first sample of a split does not fit them.
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction is {validation_fraction}; give a share from 0 to below 1.")
    layout = _layout_of(path_or_name)
    known = layout.classes if layout else None
    splits: Splits
    if layout:
        files = {name: pair() for name, pair in _picked(layout.splits, train_split, validation_split).items()}
        splits = _rows_of_layout(files, validation_fraction)
    else:
        loaded = _load_rows(path_or_name, config_name, streaming, revision)
        picked = _with_held_out(_picked(loaded, train_split, validation_split), validation_fraction)
        splits, feature_names = _standard_columns(picked, image_column, label_column)
        # Names that are given may mend what is wrong with the data set's own.
        own = feature_names and classes is None
        known = parse_classes(feature_names, "the data set's label column") if own else None
    table = _class_table(known, classes, path_or_name)
    ignore = next(value for value in (ignore_index, table.ignore_index, 255) if value is not None)
    reduce = next(value for value in (do_reduce_labels, table.do_reduce_labels, False) if value is not None)
    if 0 <= ignore < len(table.id2label) + reduce:
        name = table.id2label[max(ignore - reduce, 0)]
        raise ValueError(
            f"ignore_index is {ignore}, but that is the id of a class ({name}): set ignore_index to an id that none "
            f"of the {len(table.id2label)} classes has, such as 65535."
        )
    if layout and layout.id_table and known and len(known.id2label) != len(table.id2label):
        raise ValueError(
            f"{path_or_name} has {len(known.id2label)} classes, but {len(table.id2label)} names are given: give one "
            f"for each of {', '.join(known.id2label.values())}."
        )
    id_table = [ignore if i == 255 else i for i in layout.id_table] if layout and layout.id_table else None
    reader = SampleReader(len(table.id2label), ignore, reduce, table.palette, table.ignore_colors, id_table, decode)
    ready = {name: _readable(rows, reader, read_first) for name, rows in splits.items()}
    train = splits.get("train")
    if shuffle_buffer > 1 and isinstance(train, datasets.IterableDataset):
        ready["train"] = _readable(train.shuffle(seed=0, buffer_size=shuffle_buffer), reader, read_first=False)
    palette = table.palette or default_palette(len(table.id2label))
    return SegmentationData(
        ready.get("train"), ready.get("validation"), table.id2label, palette, ignore, reduce, reader
    )


def _layout_of(source: Any) -> Layout | None:
    """The layout of a folder of files; None for what `datasets` should load."""
    if not isinstance(source, (str, Path)):
        return None
    root = Path(source).expanduser()
    if not root.is_dir():
        if isinstance(source, Path) or source.startswith((".", "/", "~")):
            raise FileNotFoundError(f"{root} is no folder; give the folder that holds the data set.")
        return None
    root = root.resolve()
    if _saved_to_disk(root):
        return None
    layout = find_layout(root)
    if layout is None and not any(next(root.glob(pattern), None) for pattern in DATASETS_PATTERNS):
        raise FileNotFoundError(
            f"{root} holds no data set that is recognised; put pictures into SPLIT/images and masks into SPLIT/masks "
            "(or images and masks), or give the folder of ADE20K, of Cityscapes or of a `datasets` data set."
        )
    return layout


def _saved_to_disk(root: Path) -> bool:
    return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()


def _picked(splits: Mapping[str, Any], train: str | None, validation: str | None) -> dict[str, Any]:
    """What is under the names of the training and the validation split, where there are such."""
    names = {
        "train": pick_split(splits, train, TRAIN_FOLDERS),
        "validation": pick_split(splits, validation, VALIDATION_FOLDERS),
    }
    picked = {kind: splits[name] for kind, name in names.items() if name is not None}
    if not picked:
        raise ValueError(f"Which split trains? Set train_split to one of {', '.join(map(str, splits))}.")
    return picked


def _rows_of_layout(pairs: dict[str, list[Pair]], fraction: float) -> dict[str, Rows]:
    if "validation" not in pairs:
        pairs["train"], pairs["validation"] = hold_out(pairs["train"], fraction)
        logger.info("No validation split: %d of the training samples are held out.", len(pairs["validation"]))
    features = datasets.Features({name: datasets.Image(decode=False) for name in ("image", "mask")})
    return {
        name: datasets.Dataset.from_dict(
            {"image": [str(image) for image, _ in chosen], "mask": [str(mask) for _, mask in chosen]}, features
        )
        for name, chosen in pairs.items()
        if chosen
    }


def _load_rows(source: Any, config_name: str | None, streaming: bool, revision: str | None) -> Splits:
    if isinstance(source, (datasets.Dataset, datasets.IterableDataset)):
        return {"train": source}
    if isinstance(source, Mapping):
        return source
    root = Path(source).expanduser()
    try:
        if root.is_dir() and _saved_to_disk(root):
            loaded = datasets.load_from_disk(str(root))
        else:
            path = str(root) if root.is_dir() else str(source)
            loaded = datasets.load_dataset(path, config_name, streaming=streaming, revision=revision)
    except OSError as error:
        raise FileNotFoundError(
            f"{source} can be read neither as a folder here nor as a data set on the Hub ({error}); check the name."
        ) from error
    return loaded if isinstance(loaded, Mapping) else {"train": loaded}


def _with_held_out(picked: dict[str, Rows], fraction: float) -> dict[str, Rows]:
    """The training and validation rows, the latter held out of the former where no split is for them."""
    rows = picked.get("train")
    if "validation" not in picked and isinstance(rows, datasets.Dataset) and fraction and len(rows) > 1:
        held_out = rows.train_test_split(test_size=max(1, round(fraction * len(rows))), seed=0)
        picked = {"train": held_out["train"], "validation": held_out["test"]}
        logger.info("No validation split: %d of the training samples are held out.", len(picked["validation"]))
    return picked


def _standard_columns(
    splits: dict[str, Rows], image_column: str | None, label_column: str | None
) -> tuple[dict[str, Rows], list[str]]:
    """The splits with the columns `image` and `mask` alone, pictures undecoded, and the class names they carry."""
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
            if isinstance(features[column], datasets.Image):
                rows = rows.cast_column(column, datasets.Image(decode=False))
        renamed = {old: new for old, new in ((image, "image"), (label, "mask")) if old != new}
        standard[split] = rows.rename_columns(renamed) if renamed else rows
    return standard, names


def _columns(features: Mapping[str, Any], image: str | None, label: str | None) -> tuple[str, str]:
    """The picture column and the mask column."""
    for given in (image, label):
        if given is not None and given not in features:
            raise ValueError(f"There is no column {given!r}; the data set has {', '.join(features)}.")
    pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    if label is None:
        maps = [name for name, feature in features.items() if name != image and _may_be_mask(feature)]
        labels = [name for name in maps if name.lower() in LABEL_COLUMNS]
        # Two pictures, one of which is called image: the other is the mask.
        others = [name for name in pictures if name != image and name.lower() not in IMAGE_COLUMNS]
        label = _only(labels) or (None if labels else _only(others))
    if image is None:
        candidates = [name for name in pictures if name != label]
        image = _only([name for name in candidates if name.lower() in IMAGE_COLUMNS]) or _only(candidates)
    if image is None or label is None or image == label:
        raise ValueError(
            f"Which columns hold pictures and masks? The data set has {', '.join(features)}; "
            "set image_column and label_column."
        )
    return image, label


def _only(names: list[str]) -> str | None:
    return names[0] if len(names) == 1 else None


def _may_be_mask(feature: Any) -> bool:
    """Whether a column can hold one id per pixel: a picture, or a list of lists."""
    return isinstance(feature, (datasets.Image, datasets.Array2D)) or hasattr(_inner(feature), "feature")


def _inner(feature: Any) -> Any:
    return getattr(feature, "feature", None)


def _names_in(feature: Any) -> list[str]:
    """The names of a ClassLabel somewhere inside `feature`."""
    while feature is not None and not isinstance(feature, datasets.ClassLabel):
        feature = _inner(feature)
    return list(feature.names or []) if feature is not None else []


def _class_table(known: ClassTable | None, given: Any, source: Any) -> ClassTable:
    """What the caller gave, filled up from what the data says."""
    if given is None:
        if known is None:
            where = f" of {source}" if isinstance(source, (str, Path)) else ""
            raise ValueError(
                f"The class names{where} are unknown; give `classes`, or put a classes.json with id2label into the "
                "folder."
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
    )


def _readable(rows: Rows, reader: SampleReader, read_first: bool) -> Rows:
    """`rows` that are decoded as they are read."""
    if read_first:
        first = next(iter(rows), None)
        if first is None:
            raise ValueError("A split has no samples; remove it or fill it.")
        replace(reader, decode=True).read_row(first)
    if isinstance(rows, datasets.IterableDataset):
        return rows.map(reader.read_row)
    return rows.with_transform(reader)


__all__ = ["SegmentationData", "load_segmentation_dataset"]
