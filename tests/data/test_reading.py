"""Images and masks: every file type that is read, and what is refused."""

import shutil

import numpy as np
import pytest
from PIL import Image, ImageOps, features

from denseclip_hf.data import read_image
from helpers.sample_data import PALETTE, SIZE, make_mask, make_pixels, reader, truncated, write_folder


NEEDS_AVIF = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


# File types


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("L", ".png"), ("P", ".png"), ("RGBA", ".png"), ("LA", ".png"), ("1", ".png"), ("CMYK", ".jpg"), ("L", ".jpg")],
)
def test_other_images_become_rgb(tmp_path, mode, suffix):
    original = Image.fromarray(make_pixels())
    path = tmp_path / f"picture{suffix}"
    original.convert(mode).save(path)
    image = read_image(path)
    assert image.mode == "RGB" and image.size == SIZE
    if suffix == ".png":
        assert np.array_equal(image, original.convert(mode).convert("RGB"))


def test_alpha_is_dropped(tmp_path):
    pixels = np.dstack([make_pixels(), np.zeros(SIZE[::-1], dtype=np.uint8)])
    Image.fromarray(pixels).save(tmp_path / "clear.png")
    assert np.array_equal(read_image(tmp_path / "clear.png"), pixels[..., :3])


@pytest.mark.parametrize(
    ("values", "suffix"),
    [(np.array([[0, 257, 65535]], np.uint16), ".png"), (np.array([[0, 1 / 255, 1]], np.float32), ".tif")],
)
def test_more_than_8_bits_are_scaled(tmp_path, values, suffix):
    path = tmp_path / f"deep{suffix}"
    Image.fromarray(values).save(path)
    assert np.asarray(read_image(path))[0].tolist() == [[0] * 3, [1] * 3, [255] * 3]


FORMATS = ["JPEG", "MPO", "WEBP", "PNG", "TIFF", pytest.param("AVIF", marks=NEEDS_AVIF)]


@pytest.mark.parametrize("file_format", FORMATS)
@pytest.mark.parametrize("orientation", range(1, 9))
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
@pytest.mark.parametrize("as_picture", [True, False])
def test_a_mask_that_lies_on_its_side_is_turned_upright(tmp_path, compression, as_picture):
    """Its size is asked once it is upright; and Pillow maps no file into memory, which scrambles it."""
    upright, picture = make_mask(), Image.fromarray(make_pixels())
    exif, file = Image.Exif(), tmp_path / "mask.tif"
    exif[0x0112] = 6  # a quarter turn

    def save(stored):
        Image.fromarray(stored).save(file, exif=exif, compression=compression)
        return Image.open(file) if as_picture else file

    assert np.array_equal(reader().read(picture, save(np.rot90(upright)))["mask"], upright)
    grey = np.asarray(read_image(save(np.rot90(upright))))
    assert np.array_equal(grey, np.dstack([upright] * 3))
    with pytest.raises(ValueError, match=f"is 8x6 pixels but its mask .*mask.tif is {SIZE[1]}x{SIZE[0]}"):
        reader().read(picture, save(upright))


IDS = np.array([[0, 1], [2, 255]], dtype=np.uint8)


def palette_picture():
    picture = Image.fromarray(IDS).convert("P")
    picture.putdata(IDS.ravel().tolist())
    picture.putpalette(np.random.default_rng(0).permutation(768).astype(np.uint8).tobytes())
    return picture


@pytest.mark.parametrize(
    ("picture", "suffix"),
    [
        (Image.fromarray(IDS), ".png"),
        (palette_picture(), ".png"),
        (Image.fromarray(IDS.astype(np.uint16)), ".png"),
        (Image.fromarray(IDS.astype(np.int32)), ".tif"),
    ],
    ids=["L", "P", "I;16", "I"],
)
def test_masks_of_ids(tmp_path, picture, suffix):
    path = tmp_path / f"mask{suffix}"
    picture.save(path)
    assert reader().read_mask(path).tolist() == IDS.tolist()
    assert reader().read_mask({"path": None, "bytes": path.read_bytes()}).tolist() == IDS.tolist()


@pytest.mark.parametrize("reduce", [False, True])
def test_masks_in_the_colors_of_the_palette(tmp_path, reduce):
    colors = np.array([[PALETTE[2], PALETTE[0], [1, 2, 3]]], dtype=np.uint8)
    Image.fromarray(colors).save(tmp_path / "mask.png")
    rules = reader(ignore_colors=[[1, 2, 3]], do_reduce_labels=reduce)
    assert rules.read_mask(tmp_path / "mask.png").tolist() == [[2, 0, 255]]


