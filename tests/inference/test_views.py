import math

import numpy as np
import pytest
import torch
from PIL import Image

from denseclip_hf import DenseCLIPImageProcessor
from denseclip_hf.inference import (
    colorize,
    comparison_image,
    multi_scale_probabilities,
    multi_scale_segmentation,
    overlay,
    sliding_window_logits,
)
from denseclip_hf.inference.views import scaled_views
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil, decode_image
from helpers.golden import golden_case, golden_model
from helpers.images import photo
from helpers.models import tiny_model, varied


CASES = ["seg_vit", "seg_resnet"]
PALETTE = [[255, 0, 0], [0, 255, 0], [0, 0, 255]]


@pytest.fixture(scope="module", params=CASES)
def golden(request):
    case, tensors = golden_case(request.param)
    model = golden_model(request.param)
    model.config.inference_mode = "slide"
    return model, tensors, [view["flip"] for view in case["tta"]["views"]]


@pytest.fixture
def processor():
    return DenseCLIPImageProcessor(size={"shortest_edge": 96, "longest_edge": 128})


def test_sliding_window_equals_the_original(golden):
    model, tensors, _ = golden
    logits = sliding_window_logits(model, tensors["in/img_b"], 64, 43)
    torch.testing.assert_close(logits, tensors["out/slide"], atol=1e-4, rtol=0)


def test_multi_scale_equals_the_original_on_its_own_views(golden, processor, monkeypatch):
    model, tensors, flips = golden
    views = [(tensors[f"in/tta/view{i}"], flip) for i, flip in enumerate(flips)]
    monkeypatch.setattr("denseclip_hf.inference.views.scaled_views", lambda *args: iter(views))
    image = tensors["in/tta/image"].numpy()
    (probabilities,) = multi_scale_probabilities(model, image, image_processor=processor)
    torch.testing.assert_close(probabilities[None], tensors["out/tta/probs"], atol=1e-5, rtol=0)
    assert torch.equal(probabilities.argmax(0)[None], tensors["out/tta/pred"])
    monkeypatch.setattr("denseclip_hf.inference.views.scaled_views", lambda *args: iter(views[1:2]))
    (mirrored,) = multi_scale_probabilities(model, image, image_processor=processor)
    torch.testing.assert_close(mirrored[None], tensors["out/tta/probs_view1"], atol=1e-5, rtol=0)


def test_whole_view_equals_the_original(golden, processor, monkeypatch):
    model, tensors, _ = golden
    monkeypatch.setattr(
        "denseclip_hf.inference.views.scaled_views", lambda *args: iter([(tensors["in/tta/view2"], False)])
    )
    model.config.inference_mode = "whole"
    (probabilities,) = multi_scale_probabilities(model, tensors["in/tta/image"].numpy(), image_processor=processor)
    model.config.inference_mode = "slide"
    torch.testing.assert_close(probabilities[None], tensors["out/tta/whole_probs_view2"], atol=1e-5, rtol=0)


def test_views_have_the_originals_sizes_and_order(golden, processor):
    _, tensors, flips = golden
    views = list(scaled_views(tensors["in/tta/image"].numpy(), processor, (0.75, 1.0, 1.25), True))
    assert [flipped for _, flipped in views] == flips
    for index, (pixel_values, _) in enumerate(views):
        torch.testing.assert_close(pixel_values, tensors[f"in/tta/view{index}"], atol=1e-6, rtol=0)


def test_multi_scale_equals_the_original_from_the_image_on(golden, processor):
    model, tensors, _ = golden
    image = Image.fromarray(tensors["in/tta/image"].numpy())
    (probabilities,) = multi_scale_probabilities(model, image, (0.75, 1.0, 1.25), image_processor=processor)
    torch.testing.assert_close(probabilities[None], tensors["out/tta/probs"], atol=1e-4, rtol=0)
    assert torch.equal(probabilities.argmax(0)[None], tensors["out/tta/pred"])


