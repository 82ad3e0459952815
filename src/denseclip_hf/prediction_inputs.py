"""What to segment: files, folders, patterns, addresses and videos as named pictures, one at a time."""

import glob
import importlib
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from PIL import Image
from transformers.image_utils import load_image

from .data_files import BROKEN_FILE, read_image


PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".avif"}
VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}


@dataclass(frozen=True)
class Source:
    """Something to read: where it is, and the name that its results get."""

    address: str
    name: str

    @property
    def is_video(self) -> bool:
        return not _is_url(self.address) and Path(self.address).suffix.lower() in VIDEOS


def find_sources(inputs: Sequence[str | os.PathLike]) -> tuple[list[Source], list[str]]:
    """
    Files of `inputs`, in their order, each once; and a sentence for each input that has none.

    Args:
        inputs: files, folders (the pictures and videos directly inside), patterns such as `photos/**/*.jpg`, or
            addresses that start with http:// or https://.

    Returns:
        The sources, whose names are all different even where upper and lower case are the same, and the problems.
    """
    addresses: list[str] = []
    problems: list[str] = []
    for item in map(str, inputs):
        if _is_url(item) or Path(item).is_file():
            found = [item]
        elif Path(item).is_dir():
            files = sorted(path for path in Path(item).iterdir() if path.suffix.lower() in PICTURES | VIDEOS)
            found = [str(path) for path in files if path.is_file()]
            if not found:
                problems.append(f"{item} holds no pictures or videos.")
        else:
            found = [path for path in sorted(glob.glob(item, recursive=True)) if Path(path).is_file()]
            if not found:
                problems.append(f"{item} is no file or folder, and no pattern that files match.")
        addresses += found
    sources: list[Source] = []
    taken: set[str] = set()
    for address in dict.fromkeys(addresses):
        stem = PurePosixPath(urlsplit(address).path).stem if _is_url(address) else Path(address).stem
        name, number = stem or "picture", 2
        while name.casefold() in taken:
            name, number = f"{stem or 'picture'}_{number}", number + 1
        taken.add(name.casefold())
        sources.append(Source(address, name))
    return sources, problems


def read_picture(source: Source, timeout: float = 20.0) -> Image.Image:
    """
    An upright RGB picture; of an animation the first frame.

    Raises:
        ValueError, OSError: with one sentence, for what is missing, unreadable, takes longer than `timeout` seconds,
            or has more than `PIL.Image.MAX_IMAGE_PIXELS` pixels (89 million, Pillow's guard against bombs).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return load_image(source.address, timeout) if _is_url(source.address) else read_image(source.address)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
            limit = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million pixels"
            raise ValueError(f"{source.address} is refused because it has more than {limit}: shrink it.") from error
        except BROKEN_FILE as error:
            if _is_url(source.address):
                raise ValueError(f"{source.address} gives no picture that can be read.") from error
            raise
        except Exception as error:
            if not _is_url(source.address):
                raise
            # Of the client that transformers uses, which it may exchange.
            reason = str(error) or type(error).__name__
            raise OSError(f"{source.address} can not be fetched ({reason}).") from error


def read_frames(source: Source, every: int = 1, limit: int | None = None) -> Iterator[tuple[str, Image.Image]]:
    """
    Every `every`-th frame of a video, at most `limit`, as `(name_000000, RGB picture)` with the frame's number.

    Raises:
        ImportError, ValueError: with one sentence, without the library that reads videos or for a file it can't read.
    """
    try:
        av: Any = importlib.import_module("av")
    except ImportError as error:
        raise ImportError(f"{source.address} is a video, and reading one needs PyAV: pip install av.") from error
    try:
        with av.open(source.address) as video:
            frames = islice(enumerate(video.decode(video=0)), 0, None, every)
            for number, frame in islice(frames, limit):
                yield f"{source.name}_{number:06d}", frame.to_image().convert("RGB")
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise ValueError(f"{source.address} can not be read as a video ({error}).") from error


def _is_url(address: str) -> bool:
    return address.startswith(("http://", "https://"))


__all__ = ["Source", "find_sources", "read_frames", "read_picture"]
