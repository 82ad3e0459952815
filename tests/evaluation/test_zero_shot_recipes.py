"""`configs/zero_shot/`: the usual benchmarks of words on an untrained CLIP, each by one command."""

import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import yaml
from PIL import Image

from denseclip_hf.cli import evaluate
from denseclip_hf.cli.arguments import parse_arguments
from denseclip_hf.data import ade20k_classes, load_segmentation_dataset, parse_classes
from denseclip_hf.data.classes import cityscapes_classes
from denseclip_hf.evaluation import EvaluationArguments
from denseclip_hf.evaluation.measurement import read_words
from denseclip_hf.example import make_example_clip
from denseclip_hf.words import WordOptions


RECIPES = Path(__file__).parents[2] / "configs" / "zero_shot"
# Queries of each protocol, as its authors' lists of words have them.
QUERIES = {
    "voc21": 56, "voc20": 30, "context60": 60, "context59": 59, "coco_object": 113, "coco_stuff": 171,
    "cityscapes": 19, "ade20k": 150,
}  # fmt: skip
OWN_CLASSES = {"ade20k": ade20k_classes, "cityscapes": cityscapes_classes}


@pytest.fixture(autouse=True)
def open_clip(monkeypatch):
    """A stand-in for the package that has the 80 templates."""
    module = ModuleType("open_clip.zero_shot_metadata")
    module.OPENAI_IMAGENET_TEMPLATES = (lambda name: f"a bad photo of a {name}.", lambda name: f"itap of my {name}.")
    monkeypatch.setitem(sys.modules, "open_clip", ModuleType("open_clip"))
    monkeypatch.setitem(sys.modules, "open_clip.zero_shot_metadata", module)


@pytest.mark.parametrize("name", QUERIES)
def test_recipes_ask_for_the_published_words(name):
    recipe = RECIPES / f"{name}.yaml"
    args, options = parse_arguments([EvaluationArguments, WordOptions], [str(recipe)])
    assert options.templates == ["a bad photo of a {}.", "itap of my {}."]
    table = OWN_CLASSES[name]() if name in OWN_CLASSES else parse_classes(args.classes)
    names = list(table.id2label.values())
    words = read_words(args.words, names)
    assert sum(map(len, words.values())) == QUERIES[name] and list(words) == names
    assert (options.threshold > 0) == ("background" in names)
    first, command, third, *_ = recipe.read_text().splitlines()
    assert f"denseclip evaluate configs/zero_shot/{name}.yaml --dataset" in command and "mIoU" in third
    assert sorted(path.stem for path in RECIPES.glob("*.yaml")) == sorted(QUERIES)


def test_one_command_measures_ade20k(tmp_path, capsys):
    clip, data = make_example_clip(tmp_path / "clip", "vit"), tmp_path / "ADEChallengeData2016"
    rng = np.random.default_rng(0)
    for kind in ("images", "annotations"):
        (data / kind / "validation").mkdir(parents=True)
    for number in range(4):
        name = f"ADE_val_{number + 1:08d}"
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(data / f"images/validation/{name}.jpg")
        # 0 means no class, n the class n - 1
        mask = rng.integers(0, 151, (6, 8), np.uint8).repeat(10, 0).repeat(10, 1)
        Image.fromarray(mask).save(data / f"annotations/validation/{name}.png")
    flags = ["--model", str(clip), "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    evaluate.main([str(RECIPES / "ade20k.yaml"), *flags, "--save_predictions"])
    printed = capsys.readouterr().out
    assert "chest of drawers" in printed and "4 images of validation" in printed
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert report["protocol"]["size"]["shortest_edge"] == 336 and report["protocol"]["stride"] == [112, 112]
    rows = load_segmentation_dataset(str(data)).validation
    files = sorted((tmp_path / "out" / "predictions").iterdir())
    right = total = 0
    for row, file in zip(rows, files, strict=True):
        known = row["mask"] != 255
        right += (np.asarray(Image.open(file))[known] == row["mask"][known]).sum()
        total += known.sum()
    assert report["metrics"]["overall_accuracy"] == pytest.approx(right / total)


def test_without_its_package_the_80_templates_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip.zero_shot_metadata", None)
    assert yaml.safe_load((RECIPES / "ade20k.yaml").read_text())["templates"] == ["openai"]
    with pytest.raises(ImportError, match="open_clip_torch"):
        WordOptions(templates=["openai"])
