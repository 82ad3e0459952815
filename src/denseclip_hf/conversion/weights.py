"""Other people's checkpoint files, read without running anything in them."""

import hashlib
import math
import os
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoTokenizer

from ..model.loading_denseclip import load_pretrained, reason_of


StateDict = dict[str, torch.Tensor]

DEFAULT_TOKENIZER = "openai/clip-vit-base-patch16"

_STORAGE_TYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


class CheckpointError(ValueError):
    """A file that is no checkpoint, is damaged, or wants to run code. The message is one sentence."""


@contextmanager
def looking_into(subject: str) -> Iterator[None]:
    """Turn what fails on data of an unexpected structure into a [`CheckpointError`] about `subject`."""
    try:
        yield
    except KeyError as error:
        raise CheckpointError(f"{subject} has no {error.args[0] if error.args else 'such key'}.") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, StrictDataclassError) as error:
        reason = reason_of(error)
        raise CheckpointError(f"{subject} holds something of an unexpected type or shape ({reason}).") from error


def read_checkpoint(path: str | os.PathLike) -> dict[str, Any]:
    """
    What is in a checkpoint file: PyTorch's (either format), a TorchScript archive or safetensors.

    Nothing in the file is executed: pickles are read with `weights_only=True`, TorchScript archives by a reader of
    their tensors.

    Args:
        path (`str` or `os.PathLike`): the file.

    Returns:
        `dict`: its top level; for TorchScript and safetensors the tensors by name.

    Raises:
        CheckpointError: if there is no such file, it is no checkpoint, is cut off, or its pickle wants a type that
            is not plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {path}: correct its name.")
    with path.open("rb") as file:
        start = file.read(16)
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise CheckpointError(
            f"{path} is not a checkpoint: it begins with {start[:8]!r}, as no PyTorch file does; download it again."
        )
    if start.startswith(b"PK"):
        names = _names_in(path)
        if any(name.endswith("/constants.pkl") for name in names):
            return dict(read_torchscript(path))
        if not any(name.endswith("/data.pkl") for name in names):
            raise CheckpointError(f"{path} is a zip archive, but not a checkpoint: name the file inside that is one.")
    content = _torch_load(path, mmap=start.startswith(b"PK"))
    if not isinstance(content, dict):
        raise CheckpointError(
            f"{path} holds a {type(content).__name__}, not the mapping a checkpoint is: name one with a `state_dict`."
        )
    return content


def _names_in(path: Path) -> list[str]:
    """What is in a zip archive, provided that its data is stored as PyTorch stores it: uncompressed, so no bomb."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # A TorchScript's program is compressed, and never read.
            data = [part for part in archive.infolist() if part.filename.split("/")[1:2] != ["code"]]
    except Exception as error:  # of a damaged directory, in any of many ways
        raise CheckpointError(
            f"{path} is cut off or damaged ({path.stat().st_size} bytes): download it again."
        ) from error
    if any(p.file_size > p.compress_size for p in data) or sum(p.file_size for p in data) > path.stat().st_size:
        raise CheckpointError(f"{path} is refused: its data is compressed or overlaps, as PyTorch's never does.")
    return names


def asked_by_pickle(error: Exception) -> str | None:
    """The object that a pickle asked for, in `torch.load`'s refusal of it; None for any other error."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    return wanted[1] if wanted else None


def _torch_load(path: Path, mmap: bool) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        wanted = asked_by_pickle(error)
        if wanted is None:
            raise CheckpointError(
                f"{path} is damaged or not a checkpoint, its pickle can't be read: download it again."
            ) from error
        raise CheckpointError(
            f"{path} is refused: its pickle asks for {wanted}, and only tensors and plain data are read; ask its "
            "authors for a file without."
        ) from error
    except Exception as error:  # a damaged pickle fails in any of many ways
        raise CheckpointError(f"{path} is cut off or damaged: download it again.") from error


def _read_safetensors(path: Path) -> StateDict:
    try:
        return load_file(path)
    except Exception as error:  # SafetensorError, and what unknown types and shapes end in
        raise CheckpointError(f"{path} is cut off or no safetensors file ({error}): download it again.") from error


def state_dict_of(checkpoint: dict[str, Any], path: str | os.PathLike = "the checkpoint") -> StateDict:
    """
    The weights in a checkpoint's top level, without the `module.` prefix of distributed training.

    Raises:
        CheckpointError: if there are none.
    """
    weights = checkpoint.get("state_dict", checkpoint)
    if not isinstance(weights, dict) or not weights or not all(map(_is_weight, weights, weights.values())):
        found = ", ".join(map(str, list(checkpoint)[:5])) or "nothing"
        raise CheckpointError(f"{path} has no `state_dict` of tensors; its top level holds {found}.")
    return without_module_prefix(weights)


def without_module_prefix(weights: StateDict) -> StateDict:
    """
    `weights` without the `module.` that distributed training puts before every name.

    Raises:
        CheckpointError: if a name is there both with it and without.
    """
    both = next((key for key in weights if f"module.{key}" in weights), None)
    if both is not None:
        raise CheckpointError(f"the checkpoint has both {both} and module.{both}: only one of them can be meant.")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _is_weight(name: Any, value: Any) -> bool:
    """Whether a state dict may hold it: a named tensor with all its numbers in memory, not a few seen many times."""
    if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return value.device.type == "cpu" and value.nbytes <= value.untyped_storage().nbytes()


def check_axes(weights: StateDict, axes: dict[str, int], kind: str) -> None:
    """
    See that each of some weights is there, with so many axes.

    Args:
        weights (`dict[str, torch.Tensor]`): the weights.
        axes (`dict[str, int]`): number of axes by name.
        kind (`str`): what has these weights, such as "a CLIP of OpenAI's architecture".

    Raises:
        CheckpointError: naming the first that is not so.
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


