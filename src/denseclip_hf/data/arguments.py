"""Which data set, and how it is read: the flags that training and evaluation share."""

from dataclasses import dataclass, field
from typing import Any

from .loading import SegmentationData, load_segmentation_dataset


VALIDATION_FRACTION = 0.1


@dataclass
class DatasetArguments:
    """A data set as [`load_segmentation_dataset`] takes it."""

    dataset: str | None = field(
        default=None, metadata={"help": "Needed: a folder (images and masks, see docs/data.md) or a Hub name."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a Hub data set."})
    train_split: str | None = field(default=None, metadata={"help": "Name of the training split."})
    validation_fraction: float | None = field(
        default=VALIDATION_FRACTION, metadata={"help": "Held out if there is no validation split."}
    )
    classes: str | None = field(
        default=None,
        metadata={"help": "Class names: a file (JSON, CSV, YAML, or text with one a line), or names with commas."},
    )
    image_column: str | None = field(default=None, metadata={"help": "Column of the images (datasets)."})
    label_column: str | None = field(default=None, metadata={"help": "Column of the masks (datasets)."})
    ignore_index: int | None = field(
        default=None, metadata={"help": "Id of pixels without a class: what the data says, or 255."}
    )
    do_reduce_labels: bool | None = field(
        default=None, metadata={"help": "Masks hold 0 for no class and n for class n - 1 (as ADE20K's)."}
    )

    skip_unpaired: bool | None = field(
        default=None, metadata={"help": "Leave out images without a mask and masks without an image."}
    )

    def load(self, **options: Any) -> SegmentationData:
        """
        The data set, with further `options` of [`load_segmentation_dataset`].

        Raises:
            ValueError: if none is named, and as [`load_segmentation_dataset`] does.
        """
        if not self.dataset:
            raise ValueError("name a data set: `--dataset FOLDER_OR_HUB_NAME`.")
        return load_segmentation_dataset(
            self.dataset,
            self.dataset_config,
            train_split=self.train_split,
            validation_fraction=VALIDATION_FRACTION if self.validation_fraction is None else self.validation_fraction,
            classes=self.classes,
            ignore_index=self.ignore_index,
            do_reduce_labels=self.do_reduce_labels,
            image_column=self.image_column,
            label_column=self.label_column,
            skip_unpaired=bool(self.skip_unpaired),
            **options,
        )


__all__ = ["DatasetArguments"]
