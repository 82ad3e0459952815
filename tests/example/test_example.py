"""The built-in example: scenes and their folder, captions and crops, tokenizer, and the tiny CLIP."""

import dataclasses
import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from denseclip_hf.example.captions import caption, crops, subject
from denseclip_hf.example.scenes import CLASSES, IGNORE_INDEX, PALETTE, draw_scene, make_example_dataset
from denseclip_hf.example.tiny_clip import (
    CaptionedScenes,
    contrastive_training,
    example_clip_model,
    example_corpus,
    make_example_clip,
    make_example_tokenizer,
    pretrain_example_clip,
)
from denseclip_hf.model.modeling_clip_resnet import CLIPResNetModel


MODELS = {"vit": CLIPModel, "resnet": CLIPResNetModel}


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(index) for index in range(len(CLASSES))]


@pytest.fixture(scope="module")
def tokenizer():
    return make_example_tokenizer(example_corpus(num_scenes=10))


@pytest.fixture(scope="module")
def captioned():
    return CaptionedScenes.draw(12, "train", 0)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return make_example_dataset(tmp_path_factory.mktemp("example") / "data", num_train=12, num_val=3)


def test_same_arguments_write_the_same_bytes(dataset, tmp_path):
    again = make_example_dataset(tmp_path / "data", num_train=12, num_val=3)
    assert digests(again) == digests(dataset)


def test_a_scene_does_not_depend_on_how_many_are_made(dataset, tmp_path):
    fewer = make_example_dataset(tmp_path / "data", num_train=2, num_val=1)
    for name in ("train/images/0001.jpg", "train/masks/0001.png", "val/images/0000.jpg"):
        assert (fewer / name).read_bytes() == (dataset / name).read_bytes()


@pytest.mark.parametrize("other", [{"seed": 1}, {"split": "val"}, {"index": 4}])
def test_other_arguments_draw_other_scenes(other):
    first, second = draw_scene(3), draw_scene(**{"index": 3, **other})
    assert not np.array_equal(np.array(first.image), np.array(second.image))
    assert not np.array_equal(first.mask, second.mask)


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"index": -1}, {"seed": -1}, {"size": (128, 8)}])
def test_impossible_scenes_are_refused(wrong):
    with pytest.raises(ValueError, match="no scene for"):
        draw_scene(**{"index": 0, **wrong})


def test_folder_layout(dataset):
    assert sorted(path.name for path in dataset.iterdir() if path.name[0] != ".") == ["classes.json", "train", "val"]
    for split, count in (("train", 12), ("val", 3)):
        stems = [f"{index:04d}" for index in range(count)]
        assert sorted(path.name for path in (dataset / split / "images").iterdir()) == [f"{s}.jpg" for s in stems]
        assert sorted(path.name for path in (dataset / split / "masks").iterdir()) == [f"{s}.png" for s in stems]


def test_classes_file(dataset):
    classes = json.loads((dataset / "classes.json").read_text())
    assert classes == {
        "id2label": {str(label): name for label, name in enumerate(CLASSES)},
        "palette": [list(color) for color in PALETTE],
        "ignore_index": IGNORE_INDEX,
    }
    assert len(set(PALETTE)) == len(CLASSES)


def test_masks_hold_ids_of_every_class_and_void(dataset):
    seen: set[int] = set()
    for path in (dataset / "train" / "masks").iterdir():
        with Image.open(path) as mask, Image.open(dataset / "train" / "images" / f"{path.stem}.jpg") as image:
            assert mask.size == image.size == (128, 96)
            assert image.mode == "RGB"
            seen |= set(np.unique(np.array(mask)).tolist())
    assert seen == {*range(len(CLASSES)), IGNORE_INDEX}


def test_void_lies_between_classes_and_is_rare(scenes):
    for scene in scenes:
        void = scene.mask == IGNORE_INDEX
        assert 0.005 < void.mean() < 0.12
        rows, columns = np.nonzero(void[2:-2, 2:-2])
        around = [np.unique(scene.mask[y : y + 5, x : x + 5]).size for y, x in zip(rows, columns, strict=True)]
        assert np.mean(np.array(around) >= 3) > 0.98  # two classes and void


@pytest.mark.parametrize("size", [(128, 96), (97, 61)])
def test_size_is_width_and_height(size):
    scene = draw_scene(0, size=size)
    assert scene.image.size == size
    assert scene.mask.shape == size[::-1]


def test_a_finished_folder_is_kept_and_made_anew_for_other_arguments(tmp_path):
    folder = make_example_dataset(tmp_path / "data", num_train=1, num_val=0)
    written = (folder / "classes.json").stat().st_mtime_ns
    make_example_dataset(folder, num_train=1, num_val=0)
    assert (folder / "classes.json").stat().st_mtime_ns == written
    make_example_dataset(folder, num_train=2, num_val=0)
    assert len(list((folder / "train" / "images").iterdir())) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["data"]  # no temporary folder stays behind
    (folder / "train" / "images" / "mine.jpg").write_bytes(b"years of work")
    make_example_dataset(folder, num_train=2, num_val=0)
    with pytest.raises(FileExistsError, match="holds other files than this example made"):
        make_example_dataset(folder, num_train=3, num_val=0)
    assert (folder / "train" / "images" / "mine.jpg").read_bytes() == b"years of work"