def test_reduced_labels_may_be_one_higher():
    rules = reader(do_reduce_labels=True)
    assert rules.read_mask(np.array([[0, 1, 3, 255]])).tolist() == [[255, 0, 2, 255]]
    with pytest.raises(ValueError, match="ids 4"):
        rules.read_mask(np.array([[4]]))


# Refusals of files


def save_mask(array, path):
    Image.fromarray(np.asarray(array)).save(path)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (
            lambda p: save_mask(np.full((6, 8), 7, np.uint8), p),
            "mask.png holds the ids 7",
        ),
        (
            lambda p: save_mask(np.full((6, 8, 3), 9, np.uint8), p),
            "mask.png holds the ids 9",
        ),
        (
            lambda p: save_mask(np.zeros((8, 6), np.uint8), p),
            "is 8x6 pixels but its mask .*mask.png is 6x8",
        ),
        (
            lambda p: save_mask(np.full((8, 6), 77, np.uint8), p),  # ids that smoothing made
            "is 8x6 pixels but its mask .*mask.png is 6x8",
        ),
        (
            lambda p: Image.new("LAB", SIZE).save(p, "TIFF"),
            "mask.png has mode LAB",
        ),
        (
            lambda p: (Image.new("L", (64, 64)).save(p.parent / "image.png"), truncated(p, "PNG")),
            "mask.png cannot be read",
        ),
        (lambda p: p.write_bytes(b"no picture"), "mask.png cannot be read"),
        (lambda p: Image.new("L", SIZE).save(p, "JPEG"), "mask.png is a JPEG"),
        (lambda p: None, "mask.png is missing"),
    ],
    ids=["ids", "colour", "size", "smoothed", "mode", "truncated", "no image", "jpeg", "missing"],
)
def test_masks_that_are_refused(tmp_path, make, words):
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    Image.new("RGB", SIZE).save(image)
    make(mask)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        reader().read(image, mask)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, "image.tif cannot be read"),
        (
            lambda p: save_mask(np.array([[0, np.nan]], np.float32), p),
            "not numbers",
        ),
        (lambda p: save_mask(np.array([[0, 300]], np.float32), p), "image.tif has values from 0.0 to 300.0"),
        (lambda p: save_mask(np.array([[-1, 300]], np.int32), p), "image.tif has values from -1 to 300"),
        (lambda p: p.write_bytes(b""), "image.tif cannot be read"),
        (lambda p: save_mask(np.array([[0, np.inf]], np.float32), p), "not numbers"),
        (lambda p: None, "image.tif is missing"),
    ],
    ids=["truncated", "nan", "float range", "negative", "empty", "infinite", "missing"],
)
def test_images_that_are_refused(tmp_path, make, words):
    make(tmp_path / "image.tif")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_image(tmp_path / "image.tif")


def test_decompression_bombs_are_refused(tmp_path, monkeypatch):
    Image.new("RGB", (30, 30)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="bomb.png has more pixels"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("mode", ["RGB", "L", "I", "F"])
def test_an_image_without_pixels_is_refused(mode):
    with pytest.raises(ValueError, match="no pixels"):
        read_image(Image.new(mode, (0, 5)))


def test_a_color_mask_needs_a_palette_of_different_colors():
    mask = Image.fromarray(np.full((2, 2, 3), PALETTE[1], np.uint8))
    with pytest.raises(ValueError, match="no palette"):
        reader(palette=None).read_mask(mask)
    with pytest.raises(ValueError, match="two classes share one"):
        reader(palette=[[0, 0, 0], [0, 0, 0], [1, 1, 1]]).read_mask(mask)


@pytest.mark.parametrize("array", [np.full((2, 2), 0.5), np.zeros((2, 2, 2), int)], ids=["float", "3-d"])
def test_arrays_that_are_no_mask(array):
    with pytest.raises(ValueError, match=r"give \(h, w\) integer ids"):
        reader().read_mask(array)


def test_images_inside_an_archive(folder, tmp_path):
    archive = shutil.make_archive(str(tmp_path / "masks"), "zip", folder / "train" / "masks")
    mask = reader().read_mask({"path": f"zip://001.png::{archive}", "bytes": None})
    assert np.array_equal(mask, make_mask(1))
