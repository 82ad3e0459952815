"""What an evaluation leaves behind: a report as JSON and CSV, a table on the screen, data matched with the model.

The report, as `evaluation.json` holds it (shares from 0 to 1, `null` where a score is undefined):

    {"model": directory or Hub id, "dataset": folder or Hub id, "split": its own name,
     "protocol": {"inference_mode": "whole", "slide" or "slide_and_whole", "crop_size": [height, width],
                  "stride": [height, width], "scales": [1.0, ...], "flip": false,
                  "size": {"shortest_edge": 512, ...}, "dtype": "float32"},
     "num_images": 101, "classes_in_mean_iou": 18,
     "metrics": {"overall_accuracy", "mean_iou", "mean_accuracy", "mean_dice", "mean_fscore", "mean_precision",
                 optionally "mean_boundary_iou", "mean_iou_seen", "mean_iou_unseen", "harmonic_mean_iou"},
     "per_category": {name: {"iou", "accuracy", "dice", "fscore", "precision", optionally "boundary_iou"}},
     "absent_from_data": [names of the model's classes that the data does not know],
     "worst": [{"index": 7, "mean_iou": 0.31}, ...]}

`crop_size` and `stride` are `null` when images are taken whole, `size` when they are not resized. Means are over those
of the data's classes whose score is defined.
"""

import csv
import io
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from ..metrics import scores_from_confusion_matrix
from ..model.class_names_denseclip import same_name
from ..model.configuration_denseclip import DenseCLIPConfig


logger = logging.getLogger(__name__)


def match_classes(data: Mapping[int, str], model: Mapping[int, str]) -> list[int]:
    """
    The model's id of each of the data's classes, by name as [`same_name`] compares them.

    Raises:
        ValueError: if the data has a class that the model does not know.
    """
    names, known = ([same_name(classes[i]) for i in range(len(classes))] for classes in (data, model))
    if names == known:
        return list(range(len(names)))
    unknown = [data[i] for i, name in enumerate(names) if name not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of the data's {len(names)} classes are unknown to the model ({_some(unknown)}), whose "
            f"classes start with {_some(list(model.values()))}: evaluate on data with the model's classes, or rename "
            "the data's (`--classes`)."
        )
    absent = [model[i] for i, name in enumerate(known) if name not in names]
    which = f"lacks {len(absent)} of the model's classes ({_some(absent)})" if absent else "has another order"
    logger.warning("The data %s: its classes are matched by name, and means are over them.", which)
    return [known.index(name) for name in names]


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


class MatchedSamples:
    """
    Samples whose masks hold the model's class ids.

    Args:
        samples (sequence of `{"image", "mask"}`): with masks of the data's class ids.
        ids (`Sequence[int]`): the model's id of each of the data's classes, see [`match_classes`].
        data_ignore_index, ignore_index (`int`): pixels without a class, in the data and for the model.
    """

    def __init__(self, samples, ids: Sequence[int], data_ignore_index: int, ignore_index: int):
        self.samples, self.ids = samples, np.array(ids)
        self.data_ignore_index, self.ignore_index = data_ignore_index, ignore_index

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.samples[index]
        mask = np.asarray(sample["mask"]).astype(np.int64)
        ignored = mask == self.data_ignore_index
        matched = np.where(ignored, self.ignore_index, self.ids[np.where(ignored, 0, mask)])
        return {"image": sample["image"], "mask": matched}


def scores_of_classes(matrix, ids: Sequence[int], leave_out: Sequence[int] = ()) -> dict[str, Any]:
    """[`scores_from_confusion_matrix`] for the classes `ids` alone, in their order; means are without `leave_out`."""
    others = set(range(len(matrix))).difference(ids).union(leave_out)
    scores = scores_from_confusion_matrix(matrix, sorted(others))
    return {name: [value[i] for i in ids] if isinstance(value, list) else value for name, value in scores.items()}


def seen_and_unseen(iou: Sequence[float], names: Sequence[str], unseen: Sequence[str]) -> dict[str, float]:
    """Mean IoU of the classes `names` that training knew and of those it did not, and the two's harmonic mean."""
    known, new = (
        nan_mean([value for value, name in zip(iou, names, strict=True) if (name in unseen) == is_new])
        for is_new in (False, True)
    )
    both = 2 * known * new / (known + new) if known + new else 0.0
    return {"mean_iou_seen": known, "mean_iou_unseen": new, "harmonic_mean_iou": both}


