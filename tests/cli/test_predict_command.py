"""Segmenting images by command: what it writes and leaves alone, and the words it is asked for."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from denseclip_hf import DenseCLIPForSemanticSegmentation
from denseclip_hf.cli.predict import main
from denseclip_hf.data import parse_classes
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from helpers.images import PHOTO_SIZES


def test_it_writes_masks_overlays_and_heat_maps(word_model_dir, photos, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--model", str(word_model_dir), "--output_dir", str(out), "--score_maps", "tree,a red car"]
    assert main([str(photos), *flags, "--batch_size", "2"]) == 0
    assert "5 segmented" in capsys.readouterr().out
    assert len(list(out.glob("*.png"))) == 5 * 4
    model = DenseCLIPForSemanticSegmentation.from_pretrained(word_model_dir)
    processor = DenseCLIPImageProcessorPil.from_pretrained(word_model_dir)
    for name, (width, height) in PHOTO_SIZES.items():
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
def test_it_segments_new_words_in_any_precision(word_model_dir, photos, tmp_path, dtype):
    flags = ["--model", str(word_model_dir), "--output_dir", str(tmp_path / "out"), "--inference_mode", "slide"]
    words = ["--words", "a cat,dog,grass,house", "--templates", "short", "--score_maps", "dog"]
    assert main([str(photos / "a.png"), *flags, *words, "--dtype", dtype]) == 0
    assert np.asarray(Image.open(tmp_path / "out" / "a_mask.png")).max() < 4


def test_it_reads_sentences_with_commas_from_a_file(word_model_dir, photos, tmp_path):
    (tmp_path / "words.txt").write_text("\ufeffa tall, green tree\nsky\n\n", encoding="utf-8")
    words = str(tmp_path / "words.txt")
    flags = ["--model", str(word_model_dir), "--output_dir", str(tmp_path / "out")]
    assert main([str(photos / "a.png"), *flags, "--words", words, "--score_maps", words]) == 0
    names = {file.name for file in (tmp_path / "out").glob("*.png")}
    assert names == {"a_mask.png", "a_overlay.png", "a_score_0_a-tall--green-tree.png", "a_score_1_sky.png"}


@pytest.mark.slow
def test_launched_processes_share_the_images_out(word_model_dir, photos, tmp_path):
    (photos / "broken.jpg").write_bytes(b"no image")
    launcher = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    launcher += " --mixed_precision no --dynamo_backend no"
    options = f"-m denseclip_hf.cli.predict {photos} --model {word_model_dir} --words sky,tree --output_dir"
    command = [sys.executable, *launcher.split(), *options.split(), str(tmp_path / "two")]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ran.returncode == 1 and ran.stdout.count("5 segmented") == 1 and "broken.jpg" in ran.stderr
    assert main([*options.split()[2:], str(tmp_path / "one")]) == 1
    names = {file.name for file in (tmp_path / "one").iterdir()}
    assert {file.name for file in (tmp_path / "two").iterdir()} == names | {"manifest.1.jsonl"}
    for name in names - {"manifest.jsonl"}:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    lines = [line for file in (tmp_path / "two").glob("manifest*") for line in file.read_text().splitlines()]
    assert sorted(lines) == sorted((tmp_path / "one" / "manifest.jsonl").read_text().splitlines())


def test_words_are_kept_beside_their_masks(word_model_dir, photos, tmp_path, capsys):
    flags = ["--model", str(word_model_dir), "--output_dir", str(tmp_path / "out")]
    for name in "ab":
        assert main([str(photos / f"{name}.png"), *flags, "--words", "sky,häuser"]) == 0
    assert parse_classes(tmp_path / "out" / "classes.json").id2label == {0: "sky", 1: "häuser"}
    with pytest.raises(SystemExit, match="^1$"):
        main([str(photos / "c.png"), *flags, "--words", "sky"])
    assert "classes.json" in capsys.readouterr().err
    assert main([str(photos / "c.png"), *flags, "--words", "sky", "--overwrite"]) == 0
    assert parse_classes(tmp_path / "out" / "classes.json").id2label == {0: "sky"}
    with pytest.raises(SystemExit, match="^1$"):  # the ids of the model's own classes are others too
        main([str(photos / "d.png"), *flags])
    assert "classes.json" in capsys.readouterr().err
    names = json.loads((word_model_dir / "config.json").read_text())["id2label"]
    own = {"id2label": names, "palette": [[1, 2, 3]] * len(names)}
    (tmp_path / "out" / "classes.json").write_text(json.dumps(own))
    assert main([str(photos / "d.png"), *flags]) == 0  # of a data set with the same classes
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == own


def test_a_file_of_words_that_is_missing_is_one_sentence(photos, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main([str(photos), "--model", "x", "--words", str(tmp_path / "none.txt")])
    assert "none.txt" in capsys.readouterr().err


def test_it_goes_on_after_what_it_cannot_read(word_model_dir, photos, tmp_path, capsys):
    (photos / "broken.jpg").write_bytes(b"no image")
    (photos / "zero.png").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    inputs = [str(photos), str(tmp_path / "empty"), str(tmp_path / "missing.jpg")]
    assert main([*inputs, "--model", str(word_model_dir), "--output_dir", str(tmp_path / "out")]) == 1
    out, error = capsys.readouterr()
    assert "5 segmented" in out and "4 problems" in out
    assert all(name in error for name in ("broken.jpg", "zero.png", "empty", "missing.jpg"))
    assert "Traceback" not in error and "BytesIO" not in error


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--words", "cat,cat"], "cat"),
        (["--words", "cat,,dog"], "empty"),
        (["--score_maps", "sky,sky"], "sky"),
        (["--words", "word " * 90], "tokens"),
        (["--device", "nonsense"], "nonsense"),
    ],
)
def test_it_refuses_bad_flags(word_model_dir, photos, tmp_path, capsys, flags, named):
    common = [str(photos), "--model", str(word_model_dir), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="^1$"):
        main([*common, *flags])
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("model", ["nowhere/to/be/found", "/no/folder"])
def test_a_model_that_is_not_there_is_one_sentence(photos, tmp_path, capsys, model):
    with pytest.raises(SystemExit, match="^1$"):
        main([str(photos), "--model", model, "--output_dir", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert model in said and "Traceback" not in said
