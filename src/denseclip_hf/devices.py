"""What a machine has: precisions and devices, by the names that options take, and packages that only some need."""

import importlib
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import torch

# Names of torch's dtypes, so that a command's help needs no torch.
DTYPES = {name: name for name in ("float32", "bfloat16", "float16")}
DTYPES |= {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LOADING_DTYPES = {"auto": "auto", **DTYPES}


def dtype_of(name: str) -> "torch.dtype":
    """The dtype of torch that a key of `DTYPES` names."""
    import torch

    return getattr(torch, DTYPES[name])


def device_of(name: str) -> str:
    """
    A device of torch by its name; `auto` is a GPU if there is one, else the CPU.

    Raises:
        ValueError: if there is none of that name here.
    """
    import torch

    from .model.loading_denseclip import reason_of

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except Exception as error:  # an AssertionError where torch was built without that kind
        raise ValueError(f"`--device` {name!r} cannot be used ({reason_of(error)}): give auto or cpu.") from error
    return name


def needed(package: str, purpose: str, install: str) -> Any:
    """
    The module `package`, which `purpose` needs.

    Raises:
        ImportError: if it is not there, with the `pip install` that gets it.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f"{purpose} needs the package {package}: `pip install {install}`.") from error


__all__ = ["DTYPES", "LOADING_DTYPES", "device_of", "dtype_of", "needed"]
