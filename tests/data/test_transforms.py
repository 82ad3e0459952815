"""The training augmentation: geometry against the original's results, draws, and what reaches the workers."""

import colorsys

import numpy as np
import pytest
import torch
from PIL import Image

from denseclip_hf.model.resizing_denseclip import fit_within
from denseclip_hf.transforms import (
    TrainTransform,
    crop_is_varied,
    photometric_distortion,
    resize_region,
    sample_rng,
)
from helpers.golden import fixture
from helpers.images import make_sample


SMALL = TrainTransform(crop_size=24, scale=(128, 32))


GOLDEN = fixture("preprocess")[0]
TENSORS = {name: tensor.numpy() for name, tensor in fixture("preprocess")[1].items()}
IMAGES = ["landscape", "portrait", "upscale"]
BOXES = GOLDEN["random_crop"]["boxes"]


def whole_only(**options):
    """A transform that leaves size and colors alone and never flips: the crop is the whole image."""
    defaults = {"crop_size": (60, 80), "scale": (80, 60), "ratio_range": (1, 1), "cat_max_ratio": 1}
    return TrainTransform(**{**defaults, "flip_probability": 0, "photometric": False, **options})


# Geometry


@pytest.mark.parametrize("name", IMAGES)
def test_resized_size_image_and_mask_agree_with_the_original(name):
    image, mask = TENSORS[f"in/{name}/image"], TENSORS[f"in/{name}/label"]
    expected, expected_mask = TENSORS[f"out/{name}/resized"], TENSORS[f"out/{name}/label_resized"]
    height, width = fit_within(*mask.shape, *sorted(GOLDEN["img_scale"]))
    assert (height, width) == expected_mask.shape
    resized = resize_region(Image.fromarray(image), (height, width), (0, 0, height, width)).permute(1, 2, 0)
    assert np.abs(resized.numpy().astype(int) - expected).max() <= 1
    transform = whole_only(crop_size=(height, width), scale=(width, height))
    assert np.array_equal(transform(Image.fromarray(image), mask, sample_rng(0, 0, 0))["labels"], expected_mask)


@pytest.mark.parametrize("name", IMAGES)
def test_normalized_and_padded_pixels_agree_with_the_original(name):
    image, mask = TENSORS[f"out/{name}/resized"], TENSORS[f"out/{name}/label_resized"]
    transform = whole_only(crop_size=tuple(GOLDEN["pad_size"]), scale=mask.shape)
    result = transform(Image.fromarray(image), mask, sample_rng(0, 0, 0))
    np.testing.assert_allclose(result["pixel_values"], TENSORS[f"out/{name}/padded_pixel_values"], atol=1e-5)
    assert np.array_equal(result["labels"], TENSORS[f"out/{name}/padded_label"])


@pytest.mark.parametrize("new_size", [(150, 211), (61, 77), (400, 333)])
@pytest.mark.parametrize("corner", [(0, 0), (29, 45)])
def test_crop_of_the_resized_is_the_resized_crop(new_size, corner):
    image = Image.fromarray(TENSORS["in/landscape/image"])
    whole = resize_region(image, new_size, (0, 0, *new_size))
    (top, left), (bottom, right) = corner, (corner[0] + 32, corner[1] + 32)
    part = resize_region(image, new_size, (top, left, bottom, right))
    assert (part.int() - whole[:, top:bottom, left:right].int()).abs().max() <= 1


@pytest.mark.parametrize("box", BOXES, ids=[str(box["box_y1_y2_x1_x2"]) for box in BOXES])
def test_crop_rule_agrees_with_the_original(box):
    y1, y2, x1, x2 = box["box_y1_y2_x1_x2"]
    crop = TENSORS["in/crop/label"][y1:y2, x1:x2]
    assert crop_is_varied(crop, GOLDEN["random_crop"]["cat_max_ratio"], ignore_index=255) == box["accepted"]


def test_a_crop_without_labels_is_not_varied():
    assert not crop_is_varied(np.full((4, 4), -100, dtype=np.int64), 0.75, -100)


def test_crops_follow_the_rule_more_often_than_chance():
    mask = np.zeros((96, 96), dtype=np.uint8)
    mask[:40, :40] = 1
    image = Image.new("RGB", (96, 96))
    options = {"crop_size": 48, "scale": (96, 96), "ratio_range": (1, 1)}
    varied = [
        sum(
            crop_is_varied(
                TrainTransform(**options, cat_max_ratio=r)(image, mask, sample_rng(0, 0, i))["labels"].numpy()
            )
            for i in range(40)
        )
        for r in (1, 0.75)
    ]
    assert varied[1] > 1.5 * varied[0]


# The whole transform


@pytest.mark.parametrize("ignore_index", [255, -100])
def test_padding_uses_the_ignore_index(ignore_index):
    image, mask = make_sample()
    before = mask.copy()
    result = whole_only(crop_size=(70, 90), ignore_index=ignore_index)(image, mask, sample_rng(0, 0, 0))
    assert (result["labels"][60:] == ignore_index).all() and (result["labels"][:, 80:] == ignore_index).all()
    assert (result["pixel_values"][:, 60:] == 0).all() and (result["pixel_values"][:, :, 80:] == 0).all()
    assert np.array_equal(result["labels"][:60, :80], mask) and np.array_equal(mask, before)


