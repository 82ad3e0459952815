"""Damaged and invented files end in a result or in a sentence (`ValueError`, `OSError`), never in anything else.

`make fuzz EXAMPLES=1000` tries that many inputs per test; the suite itself a few.
"""

import io
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_bytes

from denseclip_hf.cli.arguments import parse_arguments
from denseclip_hf.conversion.clip import convert_clip
from denseclip_hf.conversion.release import convert_release
from denseclip_hf.conversion.weights import read_checkpoint, state_dict_of
from denseclip_hf.data import SampleReader, parse_classes, read_image
from denseclip_hf.inference import load_model
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from helpers.checkpoints import release, tokenizer
from helpers.clip_reference import reference_clip
from helpers.damage import HEADERS, JSON, changed, damaged, invented_png, odd_weights, picture_files
from helpers.limits import result_or_sentence
from helpers.models import tiny_model
from helpers.training import KINDS


PROCESSOR = DenseCLIPImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 256})


# Pictures and masks


FILES = (
    damaged(picture_files())
    | invented_png()
    | st.builds(bytes.__add__, st.sampled_from([b"", *HEADERS]), st.binary(max_size=200))
)


@given(FILES)
def test_pictures(content):
    with result_or_sentence():
        picture = read_image({"path": "x", "bytes": content})
        assert picture.mode == "RGB"
        if max(picture.size) < 2000:
            assert PROCESSOR(picture, return_tensors="pt")["pixel_values"].isfinite().all()


@given(FILES, st.booleans(), st.booleans())
def test_masks(content, palette, reduce):
    colors = [[0, 0, 0], [255, 0, 0], [0, 0, 255]] if palette else None
    reader = SampleReader(3, do_reduce_labels=reduce, palette=colors)
    with result_or_sentence():
        mask = reader.read_mask({"path": "x", "bytes": content})
        assert mask.ndim == 2 and set(np.unique(mask)) <= {0, 1, 2, 255}


# Class lists, recipes, the authors' configs


CLASSES = {"id2label": {"0": "sky", "1": "road"}, "palette": [[0, 0, 255], [9, 9, 9]], "ignore_index": 255}


@given(changed({**CLASSES, "do_reduce_labels": True, "ignore_colors": [[1, 2, 3]]}) | JSON)
def test_class_lists(value):
    with result_or_sentence():
        table = parse_classes(value)
        assert list(table.id2label) == list(range(len(table.id2label)))
        json.dumps(table.id2label, ensure_ascii=False).encode()


SHARED_FOLDER = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, *settings().suppress_health_check]
)


RECIPE = {
    "clip": "a/b", "config": {"gamma_init": 1.0}, "dataset": "x", "crop_size": 64, "photometric": False,
    "ratio_min": 0.5, "validation_split": None, "scale_short": 5,
}  # fmt: skip


@SHARED_FOLDER
@given(value=changed(RECIPE))
def test_recipes(tmp_path, value, capsys):
    (tmp_path / "r.json").write_text(json.dumps(value))
    with result_or_sentence():
        model, data = parse_arguments(KINDS[:2], [str(tmp_path / "r.json")])
        assert isinstance(data.crop_size, int) and isinstance(model.config, str)
        assert isinstance(data.ratio_min, float) and isinstance(data.dataset, (str, type(None)))


# Checkpoints and model directories


def _bytes_of(content, zipped=True):
    stream = io.BytesIO()
    torch.save(content, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@cache
def checkpoint_files():
    """By suffix: files as PyTorch, TorchScript and safetensors write them, all small."""
    content = {"state_dict": {"a.b": torch.zeros(2, 3), "c": torch.ones(2).half()}, "meta": {"CLASSES": ["x"]}}
    module = torch.nn.Module()
    module.register_buffer("a", torch.zeros(2, 3))
    stream = io.BytesIO()
    torch.jit.save(torch.jit.script(module), stream)
    pth = [_bytes_of(content), _bytes_of(content, zipped=False), stream.getvalue()]
    return {".pth": pth, ".safetensors": [safetensors_bytes({"a.b": torch.zeros(2, 3), "c": torch.ones(2).half()})]}


@SHARED_FOLDER
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@given(data=st.data())
def test_checkpoints(tmp_path, suffix, data):
    file = tmp_path / f"x{suffix}"
    file.write_bytes(data.draw(damaged(checkpoint_files()[suffix]) | st.binary(max_size=200)))
    with result_or_sentence():
        for value in state_dict_of(read_checkpoint(file)).values():
            value.float().sum()


@SHARED_FOLDER
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["seg_vit", "seg_resnet"])
@given(data=st.data())
def test_releases(tmp_path, name, data):
    content = release(name)
    content["state_dict"] = data.draw(odd_weights(content["state_dict"]))
    content["meta"] |= data.draw(st.dictionaries(st.sampled_from(["CLASSES", "PALETTE", "config"]), JSON))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    torch.save(content, tmp_path / "x.pth")
    with result_or_sentence():
        convert_release(tmp_path / "x.pth", tmp_path / "out", tokenizer())


@SHARED_FOLDER
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@given(data=st.data())
def test_clips(tmp_path, kind, data):
    weights = data.draw(odd_weights(reference_clip(kind, len(tokenizer())).state_dict()))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)
    torch.save({"epoch": 3, "state_dict": weights}, tmp_path / "x.pt")
    with result_or_sentence():
        convert_clip(tmp_path / "x.pt", tmp_path / "out", tokenizer(), hidden_act="quick_gelu")


def files_of(*parts):
    """Name to content of a directory that the parts of a model were saved into."""
    with tempfile.TemporaryDirectory() as folder:
        for part in parts:
            part.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


@cache
def model_files(kind):
    return files_of(tiny_model(kind), PROCESSOR)


def write_damaged(folder, files, data):
    """`files` in `folder`, one of them damaged or changed."""
    name = data.draw(st.sampled_from(sorted(files)))
    if name.endswith(".json") and data.draw(st.booleans()):
        content = json.dumps(data.draw(changed(json.loads(files[name])))).encode()
    else:
        content = data.draw(damaged([files[name]]))
    folder.mkdir(exist_ok=True)
    for file, whole in files.items():
        (folder / file).write_bytes(content if file == name else whole)


@SHARED_FOLDER
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["vit", "resnet"])
@given(data=st.data())
def test_model_directories(tmp_path, kind, data):
    folder = tmp_path / "model"
    write_damaged(folder, model_files(kind), data)
    with result_or_sentence():
        model, processor = load_model(str(folder))
