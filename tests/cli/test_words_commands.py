"""Words on a CLIP that nobody trained to segment, and on a segmenter: `words`, `predict`, `evaluate` and the page."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from denseclip_hf.app import AppModels
from denseclip_hf.app.answers import heat_maps, segment
from denseclip_hf.cli import evaluate, predict, words
from denseclip_hf.example import draw_scene, make_example_clip
from denseclip_hf.inference import load_model
from helpers.images import photo


LABELS = ["sky", "road", "tree", "car"]


@pytest.fixture(scope="module")
def clip_dir(tmp_path_factory) -> str:
    return str(make_example_clip(tmp_path_factory.mktemp("clip") / "vit", "vit"))


@pytest.fixture
def scene(tmp_path) -> str:
    draw_scene(0).image.save(tmp_path / "scene.png")
    return str(tmp_path / "scene.png")


def mask(folder) -> np.ndarray:
    return np.asarray(Image.open(folder / "scene_mask.png"))


def test_words_of_a_clip_are_those_of_the_pipeline(clip_dir, scene, tmp_path):
    labels = ["sky", "road|street", "a tree, green", "car"]
    assert words.main([scene, "--model", clip_dir, "--output_dir", str(tmp_path / "out"), "--labels", *labels]) == 0
    asked = ["sky", ["road", "street"], "a tree, green", "car"]
    found = pipeline("zero-shot-image-segmentation", model=clip_dir)(scene, candidate_labels=asked, return_map=True)
    assert (mask(tmp_path / "out") == found["segmentation"].numpy()).all()
    classes = json.loads((tmp_path / "out" / "classes.json").read_text())["id2label"]
    assert list(classes.values()) == ["sky", "road", "a tree, green", "car"]


def test_predict_takes_the_same_options(clip_dir, scene, tmp_path):
    common = [scene, "--model", clip_dir, "--output_dir"]
    options = ["--refine", "2", "--background", "house", "mountain", "--scale", "60", "--crop_size", "160"]
    options += ["--stride", "80", "--short_side", "200", "--threshold", "0.2", "--last_block", "kk"]
    assert predict.main([*common, str(tmp_path / "a"), "--words", ",".join(LABELS), *options]) == 0
    assert words.main([*common, str(tmp_path / "b"), *options, "--labels", *LABELS]) == 0
    assert (mask(tmp_path / "a") == mask(tmp_path / "b")).all()
    call = {"refine": 2, "background": ["house", "mountain"], "scale": 60, "crop_size": 160, "stride": 80}
    call |= {"short_side": 200, "threshold": 0.2, "last_block": "kk"}
    segmenter = pipeline("zero-shot-image-segmentation", model=clip_dir)
    expected = segmenter(scene, candidate_labels=LABELS, return_map=True, **call)["segmentation"].numpy()
    assert (mask(tmp_path / "a") == np.where(expected < 0, 255, expected)).all()


@pytest.mark.parametrize(
    ("flags", "keyword"),
    [
        ([], "which words"),
        (["--words", "sky,,car"], "empty"),
        (["--words", "sky", "--refine", "3", "--native_resolution"], "refine"),
        (["--words", "sky", "--last_block", "unknown"], "last_block"),
    ],
)
def test_what_cannot_be_asked_of_a_clip_is_one_sentence(clip_dir, scene, tmp_path, capsys, flags, keyword):
    with pytest.raises(SystemExit, match="^1$"):
        predict.main([scene, "--model", clip_dir, "--output_dir", str(tmp_path / "out"), *flags])
    said = capsys.readouterr().err
    assert keyword in said and "Traceback" not in said


def test_more_words_than_memory_allows_are_refused_with_the_number_that_fits(clip_dir, scene, monkeypatch):
    monkeypatch.setattr("denseclip_hf.words.MAX_SCORES", 3 * 336 * 448)
    segmenter = pipeline("zero-shot-image-segmentation", model=clip_dir)
    with pytest.raises(ValueError, match="4 words are too many .* 3 fit"):
        segmenter(draw_scene(0, size=(400, 300)).image, candidate_labels=LABELS)


def test_the_page_takes_a_clip(clip_dir):
    models = AppModels([clip_dir], device="cpu")
    (name,) = models.names
    assert not models.has_classes(name) and "sky" in models.classes(name)
    assert set(np.unique(segment(models, photo(), name, LABELS).segmentation)) <= {0, 1, 2, 3}
    assert len(heat_maps(models, photo(), name, ["car", "a red car"], LABELS)) == 2
    with pytest.raises(ValueError, match="which words"):
        segment(models, photo(), name)


# Measured


@pytest.fixture(scope="module")
def labeled(tmp_path_factory) -> str:
    """Two scenes in the usual folders, whose classes are called otherwise."""
    folder = tmp_path_factory.mktemp("data")
    for kind in ("images", "masks"):
        (folder / "val" / kind).mkdir(parents=True)
    for number in range(2):
        scene = draw_scene(number, size=(96, 80))
        scene.image.save(folder / "val" / "images" / f"{number}.png")
        Image.fromarray(np.asarray(scene.mask).clip(max=3)).save(folder / "val" / "masks" / f"{number}.png")
    names = ["background", "street", "plant", "vehicle"]
    (folder / "classes.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
    return str(folder)


def measured(folder, *flags: str) -> dict:
    evaluate.main([*flags, "--output_dir", str(folder)])
    return json.loads((folder / "evaluation.json").read_text())


def test_words_are_measured_on_a_clip(clip_dir, labeled, tmp_path):
    (tmp_path / "words.yaml").write_text(
        "background: [sky, house]\nstreet: [road, street]\nplant: tree\nvehicle: car\n"
    )
    common = ["--model", clip_dir, "--dataset", labeled, "--save_predictions", "--short_side", "128"]
    report = measured(tmp_path / "out", *common, "--words", str(tmp_path / "words.yaml"), "--threshold", "0.3")
    assert report["num_images"] == 2 and list(report["per_category"]) == ["background", "street", "plant", "vehicle"]
    assert report["protocol"]["crop_size"] == [224, 224] and report["protocol"]["words"]["threshold"] == 0.3
    files = sorted((tmp_path / "out" / "predictions").iterdir())
    images = [f"{labeled}/val/images/{number}.png" for number in range(2)]
    segmenter = pipeline("zero-shot-image-segmentation", model=clip_dir)
    options = {"background": ["sky", "house"], "threshold": 0.3, "short_side": 128, "return_map": True}
    found = segmenter(images, candidate_labels=[["road", "street"], "tree", "car"], **options)
    for file, one in zip(files, found, strict=True):
        assert (np.asarray(Image.open(file)) == one["segmentation"].numpy() + 1).all()


def test_a_segmenter_is_measured_by_words_if_asked(word_model_dir, labeled, tmp_path):
    common = ["--model", str(word_model_dir), "--dataset", labeled]
    report = measured(tmp_path / "out", *common, "--words", '{"street": ["road", "street"]}')
    assert "street" in report["per_category"]


@pytest.mark.parametrize(
    ("flags", "keyword"),
    [
        (["--words", '{"boat": "ship"}'], "'boat'"),
        (["--words", "missing.yaml"], "missing.yaml"),
        (["--words", '{"street": []}'], "empty"),
        (["--flip"], "one view"),
    ],
)
def test_words_that_do_not_fit_the_data_are_refused(clip_dir, labeled, tmp_path, capsys, flags, keyword):
    with pytest.raises(SystemExit, match="^1$"):
        measured(tmp_path / "out", "--model", clip_dir, "--dataset", labeled, *flags)
    assert keyword in capsys.readouterr().err


def test_a_resnets_places_can_keep_their_own_values(tmp_path):
    folder = str(make_example_clip(tmp_path / "resnet", "resnet"))
    model, _ = load_model(folder)
    model.config.last_block = "maskclip"
    pixels = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        c5 = model.clip.vision_model(pixels).feature_maps[-1]
        pool = model.clip.vision_model.attention_pool.attention
        weight = (pool.out_proj.weight @ pool.v_proj.weight)[:, :, None, None]
        bias = pool.out_proj.weight @ pool.v_proj.bias + pool.out_proj.bias
        expected = torch.nn.functional.conv2d(c5, weight, bias)
        torch.testing.assert_close(model.get_dense_features(pixels), expected, atol=1e-5, rtol=1e-4)
