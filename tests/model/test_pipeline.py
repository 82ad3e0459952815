"""`pipeline("image-segmentation")` as users call it, in fresh processes; and what it needs of processor and model."""

import json
import re
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


SIZES = [(90, 70), (64, 100), (90, 70), (70, 90), (50, 50)]  # (width, height)

FRESH_PROCESS = """
import json, sys
import numpy as np
from PIL import Image
from transformers import pipeline
PREPARE

def ids(found, size):
    result = np.full(size[::-1], -1)
    for segment in found:
        assert segment["mask"].size == size and segment["score"] is None
        result[np.asarray(segment["mask"]) > 0] = int(segment["label"].removeprefix("class "))
    return result.tolist()

directory, *files = sys.argv[1:]
images = [Image.open(file) for file in files]
sizes = [image.size for image in images]
segment = pipeline("image-segmentation", model=directory, OPTIONS)
many = lambda results: [ids(found, size) for found, size in zip(results, sizes, strict=True)]
print(json.dumps({
    "one": [ids(segment(image), image.size) for image in images],
    "files": many(segment(files)),
    "list": many(segment(images)),
    "generator": many(segment(image for image in images)),
    "batches": many(segment(images, batch_size=4)),
    "batches of a generator": many(segment((image for image in images), batch_size=2)),
}))
"""


def pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3)).astype(np.uint8)) for w, h in SIZES]


def run_in_fresh_process(folder, options="", prepare="import denseclip_hf", mixed_batches=True, **environment):
    """What the pipeline answers, by kind of call; nothing may be logged."""
    files = []
    for index, picture in enumerate(pictures()):
        files.append(folder / f"{index}.png")
        picture.save(files[-1])
    code = FRESH_PROCESS.replace("OPTIONS", options).replace("PREPARE", prepare)
    if not mixed_batches:
        code = re.sub(r'    "batches.*\n', "", code)
    environment = {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **environment}
    environment["TQDM_DISABLE"] = "1"
    command = [sys.executable, "-c", code, str(folder / "model"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return json.loads(done.stdout)


def expected(model, processor):
    """Each picture alone through model and processor."""
    results = []
    for picture in pictures():
        with torch.no_grad():
            outputs = model(**processor(picture, return_tensors="pt").to(model.dtype))
        target = [(picture.height, picture.width)]
        results.append(processor.post_process_semantic_segmentation(outputs, target)[0].tolist())
    return results


@pytest.fixture
def processor():
    return DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mode", "options", "dtype"),
    [
        ("vit", "whole", "", torch.float32),
        ("resnet", "slide", "device='cpu'", torch.float32),
        ("vit", "slide", "dtype='bfloat16', device=-1", torch.bfloat16),
    ],
)
def test_every_way_to_call_gives_what_the_model_gives(tmp_path, processor, kind, mode, options, dtype):
    model = varied(tiny_model(kind, inference_mode=mode, crop_size=48, stride=32)).to(dtype)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    answers = run_in_fresh_process(tmp_path, options)
    alone = expected(model, processor)
    assert len(np.unique(alone[0])) > 1
    for call, answer in answers.items():
        wrong = [np.mean(np.array(a) != np.array(b)) for a, b in zip(answer, alone, strict=True)]
        # rounding differs between batched and single convolutions, so a tie may fall the other way
        assert max(wrong) < (1e-3 if dtype == torch.float32 else 0.05), (call, wrong)


def test_scores_that_are_no_numbers_are_no_segments(processor):
    model = varied(tiny_model())
    with torch.no_grad():
        model.decode_head.classifier.bias[1] = float("nan")
    segment = pipeline("image-segmentation", model=model, image_processor=processor)
    with pytest.raises(ValueError, match="NaN"):
        segment(pictures()[0])


@pytest.mark.slow
def test_code_that_travels_with_the_weights_serves_the_pipeline(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(DenseCLIPImageProcessorPil, "_auto_class", "AutoImageProcessor")
    monkeypatch.setattr(DenseCLIPConfig, "_auto_class", "AutoConfig")
    monkeypatch.setattr(DenseCLIPForSemanticSegmentation, "_auto_class", "AutoModelForSemanticSegmentation")
    model = varied(tiny_model("resnet"))
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    answers = run_in_fresh_process(
        tmp_path, "trust_remote_code=True", "sys.modules['denseclip_hf'] = None", mixed_batches=False
    )
    assert all(answer == answers["one"] for answer in answers.values())
    assert np.mean(np.array(answers["one"][0]) != np.array(expected(model, processor)[0])) < 1e-3


# What the pipeline needs


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_list_of_pictures_gives_what_each_gives_alone(kind, mode):
    model = tiny_model(kind, inference_mode=mode, crop_size=48, stride=32)
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(3, h, w, generator=generator) for h, w in [(64, 64), (64, 96), (64, 64), (80, 64)]]
    with torch.no_grad():
        together = model(images)
        for index, image in enumerate(images):
            alone = model(image[None])
            for name in ("logits", "score_maps", "text_embeds"):
                assert (name in together) == (name in alone)
                if name in alone:
                    torch.testing.assert_close(together[name][index], alone[name][0], atol=1e-5, rtol=0)


def test_a_list_of_images_has_no_labels():
    with pytest.raises(ValueError, match="labels"):
        tiny_model()([torch.zeros(3, 64, 64)], labels=torch.zeros(1, 64, 64, dtype=torch.long))
