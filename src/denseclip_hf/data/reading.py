"""One image and its mask, from files or bytes: converted where that loses nothing, refused otherwise."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import fsspec
import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..model.image_processing_denseclip import decode_image, read_pixels
from .coco import MARK, draw


NAMELESS = "a sample without a file name"
UNREADABLE = "cannot be read as an image ({}); save it again or remove the sample"
EXIF_ORIENTATION, SAMPLES_PER_PIXEL = 0x0112, 277
# What turns an image of that EXIF orientation upright. (ImageOps.exif_transpose writes all tags anew, which fails for
# damaged ones.)
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Formats with pixels in them. Pillow knows others, some of which start programs (EPS runs Ghostscript).
FORMATS = ("AVIF", "BMP", "DIB", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")
# Where a stream's files may be: a data set chooses its addresses, and fsspec knows some that log in or run templates.
PROTOCOLS = {"hf", "http", "https", "file", "s3", "gs", "zip", "tar", "gzip", "bz2", "xz", "zstd", "lz4"}
# Of one file, after decompression.
MAX_FILE_BYTES = 1 << 30
# Of one image, decoded and as it is converted to RGB.
MAX_DECODED_BYTES = 1 << 30
BYTES_PER_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
COLORS_AT_ONCE = 1 << 22
NO_COLOR = 1 << 24  # beyond the codes of colors
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


# An image file: its path, what `datasets` keeps of it, or opened.
ImageSource: TypeAlias = str | Path | Mapping[str, Any] | Image.Image


def name_of(source: object) -> str:
    """What to call an image or mask in a message: its path where it has one, without an address's secrets."""
    if not isinstance(source, (str, Path)):
        source = source.get("path") if isinstance(source, Mapping) else getattr(source, "filename", None)
    return shown_address(str(source)) if source else NAMELESS


def shown_address(address: str) -> str:
    """An address, or several as fsspec chains them, without the user, password, query and fragment of each."""
    if "://" not in address:
        return address
    parts = re.split(r"::(?=[\w+.-]+://)", address)
    last = next((i for i, part in enumerate(parts) if re.match(r"https?://", part, re.IGNORECASE)), len(parts))
    parts = [re.sub(r"://[^/?#]*@", "://", part) for part in parts[: last + 1]]  # what follows a page is its query's
    return "::".join(re.sub(r"(?is)^(https?://[^?#]*).*", r"\1", part) for part in parts)


def file_stem(name: str) -> str:
    """What to call new files about the image at a path or address: of at most 200 bytes, and no path itself."""
    stem = re.split(r"[/\\]", name)[-1]
    stem = stem[: stem.rfind(".")] if "." in stem[1:] else stem
    stem = re.sub(r'[\x00-\x1f\x7f<>:"|?*\ud800-\udfff]', "_", stem)
    return stem.encode()[:200].decode(errors="ignore").strip(" .")


@contextmanager
def _blaming(name: str, fault: str = UNREADABLE) -> Iterator[None]:
    """Turn what goes wrong with a file, in any of many ways, into one sentence that names it."""
    try:
        yield
    except (MemoryError, ImportError):
        raise
    except Exception as error:
        reason: object = error
        if isinstance(error, FileNotFoundError):
            kind = "missing, or its server does not answer" if "://" in name else "missing"
            fault = f"is {kind}; restore the file or remove the sample"
        elif isinstance(error, UnidentifiedImageError):  # its message names a place in memory
            reason = f"it is none of {', '.join(_formats())}, or of a kind that Pillow does not know"
        elif "://" in name and type(error) is not ValueError:  # what a server says may repeat a password
            reason = type(error).__name__
        failure = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise failure(f"{name} {fault.format(reason)}.") from error


def _open(source: ImageSource) -> tuple[Image.Image, bytes, str]:
    """A PIL image, opened but not decoded, its file's content and name, from anything that [`read_image`] takes."""
    name = name_of(source)
    if isinstance(source, Image.Image):
        with _blaming(name):
            read_pixels(source)
        return source, b"", name
    if isinstance(source, (str, Path)):
        source = {"path": str(source), "bytes": None}
    with _blaming(name):
        content = _content(str(source["path"])) if source["bytes"] is None else source["bytes"]
        image = Image.open(BytesIO(content), formats=_formats())
        _refuse_huge(image)
    return image, content, name


