"""Images and masks: every file type that is read, and what is refused."""

import os
import shutil
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps, features

from denseclip_hf.data import read_image
from denseclip_hf.data.reading import remarks
from helpers.sample_data import PALETTE, SIZE, make_mask, make_pixels, reader, truncated, write_folder


NEEDS_AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


# File types


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("P", ".png"), ("RGBA", ".png"), ("LA", ".png"), ("1", ".png"), ("CMYK", ".jpg"), ("L", ".jpg")],
)
def test_other_images_become_rgb(tmp_path, mode, suffix):
    original = Image.fromarray(make_pixels())
    path = tmp_path / f"image{suffix}"
    original.convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == SIZE
    if suffix == ".png":
        assert np.array_equal(image, original.convert(mode).convert("RGB"))  # alpha is dropped


@pytest.mark.parametrize(
    ("file_format", "orientation"),
    [
        *[("JPEG", orientation) for orientation in range(1, 9)],
        *[(name, 6) for name in ("MPO", "WEBP", "PNG", "TIFF")],
        pytest.param("AVIF", 6, marks=NEEDS_AVIF),
    ],
)
def test_images_are_turned_upright_as_pillow_turns_them(tmp_path, file_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(make_pixels()).save(tmp_path / "lying", file_format, exif=exif)
    with Image.open(tmp_path / "lying") as lying:
        expected = np.asarray(ImageOps.exif_transpose(lying).convert("RGB"))
    assert expected.shape == (*(SIZE if orientation > 4 else SIZE[::-1]), 3)
    image = read_image(tmp_path / "lying")
    assert np.array_equal(read_image(image), expected)  # what is upright stays so


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
@pytest.mark.parametrize("is_open", [True, False])
def test_a_mask_that_lies_on_its_side_is_turned_upright(tmp_path, compression, is_open):
    """Its size is asked once it is upright; and Pillow maps no file into memory, which scrambles it."""
    upright, image = make_mask(), Image.fromarray(make_pixels())
    exif, file = Image.Exif(), tmp_path / "mask.tif"
    exif[0x0112] = 6  # a quarter turn

    def save(stored):
        Image.fromarray(stored).save(file, exif=exif, compression=compression)
        return Image.open(file) if is_open else file

    assert np.array_equal(reader().read(image, save(np.rot90(upright)))["mask"], upright)
    gray = np.asarray(read_image(save(np.rot90(upright))))
    assert np.array_equal(gray, np.dstack([upright] * 3))
    with pytest.raises(ValueError, match="8x6.*6x8"):
        reader().read(image, save(upright))


IDS = np.array([[0, 1], [2, 255]], dtype=np.uint8)


def indexed_image():
    image = Image.fromarray(IDS).convert("P")
    image.putdata(IDS.ravel().tolist())
    image.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())
    return image


@pytest.mark.parametrize(
    ("mask", "suffix"),
    [
        (Image.fromarray(IDS), ".png"),
        (indexed_image(), ".png"),
        (Image.fromarray(IDS.astype(np.uint16)), ".png"),
        (Image.fromarray(IDS.astype(np.int32)), ".tif"),
    ],
    ids=["L", "P", "I;16", "I"],
)
def test_masks_of_ids(tmp_path, mask, suffix):
    path = tmp_path / f"mask{suffix}"
    mask.save(path)
    assert reader().read_mask(path).tolist() == IDS.tolist()
    assert reader().read_mask({"path": None, "bytes": path.read_bytes()}).tolist() == IDS.tolist()


@pytest.mark.parametrize("reduce", [False, True])
def test_masks_in_the_colors_of_the_palette(tmp_path, reduce):
    """Colors are classes; with reduced labels, ids are one higher."""
    colors = np.array([[PALETTE[2], PALETTE[0], [1, 2, 3]]], dtype=np.uint8)
    Image.fromarray(colors).save(tmp_path / "mask.png")
    rules = reader(ignore_colors=[[1, 2, 3]], do_reduce_labels=reduce)
    assert rules.read_mask(tmp_path / "mask.png").tolist() == [[2, 0, 255]]
    if reduce:
        assert rules.read_mask(np.array([[0, 1, 3, 255]])).tolist() == [[255, 0, 2, 255]]
    with pytest.raises(ValueError, match="4"):
        rules.read_mask(np.array([[4]]))


