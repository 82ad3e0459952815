"""The model card (README.md of a model directory): written from what is known, never over what a person wrote.

Each generated section stands between two marker comments, the first with a short hash of it. Writing the card again
replaces the sections that are still as they were written and leaves everything else alone: sections that were changed,
or taken out with their markers, stay so. Values of the front matter that are already there, or were taken out, stay so
too, measured results apart; a comment at the end names what was once written there.
"""

import hashlib
import logging
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub.utils import yaml_dump
from safetensors import safe_open

from ..files import write_atomically
from ..model.configuration_denseclip import DenseCLIPConfig
from ..model.loading_denseclip import reason_of
from ..plain_yaml import load_plain_yaml
from .card_results import PIPELINE, add_to_model_index, check_results
from .card_sections import (
    MODEL,
    about,
    citation,
    classes,
    frozen,
    is_hub_name,
    limits,
    results_tables,
    shown_name,
    training_table,
    usage,
)


logger = logging.getLogger(__name__)

CARD = "README.md"
MAX_BYTES = 2 << 20
LIBRARY = "transformers"
TAGS = ["denseclip", "clip", "semantic-segmentation", "image-segmentation", "vision"]
# Sections that are added to a README which nothing was generated in yet.
MEASURED = ("results", "training", "picture")


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
        ValueError: for results that [`update_results`] does not take, or a card whose front matter can't be read.
        OSError: if `model_dir` holds no config.
    """
    model_dir = Path(model_dir)
    config = DenseCLIPConfig.from_pretrained(model_dir)
    origin_is_known = bool(source or base_model) or not (model_dir / CARD).is_file()
    sections = {
        "about": about(config, _parameters(model_dir), source, base_model) if origin_is_known else "",
        "picture": f"![Prediction]({picture})" if picture else "",
        "usage": usage(),
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
            `per_category` (class name to `{"iou", "accuracy"}`). NaN, `None` and missing numbers are left out.

    Returns:
        `Path` of the card.

    Raises:
        ValueError: naming the key that is missing or no number from 0 to 1, or if the front matter can't be read.
    """
    model_dir = Path(model_dir)
    if not (model_dir / CARD).is_file():
        return write_model_card(model_dir, results=results)
    return _write(model_dir, {}, results)


def write_frozen_card(
    model_dir: str | os.PathLike, card: str | os.PathLike | None, origin: str, name: str | None = None
) -> Path:
    """
    The card of a model whose classes were frozen: that of the model it was made from, and a section that says so.

    Args:
        model_dir (`str` or `os.PathLike`): the frozen model, without a card yet.
        card (`str` or `os.PathLike`, *optional*): README.md of the model it was made from, if that has one.
        origin (`str`): what that model is called.
        name (`str`, *optional*): title, if there is no `card`.

    Raises:
        ValueError: if the front matter of `card` can't be read.
    """
    model_dir = Path(model_dir)
    if card is None:
        write_model_card(model_dir, name=name)
    else:
        write_atomically(model_dir / CARD, card_text(Path(card)))
    sections = {"about": "", "frozen": frozen(origin, _parameters(model_dir)), "usage": usage()}
    return _write(model_dir, sections, None, add=("frozen",))


def card_to_push(model_dir: str | os.PathLike, repo_id: str | None, license: str | None = None) -> str:
    """
    The text of the card of `model_dir` with the repository `repo_id` in its snippets and `license` in its front
    matter, each if given. The file stays as it is.

    Raises:
        ValueError: if the front matter can't be read.
    """
    path = Path(model_dir) / CARD
    front, block, body = _split(card_text(path), path)
    if license and front.get("license") != license:
        front["license"] = license
        block = _front_matter_block(front)

    def name_it(section: re.Match) -> str:
        text = section[3].replace(MODEL, repo_id or MODEL)
        return _section(section[1], text) if _is_untouched(section) else section[0].replace(section[3], text)

    return block + _SECTION.sub(name_it, body)


def _write(
    model_dir: Path,
    sections: dict[str, str],
    results: Mapping[str, Any] | None,
    name: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
    dataset: str | None = None,
    add: Sequence[str] = (),
) -> Path:
    """The card of `model_dir` with new `sections` and `results`, and what it had before."""
    path = model_dir / CARD
    new = not path.is_file()
    name = name or shown_name(str(model_dir.resolve()))
    front, block, body = ({}, "", f"# {name}\n\n{_HINT}\n") if new else _split(card_text(path), path)
    before = dict(front)
    found = _WRITTEN.search(body)
    written = set(found[1].split()) if found else set()
    written |= _fill_front_matter(front, written, license, base_model, dataset)
    if results is not None:
        check_results(results)
        measured = add_to_model_index(front, name, results, path)
        sections["results"] = results_tables(results, measured)
    body = _merge_body(body, sections, add=tuple(sections) if new else add)
    record = f"<!-- generated front matter: {' '.join(sorted(written))} -->"
    body = _WRITTEN.sub(record, body) if found else f"{body.rstrip()}\n\n{record}\n"
    write_atomically(path, (block if front == before else _front_matter_block(front)) + body)
    return path


