"""Other people's checkpoint files as weights by name; nothing in them is run."""

import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file

from ..files import asked_by_pickle, sha256_of
from ..model.loading_denseclip import reason_of


StateDict = dict[str, torch.Tensor]

# SHA-256 of the TorchScript archives in openai/CLIP. Loading TorchScript runs the program inside, so only these are.
OPENAI_ARCHIVES = {
    "afeb0e10f9e5a86da6080e35cf09123aca3b358a0c3e3b6c78a7b63bc04b6762": "RN50",
    "8fa8567bab74a42d41c5915025a8e4538c3bdbe8804a470a72f30b0d94fab599": "RN101",
    "7e526bd135e493cef0776de27d5f42653e6b4c8bf9e0f653bb11773263205fdd": "RN50x4",
    "52378b407f34354e150460fe41077663dd5b39c54cd0bfd2b27167a4a06ec9aa": "RN50x16",
    "be1cfb55d75a9666199fb2206c106743da0f6468c9d327f3e0d0a543a9919d9c": "RN50x64",
    "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af": "ViT-B/32",
    "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f": "ViT-B/16",
    "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836": "ViT-L/14",
    "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02": "ViT-L/14@336px",
}


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or wants to run code. The message is one sentence."""


@contextmanager
def looking_into(subject: str) -> Iterator[None]:
    """Turn what fails on data of an unexpected structure into a [`CheckpointError`] about `subject`."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        is_missing = isinstance(error, KeyError)
        what = "has no" if is_missing else "holds something of an unexpected type or shape:"
        raise CheckpointError(f"{subject} {what} {reason_of(error)}.") from error


def read_checkpoint(path: str | os.PathLike) -> Any:
    """
    What a file holds, a mapping if it is a checkpoint: PyTorch's (either format), safetensors, or an archive in
    [`OPENAI_ARCHIVES`].

    Pickles are read with `weights_only=True`.

    Raises:
        CheckpointError: if it is no checkpoint, is cut off, or wants to run code.
        OSError: if there is no such file.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        zipped = zipfile.is_zipfile(path)
        if zipped and _is_torchscript(path):
            return torch.jit.load(path, map_location="cpu").state_dict()
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # a damaged file fails in any of many ways
        sentence = f"{path} is cut off, damaged or no checkpoint: download it again."
        if isinstance(error, pickle.UnpicklingError) and (wanted := asked_by_pickle(error)) is not None:
            sentence = (
                f"{path} is refused: its pickle asks for {wanted}, and only tensors and plain data are read; ask its "
                "authors for a file without."
            )
        raise CheckpointError(sentence) from error


def _is_torchscript(path: Path) -> bool:
    """
    Whether a zip archive is one of [`OPENAI_ARCHIVES`].

    Raises:
        CheckpointError: for any other TorchScript, and for data that takes more memory than the file has bytes.
    """
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    if any(part.filename.endswith("/constants.pkl") for part in parts):
        if sha256_of(path) in OPENAI_ARCHIVES:
            return True
        raise CheckpointError(
            f"{path} is a TorchScript archive, which is a program, and none that OpenAI published (by SHA-256): "
            "download it again, or give open_clip's .safetensors of the same model."
        )
    # PyTorch stores tensors uncompressed and one after the other.
    if any(p.file_size > p.compress_size for p in parts) or sum(p.file_size for p in parts) > path.stat().st_size:
        raise CheckpointError(f"{path} is refused: its data is compressed or overlaps, as PyTorch's never does.")
    return False


def state_dict_of(checkpoint: Any, path: str | os.PathLike = "the checkpoint") -> StateDict:
    """
    The weights in a checkpoint's top level, without the `module.` prefix of distributed training.

    Raises:
        CheckpointError: if there are none, or one is there both with the prefix and without.
    """
    content = checkpoint if isinstance(checkpoint, dict) else {}
    weights = content.get("state_dict", content.get("model", content))
    if not isinstance(weights, dict) or not weights or not all(map(_is_weight, weights, weights.values())):
        found = ", ".join(map(str, list(content)[:5])) or f"a {type(checkpoint).__name__}"
        raise CheckpointError(f"{path} has no `state_dict` of tensors; its top level holds {found}.")
    return without_module_prefix(weights)


def without_module_prefix(weights: StateDict) -> StateDict:
    """`weights` without the `module.` that distributed training puts before every name."""
    both = next((key for key in weights if f"module.{key}" in weights), None)
    if both is not None:
        raise CheckpointError(f"the checkpoint has both {both} and module.{both}: only one of them can be meant.")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _is_weight(name: Any, value: Any) -> bool:
    """Whether it is a named tensor with all its numbers in memory, not a few repeated many times by their strides."""
    if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()


def check_axes(weights: StateDict, axes: dict[str, int], kind: str) -> None:
    """
    See that `weights` have those named in `axes`, with as many axes as it says.

    Raises:
        CheckpointError: naming the first that is missing or has another number; `kind` is what has them, in words.
    """
    for key, count in axes.items():
        if key not in weights or weights[key].dim() != count:
            raise CheckpointError(f"this is not {kind}: it has no {key} of {count} axes; name one that is.")


def count_layers(weights: StateDict, pattern: str) -> int:
    """How many different numbers the first group of `pattern` takes at the start of the keys."""
    return len({match[1] for key in weights if (match := re.match(pattern, key))})


def grid_side(positions: torch.Tensor) -> int:
    """Side of the square grid that `positions` `(1 + side * side, C)` belong to."""
    return round((len(positions) - 1) ** 0.5)
