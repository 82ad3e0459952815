"""What of a model directory goes to the Hub, and the code that runs it there."""

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from transformers.dynamic_module_utils import custom_object_save

from ..model.configuration_denseclip import DenseCLIPConfig
from ..model.image_processing_denseclip import DenseCLIPImageProcessorPil
from ..model.loading_denseclip import reason_of
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation, DenseCLIPModel
from ..model.processing_denseclip import DenseCLIPProcessor
from .card import CARD, MODEL, load_card, shown_images


logger = logging.getLogger(__name__)

CONFIGS = ("config.json", "preprocessor_config.json", "processor_config.json", "tokenizer_config.json")
# What a model repository has beside its code and the images of its card; the rest stays here unless it is named.
SHARED = (
    *CONFIGS, CARD, "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "LICENSE*", "eval_results.json",
    "model.onnx", "model.onnx.data",
)  # fmt: skip
# What no model repository should have: training state and pickles, hidden files and what is called like a secret.
REFUSED = (
    "optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "*.pt", "*.pth", "*.bin", "*.pkl", "*.pickle",
    "*.ckpt", "scaler*", "checkpoint-*", ".*", "*.env", "*.pem", "*.key", "secret*", "credential*",
)  # fmt: skip
TEXTS = (".json", ".md", ".txt", ".py", ".yaml", ".yml", ".csv")


def add_code(model_dir: str | os.PathLike, output_dir: str | os.PathLike | None = None) -> None:
    """
    Put this package's model code beside a model, so that `trust_remote_code=True` runs it without the package.

    Args:
        model_dir (`str` or `os.PathLike`): a saved model with config and image processor.
        output_dir (`str` or `os.PathLike`, *optional*): where the code and the changed `config.json` and
            `preprocessor_config.json` go, `model_dir` by default.

    Raises:
        OSError: if `model_dir` has no config or no image processor.
    """
    output_dir = model_dir if output_dir is None else output_dir
    config: Any = DenseCLIPConfig.from_pretrained(model_dir)
    processor: Any = DenseCLIPImageProcessorPil.from_pretrained(model_dir)
    with torch.device("meta"):
        model: Any = DenseCLIPForSemanticSegmentation(config)
    # On the instances, as `register_for_auto_class` would for every model of this process.
    model._auto_class, config._auto_class = "AutoModelForSemanticSegmentation", "AutoConfig"
    processor._auto_class = "AutoImageProcessor"
    custom_object_save(model, output_dir, config=config)
    custom_object_save(DenseCLIPProcessor, output_dir)
    config.auto_map |= {
        "AutoModel": f"modeling_denseclip.{DenseCLIPModel.__name__}",
        "AutoProcessor": f"processing_denseclip.{DenseCLIPProcessor.__name__}",
    }
    config.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


@contextmanager
def folder_to_push(
    model_dir: str | os.PathLike,
    code: bool = True,
    include: Sequence[str] = (),
    repo_id: str | None = None,
    license: str | None = None,
) -> Iterator[Path]:
    """
    A folder that holds exactly what of `model_dir` goes to the Hub; it is gone afterwards.

    That is config, image processor, tokenizer, weights, card and the images in it, license, results, and this
    package's code. No file in it names a path of this machine.

    Args:
        model_dir (`str` or `os.PathLike`): a saved model with its card. It is not changed.
        code (`bool`): with the model's code, see [`add_code`]. Code that lies in `model_dir` is never pushed.
        include (`Sequence[str]`): further files in it, by name.
        repo_id (`str`, *optional*): repository that the card's snippets name.
        license (`str`, *optional*): the Hub's identifier, for the card that is pushed.

    Raises:
        ValueError: if there is no complete model, or a file is training state, a pickle, looks like a secret, is
            outside `model_dir`, or names a path of this machine.
    """
    folder = Path(model_dir)
    present = [path.name for path in folder.iterdir() if any(fnmatch(path.name, pattern) for pattern in SHARED)]
    if not {"config.json", CARD} <= set(present) or not any(name.endswith(".safetensors") for name in present):
        raise ValueError(f"{folder} is no complete model directory: it needs config.json, {CARD} and weights.")
    card = load_card(folder / CARD)
    if license:
        card.data["license"] = license
    text = str(card).replace(MODEL, repo_id or MODEL)
    with tempfile.TemporaryDirectory() as place:
        staging = Path(place)
        if code:
            add_code(folder, staging)
        (staging / CARD).write_text(text, encoding="utf-8")
        for name in {*present, *shown_images(folder, text), *include}:
            _check(folder, name)
            if not (staging / name).exists():
                (staging / name).parent.mkdir(parents=True, exist_ok=True)
                _link(folder / name, staging / name)
        for path in (staging / name for name in CONFIGS):
            if path.is_file():
                _without_local_names(path, keep_code=code)
        _refuse_local_paths(staging, folder)
        yield staging


