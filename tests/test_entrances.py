"""One rule for pixels: a model sees the same image, however it reaches it."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from denseclip_hf.data import load_segmentation_dataset, read_image
from denseclip_hf.example import make_example_clip
from denseclip_hf.inference import Source, read_image_of
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil, decode_image
from helpers.models import tiny_model


RAMP = np.linspace(0, 1, 64 * 96).reshape(64, 96)
# What is stored, and the gray levels that are meant.
KINDS = {
    "8 bits": ((RAMP * 255).round().astype(np.uint8), ".png", 255),
    "16 bits": ((RAMP * 65535).round().astype(np.uint16), ".png", 255),
    "32 bits, dark": ((RAMP * 199).round().astype(np.int32), ".tif", 199 / 257),
    "float to 1": (RAMP.astype(np.float32), ".tif", 255),
    "float to 255": ((RAMP * 255).astype(np.float32), ".tif", 255),
}


@pytest.fixture(params=KINDS)
def stored(request, tmp_path):
    values, suffix, highest = KINDS[request.param]
    path = tmp_path / f"image{suffix}"
    Image.fromarray(values).save(path)
    return path, np.round(RAMP * highest)


def test_training_prediction_and_processor_see_the_same_levels(stored, tmp_path):
    path, levels = stored
    folder = tmp_path / "data" / "train"
    (folder / "images").mkdir(parents=True), (folder / "masks").mkdir()
    path = path.rename(folder / "images" / path.name)
    Image.fromarray((np.arange(64 * 96).reshape(64, 96) % 2).astype(np.uint8)).save(folder / "masks" / "image.png")
    data = load_segmentation_dataset(tmp_path / "data", classes=["a", "b"], validation_fraction=0)
    seen = {
        "training": np.asarray(data.train[0]["image"]),
        "prediction": np.asarray(read_image_of(Source(str(path), path.name))),
        "processor, evaluation, page": decode_image(Image.open(path)).permute(1, 2, 0).numpy(),
    }
    for entrance, image in seen.items():
        assert image.shape == (64, 96, 3) and np.abs(image - levels[..., None]).max() <= 0.51, entrance


@pytest.mark.parametrize("as_file", [True, False])
def test_the_pipelines_see_what_training_saw(stored, tmp_path, as_file):
    path, _ = stored
    processor = DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})
    expected = processor(read_image(path), return_tensors="pt")["pixel_values"]
    image = str(path) if as_file else Image.open(path)
    fixed = pipeline("image-segmentation", model=tiny_model(), image_processor=processor)
    assert torch.equal(torch.stack(list(fixed.preprocess(image)["pixel_values"])), expected)
    make_example_clip(tmp_path / "clip", "vit")
    words = pipeline("zero-shot-image-segmentation", model=str(tmp_path / "clip"))
    seen, levels = (words.preprocess(x, ["sky"])["pixel_values"][0] for x in (image, read_image(path)))
    assert torch.equal(seen, levels)
