"""The golden cases: inputs, weights and outputs of the original program."""

import json
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file

from denseclip_hf import DenseCLIPConfig, DenseCLIPForSemanticSegmentation
from denseclip_hf.conversion import config_from_original, convert_original_state_dict


FIXTURES = Path(__file__).parents[1] / "fixtures"


@cache
def fixture(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Description and tensors of the two files of that name."""
    return json.loads((FIXTURES / f"{name}.json").read_text()), load_file(FIXTURES / f"{name}.safetensors")


@cache
def golden_case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Description and tensors of a golden case, such as `seg_vit`."""
    case = json.loads((FIXTURES / f"{name}.json").read_text())
    tensors: dict[str, torch.Tensor] = {}
    for file in case["files"]:
        tensors |= load_file(FIXTURES / file)
    return case, tensors


def golden_config(name: str) -> DenseCLIPConfig:
    case, tensors = golden_case(name)
    eos = case["model_cfg"]["text_encoder"]["vocab_size"] - 1
    token_ids = [row[: row.index(eos) + 1] for row in tensors["in/texts"].tolist()]
    return config_from_original(case["model_cfg"], dict(enumerate("abcde")), token_ids)


def golden_model(name: str) -> DenseCLIPForSemanticSegmentation:
    """Our model with the golden case's weights, in eval mode, taking images whole."""
    config = golden_config(name)
    _, tensors = golden_case(name)
    original = {k.removeprefix("state_dict/"): v for k, v in tensors.items() if k.startswith("state_dict/")}
    model = DenseCLIPForSemanticSegmentation(config)
    model.load_state_dict(convert_original_state_dict(original, config), strict=True)
    model.config.inference_mode = "whole"
    return model.eval()
