"""The model card (README.md of a model directory): written from what is known, never over what a person wrote.

Each generated section stands between two marker comments; writing the card again replaces what is between them and
leaves everything else alone. Values of the front matter that are already there stay, measured results apart.
"""

import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from safetensors import safe_open

from .configuration_denseclip import DenseCLIPConfig
from .model_card_sections import (
    about,
    citation,
    classes,
    is_hub_name,
    limits,
    results_tables,
    shown_name,
    training_table,
    usage,
)


CARD = "README.md"
LIBRARY, PIPELINE = "transformers", "image-segmentation"
TAGS = ["denseclip", "clip", "semantic-segmentation", "image-segmentation", "vision"]
# Sections that are added to a card which lacks them; the others were taken out by somebody, and stay out.
MEASURED = ("results", "training", "picture")
METRICS = {
    "mean_iou": ("mean_iou", "mIoU"),
    "mean_accuracy": ("mean_accuracy", "mAcc"),
    "overall_accuracy": ("accuracy", "aAcc"),
}


def write_model_card(
    model_dir: str | os.PathLike,
    *,
    name: str | None = None,
    source: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    training: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    picture: str | None = None,
) -> Path:
    """
    Write or bring up to date `model_dir/README.md`.

    Args:
        model_dir (`str` or `os.PathLike`): a saved model; its config, and how many weights there are, are read.
        name (`str`, *optional*): title of a new card, by default made of the directory's.
        source (`str`, *optional*): where the weights come from, in words.
        license (`str`, *optional*): the Hub's identifier; "unknown" in a new card unless given.
        base_model (`str`, *optional*): CLIP it started from; in the front matter if it is a name on the Hub.
        dataset (`str`, *optional*): what it was trained on; likewise.
        training (`Mapping[str, Any]`, *optional*): the recipe, versions and hardware, by what they are called.
        results (`Mapping[str, Any]`, *optional*): a measurement, see [`update_results`].
        picture (`str`, *optional*): a picture file inside `model_dir`.

    Returns:
        `Path` of the card.

    Raises:
        ValueError: for results without the keys [`update_results`] asks for.
        OSError: if `model_dir` holds no config.
    """
    model_dir = Path(model_dir)
    config = DenseCLIPConfig.from_pretrained(model_dir)
    origin_is_known = bool(source or base_model) or not (model_dir / CARD).is_file()
    sections = {
        "about": about(config, _parameters(model_dir), source, base_model) if origin_is_known else "",
        "picture": f"![Prediction]({picture})" if picture else "",
        "usage": usage(config),
        "results": "",
        "training": training_table(training, dataset) if training or dataset else "",
        "classes": classes(config),
        "limits": limits(config),
        "citation": citation(),
    }
    return _write(model_dir, sections, results, name, license, base_model, dataset)


def update_results(model_dir: str | os.PathLike, results: Mapping[str, Any]) -> Path:
    """
    Put a measurement into the card of `model_dir`: its model-index and its table.

    Results for other data, splits or protocols stay in both; the same measurement is replaced. Per-class numbers are
    this one's. Of a local folder of data only the name appears. Other sections stay as they are.

    Args:
        model_dir (`str` or `os.PathLike`): a saved model.
        results (`Mapping[str, Any]`): `dataset` and `split` (`str`), `metrics` (`mean_iou`, `mean_accuracy`,
            `overall_accuracy` from 0 to 1) and, if known, `protocol` (mapping), `num_images` (`int`) and
            `per_category` (class name to `{"iou", "accuracy"}`). NaN and missing numbers are left out.

    Returns:
        `Path` of the card.

    Raises:
        ValueError: naming the key that is missing.
    """
    model_dir = Path(model_dir)
    if not (model_dir / CARD).is_file():
        return write_model_card(model_dir, results=results)
    return _write(model_dir, {}, results)


