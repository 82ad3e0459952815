"""Sharing a model directory: the code that runs it, and what of it goes to the Hub."""

import json
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from transformers.dynamic_module_utils import custom_object_save

from ..model.configuration_denseclip import DenseCLIPConfig
from ..model.image_processing_denseclip import DenseCLIPImageProcessorPil
from ..model.loading_denseclip import reason_of
from ..model.modeling_denseclip import DenseCLIPForSemanticSegmentation
from .card import CARD, card_text, card_to_push
from .card_sections import shown_pictures


logger = logging.getLogger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
CONFIGS = ("config.json", "preprocessor_config.json")
# What a model repository has beside its weights, its code and the pictures of its card; the rest stays here unless it
# is named.
SHARED = (
    *CONFIGS, CARD, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "LICENSE*", "eval_results.json", "model.onnx", "model.onnx.data",
)  # fmt: skip
# What no model repository should have: training state and pickles, hidden files and what is called like a secret.
REFUSED = (
    "optimizer*", "scheduler*", "rng_state*", "trainer_state.json", "*.pt", "*.pth", "*.bin",
    "*.pkl", "*.pickle", "*.ckpt", "scaler*", "checkpoint-*", ".*", "*.env", "*.pem", "*.key", "secret*",
    "credential*",
)  # fmt: skip


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
    config.save_pretrained(output_dir)
    processor.save_pretrained(output_dir)


@contextmanager
def files_to_push(
    model_dir: str | os.PathLike,
    code: bool = True,
    include: Sequence[str] = (),
    repo_id: str | None = None,
    license: str | None = None,
) -> Iterator[tuple[dict[str, Path], list[str]]]:
    """
    What of `model_dir` goes to the Hub. The directory itself is not changed.

    That is config, image processor, tokenizer, card and the pictures in it, licence, results, the weights that the
    config's loading finds (one file, or the shards of the index), and this package's code.

    Args:
        model_dir (`str` or `os.PathLike`): a saved model with card.
        code (`bool`): with the model's code, see [`add_code`]. Code that lies in the directory is never pushed.
        include (`Sequence[str]`): further files in it, by name.
        repo_id (`str`, *optional*): repository that the card's snippets shall name.
        license (`str`, *optional*): the Hub's identifier, for the card that is pushed.

    Yields:
        `tuple[dict[str, Path], list[str]]`: the files by their name in the repository, and the names that stay here.

    Raises:
        ValueError: if there is no complete model, or a file is training state, a pickle, looks like a secret, or is
            outside the directory.
    """
    folder = Path(model_dir)
    for name in ("config.json", CARD):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no complete model directory: it has no {name}.")
    present = sorted(path.name for path in folder.iterdir())
    shared = [name for name in present if any(fnmatch(name, pattern) for pattern in SHARED)]
    names = [*shared, *_weights(folder), *_pictures(folder), *(_inside(folder, name) for name in include)]
    for name in names:
        _check(folder, name)
    files = {name: folder / name for name in names}
    with tempfile.TemporaryDirectory() as place:
        staging = Path(place)
        if code:
            add_code(folder, staging)
        else:
            _stage_without_code(folder, staging)
        if repo_id or license:
            text = card_to_push(folder, repo_id, license)
            (staging / CARD).write_text(text, encoding="utf-8")
        files |= {path.name: path for path in sorted(staging.iterdir())}
        yield files, [name for name in present if name not in files]


def _weights(folder: Path) -> list[str]:
    """Names of the weight files that loading reads; shards of an earlier save may lie beside them."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} is no complete model directory: it has no weights ({WEIGHTS}).")
    try:
        shards = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
        good = all(fnmatch(shard, "model*.safetensors") and "/" not in shard for shard in shards)
    except (ValueError, LookupError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"{folder / INDEX} is damaged: save the model again.")
    return [INDEX, *shards]


def _pictures(folder: Path) -> list[str]:
    """Names of the pictures in the directory that its card shows."""
    shown = shown_pictures(card_text(folder / CARD))
    return [name for name in shown if (folder / name).is_file()]


def _stage_without_code(folder: Path, staging: Path) -> None:
    """The configs without the names of code that does not go with them."""
    for name in CONFIGS:
        if (folder / name).is_file():
            config = json.loads((folder / name).read_text(encoding="utf-8"))
            if config.pop("auto_map", None) is not None:
                (staging / name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _inside(folder: Path, name: str) -> str:
    """`name` as a repository has it: relative to `folder`, without detours."""
    return Path(os.path.relpath(folder / name, folder)).as_posix()


def _check(folder: Path, name: str) -> None:
    """Raise `ValueError` if `name`, or what it is a link to, is not to leave this machine, or is not there."""
    root, path = folder.resolve(), (folder / name).resolve()
    if not path.is_relative_to(root) or Path(name).parts[0] == "..":
        raise ValueError(f"{name} leads to {path}, outside the model directory {folder}: it is not pushed.")
    parts = [part.lower() for part in (*Path(name).parts, *path.relative_to(root).parts)]
    if any(fnmatch(part, pattern) for part in parts for pattern in REFUSED):
        raise ValueError(f"{name} is training state or a pickle, or may hold secrets: it is not pushed.")
    if not path.is_file():
        raise ValueError(f"there is no file {name} in {folder}.")


def push(files: dict[str, Path], repo_id: str, private: bool = True, message: str = "Upload model", api: Any = None):
    """
    Upload `files` to a repository on the Hub, in one commit.

    Args:
        files (`dict[str, Path]`): from [`files_to_push`].
        repo_id (`str`): "user/name"; made if it does not exist.
        private (`bool`): whether only its owners may see it.
        message (`str`): of the commit.
        api (`HfApi`, *optional*): client of the Hub.

    Returns:
        `CommitInfo` of the commit.

    Raises:
        ValueError: if the repository is there already and public, though `private` was asked for.
        OSError: if the Hub can't be reached or refuses.
    """
    api = HfApi() if api is None else api
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in sorted(files.items())
    ]
    with _one_sentence(repo_id):
        api.create_repo(repo_id=repo_id, repo_type="model", private=private, exist_ok=True)
        is_private = api.repo_info(repo_id=repo_id).private
    if private and not is_private:
        raise ValueError(f"{repo_id} exists and is public: push there with `--public`, or choose another name.")
    if is_private and not private:
        logger.warning("%s exists and is private, and stays so: make it public in its settings on the Hub.", repo_id)
    with _one_sentence(repo_id):
        return api.create_commit(repo_id=repo_id, operations=operations, commit_message=message)


@contextmanager
def _one_sentence(repo_id: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the client's, its HTTP library's and the network's come from many families
        reason = reason_of(error)
        raise OSError(
            f"pushing to {repo_id} failed ({reason}): look at the network, the name and `hf auth login`."
        ) from error


__all__ = ["add_code", "files_to_push", "push"]