def test_a_folder_of_someone_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(FileExistsError, match="not empty"):
        make_example_dataset(tmp_path, num_train=1, num_val=0)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_failure_leaves_nothing_half_made(tmp_path):
    with pytest.raises(ValueError, match="no scene for"):
        make_example_dataset(tmp_path / "data", num_train=1, num_val=0, size=(8, 8))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "adjective", "words"),
    [
        ("car", "orange", "an orange car"),
        ("grass", "dry", "dry grass"),
        ("person", "blue", "a person in blue"),
        ("traffic light", "", "a traffic light"),
    ],
)
def test_subject(name, adjective, words):
    assert subject(name, adjective) == words


def test_captions_are_varied_name_what_is_seen_and_repeat(scenes):
    for scene in scenes:
        assert caption(scene) == caption(scene)
        assert len({caption(scene, variant) for variant in range(8)}) > 1
        counts = {name: sum(t.name == name for t in scene.things if t.area >= 40) for name in CLASSES}
        for name in ("car", "house", "tree", "traffic light"):
            assert (name in caption(scene)) == (counts[name] > 0)
        assert ("two cars" in caption(scene)) == (counts["car"] == 2)


def test_crops_show_what_they_are_called(scenes):
    found = [crop for scene in scenes for crop in crops(scene)]
    assert {crop.name for crop in found} == set(CLASSES)
    assert all(crop.image.width == crop.image.height >= 20 for crop in found)


def test_tokenizer_follows_clip(tokenizer):
    start, end = len(tokenizer) - 2, len(tokenizer) - 1
    ids = tokenizer("Traffic  Light")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == ["<|startoftext|>", "traffic</w>", "light</w>", "<|endoftext|>"]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id) == (start, end)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "traffic light"


@pytest.mark.parametrize("text", ["zebra q x Ω 3", "ÿþ!?", "crosswalk-sign"])
def test_tokenizer_knows_any_text(tokenizer, text):
    ids = tokenizer(text)["input_ids"]
    assert ids.count(tokenizer.eos_token_id) == 1


def test_tokenizer_is_the_same_every_time(tokenizer):
    again = make_example_tokenizer(example_corpus(num_scenes=10))
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="at least 514"):
        make_example_tokenizer(["a car"], vocab_size=300)


@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_clip_folder_loads(tmp_path, vision):
    folder = make_example_clip(tmp_path / "clip", vision)
    model = MODELS[vision].from_pretrained(folder)
    processor, words = AutoImageProcessor.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.text_config.vocab_size == len(words)
    assert model.config.text_config.eos_token_id == words.eos_token_id
    pixels = processor(images=draw_scene(0).image, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 96, 96)
    with torch.no_grad():
        logits = model(**words(["a car", "a tree"], padding=True, return_tensors="pt"), pixel_values=pixels)
        fresh = example_clip_model(words, vision)(
            **words(["a car", "a tree"], padding=True, return_tensors="pt"), pixel_values=pixels
        )
    torch.testing.assert_close(logits.logits_per_image, fresh.logits_per_image)


def test_tokenizer_loads_in_a_fresh_process(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    code = f"from transformers import AutoTokenizer as A; print(A.from_pretrained({str(tmp_path)!r})('traffic light'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert str(tokenizer("traffic light")["input_ids"]) in done.stdout


def test_unknown_vision_is_refused(tokenizer):
    with pytest.raises(ValueError, match="vision must be one of"):
        example_clip_model(tokenizer, "swin")


def test_making_a_clip_leaves_the_random_state_alone(tokenizer):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    example_clip_model(tokenizer, "vit")
    assert torch.equal(torch.rand(1), expected)


def test_no_caption_in_a_batch_is_true_of_two_crops(captioned):
    rng = np.random.default_rng(0)
    for _ in range(20):
        pixels, captions = captioned.crop_batch(rng)
        assert len(set(captions)) == len(captions) == len(pixels)
        assert {name for name in CLASSES if any(name in words for words in captions)} == set(CLASSES)
    pixels, captions = captioned.scene_batch(rng)
    assert len(set(captions)) == len(captions) == len(pixels)


@pytest.mark.parametrize("vision", ["vit", "resnet"])
def test_pretraining_lowers_the_loss_and_repeats(tokenizer, captioned, vision):
    model = example_clip_model(tokenizer, vision)
    losses = contrastive_training(model, tokenizer, captioned, steps=12, learning_rate=1e-3, seed=0)
    assert all(math.isfinite(loss) for loss in losses)
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.1
    again = contrastive_training(
        example_clip_model(tokenizer, vision), tokenizer, captioned, steps=1, learning_rate=1e-3, seed=0
    )
    assert again == losses[:1]


@pytest.mark.slow
def test_pretraining_teaches_the_names(tokenizer):
    report = pretrain_example_clip(
        example_clip_model(tokenizer), tokenizer, steps=150, num_scenes=150, num_val_scenes=40
    )
    assert report["zero_shot_accuracy_before"] < 0.25
    assert report["zero_shot_accuracy_after"] > 0.35
    assert report["last_loss"] < report["first_loss"] - 0.5


def test_scenes_are_immutable(scenes):
    with pytest.raises(dataclasses.FrozenInstanceError):
        scenes[0].mask = None
