"""The built-in example: scenes and their folder, crops and what they are called, and the tiny CLIP."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from denseclip_hf.example import (
    draw_scene,
    example_clip_model,
    example_tokenizer,
    make_example_clip,
    make_example_dataset,
)
from denseclip_hf.example.captions import crops
from denseclip_hf.example.scenes import CLASSES, IGNORE_INDEX, NAMES
from denseclip_hf.example.tiny_clip import crop_batch, pretrain_example_clip
from denseclip_hf.model.modeling_clip_resnet import CLIPResNetModel


MODELS = {"vit": CLIPModel, "resnet": CLIPResNetModel}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_example_dataset(tmp_path_factory.mktemp("example") / "data", num_train=12, num_val=3)


def test_a_scene_depends_on_its_seed_split_and_index_alone(dataset, tmp_path):
    again = make_example_dataset(tmp_path / "data", num_train=12, num_val=3)
    assert digests(again) == digests(dataset)
    fewer = make_example_dataset(tmp_path / "fewer", num_train=2, num_val=1)
    for name in ("train/images/0001.jpg", "train/masks/0001.png", "val/images/0000.jpg"):
        assert (fewer / name).read_bytes() == (dataset / name).read_bytes()
    for other in ({"seed": 1}, {"split": "val"}, {"index": 4}):
        assert not np.array_equal(draw_scene(3).mask, draw_scene(**{"index": 3, **other}).mask)


def test_the_folder_is_a_data_set_of_ones_own(dataset):
    classes = json.loads((dataset / "classes.json").read_text())
    assert classes["id2label"] == {str(label): name for label, name in enumerate(NAMES)}
    assert classes["palette"] == [list(color) for color, *_ in CLASSES.values()]
    seen: set[int] = set()
    for path in (dataset / "train" / "masks").iterdir():
        with Image.open(path) as mask, Image.open(dataset / "train" / "images" / f"{path.stem}.jpg") as image:
            assert mask.size == image.size == (128, 96) and image.mode == "RGB"
            seen |= set(np.unique(np.array(mask)).tolist())
    assert seen == {*range(len(NAMES)), IGNORE_INDEX}


def test_nothing_in_a_folder_is_ever_replaced(tmp_path):
    folder = make_example_dataset(tmp_path / "data", num_train=1, num_val=0)
    before = digests(folder)
    make_example_dataset(folder, num_train=1, num_val=0)
    with pytest.raises(FileExistsError, match="not empty"):
        make_example_dataset(folder, num_train=2, num_val=0)
    assert digests(folder) == before and [path.name for path in tmp_path.iterdir()] == ["data"]


def test_no_caption_in_a_batch_is_true_of_two_crops():
    rng = np.random.default_rng(0)
    found = [crop for index in range(len(NAMES)) for crop in crops(draw_scene(index), rng)]
    assert {crop.name for crop in found} == set(NAMES)
    assert all(crop.image.width == crop.image.height >= 20 for crop in found)
    kinds: dict[str, dict[str, list[int]]] = {name: {} for name in NAMES}
    for number, crop in enumerate(found):
        kinds[crop.name].setdefault(crop.adjective, []).append(number)
    for _ in range(20):
        numbers, captions = crop_batch(kinds, rng)
        assert len(set(captions)) == len(captions) == len(numbers)
        assert all(found[number].name in words for number, words in zip(numbers, captions, strict=True))


@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_clip_folder_loads(tmp_path, vision):
    folder = make_example_clip(tmp_path / "clip", vision)
    model = MODELS[vision].from_pretrained(folder)
    processor, words = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.text_config.eos_token_id == words.eos_token_id
    inputs = words(["a car", "a tree"], padding=True, return_tensors="pt")
    inputs |= processor(images=draw_scene(0).image, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    with torch.no_grad():
        logits, fresh = (each(**inputs).logits_per_image for each in (model, example_clip_model(words, vision)))
    torch.testing.assert_close(logits, fresh)


@pytest.mark.slow
def test_pretraining_teaches_the_names():
    tokenizer = example_tokenizer()
    model = example_clip_model(tokenizer)
    report = pretrain_example_clip(model, tokenizer, steps=90, num_scenes=60, num_val_scenes=25)
    assert report["zero_shot_accuracy_before"] < 0.25 and report["zero_shot_accuracy_after"] > 0.35
    assert np.mean(report["losses"][-10:]) < np.mean(report["losses"][:10]) - 0.5
