"""The texts of a model card; see [`write_model_card`]."""

import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult


PLAIN_NAMES = ("", "data", "dataset", "model", "output")
MODEL = "PATH_OR_REPOSITORY"  # in the snippets, until it is pushed somewhere
METRIC_ORDER = ("mIoU", "mAcc", "aAcc")
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
        rows.append(("Started from", _origin(base_model)))
    if source:
        rows.append(("Weights", source))
    return (
        f"A semantic segmentation model: one of {config.num_labels} classes for every pixel.\n{method}\n\n"
        + markdown_table(("", ""), rows)
    )


def frozen(origin: str, parameters: int | None) -> str:
    """What freezing its classes changed."""
    count = f" {parameters / 1e6:.1f} M parameters are left." if parameters else ""
    return (
        f"## For inference alone\n\nThis is {origin} with its classes frozen: the text tower is gone, the logits are "
        f"the same bit for bit, and it can neither be trained nor take new words.{count}"
    )


def usage() -> str:
    """Runnable snippets."""
    return f"""## How to use

With the package `denseclip_hf` installed, as its README says:

```python
import denseclip_hf  # registers the model; without it, trust_remote_code=True runs the code that a repository carries
from transformers import pipeline

segment = pipeline("image-segmentation", model="{MODEL}", trust_remote_code=False)
for found in segment("photo.jpg"):
    print(found["label"], found["mask"].size)
```

```python
import denseclip_hf
import torch
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation
from transformers.image_utils import load_image

processor = AutoImageProcessor.from_pretrained("{MODEL}", trust_remote_code=False)
model = AutoModelForSemanticSegmentation.from_pretrained("{MODEL}", trust_remote_code=False).eval()
image = load_image("photo.jpg")  # RGB and upright
with torch.no_grad():
    outputs = model(**processor(image, return_tensors="pt"))
labels = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.size[::-1]])[0]  # (height, width)
print({{model.config.id2label[i] for i in labels.unique().tolist()}})
```"""


def classes(config: Any) -> str:
    """Class names with their colours."""
    if config.palette:
        rows = [
            (str(i), _cell(config.id2label[i]), f"`#{r:02x}{g:02x}{b:02x}` ({r}, {g}, {b})")
            for i, (r, g, b) in enumerate(config.palette)
        ]
        table = markdown_table(("id", "class", "colour"), rows)
    else:
        table = markdown_table(("id", "class"), [(str(i), _cell(name)) for i, name in config.id2label.items()])
    return f"## Classes\n\n<details><summary>{config.num_labels} classes</summary>\n\n{table}\n\n</details>"


def training_table(training: Mapping[str, Any] | None, dataset: str | None) -> str:
    """Data and recipe."""
    rows = [("Data", _origin(dataset))] if dataset else []
    rows += [(key, _cell(_plain(value))) for key, value in (training or {}).items() if value is not None]
    return f"## Training\n\n{markdown_table(('', ''), rows)}"


def results_tables(results: Mapping[str, Any], measured: Sequence[EvalResult]) -> str:
    """
    Every measurement in per cent, a line each, and the classes of the newest.

    Args:
        results (`Mapping[str, Any]`): the newest, see [`update_results`].
        measured (`Sequence[EvalResult]`): all numbers of the model-index, the newest included.
    """
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for result in measured:
        protocol = protocol_words(result.metric_args or {})
        key = (_cell(result.dataset_name), result.dataset_split or "", _cell(protocol))
        lines.setdefault(key, {})[result.metric_name or result.metric_type] = _percent(result.metric_value) or "–"
    named = {metric: None for line in lines.values() for metric in line}
    metrics = [*(m for m in METRIC_ORDER if m in named), *(m for m in named if m not in METRIC_ORDER)]
    head = ("data", "split", "protocol", *(f"{metric} (%)" for metric in metrics))
    rows = [(*key, *(line.get(metric, "–") for metric in metrics)) for key, line in lines.items()]
    text = f"## Results\n\n{markdown_table(head, rows)}"
    classes = [
        (_cell(name), _percent(values.get("iou")) or "–", _percent(values.get("accuracy")) or "–")
        for name, values in (results.get("per_category") or {}).items()
        if _percent(values.get("iou")) or _percent(values.get("accuracy"))
    ]
    if classes:
        images = f", {results['num_images']} images" if results.get("num_images") else ""
        of = f"{shown_name(results['dataset'])}, {results['split']}{images}, "
        of += protocol_words(results.get("protocol") or {})
        table = markdown_table(("class", "IoU (%)", "accuracy (%)"), classes)
        text += f"\n\n<details><summary>Per class: {of.rstrip(', ')}</summary>\n\n{table}\n\n</details>"
    return text