def load_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """
    CLIP's tokenizer, loaded if it is given by name or directory.

    Raises:
        ValueError: if it can't be loaded, or has another number of tokens than the checkpoint's `vocab_size`.
    """
    if isinstance(tokenizer, (str, os.PathLike)):
        try:
            tokenizer = load_pretrained(AutoTokenizer, tokenizer)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"the tokenizer {tokenizer} can't be loaded: name a directory or Hub repository that has CLIP's."
            ) from error
    if len(tokenizer) != vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, but the checkpoint {vocab_size}: it is another model's."
        )
    return tokenizer


class _ScriptObject:
    """Stands for any module of a TorchScript archive: only its attributes are kept."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


class _ScriptReader(pickle.Unpickler):
    """Reads the `data.pkl` of a TorchScript archive: modules as attributes, tensors as tensors, nothing else."""

    def __init__(self, archive: zipfile.ZipFile, root: str):
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root
        self.storages: dict[str, torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _ScriptObject
        if module == "torch" and name in _STORAGE_TYPES:
            return _STORAGE_TYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _view
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise CheckpointError(f"it is refused: its pickle asks for {module}.{name}, and only tensors are read.")

    def persistent_load(self, pid: Any) -> torch.Tensor:
        _, dtype, key, *_ = pid
        if key not in self.storages:
            data = bytearray(self.archive.read(f"{self.root}/data/{key}"))
            self.storages[key] = torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)
        return self.storages[key]


def _view(storage: torch.Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> torch.Tensor:
    if math.prod(size) > storage.numel():
        raise CheckpointError("a tensor is larger than what is stored of it.")
    return storage.as_strided(size, stride, offset)  # refuses what lies outside the storage


def read_torchscript(path: str | os.PathLike) -> StateDict:
    """
    The tensors of a TorchScript archive by name.

    `torch.jit.load` would compile the archive's program and run its `__setstate__` methods; the numbers alone are in
    `data.pkl` and the storages beside it, so only those are read.

    Raises:
        CheckpointError: if it is damaged, big-endian, or its pickle asks for anything but modules and tensors.
    """
    names = _names_in(Path(path))
    try:
        with zipfile.ZipFile(path) as archive:
            root = names[0].split("/")[0]  # so does PyTorch
            if f"{root}/byteorder" in names and archive.read(f"{root}/byteorder") != b"little":
                raise CheckpointError("it was written on a big-endian machine.")
            top = _ScriptReader(archive, root).load()
    except CheckpointError as error:
        raise CheckpointError(f"{path} can't be used: {error}") from error
    except Exception as error:  # a damaged archive fails in any of many ways
        raise CheckpointError(f"{path} is no TorchScript archive that can be read ({error}).") from error
    return dict(_tensors(top, "", set()))


def _tensors(module: Any, prefix: str, seen: set[int]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in getattr(module, "attributes", {}).items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _ScriptObject) and id(value) not in seen:  # a module may hold itself
            seen.add(id(value))
            yield from _tensors(value, f"{prefix}{name}.", seen)


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


__all__ = [
    "DEFAULT_TOKENIZER",
    "CheckpointError",
    "asked_by_pickle",
    "check_axes",
    "count_layers",
    "grid_side",
    "load_tokenizer",
    "looking_into",
    "read_checkpoint",
    "read_torchscript",
    "sha256_of",
    "state_dict_of",
    "without_module_prefix",
]
