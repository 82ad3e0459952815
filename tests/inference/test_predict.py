"""Segmenting pictures: the script, what it writes and leaves alone, and the words it is asked for."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from denseclip_hf import DenseCLIPForSemanticSegmentation
from denseclip_hf.cli import predict
from denseclip_hf.data import parse_classes
from denseclip_hf.inference import find_sources, predict_sources
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from helpers.images import photo
from helpers.models import segmenter, tiny_model, varied


SIZES = {"a": (90, 70), "b": (64, 100), "c": (90, 70), "d": (70, 90), "e": (90, 70)}


@pytest.fixture(scope="module")
def script():
    return predict


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for seed, (name, size) in enumerate(SIZES.items()):
        photo(size, seed).save(folder / f"{name}.png")
    return folder


# The script


def test_script_writes_masks_overlays_and_heat_maps(script, word_model_dir, photos, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--model", str(word_model_dir), "--output_dir", str(out), "--score_maps", "tree,a red car"]
    assert script.main([str(photos), *flags, "--batch_size", "2"]) == 0
    assert "5 segmented" in capsys.readouterr().out
    assert len(list(out.iterdir())) == 5 * 4
    model = DenseCLIPForSemanticSegmentation.from_pretrained(word_model_dir)
    processor = DenseCLIPImageProcessorPil.from_pretrained(word_model_dir)
    for name, (width, height) in SIZES.items():
        mask = Image.open(out / f"{name}_mask.png")
        assert (mask.mode, mask.size) == ("P", (width, height))
        with torch.no_grad():
            outputs = model(**processor(Image.open(photos / f"{name}.png"), return_tensors="pt"))
        expected = processor.post_process_semantic_segmentation(outputs, [(height, width)])[0].numpy()
        assert (np.asarray(mask) == expected).mean() > 0.999
        overlay = Image.open(out / f"{name}_overlay.png")
        assert overlay.width == width and overlay.height > height
        for score in ("score_0_tree", "score_1_a-red-car"):
            assert Image.open(out / f"{name}_{score}.png").size == (width, height)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_script_segments_new_words_in_any_precision(script, word_model_dir, photos, tmp_path, dtype):
    flags = ["--model", str(word_model_dir), "--output_dir", str(tmp_path / "out"), "--inference_mode", "slide"]
    words = ["--words", "a cat,dog,grass,house", "--templates", "--score_maps", "dog"]
    assert script.main([str(photos / "a.png"), *flags, *words, "--dtype", dtype]) == 0
    assert np.asarray(Image.open(tmp_path / "out" / "a_mask.png")).max() < 4


def test_script_reads_sentences_with_commas_from_a_file(script, word_model_dir, photos, tmp_path):
    (tmp_path / "words.txt").write_text("\ufeffa tall, green tree\nsky\n\n", encoding="utf-8")
    words = str(tmp_path / "words.txt")
    flags = ["--model", str(word_model_dir), "--output_dir", str(tmp_path / "out")]
    assert script.main([str(photos / "a.png"), *flags, "--words", words, "--score_maps", words]) == 0
    names = {file.name for file in (tmp_path / "out").iterdir()} - {"classes.json"}
    assert names == {"a_mask.png", "a_overlay.png", "a_score_0_a-tall--green-tree.png", "a_score_1_sky.png"}


def test_words_are_kept_beside_their_masks(script, word_model_dir, photos, tmp_path, capsys):
    flags = ["--model", str(word_model_dir), "--output_dir", str(tmp_path / "out")]
    for name in "ab":
        assert script.main([str(photos / f"{name}.png"), *flags, "--words", "sky,häuser"]) == 0
    assert parse_classes(tmp_path / "out" / "classes.json").id2label == {0: "sky", 1: "häuser"}
    with pytest.raises(SystemExit, match="^1$"):
        script.main([str(photos / "c.png"), *flags, "--words", "sky"])
    assert "classes.json is there already, of other words: choose another folder" in capsys.readouterr().err
    assert script.main([str(photos / "c.png"), *flags, "--words", "sky", "--overwrite"]) == 0
    assert parse_classes(tmp_path / "out" / "classes.json").id2label == {0: "sky"}
    with pytest.raises(SystemExit, match="^1$"):  # the ids of the model's own classes are others too
        script.main([str(photos / "d.png"), *flags])
    assert "classes.json is there already, of other words" in capsys.readouterr().err
    names = json.loads((word_model_dir / "config.json").read_text())["id2label"]
    own = {"id2label": names, "palette": [[1, 2, 3]] * len(names)}
    (tmp_path / "out" / "classes.json").write_text(json.dumps(own))
    assert script.main([str(photos / "d.png"), *flags]) == 0  # of a data set with the same classes
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == own


def test_a_file_of_words_that_is_missing_is_one_sentence(script, photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.main([str(photos), "--model", "x", "--words", str(tmp_path / "none.txt")])
    assert "none.txt" in capsys.readouterr().err


def test_help_tells_the_largest_picture_and_the_defaults(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels" in shown
    assert all(f"(default: {value})" in shown for value in ("outputs/predictions", 1, 0.6, 20.0))


def test_script_goes_on_after_what_it_can_not_read(script, word_model_dir, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"no picture")
    (photos / "zero.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    inputs = [str(photos), str(tmp_path / "empty"), str(tmp_path / "missing.jpg")]
    assert script.main([*inputs, "--model", str(word_model_dir), "--output_dir", str(tmp_path / "out")]) == 1
    out, error = capsys.readouterr()
    assert "5 segmented" in out and "4 problems" in out
    problems = [line for line in error.splitlines() if "tmp" in line]
    assert [p for p in problems if "broken.jpg cannot be read" in p] and [p for p in problems if "zero.png" in p]
    assert "empty holds no images" in error and "/empty/**/*.jpg'" in error and "missing.jpg is no file" in error
    assert "Traceback" not in error and "BytesIO" not in error and "it is none of " in error


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--batch_size", "0"], "at least 1"),
        (["--words", "cat,cat"], "'cat' appears twice"),
        (["--words", "cat,,dog"], "empty"),
        (["--score_maps", "sky,sky"], "'sky' appears twice"),
        (["--words", "word " * 90], "tokens with SOS and EOS"),
        (["--device", "nonsense"], "`--device` 'nonsense' cannot be used"),
    ],
)
def test_script_refuses_bad_flags(script, word_model_dir, photos, tmp_path, capsys, flags, sentence):
    common = [str(photos), "--model", str(word_model_dir), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="^1$"):
        script.main([*common, *flags])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("model", ["nowhere/to/be/found", "/no/folder"])
def test_a_model_that_is_not_there_is_one_sentence(script, photos, tmp_path, capsys, model):
    with pytest.raises(SystemExit, match="^1$"):
        script.main([str(photos), "--model", model, "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert f"{model} is neither a folder here nor a name on the Hub" in said and "or a folder with what" in said


# From sources to files


@pytest.mark.parametrize("existing", ["a_mask.png", "a_overlay.png"])
def test_nothing_is_overwritten_unasked(photos, tmp_path, existing):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / existing).write_text("precious")
    sources, _ = find_sources([photos])
    summary = predict_sources(segmenter(), sources, tmp_path / "out", progress=False)
    assert summary.done == 4 and "is there already" in summary.problems[0] and len(summary.problems) == 1
    assert (tmp_path / "out" / existing).read_text() == "precious"
    assert [file.name for file in (tmp_path / "out").glob("a_*")] == [existing], "half a result is worse than none"
    assert predict_sources(segmenter(), sources, tmp_path / "out", overwrite=True, progress=False).done == 5


def test_batches_give_what_single_pictures_give(photos, tmp_path):
    sources, _ = find_sources([photos])
    calls, model = [], varied(tiny_model("resnet"), segmenter().preprocess(photo(SIZES["a"]))[None])
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for batch_size in (1, 2):
        predict_sources(segmenter(model), sources, tmp_path / str(batch_size), batch_size=batch_size, progress=False)
    assert calls == [1] * 5 + [2, 1, 1, 1]  # a with c, then what is left
    ones, twos = ([np.asarray(Image.open(tmp_path / n / f"{name}_mask.png")) for name in SIZES] for n in "12")
    for one, two in zip(ones, twos, strict=True):
        assert (one == two).mean() > 0.999
    assert (ones[0] == ones[2]).mean() < 0.99  # a and c


def test_more_classes_than_a_palette_are_announced(caplog):
    with caplog.at_level("WARNING"):
        segmenter(tiny_model(num_labels=257, class_token_ids=[[98, 1, 99]] * 257))
    assert "257 classes do not fit a palette" in caplog.text


def test_a_picture_that_can_not_be_preprocessed_is_left_out(tmp_path, photos):
    asked = segmenter()
    asked.image_processor.size = {"height": 10**5, "width": 10**5}
    summary = predict_sources(asked, find_sources([photos])[0], tmp_path / "out", progress=False)
    assert summary.done == 0 and len(summary.problems) == 5 and "would have 100000" in summary.problems[0]


def test_few_pictures_wait_for_their_size(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(20):
        photo((64 + 2 * index, 64)).save(folder / f"{index:02d}.png")
    asked = segmenter()
    prepared, preprocess = [], asked.preprocess
    asked.preprocess = lambda image: prepared.append(1) or preprocess(image)
    waiting, run = [], asked.model.forward
    asked.model.forward = lambda pixels: waiting.append(len(prepared)) or run(pixels)
    predict_sources(asked, find_sources([folder])[0], tmp_path / "out", batch_size=2, progress=False)
    assert waiting[0] == 8 and len(waiting) == 20


@pytest.mark.parametrize(
    ("size", "sentence"),
    [
        ((1, 1), None),
        ((5000, 1), "sides of 32 pixels"),
        ((1, 5000), "sides of 32 pixels"),
        ((300, 20), "sides of 32 pixels"),
    ],
)
def test_extreme_shapes_give_a_result_or_a_sentence(tmp_path, size, sentence):
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    summary = predict_sources(segmenter(), find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    assert summary.done == (sentence is None)
    if sentence:
        assert sentence in summary.problems[0]
    else:
        assert Image.open(tmp_path / "out" / "x_mask.png").size == size


# Words


def test_other_words_need_a_tokenizer():
    with pytest.raises(ValueError, match="'car' is none of the model's classes"):
        segmenter(score_maps=["class 1", "car"])


@pytest.mark.parametrize("option", ["words", "score_maps"])
def test_a_text_is_no_list_of_words(option):
    with pytest.raises(ValueError, match="must be a list of texts"):
        segmenter(**{option: "car"})


def test_a_class_of_several_phrasings_is_called_by_its_first(word_model_dir):
    model = DenseCLIPForSemanticSegmentation.from_pretrained(word_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(word_model_dir)
    asked = segmenter(model, tokenizer=tokenizer, words=[["a person on foot", "a pedestrian"], "sky"])
    assert asked.names == ["a person on foot", "sky"] and len(asked.embeds) == 2


def test_score_maps_of_own_classes_are_the_models():
    asked = segmenter(score_maps=["class 2", "class 0"])
    pixel_values = torch.randn(1, 3, 64, 64)
    (result,) = asked([photo()], pixel_values)
    with torch.no_grad():
        torch.testing.assert_close(result.score_maps, asked.model(pixel_values).score_maps[0, [2, 0]])
