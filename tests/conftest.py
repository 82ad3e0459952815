"""Fixtures and the settings of all tests."""

import os
import shutil
import subprocess
from pathlib import Path


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported; names are not looked for


import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

from denseclip_hf import DenseCLIPForSemanticSegmentation
from denseclip_hf.app.answers import AppModels
from denseclip_hf.example import example_clip_model, example_tokenizer
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from helpers.images import PHOTO_SIZES, photo
from helpers.models import CLASSES, varied


# The suite tries few inputs, the same each time; `make fuzz` tries many new ones.
QUIET = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}
settings.register_profile("few", derandomize=True, max_examples=10, database=None, **QUIET)
MANY = {"max_examples": int(os.environ.get("EXAMPLES", "1000")), "phases": [Phase.explicit, Phase.generate]}
settings.register_profile("many", print_blob=True, **MANY, **QUIET)
settings.load_profile("few")


@pytest.fixture(scope="session")
def word_model_dir(tmp_path_factory) -> Path:
    """A model that knows words and shows more than one class: around the example's CLIP with random weights."""
    folder = tmp_path_factory.mktemp("models") / "random"
    tokenizer = example_tokenizer()
    torch.manual_seed(0)
    sizes = {"context_decoder_hidden_size": 8, "context_decoder_num_attention_heads": 2, "neck_hidden_size": 8}
    model = DenseCLIPForSemanticSegmentation.from_clip(
        example_clip_model(tokenizer, "vit"), CLASSES, tokenizer, image_size=64, **sizes
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


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of five photos."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, (name, size) in enumerate(PHOTO_SIZES.items()):
        photo(size, seed).save(folder / f"{name}.png")
    return folder


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
    """Two normalized square images at the tiny models' training resolution."""
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
