"""What the app's page asks for: words, images, masks, overlays and heat maps."""

import numpy as np
import pytest
import torch
from PIL import Image

from denseclip_hf.app.answers import (
    Answer,
    AppModels,
    annotated,
    heat_maps,
    read_upload,
    read_words,
    save_mask,
    save_overlay,
    segment,
    time_limit,
)
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from denseclip_hf.model.modeling_denseclip import ZERO_SHOT_TEMPLATES
from helpers.images import photo
from helpers.models import CLASSES, WORDS, tiny_model


def test_models_have_the_shortest_names_that_tell_them_apart(tmp_path):
    folders = [tmp_path / name for name in ("a/model", "b/model", "b/other")]
    for folder in folders:
        folder.mkdir(parents=True)
    models = AppModels([*map(str, folders), "user/model", str(folders[2])])
    assert models.names == [str(folders[0]), str(folders[1]), "other", "user/model"]
    assert models.directories == folders


def test_a_page_needs_models_that_are_there(tmp_path):
    with pytest.raises(KeyError, match="other"):
        AppModels([str(tmp_path)]).load("other")


def test_words_are_the_lines():
    assert read_words(" sky \na red car, parked\n\n") == ["sky", "a red car, parked"]


@pytest.mark.parametrize("text", ["", "sky\n\nroad", "sky\nroad\nsky ", "\n".join(map(str, range(201)))])
def test_no_words_empty_ones_repeated_ones_and_too_many_are_refused(text):
    with pytest.raises(ValueError):
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
    pixels = processor(photo(), return_tensors="pt")["pixel_values"]
    embeds = model.encode_texts(WORDS, tokenizer, ZERO_SHOT_TEMPLATES if sentences else None)
    expected = model.predict_from_scores(pixels, embeds, [(64, 96)]).segmentation[0].numpy()
    assert (answer.segmentation == expected).all() and answer.names == WORDS


def test_without_a_tokenizer_words_are_refused_and_classes_segmented(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path)
    models = AppModels([str(tmp_path)], device="cpu")
    assert segment(models, photo(), models.names[0]).segmentation.shape == (64, 96)
    with pytest.raises(ValueError, match="tokenizer"):
        segment(models, photo(), models.names[0], ["cat"])


def test_heat_maps_share_their_colors(app_models):
    large = photo((2400, 1600))
    maps = heat_maps(app_models, large, "random", ["tree", "a cat on grass"])
    assert [caption.rsplit(" ", 3)[0] for _, caption in maps] == ["tree", "a cat on grass"]
    assert all(image.size == (1024, 683) for image, _ in maps)
    assert maps[0][0].tobytes() != maps[1][0].tobytes()


@pytest.mark.parametrize("chosen", [[], list("abcdefghijklm"), ["sky", "sky "]])
def test_bad_choices_of_heat_maps_are_refused(app_models, chosen):
    with pytest.raises(ValueError):
        heat_maps(app_models, photo(), "random", chosen)


@pytest.mark.parametrize("content", [b"", b"no image", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"GIF89a"])
def test_what_is_no_image_is_one_sentence_without_its_folder(tmp_path, content):
    file = tmp_path / "holiday.jpg"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="holiday.jpg") as error:
        read_upload(file)
    assert str(tmp_path) not in str(error.value) and "\n" not in str(error.value)


def test_too_many_pixels_are_refused(photo_file, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="holiday.png") as error:
        read_upload(photo_file)
    assert str(photo_file.parent) not in str(error.value)


@pytest.mark.parametrize("file", [None, "", "missing.png", "http://127.0.0.1:9/x.png", "file:///etc/hostname"])
def test_only_files_are_read(file):
    with pytest.raises(ValueError, match="image"):
        read_upload(file)


def test_an_upload_has_a_bound_on_pixels_that_is_told_before_decoding(tmp_path, monkeypatch):
    Image.new("1", (6001, 4000)).save(tmp_path / "bomb.png")
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(ValueError, match="bomb.png"):
        read_upload(tmp_path / "bomb.png")


def test_a_model_that_takes_too_long_is_stopped_and_works_again():
    model, pixels = tiny_model(), torch.zeros(1, 3, 64, 64)
    with torch.no_grad(), time_limit(model, 0), pytest.raises(ValueError, match="seconds"):
        model(pixels)
    with torch.no_grad(), time_limit(model, 60):
        model(pixels)
        assert model(pixels).logits.shape[1] == 3


@pytest.mark.parametrize("classes", [5, 300])
def test_each_class_has_a_mask_a_share_and_its_color(classes):
    ids = np.minimum(np.random.default_rng(0).integers(0, classes + 1, (40, 30)), classes - 1)
    ids[:20] = classes - 1
    ids[0] = 65535  # void
    palette = [[i % 256, 255 - i % 256, 7] for i in range(classes)]
    (image, masks), colors = annotated(Answer(photo((30, 40)), ids, [f"c{i}" for i in range(classes)], palette))
    assert image.size == (30, 40) and len(masks) == len(np.unique(ids)) - 1
    assert masks[0][1].startswith(f"c{classes - 1} ")
    for mask, label in masks:
        index = int(label.split()[0][1:])
        assert (mask == (ids == index)).all() and colors[label] == "#{:02x}{:02x}{:02x}".format(*palette[index])


def test_large_images_are_shown_smaller():
    answer = Answer(photo((3200, 160)), np.zeros((160, 3200), int), ["sky"], [[0, 0, 0]])
    (image, [(mask, label)]), _ = annotated(answer)
    assert image.size == (1024, 51) and mask.shape == (51, 1024) and label == "sky 100 %"


def test_uncertain_pixels_have_no_class(app_models, tmp_path):
    answer = segment(app_models, photo(), "random", threshold=1.0)
    assert (answer.segmentation == 255).all() and annotated(answer)[0][1] == []
    assert (np.asarray(Image.open(save_mask(answer, tmp_path, "x.png"))) == 255).all()


def test_downloads(app_models, tmp_path):
    answer = segment(app_models, photo(), "random")
    mask = save_mask(answer, tmp_path / "new", "holiday.x.png")
    assert mask == tmp_path / "new" / "holiday.x_mask.png"
    image = Image.open(mask)
    assert image.mode == "P" and (np.asarray(image) == answer.segmentation).all()
    assert Image.open(save_overlay(answer, tmp_path, "holiday")).height > 64
