"""Segmenting many images: what is written, what is left out while the others go on, words, windows and certainty."""

import json
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from denseclip_hf import DenseCLIPForSemanticSegmentation
from denseclip_hf.inference import find_sources, predict_sources, segment_in_windows, sliding_window_logits
from denseclip_hf.words import WordOptions, WordReader
from helpers.images import PHOTO_SIZES, photo
from helpers.models import Tokenizer, segmenter, tiny_model, varied


# From sources to files


@pytest.mark.parametrize("existing", ["a_mask.png", "a_overlay.png"])
def test_nothing_is_overwritten_unasked(photos, tmp_path, existing):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / existing).write_text("precious")
    sources, _ = find_sources([photos])
    summary = predict_sources(segmenter(), sources, tmp_path / "out", progress=False)
    assert summary.done == 4 and existing in summary.problems[0] and len(summary.problems) == 1
    assert (tmp_path / "out" / existing).read_text() == "precious"
    assert [file.name for file in (tmp_path / "out").glob("a_*")] == [existing], "half a result is worse than none"
    assert predict_sources(segmenter(), sources, tmp_path / "out", overwrite=True, progress=False).done == 5


def test_batches_give_what_single_images_give(photos, tmp_path):
    sources, _ = find_sources([photos])
    calls, model = [], varied(tiny_model("resnet"), segmenter().preprocess(photo(PHOTO_SIZES["a"]))[None])
    model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    for batch_size in (1, 2):
        predict_sources(segmenter(model), sources, tmp_path / str(batch_size), batch_size=batch_size, progress=False)
    assert calls == [1] * 5 + [2, 1, 1, 1]  # a with c, then what is left
    ones, twos = ([np.asarray(Image.open(tmp_path / n / f"{name}_mask.png")) for name in PHOTO_SIZES] for n in "12")
    for one, two in zip(ones, twos, strict=True):
        assert (one == two).mean() > 0.999
    assert (ones[0] == ones[2]).mean() < 0.99  # a and c


def test_an_image_that_cannot_be_preprocessed_is_left_out(tmp_path, photos):
    asked = segmenter()
    asked.image_processor.size = {"height": 10**5, "width": 10**5}
    summary = predict_sources(asked, find_sources([photos])[0], tmp_path / "out", progress=False)
    assert summary.done == 0 and len(summary.problems) == 5 and "100000" in summary.problems[0]


