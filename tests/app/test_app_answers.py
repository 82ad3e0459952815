"""What the app's page asks for: words, pictures, masks, overlays and heat maps."""

import base64
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from denseclip_hf.app.answers import (
    Answer,
    AppModels,
    heat_maps,
    read_upload,
    read_words,
    save_mask,
    save_overlay,
    segment,
    shown,
)
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from helpers.images import photo
from helpers.models import CLASSES, WORDS, tiny_model


def opened(address):
    """The picture in a data address."""
    return Image.open(BytesIO(base64.b64decode(address.split(",")[1])))


def test_models_have_the_shortest_names_that_tell_them_apart(tmp_path):
    folders = [tmp_path / name for name in ("a/model", "b/model", "b/other")]
    for folder in folders:
        folder.mkdir(parents=True)
    models = AppModels([*map(str, folders), "user/model", str(folders[2])])
    assert models.names == [str(folders[0]), str(folders[1]), "other", "user/model"]
    assert models.directories == folders


def test_a_page_needs_models_that_are_there(tmp_path):
    with pytest.raises(ValueError, match="at least one model"):
        AppModels([])
    with pytest.raises(ValueError, match="no model 'other' here"):
        AppModels([str(tmp_path)]).load("other")


def test_words_are_the_lines():
    assert read_words(" sky \na red car, parked\n\n") == ["sky", "a red car, parked"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "none of them empty"),
        ("sky\n\nroad", "none of them empty"),
        ("sky\nroad\nsky ", "'sky' is given twice"),
        ("\n".join(map(str, range(201))), "201 classes are too many"),
    ],
)
def test_bad_words_are_refused(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        read_words(text)


def test_own_classes_are_segmented_as_by_the_model(app_models):
    model, processor, _ = app_models.load("random")
    answer = segment(app_models, photo(), "random")
    with torch.no_grad():
        outputs = model(**processor(photo(), return_tensors="pt"))
    expected = processor.post_process_semantic_segmentation(outputs, [(64, 96)])[0].numpy()
    assert (answer.segmentation == expected).mean() > 0.999 and len(np.unique(expected)) > 1
    assert answer.names == CLASSES and answer.image.size == (96, 64)


@pytest.mark.parametrize("sentences", [False, True])
def test_words_are_segmented_from_score_maps(app_models, sentences):
    model, processor, tokenizer = app_models.load("random")
    answer = segment(app_models, photo(), "random", WORDS, sentences)
    segmenter = app_models.segmenter("random", WORDS, sentences=sentences)
    pixels = processor(photo(), return_tensors="pt")["pixel_values"]
    expected = model.predict_from_scores(pixels, segmenter.embeds, [(64, 96)]).segmentation[0].numpy()
    assert (answer.segmentation == expected).all() and answer.names == WORDS
    plain = model.encode_texts(WORDS, tokenizer)
    assert torch.allclose(segmenter.embeds, plain) is not sentences


def test_without_a_tokenizer_words_are_refused_and_classes_segmented(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path)
    models = AppModels([str(tmp_path)], device="cpu")
    assert segment(models, photo(), models.names[0]).segmentation.shape == (64, 96)
    with pytest.raises(ValueError, match="need CLIP's tokenizer"):
        segment(models, photo(), models.names[0], ["cat"])


def test_heat_maps_share_their_colors(app_models):
    large = photo((2400, 1600))
    maps = heat_maps(app_models, large, "random", ["tree", "a cat on grass"])
    assert [caption.rsplit(" ", 3)[0] for _, caption in maps] == ["tree", "a cat on grass"]
    assert all(picture.size == (1024, 683) for picture, _ in maps)
    assert maps[0][0].tobytes() != maps[1][0].tobytes()


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [([], "choose from 1 to 12"), (["x"] * 13, "choose from 1 to 12"), (["sky", "sky "], "'sky' is given twice")],
)
def test_bad_choices_of_heat_maps_are_refused(app_models, chosen, sentence):
    with pytest.raises(ValueError, match=sentence):
        heat_maps(app_models, photo(), "random", chosen)


def test_heat_maps_of_what_is_no_number_are_refused(app_models, monkeypatch):
    scores = torch.full((1, 20, 6, 8), float("nan"))
    monkeypatch.setattr("denseclip_hf.app.answers.score_maps_of", lambda *_: scores)
    with pytest.raises(ValueError, match="scores are NaN or infinite"):
        heat_maps(app_models, photo(), "random", ["tree"])


@pytest.mark.parametrize("content", [b"", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a"])
def test_what_is_no_picture_is_one_sentence_without_its_folder(tmp_path, content):
    file = tmp_path / "holiday.jpg"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="holiday.jpg cannot be read as a picture") as error:
        read_upload(file)
    assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("limit", [1000, 5000], ids=["bomb", "above the limit"])
def test_too_many_pixels_are_refused(photo_file, monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(ValueError, match="holiday.png .*more") as error:
        read_upload(photo_file)
    assert str(photo_file.parent) not in str(error.value)


@pytest.mark.parametrize("file", [None, "", "missing.png", "http://127.0.0.1:9/x.png", "file:///etc/hostname"])
def test_only_files_are_read(file):
    with pytest.raises(ValueError, match="choose a picture first"):
        read_upload(file)


def test_photographs_are_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    photo().save(tmp_path / "turned.jpg", exif=exif)
    assert read_upload(tmp_path / "turned.jpg").size == (64, 96)


@pytest.mark.parametrize("classes", [5, 300])
def test_shown_mask_holds_the_classes(classes):
    ids = np.random.default_rng(0).integers(0, classes, (40, 30))
    sent = shown(Answer(photo((30, 40)), ids, [str(i) for i in range(classes)], [[0, 0, 0]] * classes))
    mask = np.asarray(opened(sent["mask"])).astype(int)
    assert (mask[..., 0] + 256 * mask[..., 1] == ids).all()
    assert opened(sent["picture"]).size == (30, 40) and len(sent["names"]) == classes


def test_large_pictures_are_shown_smaller():
    answer = Answer(photo((3200, 160)), np.zeros((160, 3200), int), ["sky"], [[0, 0, 0]])
    sent = shown(answer)
    assert opened(sent["picture"]).size == opened(sent["mask"]).size == (1024, 51)


def test_downloads(app_models, tmp_path):
    answer = segment(app_models, photo(), "random")
    mask = save_mask(answer, tmp_path / "new", "holiday.x.png")
    assert mask == tmp_path / "new" / "holiday.x_mask.png"
    picture = Image.open(mask)
    assert picture.mode == "P" and (np.asarray(picture) == answer.segmentation).all()
    overlay = np.asarray(Image.open(save_overlay(answer, tmp_path, "holiday", 0.0)))
    assert (overlay[:64] == np.asarray(photo())).all() and len(overlay) > 64
    overlay = Image.open(save_overlay(answer, tmp_path, "holiday", 7.0))
    assert overlay.getpixel((0, 0)) == tuple(answer.palette[answer.segmentation[0, 0]])
