"""The model card: README.md of a model directory, from `card_template.md`; its results are brought up to date."""

import html
import math
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK

from ..files import write_atomically
from ..model.configuration_denseclip import DenseCLIPConfig
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from ..model.towers_denseclip import tower_of


CARD = "README.md"
TEMPLATE = Path(__file__).with_name("card_template.md")
MODEL = "PATH_OR_REPOSITORY"  # in the snippets, until the model is pushed somewhere
TASK = "image-segmentation"
METRICS = {
    "mean_iou": ("mean_iou", "mIoU"),
    "mean_accuracy": ("mean_accuracy", "mAcc"),
    "overall_accuracy": ("accuracy", "aAcc"),
    "mean_iou_seen": ("mean_iou_seen", "mIoU, seen classes"),
    "mean_iou_unseen": ("mean_iou_unseen", "mIoU, unseen classes"),
    "harmonic_mean_iou": ("harmonic_mean_iou", "harmonic mean of both"),
}
METHODS = {
    "semantic_fpn": "DenseCLIP matches every pixel's embedding with the embedding of every class name, and gives the "
    "score maps to a Semantic-FPN decoder.",
    "cost_aggregation": "It matches every place's embedding with that of every class name, and a decoder that "
    "knows no classes (CAT-Seg's cost aggregation) refines the score maps: it takes any words.",
    "unguided": "An image encoder under a Semantic-FPN decoder, without guidance by language (a baseline).",
}
POOLS = {"attention": "an attention pool", "linear": "a linear layer"}  # that embed places
IMAGES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
# What stands between these comments is replaced with every measurement; the rest of a card is anybody's to edit.
BEGIN, END = "<!-- results: replaced when the model is evaluated -->", "<!-- end of results -->"


def write_card(
    model_dir: str | os.PathLike,
    *,
    name: str | None = None,
    source: str | None = None,
    license: str | None = None,
    base_model: str | Sequence[str] | None = None,
    dataset: str | None = None,
    training: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    image: str | None = None,
) -> Path:
    """
    Write `model_dir/README.md`; an existing card stays, only `results` are added.

    Of local paths only the last part is shown.

    Args:
        model_dir (`str` or `os.PathLike`): a saved model; its config and the shapes of its weights are read.
        name (`str`, *optional*): title, by default the directory's name.
        source (`str`, *optional*): where the weights come from, in words.
        license (`str`, *optional*): the Hub's identifier; "unknown" unless given.
        base_model (`str` or `list[str]`, *optional*): CLIP, or backbone and CLIP, it started from; in the front matter
            if that is a name on the Hub.
        dataset (`str`, *optional*): what it was trained on; likewise.
        training (`Mapping[str, Any]`, *optional*): the recipe, versions and hardware, by what they are called.
        results (`Mapping[str, Any]`, *optional*): a measurement, see [`add_results`].
        image (`str`, *optional*): an image file inside `model_dir`.

    Returns:
        `Path` of the card.

    Raises:
        ValueError: for results that [`add_results`] does not take.
        OSError: if `model_dir` holds no config.
    """
    if results:
        _check_results(results)
    folder = Path(model_dir)
    path = folder / CARD
    if path.is_file():
        return add_results(folder, results) if results else path
    config = DenseCLIPConfig.from_pretrained(folder)
    bases = [base for base in ([base_model] if isinstance(base_model, str) else base_model or ()) if base]
    on_the_hub = [base for base in bases if is_hub_name(base)]
    name = name or shown_name(folder)
    data = ModelCardData(
        library_name="transformers",
        license=license or "unknown",
        pipeline_tag=TASK,
        tags=["denseclip", "clip", "semantic-segmentation", TASK, "vision"],
        base_model=on_the_hub if len(on_the_hub) > 1 else next(iter(on_the_hub), None),
        datasets=[dataset] if dataset and is_hub_name(dataset) else None,
    )
    rows = {"Data": dataset and shown_name(dataset), **(training or {})}
    card = ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=plain(name),
        model=MODEL,
        num_labels=config.num_labels,
        method=METHODS[config.decode_head if config.use_text_guidance else "unguided"],
        facts=_rows(_facts(config, source, bases)),
        image=image,
        results=f"{BEGIN}\n{END}",
        training=_rows(rows) if dataset or training else None,
        classes=_classes(config),
    )
    return _write(card, path, results, name)