def test_few_images_wait_for_their_size(tmp_path):
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
    assert 8 <= waiting[0] <= 16 and len(waiting) == 20  # four batches, and what is read ahead


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (300, 20)])
def test_extreme_shapes_give_a_result_or_a_sentence(tmp_path, size):
    Image.new("RGB", size, "red").save(tmp_path / "x.png")
    summary = predict_sources(segmenter(), find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    assert summary.done == (size == (1, 1))
    if summary.done:
        assert Image.open(tmp_path / "out" / "x_mask.png").size == size
    else:
        assert "32 pixels" in summary.problems[0]


# The manifest, and going on


def manifest(folder):
    return [json.loads(line) for file in sorted(folder.glob("manifest*.jsonl")) for line in file.open()]


def test_the_manifest_says_what_became_of_each_image(photos, tmp_path):
    (photos / "bad.png").write_bytes(b"no image")
    summary = predict_sources(segmenter(), find_sources([photos])[0], tmp_path / "out", progress=False)
    assert (summary.done, summary.skipped, len(summary.problems)) == (5, 0, 1)
    entries = {entry["source"]: entry for entry in manifest(tmp_path / "out")}
    assert "bad.png" in entries.pop(str(photos / "bad.png"))["problem"]
    assert {name: entry["files"] for name, entry in entries.items()} == {
        str(photos / f"{name}.png"): [f"{name}_mask.png", f"{name}_overlay.png"] for name in PHOTO_SIZES
    }
    written = {name for entry in entries.values() for name in entry["files"]} | {"manifest.jsonl"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == written


def test_the_same_call_goes_on_where_it_stopped(photos, tmp_path):
    """Also where it was killed while it wrote a line, or between a line and the files."""
    sources, _ = find_sources([photos])
    asked, calls = segmenter(varied(tiny_model())), []
    asked.model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    predict_sources(asked, sources[:3], tmp_path / "out", progress=False)
    with (tmp_path / "out" / "manifest.jsonl").open("a") as file:
        file.write('{"source": "ha')
    (tmp_path / "out" / "b_overlay.png").unlink()
    before = {name: (tmp_path / "out" / f"{name}_mask.png").stat().st_mtime_ns for name in "ac"}
    summary = predict_sources(asked, sources, tmp_path / "out", progress=False)
    assert (summary.done, summary.skipped, summary.problems, len(calls)) == (3, 2, [], 6)
    assert before == {name: (tmp_path / "out" / f"{name}_mask.png").stat().st_mtime_ns for name in "ac"}
    predict_sources(asked, sources, tmp_path / "whole", progress=False)
    names = {file.name for file in (tmp_path / "whole").glob("*.png")}
    assert names == {file.name for file in (tmp_path / "out").glob("*.png")} and len(names) == 10
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("change", ["weights", "opacity", "image", "overwrite"])
def test_what_would_differ_is_not_taken_for_done(photos, tmp_path, change):
    sources, _ = find_sources([photos / "a.png"])
    model, options = tiny_model(), {"progress": False}
    predict_sources(segmenter(model), sources, tmp_path, **options)
    if change == "weights":
        with torch.no_grad():
            model.decode_head.classifier.bias += 1e-3
    elif change == "image":
        photo((90, 70), 7).save(photos / "a.png")
    else:
        options[change] = 0.5
    summary = predict_sources(segmenter(model), sources, tmp_path, **options)
    if change == "overwrite":
        assert (summary.done, summary.skipped) == (1, 0)
    else:
        assert (summary.done, summary.skipped) == (0, 0) and "a_mask.png is there already" in summary.problems[0]


def test_what_was_overwritten_with_other_settings_is_not_taken_for_done(photos, tmp_path):
    sources, _ = find_sources([photos / "a.png"])
    for opacity, overwrite in ((0.6, False), (0.2, True), (0.6, False)):
        options = {"opacity": opacity, "overwrite": overwrite, "progress": False}
        summary = predict_sources(segmenter(), sources, tmp_path, **options)
    assert (summary.done, summary.skipped, len(summary.problems)) == (0, 0, 1)


def test_a_manifest_of_something_else_stays(photos, tmp_path):
    (tmp_path / "manifest.jsonl").write_text('{"image": "x.png"}\n')
    with pytest.raises(ValueError, match="manifest.jsonl"):
        predict_sources(segmenter(), find_sources([photos])[0], tmp_path, overwrite=True, progress=False)
    assert (tmp_path / "manifest.jsonl").read_text() == '{"image": "x.png"}\n'


def test_images_are_read_while_the_model_runs(photos, tmp_path):
    """The first image's pass ends only when the second has been read."""
    asked, read = segmenter(), threading.Event()
    preprocess, run = asked.preprocess, asked.model.forward
    asked.preprocess = lambda image: image.filename.endswith("b.png") and read.set() or preprocess(image)
    asked.model.forward = lambda pixels: run(pixels) if read.wait(60) else pytest.fail("nothing is read meanwhile")
    assert predict_sources(asked, find_sources([photos])[0], tmp_path / "out", progress=False).done == 5


def test_several_processes_share_the_images_out(photos, tmp_path):
    sources, _ = find_sources([photos])
    for rank, done in ((0, 3), (1, 2)):
        summary = predict_sources(segmenter(), sources, tmp_path / "out", rank=rank, world=2, progress=False)
        assert (summary.done, summary.problems) == (done, [])
    assert sorted(entry["source"] for entry in manifest(tmp_path / "out")) == [source.address for source in sources]
    summary = predict_sources(segmenter(), sources, tmp_path / "out", progress=False)
    assert (summary.done, summary.skipped) == (0, 5)


# Words


def test_other_words_need_a_tokenizer():
    with pytest.raises(ValueError, match="tokenizer"):
        segmenter(score_maps=["class 1", "car"])


def test_embeddings_of_many_words_are_kept_on_disk(word_model_dir, tmp_path, monkeypatch):
    """For the next process, as long as words, templates and weights are the same; a few sets, and no broken file."""
    monkeypatch.setattr("denseclip_hf.words.MANY_WORDS", 20)
    monkeypatch.setattr("denseclip_hf.words.WORDS_PER_STEP", 8)
    monkeypatch.setattr("denseclip_hf.words.cached_assets_path", lambda *_: tmp_path)
    model = DenseCLIPForSemanticSegmentation.from_pretrained(word_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(word_model_dir)
    words = tuple(f"{'tall ' * (i % 3)}tree {i}" for i in range(20))
    expected, encode_texts, passes = model.encode_texts(list(words), tokenizer), model.encode_texts, []
    monkeypatch.setattr(model, "encode_texts", lambda *asked: passes.append(len(asked[0])) or encode_texts(*asked))

    def steps(words=words, templates=None):
        passes.clear()
        found = WordReader(model, tokenizer).encode(words, templates)
        if templates is None and words[0] == "tree 0":
            torch.testing.assert_close(found, expected[: len(words)], atol=1e-5, rtol=1e-4)
        return passes.copy()

    assert steps() == [8, 8, 4] and steps() == []
    assert steps(templates=["a {}."]) == [8, 8, 4] and steps(words[::-1]) == [8, 8, 4]
    assert steps(words[:19]) == [8, 8, 3] == steps(words[:19])  # few are not kept
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    assert steps() == [8, 8, 4] and steps() == []
    with torch.no_grad():
        model.clip.text_model.final_layer_norm.weight += 1e-3
    expected = encode_texts(list(words), tokenizer)
    assert steps() == [8, 8, 4]
    for number in range(12):
        steps((f"word {number}", *words[1:]))
    assert len(list(tmp_path.iterdir())) == 8


@pytest.mark.parametrize("option", ["words", "score_maps"])
def test_a_text_is_no_list_of_words(option):
    with pytest.raises(ValueError, match="list"):
        segmenter(**{option: "car"})


def test_a_class_of_several_phrasings_is_called_by_its_first(word_model_dir):
    model = DenseCLIPForSemanticSegmentation.from_pretrained(word_model_dir)
    tokenizer = AutoTokenizer.from_pretrained(word_model_dir)
    asked = segmenter(model, tokenizer=tokenizer, words=[["a person on foot", "a pedestrian"], "sky"])
    assert asked.names == ["a person on foot", "sky"] and len(asked.queries[0]) == 3


def test_score_maps_of_own_classes_are_the_models():
    asked = segmenter(score_maps=["class 2", "class 0"])
    pixel_values = torch.randn(1, 3, 64, 64)
    (result,) = asked([photo()], pixel_values)
    with torch.no_grad():
        torch.testing.assert_close(result.score_maps, asked.model(pixel_values).score_maps[0, [2, 0]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_an_image_without_finite_scores_is_left_out(tmp_path, bad):
    """Of one batch only this one; its numbers are as if float16 had overflowed."""
    for name in "abc":
        photo().save(tmp_path / f"{name}.png")
    asked, calls = segmenter(), []
    asked.preprocess = lambda image: torch.full((3, 64, 96), bad if image.filename.endswith("b.png") else 0.0)
    asked.model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    summary = predict_sources(asked, find_sources([tmp_path])[0], tmp_path / "out", batch_size=3, progress=False)
    assert summary.done == 2 and calls == [3, 1, 1, 1]
    (problem,) = summary.problems
    assert problem.startswith("b: ") and "NaN" in problem
    assert sorted(file.name[0] for file in (tmp_path / "out").glob("*.png")) == ["a", "a", "c", "c"]


@pytest.mark.parametrize("option", ["words", "score_maps"])
def test_embeddings_that_are_not_finite_are_refused(option):
    model = tiny_model()
    model.encode_texts = lambda texts, *_: torch.full((len(texts), 12), float("nan"))
    asked = segmenter(model, tokenizer=Tokenizer(), **{option: ["a cat"]})
    with pytest.raises(ValueError, match="NaN"):
        asked([photo()])


# At their own resolution


@pytest.mark.parametrize("kind", ["vit", "resnet"])
def test_windows_at_native_resolution_are_those_of_the_whole_image(kind):
    """In bands and strips, with memory for three windows, as averaged over the whole image at once."""
    image = photo((304, 176))
    model = varied(tiny_model(kind, crop_size=64, stride=48, sliding_window_batch_size=3))
    asked = segmenter(model, native_resolution=True, certainty=True)
    pixels = asked.image_processor(image, do_resize=False, return_tensors="pt")["pixel_values"]
    logits = sliding_window_logits(model, pixels, 64, 48)[0]
    for ids, certainty in (
        segment_in_windows(model, image, asked.image_processor, max_scores=3 * 64 * 100),
        asked([image])[0][:2],
    ):
        assert ids.shape == (176, 304) and (ids == logits.argmax(0)).float().mean() > 0.999
        torch.testing.assert_close(certainty.float(), logits.softmax(0).amax(0), atol=1e-3, rtol=0)


# What is not certain


def test_pixels_below_the_threshold_have_no_class(tmp_path):
    photo().save(tmp_path / "a.png")
    asked = segmenter(varied(tiny_model()), options=WordOptions(threshold=0.4), certainty=True)
    image = Image.open(tmp_path / "a.png").convert("RGB")
    with torch.no_grad():
        logits = asked.model(asked.preprocess(image)[None]).logits
    probabilities = torch.nn.functional.interpolate(logits, (64, 96), mode="bilinear").softmax(1)[0]
    (result,) = asked([image])
    torch.testing.assert_close(result.certainty, probabilities.amax(0), atol=1e-5, rtol=0)
    expected = torch.where(probabilities.amax(0) < 0.4, 255, probabilities.argmax(0))
    assert (result.ids == expected).float().mean() > 0.999 and 0 < (expected == 255).float().mean() < 1
    predict_sources(asked, find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    mask = Image.open(tmp_path / "out" / "a_mask.png")
    assert (np.asarray(mask) == result.ids.numpy()).all()
    assert mask.convert("RGB").getpixel(tuple(map(int, np.argwhere(np.asarray(mask) == 255)[0][::-1]))) == (0, 0, 0)
    shown = np.asarray(Image.open(tmp_path / "out" / "a_certainty.png")) / 255
    assert np.abs(shown - result.certainty.numpy()).max() < 0.01


@pytest.mark.parametrize("threshold", [-0.1, 1.5, float("nan")])
def test_a_threshold_is_a_probability(threshold):
    with pytest.raises(ValueError, match="threshold"):
        segmenter(options=WordOptions(threshold=threshold))
