"""Segmentation metrics that keep counts instead of masks: mean IoU and its relatives, and boundary IoU.

Shapes: K classes, H × W pixels. A confusion matrix is (K, K): rows are reference classes, columns predicted ones.
"""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import datasets
import evaluate
import numpy as np
import torch
import torch.nn.functional as F

from .model.configuration_denseclip import check_ignore_index
from .model.image_processing_denseclip import holds_integers, reduce_labels


LabelMap: TypeAlias = torch.Tensor | np.ndarray | Sequence[Sequence[int]]


def confusion_matrix(
    prediction: LabelMap, reference: LabelMap, num_labels: int, ignore_index: int = 255
) -> torch.Tensor:
    """Count how often each reference class was predicted as each class.

    Matrices of several images, or of several processes, add up to the matrix of the whole set.

    Args:
        prediction (integers of any shape): Predicted class ids, 0 … K-1; anything where the reference is ignored.
        reference (integers of the same shape): True class ids, 0 … K-1 or `ignore_index`.
        num_labels (`int`): K.
        ignore_index (`int`, *optional*, defaults to 255): Reference value of the pixels to leave out.

    Returns:
        `torch.Tensor` of shape `(num_labels, num_labels)`: int64 counts, on the device of `prediction`.

    Raises:
        ValueError: If the shapes differ, a map is not made of integers, or a class id is out of range.
    """
    predicted, labeled, valid = _checked(prediction, reference, num_labels, ignore_index)
    pairs = labeled[valid] * num_labels + predicted[valid]
    return torch.bincount(pairs, minlength=num_labels**2).view(num_labels, num_labels)


def scores_from_confusion_matrix(matrix: torch.Tensor | np.ndarray, leave_out: Sequence[int] = ()) -> dict[str, Any]:
    """Turn a confusion matrix into scores between 0 and 1.

    A score that would divide zero by zero is NaN and is left out of its mean: IoU and Dice of a class absent from
    both maps, accuracy of a class without reference pixels, precision of a class never predicted, and F-score where
    precision or recall is NaN or both are 0. Accuracy of a class is its recall.

    Args:
        matrix (integers of shape `(num_labels, num_labels)`): Rows are reference classes, columns predicted ones.
        leave_out (`Sequence[int]`, *optional*): Classes that the means are not over, such as the background.

    Returns:
        `dict` with the floats `overall_accuracy`, `mean_iou`, `mean_accuracy`, `mean_dice`, `mean_fscore`,
        `mean_precision`, for each mean a list of K floats (`per_category_iou` and so on), and `classes_in_mean_iou`,
        the number of classes that `mean_iou` is over.
    """
    counts = torch.as_tensor(matrix).cpu().double()
    correct, labeled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
    precision, recall = correct / predicted, correct / labeled
    per_category = {
        "iou": correct / (labeled + predicted - correct),
        "accuracy": recall,
        "dice": 2 * correct / (labeled + predicted),
        "fscore": 2 * precision * recall / (precision + recall),
        "precision": precision,
    }
    scores: dict[str, Any] = {"overall_accuracy": (correct.sum() / labeled.sum()).item()}
    in_means = torch.ones(len(counts), dtype=torch.bool)
    in_means[list(leave_out)] = False
    scores |= {f"mean_{name}": values[in_means].nanmean().item() for name, values in per_category.items()}
    scores["classes_in_mean_iou"] = int((in_means & ~per_category["iou"].isnan()).sum())
    return scores | {f"per_category_{name}": values.tolist() for name, values in per_category.items()}


def boundary_counts(
    prediction: LabelMap,
    reference: LabelMap,
    num_labels: int,
    ignore_index: int = 255,
    boundary_width: float = 0.02,
) -> torch.Tensor:
    """Count the pixels of each class's contour band in both maps, in the prediction and in the reference.

    Args:
        prediction (integers of shape `(H, W)`): Predicted class ids, 0 … K-1.
        reference (integers of shape `(H, W)`): True class ids, 0 … K-1 or `ignore_index`.
        num_labels (`int`): K.
        ignore_index (`int`, *optional*, defaults to 255): Reference value of the pixels to leave out.
        boundary_width (`float`, *optional*, defaults to 0.02): Width of the band as a share of the image diagonal;
            the band is at least one pixel wide.

    Returns:
        `torch.Tensor` of shape `(3, num_labels)`: int64 counts of intersection, prediction and reference.

    Raises:
        ValueError: As [`confusion_matrix`] does.
    """
    predicted, labeled, valid = _checked(prediction, reference, num_labels, ignore_index)
    distance = max(1, round(boundary_width * float(np.hypot(*predicted.shape))))
    in_prediction = _contour_band(predicted, valid, distance) & valid
    in_reference = _contour_band(labeled, valid, distance) & valid
    in_both = in_prediction & in_reference & (predicted == labeled)
    bands = ((in_both, labeled), (in_prediction, predicted), (in_reference, labeled))
    return torch.stack([torch.bincount(classes[band], minlength=num_labels) for band, classes in bands])