def add_results(model_dir: str | os.PathLike, results: Mapping[str, Any]) -> Path:
    """
    Put a measurement into the card of `model_dir`, a new one if it has none: into its model-index and its table.

    Results for other data, splits or protocols stay in both; the same measurement is replaced. Per-class numbers are
    this one's. Everything else in the card stays as it is.

    Args:
        model_dir (`str` or `os.PathLike`): a saved model.
        results (`Mapping[str, Any]`): `dataset` and `split` (`str`), `metrics` (`mean_iou`, `mean_accuracy`,
            `overall_accuracy` from 0 to 1) and, if known, `protocol` (mapping), `num_images` (`int`) and
            `per_category` (class name to `{"iou", "accuracy"}`). NaN, `None` and missing numbers are left out.

    Returns:
        `Path` of the card.

    Raises:
        ValueError: naming the key that is missing or no number from 0 to 1, or if the card cannot be read.
    """
    path = Path(model_dir) / CARD
    if not path.is_file():
        return write_card(model_dir, results=results)
    _check_results(results)
    return _write(load_card(path), path, results, shown_name(model_dir))


def load_card(path: str | os.PathLike) -> ModelCard:
    """
    A card and its front matter.

    Raises:
        ValueError: if it is no text in UTF-8, or its front matter is not as the Hub defines it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        front = REGEX_YAML_BLOCK.search(text)
        if front and any(isinstance(token, yaml.AliasToken) for token in yaml.scan(front[2])):
            raise ValueError("it has aliases (*), by which a few lines can stand for billions of values")
        card = ModelCard(text)
        _table(card.data.get("eval_results") or [])
        str(card)  # its front matter can be written again
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the front matter of {path} cannot be read ({reason}): correct it.") from error
    return card


def _write(card: ModelCard, path: Path, results: Mapping[str, Any] | None, name: str) -> Path:
    """Write `card` with checked `results` in its model-index and text; `name` is the model's if it has none there."""
    if results:
        new, data = _eval_results(results), card.data
        old = [each for each in data.get("eval_results") or [] if not any(each.is_equal_except_value(n) for n in new)]
        if old + new:
            data["eval_results"] = old + new
            data["model_name"] = data.get("model_name") or visible(name)
        block = f"{BEGIN}\n## Results\n\n{_table(old + new)}{_per_class(results)}\n{END}"
        before, begin, rest = card.text.partition(BEGIN)
        _, end, after = rest.partition(END)
        card.text = f"{before}{block}{after}" if begin and end else f"{card.text.rstrip()}\n\n{block}\n"
    write_atomically(path, f"{str(card).rstrip()}\n")
    return path


def _check_results(results: Mapping[str, Any]) -> None:
    """Raise a `ValueError` naming what `results` lack of what [`add_results`] takes, or what is no such number."""
    numbers = {key: results["metrics"].get(key) for key in METRICS}
    for category, values in (results.get("per_category") or {}).items():
        numbers |= {f"{kind} of {category}": values.get(kind) for kind in ("iou", "accuracy")}
    for name, value in numbers.items():
        is_number = isinstance(value, Real) and not isinstance(value, bool)
        if value is not None and not (is_number and (math.isnan(value) or 0 <= float(value) <= 1)):
            raise ValueError(f"{name} must be a number from 0 to 1 (not percent), got {value!r}.")


def _eval_results(results: Mapping[str, Any]) -> list[EvalResult]:
    """The numbers of a measurement, as a model-index has them."""
    dataset = str(results["dataset"])
    name = visible(shown_name(dataset))
    slug = dataset if is_hub_name(dataset) else re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "dataset"
    protocol = {key: value for key, value in dict(results.get("protocol") or {}).items() if value is not None}
    return [
        EvalResult(
            task_type=TASK,
            dataset_type=slug,
            dataset_name=name,
            dataset_split=visible(results["split"]),
            metric_type=metric_type,
            metric_name=short,
            metric_value=round(float(results["metrics"][key]), 4),
            metric_args=protocol or None,  # not `dataset_args`, which only one measurement of a split can have
        )
        for key, (metric_type, short) in METRICS.items()
        if _percent(results["metrics"].get(key)) != "–"
    ]


def _table(measured: Sequence[EvalResult]) -> str:
    """Every measurement in percent, one line each."""
    lines: dict[tuple[str, str, str], dict[str, str]] = {}
    for each in measured:
        words = protocol_words(each.metric_args or {})
        key = plain(each.dataset_name), plain(each.dataset_split or ""), plain(words)
        lines.setdefault(key, {})[plain(each.metric_name or each.metric_type)] = _percent(each.metric_value)
    metrics = list(dict.fromkeys(metric for line in lines.values() for metric in line))
    head = ("data", "split", "protocol", *(f"{metric} (%)" for metric in metrics))
    return markdown_table(head, [(*key, *(line.get(m, "–") for m in metrics)) for key, line in lines.items()])