def nan_mean(values: Sequence[float]) -> float:
    """Mean of what is not NaN; NaN if nothing is."""
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


def protocol_of(
    config: DenseCLIPConfig, size: Mapping[str, Any] | None, scales: Sequence[float] = (1.0,), flip: bool = False
) -> dict[str, Any]:
    """
    How a model is measured, as reports and cards carry it; `None` is what does not apply or is not known.

    Args:
        config ([`DenseCLIPConfig`]): of the model.
        size (`Mapping[str, Any]`, *optional*): what images are resized to, as image processors have it.
        scales (`Sequence[float]`): factors on that size, one view each.
        flip (`bool`): whether mirrored views are averaged too.
    """
    slides = config.inference_mode != "whole"
    crop_size, stride = config.window
    return {
        "inference_mode": config.inference_mode,
        "crop_size": crop_size if slides else None,
        "stride": stride if slides else None,
        "scales": list(scales),
        "flip": flip,
        "size": {key: value for key, value in dict(size or {}).items() if value is not None} or None,
    }


def build_report(scores: Mapping[str, Any], names: Sequence[str], **description: Any) -> dict[str, Any]:
    """The report described above, from scores with `per_category_*` lists and `description` (model, data set, …)."""
    prefix = "per_category_"
    lists = {key.removeprefix(prefix): values for key, values in scores.items() if key.startswith(prefix)}
    return {
        **description,
        "classes_in_mean_iou": scores["classes_in_mean_iou"],
        "metrics": {key: value for key, value in scores.items() if isinstance(value, float)},
        "per_category": {name: {score: values[i] for score, values in lists.items()} for i, name in enumerate(names)},
    }


def save_report(report: Mapping[str, Any], folder: Path) -> None:
    """Write `evaluation.json` and, one class a line, `evaluation.csv`; undefined scores are null and empty."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(without_nan(report), indent=2, ensure_ascii=False, allow_nan=False)
    write_atomically(folder / "evaluation.json", text + "\n")
    rows = list(without_nan(report["per_category"]).items())
    table, columns = io.StringIO(), list(rows[0][1])
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["class", *columns])
    writer.writerows([name, *(values[column] for column in columns)] for name, values in rows)
    write_atomically(folder / "evaluation.csv", table.getvalue())


def without_nan(value: Any) -> Any:
    """`value`, with `None` in place of every float in it (in mappings and lists, too) that is NaN or infinite."""
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def report_table(report: Mapping[str, Any]) -> str:
    """The scores as lines of text, in percent; a dash where undefined."""
    scores = {"iou": "IoU", "accuracy": "Acc", "fscore": "F", "boundary_iou": "Boundary"}
    per_category = report["per_category"]
    shown = {key: title for key, title in scores.items() if key in next(iter(per_category.values()))}
    width = max(len("class"), len("mean"), *map(len, per_category))
    lines = [f"{'class':<{width}}" + "".join(f"{title:>10}" for title in shown.values())]
    lines += [
        f"{name:<{width}}" + "".join(_percent(values[key]) for key in shown) for name, values in per_category.items()
    ]
    means = "".join(_percent(report["metrics"][f"mean_{key}"]) for key in shown)
    accuracy = _percent(report["metrics"]["overall_accuracy"]).strip()
    counted = f"mean IoU over {report['classes_in_mean_iou']} of {len(per_category)} classes"
    last = f"{report['num_images']} images of {report['split']}, pixel accuracy {accuracy}, {counted}"
    lines.append(f"{'mean':<{width}}{means}")
    for key, title in (("mean_iou_seen", "seen"), ("mean_iou_unseen", "unseen"), ("harmonic_mean_iou", "harmonic")):
        if key in report["metrics"]:
            lines.append(f"{title:<{width}}{_percent(report['metrics'][key])}")
    return "\n".join([*lines, last])


def _percent(value: float) -> str:
    return f"{'–':>10}" if math.isnan(value) else f"{100 * value:>10.2f}"


__all__ = [
    "MatchedSamples",
    "build_report",
    "match_classes",
    "protocol_of",
    "report_table",
    "save_report",
    "scores_of_classes",
    "seen_and_unseen",
    "without_nan",
]
