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


@pytest.mark.parametrize("size", [(2**31 - 1, 2**31 - 1), (50_000, 50_000), (2**30, 1), (0, 5), (1, 0)])
def test_absurd_dimensions_are_refused_before_a_pixel_is_made(tmp_path, size):
    (tmp_path / "x.png").write_bytes(png(*size))
    for read in (read_image, lambda path: read_image_of(Source(str(path), "x"))):
        with pytest.raises(ValueError, match="x.png"):
            read(tmp_path / "x.png")


def test_text_that_unpacks_to_gigabytes_is_refused(tmp_path):
    """A comment of 100 MB of zeros, which takes 100 kB in the file."""
    image = png(1, 1, bytes(4))
    content = b"zTXtComment\0\0" + zlib.compress(bytes(10**8))
    chunk = struct.pack(">I", len(content) - 4) + content + struct.pack(">I", zlib.crc32(content))
    (tmp_path / "x.png").write_bytes(image[:33] + chunk + image[33:])
    with pytest.raises(ValueError, match="x.png"):
        read_image(tmp_path / "x.png")


@pytest.mark.parametrize("archived", [True, False])
def test_files_larger_than_any_image_are_not_read_whole(tmp_path, monkeypatch, archived):
    (tmp_path / "x.png").write_bytes(bytes(10**7))
    path = str(tmp_path / "x.png")
    if archived:
        with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(tmp_path / "x.png", "x.png")
        path = f"zip://x.png::{tmp_path / 'x.zip'}"
    monkeypatch.setattr("denseclip_hf.data.reading.MAX_FILE_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="1 MiB"):
        read_image({"path": path, "bytes": None})


def test_images_are_not_enlarged_without_bound():
    processor = DenseCLIPImageProcessorPil(size={"shortest_edge": 512, "longest_edge": 10**9})
    with pytest.raises(ValueError, match="512×2560000"):
        processor(Image.new("RGB", (5000, 1)))


def test_absurd_ids_in_classes_json_are_refused(tmp_path):
    (tmp_path / "classes.json").write_text(json.dumps({"id2label": {"0": "sky", str(10**12): "road"}}))
    with pytest.raises(ValueError, match="id"):
        parse_classes(tmp_path / "classes.json")
