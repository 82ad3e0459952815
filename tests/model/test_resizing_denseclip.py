"""Resizing of pictures, labels and logits: as OpenCV does it, and in strips as at once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from denseclip_hf.model import resizing_denseclip
from denseclip_hf.model.resizing_denseclip import check_finite, fit_within, resize_image, resize_labels
from helpers.limits import memory_bounded


@pytest.mark.parametrize(
    ("size", "bounds", "expected"),
    [
        ((480, 640), (512, 2048), (512, 683)),
        ((100, 1000), (512, 2048), (205, 2048)),
        ((5, 5), (3, None), (3, 3)),
        ((1, 5000), (512, 2048), (1, 2048)),
    ],
)
def test_size_keeps_the_aspect_ratio_within_both_bounds(size, bounds, expected):
    assert fit_within(*size, *bounds) == expected


def test_bilinear_without_antialiasing_by_default():
    # halving reads the two pixels around each new center: (10 + 20) / 2 and (30 + 45) / 2, rounded half up
    image = torch.tensor([[[10, 20, 30, 45]]], dtype=torch.uint8)
    assert resize_image(image, (1, 2)).tolist() == [[[15, 38]]]
    # a quarter reads only the two pixels in the middle; antialiasing weighs all of them
    image = torch.tensor([[[0, 100, 100, 0]]], dtype=torch.uint8)
    assert resize_image(image, (1, 1)).item() == 100
    assert resize_image(image, (1, 1), antialias=True).item() < 80


@pytest.mark.parametrize(
    ("old", "new"), [((120, 160), (128, 171)), ((300, 400), (41, 300)), ((1, 50), (2, 20)), ((9, 1), (30, 3))]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_whole_number_arithmetic_is_opencvs_in_any_strips(monkeypatch, old, new, layout):
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, *old), dtype=np.uint8))
    image = image.contiguous(memory_format=layout)[0]
    expected = F.interpolate(image[None].float(), size=new, mode="bilinear", align_corners=False)[0]
    by_opencv = resize_image(image, new)
    assert resizing_denseclip._opencv() is not None
    monkeypatch.setattr(resizing_denseclip, "_opencv", lambda: None)
    resized = resize_image(image, new)
    assert resized.dtype == torch.uint8 and (resized - expected).abs().max() < 1 and torch.equal(resized, by_opencv)
    monkeypatch.setattr(resizing_denseclip, "_IMAGE_STRIP_ELEMENTS", 1)
    assert torch.equal(resize_image(image, new), resized)


def test_resizing_a_large_image_takes_the_memory_of_its_result(monkeypatch):
    monkeypatch.setattr(resizing_denseclip, "_opencv", lambda: None)
    image = torch.ones(8000, 8000, 3, dtype=torch.uint8).permute(2, 0, 1)
    with memory_bounded(64 * 2**20):  # as floats it would have been 732 MiB
        resize_image(image, (512, 512))


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [(5, 3, [0, 1, 3]), (2, 5, [0, 0, 0, 1, 1]), (4, 4, [0, 1, 2, 3])],
)
def test_labels_take_the_pixel_above_and_left(old, new, expected):
    labels = torch.arange(old)
    assert resize_labels(labels[None], (1, new))[0].tolist() == expected
    assert resize_labels(labels[:, None], (new, 1))[:, 0].tolist() == expected


# Logits


@pytest.mark.parametrize(("chunk", "size"), [(1, (31, 17)), (500, (4, 4)), (2**22, (6, 9))])
def test_a_few_classes_at_a_time_give_what_all_at_once_give(monkeypatch, chunk, size):
    monkeypatch.setattr(resizing_denseclip, "_STRIP_ELEMENTS", chunk)
    logits = torch.randn(2, 7, 6, 9, generator=torch.Generator().manual_seed(0))
    logits[:, 4] = logits[:, 1]  # of equal classes the first one counts
    resized = F.interpolate(logits, size, mode="bilinear", align_corners=False)
    scores, classes = resized.max(dim=1)
    found = resizing_denseclip.resize_max(logits, size)
    assert torch.equal(found[0], scores) and torch.equal(found[1], classes)
    torch.testing.assert_close(found[2], resized.softmax(1).amax(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("old", "new"), [((8, 9), (61, 40)), ((8, 9), (3, 4)), ((1, 9), (7, 9)), ((1, 1), (4, 4))])
def test_classes_that_win_nowhere_change_nothing(monkeypatch, old, new, dtype):
    monkeypatch.setattr(resizing_denseclip, "_STRIP_ELEMENTS", 500)
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 50, *old, generator=generator) + 3 * torch.randn(50, 1, 1, generator=generator)).to(dtype)
    expected = F.interpolate(logits.float(), new, mode="bilinear", align_corners=False).argmax(1)
    assert torch.equal(resizing_denseclip.resize_argmax(logits, new), expected)
    assert len(resizing_denseclip._possible_winners(logits)) < 30


@pytest.mark.parametrize("bad", [float("nan"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scores_must_be_finite(bad, dtype):
    scores = torch.tensor([[60000.0, 60000.0], [-60000.0, 0.0]]).to(dtype)
    check_finite(scores)
    scores[1, 1] = bad
    with pytest.raises(ValueError, match="x.png.*NaN"):
        check_finite(scores, "x.png")
