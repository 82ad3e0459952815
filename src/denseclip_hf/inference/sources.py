"""What to segment: files, folders, patterns, addresses and videos as named images, one at a time."""

import glob
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # the built-in one since Python 3.11
from dataclasses import dataclass
from http.client import HTTPException, InvalidURL
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from PIL import Image

from ..data import IMAGE_SUFFIXES, file_stem, read_image, shown_address
from ..devices import needed


logger = logging.getLogger(__name__)

VIDEOS = {".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg"}
# Most bytes that are fetched from an address.
MAX_DOWNLOAD = 256 << 20


@dataclass(frozen=True)
class Source:
    """Something to read: where it is, and the name that its results get."""

    address: str
    name: str

    @property
    def shown(self) -> str:
        """The address for messages: without the password or key that it may hold."""
        return shown_address(self.address)

    @property
    def is_video(self) -> bool:
        """Whether this is a file that is decoded frame by frame."""
        return not _is_url(self.address) and Path(self.address).suffix.lower() in VIDEOS


def find_sources(inputs: Sequence[str | os.PathLike]) -> tuple[list[Source], list[str]]:
    """
    Files of `inputs`, in their order, each once; and a sentence for each input that has none.

    Args:
        inputs: files, folders (the images and videos directly inside), patterns such as `photos/**/*.jpg`, or
            addresses that start with http:// or https://.

    Returns:
        The sources, whose names are all different even where upper and lower case are the same, and the problems.
    """
    addresses: list[str] = []
    problems: list[str] = []
    for item in map(str, inputs):
        if _is_url(item) or os.path.isfile(item):
            found = [item]
        elif os.path.isdir(item):
            files = sorted(path for path in Path(item).iterdir() if path.is_file())
            found = [str(path) for path in files if path.suffix.lower() in IMAGE_SUFFIXES | VIDEOS]
            suffixes = {path.suffix.lower() or path.name for path in files if not path.name.startswith(".")}
            others = ", ".join(sorted(suffixes - IMAGE_SUFFIXES - VIDEOS))
            if found and others:
                logger.warning("Left out of %s: %s.", item, others)
            if not found:
                has = f", but {others}: convert those to JPEG or PNG" if others else ""
                problems.append(
                    f"{item} holds no images or videos that are read{has}; or name files, or a pattern such as "
                    f"'{item}/**/*.jpg'."
                )
        else:
            found = [path for path in sorted(glob.glob(item, recursive=True)) if Path(path).is_file()]
            if not found:
                problems.append(f"{item} is no file or folder, and no pattern that files match: correct it.")
        addresses += found
    sources: list[Source] = []
    taken: set[str] = set()
    for address in dict.fromkeys(addresses):
        stem = file_stem(urlsplit(address).path if _is_url(address) else address) or "image"
        name, number = stem, 2
        while name.casefold() in taken:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name.casefold())
        sources.append(Source(address, name))
    return sources, problems


def read_image_of(source: Source, timeout: float = 20.0, large: bool = False) -> Image.Image:
    """
    An upright RGB image; of an animation the first frame.

    Args:
        source ([`Source`]): a file or an address.
        timeout (`float`): seconds that all of an address may take.
        large (`bool`): read up to 178 million pixels (or 1 GiB, decoded) instead of 89 million.

    Raises:
        ValueError, OSError: with one sentence, for what is missing, unreadable, takes longer than `timeout` seconds,
            or has more pixels than that (`PIL.Image.MAX_IMAGE_PIXELS`, Pillow's guard against bombs).
    """
    max_pixels = None if large else Image.MAX_IMAGE_PIXELS
    if not _is_url(source.address):
        return read_image(source.address, max_pixels)
    return read_image({"path": source.shown, "bytes": _fetched(source, timeout)}, max_pixels)


def _fetched(source: Source, timeout: float) -> bytes:
    """What is at an address, within `timeout` seconds for all of it and `MAX_DOWNLOAD` bytes."""
    if "@" in urlsplit(source.address).netloc:
        raise ValueError(
            f"{source.shown} is not fetched, because its address has a user or password in it: download it."
        )
    # A thread, because no timeout of a socket ends a name that is looked up, or a header that comes byte by byte.
    answer: Future[bytes] = Future()
    threading.Thread(target=_download, args=(source.address, timeout, answer), daemon=True).start()
    try:
        return answer.result(timeout)
    except (OSError, ValueError, HTTPException, FutureTimeoutError) as error:
        reason = getattr(error, "reason", None) or error
        if isinstance(reason, (TimeoutError, FutureTimeoutError)):
            reason = f"it takes longer than {timeout:g} seconds"
        if isinstance(reason, InvalidURL):  # its message repeats parts of the address
            reason = "it is no valid address"
        reason = str(reason) or type(reason).__name__
        raise OSError(
            f"{source.shown} cannot be fetched ({reason}): check the address, or try again later."
        ) from error


def _download(address: str, timeout: float, answer: Future[bytes]) -> None:
    """Give `answer` what is at an address, or the error."""
    content, end = bytearray(), time.monotonic() + timeout
    try:
        with urlopen(Request(address, headers={"User-Agent": "denseclip_hf"}), timeout=timeout) as response:
            while block := response.read1(1 << 16):
                content += block
                if len(content) > MAX_DOWNLOAD:
                    raise OSError(f"it has more than {MAX_DOWNLOAD >> 20} MiB")
                if time.monotonic() > end:
                    raise TimeoutError
        answer.set_result(bytes(content))
    except Exception as error:
        answer.set_exception(error)


def read_frames(source: Source, every: int = 1, limit: int | None = None) -> Iterator[tuple[str, Image.Image]]:
    """
    Every `every`-th frame of a video, at most `limit`, as `(name_000000, RGB image)` with the frame's number.

    Frames are upright where the video says how it was held, as telephones' do.

    Raises:
        ImportError, ValueError: with one sentence, without the library that reads videos or for a file it cannot read.
    """
    av = needed("av", f"reading the video {source.address}", "av")
    try:
        with av.open(source.address) as video:
            codec = video.streams.video[0].codec_context
            if codec is None:  # PyAV 17 would crash on it
                raise OSError("nothing here decodes it")
            _check_frame(source, codec)
            frames = islice(enumerate(video.decode(video=0)), 0, None, every)
            for number, frame in islice(frames, limit):
                _check_frame(source, frame)
                turn = 90 * round(frame.rotation / 90)  # degrees to the left
                yield f"{source.name}_{number:06d}", frame.to_image().convert("RGB").rotate(turn, expand=True)
    except (av.error.FFmpegError, OSError, IndexError) as error:
        raise ValueError(
            f"{source.address} cannot be read as a video ({error}): save it again, or leave it out."
        ) from error


def _check_frame(source: Source, frame: Any) -> None:
    """Refuse what has more pixels than an image may have."""
    if Image.MAX_IMAGE_PIXELS is not None and frame.width * frame.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(
            f"{source.address} has frames of {frame.width}x{frame.height} pixels, more than the "
            f"{Image.MAX_IMAGE_PIXELS} of an image: shrink it, or leave it out."
        )


def _is_url(address: str) -> bool:
    try:
        return urlsplit(address).scheme in ("http", "https")
    except ValueError:
        return False
