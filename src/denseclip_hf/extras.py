"""Packages that only some of what is here needs."""

import importlib
from typing import Any


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


__all__ = ["needed"]
