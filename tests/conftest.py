"""Shared by all tests: the golden cases and tiny models that build in well under a second."""

import json
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported; names are not looked for


import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from PIL import Image
from safetensors.torch import load_file

from denseclip_hf import DenseCLIPConfig, DenseCLIPForSemanticSegmentation
from denseclip_hf.app.answers import AppModels
from denseclip_hf.conversion import config_from_original, convert_original_state_dict
from denseclip_hf.example.tiny_clip import example_clip_model, example_corpus, make_example_tokenizer
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil


FIXTURES = Path(__file__).parent / "fixtures"
SOS, EOS = 98, 99

# The suite tries few inputs, the same each time; `make fuzz` tries many new ones.
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("few", derandomize=True, max_examples=10, database=None, **QUIET)
MANY = {"max_examples": int(os.environ.get("EXAMPLES", "1000")), "phases": [Phase.explicit, Phase.generate]}
settings.register_profile("many", print_blob=True, **MANY, **QUIET)
settings.load_profile("few")


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


def tiny_config(kind: str = "vit", num_labels: int = 3, **options) -> DenseCLIPConfig:
    """A config of either image tower whose model has some ten thousand parameters."""
    text = {
        "vocab_size": 100, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "projection_dim": 12,
        "bos_token_id": SOS, "eos_token_id": EOS,
    }  # fmt: skip
    if kind == "vit":
        vision = {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2,
            "image_size": 64, "patch_size": 16, "projection_dim": 12,
        }  # fmt: skip
        clip = {"model_type": "clip", "text_config": text, "vision_config": vision, "projection_dim": 12}
    else:
        vision = {
            "embedding_size": 4, "depths": [1, 1, 1, 1], "num_attention_heads": 4, "image_size": 64,
            "projection_dim": 12,
        }  # fmt: skip
        clip = {"model_type": "clip_resnet", "text_config": text, "vision_config": vision}
    sizes = {
        "num_context_tokens": 4, "context_decoder_hidden_size": 8, "context_decoder_num_attention_heads": 2,
        "context_decoder_num_layers": 1, "neck_hidden_size": 8, "decode_head_hidden_size": 8, "crop_size": 64,
    }  # fmt: skip
    token_ids = [[SOS, *range(2 + i, 3 + i + i % 3), EOS] for i in range(num_labels)]
    names = {"id2label": {i: f"class {i}" for i in range(num_labels)}, "class_token_ids": token_ids}
    return DenseCLIPConfig(**{"clip_config": clip, **sizes, **names, **options})


def tiny_model(kind: str = "vit", seed: int = 0, **options) -> DenseCLIPForSemanticSegmentation:
    """A tiny model in eval mode with seeded weights."""
    torch.manual_seed(seed)
    return DenseCLIPForSemanticSegmentation(tiny_config(kind, **options)).eval()


def varied(model, pixel_values: torch.Tensor | None = None):
    """`model`, now with predictions of every class on pictures like these, which random weights seldom give."""
    if pixel_values is None:
        pixel_values = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.decode_head.classifier.bias -= model.window_logits(pixel_values).mean((0, 2, 3))
    return model


def photo(size=(96, 64), seed: int = 0) -> Image.Image:
    """A smooth picture of random colours, of (width, height) pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 16, size[0] // 16, 3)).astype(np.uint8)
    return Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="session")
def word_model_dir(tmp_path_factory) -> Path:
    """A model that knows words and shows more than one class: around the example's CLIP with random weights."""
    folder = tmp_path_factory.mktemp("models") / "random"
    tokenizer = make_example_tokenizer(example_corpus(num_scenes=5), vocab_size=700)
    torch.manual_seed(0)
    sizes = {"context_decoder_hidden_size": 8, "context_decoder_num_attention_heads": 2, "neck_hidden_size": 8}
    model = DenseCLIPForSemanticSegmentation.from_clip(
        example_clip_model(tokenizer, "vit"), ["sky", "road", "tree"], tokenizer, image_size=64, **sizes
    ).eval()
    processor = DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    varied(model, processor(photo(), return_tensors="pt")["pixel_values"])
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def app_models(word_model_dir) -> AppModels:
    """What a page offers that shows this model alone, called "random"."""
    return AppModels([str(word_model_dir)], device="cpu")


@pytest.fixture
def photo_file(tmp_path) -> Path:
    photo().save(tmp_path / "holiday.png")
    return tmp_path / "holiday.png"


class Tokenizer:
    """Words as single ids, for tests that need no real vocabulary."""

    def __call__(self, text):
        return {"input_ids": [SOS, *(sum(map(ord, word)) % 90 for word in text.split()), EOS]}


def forward(model, images, labels=None):
    with torch.no_grad():
        return model(images, labels)


@pytest.fixture(params=["vit", "resnet"])
def kind(request) -> str:
    """Each of the two image towers."""
    return request.param


@pytest.fixture
def compiler():
    """An empty cache of compiled code, so that a test does not meet the limit on what others compiled before it."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def images() -> torch.Tensor:
    """Two normalised square images at the tiny models' training resolution."""
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels() -> torch.Tensor:
    """Labels of `images` for three classes, some ignored."""
    labels = torch.randint(0, 3, (2, 64, 64), generator=torch.Generator().manual_seed(2))
    labels[:, :8] = 255
    return labels


@pytest.fixture
def small_disk(tmp_path_factory):
    """Makes a file system of its own, of a size such as "64k", where the system lets us mount one."""
    mounted = []

    def make(size):
        folder = tmp_path_factory.mktemp("disk")
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("mounting is not allowed here")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", folder], check=True)
