"""Inputs for the fuzzing: files after accidents, values nobody expects, pictures and weights that are invented."""

import io
import json
import struct
import zlib

import numpy as np
import torch
from hypothesis import strategies as st
from PIL import Image


HEADERS = [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"MM\0*", b"BM", b"GIF89a", b"RIFF", b"P6\n", b"%!PS"]


@st.composite
def damaged(draw, files):
    """One of `files` (bytes) after a few accidents."""
    content = bytearray(draw(st.sampled_from(files)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, max(len(content) - 1, 0)) | st.integers(0, min(len(content), 200)))
        end = min(start + draw(st.integers(1, 40)), len(content))
        accident = draw(st.sampled_from(["flip", "replace", "cut", "insert", "remove", "repeat", "extreme"]))
        if accident == "flip" and content:
            content[min(start, len(content) - 1)] ^= 1 << draw(st.integers(0, 7))
        elif accident == "replace":
            content[start:end] = draw(st.binary(max_size=40))
        elif accident == "cut":
            del content[start:]
        elif accident == "insert":
            content[start:start] = draw(st.binary(max_size=40))
        elif accident == "remove":
            del content[start:end]
        elif accident == "repeat":
            content[start:start] = content[start:end] * draw(st.integers(1, 50))
        else:  # a number of the file format becomes a large, negative or zero one
            number = draw(st.sampled_from([0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 2**31, 10**6]))
            content[start : start + 4] = struct.pack(draw(st.sampled_from(["<I", ">I"])), number)
    return bytes(content)


# Values as JSON has them, with a taste for what configs hold
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


@st.composite
def changed(draw, value):
    """A JSON mapping with a few values, at any depth, taken out or replaced."""
    value = json.loads(json.dumps(value))
    for _ in range(draw(st.integers(1, 3))):
        holder = value
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if isinstance(holder[key], (dict, list)) and holder[key] and draw(st.integers(0, 4)):
                holder = holder[key]
                continue
            if draw(st.integers(0, 3)):
                holder[key] = draw(JSON)
            else:
                del holder[key]
            break
    return value


def picture_files():
    """A small picture in every format, mode and with every option that is read, as bytes."""
    pixels = np.random.default_rng(0).integers(0, 256, (40, 52, 3)).astype(np.uint8)
    picture, files = Image.fromarray(pixels), []
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "words"
    formats = [
        ("PNG", "RGB", {}), ("PNG", "P", {}), ("PNG", "LA", {}), ("PNG", "1", {}), ("PNG", "I;16", {}),
        ("JPEG", "RGB", {"exif": exif}), ("JPEG", "CMYK", {}), ("JPEG", "L", {"progressive": True}),
        ("TIFF", "RGB", {"exif": exif}), ("TIFF", "F", {}), ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
        ("TIFF", "LAB", {}), ("BMP", "RGB", {}), ("BMP", "P", {}), ("GIF", "P", {}), ("PPM", "RGB", {}),
        ("WEBP", "RGB", {"exif": exif}), ("PNG", "RGBA", {"exif": exif}), ("MPO", "RGB", {}), ("AVIF", "RGB", {}),
        ("JPEG2000", "RGB", {}),
    ]  # fmt: skip
    for format, mode, options in formats:
        stream = io.BytesIO()
        if mode == "LAB":
            converted = Image.merge("LAB", picture.split())
        elif mode == "I;16":
            converted = Image.fromarray(pixels[..., 0].astype(np.uint16) * 250)
        else:
            converted = picture.convert(mode)
        try:
            converted.save(stream, format, **options)
        except (KeyError, OSError):  # this Pillow was built without it
            continue
        files.append(stream.getvalue())
    return files


@st.composite
def invented_png(draw):
    """A PNG whose checksums are right and whose contents are anything."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    sides = st.integers(0, 300) | st.sampled_from([2**15, 2**20, 2**31 - 1, 2**32 - 1])
    header = struct.pack(">II", draw(sides), draw(sides)) + bytes(
        draw(st.lists(st.integers(0, 16), min_size=5, max_size=5))
    )
    kinds = [
        b"PLTE",
        b"tRNS",
        b"eXIf",
        b"iCCP",
        b"zTXt",
        b"iTXt",
        b"gAMA",
        b"pHYs",
        b"acTL",
        b"fcTL",
        b"fdAT",
        b"sRGB",
    ]
    extra = b"".join(
        chunk(kind, draw(st.binary(max_size=60))) for kind in draw(st.lists(st.sampled_from(kinds), max_size=4))
    )
    data = zlib.compress(draw(st.binary(max_size=400)) * draw(st.sampled_from([1, 10, 1000])))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@st.composite
def odd_weights(draw, weights):
    """A state dict with a few weights missing, renamed or of another shape or type."""
    weights = dict(weights)
    for key in draw(st.lists(st.sampled_from(sorted(weights)), min_size=1, max_size=3, unique=True)):
        change = draw(st.sampled_from(["remove", "rename", "shape", "dtype", "number"]))
        value = weights.pop(key)
        if change == "rename":
            weights[draw(st.sampled_from([f"{key}.x", key.replace("0", "7"), key.replace("weight", "bias"), ""]))] = (
                value
            )
        elif change == "shape":
            weights[key] = torch.zeros(draw(st.lists(st.integers(0, 4), max_size=4)))
        elif change == "dtype":
            weights[key] = value.to(draw(st.sampled_from([torch.int64, torch.float16, torch.complex64, torch.bool])))
        elif change == "number":
            weights[key.replace("0", "999999999")] = value
    return weights
