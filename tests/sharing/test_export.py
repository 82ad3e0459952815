"""Exported programs: the same logits, at any batch and size, without torch where the format allows."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoModelForSemanticSegmentation, AutoTokenizer

from denseclip_hf import DenseCLIPForSemanticSegmentation, DenseCLIPImageProcessor
from denseclip_hf.cli.export import main
from denseclip_hf.example import example_clip_model, example_tokenizer, make_example_clip
from denseclip_hf.inference import load_model
from denseclip_hf.sharing import check_export, export, write_card
from denseclip_hf.sharing.export import export_program, run_exported
from denseclip_hf.training.tokenizer import learn_tokenizer
from denseclip_hf.words import WordReader
from helpers.forked import run_script
from helpers.models import COST_AGGREGATION, tiny_config, tiny_model, varied


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


def examples_of_the_docs():
    """For any words, and without torch."""
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "export.md").read_text(), re.DOTALL)


def photo():
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (100, 150, 3), dtype=np.uint8))


def patch_model(patch):
    """A ViT with patches of `patch` pixels."""
    clip = tiny_config("vit").clip_config.to_dict()
    clip["vision_config"] |= {"patch_size": patch, "image_size": 4 * patch}
    torch.manual_seed(0)
    model = DenseCLIPForSemanticSegmentation(tiny_config("vit", clip_config=clip, crop_size=4 * patch))
    return model.eval()


@pytest.fixture(scope="module", params=["vit", "resnet"])
def exported(request, tmp_path_factory):
    """A model and its two exports."""
    model = tiny_model(request.param)
    kinds = ("onnx", "torch_export")
    return model, {kind: export(model, PROCESSOR, tmp_path_factory.mktemp(kind), kind) for kind in kinds}


@pytest.mark.slow
@pytest.mark.xdist_group("export")
def test_programs_agree_at_any_batch_and_size(exported):
    model, files = exported
    assert not model.config.frozen_classes  # it stayed as it was
    for kind, tolerance in (("onnx", 1e-4), ("torch_export", 1e-6)):
        for shape in ((1, 3, 64, 64), (3, 3, 96, 160), (2, 3, 256, 64)):
            pixels = torch.randn(shape, generator=torch.Generator().manual_seed(1))
            with torch.no_grad():
                expected = model.window_logits(pixels)
            torch.testing.assert_close(run_exported(files[kind], pixels), expected, atol=tolerance, rtol=1e-4)
        assert check_export(model, files[kind]) < tolerance
        with pytest.raises(Exception, match="Reshape|Guard"):  # a side that is no multiple
            run_exported(files[kind], torch.zeros(1, 3, 96, 100))
        for told in (b"text_model", str(ROOT).encode(), b"site-packages"):
            assert told not in files[kind].read_bytes()
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.decode_head.classifier.bias += 0.1
    assert check_export(other, files["onnx"]) > 1e-3
    axes = [[side.dim_param for side in value.type.tensor_type.shape.dim] for value in graph_of(files["onnx"])]
    assert axes == [["batch", "", "height", "width"], ["batch", "", "logits_height", "logits_width"]]


@pytest.mark.slow
@pytest.mark.xdist_group("export")
def test_openvino_reads_the_onnx_file_at_any_size(exported):
    openvino = pytest.importorskip("openvino")
    model, files = exported
    compiled = openvino.Core().compile_model(files["onnx"], "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for shape in ((2, 3, 64, 96), (1, 3, 64, 64)):
        pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = model.window_logits(pixels)
        torch.testing.assert_close(
            torch.from_numpy(compiled([pixels.numpy()])["logits"]), expected, atol=1e-4, rtol=1e-3
        )


def graph_of(path):
    graph = onnx.load(path).graph
    return graph.input[0], graph.output[0]


@pytest.mark.slow
@pytest.mark.parametrize("patch", [14, 32])
def test_other_patches_export(patch, tmp_path):
    model, step = patch_model(patch), 2 * patch
    path = export(model, PROCESSOR, tmp_path, "torch_export")
    for height, width in ((2, 2), (3, 5), (6, 4)):
        pixels = torch.randn(1, 3, height * step, width * step, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(run_exported(path, pixels), model.window_logits(pixels), atol=1e-6, rtol=1e-5)
    assert json.loads((tmp_path / "labels.json").read_text())["side_step"] == step


@pytest.mark.slow
def test_one_size_a_bound_half_precision_and_an_opset(tmp_path):
    model, size = tiny_model("vit"), (96, 160)
    fixed = export(model, PROCESSOR, tmp_path, "onnx", opset=20, size=size)
    assert onnx.load(fixed).opset_import[0].version == 20
    assert [d.dim_value for d in graph_of(fixed)[0].type.tensor_type.shape.dim] == [1, 3, 96, 160]
    assert check_export(model, fixed, size) < 1e-4
    resnet = tiny_model("resnet")
    half = export(resnet, PROCESSOR, tmp_path, "onnx", dtype="float16", size=size)
    assert 0 < check_export(resnet, half, size) < 0.05
    session = onnxruntime.InferenceSession(str(half), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].type == session.get_outputs()[0].type == "tensor(float)"
    bounded = export_program(model, max_side=128).module()
    with torch.no_grad():
        assert torch.equal(bounded(torch.zeros(1, 3, 128, 64)), model.window_logits(torch.zeros(1, 3, 128, 64)))
        with pytest.raises(Exception, match="Guard"):
            bounded(torch.zeros(1, 3, 160, 64))


@pytest.mark.slow
def test_an_int8_program_keeps_the_classes(directory, kind, photos, tmp_path, capsys):
    """A smaller file of the same inputs, whose classes are those of the model nearly everywhere."""
    model = DenseCLIPForSemanticSegmentation.from_pretrained(directory)
    size = {"height": 96, "width": 128}
    pixels = PROCESSOR(Image.open(photos / "b.png"), size=size, return_tensors="pt")["pixel_values"]
    varied(model.eval(), pixels).save_pretrained(directory)
    options = ["--size", "96", "128"] if kind == "resnet" else []
    command = [str(directory), str(tmp_path / "out"), "--quantize", "int8", "--calibration", str(photos), *options]
    main(command)
    assert "keep their class" in capsys.readouterr().out
    path = tmp_path / "out" / "model.onnx"
    assert {file.name for file in path.parent.iterdir()} == {"model.onnx", "labels.json", "preprocessor_config.json"}
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)
    with torch.no_grad():
        expected = model.window_logits(pixels)
    found = run_exported(path, pixels)
    assert (found.argmax(1) == expected.argmax(1)).float().mean() > 0.9 and not torch.equal(found, expected)


@pytest.mark.parametrize(
    "options", ["--quantize int8", "--calibration x", "--quantize int8 --calibration x --dtype fp16"]
)
def test_int8_needs_images_and_float32(tmp_path, capsys, options):
    with pytest.raises(SystemExit):
        main(["model", str(tmp_path / "out"), *options.split()])
    assert "--calibration" in capsys.readouterr().err


@pytest.mark.parametrize("options", [{"size": (96, 100)}, {"size": (32, 96)}, {"max_side": 96}])
def test_sizes_that_no_program_takes_are_refused(options):
    with pytest.raises(ValueError, match="32"):
        export_program(tiny_model(), **options)


@pytest.mark.slow
@pytest.mark.xdist_group("export")
def test_the_example_of_the_docs_runs_without_torch(exported, tmp_path):
    _, files = exported
    photo().save(tmp_path / "photo.png")
    _, example = examples_of_the_docs()
    for size in ({"shortest_edge": 96, "longest_edge": 128}, {"height": 96, "width": 128}):
        DenseCLIPImageProcessor(size=size).save_pretrained(files["onnx"].parent)
        command = [sys.executable, "-c", HIDE_TORCH + example, files["onnx"].parent, tmp_path / "photo.png"]
        result = subprocess.run([str(c) for c in command], capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 0 and "class" in result.stdout, result.stderr
        assert Image.open(tmp_path / "labels.png").size == (150, 100)


@pytest.fixture
def directory(kind, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path / "model")
    PROCESSOR.save_pretrained(tmp_path / "model")
    learn_tokenizer(["sky"], vocab_size=520).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_frozen_directory(directory, tmp_path, images):
    """Equal logits, the text tower gone, and the card of the model with its results and images."""
    photo().save(directory / "example.png")
    results = {"dataset": "example", "split": "val", "metrics": {"mean_iou": 0.4351}}
    before = write_card(directory, results=results, image="example.png", license="mit").read_text()
    main([str(directory), str(tmp_path / "frozen"), "--format", "frozen"])
    names = {file.name for file in (tmp_path / "frozen").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json", "example.png"} <= names
    frozen = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "frozen")
    whole = AutoModelForSemanticSegmentation.from_pretrained(directory)
    assert frozen.num_parameters() < whole.num_parameters()
    with torch.no_grad():
        assert torch.equal(frozen(images).logits, whole(images).logits)
    after = (tmp_path / "frozen" / "README.md").read_text()
    assert ModelCard(after).data.to_dict() == ModelCard(before).data.to_dict()
    assert "| 43.51 |" in after and str(tmp_path) not in after


def test_a_frozen_model_without_card_gets_one(directory, tmp_path):
    main([str(directory), str(tmp_path / "frozen"), "--format", "frozen"])
    card = (tmp_path / "frozen" / "README.md").read_text()
    assert "# frozen" in card and str(tmp_path) not in card


@pytest.mark.parametrize("options", ["frozen --dtype float16", "frozen --size 64 64", "torch_export --opset 20"])
def test_options_without_effect_are_refused(tmp_path, capsys, options):
    with pytest.raises(SystemExit):
        main(["model", str(tmp_path / "out"), "--format", *options.split()])
    assert "--opset" in capsys.readouterr().err


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=package):
        export(tiny_model(), PROCESSOR, tmp_path, "onnx")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vit"])
@pytest.mark.parametrize("flags", ["onnx --size 64 64", "torch_export --size 64 64", "frozen"])
def test_a_full_disk_leaves_nothing(directory, tmp_path, flags):
    """The largest file the process may write is 10 kB, as if the disk ended there."""
    command = [ROOT / "scripts" / "export.py", directory, tmp_path / "out" / "model", "--format", *flags.split()]
    code, said = run_script(*command, largest_file=10_000)
    assert code == 1 and "Traceback" not in said, said
    assert [f.name for f in tmp_path.iterdir()] == ["model"]


# Any words


def word_model(name, folder):
    """The directory of a model that takes any words: an untrained CLIP, or a segmenter with such a decoder."""
    if name == "clip":
        return str(make_example_clip(folder / name, "vit"))
    tokenizer = example_tokenizer()
    options = COST_AGGREGATION | {"aggregator": COST_AGGREGATION["aggregator"] | {"max_classes": 12}}
    torch.manual_seed(0)
    model = DenseCLIPForSemanticSegmentation.from_clip(
        example_clip_model(tokenizer, "vit"), ["sky", "road"], tokenizer, image_size=96, **options
    )
    for part in (model, tokenizer, PROCESSOR):
        part.save_pretrained(folder / name)
    return str(folder / name)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), [("clip", "onnx"), ("clip", "torch_export"), ("cost_aggregation", "onnx")])
def test_a_program_takes_any_words(name, kind, tmp_path, capsys):
    folder = word_model(name, tmp_path)
    main([folder, str(tmp_path / "out"), "--format", kind, "--words", "sky,a red car,tree"])
    assert "largest difference" in capsys.readouterr().out
    (path,) = (tmp_path / "out").glob("model.*")
    assert b"text_model" not in path.read_bytes()
    labels = json.loads((tmp_path / "out" / "labels.json").read_text())
    first = torch.from_numpy(np.load(tmp_path / "out" / "text_embeds.npy"))
    assert list(labels["id2label"].values()) == ["sky", "a red car", "tree"] and len(first) == 3
    model, processor = load_model(folder)
    reader = WordReader(model.eval(), AutoTokenizer.from_pretrained(folder), processor)
    torch.testing.assert_close(reader.encode(("sky", "a red car", "tree")), first)
    model.config.inference_mode = "whole"
    for words in (["road", "house"], ["road", "house", "tree", "lake", "sun", "field", "a blue car"]):
        embeds = reader.encode(tuple(words))
        pixels = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            expected = reader.score(pixels, embeds)
        torch.testing.assert_close(run_exported(path, pixels, embeds), expected, atol=1e-4, rtol=1e-4)
    if kind == "onnx":
        names = {"session": onnxruntime.InferenceSession(str(path)), "pixels": pixels.numpy()}
        exec(examples_of_the_docs()[0].replace("openai/clip-vit-base-patch16", folder), names)
        assert names["logits"].shape[:2] == (2, 3)


def test_words_need_a_model_that_takes_any(tmp_path, word_model_dir, capsys):
    with pytest.raises(SystemExit, match="^1$"):
        main([str(word_model_dir), str(tmp_path / "out"), "--words", "sky,car"])
    assert "takes no words" in capsys.readouterr().err and not (tmp_path / "out").exists()
    folder = str(make_example_clip(tmp_path / "clip", "vit"))
    with pytest.raises(SystemExit, match="^1$"):
        main([folder, str(tmp_path / "out")])
    assert "words" in capsys.readouterr().err
