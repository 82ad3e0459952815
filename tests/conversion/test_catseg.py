"""CAT-Seg's released checkpoints in our model: every key once, nothing missing, nothing left over."""

import json

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from denseclip_hf.conversion.catseg import CATSEG_KEY_TABLE
from denseclip_hf.conversion.keys import check_keys, rename
from denseclip_hf.model.cost_aggregation_denseclip import CostAggregationHead
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
    weights = checkpoint(size)
    assert len(weights) == RELEASED[size]["key_count"]
    converted = rename(weights, CATSEG_KEY_TABLE)
    clip = RELEASED[size]["clip"]
    width, text = clip["visual.proj"][0], clip["positional_embedding"][1]
    vision = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 64}
    vision |= {"num_hidden_layers": 12 if width == 768 else 24, "patch_size": clip["visual.conv1.weight"][-1]}
    side = int((clip["visual.positional_embedding"][0] - 1) ** 0.5)
    vision["image_size"] = side * vision["patch_size"]
    words = {"hidden_size": text, "intermediate_size": 4 * text, "num_attention_heads": text // 64}
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(vision_config=vision, text_config=words, projection_dim=text))
        head = CostAggregationHead(text, width)
    expected = {f"clip.{key}": value for key, value in model.state_dict().items() if key != "logit_scale"}
    expected |= {f"decode_head.{key}": value for key, value in head.state_dict().items()}
    check_keys(converted, expected)
    parameters = sum(value.numel() for value in converted.values()) + 1  # logit_scale
    assert parameters == RELEASED[size]["parameters"]["all"]