def test_probabilities_sum_to_one_at_every_images_size(processor):
    images = [Image.new("RGB", (50, 40), "red"), Image.new("RGB", (31, 47), "blue")]
    first, second = multi_scale_probabilities(tiny_model(), images, (1.0,), image_processor=processor)
    assert (first.shape, second.shape) == ((3, 40, 50), (3, 47, 31))
    torch.testing.assert_close(first.sum(0), torch.ones(40, 50))


@pytest.mark.parametrize(
    "form",
    [
        lambda array: array,
        lambda array: torch.from_numpy(array).permute(2, 0, 1),
        lambda array: torch.from_numpy(array)[None],
        lambda array: [torch.from_numpy(array).permute(2, 0, 1)[None]],
    ],
)
def test_every_form_of_an_image_has_its_probabilities(processor, form):
    model = tiny_model().train()
    image = Image.effect_noise((50, 40), 60).convert("RGB")
    (expected,) = multi_scale_probabilities(model, image, (1.0,), image_processor=processor)
    (probabilities,) = multi_scale_probabilities(model, form(np.array(image)), (1.0,), image_processor=processor)
    assert torch.equal(probabilities, expected) and model.training


@pytest.mark.parametrize("size", [(100, 90), (2400, 64)])
def test_default_preprocessing_is_the_published_one(size):
    model = tiny_model(crop_size=64)
    image = Image.effect_noise(size, 60).convert("RGB")
    processor = DenseCLIPImageProcessor(size={"shortest_edge": 64, "longest_edge": 2048})
    default = multi_scale_probabilities(model, image, (1.0,), False)[0]
    assert torch.equal(default, multi_scale_probabilities(model, image, (1.0,), False, image_processor=processor)[0])


def test_scales_are_of_the_images_own_size_where_it_is_not_resized():
    image = photo((96, 64))
    processor = DenseCLIPImageProcessorPil(do_resize=False)
    sizes = [
        tuple(pixels.shape[-2:]) for pixels, _ in scaled_views(decode_image(image), processor, (0.5, 1, 2), False)
    ]
    assert sizes == [(32, 48), (64, 96), (128, 192)]


def test_colors_are_the_palettes_and_void_is_black():
    colored = np.asarray(colorize(np.array([[0, 2], [255, 1]]), PALETTE))
    assert colored.tolist() == [[[255, 0, 0], [0, 0, 255]], [[0, 0, 0], [0, 255, 0]]]


def test_overlay_blends():
    blended = overlay(Image.new("RGB", (2, 1), "white"), np.array([[0, 1]]), PALETTE, opacity=0.5)
    assert blended.getpixel((0, 0)) == (255, 127, 127)


def test_comparison_has_every_image_and_a_legend():
    red, blue = Image.new("RGB", (40, 30), (255, 0, 0)), Image.new("RGB", (40, 30), (0, 0, 255))
    sheet = comparison_image([[red, blue]], ["left", "right"], {0: "sky", 1: "sea", 2: "sand"}, PALETTE, width=160)
    colors = {color: count for count, color in sheet.getcolors(100_000)}
    assert colors[(255, 0, 0)] >= 160 * 120 and colors[(0, 0, 255)] >= 160 * 120 and (0, 255, 0) in colors


def test_multi_scale_stays_within_its_limit(monkeypatch):
    model, processor = varied(tiny_model()), DenseCLIPImageProcessorPil(size={"shortest_edge": 64})
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (120, 150, 3)).astype(np.uint8))
    options = {"scales": (1.0,), "flip": True, "image_processor": processor}
    (probabilities,) = multi_scale_probabilities(model, image, **options)
    assert torch.equal(multi_scale_segmentation(model, image, **options), probabilities.argmax(0))
    zeros, sizes = torch.zeros, []
    monkeypatch.setattr(torch, "zeros", lambda *size, **kw: sizes.append(size) or zeros(*size, **kw))
    small = multi_scale_segmentation(model, image, **options, max_probabilities=20_000)
    assert small.shape == (120, 150) and max(math.prod(size) for size in sizes if len(size) == 3) <= 20_000
    assert (small == probabilities.argmax(0)).float().mean() > 0.8