_HINT = "<!-- Edit freely: what is changed or taken out by hand stays so when the card is written again. -->"
_WRITTEN = re.compile(r"<!-- generated front matter: ([\w ]*) -->")
_FRONT_MATTER = re.compile(r"\s*---[ ]*\n(.*?)^---[ ]*(?:\n|\Z)", re.DOTALL | re.MULTILINE)
# No other section begins inside one: a search from every beginning to the end of the file would take for ever.
_SECTION = re.compile(
    r"<!-- generated: (\w+)(?: (\w+))? -->\n((?:(?!<!-- generated: ).)*?)<!-- end of generated: \1 -->", re.DOTALL
)


def card_text(path: Path) -> str:
    """
    What stands in a card.

    Raises:
        ValueError: if it is longer than `MAX_BYTES` or no UTF-8.
    """
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has more than {MAX_BYTES >> 20} MiB, which no card needs: shorten or remove it.")
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: save it as such, or remove it to have a new one.") from error


def _split(text: str, path: Path) -> tuple[dict[str, Any], str, str]:
    """A card's front matter as data and as it is written, and its body."""
    found = _FRONT_MATTER.match(text)
    if found is None:
        return {}, "", text
    try:
        front = load_plain_yaml(found[1])
    except ValueError as error:
        mark = getattr(error.__cause__, "problem_mark", None)
        reason = f"line {mark.line + 2}" if mark else reason_of(error)
        raise ValueError(f"the front matter of {path} is no YAML ({reason}): correct it, or remove it.") from error
    if not isinstance(front, (dict, type(None))):
        raise ValueError(f"the front matter of {path} must be YAML of keys and values: correct it, or remove it.")
    return front or {}, f"{found[0].rstrip()}\n\n", text[found.end() :].lstrip("\n")


def _front_matter_block(front: dict[str, Any]) -> str:
    return f"---\n{yaml_dump(front, sort_keys=False).strip()}\n---\n\n"


def _fill_front_matter(
    front: dict[str, Any], written: set[str], license: str | None, base_model: str | None, dataset: str | None
) -> set[str]:
    """Add what is known and was not `written` there before; a given `license` replaces another. All known keys."""
    known: dict[str, Any] = {"library_name": LIBRARY, "license": license or "unknown", "pipeline_tag": PIPELINE}
    known["tags"] = list(TAGS)
    if base_model and is_hub_name(base_model):
        known["base_model"] = base_model
    if dataset and is_hub_name(dataset):
        known["datasets"] = [dataset]
    front |= {key: value for key, value in known.items() if key not in front and key not in written}
    if license:
        front["license"] = license
    return set(known)


def _merge_body(body: str, sections: Mapping[str, str], add: Sequence[str]) -> str:
    """
    `body` with `sections` in place of those that are still as they were generated; those of `add` are new, and come
    after the one before them.
    """
    found = {section[1]: section for section in _SECTION.finditer(body)}
    if not found and not _WRITTEN.search(body):  # a person's own
        add = [*add, *(name for name in MEASURED if sections.get(name) and not _has_title(body, sections[name]))]
    end = None
    for name, text in sections.items():
        section, block = found.get(name), _section(name, text)
        if section is None and name in add and end and end in body:
            body = body.replace(end, f"{end}\n\n{block}", 1)
        elif section is None and name in add:
            body = f"{body.rstrip()}\n\n{block}\n"
        elif section and text and _is_untouched(section):  # without text nothing is known now; what was known stays
            body = body.replace(section[0], block, 1)
        elif section and text and section[0] != block:
            logger.warning("The section %r of the card was changed by hand and stays as it is.", name)
        end = f"<!-- end of generated: {name} -->"
    return body


def _has_title(body: str, text: str) -> bool:
    title = text.split("\n")[0]
    return title.startswith("#") and title in body.split("\n")


def _section(name: str, text: str) -> str:
    """A generated section; one without text marks the place of what may be known later."""
    text = text.strip()
    return f"<!-- generated: {name} {_digest(text)} -->\n{text}\n<!-- end of generated: {name} -->"


def _is_untouched(section: re.Match) -> bool:
    return section[2] in (None, _digest(section[3]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:8]


def _parameters(model_dir: Path) -> int | None:
    """Weights in the safetensors files, from their headers; buffers of batch norms are not counted."""
    count = 0
    for file in model_dir.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118  # no mapping
                if not key.endswith(("running_mean", "running_var", "num_batches_tracked")):
                    count += math.prod(tensors.get_slice(key).get_shape())
    return count or None


__all__ = [
    "card_text",
    "card_to_push",
    "update_results",
    "write_frozen_card",
    "write_model_card",
]