def _per_class(results: Mapping[str, Any]) -> str:
    """The classes of a measurement, folded away."""
    scores = (results.get("per_category") or {}).items()
    rows = [(plain(name), _percent(each.get("iou")), _percent(each.get("accuracy"))) for name, each in scores]
    rows = [row for row in rows if row[1:] != ("–", "–")]
    if not rows:
        return ""
    images = f", {results['num_images']} images" if results.get("num_images") else ""
    of = f"{plain(shown_name(results['dataset']))}, {plain(results['split'])}{images}, {len(rows)} classes"
    table = markdown_table(("class", "IoU (%)", "accuracy (%)"), rows)
    return f"\n\n<details><summary>Per class: {of}</summary>\n\n{table}\n\n</details>"


def protocol_words(protocol: Mapping[str, Any]) -> str:
    """How a model was measured, in words, such as "windows of 512 x 512, step 341 x 341, flips, float32"."""
    rest = {key: value for key, value in protocol.items() if value is not None}
    mode, size = rest.pop("inference_mode", None), rest.pop("size", {})
    crop, stride = rest.pop("crop_size", ()), rest.pop("stride", ())
    words = [f"windows of {' x '.join(map(str, crop))}, step {' x '.join(map(str, stride))}"] * ("slide" in str(mode))
    words += ["whole images"] * ("whole" in str(mode))
    if (scales := rest.pop("scales", [1.0])) != [1.0]:
        words.append(f"scales {' '.join(map(str, scales))}")
    words += ["flips"] * bool(rest.pop("flip", False))
    words += [f"{key.replace('_', ' ')} {value}" for key, value in sorted(size.items())]
    words += [str(rest.pop("dtype"))] if "dtype" in rest else []
    return ", ".join(words + [f"{key} {value}" for key, value in rest.items()])


def _facts(config: DenseCLIPConfig, source: str | None, bases: Sequence[str]) -> dict[str, Any]:
    clip: Any = config.clip_config
    backbone: Any = config.backbone_config
    tower = tower_of(clip).description
    if backbone is not None:
        tower = f"{backbone.model_type} backbone"
        tower += f" with {POOLS[config.backbone_pool]}" if config.use_text_guidance else ""
    with torch.device("meta"):
        parameters = DenseCLIPForSemanticSegmentation(config).num_parameters()
    prompt = f"{config.num_context_tokens} learned context vectors" if config.num_context_tokens else "fixed"
    return {
        "Image encoder": f"{tower}, trained at {config.image_size} x {config.image_size} pixels",
        "Classes": config.num_labels,
        "Prompt": f'{prompt}, template "{config.prompt_template}"' if config.use_text_guidance else None,
        "Parameters": f"{parameters / 1e6:.1f} M",
        "Started from": " and ".join(shown_name(base) for base in bases) or None,
        "Weights": source,
    }


def _classes(config: DenseCLIPConfig) -> str:
    names = [(str(index), plain(name)) for index, name in config.id2label.items()]
    if not config.palette:
        return markdown_table(("id", "class"), names)
    colors = [f"`#{red:02x}{green:02x}{blue:02x}`" for red, green, blue in config.palette]
    return markdown_table(("id", "class", "color"), [(*n, color) for n, color in zip(names, colors, strict=True)])


def shown_images(folder: Path, card: str) -> set[str]:
    """Names of the images in `folder` that the text of a card shows."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in IMAGES)
    return {name for name in names if re.search(rf"""(\]\(|src=["'])(\./)?{re.escape(name)}[)"' ]""", card)}


def is_hub_name(name: str | os.PathLike) -> bool:
    """Whether `name` is written like a repository's on the Hub, and is no file or folder here."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) is not None and not Path(name).exists()


def shown_name(name: str | os.PathLike) -> str:
    """How others see a Hub name (all of it) or a local path (its last part, unless that is the home)."""
    path = Path(name).resolve()
    if is_hub_name(name):
        return str(name)
    return path.name if path.name and path != Path.home().resolve() else "a local folder"


def visible(text: object) -> str:
    """`text` on one line without control and bidirectional characters, which show something else than is written."""
    kept = (c if c in "\u200c\u200d" or not unicodedata.category(c).startswith("C") else " " for c in str(text))
    return " ".join("".join(kept).split())


def plain(text: object) -> str:
    """`text` so that Markdown shows its letters: no markup, no HTML, nothing [`visible`] leaves out."""
    return re.sub(r"([\\`*_\[\]|~$])", r"\\\1", html.escape(visible(text), quote=False))


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _rows(rows: Mapping[str, Any]) -> str:
    """A table of what is known in `rows`."""
    return markdown_table(("", ""), [(plain(key), plain(value)) for key, value in rows.items() if value is not None])


def _percent(value: Any) -> str:
    return f"{100 * value:.2f}" if isinstance(value, Real) and math.isfinite(value) else "–"
