"""CAT-Seg's released checkpoints in our model: every key once, nothing missing, nothing left over."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, pipeline

from denseclip_hf.cli.convert import main
from denseclip_hf.conversion import config_from_catseg, convert_catseg_state_dict
from helpers.catseg import catseg_case, parameters
from helpers.checkpoints import tokenizer
from helpers.golden import FIXTURES


RELEASED = json.loads((FIXTURES / "catseg_keys.json").read_text())["models"]


def checkpoint(size: str) -> dict[str, torch.Tensor]:
    """All weights of a released checkpoint, without their values."""
    parts = RELEASED[size]
    return {
        prefix + key: torch.empty(shape, device="meta")
        for part, prefix in parts["prefix"].items()
        for key, shape in parts[part].items()
    }


@pytest.mark.parametrize("size", RELEASED)
def test_every_key_of_a_released_checkpoint_has_one_place(size):
    weights, released = checkpoint(size), RELEASED[size]
    assert len(weights) == released["key_count"]
    config = config_from_catseg(weights, {0: "sky"})
    converted = convert_catseg_state_dict(weights, config)  # strict: none missing, none left over, all shapes
    scale = 1  # CLIP's logit_scale, which nothing uses
    assert sum(value.numel() for value in converted.values()) + scale == released["parameters"]["all"]
    assert config.out_indices == released["vision_blocks_read_for_guidance"]
    assert config.tower_image_size == {"base": 384, "large": 336}[size]
    assert config.aggregator == {}


def test_a_checkpoint_of_something_else_is_refused():
    with pytest.raises(ValueError, match="CAT-Seg"):
        config_from_catseg({"weight": torch.zeros(2)}, {0: "sky"})


@pytest.mark.parametrize("change", ["missing", "surplus", "size"])
def test_keys_that_do_not_fit_are_named(change):
    weights = checkpoint("base")
    config = config_from_catseg(weights, {0: "sky"})
    key = "upsample1.bias"
    if change == "missing":
        del weights[key]
    else:
        weights[key if change == "size" else "upsample3.bias"] = torch.empty(7, device="meta")
    with pytest.raises(ValueError, match="skip_upsamplers.0.bias|upsample3"):
        convert_catseg_state_dict(weights, config)


def test_a_checkpoint_becomes_a_complete_directory_that_the_pipeline_takes(tmp_path):
    weights = parameters(catseg_case("model")[1])
    for name, rows in (("token_embedding.weight", len(tokenizer())), ("positional_embedding", 32)):
        key = f"sem_seg_head.predictor.clip_model.{name}"
        weights[key] = torch.randn(rows, weights[key].shape[1])
    torch.save({"model": weights, "iteration": 79999}, tmp_path / "model_base.pth")
    (tmp_path / "classes.json").write_text(json.dumps({"id2label": {"0": "sky", "1": "car, automobile", "2": "sea"}}))
    tokenizer().save_pretrained(tmp_path / "tokenizer")
    given = ["--tokenizer", str(tmp_path / "tokenizer"), "--classes", str(tmp_path / "classes.json")]
    main(["catseg", str(tmp_path / "model_base.pth"), str(tmp_path / "model"), *given])
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model")
    expected = convert_catseg_state_dict(weights, model.config)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    # Of synonyms the first one counts.
    assert model.config.class_token_ids[1] == tokenizer()("A photo of a car in the scene")["input_ids"]
    segment = pipeline("image-segmentation", model=str(tmp_path / "model"))
    found = segment(Image.new("RGB", (90, 60)))
    assert {one["label"] for one in found} <= set(model.config.label2id) and found[0]["mask"].size == (90, 60)
