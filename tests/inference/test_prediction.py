"""Segmenting many pictures: what is refused as a whole, and what is left out while the others go on."""

import re

import pytest
import torch

from denseclip_hf.inference.segmenter import predict_sources
from denseclip_hf.inference.sources import find_sources
from helpers.images import photo
from helpers.models import segmenter


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
        asked(torch.zeros(1, 3, 64, 64), [(64, 64)])
