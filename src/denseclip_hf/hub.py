"""Sharing a model directory: the code that runs it, and what of it goes to the Hub."""

import os
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitOperationAdd, HfApi
from transformers.dynamic_module_utils import custom_object_save

from .configuration_denseclip import DenseCLIPConfig
from .image_processing_denseclip import DenseCLIPImageProcessorPil
from .modeling_denseclip import DenseCLIPForSemanticSegmentation


# What a model repository consists of; everything else stays here unless it is named.
SHARED = (
    "config.json", "model*.safetensors", "model.safetensors.index.json", "preprocessor_config.json", "README.md",
    "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "LICENSE*",
    "eval_results.json", "*.png", "*.jpg", "*.py", "*.onnx", "*.onnx.data",
)  # fmt: skip
# Training state and pickles, which no model repository should have.
REFUSED = (
    "optimizer*", "scheduler*", "rng_state*", "training_args.bin", "trainer_state.json", "*.pt", "*.pth", "*.bin",
    "*.pkl", "*.ckpt", "scaler*", "checkpoint-*",
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
def files_to_push(model_dir: str | os.PathLike, code: bool = True, include: Sequence[str] = ()):
    """
    What of `model_dir` goes to the Hub. The directory itself is not changed.

    Args:
        model_dir (`str` or `os.PathLike`): a saved model with card.
        code (`bool`): with the model's code, see [`add_code`].
        include (`Sequence[str]`): further files in it, by name.

    Yields:
        `tuple[dict[str, Path], list[str]]`: the files by their name in the repository, and the names that stay here.

    Raises:
        ValueError: if there is no complete model, or a file is training state, a pickle, or outside the directory.
    """
    folder = Path(model_dir)
    for name in ("config.json", "README.md"):
        if not (folder / name).is_file():
            raise ValueError(f"{folder} is no complete model directory: it has no {name}.")
    if not list(folder.glob("model*.safetensors")):
        raise ValueError(f"{folder} is no complete model directory: it has no weights (model.safetensors).")
    for name in include:
        _check_inside(folder, name)
        if any(fnmatch(part, pattern) for part in Path(name).parts for pattern in REFUSED):
            raise ValueError(f"{name} is training state or a pickle, which is not pushed.")
    present = sorted(path.name for path in folder.iterdir())
    shared = [
        name
        for name in present
        if (folder / name).is_file()
        and any(fnmatch(name, pattern) for pattern in SHARED)
        and not any(fnmatch(name, pattern) for pattern in REFUSED)
    ]
    for name in shared:
        _check_inside(folder, name)
    files = {name: folder / name for name in [*shared, *include]}
    with tempfile.TemporaryDirectory() as staging:
        if code:
            add_code(folder, staging)
            files |= {path.name: path for path in sorted(Path(staging).iterdir())}
        yield files, [name for name in present if name not in files]


def _check_inside(folder: Path, name: str) -> None:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name} leads to {path}, outside the model directory {folder}: it is not pushed.")
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
    """
    api = HfApi() if api is None else api
    api.create_repo(repo_id=repo_id, repo_type="model", private=private, exist_ok=True)
    if private and not api.repo_info(repo_id=repo_id).private:
        raise ValueError(f"{repo_id} exists and is public: push there with `--public`, or choose another name.")
    operations = [
        CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(path)) for name, path in sorted(files.items())
    ]
    return api.create_commit(repo_id=repo_id, operations=operations, commit_message=message)


__all__ = ["add_code", "files_to_push", "push"]
