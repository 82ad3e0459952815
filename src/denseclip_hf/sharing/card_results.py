"""Measurements of a model card: what evaluation and training found, checked, and as the Hub's model-index."""

import math
import re
from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results

from .card_sections import is_hub_name, protocol_words, shown_name


PIPELINE = "image-segmentation"
METRICS = {
    "mean_iou": ("mean_iou", "mIoU"),
    "mean_accuracy": ("mean_accuracy", "mAcc"),
    "overall_accuracy": ("accuracy", "aAcc"),
}


def protocol_of(
    config: Any, size: Mapping[str, Any] | None, scales: Sequence[float] = (1.0,), flip: bool = False
) -> dict[str, Any]:
    """
    How a model is measured, as reports and cards carry it; `None` is what does not apply or is not known.

    Args:
        config ([`DenseCLIPConfig`]): of the model.
        size (`Mapping[str, Any]`, *optional*): what pictures are resized to, as image processors have it.
        scales (`Sequence[float]`): factors on that size, one view each.
        flip (`bool`): whether mirrored views are averaged too.
    """
    slides = config.inference_mode == "slide"
    return {
        "inference_mode": config.inference_mode,
        "crop_size": list(config.crop_size) if slides else None,
        "stride": list(config.stride) if slides else None,
        "scales": list(scales),
        "flip": flip,
        "size": {key: value for key, value in dict(size or {}).items() if value is not None} or None,
    }


def results_of_training(
    metrics: Mapping[str, Any], config: Any, dataset: str, split: str, size: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """
    What `DenseCLIPTrainer.evaluate` returned, in the form [`update_results`] takes.

    Args:
        metrics (`Mapping[str, Any]`): with the prefix `eval_`.
        config ([`DenseCLIPConfig`]): of the model, for class names and protocol.
        dataset, split (`str`): what it was measured on.
        size (`Mapping[str, Any]`, *optional*): what pictures were resized to.
    """
    columns = {kind: metrics.get(f"eval_per_category_{kind}", []) for kind in ("iou", "accuracy")}
    per_category = {
        name: {kind: values[index] for kind, values in columns.items() if index < len(values)}
        for index, name in config.id2label.items()
    }
    return {
        "dataset": dataset,
        "split": split,
        "protocol": protocol_of(config, size),
        "metrics": {key: metrics[f"eval_{key}"] for key in METRICS if f"eval_{key}" in metrics},
        "per_category": per_category,
    }


def check_results(results: Mapping[str, Any]) -> None:
    """Raise a `ValueError` naming what `results` lack of what [`update_results`] takes, or what is no such number."""
    for key in ("dataset", "split", "metrics"):
        if not results.get(key):
            raise ValueError(f"the results lack `{key}`: a number without it means nothing in a model card.")
    numbers = {key: results["metrics"].get(key) for key in METRICS}
    for category, values in (results.get("per_category") or {}).items():
        numbers |= {f"{kind} of {category}": values.get(kind) for kind in ("iou", "accuracy")}
    for name, value in numbers.items():
        if value is None or (isinstance(value, Real) and math.isnan(value)):
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
            raise ValueError(f"{name} must be a number from 0 to 1 (not per cent), got {value!r}.")


def add_to_model_index(front: dict[str, Any], name: str, results: Mapping[str, Any], path: Path) -> list[EvalResult]:
    """
    Put a measurement into the entry `name` of a front matter's model-index, or its first entry.

    Args:
        front (`dict[str, Any]`): front matter, which is changed in place.
        name (`str`): what the model is called.
        results (`Mapping[str, Any]`): the measurement, see [`update_results`].
        path (`Path`): of the card, to name it where something is wrong.

    Returns:
        `list[EvalResult]`: all results of that entry, the new ones last.

    Raises:
        ValueError: if there is a model-index that is not as the Hub defines it.
    """
    new = _eval_results(results)
    try:
        entries = list(front.get("model-index") or [])
        place = next((index for index, entry in enumerate(entries) if entry["name"] == name), 0)
        found = [model_index_to_eval_results([entry]) for entry in entries[place : place + 1]]
        name, old = found[0] if found else (name, [])
        eval_results_to_model_index(name, old)  # can be written again
        for result in old:  # can stand in the table
            "".join((result.dataset_name, result.dataset_split or "", result.metric_name or result.metric_type))
            protocol_words(result.metric_args or {})
    except (TypeError, LookupError, AttributeError, ValueError) as error:
        raise ValueError(f"the `model-index` of {path} is not as the Hub defines it: correct it.") from error
    measured = [result for result in old if not any(result.is_equal_except_value(other) for other in new)] + new
    if measured:
        entries[place : place + 1] = eval_results_to_model_index(name, measured)
        front["model-index"] = entries
    return measured


def _eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """The numbers of a measurement."""
    protocol = {key: value for key, value in dict(results.get("protocol") or {}).items() if value is not None}
    return [
        EvalResult(
            task_type=PIPELINE,
            dataset_type=_slug(results["dataset"]),
            dataset_name=shown_name(results["dataset"]),
            dataset_split=str(results["split"]),
            metric_type=metric_type,
            metric_name=name,
            metric_value=round(float(results["metrics"][key]), 4),
            metric_args=protocol or None,  # not `dataset_args`, which only one measurement of a split can have
        )
        for key, (metric_type, name) in METRICS.items()
        if _is_number(results["metrics"].get(key))
    ]


def _slug(name: str) -> str:
    return name if is_hub_name(name) else re.sub(r"[^a-z0-9]+", "-", shown_name(name).lower()).strip("-") or "dataset"


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and math.isfinite(value)


__all__ = ["add_to_model_index", "check_results", "protocol_of", "results_of_training"]