def _check(folder: Path, name: str) -> None:
    """Raise `ValueError` if `name`, or what it is a link to, is not to leave this machine, or is not there."""
    root, path = folder.resolve(), (folder / name).resolve()
    is_outside = not path.is_relative_to(root) or ".." in Path(name).parts or Path(name).is_absolute()
    if is_outside or not path.is_file():
        raise ValueError(f"{name} is no file, or is outside the model directory {folder}: it is not pushed.")
    parts = [part.lower() for part in (*Path(name).parts, *path.relative_to(root).parts)]
    if any(fnmatch(part, pattern) for part in parts for pattern in REFUSED):
        raise ValueError(f"{name} is training state or a pickle, or may hold secrets: it is not pushed.")


def _link(source: Path, target: Path) -> None:
    try:
        target.symlink_to(source.resolve())
    except OSError:  # Windows allows links to administrators only
        shutil.copyfile(source, target)


def _without_local_names(path: Path, keep_code: bool) -> None:
    """Take out of a JSON file where parts were loaded from and, unless the code goes too, what the code is called."""
    dropped = {"_name_or_path", "name_or_path"} | ({"auto_map"} if not keep_code else set())

    def kept(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return {key: value for key, value in pairs if key not in dropped}

    text = path.read_text(encoding="utf-8")
    content = json.loads(text, object_pairs_hook=kept)
    if content != json.loads(text):
        path.unlink()  # it may be a link to the model's own
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _refuse_local_paths(staging: Path, folder: Path) -> None:
    """Raise `ValueError` if a text in `staging` names the user's home or where `folder` lies."""
    places = [re.escape(str(place)) for place in (Path.home(), folder.resolve()) if len(place.parts) > 1]
    local = re.compile(rf"(?<![\w.])({'|'.join(places)})(?!\w)")
    for path in (path for path in staging.rglob("*") if path.suffix in TEXTS):
        if found := local.search(path.read_text("utf-8", "ignore")):
            raise ValueError(f"{path.relative_to(staging)} names the local path {found[0]}: take it out.")


def push(folder: Path, repo_id: str, private: bool = True, message: str = "Upload model", api: HfApi | None = None):
    """
    Upload all of `folder` to a repository on the Hub, in one commit.

    Args:
        folder (`Path`): from [`folder_to_push`].
        repo_id (`str`): "user/name"; made if it does not exist.
        private (`bool`): whether only its owners may see it.
        message (`str`): of the commit.
        api (`HfApi`, *optional*): client of the Hub.

    Returns:
        `CommitInfo` of the commit.

    Raises:
        ValueError: if the repository is there already and public, though `private` was asked for.
        OSError: if the Hub cannot be reached or refuses.
    """
    api = HfApi() if api is None else api
    try:
        api.create_repo(repo_id=repo_id, private=private, exist_ok=True)
        is_private = api.repo_info(repo_id=repo_id).private
        if is_private or not private:
            if not private and is_private:
                logger.warning("%s exists and stays private: make it public in its settings on the Hub.", repo_id)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
    except Exception as error:  # the client's, its HTTP library's and the network's come from many families
        reason = reason_of(error)
        raise OSError(
            f"pushing to {repo_id} failed ({reason}): look at the network, the name and `hf auth login`."
        ) from error
    raise ValueError(f"{repo_id} exists and is public: push there with `--public`, or choose another name.")
