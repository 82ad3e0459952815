"""Files of strangers exhaust no memory: bombs, absurd dimensions, and text that grows."""

import json
import struct
import zipfile
import zlib

import pytest
from PIL import Image

from denseclip_hf.data import parse_classes, read_image
from denseclip_hf.inference import Source, read_image_of
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil


def png(width, height, data=b""):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((2**31 - 1, 2**31 - 1), "has more pixels than are decoded"),
        ((50_000, 50_000), "has more pixels than are decoded"),
        ((2**30, 1), "has more pixels than are decoded"),
        ((0, 5), "cannot be read"),
        ((1, 0), "cannot be read"),
    ],
)
def test_absurd_dimensions_are_refused_before_a_pixel_is_made(tmp_path, size, sentence):
    (tmp_path / "x.png").write_bytes(png(*size))
    with pytest.raises(ValueError, match=f"x.png {sentence}"):
        read_image(tmp_path / "x.png")
    with pytest.raises(ValueError, match=f"x.png {sentence}"):
        read_image_of(Source(str(tmp_path / "x.png"), "x"))


def test_text_that_unpacks_to_gigabytes_is_refused(tmp_path):
    """A comment of 100 MB of zeros, which takes 100 kB in the file."""
    picture = png(1, 1, bytes(4))
    content = b"zTXtComment\0\0" + zlib.compress(bytes(10**8))
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    (tmp_path / "x.png").write_bytes(picture[:33] + chunk + picture[33:])
    with pytest.raises(ValueError, match="x.png cannot be read as an image .(?i:Decompressed data too large)"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("archived", [True, False])
def test_files_larger_than_any_picture_are_not_read_whole(tmp_path, monkeypatch, archived):
    (tmp_path / "x.png").write_bytes(bytes(10**7))
    path = str(tmp_path / "x.png")
    if archived:
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(tmp_path / "x.png", "x.png")
        path = f"zip://x.png::{tmp_path / 'x.zip'}"
    monkeypatch.setattr("denseclip_hf.data.reading.MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="x.png.* cannot be read .* more than 1 MiB."):
        read_image({"path": path, "bytes": None})


def test_pictures_are_not_enlarged_without_bound():
    processor = DenseCLIPImageProcessorPil(size={"shortest_edge": 512, "longest_edge": 10**9})
    with pytest.raises(ValueError, match="would have 512×2560000 pixels"):
        processor(Image.new("RGB", (5000, 1)))


def test_pictures_are_not_padded_without_bound():
    processor = DenseCLIPImageProcessorPil(do_pad=True, pad_size={"height": 15_000, "width": 15_000})
    with pytest.raises(ValueError, match="padded image would have 15000×15000 pixels, above .*: lower pad_size"):
        processor(Image.new("RGB", (8, 8)))


def test_absurd_ids_in_classes_json_are_refused(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"id2label": {"0": "sky", str(10**12): "road"}}))
    with pytest.raises(ValueError, match="must name the classes"):
        parse_classes(tmp_path / "classes.json")
