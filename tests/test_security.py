"""Files of strangers run no code and write nowhere else, nor exhaust memory (`test_bombs.py`); secrets stay secret."""

import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from denseclip_hf.conversion import CheckpointError, read_checkpoint
from denseclip_hf.data import SampleReader, file_stem, load_segmentation_dataset, read_image
from denseclip_hf.evaluation import EvaluationArguments, measure
from denseclip_hf.inference import find_sources, load_model, predict_sources
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from denseclip_hf.training.checkpoints import write_manifest
from helpers.forked import run_script
from helpers.models import segmenter, tiny_model
from helpers.sample_data import save_data
from helpers.training import TINY as TINY_OPTIONS
from helpers.training import TINY_CLIP, trainer_for, write_folder


ROOT = Path(__file__).parent.parent
SECRET = "hf_ThisTokenMustNotAppearAnywhere"


# No code of others


class Payload:
    """Unpickled without care, it makes a directory."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """What a payload would make; it must not be there at the end."""
    path = tmp_path / "the payload ran"
    yield path
    assert not path.exists()


@pytest.mark.parametrize(
    "write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x, 2))], ids=["zip", "bare"]
)
def test_code_in_a_checkpoint_is_not_run(tmp_path, marker, write):
    write({"meta": Payload(marker)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="mkdir"):
        read_checkpoint(tmp_path / "x.pth")


def test_code_in_a_model_directory_is_not_run(tmp_path, marker):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, folder / "pytorch_model.bin")
    DenseCLIPImageProcessorPil().save_pretrained(folder)
    with pytest.raises(ValueError, match=str(folder)):
        load_model(str(folder))
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match=str(folder)):
        load_model(str(folder))


def test_code_in_a_checkpoint_to_resume_from_is_not_run(tmp_path, marker):
    trainer_for(tmp_path / "run", max_steps=2, save_strategy="steps", save_steps=2, evaluate=False).train()
    for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        checkpoint = shutil.copytree(tmp_path / "run" / "checkpoint-2", tmp_path / file / "checkpoint-2")
        torch.save({"x": Payload(marker)}, checkpoint / file)
        (checkpoint / "manifest.json").unlink()
        write_manifest(checkpoint)  # as whoever made the file would
        trainer = trainer_for(tmp_path / file, evaluate=False)
        if file == "training_args.bin":  # which nothing reads
            trainer.train(resume_from_checkpoint=str(checkpoint))
        else:
            with pytest.raises(Exception, match="mkdir"):
                trainer.train(resume_from_checkpoint=str(checkpoint))


@pytest.mark.parametrize("layout", ["folder", "tar", "parquet"])
@pytest.mark.parametrize("hostile", ["0.jpg", "0.png"])
def test_code_in_a_data_set_is_not_run(tmp_path, marker, layout, hostile):
    root = write_folder(tmp_path / "folder", 1)
    files = {"0.jpg": root / "images" / "0.jpg", "0.png": root / "masks" / "0.png", "0.pkl": root / "0.pkl"}
    for name in (hostile, "0.pkl"):
        files[name].write_bytes(pickle.dumps(Payload(marker)))
    columns = {}
    if layout == "tar":
        columns = {"image_column": "jpg", "label_column": "png"}
        root = tmp_path / "tar"
        root.mkdir()
        with tarfile.open(root / "train.tar", "w") as archive:
            for name, file in files.items():
                archive.add(file, name)
    elif layout == "parquet":
        root = tmp_path / "parquet"
        columns = {"image_column": "0.jpg", "label_column": "0.png"}
        root.mkdir()
        cells = {name: [{"path": name, "bytes": files[name].read_bytes()}] for name in ("0.jpg", "0.png")}
        features = datasets.Features({name: datasets.Image(decode=False) for name in cells})
        datasets.Dataset.from_dict(cells, features).to_parquet(root / "train.parquet")
    with pytest.raises(ValueError, match=hostile):
        load_segmentation_dataset(root, classes=["sky", "road", "car"], **columns)


def test_images_start_no_program(tmp_path, marker):
    """Pillow would hand PostScript, whatever its file is called, to Ghostscript."""
    (tmp_path / "x.jpg").write_text(f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n({marker}) (w) file\n%%EOF\n")
    with pytest.raises(ValueError, match="x.jpg"):
        read_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("address", ["reference://x::http://host/y.json", "sftp://host/x.png", "zip://x::ssh://h/y"])
def test_a_data_set_chooses_no_odd_protocol(address):
    with pytest.raises(ValueError, match="address"):
        read_image({"path": address, "bytes": None})


# Nothing is written elsewhere


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("../../x.jpg", "x"),
        ("..\\..\\x.jpg", "x"),
        ("C:\\a\\x.jpg", "x"),
        ("..", ""),
        ("/", ""),
        ("a\0b\n.png", "a_b_"),
        ("x" * 300 + ".png", "x" * 200),
        ("ü" * 200 + ".png", "ü" * 100),
        ("not utf-8 \udcff.png", "not utf-8 _"),
        ("sky at night.v2.tif", "sky at night.v2"),
        (".hidden", "hidden"),
    ],
)
def test_names_of_results_are_no_paths(name, stem):
    assert file_stem(name) == stem


def test_predictions_stay_in_their_folder(tmp_path):
    inputs, out = tmp_path / "in", tmp_path / "out"
    for folder in ("a", "b", "c"):
        (inputs / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(inputs / folder / "x.png")
    long = inputs / ("n" * 250 + ".png")
    (inputs / "link.png").symlink_to(inputs / "a" / "x.png")
    Image.new("RGB", (64, 64)).save(long)
    odd = inputs / "..\\..\\y?.png"
    Image.new("RGB", (64, 64)).save(odd)
    out.mkdir()
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (out / "x_mask.png").symlink_to(victim)
    sources, _ = find_sources([inputs / "a" / ".." / "a" / "x.png", inputs / "b", inputs / "c", inputs])
    summary = predict_sources(segmenter(), sources, out, overwrite=True, progress=False)
    assert not summary.problems and summary.done == 6
    assert victim.read_text() == "precious" and not (out / "x_mask.png").is_symlink()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out", "victim"}
    expected = {"x", "x_2", "x_3", "link", "n" * 200, "y_"}
    assert {path.name.removesuffix("_mask.png") for path in out.glob("*_mask.png")} == expected


def test_evaluated_images_stay_in_their_folder(tmp_path):
    paths = ["../../../x.png", "/etc/x.png", "a\0b.png", "n" * 5000, "..", "zip://a/../b::c/d"]
    tiny_model().save_pretrained(tmp_path / "model")
    DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(tmp_path / "model")
    stream, mask = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (64, 64)).save(stream, "PNG")
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(mask, "PNG")
    rows = {
        "image": [{"path": path, "bytes": stream.getvalue()} for path in paths],
        "mask": [{"path": path, "bytes": mask.getvalue()} for path in paths],
    }
    features = datasets.Features({name: datasets.Image(decode=False) for name in rows})
    splits = datasets.DatasetDict(validation=datasets.Dataset.from_dict(rows, features))
    splits.save_to_disk(tmp_path / "data")
    before = {str(file) for file in tmp_path.rglob("*")}
    args = EvaluationArguments(
        model=str(tmp_path / "model"), dataset=str(tmp_path / "data"), output_dir=str(tmp_path / "out" / "deep"),
        classes="class 0,class 1,class 2", save_predictions=True,
    )  # fmt: skip
    measure(args)
    after = {str(file) for file in tmp_path.rglob("*")} - before
    assert all(file.startswith(str(tmp_path / "out")) for file in after)
    predictions = sorted((tmp_path / "out" / "deep" / "predictions").iterdir())
    assert [prediction.name[:6] for prediction in predictions] == [f"{number:06}" for number in range(len(paths))]
    assert all(Image.open(prediction).size == (64, 64) for prediction in predictions)


# Secrets


def files_with(secret, folder):
    return [file for file in folder.rglob("*") if file.is_file() and secret.encode() in file.read_bytes()]


@pytest.mark.slow
def test_tokens_appear_in_no_file_and_no_line(tmp_path):
    data = write_folder(tmp_path / "data", 6)
    recipe = {
        "clip_config": TINY_CLIP, "config": TINY_OPTIONS, "dataset": str(data), "crop_size": 64, "scale_long": 128,
        "max_steps": 2, "per_device_train_batch_size": 2, "save_strategy": "steps", "save_steps": 1, "use_cpu": True,
        "output_dir": str(tmp_path / "run"), "report_to": "tensorboard", "logging_steps": 1, "log_level": "debug",
    }  # fmt: skip
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    environment = {**os.environ, "HF_TOKEN": SECRET, "HUGGING_FACE_HUB_TOKEN": SECRET, "HF_HUB_OFFLINE": "1"}
    output = tmp_path / "measured"
    commands = [
        ["train.py", tmp_path / "recipe.json", "--hub_token", SECRET],
        ["evaluate.py", "--model", tmp_path / "run", "--dataset", data, "--output_dir", output],
    ]
    for command in commands:
        code, said = run_script(ROOT / "scripts" / command[0], *command[1:], environment=environment)
        assert code == 0 and SECRET not in said, said
    assert files_with(SECRET, tmp_path) == []
    assert (output / "evaluation.json").exists() and (tmp_path / "run" / "checkpoint-1").is_dir()


def test_passwords_in_addresses_are_not_shown(tmp_path):
    for scheme in ("http", "HTTP"):
        sources, _ = find_sources([f"{scheme}://user:{SECRET}@127.0.0.1:9/x.png?token={SECRET}"])
        (problem,) = predict_sources(segmenter(), sources, tmp_path, timeout=0.5, progress=False).problems
        assert f"{scheme}://127.0.0.1:9/x.png" in problem and SECRET not in problem


@pytest.mark.parametrize("start", ["http", "HTTP", "zip://a b#1.png::http"])
def test_passwords_in_addresses_of_a_data_set_are_not_shown(start):
    address = f"{start}://user:{SECRET}@127.0.0.1:9/x y.png?sig={SECRET}#{SECRET}"
    with pytest.raises((OSError, ValueError), match="(?i)http://127.0.0.1:9/x y.png ") as caught:
        read_image(address)
    assert SECRET not in str(caught.value)
    with pytest.raises(ValueError, match="http://127.0.0.1:9/x.png") as caught:
        content = io.BytesIO()
        Image.new("RGB", (2, 2), "red").save(content, "png")
        address = f"http://user:{SECRET}@127.0.0.1:9/x.png?{SECRET}"
        SampleReader(2).read_mask({"path": address, "bytes": content.getvalue()})
    assert SECRET not in str(caught.value)


def test_paths_in_classes_json_are_names(tmp_path):
    """Whatever a class is called, it is text: nothing is opened, and no file gets its name as a path."""
    names = save_data(tmp_path / "data", names=["../../etc/passwd", "/etc/passwd", "file:///etc/passwd"])
    data = load_segmentation_dataset(names)
    assert list(data.id2label.values()) == ["../../etc/passwd", "/etc/passwd", "file:///etc/passwd"]
