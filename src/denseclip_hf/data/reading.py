"""Reading one picture and its mask from files or bytes: converted where that loses nothing, refused otherwise."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image, UnidentifiedImageError

from ..model.image_inputs_denseclip import decode, reduce_labels


NAMELESS = "a sample without a file name"
EXIF_ORIENTATION = 0x0112
# What turns a picture of that EXIF orientation upright. (ImageOps.exif_transpose writes all tags anew, which fails for
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
# Of one file, which inside an archive may be a thousand times what the archive takes: more than the largest picture.
MAX_FILE_BYTES = 1 << 30
SIXTEEN_BIT_MODES = ("I", "I;16", "I;16B", "I;16L", "I;16N")


def name_of(source: Any) -> str:
    """What to call a picture or mask in a message: its path where it has one, without an address's secrets."""
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


def without_secrets(text: str) -> str:
    """`text` in which the addresses, as far as the next blank, lack what [`shown_address`] takes out."""
    if "://" not in text:
        return text
    text = re.sub(r"://[^/?#\s]*@", "://", text)
    return re.sub(r"(https?://[^?#\n]*)[?#]\S*", r"\1", text, flags=re.IGNORECASE)


def file_stem(name: str) -> str:
    """What to call new files about the picture at a path or address: of at most 200 bytes, and no path itself."""
    stem = re.split(r"[/\\]", name)[-1]
    stem = stem[: stem.rfind(".")] if "." in stem[1:] else stem
    stem = re.sub(r'[\x00-\x1f\x7f<>:"|?*\ud800-\udfff]', "_", stem)
    return stem.encode()[:200].decode(errors="ignore").strip(" .")


def _open(source: Any) -> Image.Image:
    """A PIL image, opened but not decoded, from a PIL image, a path or the `{"path", "bytes"}` of `datasets`."""
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, (str, Path)):
        source = {"path": str(source), "bytes": None}
    name = name_of(source)
    path = str(source.get("path") or name) if isinstance(source, Mapping) else name
    try:
        content = source["bytes"]
        if content is None:
            content = _content(path)
        image = Image.open(BytesIO(content), formats=_formats())
    except FileNotFoundError as error:
        kind = "missing, or its server does not answer" if "://" in name else "missing"
        raise FileNotFoundError(f"{name} is {kind}; restore the file or remove the sample.") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(
            f"{name} has more pixels than are decoded ({error}); shrink it, or raise PIL.Image.MAX_IMAGE_PIXELS if "
            "you trust the file."
        ) from error
    except UnidentifiedImageError as error:  # which calls the file by where it lies in memory
        raise _broken(name, f"it is none of {', '.join(_formats())}") from error
    except Exception as error:  # a damaged file fails in any of many ways
        raise _broken(name, without_secrets(str(error).replace(path, name))) from error
    image.filename = name  # type: ignore[attr-defined]
    return image


