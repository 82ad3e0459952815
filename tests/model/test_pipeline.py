"""`pipeline("image-segmentation")` as users call it, also without this package; and what it needs of the model."""

import inspect
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from denseclip_hf import DenseCLIPConfig, DenseCLIPForSemanticSegmentation
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from helpers.models import tiny_model, varied


SIZES = [(90, 70), (64, 100), (90, 70), (50, 50)]  # (width, height)


def answers(segment, files, mixed_batches):
    """Class ids of every image, by kind of call."""

    def ids(found, size):
        result = np.full(size[::-1], -1)
        for segment in found:
            assert segment["mask"].size == size and segment["score"] is None
            result[np.asarray(segment["mask"]) > 0] = int(segment["label"].removeprefix("class "))
        return result.tolist()

    images = [Image.open(file) for file in files]
    calls = {
        "one": [segment(image) for image in images],
        "files": segment(files),
        "list": segment(images),
        "generator": list(segment(image for image in images)),
    }
    if mixed_batches:
        calls["batches"] = segment(images, batch_size=3)
        calls["batches of a generator"] = list(segment((image for image in images), batch_size=2))
    sizes = [image.size for image in images]
    return {
        call: [ids(found, size) for found, size in zip(results, sizes, strict=True)] for call, results in calls.items()
    }


@pytest.fixture
def files(tmp_path):
    rng = np.random.default_rng(0)
    for index, (w, h) in enumerate(SIZES):
        Image.fromarray(rng.integers(0, 256, (h, w, 3)).astype(np.uint8)).save(tmp_path / f"{index}.png")
    return [str(tmp_path / f"{index}.png") for index in range(len(SIZES))]


@pytest.fixture
def processor():
    return DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})


def save(folder, *parts):
    for part in parts:
        part.save_pretrained(folder)


@torch.no_grad()
def alone(model, processor, file):
    """An image alone through model and processor."""
    image = Image.open(file)
    outputs = model(**processor(image, return_tensors="pt").to(model.dtype))
    return processor.post_process_semantic_segmentation(outputs, [(image.height, image.width)])[0].numpy()


@pytest.mark.parametrize(
    ("kind", "mode", "dtype"),
    [("vit", "whole", "float32"), ("resnet", "slide", "float32"), ("vit", "slide", "bfloat16")],
)
def test_every_way_to_call_gives_what_the_model_gives(tmp_path, files, processor, kind, mode, dtype):
    model = varied(tiny_model(kind, inference_mode=mode, crop_size=48, stride=32)).to(getattr(torch, dtype))
    save(tmp_path / "model", model, processor)
    segment = pipeline("image-segmentation", model=str(tmp_path / "model"), dtype=dtype, device=-1)
    expected = [alone(model, processor, file) for file in files]
    assert len(np.unique(expected[0])) > 1
    for call, answer in answers(segment, files, mixed_batches=True).items():
        wrong = [np.mean(np.array(a) != b) for a, b in zip(answer, expected, strict=True)]
        # rounding differs between batched and single convolutions, so a tie may fall the other way
        assert max(wrong) < (1e-3 if dtype == "float32" else 0.05), (call, wrong)


def test_scores_that_are_no_numbers_are_no_segments(files, processor):
    model = varied(tiny_model())
    with torch.no_grad():
        model.decode_head.classifier.bias[1] = float("nan")
    segment = pipeline("image-segmentation", model=model, image_processor=processor)
    with pytest.raises(ValueError, match="NaN"):
        segment(files[0])


WITHOUT_THE_PACKAGE = f"""
import json, sys
sys.modules["denseclip_hf"] = None
import numpy as np
from PIL import Image
from transformers import pipeline

{inspect.getsource(answers)}
segment = pipeline("image-segmentation", model=sys.argv[1], trust_remote_code=True)
print(json.dumps(answers(segment, sys.argv[2:], mixed_batches=False)))
"""


@pytest.mark.slow
def test_code_that_travels_with_the_weights_serves_the_pipeline(tmp_path, files, processor, monkeypatch):
    monkeypatch.setattr(DenseCLIPImageProcessorPil, "_auto_class", "AutoImageProcessor")
    monkeypatch.setattr(DenseCLIPConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(DenseCLIPForSemanticSegmentation, "_auto_class", "AutoModelForSemanticSegmentation")
    model = varied(tiny_model("resnet"))
    save(tmp_path / "model", model, processor)
    command = [sys.executable, "-c", WITHOUT_THE_PACKAGE, str(tmp_path / "model"), *files]
    environment = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    found = json.loads(done.stdout)
    assert all(answer == found["one"] for answer in found.values())
    assert np.mean(np.array(found["one"][0]) != alone(model, processor, files[0])) < 1e-3


# What the pipeline needs


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_list_of_images_gives_what_each_gives_alone(kind, mode):
    model = tiny_model(kind, inference_mode=mode, crop_size=48, stride=32)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, h, w, generator=generator) for h, w in [(64, 64), (64, 96), (64, 64)]]
    with torch.no_grad():
        together = model(images)
        for index, image in enumerate(images):
            alone = model(image[None])
            for name in ("logits", "score_maps", "text_embeds"):
                assert (name in together) == (name in alone)
                if name in alone:
                    torch.testing.assert_close(together[name][index], alone[name][0], atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="labels"):
        model(images, labels=torch.zeros(1, 64, 64, dtype=torch.long))
