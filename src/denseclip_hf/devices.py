"""Precisions and devices, by the names that options take: transformers' and torch's own, and short ones."""

import torch

from .model.loading_denseclip import reason_of


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DTYPES |= {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def device_of(name: str) -> str:
    """
    A device of torch by its name; `auto` is a GPU if there is one, else the CPU.

    Raises:
        ValueError: if there is none of that name here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except Exception as error:  # an AssertionError where torch was built without that kind
        raise ValueError(f"`--device` {name!r} cannot be used ({reason_of(error)}): give auto or cpu.") from error
    return name


__all__ = ["DTYPES", "device_of"]