# Refusals of files


def save_mask(array, path):
    Image.fromarray(np.asarray(array)).save(path)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: save_mask(np.full((6, 8), 7, np.uint8), p),
        lambda p: save_mask(np.full((6, 8, 3), 9, np.uint8), p),
        lambda p: save_mask(np.zeros((8, 6), np.uint8), p),
        lambda p: save_mask(np.full((8, 6), 77, np.uint8), p),
        lambda p: Image.new("LAB", SIZE).save(p, "TIFF"),
        lambda p: (Image.new("L", (64, 64)).save(p.parent / "image.png"), truncated(p, "PNG")),
        lambda p: p.write_bytes(b"no image"),
        lambda p: Image.new("L", SIZE).save(p, "JPEG"),
        lambda p: None,
    ],
    ids=["ids", "color", "size", "smoothed", "mode", "truncated", "no image", "jpeg", "missing"],
)
def test_masks_that_are_refused_are_named(tmp_path, make):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("RGB", SIZE).save(image)
    make(mask)
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        reader().read(image, mask)
    assert "mask.png" in str(refused.value)


@pytest.mark.parametrize(
    "make",
    [
        truncated,
        lambda p: save_mask(np.array([[0, np.nan]], np.float32), p),
        lambda p: save_mask(np.array([[0, 300]], np.float32), p),
        lambda p: save_mask(np.array([[-1, 300]], np.int32), p),
        lambda p: p.write_bytes(b""),
        lambda p: None,
    ],
    ids=["truncated", "nan", "float range", "negative", "empty", "missing"],
)
def test_images_that_are_refused_are_named(tmp_path, make):
    make(tmp_path / "image.tif")
    with pytest.raises((ValueError, FileNotFoundError)) as refused:
        read_image(tmp_path / "image.tif")
    assert "image.tif" in str(refused.value)


def test_a_color_mask_needs_a_palette_of_different_colors():
    mask = Image.fromarray(np.full((2, 2, 3), PALETTE[1], np.uint8))
    for palette in (None, [[0, 0, 0], [0, 0, 0], [1, 1, 1]]):
        with pytest.raises(ValueError, match="color"):
            reader(palette=palette).read_mask(mask)


def test_images_inside_an_archive(folder, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "masks"), "zip", folder / "train" / "masks")
    mask = reader().read_mask({"path": f"zip://001.png::{archive}", "bytes": None})
    assert np.array_equal(mask, make_mask(1))


# Masks as tools write them


def indexed(indices, colors, path, **options):
    image = Image.fromarray(np.asarray(indices, np.uint8)).convert("P")
    image.putdata(np.ravel(indices).tolist())
    image.putpalette(np.ravel(colors).astype(np.uint8).tolist())
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".gif", ".tif"])
def test_a_palette_of_the_classes_colors_counts_in_any_order(tmp_path, suffix):
    file = indexed([[0, 1], [2, 0]], [PALETTE[2], PALETTE[0], PALETTE[1]], tmp_path / f"mask{suffix}")
    assert reader().read_mask(file).tolist() == [[2, 0], [1, 2]]
    assert reader(do_reduce_labels=True).read_mask(file).tolist() == [[2, 0], [1, 2]]
    assert reader(palette=None).read_mask(file).tolist() == [[0, 1], [2, 0]]


def test_a_palette_of_part_of_the_classes_colors_counts_too(tmp_path):
    file = indexed([[0, 1, 0]], [PALETTE[2], PALETTE[1], [9, 8, 7], [0, 0, 0]], tmp_path / "mask.png")
    assert reader().read_mask(file).tolist() == [[2, 1, 2]]


def test_a_palette_that_shares_only_black_does_not_count(tmp_path):
    rules = reader(palette=[[255, 0, 0], [0, 255, 0], [0, 0, 0]])
    file = indexed([[0, 0]], [[0, 0, 0], [128, 0, 0], [0, 128, 0]], tmp_path / "mask.png")
    assert rules.read_mask(file).tolist() == [[0, 0]]


