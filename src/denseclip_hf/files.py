"""Writing that leaves files and directories whole or not at all, and says in one sentence why it could not."""

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError


class OutputError(OSError):
    """A directory that could not be written; nothing of it is left. The message is one sentence."""


@contextmanager
def new_directory(target: str | os.PathLike) -> Iterator[Path]:
    """
    A directory to fill, which becomes `target` when all went well and disappears when not.

    Args:
        target (`str` or `os.PathLike`): must not exist, or be an empty directory, not a link to one.

    Yields:
        `Path`: a new directory beside `target`.

    Raises:
        OutputError: if `target` is taken, or cannot be written (permissions, a full disk).
    """
    target = Path(target).absolute()
    partial: Path | None = None
    new_parents: list[Path] = []
    complete = False
    try:
        if target.is_symlink() or (target.exists() and (not target.is_dir() or any(target.iterdir()))):
            raise OutputError(f"{target} already exists: remove it or choose another name.")
        new_parents = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        yield partial
        partial.chmod(0o777 & ~_umask())
        os.replace(partial, target)
        complete = True
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise OutputError(
            f"{target} could not be written ({reason}); nothing is left of it: make room, or name another place."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents if not complete else []:  # the innermost first
            with suppress(OSError):  # never made, or somebody else put something into it
                parent.rmdir()


def make_directory(folder: str | os.PathLike) -> None:
    """
    Make `folder` unless it is there, and see that something can be written into it.

    Raises:
        OutputError: if not (permissions, a full disk, a file of that name).
    """
    with writing_into(folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=os.fspath(folder)) as file:  # on a full disk an empty one can still be made
            file.write(bytes(1 << 16))


@contextmanager
def complete_or_gone(folder: Path, what: str, kept: str | None) -> Iterator[None]:
    """
    Remove `folder` if what is done to fill it fails, whatever the reason.

    Args:
        folder (`Path`): where is written.
        what (`str`): what is written there, for the message.
        kept (`str` or `None`): what there is complete all the same, for the message.

    Raises:
        OSError: with one sentence, if it fails.
        RuntimeError: torch's, if a data-loader worker dies meanwhile.
    """
    try:
        yield
    except Exception as error:  # a full disk shows as OSError, RuntimeError or SafetensorError
        shutil.rmtree(folder, ignore_errors=True)
        if str(error).startswith("DataLoader worker"):  # one died meanwhile, which torch raises wherever we are
            raise
        rest = f"{kept} are complete" if kept else "there is nothing to go on from"
        raise OSError(
            f"{what} could not be written ({error}): {rest}; make room and start again with the same command."
        ) from error


@contextmanager
def writing_into(folder: str | os.PathLike) -> Iterator[None]:
    """Turn what the system refuses while files are written into `folder` into [`OutputError`]."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it is a sentence of ours
            raise
        raise OutputError(
            f"the directory {folder} cannot be written ({error.strerror}): make room there, or name another."
        ) from error


def sync(*paths: Path) -> None:
    """Have the system write `paths` to the disk: a power loss after a rename must not leave a name without content."""
    for path in paths:
        if os.name == "nt" and path.is_dir():  # Windows opens no directories
            continue
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that it is there whole or not at all, after a power loss too."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        sync(part)
        os.replace(part, path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def sha256_of(path: str | os.PathLike) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def asked_by_pickle(error: Exception) -> str | None:
    """The object that a pickle asked for, in `torch.load`'s refusal of it; None for any other error."""
    wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
    return wanted[1] if wanted else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


__all__ = [
    "OutputError",
    "asked_by_pickle",
    "complete_or_gone",
    "make_directory",
    "new_directory",
    "sync",
    "write_atomically",
    "writing_into",
]