def _formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this Pillow was built with."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _content(path: str) -> bytes:
    """A file read whole, so that no handle stays open however many samples are held."""
    if "://" in path:  # what a stream gives: on the Hub, or inside an archive
        if unknown := {part.split("://")[0] for part in path.split("::") if "://" in part} - PROTOCOLS:
            raise ValueError(f"{min(unknown)}:// is none of the kinds of address that are read")
        with fsspec.open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    else:
        with open(path, "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"it has more than {MAX_FILE_BYTES >> 20} MiB")
    return content


def _broken(name: str, error: object) -> ValueError:
    return ValueError(f"{name} cannot be read as a picture ({error}); save it anew or remove the sample.")


def _decode(image: Image.Image, name: str) -> None:
    try:
        decode(image)
    except Exception as error:
        raise _broken(name, error) from error


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What turns a picture upright as its EXIF tag says; `None` where there is no tag or the tags are damaged."""
    try:
        return TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
    except Exception:
        return None


def read_image(source: Any, decode: bool = True) -> Image.Image:
    """
    An RGB picture of 8 bits per channel, turned upright as its EXIF tag says.

    Grey, palette, CMYK and RGBA pictures are converted (alpha is dropped), 16-bit ones scaled from 0…65535 and
    floating-point ones from 0…1.

    Args:
        source: path, `{"path": …, "bytes": …}` as `datasets` stores pictures, or PIL image.
        decode: False leaves an upright RGB file in JPEG opened but not decoded, for
            `TrainTransform(fast_jpeg=True)`; damage to it then shows only when its pixels are used.

    Raises:
        FileNotFoundError: if the file is missing.
        ValueError: if it cannot be read, is larger than Pillow's limit, or has values without a meaning as grey.
    """
    image = _open(source)
    name = name_of(image)
    if 0 in image.size:
        raise _broken(name, "it has no pixels")
    if not decode and image.format in ("JPEG", "MPO") and image.mode == "RGB" and _turn(image) is None:
        return image
    _decode(image, name)
    turn = _turn(image)  # asked after decoding, which turns a TIFF by itself
    if turn is not None:
        image = image.transpose(turn)
        image.info = {}  # nothing shall turn it again
    if image.mode in (*SIXTEEN_BIT_MODES, "F"):
        image = Image.fromarray(_eight_bit(np.asarray(image), name))
    try:
        image = image if image.mode == "RGB" else image.convert("RGB")
    except ValueError as error:  # some colour spaces have no way to RGB
        raise _broken(name, error) from error
    image.filename = name  # type: ignore[attr-defined]
    return image


def _eight_bit(values: np.ndarray, name: str) -> np.ndarray:
    """Grey values of more than 8 bits as 0…255."""
    if not np.isfinite(values).all():
        raise ValueError(f"{name} holds values that are not numbers (NaN or infinite); save it as an 8-bit picture.")
    highest = 1 if values.dtype.kind == "f" else 65535
    if values.min(initial=0) < 0 or values.max(initial=0) > highest:
        raise ValueError(
            f"{name} has values from {values.min()} to {values.max()} where 0 to {highest} are expected; "
            "save it as an 8-bit picture."
        )
    return np.round(values * (255 / highest)).astype(np.uint8)


def _check_size(shape: tuple[int, ...], mask: str, picture: Image.Image | None) -> None:
    """Refuse a mask of another (height, width); asked before its ids, which one that was resized may have lost."""
    if picture is not None and len(shape) == 2 and shape != picture.size[::-1]:
        raise ValueError(
            f"{name_of(picture)} is {picture.width}x{picture.height} pixels but its mask {mask} is "
            f"{shape[1]}x{shape[0]}; save both at the same size."
        )


def _color_codes(colors: np.ndarray) -> np.ndarray:
    """One integer for each colour of an (…, 3) array of 8-bit values."""
    red, green, blue = (colors[..., channel].astype(np.uint32) for channel in range(3))
    return red << 16 | green << 8 | blue


@dataclass(frozen=True)
class SampleReader:
    """
    How the pictures and masks of a data set are read. Called by `datasets` on a batch of rows, it decodes them.

    Args:
        num_labels: K, the number of classes.
        ignore_index: id of pixels without a class.
        do_reduce_labels: masks hold 0 for "no class" and 1…K; they are checked for it but returned unshifted.
        palette: K colours (r, g, b), 0…255: how classes appear in masks that are pictures in colour.
        ignore_colors: colours of such masks that mean "no class".
        id_table: class of each stored id (position = stored id, `ignore_index` = no class); None: stored as they are.
        decode: see [`read_image`].
    """

    num_labels: int
    ignore_index: int = 255
    do_reduce_labels: bool = False
    palette: Sequence[Sequence[int]] | None = None
    ignore_colors: Sequence[Sequence[int]] = ()
    id_table: Sequence[int] | None = None
    decode: bool = True

    def __call__(self, batch: dict[str, list]) -> dict[str, list]:
        samples = [self.read(i, m) for i, m in zip(batch["image"], batch["mask"], strict=True)]
        return {key: [sample[key] for sample in samples] for key in ("image", "mask")}

    def read_row(self, row: dict[str, Any]) -> dict[str, Any]:
        """[`read`] on one row with the columns `image` and `mask`."""
        return self.read(row["image"], row["mask"])

    def read(self, image: Any, mask: Any) -> dict[str, Any]:
        """
        One sample: `image`, an RGB PIL picture of (w, h) pixels, and `mask`, an (h, w) integer array of raw ids.

        Raises:
            FileNotFoundError: if a file is missing.
            ValueError: if a file cannot be read, the two differ in size, or the mask holds a value or colour that
                is no class. The message names the file and what to do.
        """
        picture = read_image(image, self.decode)
        return {"image": picture, "mask": self.read_mask(mask, picture)}

    def read_mask(self, source: Any, picture: Image.Image | None = None) -> np.ndarray:
        """
        The (h, w) integer array of raw ids of a mask: file, bytes, PIL image, or array of ids.

        Raises:
            FileNotFoundError, ValueError: as [`read`], the latter if its size is not that of `picture` (if given).
        """
        if isinstance(source, (np.ndarray, list)):
            ids = np.asarray(source)
            _check_size(ids.shape, "given as an array", picture)
            return self._checked_ids(ids, "a mask given as an array")
        image = _open(source)
        name = name_of(image)
        if image.format == "JPEG":
            raise ValueError(f"The mask {name} is a JPEG, whose compression changes ids; save masks as PNG.")
        _decode(image, name)
        _check_size(image.size[::-1], name, picture)
        if image.mode in ("RGB", "RGBA"):
            return self._ids_of_colors(np.asarray(image)[..., :3], name)
        if image.mode not in ("1", "L", "P", *SIXTEEN_BIT_MODES):
            raise ValueError(
                f"The mask {name} has mode {image.mode}; save it as a PNG with one integer id per pixel (or in the "
                "colours of the palette)."
            )
        ids = np.asarray(image)  # of a palette picture: the indices, not the colours
        return self._checked_ids(ids.astype(np.uint8) if image.mode == "1" else ids, name)

    def _checked_ids(self, ids: np.ndarray, name: str) -> np.ndarray:
        if ids.ndim != 2 or ids.dtype.kind not in "iu":
            raise ValueError(f"The mask {name} has shape {ids.shape} and type {ids.dtype}; give (h, w) integer ids.")
        if self.id_table is not None:
            self._refuse_outside(ids, len(self.id_table) - 1, name)
            # Every id past the table is the void id, which the check has let through.
            table = np.append(self.id_table, self.ignore_index)
            dtype = np.uint8 if 0 <= self.ignore_index <= 255 else np.int32
            return table.astype(dtype)[np.minimum(ids, len(self.id_table))]
        self._refuse_outside(ids, self.num_labels - (not self.do_reduce_labels), name)
        return ids

    def _refuse_outside(self, ids: np.ndarray, highest: int, name: str) -> None:
        """Raise unless every id is the void id or in 0…`highest`."""
        # Comparing every pixel is only needed when the extremes are outside.
        if not ids.size or (ids.min() >= 0 and ids.max() <= highest):
            return
        void = 255 if self.id_table is not None else self.ignore_index
        outside = np.unique(ids[((ids < 0) | (ids > highest)) & (ids != void)])
        if outside.size:
            values = ", ".join(str(value) for value in outside[:8]) + (" …" if outside.size > 8 else "")
            raise ValueError(
                f"The mask {name} holds the ids {values}, but only 0…{highest} and {void} (no class) have a meaning "
                f"with {self.num_labels} classes; complete the class list, set ignore_index or do_reduce_labels, or "
                "correct the mask."
            )

    def _ids_of_colors(self, pixels: np.ndarray, name: str) -> np.ndarray:
        """Ids, in the raw convention of this data set, of an (h, w, 3) mask in the palette's colours."""
        if not self.palette:
            raise ValueError(f"The mask {name} is in colour but no palette is given; add one or save ids instead.")
        colors = np.array([*self.palette, *self.ignore_colors], dtype=np.uint8)
        classes = np.arange(len(colors)) + self.do_reduce_labels
        classes[len(self.palette) :] = 0 if self.do_reduce_labels else self.ignore_index
        codes = _color_codes(colors)
        if len(np.unique(codes)) < len(codes):
            raise ValueError(f"The mask {name} is in colour but two classes share one; give each its own colour.")
        order = np.argsort(codes)
        pixel_codes = _color_codes(pixels)
        positions = order[np.minimum(np.searchsorted(codes[order], pixel_codes), len(codes) - 1)]
        unknown = pixels[codes[positions] != pixel_codes]
        if unknown.size:
            color = tuple(int(value) for value in unknown[0])
            raise ValueError(
                f"The mask {name} holds the colour {color}, which is no class of the palette; add it to the palette "
                "or, if it means no class, to ignore_colors."
            )
        return classes[positions]

    def class_ids(self, mask: np.ndarray) -> np.ndarray:
        """`mask` with `do_reduce_labels` applied, as a new array: 0…K − 1 and `ignore_index`."""
        return reduce_labels(mask, self.ignore_index) if self.do_reduce_labels else mask.astype(np.int64)