def test_void_stays_void_whatever_color_the_palette_was_filled_up_with(tmp_path):
    black_first = [[0, 0, 0], [255, 0, 0], [0, 255, 0]]
    filled = [*black_first, *[[0, 0, 0]] * 253]
    file = indexed([[0, 1, 2, 255]], filled, tmp_path / "mask.png")
    assert reader(palette=black_first).read_mask(file).tolist() == [[0, 1, 2, 255]]
    other_order = [black_first[2], black_first[0], black_first[1], *[[7, 7, 7]] * 253]
    file = indexed([[0, 1, 2, 255]], other_order, tmp_path / "mask.png")
    assert reader(palette=black_first).read_mask(file).tolist() == [[2, 0, 1, 255]]


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_greys_of_the_palette_are_classes(tmp_path, mode):
    grays = np.array([[10, 200, 90]], np.uint8)
    Image.fromarray(grays).convert(mode).save(tmp_path / "mask.png")
    rules = reader(palette=[[v] * 3 for v in (10, 90, 200)])
    assert rules.read_mask(tmp_path / "mask.png").tolist() == [[0, 2, 1]]


def test_greys_that_could_be_both_ids_and_colors_are_refused():
    rules = reader(num_labels=2, palette=[[0, 0, 0], [255, 255, 255]])
    assert rules.read_mask(Image.fromarray(np.array([[0, 1]], np.uint8))).tolist() == [[0, 1]]
    assert rules.read_mask(Image.fromarray(np.array([[0, 255]], np.uint8))).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="grays"):
        rules.read_mask(Image.fromarray(np.array([[0, 1, 255]], np.uint8)))


def png_of_bits(samples, bits):
    """A gray PNG of 2 or 4 bits, which Pillow does not write."""
    height, width = np.shape(samples)
    rows = [int("".join(f"{v:0{bits}b}" for v in row), 2).to_bytes(width * bits // 8, "big") for row in samples]

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b"")


STORED = [[0, 1, 2, 1, 0, 2, 2, 0]]


@pytest.mark.parametrize(
    "content",
    [
        png_of_bits(STORED, 2),
        png_of_bits(STORED, 4),
        b"P5\n# made by hand\n8 1\n2\n" + bytes(STORED[0]),
        b"P2 8 1 7 " + " ".join(map(str, STORED[0])).encode(),
        b"P5 8 1 1000\n" + np.array(STORED, ">u2").tobytes(),
        b"P1 8 1 0 1 1 1 0 1 1 0",
        b"P4 8 1\n\x76",
    ],
    ids=["2 bits", "4 bits", "maxval 2", "plain, maxval 7", "maxval 1000", "plain bits", "packed bits"],
)
def test_the_stored_sample_counts(content):
    stored = np.minimum(STORED, 1) if content.startswith((b"P1", b"P4")) else np.array(STORED)
    assert reader().read_mask({"path": "mask", "bytes": content}).tolist() == stored.tolist()


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("TIFF", {"compression": "jpeg"}),
        ("JPEG2000", {"irreversible": True}),
        ("JPEG2000", {"irreversible": False, "quality_mode": "rates", "quality_layers": [100]}),
        ("WEBP", {"quality": 80}),
        ("MPO", {}),
    ],
)
def test_masks_whose_compression_changes_ids_are_refused_and_others_read(tmp_path, file_format, options):
    ids = np.random.default_rng(0).integers(0, 3, (64, 64), dtype=np.uint8)
    image = Image.fromarray(ids).convert("RGB" if file_format == "WEBP" else "L")
    image.save(tmp_path / "mask", file_format, **options)
    with pytest.raises(ValueError, match="compression"):
        reader().read_mask(tmp_path / "mask")
    lossless = {"WEBP": {"lossless": True}, "TIFF": {"compression": "tiff_lzw"}}.get(file_format)
    if lossless:
        image.save(tmp_path / "kept", file_format, **lossless)
        assert np.array_equal(reader(palette=None).read_mask(tmp_path / "kept"), ids)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_an_id_in_each_channel_is_that_id(tmp_path, mode):
    Image.fromarray(IDS).convert(mode).save(tmp_path / "mask.png")
    for palette in (PALETTE, None):
        assert reader(palette=palette).read_mask(tmp_path / "mask.png").tolist() == IDS.tolist()


