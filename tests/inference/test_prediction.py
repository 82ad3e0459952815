"""Segmenting many pictures: what is refused as a whole, and what is left out while the others go on."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from denseclip_hf.inference import find_sources, predict_sources, segment_in_windows, sliding_window_logits
from helpers.images import photo
from helpers.models import segmenter, tiny_model, varied


NOT_FINITE = "the model's scores are NaN or infinite and tell no class: .* use bfloat16 or float32"


@pytest.mark.parametrize("opacity", [3, -0.1, float("nan")])
def test_an_opacity_is_a_share(tmp_path, opacity):
    with pytest.raises(ValueError, match="`opacity` must be from 0 to 1, got"):
        predict_sources(segmenter(), [], tmp_path / "out", opacity=opacity, progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_picture_without_finite_scores_is_left_out(tmp_path, bad):
    """Of one batch only this one; its numbers are as if float16 had overflowed."""
    for name in "abc":
        photo().save(tmp_path / f"{name}.png")
    asked, calls = segmenter(), []
    asked.preprocess = lambda image: torch.full((3, 64, 96), bad if image.filename.endswith("b.png") else 0.0)
    asked.model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    summary = predict_sources(asked, find_sources([tmp_path])[0], tmp_path / "out", batch_size=3, progress=False)
    assert summary.done == 2 and calls == [3, 1, 1, 1]
    (problem,) = summary.problems
    assert re.match(f"b: {NOT_FINITE}", problem)
    assert sorted(file.name[0] for file in (tmp_path / "out").iterdir()) == ["a", "a", "c", "c"]


@pytest.mark.parametrize("part", ["embeds", "score_embeds"])
def test_embeddings_that_are_not_finite_are_refused(part):
    asked = segmenter(score_maps=["class 0"])
    asked.embeds, asked.words = asked.model.encode_classes().clone(), True
    asked.score_embeds = asked.embeds.clone()
    setattr(asked, part, getattr(asked, part).fill_(float("nan")))
    with pytest.raises(ValueError, match=f"^{NOT_FINITE}"):
        asked([photo()])


# At their own resolution


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_windows_at_native_resolution_are_those_of_the_whole_image(kind):
    """In bands and strips, with memory for three windows, as averaged over the whole image at once."""
    image = photo((304, 176))
    model = varied(tiny_model(kind, crop_size=64, stride=48))
    asked = segmenter(model, native_resolution=True, certainty=True)
    pixels = asked.image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
    logits = sliding_window_logits(model, pixels, 64, 48)[0]
    for ids, certainty in (
        segment_in_windows(model, image, asked.image_processor, max_scores=3 * 64 * 100),
        asked([image])[0][:2],
    ):
        assert ids.shape == (176, 304) and (ids == logits.argmax(0)).float().mean() > 0.999
        torch.testing.assert_close(certainty.float(), logits.softmax(0).amax(0), atol=1e-3, rtol=0)


def test_large_images_are_segmented_in_windows_of_what_they_are(tmp_path):
    photo((304, 176)).save(tmp_path / "map.png")
    asked = segmenter(varied(tiny_model()), native_resolution=True)
    sizes = []
    window_logits = asked.model.window_logits
    asked.model.window_logits = lambda pixels: sizes.append(tuple(pixels.shape[-2:])) or window_logits(pixels)
    summary = predict_sources(asked, find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    assert summary.done == 1 and set(sizes) == {(64, 64)}
    assert Image.open(tmp_path / "out" / "map_mask.png").size == (304, 176)


# What is not certain


def test_pixels_below_the_threshold_have_no_class(tmp_path):
    photo().save(tmp_path / "a.png")
    asked = segmenter(varied(tiny_model()), threshold=0.4, certainty=True)
    image = Image.open(tmp_path / "a.png").convert("RGB")
    with torch.no_grad():
        logits = asked.model(asked.preprocess(image)[None]).logits
    probabilities = torch.nn.functional.interpolate(logits, (64, 96), mode="bilinear").softmax(1)[0]
    (result,) = asked([image])
    torch.testing.assert_close(result.certainty, probabilities.amax(0), atol=1e-5, rtol=0)
    expected = torch.where(probabilities.amax(0) < 0.4, 255, probabilities.argmax(0))
    assert (result.ids == expected).float().mean() > 0.999 and 0 < (expected == 255).float().mean() < 1
    predict_sources(asked, find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    mask = Image.open(tmp_path / "out" / "a_mask.png")
    assert (np.asarray(mask) == result.ids.numpy()).all()
    assert mask.convert("RGB").getpixel(tuple(map(int, np.argwhere(np.asarray(mask) == 255)[0][::-1]))) == (0, 0, 0)
    shown = np.asarray(Image.open(tmp_path / "out" / "a_certainty.png")) / 255
    assert np.abs(shown - result.certainty.numpy()).max() < 0.01


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_is_a_probability(threshold):
    with pytest.raises(ValueError, match="threshold"):
        segmenter(threshold=threshold)
