"""The texts of a model card; see [`write_model_card`]."""

import json
import math
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

import torch


PACKAGES = ("denseclip_hf", "torch", "transformers", "accelerate", "datasets")


def about(config: Any, parameters: int | None, source: str | None, base_model: str | None) -> str:
    """What the model is."""
    tower = "CLIP's modified ResNet" if config.has_resnet else "CLIP's vision transformer"
    if config.use_text_guidance:
        method = (
            "DenseCLIP matches every pixel's embedding with the embedding of every class name, and gives the score "
            "maps to a Semantic-FPN decoder."
        )
    else:
        method = "CLIP's image encoder under a Semantic-FPN decoder, without guidance by language (a baseline)."
    rows = [
        ("Image encoder", f"{tower}, trained at {config.image_size} x {config.image_size} pixels"),
        ("Classes", str(config.num_labels)),
    ]
    if config.use_text_guidance:
        prompt = f"{config.num_context_tokens} learnt context vectors" if config.num_context_tokens else "fixed"
        rows.append(("Prompt", f"{prompt}, template `{config.prompt_template}`"))
    if parameters:
        rows.append(("Parameters", f"{parameters / 1e6:.1f} M"))
    if base_model:
        rows.append(("Started from", f"`{base_model}`"))
    if source:
        rows.append(("Weights", source))
    return (
        f"A semantic segmentation model: one of {config.num_labels} classes for every pixel.\n{method}\n\n"
        + _table(("", ""), rows)
    )


def usage(config: Any) -> str:
    """Runnable snippets."""
    return """## How to use

```
pip install denseclip_hf
```

```python
import denseclip_hf  # registers the model; or pass trust_remote_code=True if the repository carries the code
from transformers import pipeline

segment = pipeline("image-segmentation", model="PATH_OR_REPOSITORY")
for found in segment("photo.jpg"):
    print(found["label"], found["mask"].size)
```

```python
import denseclip_hf
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

processor = AutoImageProcessor.from_pretrained("PATH_OR_REPOSITORY")
model = AutoModelForSemanticSegmentation.from_pretrained("PATH_OR_REPOSITORY").eval()
image = Image.open("photo.jpg").convert("RGB")
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0]  # (height, width)
print({model.config.id2label[i] for i in labels.unique().tolist()})
```"""


def classes(config: Any) -> str:
    """Class names with their colours."""
    if config.palette:
        rows = [
            (str(i), _cell(config.id2label[i]), f"`#{r:02x}{g:02x}{b:02x}` ({r}, {g}, {b})")
            for i, (r, g, b) in enumerate(config.palette)
        ]
        table = _table(("id", "class", "colour"), rows)
    else:
        table = _table(("id", "class"), [(str(i), _cell(name)) for i, name in config.id2label.items()])
    return f"## Classes\n\n<details><summary>{config.num_labels} classes</summary>\n\n{table}\n\n</details>"


def training_table(training: Mapping[str, Any] | None, dataset: str | None) -> str:
    """Data and recipe."""
    rows = [("Data", f"`{dataset}`")] if dataset else []
    rows += [(key, _cell(_plain(value))) for key, value in (training or {}).items() if value is not None]
    return f"## Training\n\n{_table(('', ''), rows)}"


def results_tables(results: Mapping[str, Any]) -> str:
    """Overall and per-class numbers, in per cent."""
    names = {"mean_iou": "mIoU", "mean_accuracy": "mAcc", "overall_accuracy": "aAcc"}
    measured = {name: results["metrics"].get(key) for key, name in names.items()}
    overall = {name: text for name, value in measured.items() if (text := _percent(value))}
    text = f"## Results\n\nMeasured on `{results['dataset']}`, split `{results['split']}`"
    if results.get("num_images"):
        text += f", {results['num_images']} images"
    text += ".\n"
    if results.get("protocol"):
        text += (
            "Protocol: " + ", ".join(f"{key} {_plain(value)}" for key, value in results["protocol"].items()) + ".\n"
        )
    text += "\n" + _table(tuple(f"{name} (%)" for name in overall), [tuple(overall.values())])
    rows = [
        (_cell(name), _percent(values.get("iou")) or "–", _percent(values.get("accuracy")) or "–")
        for name, values in (results.get("per_category") or {}).items()
        if _percent(values.get("iou")) or _percent(values.get("accuracy"))
    ]
    if rows:
        table = _table(("class", "IoU (%)", "accuracy (%)"), rows)
        text += f"\n\n<details><summary>Per class</summary>\n\n{table}\n\n</details>"
    return text


def limits(config: Any) -> str:
    """What it can't do."""
    return f"""## Limits and biases

- It knows the {config.num_labels} classes above; whatever else is in a picture gets one of them.
- It was trained on pictures of one data set, at one resolution: other cameras, weather, regions or sizes of things can
  be much worse than the numbers suggest, and rare classes are worse than common ones.
- CLIP was trained on pictures and captions from the internet and carries their biases, about people above all. Look at
  its results on your own data before you let anything depend on it; do not use it to identify people or judge them.
- The licences of CLIP's weights and of the training data apply beside this model's own."""


def citation() -> str:
    """The paper."""
    return """## Citation

```bibtex
@inproceedings{rao2022denseclip,
  title     = {DenseCLIP: Language-Guided Dense Prediction with Context-Aware Prompting},
  author    = {Rao, Yongming and Zhao, Wenliang and Chen, Guangyi and Tang, Yansong and Zhu, Zheng and Huang, Guan
               and Zhou, Jie and Lu, Jiwen},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022},
  note      = {arXiv:2112.01518}
}
```"""


def environment() -> dict[str, str]:
    """Versions and hardware of this process."""
    versions = []
    for package in PACKAGES:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    hardware = ", ".join(f"{devices.count(name)} x {name}" for name in dict.fromkeys(devices))
    return {
        "Versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "Hardware": hardware or f"CPU ({platform.machine()})",
    }


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _percent(value: Any) -> str | None:
    return f"{100 * value:.2f}" if isinstance(value, (int, float)) and math.isfinite(value) else None


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, tuple, bool)) else str(value)


__all__ = ["about", "citation", "classes", "environment", "limits", "results_tables", "training_table", "usage"]
