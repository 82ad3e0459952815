"""Exported programs: the same logits, at any batch and size, without torch where the format allows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForSemanticSegmentation

from denseclip_hf import DenseCLIPForSemanticSegmentation, DenseCLIPImageProcessor
from denseclip_hf.cli.export import main
from denseclip_hf.example.tiny_clip import make_example_tokenizer
from denseclip_hf.sharing.card import write_model_card
from denseclip_hf.sharing.export import check_export, export, run_exported
from helpers.forked import run_script
from helpers.models import tiny_model


ROOT = Path(__file__).parents[2]
HIDE_TORCH = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "denseclip_hf"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
"""
PROCESSOR = DenseCLIPImageProcessor(size={"shortest_edge": 96})


def picture():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 150, 3), dtype=np.uint8))


@pytest.fixture(scope="module", params=["vit", "resnet"])
def exported(request, tmp_path_factory):
    """A model and its two exports."""
    model = tiny_model(request.param)
    files = {}
    for kind in ("onnx", "torch_export"):
        folder = tmp_path_factory.mktemp(kind)
        files[kind] = export(model, PROCESSOR, folder, kind)
    return model, files


@pytest.mark.slow
def test_programs_agree_at_any_batch_and_size(exported):
    model, files = exported
    assert not model.config.frozen_classes  # it stayed as it was
    another = tiny_model("resnet" if model.config.has_resnet else "vit", seed=1)
    for kind, tolerance in (("onnx", 1e-4), ("torch_export", 1e-6)):
        for shape in ((1, 3, 64, 64), (3, 3, 96, 160), (2, 3, 256, 64)):
            pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                expected = model.window_logits(pixels)
            torch.testing.assert_close(run_exported(files[kind], pixels), expected, atol=tolerance, rtol=1e-4)
        assert check_export(model, PROCESSOR, files[kind], picture()) < tolerance
        assert check_export(another, PROCESSOR, files[kind], picture()) > 1e-3
    graph = files["onnx"].read_bytes()
    assert b"text_model" not in graph


@pytest.mark.slow
@pytest.mark.parametrize("size", [{"shortest_edge": 96, "longest_edge": 128}, {"height": 96, "width": 128}])
def test_the_example_of_the_docs_runs_without_torch(exported, tmp_path, size):
    _, files = exported
    DenseCLIPImageProcessor(size=size).save_pretrained(files["onnx"].parent)
    picture().save(tmp_path / "photo.png")
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)
    command = [sys.executable, "-c", HIDE_TORCH + example, files["onnx"].parent, tmp_path / "photo.png"]
    result = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0 and "class" in result.stdout, result.stderr
    assert Image.open(tmp_path / "labels.png").size == (150, 100)


@pytest.fixture
def directory(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    make_example_tokenizer(["sky"], vocab_size=520).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_frozen_directory(directory, tmp_path, images):
    main([str(directory), str(tmp_path / "frozen"), "--format", "frozen"])
    names = {file.name for file in (tmp_path / "frozen").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "README.md"} <= names
    frozen = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "frozen")
    whole = AutoModelForSemanticSegmentation.from_pretrained(directory)
    assert frozen.num_parameters() < whole.num_parameters()
    with torch.no_grad():
        assert torch.equal(frozen(images).logits, whole(images).logits)


def test_a_frozen_model_keeps_its_card(directory, tmp_path):
    picture().save(directory / "example.png")
    results = {"dataset": "example", "split": "val", "metrics": {"mean_iou": 0.4351}}
    known = {"license": "mit", "base_model": "openai/x", "dataset": "someone/streets", "training": {"Steps": 3}}
    before = write_model_card(directory, results=results, picture="example.png", **known).read_text()
    main([str(directory), str(tmp_path / "frozen"), "--format", "frozen"])
    after = (tmp_path / "frozen" / "README.md").read_text()
    assert ModelCard(after).data.to_dict() == ModelCard(before).data.to_dict()
    assert "with its classes frozen" in after and "| 43.51 |" in after and "| Steps | 3 |" in after
    assert (tmp_path / "frozen" / "example.png").read_bytes() == (directory / "example.png").read_bytes()


def test_failures_leave_nothing(directory, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="^1$"):
        main([str(directory), str(tmp_path / "out"), "--image", str(tmp_path / "no.jpg")])
    assert "no.jpg" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_one_sentence(directory, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("denseclip_hf.sharing.export.export_program", lambda model: None)
    monkeypatch.setattr("denseclip_hf.sharing.export._save_onnx", lambda program, path: None)
    with pytest.raises(SystemExit, match="^1$"):
        main([str(directory), str(tmp_path / "out")])
    expected = f"ONNX needs the package {package}: `pip install onnx onnxscript onnxruntime`.\n"
    assert capsys.readouterr().err.endswith(expected)
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["resnet"])
@pytest.mark.parametrize("format", ["onnx", "torch_export", "frozen"])
def test_a_real_full_disk_leaves_nothing(directory, tmp_path, format):
    """The largest file the process may write is 100 kB, as if the disk ended there."""
    command = [ROOT / "scripts" / "export.py", directory, tmp_path / "out" / "model", "--format", format]
    code, said = run_script(*command, largest_file=100_000)
    assert code == 1 and "could not be written" in said.splitlines()[-1] and "Traceback" not in said, said
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("kind", ["resnet"])
@pytest.mark.parametrize(
    "format", ["frozen", *(pytest.param(name, marks=pytest.mark.slow) for name in ("onnx", "torch_export"))]
)
def test_a_disk_that_is_too_small_is_left_empty(directory, small_disk, capsys, format):
    disk = small_disk("64k")
    with pytest.raises(SystemExit, match="^1$"):
        main([str(directory), str(disk / "model"), "--format", format])
    said = capsys.readouterr().err.splitlines()[-1]
    assert "model could not be written (" in said and "nothing is left of it: make room" in said
    assert not list(disk.iterdir())


def test_a_full_disk_leaves_nothing(directory, tmp_path, capsys, monkeypatch):
    def fail_half_way(self, folder, **_):
        (Path(folder) / "config.json").write_text("{")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DenseCLIPForSemanticSegmentation, "save_pretrained", fail_half_way)
    with pytest.raises(SystemExit, match="^1$"):
        main([str(directory), str(tmp_path / "frozen"), "--format", "frozen"])
    assert "frozen could not be written (No space left on device); nothing is left of it" in capsys.readouterr().err
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


def test_the_card_of_a_frozen_model_names_no_path(directory, tmp_path):
    main([str(directory), str(tmp_path / "frozen"), "--format", "frozen"])
    card = (tmp_path / "frozen" / "README.md").read_text()
    assert "# frozen" in card and f"This is `{tmp_path.name} model` with its classes frozen" in card
    assert str(tmp_path) not in card


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match="`kind` must be one of"):
        export(None, None, tmp_path, "coreml")


@pytest.mark.slow
def test_labels_are_beside_the_program(exported):
    labels = json.loads((exported[1]["onnx"].parent / "labels.json").read_text())
    assert labels["id2label"]["0"] == "class 0"