@pytest.mark.parametrize("values", [IDS[None].tolist(), IDS[..., None], IDS.astype(float)])
def test_arrays_of_ids_may_have_an_axis_more_or_be_floats(values):
    assert reader().read_mask(values).tolist() == IDS.tolist()
    with pytest.raises(ValueError, match="integer"):
        reader().read_mask(np.full((2, 2), 0.5))


def test_id_map_merges_drops_and_renames():
    rules = reader(id_map={7: 2, 9: 1, 200: None, 201: None})
    assert rules.read_mask(np.array([[0, 7, 9], [200, 201, 255]])).tolist() == [[0, 2, 1], [255, 255, 255]]
    with pytest.raises(ValueError, match="8"):
        rules.read_mask(np.array([[8]]))


def test_more_classes_than_a_byte_holds():
    rules = reader(num_labels=400, ignore_index=65535, palette=None)
    assert rules.read_mask(np.array([[0, 399, 65535]], np.uint16)).tolist() == [[0, 399, 65535]]


# What keeps memory bounded and training alive


@pytest.mark.parametrize("address", ["{}", "zip://a.png::file://{}"])
def test_a_pipe_is_no_image(tmp_path, address):
    os.mkfifo(tmp_path / "image.png")
    with pytest.raises(ValueError, match="no regular file"):
        read_image(address.format(tmp_path / "image.png"))


@pytest.mark.parametrize(("mode", "size"), [("1", (1, 170_000_000)), ("F", (12_000, 12_000))])
def test_images_are_bounded_by_what_they_take_decoded(tmp_path, mode, size, monkeypatch):
    """Files of a few kB that would take gigabytes."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10**9)
    Image.new(mode, (8, 8)).save(tmp_path / "bomb.tif", compression="tiff_lzw" if mode != "1" else "group4")
    content = bytearray((tmp_path / "bomb.tif").read_bytes())
    directory = struct.unpack_from("<I", content, 4)[0]
    for entry in range(struct.unpack_from("<H", content, directory)[0]):
        place = directory + 2 + 12 * entry
        (tag,) = struct.unpack_from("<H", content, place)
        if tag in (256, 257):
            struct.pack_into("<HHII", content, place, tag, 4, 1, size[tag - 256])
    with pytest.raises(ValueError, match="MiB"):
        read_image({"path": "bomb.tif", "bytes": bytes(content)})


def test_memory_that_runs_out_is_not_blamed_on_the_file(tmp_path, monkeypatch):
    def exhausted(self):
        raise MemoryError

    Image.new("RGB", SIZE).save(tmp_path / "image.bmp")
    monkeypatch.setattr(ImageFile.ImageFile, "load", exhausted)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "image.bmp")


def test_a_mask_drawn_on_the_stored_pixels_of_a_lying_photo_is_explained(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(make_pixels()).save(tmp_path / "image.jpg", exif=exif)
    Image.fromarray(make_mask()).save(tmp_path / "mask.png")
    with pytest.raises(ValueError, match="EXIF"):
        reader().read(tmp_path / "image.jpg", tmp_path / "mask.png")


def test_remarks_name_pixels_that_are_not_used(tmp_path):
    pages = [Image.new("RGB", SIZE) for _ in range(3)]
    pages[0].save(tmp_path / "pages.tif", save_all=True, append_images=pages[1:])
    Image.fromarray(np.full(SIZE[::-1], 4000, np.uint16)).save(tmp_path / "deep.png")
    Image.new("RGB", SIZE).save(tmp_path / "plain.png")
    found = {name: " ".join(remarks(tmp_path / name)) for name in ("pages.tif", "deep.png", "plain.png")}
    assert "pages" in found["pages.tif"] and "12-bit" in found["deep.png"] and found["plain.png"] == ""


@pytest.mark.parametrize("palette", [None, [[0, 0, 0], [255, 255, 255]], [[255, 255, 255], [0, 0, 0]], PALETTE[:2]])
def test_masks_of_one_bit(tmp_path, palette):
    Image.fromarray(np.array([[False, True]])).save(tmp_path / "mask.png")
    expected = [[1, 0]] if palette and palette[0] == [255, 255, 255] else [[0, 1]]
    assert reader(num_labels=2, palette=palette).read_mask(tmp_path / "mask.png").tolist() == expected