def _write(
    model_dir: Path,
    sections: dict[str, str],
    results: Mapping[str, Any] | None,
    name: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
) -> Path:
    """The card of `model_dir` with new `sections` and `results`, and what it had before."""
    path = model_dir / CARD
    old = ModelCard(path.read_text(encoding="utf-8")) if path.is_file() else None
    data = _front_matter(old.data if old else ModelCardData(), license, base_model, dataset)
    name = name or shown_name(str(model_dir.resolve()))
    if results is not None:
        _check_results(results)
        data.model_name = data.model_name or name
        data.eval_results = _merged(data.eval_results, eval_results(results))
        sections["results"] = results_tables(results, data.eval_results)
    body = _merge_body(old.text.lstrip("\n") if old else f"# {name}\n", sections, new=old is None)
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{body}", encoding="utf-8")
    return path


def eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """The numbers of a measurement, as in [`update_results`], for the front matter's model-index."""
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
    protocol: dict[str, Any] = {"inference_mode": config.inference_mode, "scales": [1.0], "flip": False}
    if config.inference_mode == "slide":
        protocol |= {"crop_size": list(config.crop_size), "stride": list(config.stride)}
    if size:
        protocol["size"] = {key: value for key, value in dict(size).items() if value is not None}
    columns = {kind: metrics.get(f"eval_per_category_{kind}", []) for kind in ("iou", "accuracy")}
    per_category = {
        name: {kind: values[index] for kind, values in columns.items() if index < len(values)}
        for index, name in config.id2label.items()
    }
    return {
        "dataset": dataset,
        "split": split,
        "protocol": protocol,
        "metrics": {key: metrics[f"eval_{key}"] for key in METRICS if f"eval_{key}" in metrics},
        "per_category": per_category,
    }


def _front_matter(data: Any, license: str | None, base_model: str | None, dataset: str | None) -> ModelCardData:
    data.license = license or data.license or "unknown"
    data.library_name = data.library_name or LIBRARY
    data.pipeline_tag = data.pipeline_tag or PIPELINE
    data.tags = data.tags or list(TAGS)
    if base_model and is_hub_name(base_model):
        data.base_model = data.base_model or base_model
    if dataset and is_hub_name(dataset):
        data.datasets = data.datasets or [dataset]
    return data


def _merged(old: Sequence[EvalResult] | None, new: list[EvalResult]) -> list[EvalResult]:
    kept = [result for result in old or [] if not any(result.is_equal_except_value(other) for other in new)]
    return kept + new


def _check_results(results: Mapping[str, Any]) -> None:
    for key in ("dataset", "split", "metrics"):
        if not results.get(key):
            raise ValueError(f"the results lack `{key}`: a number without it means nothing in a model card.")


def _merge_body(body: str, sections: Mapping[str, str], new: bool) -> str:
    for name, text in sections.items():
        begin, end = f"<!-- generated: {name} -->", f"<!-- end of generated: {name} -->"
        found = re.search(rf"{re.escape(begin)}.*?{re.escape(end)}", body, re.DOTALL)
        if not text:
            continue  # nothing is known now; what was known stays
        block = f"{begin}\n{text.strip()}\n{end}"
        if found:
            body = body[: found.start()] + block + body[found.end() :]
        elif new or name in MEASURED:
            body = f"{body.rstrip()}\n\n{block}\n"
    if new:
        hint = "<!-- Edit freely outside the generated sections: writing the card again keeps it. -->"
        body = body.replace("\n", f"\n\n{hint}\n", 1)
    return body


def _parameters(model_dir: Path) -> int | None:
    """Weights in the safetensors files, from their headers; buffers of batch norms are not counted."""
    count = 0
    for file in model_dir.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # no mapping
                if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
                    count += math.prod(tensors.get_slice(key).get_shape())
    return count or None


def _slug(name: str) -> str:
    return name if is_hub_name(name) else re.sub(r"[^a-z0-9]+", "-", shown_name(name).lower()).strip("-") or "dataset"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def read_results(path: str | os.PathLike) -> dict[str, Any]:
    """A JSON file of results, as `scripts/evaluate.py` writes it."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as JSON results ({error}).") from error


__all__ = ["read_results", "results_of_training", "update_results", "write_model_card"]