def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _content(path: str) -> bytes:
    """A file read whole, so that no handle stays open however many samples are held."""
    # A stream gives addresses on the Hub or inside an archive.
    if unknown := {part.split("://")[0] for part in path.split("::") if "://" in part} - PROTOCOLS:
        raise ValueError(f"{min(unknown)}:// is none of the kinds of address that are read")
    for part in path.split("::"):
        local = part.removeprefix("file://")
        if "://" not in local and os.path.exists(local) and not os.path.isfile(local):
            raise ValueError("it is no regular file")  # a pipe would be waited for without an end
    with fsspec.open(path, "rb") if "://" in path else open(path, "rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES >> 20} MiB")
    return content


def _refuse_huge(image: Image.Image) -> None:
    """Refuse an image whose decoding, conversion and turning would take more than `MAX_DECODED_BYTES`."""
    stored = BYTES_PER_PIXEL.get(image.mode, 4) + (4 * len(image.getbands()) if image.format == "JPEG2000" else 0)
    converted = 0 if image.mode == "RGB" else 20 if image.mode[0] in "IF" else 4
    # Whether EXIF turns it is not asked, which would decode a PNG.
    turns = 2 if "exif" in image.info or getattr(image, "tag_v2", {}).get(EXIF_ORIENTATION, 1) != 1 else 1
    # Pillow keeps a pointer to each line of an image.
    needed = turns * (image.width * image.height * (stored + converted) + 16 * image.height)
    needed += 16 * image.width * (turns - 1)
    if needed > MAX_DECODED_BYTES:
        raise ValueError(
            f"{image.width}x{image.height} pixels of mode {image.mode} would take {needed >> 20} MiB of "
            f"{MAX_DECODED_BYTES >> 20}"
        )


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns an image upright as its EXIF tag says; `None` where there is no tag or the tags are damaged."""
    try:
        return TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        return None


def read_image(source: ImageSource, max_pixels: int | None = None) -> Image.Image:
    """
    An RGB image of 8 bits per channel as [`decode_image`] makes it, turned upright as its EXIF tag says.

    Args:
        source: path, `{"path": …, "bytes": …}` as `datasets` stores images, or PIL image.
        max_pixels (`int`, *optional*): of the image, by default twice `PIL.Image.MAX_IMAGE_PIXELS`.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it cannot be read, would take more than 1 GiB or has more pixels than allowed, or has values
            without a meaning as gray.
    """
    image, _, name = _open(source)
    with _blaming(name):
        if 0 in image.size:
            raise ValueError("it has no pixels")
        if max_pixels is not None and image.width * image.height > max_pixels:
            raise ValueError(f"it has {image.width}x{image.height} pixels, more than {max_pixels}")
        image.load()
        turn = _turn(image)  # asked after decoding, which turns a TIFF by itself
        if image.mode != "RGB":
            levels = decode_image(image)
            lowest, highest = levels.aminmax()
            if lowest < 0 or highest > 255:
                raise ValueError(f"its values go from {lowest:g} to {highest:g}, not from 0 to 1 or 255")
            image = Image.fromarray(levels.permute(1, 2, 0).round().to(torch.uint8).numpy())
        if turn is not None:
            image = image.transpose(turn)
            image.info = {"turned": True}  # so that nothing turns it again
    image.filename = name  # type: ignore[attr-defined]
    return image


def remarks(source: ImageSource) -> list[str]:
    """What a user should know about an image file that can be read: pixels that are not used, or look odd."""
    image, _, name = _open(source)
    found = []
    pages = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if pages > 1:
        found.append("only the first of several pages or frames is read")
    bands = getattr(image, "tag_v2", {}).get(SAMPLES_PER_PIXEL, 1)
    if bands > len(image.getbands()):
        found.append(f"only {len(image.getbands())} of {bands} bands are read")
    if _turn(image) is not None:
        found.append("EXIF turns the image upright: masks must be drawn on it as it is shown, not as it is stored")
    if image.mode in SIXTEEN_BIT_MODES:
        with _blaming(name):
            image.load()
        if 255 < np.asarray(image).max(initial=0) < 4096:
            found.append("its 16-bit values stay below 4096 of 65535, which is nearly black: scale 12-bit data by 16")
    return found


def _lossy(image: Image.Image, content: bytes) -> str | None:
    """How a file was compressed if that may change ids."""
    if image.format in ("JPEG", "MPO", "AVIF"):
        return image.format
    if image.format == "TIFF" and image.info.get("compression") in ("jpeg", "tiff_jpeg", "webp"):
        return "TIFF with JPEG or WebP compression"
    if image.format == "WEBP" and content and b"VP8L" not in content:
        return "lossy WebP"
    if image.format == "JPEG2000":  # a reversible wavelet does not show whether bits were left out for a smaller file
        return "JPEG 2000"
    return None


def _stored_samples(image: Image.Image, content: bytes) -> np.ndarray:
    """The samples of a gray file as they are stored, which Pillow stretches to 0…255 (or 65535), or inverts."""
    layout = next((part for part in _codec_arguments(image) if isinstance(part, str)), "")
    header = re.match(rb"P[25]%s\d+%s\d+%s(\d+)\s" % ((rb"(?:\s|#[^\n]*\n)+",) * 3), content)
    image.load()
    values = np.asarray(image)
    if image.mode == "1":
        values = values.astype(np.uint8)
    if header and image.format == "PPM":
        highest = int(header[1])
        shown = 255 if image.mode == "L" else 65535
        return values if highest == shown else np.round(values * (highest / shown)).astype(np.int32)
    bits = 8 if not (depth := re.fullmatch(r"L;([24]).*", layout)) else int(depth[1])
    if bits < 8:
        values = values // (255 // (2**bits - 1))
    if re.fullmatch(r"[1L];\d?I.*", layout):
        values = (1 if image.mode == "1" else 2**bits - 1) - values
    return values


def _codec_arguments(image: Image.Image) -> tuple[Any, ...]:
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else ()
    return arguments if isinstance(arguments, tuple) else (arguments,)


def _color_codes(colors: np.ndarray) -> np.ndarray:
    """One integer for each color of an (…, 3) array of 8-bit values."""
    red, green, blue = (colors[..., channel].astype(np.uint32) for channel in range(3))
    return red << 16 | green << 8 | blue


@dataclass(frozen=True)
class SampleReader:
    """
    How the images and masks of a data set are read. Called by `datasets` on a batch of rows, it decodes them.

    This is the one place where ids as they are stored become class ids 0…K − 1 and `ignore_index`.

    Args:
        num_labels: K, the number of classes.
        ignore_index: id of pixels without a class, in masks as they are stored and as they are returned.
        do_reduce_labels: masks hold 0 for no class and n for class n − 1.
        palette: K colors (r, g, b), 0…255: how classes appear in masks that are images in color.
        ignore_colors: colors of such masks that mean "no class".
        id_map: class by stored id where it is not the id itself, None for no class.
    """

    num_labels: int
    ignore_index: int = 255
    do_reduce_labels: bool = False
    palette: Sequence[Sequence[int]] | None = None
    ignore_colors: Sequence[Sequence[int]] = ()
    id_map: Mapping[int, int | None] = field(default_factory=dict)

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        samples = [self.read(i, m) for i, m in zip(batch["image"], batch["mask"], strict=True)]
        return {key: [sample[key] for sample in samples] for key in ("image", "mask")}

    def read_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """[`read`] on one row with the columns `image` and `mask`."""
        return self.read(row["image"], row["mask"])

    def read(self, image: ImageSource, mask: ImageSource | np.ndarray | list) -> dict[str, Any]:
        """
        One sample: `image`, an RGB PIL image of (w, h) pixels, and `mask`, an (h, w) array of class ids, uint8 where
        they fit and else int32.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file cannot be read, the two differ in size, or the mask holds a value or color that
                is no class. The message names the file and what to do.
        """
        shown = read_image(image)
        return {"image": shown, "mask": self.read_mask(mask, shown)}

    def read_mask(self, source: ImageSource | np.ndarray | list, image: Image.Image | None = None) -> np.ndarray:
        """
        The (h, w) array of class ids of a mask: file, bytes, PIL image, or array of stored ids.

        Raises:
            FileNotFoundError, ValueError: as [`read`], the latter if its size is not that of `image` (if given).
        """
        name = name_of(source)
        mask, content = None, b""
        if isinstance(source, (np.ndarray, list)):
            name = "given as an array"
            stored = _whole_numbers(np.asarray(source))
        elif isinstance(source, Mapping) and (source.get("bytes") or b"").startswith(MARK):
            with _blaming(name, "holds a mask that cannot be drawn ({}); correct its annotation"):
                stored = self._drawn(source["bytes"].removeprefix(MARK))
        else:
            mask, content, name = _open(source)
            with _blaming(name):
                stored = _stored_samples(mask, content)
        # Asked before the ids, which resizing or compression may have changed.
        _check_size(stored.shape[:2], name, image)
        with _blaming(f"The mask {name}", "{}"):
            if mask is None:
                return self._ids(stored)
            if kind := _lossy(mask, content):
                raise ValueError(f"is a {kind}, whose compression may change ids; save masks as PNG")
            if mask.mode in ("P", "1"):  # in one bit, 0 is black and 1 is white
                colors = [0, 0, 0, 255, 255, 255] if mask.mode == "1" else mask.getpalette("RGB") or []
                return self._ids_of_palette(stored, np.reshape(colors, (-1, 3)))
            if mask.mode in ("RGB", "RGBA"):
                return self._ids_of_colors(stored[..., :3])
            grays = stored[..., 0] if mask.mode == "LA" else stored
            return self._ids_of_grays(grays) if grays.ndim == 2 else self._ids(grays)  # which refuses other modes

    def _drawn(self, annotation: bytes) -> np.ndarray:
        """Class ids of a mask that is drawn from polygons, or made from a panoptic PNG."""
        mask = json.loads(annotation)
        height, width = mask["size"]
        if not 0 < height * width * 8 <= MAX_DECODED_BYTES:
            raise ValueError(f"a size of {width}x{height}")
        return draw(mask, np.asarray(read_image(mask["file"])) if "file" in mask else None, self.ignore_index)

    def refuse_unusable(self, splits: Iterable[datasets.Dataset | datasets.IterableDataset]) -> None:
        """
        Read the first sample of each split, and as many masks as it takes to see that they show classes.

        Raises:
            FileNotFoundError, ValueError: as [`read`]; if there is no sample; and if no mask shows a class.
        """
        kept = []
        for rows in splits:
            first = next(iter(rows), None)
            if first is None:
                raise ValueError("A split has no samples; remove it or fill it.")
            self.read_row(first)
            if isinstance(rows, datasets.Dataset):
                kept.append(rows)
        if problem := self.fault_of_masks(self.readable_masks(kept)):
            raise ValueError(problem)

    def readable_masks(self, splits: Iterable[datasets.Dataset]) -> Iterator[np.ndarray]:
        """The masks of several splits, as class ids, without those that cannot be read."""
        for row in chain.from_iterable(rows.with_format(None).select_columns(["mask"]) for rows in splits):
            try:
                yield self.read_mask(row["mask"])
            except (ValueError, OSError):
                continue

    def fault_of_masks(self, masks: Iterable[np.ndarray]) -> str | None:
        """
        What is wrong with masks in which no pixel has a class, or white of 255 stands for the second of two classes.

        Only as many of `masks` are taken as it takes to tell; None if nothing is wrong.
        """
        classes: set[int] = set()
        has_void = False
        for mask in masks:
            values = set(_values(mask).tolist())
            has_void |= self.ignore_index in values
            classes |= values - {self.ignore_index}
            if classes and (self.num_labels > 2 or classes != {0}):
                return None
        if not has_void:
            return None
        void = f"{self.ignore_index}, which means no class"
        if not classes:
            return f"In every mask every pixel is {void}: set ignore_index, or correct the masks."
        return (
            f"The masks hold nothing but 0 and {void}: save the second class as 1, or name the colors of both in "
            'classes.json, such as "palette": [[0, 0, 0], [255, 255, 255]].'
        )

    @cached_property
    def _colors(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes of the colors of the palette, in rising order, and the class ids they mean."""
        colors = np.array([*(self.palette or ()), *self.ignore_colors], dtype=np.uint8).reshape(-1, 3)
        classes = np.arange(len(colors))
        classes[len(self.palette or ()) :] = self.ignore_index
        codes = _color_codes(colors)
        order = np.argsort(codes)
        return codes[order], classes[order]

    @property
    def _shares_colors(self) -> bool:
        codes = self._colors[0]
        return len(np.unique(codes)) < len(codes)

    def _of_colors(self, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The class ids of colors, and which of them are in the palette."""
        known, classes = self._colors
        positions = np.minimum(np.searchsorted(known, codes), len(known) - 1)
        return self._typed(classes[positions]), known[positions] == codes

    def _ids_of_colors(self, pixels: np.ndarray) -> np.ndarray:
        """Class ids of an (h, w, 3) mask in the palette's colors, or with the id in each of three channels."""
        if not self.palette or self._shares_colors:
            if _is_gray(pixels) and not self.palette:
                return self._ids_of_grays(pixels[..., 0])
            raise ValueError("is in color, so every class needs a color of its own in the palette; or save ids")
        # In parts, as codes and their places take many times the memory of the mask.
        parts = np.array_split(pixels, 1 + pixels.size // COLORS_AT_ONCE)
        found = [self._of_colors(_color_codes(part)) for part in parts]
        ids, is_known = (np.concatenate(kind) for kind in zip(*found, strict=True))
        if is_known.all():
            return ids
        if _is_gray(pixels):
            return self._ids_of_grays(pixels[..., 0])
        color = tuple(pixels[~is_known][0].tolist())
        raise ValueError(f"holds the color {color}; add it to the palette or, if it means no class, ignore_colors")

    def _ids_of_palette(self, indices: np.ndarray, colors: np.ndarray) -> np.ndarray:
        """
        Class ids of a mask of indices: by color if the mask's own palette is made of the classes' colors, which may
        have another order there, and else by index.
        """
        if not self.palette or self._shares_colors:
            return self._ids(indices)
        if len(colors) > 2 and (colors == np.arange(len(colors))[:, None]).all():
            return self._ids_of_grays(indices)  # a palette that shows each index as that gray
        used = _values(indices)
        codes = np.full(max(len(colors), 1 + used.max(initial=0)), NO_COLOR)
        codes[: len(colors)] = _color_codes(colors)
        ids, is_known = self._of_colors(codes)
        # A palette that was made for other classes may share black with these.
        is_own = is_known[: len(colors)].all() or codes[used[is_known[used]]].any()
        is_own = is_own or len(set(ids[is_known].tolist()) - {self.ignore_index}) == self.num_labels
        for index in {self.ignore_index, 0 if self.do_reduce_labels else -1} & set(used.tolist()):
            # An id that means no class does so unless it alone has the color of a class.
            if not is_known[index] or (codes[:index] == codes[index]).any():
                ids[index], is_known[index] = self.ignore_index, True
        if not is_own or not is_known[used].all():
            return self._ids(indices)
        return ids[indices]

    def _ids_of_grays(self, grays: np.ndarray) -> np.ndarray:
        """Class ids of a mask of ids, or where all colors of the palette are grays, of these."""
        grays = _whole_numbers(grays)
        colors = np.array(self.palette or [[0, 0, 1]])
        if (colors != colors[:, :1]).any() or self._shares_colors or (colors[:, 0] == np.arange(len(colors))).all():
            return self._ids(grays)
        used = _values(grays).astype(np.int64)
        ids, is_known = self._of_colors(_color_codes(np.repeat(used.clip(0, 255)[:, None], 3, 1)))
        is_known &= used < 256
        if is_known.all():
            return ids[np.searchsorted(used, grays)]
        meant = zip(used[is_known].tolist(), ids[is_known].tolist(), strict=True)
        if any(self._meaning(value) not in (None, class_id) for value, class_id in meant):
            raise ValueError(
                f"holds the grays {_shown(used[is_known])} of the palette, which are also ids of classes, beside "
                f"{_shown(used[~is_known])}; save it either with ids or in the palette's grays"
            )
        return self._ids(grays)

    def _ids(self, stored: np.ndarray) -> np.ndarray:
        """Class ids of stored ones: mapped, shifted, or as they are."""
        if stored.ndim != 2 or stored.dtype.kind not in "iub":
            raise ValueError(f"has the shape {stored.shape} and type {stored.dtype}; give (h, w) integer ids")
        is_plain = not self.id_map and not self.do_reduce_labels
        if is_plain and (not stored.size or (stored.min() >= 0 and stored.max() < self.num_labels)):
            return self._typed(stored)
        used = _values(stored)
        ids = [self._meaning(value) for value in used.tolist()]
        if None in ids:
            outside = used[[value is None for value in ids]]
            known = f"0…{self.num_labels - 1 + self.do_reduce_labels}{', those of id_map' if self.id_map else ''}"
            raise ValueError(
                f"holds the ids {_shown(outside)}, but only {known} and {self.ignore_index} (no class) mean "
                f"something with {self.num_labels} classes; complete the class list, or set id_map, "
                "ignore_index or do_reduce_labels"
            )
        return self._typed(np.array(ids))[np.searchsorted(used, stored)]

    def _meaning(self, stored: int) -> int | None:
        """The class id, or `ignore_index`, that a stored id means; None if it means nothing."""
        if stored in self.id_map:
            meant = self.id_map[stored]
            return self.ignore_index if meant is None else meant
        if stored == self.ignore_index or (stored == 0 and self.do_reduce_labels):
            return self.ignore_index
        meant = stored - self.do_reduce_labels
        return meant if 0 <= meant < self.num_labels else None

    def _typed(self, ids: np.ndarray) -> np.ndarray:
        is_small = self.num_labels <= 256 and 0 <= self.ignore_index <= 255
        return ids.astype(np.uint8 if is_small else np.int32)


def _is_gray(pixels: np.ndarray) -> bool:
    return bool((pixels[..., :1] == pixels).all())


def _check_size(shape: tuple[int, ...], mask: str, image: Image.Image | None) -> None:
    """Refuse a mask of another (height, width) than its image's."""
    if image is None or len(shape) != 2 or shape == image.size[::-1]:
        return
    turned = image.info.get("turned") and shape == image.size
    hint = (
        " (its EXIF orientation turns the image; the mask seems to be drawn on it as it is stored)" if turned else ""
    )
    remedy = "turn the mask too, or remove the tag from the image" if turned else "save both at the same size"
    raise ValueError(
        f"{name_of(image)} is {image.width}x{image.height} pixels but its mask {mask} is {shape[1]}x{shape[0]}{hint}; "
        f"{remedy}."
    )


def _whole_numbers(values: np.ndarray) -> np.ndarray:
    """Integers where floats are whole numbers, and (h, w) where an axis of one channel was added."""
    if values.ndim == 3 and 1 in (values.shape[0], values.shape[-1]):
        values = values[0] if values.shape[0] == 1 else values[..., 0]
    if values.dtype.kind == "f" and np.isfinite(values).all() and (values == (whole := values.astype(np.int64))).all():
        return whole
    return values


def _values(ids: np.ndarray) -> np.ndarray:
    """The different values of an array of integers, rising."""
    if ids.dtype != np.uint8:
        return np.unique(ids)
    seen = np.zeros(256, dtype=bool)
    seen[ids.ravel()] = True
    return np.flatnonzero(seen)


def _shown(values: np.ndarray) -> str:
    return ", ".join(map(str, values[:8].tolist())) + (" …" if len(values) > 8 else "")