@pytest.mark.parametrize("scale", [(256, 64), None])
@pytest.mark.parametrize("index", range(3))
def test_image_and_mask_stay_aligned(index, scale):
    mask = make_sample(height=120, width=160, seed=index)[1]
    colors = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255]], dtype=np.uint8)
    transform = TrainTransform(crop_size=48, scale=scale, photometric=False, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    result = transform(Image.fromarray(colors[mask]), mask, sample_rng(0, 0, index))
    labels = result["labels"]
    labeled = labels != 255
    expected = torch.from_numpy(colors.astype(np.float32) / 255)[labels.clamp(max=4)].permute(2, 0, 1)
    wrong = (result["pixel_values"] - expected).abs().amax(0) > 0.5
    # Only pixels on the border of two blocks may differ.
    assert wrong[labeled].float().mean() < 0.05


def test_without_a_scale_crops_are_parts_of_the_image_as_it_is():
    """At a ratio of 1 its very pixels; at others as much of it as fills the crop."""
    rows, columns = np.mgrid[:200, :150]
    image = Image.fromarray(np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8))
    mask = (rows * 150 + columns).astype(np.int32)
    options = {"crop_size": (32, 40), "scale": None, "image_mean": (0, 0, 0), "image_std": (1, 1, 1)}
    for ratio in (0.5, 0.7, 1, 1.9):
        transform = whole_only(**options, ratio_range=(ratio, ratio), ignore_index=-1)
        crops = [transform(image, mask, sample_rng(0, 0, index)) for index in range(20)]
        for crop in crops:
            labels, pixels = crop["labels"], (crop["pixel_values"] * 255).round()
            seen = torch.stack([labels // 150, labels % 150])
            assert (labels >= 0).all() and (pixels[:2] - seen).abs().max() <= (ratio != 1)
            assert (
                seen.amax((1, 2)) - seen.amin((1, 2)) - torch.tensor([32, 40]) / ratio
            ).abs().max() <= 1 + 1 / ratio
        assert len({int(crop["labels"][0, 0]) for crop in crops}) > 10
    small = whole_only(crop_size=300, scale=None, ratio_range=(1, 1), ignore_index=-1)(
        image, mask, sample_rng(0, 0, 0)
    )
    assert np.array_equal(small["labels"][:200, :150], mask) and (small["labels"][200:] == -1).all()


def test_flip_turns_image_and_mask():
    image, mask = make_sample()
    plain, flipped = (whole_only(flip_probability=p)(image, mask, sample_rng(0, 0, 0)) for p in (0, 1))
    assert torch.equal(flipped["pixel_values"], plain["pixel_values"].flip(-1))
    assert torch.equal(flipped["labels"], plain["labels"].flip(-1))


def test_sizes_that_differ_are_refused():
    with pytest.raises(ValueError, match="80x60"):
        SMALL(Image.new("RGB", (80, 60)), np.zeros((80, 60), dtype=np.uint8), sample_rng(0, 0, 0))


# Colors


class Scripted:
    """A generator whose draws are given: five coins (below 0.5 = yes), brightness, two gains, a hue shift."""

    def __init__(self, coins, shift=0.0, gains=(1.0, 1.0), hue=0):
        self.coins, self.shift, self.gains, self.hue = np.array(coins), shift, gains, hue

    def random(self, size):
        return self.coins

    def uniform(self, low, high, size=None):
        return self.shift if size is None else np.array(self.gains)

    def integers(self, low, high):
        return self.hue


YES, NO = 0.0, 1.0


def distorted(colors, rng):
    """(n, 3) colors, distorted as pixels of an image of one row each."""
    pixels = torch.tensor(np.asarray(colors), dtype=torch.float32).t()[..., None].contiguous()
    return photometric_distortion(pixels, rng)[..., 0].t().numpy()


@pytest.mark.parametrize(("saturation", "hue"), [(0.5, -18), (1.0, 7), (1.5, 17), (1.5, 0)])
def test_saturation_and_hue_are_those_of_hsv(saturation, hue):
    colors = np.random.default_rng(0).integers(0, 256, (400, 3))
    colors[:100] = colors[:100] // 128 * 127  # black, gray and pure colors
    rng = Scripted([NO, NO, NO, YES, YES], gains=(1.0, saturation), hue=hue)
    hsv = [colorsys.rgb_to_hsv(*color) for color in colors / 255]
    expected = [colorsys.hsv_to_rgb((h + hue / 180) % 1, min(1, s * saturation), v) for h, s, v in hsv]
    np.testing.assert_allclose(distorted(colors, rng), 255 * np.array(expected), atol=1e-3)


@pytest.mark.parametrize("contrast_first", [YES, NO])
def test_brightness_and_contrast_by_hand(contrast_first):
    rng = Scripted([YES, contrast_first, YES, NO, NO], shift=30.0, gains=(1.5, 1.0))
    # (0, 100, 250) + 30 = (30, 130, 255 clipped), × 1.5 = (45, 195, 255 clipped)
    assert distorted([[0, 100, 250]], rng).tolist() == [[45, 195, 255]]


def test_contrast_may_come_before_or_after_hue_and_saturation():
    draws = {"gains": (1.5, 0.5)}
    before, after = (
        distorted([[100, 120, 240]], Scripted([NO, first, YES, YES, NO], **draws))[0] for first in (YES, NO)
    )
    # Before: blue is clipped to 255, then halved saturation; after: halved saturation, then clipped.
    assert before.tolist() == pytest.approx([202, 217, 255], abs=1)
    assert after.tolist() == [255, 255, 255]
