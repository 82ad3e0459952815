"""Refusals that belong to no single module's test: real extremes, full disks, and scripts that end in one sentence."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import pipeline

from denseclip_hf.app.answers import read_upload
from denseclip_hf.cli.convert import main
from denseclip_hf.conversion.release import convert_release
from denseclip_hf.files import OutputError
from denseclip_hf.inference.segmenter import predict_sources
from denseclip_hf.inference.sources import find_sources
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from helpers.checkpoints import NAMES, release, save, tokenizer
from helpers.images import photo
from helpers.models import segmenter, tiny_model


SCRIPTS = Path(__file__).parents[2] / "scripts"
PROCESSOR = DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128})


def save_noise(path, side=70):
    """A picture that no file format shrinks."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path)


def one_line(text):
    """The only line of what a script said."""
    (line,) = text.strip().splitlines()
    return line


# Pictures of no or too many pixels


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "I", "F", "I;16"])
@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_pictures_without_pixels_are_refused(mode, size):
    with pytest.raises(ValueError, match="needs at least one pixel, but this one has the shape .*: leave it out"):
        PROCESSOR(Image.new(mode, size), return_tensors="pt")


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_a_batch_without_pictures_is_refused(kind, mode):
    with pytest.raises(ValueError, match="`pixel_values` holds no image: give at least one"):
        tiny_model(kind, inference_mode=mode)(torch.zeros(0, 3, 64, 64))


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((0, 5), "needs at least one pixel"),
        ((1, 5000), "128 x 1 pixels are too small: both sides must be at least 32 pixels; resize them"),
        ((5000, 1), "1 x 128 pixels are too small"),
    ],
)
def test_the_pipeline_refuses_what_has_no_extent(size, words):
    segment = pipeline("image-segmentation", model=tiny_model(), image_processor=PROCESSOR)
    with pytest.raises(ValueError, match=words):
        segment(Image.new("RGB", size))


def test_the_pipeline_takes_a_single_pixel_and_16_bits():
    segment = pipeline("image-segmentation", model=tiny_model(), image_processor=PROCESSOR)
    for image in (Image.new("RGB", (1, 1)), Image.fromarray(np.full((20, 30), 40_000, np.uint16))):
        found = segment(image)
        assert found and all(one["mask"].size == image.size for one in found)


def test_a_hundred_megapixels_are_refused_unseen(tmp_path):
    """A real one, of black and white so that the file is small; and it is no reason to stop for the others."""
    Image.new("1", (10_000, 10_000)).save(tmp_path / "huge.png")
    photo().save(tmp_path / "small.png")
    words = r"huge.png has more pixels than are decoded \(.*100000000 pixels.*\); shrink it, or raise"
    summary = predict_sources(segmenter(), find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    assert summary.done == 1 and len(summary.problems) == 1
    assert re.search(words, summary.problems[0])
    with pytest.raises(ValueError, match=f"^{words}"):
        read_upload(tmp_path / "huge.png")


# Places that cannot be written


@pytest.mark.parametrize(("name", "reason"), [("file", "File exists"), ("file/out", "Not a directory")])
def test_predictions_need_a_directory(tmp_path, name, reason):
    (tmp_path / "file").write_text("precious")
    photo().save(tmp_path / "a.png")
    words = f"output directory .*{name} cannot be written .{reason}.: name another"
    with pytest.raises(OutputError, match=words):
        predict_sources(segmenter(), find_sources([tmp_path / "a.png"])[0], tmp_path / name, progress=False)
    assert (tmp_path / "file").read_text() == "precious"


def test_predictions_on_a_disk_that_fills_up_are_whole_or_absent(tmp_path, small_disk):
    for name in "abc":
        save_noise(tmp_path / f"{name}.png", 150)
    out = small_disk("140k") / "out"
    words = "results could not be written into .*out .No space left on device.: make room there, or name another"
    with pytest.raises(OutputError, match=words):
        predict_sources(segmenter(), find_sources([tmp_path])[0], out, progress=False)
    assert (out / "a_mask.png").exists()
    for file in out.iterdir():
        Image.open(file).load()


def test_long_names_and_words_make_files_all_the_same(tmp_path):
    model = tiny_model()
    long = ["\u8def" * 50, "\u8def" * 51]
    model.config.id2label = {0: long[0], 1: long[1], 2: "sky"}
    photo().save(tmp_path / ("n" * 250 + ".png"))
    asked = segmenter(model, score_maps=long)
    summary = predict_sources(asked, find_sources([tmp_path])[0], tmp_path / "out", progress=False)
    assert summary.done == 1 and not summary.problems and len(list((tmp_path / "out").iterdir())) == 4


def test_a_release_leaves_nothing_on_a_full_disk(tmp_path, small_disk):
    disk = small_disk("64k")
    words = r"model could not be written \(.*No space left on device.*\); nothing is left of it: make room, or name"
    with pytest.raises(OutputError, match=words):
        convert_release(save(tmp_path, release()), disk / "parent" / "model", tokenizer())
    assert not list(disk.iterdir())


# Checkpoints


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["sky", "sky", *NAMES[2:]], "'sky' stands there twice"),
        (["sky", " ", *NAMES[2:]], "one is empty or no text"),
        (NAMES[:4], "`meta` names 4 classes, but the checkpoint was trained on 5: give a file of those names"),
    ],
)
def test_class_names_in_a_release_that_are_refused(tmp_path, names, words):
    path = save(tmp_path, release(CLASSES=tuple(names), PALETTE=None))
    with pytest.raises(ValueError, match=words):
        convert_release(path, tmp_path / "model", tokenizer())
    assert not (tmp_path / "model").exists()


class Evil:
    """Asks for a program when it is unpickled."""

    def __reduce__(self):
        return os.system, ("true",)


def cut(path):
    path.write_bytes(path.read_bytes()[:-2000])
    return path


BAD_CHECKPOINTS = {
    "no checkpoint": (
        lambda p: p.write_text("<html>") and p,
        "no checkpoint: download it again",
    ),
    "cut off": (
        lambda p: cut(save(p.parent, release(), p.name)),
        "is cut off",
    ),
    "code": (
        lambda p: save(p.parent, {"state_dict": {}, "hook": Evil()}, p.name),
        r"asks for \w+\.system, and only tensors and plain data are read; ask its authors for a file without\.$",
    ),
    "another model": (
        lambda p: save(p.parent, {"state_dict": {"fc.weight": torch.zeros(2, 2)}}, p.name),
        r"^error: this is not a .*: it has no \S+ of 4 axes; name one that is\.$",
    ),
}


@pytest.mark.parametrize("script", ["release", "clip"])
@pytest.mark.parametrize("case", BAD_CHECKPOINTS)
def test_converters_end_in_one_line(tmp_path, capsys, script, case):
    build, words = BAD_CHECKPOINTS[case]
    path = build(tmp_path / "x.pth")
    with pytest.raises(SystemExit, match="^1$"):
        main([script, str(path), str(tmp_path / "parent" / "out")])
    assert re.search(words, one_line(capsys.readouterr().err))
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_a_detection_checkpoint_is_one_line(tmp_path, capsys):
    content = release()
    content["state_dict"]["roi_head.bbox_head.fc_cls.weight"] = torch.zeros(1)
    path = save(tmp_path, content)
    with pytest.raises(SystemExit, match="^1$"):
        main(["release", str(path), str(tmp_path / "out")])
    said = one_line(capsys.readouterr().err)
    words = "error: this is a detection checkpoint, but only semantic segmentation models are converted: name"
    assert said.startswith(words)
    assert not (tmp_path / "out").exists()
