"""Results as images: masks with a palette, overlays with a legend, heat maps, confusion matrices."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from denseclip_hf.inference import confusion_image, heat_map, indexed_image, overlay, overlay_with_legend
from helpers.images import photo


PALETTE = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


def test_indexed_images_keep_ids_and_colors(tmp_path):
    ids = np.array([[0, 2], [1, 1]])
    indexed_image(ids, PALETTE).save(tmp_path / "mask.png")
    loaded = Image.open(tmp_path / "mask.png")
    assert np.asarray(loaded).tolist() == ids.tolist()
    assert loaded.convert("RGB").getpixel((1, 0)) == (0, 0, 255)


@pytest.mark.parametrize("num_labels", [256, 257, 1000])
def test_more_classes_than_a_palette_has_are_16_bit(tmp_path, num_labels):
    ids = np.array([[0, num_labels - 1]])
    indexed_image(ids, [[1, 2, 3]] * num_labels).save(tmp_path / "mask.png")
    loaded = Image.open(tmp_path / "mask.png")
    assert np.asarray(loaded).tolist() == ids.tolist() and (loaded.mode == "P") == (num_labels == 256)


@pytest.mark.parametrize("ids", [[[-1]], [[65536]]])
def test_ids_that_fit_no_image_are_refused(ids):
    with pytest.raises(ValueError, match="65535"):
        indexed_image(np.array(ids), PALETTE)


def test_legend_names_what_is_shown():
    image = Image.new("RGB", (200, 100), "white")
    ids = np.zeros((100, 200), dtype=int)
    ids[:, 150:] = 2
    sheet = overlay_with_legend(image, ids, {0: "sky", 1: "sea", 2: "sand"}, PALETTE, opacity=1.0)
    colors = {color for _, color in sheet.crop((0, 100, 200, sheet.height)).getcolors(10_000)}
    assert (255, 0, 0) in colors and (0, 0, 255) in colors and (0, 255, 0) not in colors


def test_a_legend_is_as_wide_as_its_names():
    name = "a sentence much wider than the image"
    sheets = [
        overlay_with_legend(Image.new("RGB", (96, 64)), np.zeros((64, 96), int), {0: shown}, PALETTE)
        for shown in (name, name + " ends")
    ]
    assert 96 < sheets[0].width < sheets[1].width
    for sheet in sheets:  # nothing is cut at the right
        assert sheet.crop((sheet.width - 4, 64, *sheet.size)).getcolors() == [(4 * (sheet.height - 64), (255,) * 3)]
    assert overlay_with_legend(Image.new("RGB", (96, 64)), np.zeros((64, 96), int), {}, PALETTE).size == (96, 64)


@pytest.mark.parametrize("strip", [1, 700])
def test_strips_of_an_image_equal_the_whole(monkeypatch, strip):
    image, scores = photo((50, 40)), torch.randn(5, 7)
    ids = np.random.default_rng(0).integers(-1, 4, (40, 50))
    names = {0: "sky", 1: "sea", 2: "sand"}

    def drawings():
        return heat_map(image, scores, -1.0, 1.0), overlay_with_legend(image, ids, names, PALETTE)

    whole = drawings()
    assert np.array_equal(whole[1].crop((0, 0, 50, 40)), overlay(image, ids, PALETTE, 0.6))
    monkeypatch.setattr("denseclip_hf.inference.drawing.STRIP_PIXELS", strip)
    for part, expected in zip(drawings(), whole, strict=True):
        assert np.array_equal(part, expected)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read as on Linux")
def test_drawing_over_a_large_image_takes_the_memory_of_the_result():
    """Measured by the peak that training logs, which is a process's own, whatever started it has held."""
    ballast = np.ones(2**30, dtype=np.uint8)
    code = (
        "import numpy as np, torch\n"
        "from PIL import Image\n"
        "from denseclip_hf.inference.drawing import heat_map, overlay_with_legend\n"
        "from denseclip_hf.training.callbacks import peak_memory\n"
        "peak = lambda: peak_memory('cpu') / 2**20\n"
        "def draw(side):\n"
        "    image, ids = Image.new('RGB', (side, side)), np.zeros((side, side), np.uint8)\n"
        "    before = peak()\n"
        "    heat_map(image, torch.rand(9, 9), 0, 1); overlay_with_legend(image, ids, {0: 'sky'}, [[9, 9, 9]])\n"
        "    return peak() - before\n"
        "draw(64); print(draw(6000))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    del ballast
    assert 0 < float(result.stdout) < 137 + 110  # MiB: a result of 4 bytes a pixel, and strips


def test_heat_maps_go_from_blue_to_red():
    drawn = heat_map(Image.new("RGB", (40, 20)), torch.tensor([[0.0, 1.0]]), 0.0, 1.0, opacity=1.0)
    cold, hot = drawn.getpixel((0, 10)), drawn.getpixel((39, 10))
    assert cold[2] > cold[0] and hot[0] > hot[2]
    constant = heat_map(Image.new("RGB", (4, 4)), torch.zeros(2, 2), 0.0, 0.0)
    assert constant.size == (4, 4)


@pytest.mark.parametrize("classes", [2, 150])
def test_confusion_matrix_is_bright_on_its_diagonal(classes):
    sheet = confusion_image(torch.eye(classes) * 5, [f"class {i}" for i in range(classes)])
    cell = 48 if classes == 2 else 6
    last = (sheet.width - 8 - cell // 2, sheet.height - 8 - cell // 2)
    assert sheet.getpixel(last) == (255, 255, 255) and sheet.getpixel((last[0] - cell, last[1])) == (0, 0, 0)