def _checked(
    prediction: LabelMap, reference: LabelMap, num_labels: int, ignore_index: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Both maps as int64 on the prediction's device, and the mask of pixels that count."""
    predicted = _integers(prediction)
    labeled = _integers(reference).to(predicted.device)
    if predicted.shape != labeled.shape:
        sizes = ("×".join(map(str, label_map.shape)) for label_map in (predicted, labeled))
        raise ValueError(f"The prediction is {' but the reference '.join(sizes)} pixels: make them of one size.")
    valid = labeled != ignore_index
    for name, values in (("prediction", predicted[valid]), ("reference", labeled[valid])):
        lowest, highest = values.aminmax() if values.numel() else (0, 0)
        if lowest < 0 or highest >= num_labels:
            raise ValueError(
                f"The {name}'s values go from {lowest} to {highest} where the reference is not "
                f"{ignore_index}, but class ids from 0 to {num_labels - 1}: correct them, num_labels or ignore_index."
            )
    return predicted, labeled, valid


def _integers(label_map: LabelMap) -> torch.Tensor:
    values = label_map if isinstance(label_map, torch.Tensor) else np.asarray(label_map)
    if not holds_integers(values):
        raise ValueError(f"Label maps must hold integer class ids, but one has the dtype {values.dtype}: convert it.")
    # astype copies, so read-only and byte-swapped arrays are welcome too
    return values.long() if isinstance(values, torch.Tensor) else torch.from_numpy(values.astype(np.int64))


def _contour_band(label_map: torch.Tensor, valid: torch.Tensor, distance: int) -> torch.Tensor:
    """(H, W) → (H, W) mask of pixels with another class, or the image's edge, at most `distance` steps away."""
    # one pass for all classes: the window around a pixel holds another class where its minimum and maximum differ
    values = label_map.float()
    highest = _window_maximum(values.masked_fill(~valid, -torch.inf), distance)
    lowest = -_window_maximum((-values).masked_fill(~valid, -torch.inf), distance)
    band = highest != lowest
    band[:distance], band[-distance:], band[:, :distance], band[:, -distance:] = True, True, True, True
    return band


def _window_maximum(values: torch.Tensor, distance: int) -> torch.Tensor:
    """Maximum over the (2 · distance + 1)² square around each pixel, one axis after the other."""
    window = 2 * distance + 1
    rows = F.max_pool2d(values[None], (1, window), stride=1, padding=(0, distance))
    return F.max_pool2d(rows, (window, 1), stride=1, padding=(distance, 0))[0]


class _CountingMetric(evaluate.Metric):
    """What the metrics below share: counts that add up over images, on the device where the predictions are."""

    def __init__(self, num_labels: int, ignore_index: int = 255, do_reduce_labels: bool = False, **options: object):
        if do_reduce_labels:
            check_ignore_index(ignore_index, num_labels)
        super().__init__()
        self.num_labels, self.ignore_index, self.do_reduce_labels = num_labels, ignore_index, do_reduce_labels
        counted_by = {"num_labels": num_labels, "ignore_index": ignore_index, "do_reduce_labels": do_reduce_labels}
        self._settings: dict[str, Any] = {**counted_by, **options}
        self.reset()

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        features = datasets.Features({"predictions": label_map, "references": label_map})
        return evaluate.MetricInfo(
            description=type(self).__doc__, citation="", inputs_description="", features=features
        )

    def _build_data_dir(self) -> str:
        return ""  # nothing is cached, so no directory is made

    def __len__(self) -> int:
        return self._num_images

    @abstractmethod
    def _count(self, prediction: LabelMap, reference: LabelMap) -> torch.Tensor:
        """Counts of one image."""

    @abstractmethod
    def _scores(self, counts: torch.Tensor) -> dict[str, Any]:
        """What `compute` returns for the sum of all counts."""

    def reset(self) -> None:
        """Forget every image added so far."""
        self._counts = torch.zeros((), dtype=torch.int64)
        self._num_images = 0

    def add(self, *, prediction: LabelMap, reference: LabelMap) -> None:
        """Count one image.

        Args:
            prediction (integers of shape `(H, W)`): Predicted class ids, 0 … K-1; never shifted.
            reference (integers of shape `(H, W)`): Raw labels. With `do_reduce_labels`, 0 becomes `ignore_index` and
                n becomes n - 1, in a copy.

        Raises:
            ValueError: If the sizes differ, a map is not made of integers, or a class id is out of range.
        """
        labels = _integers(reference)
        if self.do_reduce_labels:
            labels = reduce_labels(labels, self.ignore_index)
        counts = self._count(prediction, labels)
        self._counts = self._counts.to(counts.device) + counts
        self._num_images += 1

    def add_batch(self, *, predictions: Iterable[LabelMap], references: Iterable[LabelMap]) -> None:
        """Count several images, whose sizes may differ from one to the next; see [`add`].

        Raises:
            ValueError: If the lists differ in length, or as [`add`] does; images before the bad one are counted.
        """
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def merge(self, other: "_CountingMetric") -> None:
        """Add the counts of another metric, for instance of another process; `other` keeps its own.

        Raises:
            ValueError: If the other metric is of another kind or has other settings.
        """
        if type(other) is not type(self) or other._settings != self._settings:
            raise ValueError(
                f"Only metrics of one kind with the same settings can be merged: this is {type(self).__name__} with "
                f"{self._settings}, the other {type(other).__name__} with {other._settings}."
            )
        self._counts = self._counts + other._counts.to(self._counts.device)
        self._num_images += other._num_images

    def compute(
        self,
        *,
        predictions: Iterable[LabelMap] | None = None,
        references: Iterable[LabelMap] | None = None,
        num_labels: int | None = None,
        ignore_index: int | None = None,
        reduce_labels: bool | None = None,
    ) -> dict[str, Any]:
        """Scores of everything added since the last `compute` or `reset`, then start from zero.

        Args:
            predictions, references (*optional*): A last batch to add first, see [`add_batch`].
            num_labels, ignore_index, reduce_labels (*optional*): As `evaluate.load("mean_iou")` takes them: for this
                call alone, in place of what the metric was made with.

        Returns:
            `dict` of numbers and of lists with one float per class, NaN where a score is undefined.

        Raises:
            ValueError: If nothing was added, or with other settings than these.
        """
        given = {"num_labels": num_labels, "ignore_index": ignore_index, "do_reduce_labels": reduce_labels}
        settings = self._settings | {name: value for name, value in given.items() if value is not None}
        if settings != self._settings:
            if self._num_images:
                raise ValueError(f"Images were counted with {self._settings}: compute them before passing others.")
            return type(self)(**settings).compute(predictions=predictions, references=references)
        self.add_batch(
            predictions=() if predictions is None else predictions, references=() if references is None else references
        )
        if not self._num_images:
            raise ValueError("Nothing to score yet: call add or add_batch before compute.")
        scores = self._scores(self._counts)
        self.reset()
        return scores


class MeanIoU(_CountingMetric):
    """Mean intersection over union and related scores, from one confusion matrix over the whole set.

    Args:
        num_labels (`int`): Number of classes K.
        ignore_index (`int`, *optional*, defaults to 255): Label of the pixels to leave out. A class id can be
            ignored this way as well; with more than 255 classes pass a value that is none.
        do_reduce_labels (`bool`, *optional*, defaults to `False`): Whether label 0 means "other" and is ignored, and
            label n stands for class n - 1, as in ADE20K. Predictions are never shifted.
        leave_out (`Sequence[int]`, *optional*): Classes that the means are not over, such as the background.

    `compute` returns what [`scores_from_confusion_matrix`] describes.

    Example:

    ```python
    >>> metric = MeanIoU(num_labels=2)
    >>> metric.add_batch(predictions=[[[0, 1], [1, 1]]], references=[[[0, 1], [0, 255]]])
    >>> metric.compute()["per_category_iou"]
    [0.5, 0.5]
    ```
    """

    def __init__(
        self,
        num_labels: int,
        ignore_index: int = 255,
        do_reduce_labels: bool = False,
        leave_out: Sequence[int] = (),
    ):
        super().__init__(num_labels, ignore_index, do_reduce_labels, leave_out=tuple(leave_out))

    @property
    def confusion_matrix(self) -> torch.Tensor:
        """`torch.Tensor` of shape `(num_labels, num_labels)`: int64 counts so far; rows are reference classes."""
        return self._counts.new_zeros(self.num_labels, self.num_labels) + self._counts

    def _count(self, prediction: LabelMap, reference: LabelMap) -> torch.Tensor:
        return confusion_matrix(prediction, reference, self.num_labels, self.ignore_index)

    def _scores(self, counts: torch.Tensor) -> dict[str, Any]:
        return scores_from_confusion_matrix(counts, self._settings["leave_out"])


class MeanBoundaryIoU(_CountingMetric):
    """Mean boundary IoU (Cheng et al., "Boundary IoU", CVPR 2021): IoU of the bands inside the masks' contours.

    A class's band are its pixels at most d steps (diagonal ones count as one) from another class or from the image's
    edge. Ignored pixels count nowhere and make no contour. Counts are summed over the whole set before dividing.

    Args:
        num_labels, ignore_index, do_reduce_labels: As in [`MeanIoU`].
        boundary_width (`float`, *optional*, defaults to 0.02): d as a share of the image diagonal, rounded, at least
            one pixel.

    `compute` returns `mean_boundary_iou` and `per_category_boundary_iou` (K floats, NaN where the class is absent).
    """

    def __init__(
        self,
        num_labels: int,
        ignore_index: int = 255,
        do_reduce_labels: bool = False,
        boundary_width: float = 0.02,
    ):
        super().__init__(num_labels, ignore_index, do_reduce_labels, boundary_width=boundary_width)
        self.boundary_width = boundary_width

    def _count(self, prediction: LabelMap, reference: LabelMap) -> torch.Tensor:
        return boundary_counts(prediction, reference, self.num_labels, self.ignore_index, self.boundary_width)

    def _scores(self, counts: torch.Tensor) -> dict[str, Any]:
        intersection, predicted, labeled = counts.cpu().double()
        iou = intersection / (predicted + labeled - intersection)
        return {"mean_boundary_iou": iou.nanmean().item(), "per_category_boundary_iou": iou.tolist()}
