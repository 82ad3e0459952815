"""What an evaluation takes from where, and what it refuses before or says after the work."""

import pytest
import torch
from accelerate.state import AcceleratorState

from denseclip_hf import DenseCLIPForSemanticSegmentation
from denseclip_hf.evaluation.measurement import measure
from denseclip_hf.evaluation.report import seen_and_unseen
from helpers.evaluation import street_arguments


@pytest.fixture
def arguments(tmp_path):
    return street_arguments(tmp_path)


def test_the_launchers_precision_does_not_count(arguments, monkeypatch):
    """`accelerate launch` gives what its own config says in the environment; `dtype` is what is asked for."""
    seen = []
    forward = DenseCLIPForSemanticSegmentation.forward
    monkeypatch.setattr(
        DenseCLIPForSemanticSegmentation,
        "forward",
        lambda *args, **kwargs: seen.append(torch.is_autocast_enabled("cpu")) or forward(*args, **kwargs),
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    assert measure(arguments(device="cpu"))["protocol"]["dtype"] == "float32" and seen and not any(seen)


@pytest.mark.parametrize(
    "options", [{}, {"inference_mode": "slide"}, {"scales": [1.0, 1.5]}], ids=["whole", "slide", "multi-scale"]
)
def test_scores_that_are_not_finite_end_it(arguments, tmp_path, options):
    model = DenseCLIPForSemanticSegmentation.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        model.decode_head.classifier.bias[1] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"\.jpg.*NaN"):
        measure(arguments(**options))
    assert not (tmp_path / "output_dir" / "evaluation.json").exists()


def test_data_without_a_validation_split_are_refused(arguments):
    with pytest.raises(ValueError, match="--split"):
        measure(arguments(validation_fraction=0.0))


def test_the_harmonic_mean_of_seen_and_unseen():
    scores = seen_and_unseen([0.5, 0.7, 0.2, float("nan")], ["a", "b", "c", "d"], ["c", "d"])
    assert scores["mean_iou_seen"] == pytest.approx(0.6) and scores["mean_iou_unseen"] == pytest.approx(0.2)
    assert scores["harmonic_mean_iou"] == pytest.approx(0.3)