def protocol_words(protocol: Mapping[str, Any]) -> str:
    """A protocol as `scripts/evaluate.py` writes it, in words."""
    rest = {key: value for key, value in protocol.items() if value is not None}
    words = []
    if rest.pop("inference_mode", None) == "slide":
        height, width = rest.pop("crop_size", ("?", "?"))
        down, right = rest.pop("stride", ("?", "?"))
        words.append(f"windows of {height} x {width}, step {down} x {right}")
    elif "inference_mode" in protocol:
        words.append("whole pictures")
    if (scales := rest.pop("scales", [1.0])) != [1.0]:
        words.append(f"scales {' '.join(f'{scale:g}' for scale in scales)}")
    words += ["flips"] if rest.pop("flip", False) else []
    if isinstance(size := rest.get("size"), Mapping) and "shortest_edge" in size:
        del rest["size"]
        longest = f", long side at most {size['longest_edge']}" if size.get("longest_edge") else ""
        words.append(f"short side {size['shortest_edge']}{longest}")
    words += [str(rest.pop("dtype"))] if "dtype" in rest else []
    return ", ".join(words + [f"{key} {_plain(value)}" for key, value in rest.items()])


def is_hub_name(name: str) -> bool:
    """Whether `name` is written like a repository's on the Hub, and is no file or folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None and not Path(name).exists()


def shown_name(name: str) -> str:
    """What others are told of a Hub name (all of it) or a local path (its last part, or two if that says little)."""
    if is_hub_name(name):
        return str(name)
    path = Path(name).resolve()
    return f"{path.parent.name} {path.name}".strip() if path.name in PLAIN_NAMES else path.name


def _origin(name: str) -> str:
    return f"`{shown_name(name)}`" + (" (a local folder)" if Path(name).exists() else "")


def limits(config: Any) -> str:
    """What it can't do."""
    return f"""## Limits and biases

- It knows the {config.num_labels} classes above; whatever else is in a picture gets one of them.
- It was trained on pictures of one data set, at one resolution: other cameras, weather, regions or sizes of things can
  be much worse than the numbers suggest, and rare classes are worse than common ones.
- Pretrained CLIPs have learnt from pictures and captions of the internet; what starts from one carries their biases,
  about people above all. Look at its results on your own data before you let anything depend on it; do not use it to
  identify people or judge them.
- The licences of the weights it started from and of the training data apply beside this model's own."""


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


def shown_pictures(card: str) -> list[str]:
    """Names of the files that a card shows as pictures, those inside its directory."""
    # Neither runs on over the beginning of another: a search from each to the end of the file would take for ever.
    found = re.findall(r"!\[(?:[^][]|\[[^][]*\])*\]\(([^)\s]+)|<img[^<>]*\ssrc=[\"']([^\"']+)", card)
    names = {os.path.normpath(markdown or html) for markdown, html in found if "://" not in markdown + html}
    return sorted(name for name in names if not os.path.isabs(name) and name.split(os.sep)[0] != "..")


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


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _percent(value: Any) -> str | None:
    return f"{100 * value:.2f}" if isinstance(value, Real) and math.isfinite(value) else None


def _plain(value: Any) -> str:
    return json.dumps(value) if isinstance(value, (dict, list, tuple, bool)) else str(value)


__all__ = [
    "MODEL",
    "about",
    "citation",
    "classes",
    "environment",
    "frozen",
    "is_hub_name",
    "limits",
    "markdown_table",
    "protocol_words",
    "results_tables",
    "shown_name",
    "shown_pictures",
    "training_table",
    "usage",
]
