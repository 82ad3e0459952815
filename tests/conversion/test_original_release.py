"""Released checkpoints as model directories, and what is refused on the way."""

import errno
import json
import os
import pickle
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, golden_case
from forked import run_script
from transformers import AutoModelForSemanticSegmentation, AutoTokenizer, CLIPTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from denseclip_hf.conversion import config_from_original, convert_original_state_dict
from denseclip_hf.conversion.release import class_table, convert_release, model_kwargs_from_weights
from denseclip_hf.conversion.weights import CheckpointError, read_checkpoint
from denseclip_hf.example.tiny_clip import make_example_tokenizer
from denseclip_hf.files import OutputError


RELEASED = json.loads((FIXTURES / "keys.json").read_text())["models"]
NAMES = ["sky", "road", "car", "tree ", "sea"]
PALETTE = [[0, 0, 255], [9, 9, 9], [255, 0, 0], [0, 255, 0], [0, 0, 128]]
SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_original_denseclip.py"


@cache
def tokenizer():
    return make_example_tokenizer([*NAMES, "a photo of a boat"], vocab_size=560)


def release(name="seg_vit", options=None, **meta):
    """A tiny checkpoint laid out as mmcv saves it, for the vocabulary of the test tokenizer."""
    case, tensors = golden_case(name)
    weights = {k.removeprefix("state_dict/"): v for k, v in tensors.items() if k.startswith("state_dict/")}
    width = weights["text_encoder.token_embedding.weight"].shape[1]
    generator = torch.Generator().manual_seed(0)
    weights["text_encoder.token_embedding.weight"] = torch.randn(len(tokenizer()), width, generator=generator)
    kwargs = json.loads(json.dumps(case["model_cfg"]))
    kwargs["text_encoder"]["vocab_size"] = len(tokenizer())
    kwargs |= options or {}
    config = f"norm_cfg = dict(type='SyncBN')\nmodel = {kwargs!r}\noptimizer = dict(lr=1e-4)\n"
    meta = {"mmseg_version": "0.19.0", "config": config, "CLASSES": tuple(NAMES), "PALETTE": PALETTE, **meta}
    state = OrderedDict(weights)
    state._metadata = OrderedDict()
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4, "params": [0]}]}
    return {"meta": meta, "state_dict": state, "optimizer": optimizer}


def save(tmp_path, content, name="released.pth", **options):
    path = tmp_path / name
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("name", ["seg_vit", "seg_resnet"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_release_becomes_a_complete_directory(tmp_path, name, zipped):
    content = release(name)
    path = save(tmp_path, content, _use_new_zipfile_serialization=zipped)
    report = convert_release(path, tmp_path / "model", tokenizer())
    files = {f.name for f in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "tokenizer.json"} <= files
    assert report.sha256.keys() == files and report.logits_shape[:2] == (1, 5)
    assert f"{report.parameters / 1e6:.3f} M" in str(report)
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model")
    expected = convert_original_state_dict(content["state_dict"], model.config)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    assert model.config.id2label == {0: "sky", 1: "road", 2: "car", 3: "tree", 4: "sea"}
    assert model.config.palette == PALETTE
    words = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert model.config.class_token_ids == [words(n)["input_ids"] for n in NAMES]
    processor = AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert processor.size.shortest_edge == model.config.crop_size[0] and not processor.do_reduce_labels
    assert {f.name for f in tmp_path.iterdir()} == {"released.pth", "model"}


@pytest.mark.parametrize("name", RELEASED)
def test_architecture_is_inferred_from_the_released_keys(name):
    """Every option of the released configs that our config reads comes out of names and shapes alone."""
    released = RELEASED[name]
    with torch.device("meta"):
        weights = {key: torch.empty(shape) for key, shape in released["state_dict"].items()}
    inferred = config_from_original(model_kwargs_from_weights(weights), dict(enumerate(map(str, range(150)))), None)
    known = config_from_original(released["model_cfg"], dict(enumerate(map(str, range(150)))), None)
    assert inferred.to_dict() == known.to_dict()
    assert class_table(weights, {}).do_reduce_labels


@pytest.mark.parametrize(("inside", "beside", "expected"), [(0.5, None, 0.5), (0.5, 0.25, 0.25)])
def test_a_config_file_beside_the_checkpoint_wins_over_the_one_inside(tmp_path, inside, beside, expected):
    content = release(options={"tau": inside})
    file = None
    if beside is not None:
        file = tmp_path / "config.py"
        file.write_text(release(options={"tau": beside})["meta"]["config"])
    convert_release(save(tmp_path, content), tmp_path / "model", tokenizer(), config_file=file)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["temperature"] == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", RELEASED)
def test_full_size_releases_convert(tmp_path, name):
    """Random weights with exactly the released keys and shapes, in a file with all that mmcv saves."""
    torch.manual_seed(0)
    state = OrderedDict(
        (key, torch.zeros(shape, dtype=torch.int64) if key.endswith("tracked") else torch.rand(shape) * 0.02)
        for key, shape in RELEASED[name]["state_dict"].items()
    )
    tokens = json.loads((FIXTURES / "tokens_ade20k.json").read_text())
    meta = {
        "env_info": "sys.platform: linux\nMMCV: 1.3.17\nMMSegmentation: 0.19.0+5eda47f",
        "mmseg_version": "0.19.0+5eda47f",
        "mmcv_version": "1.3.17",
        "time": "Wed Nov 24 12:00:00 2021",
        "config": f"norm_cfg = dict(type='SyncBN', requires_grad=True)\nmodel = {RELEASED[name]['model_cfg']!r}\n"
        "optimizer = dict(type='AdamW', lr=0.0001)\nwork_dir = './work_dirs/x'\n",
        "CLASSES": tuple(tokens["classes"]),
        "PALETTE": tokens["palette"],
        "seed": None,
        "exp_name": f"{name}.py",
        "hook_msgs": {},
        "epoch": 64,
        "iter": 80000,
    }
    path = save(tmp_path, {"meta": meta, "state_dict": state, "optimizer": _adamw_state(state)})
    report = convert_release(path, tmp_path / "model", _clip_sized_tokenizer(tokens["classes"]))
    files = {file.name for file in (tmp_path / "model").iterdir()}
    assert files == report.sha256.keys() >= {
        "config.json", "model.safetensors", "preprocessor_config.json", "README.md", "tokenizer.json",
    }  # fmt: skip
    assert report.parameters_without_text_encoder == RELEASED[name]["params_without_text_encoder"]
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model")
    expected = convert_original_state_dict(state, model.config)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def _adamw_state(state):
    """The optimizer's part of a checkpoint: two moments for every weight."""
    weights = [value for value in state.values() if value.is_floating_point()]
    moments = [{"step": 80000, "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)} for w in weights]
    group = {
        "lr": 1e-8,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 1e-4,
        "amsgrad": False,
        "initial_lr": 1e-4,
    }
    groups = [{**group, "params": [index]} for index in range(len(weights))]
    return {"state": dict(enumerate(moments)), "param_groups": groups}


def _clip_sized_tokenizer(names):
    """A tokenizer with as many tokens as CLIP's, that has one for every word of `names`."""
    small = make_example_tokenizer(names, vocab_size=49408)
    model = json.loads(small.backend_tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    fillers = [f"filler{number}" for number in range(49408 - len(words))]
    vocab = {word: number for number, word in enumerate([*words[:-2], *fillers, *words[-2:]])}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], model_max_length=77)


# Bad input: one sentence each, and no directory


class _Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def _html(tmp_path):
    (tmp_path / "x.pth").write_text("<html>404 Not Found</html>")
    return tmp_path / "x.pth"


def _truncated(tmp_path):
    path = save(tmp_path, release())
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _truncated_legacy(tmp_path):
    path = save(tmp_path, release(), _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def _plain_pickle(tmp_path):
    (tmp_path / "x.pth").write_bytes(pickle.dumps(_Evil(tmp_path / "mark")))
    return tmp_path / "x.pth"


def _without(key):
    def build(tmp_path):
        content = release()
        del content["state_dict"][key]
        return save(tmp_path, content)

    return build


def _with(**weights):
    def build(tmp_path):
        content = release()
        content["state_dict"].update({key.replace("__", "."): value for key, value in weights.items()})
        return save(tmp_path, content)

    return build


def _head():
    return golden_case("seg_vit")[0]["model_cfg"]["decode_head"]


BAD = {
    "missing file": (lambda p: p / "no.pth", "there is no file"),
    "no checkpoint": (_html, "is not a checkpoint: it begins with"),
    "truncated zip": (_truncated, "is cut off"),
    "truncated legacy": (_truncated_legacy, "cut off or damaged"),
    "code in the pickle": (
        lambda p: save(p, {**release(), "hook": _Evil(p / "mark")}),
        "asks for .*system, and only tensors",
    ),
    "code in a plain pickle": (_plain_pickle, "asks for .*system|not a checkpoint|damaged"),
    "a type of its own": (lambda p: save(p, release(env_info=Path("x"))), "asks for pathlib"),
    "no mapping": (lambda p: save(p, torch.zeros(3)), "holds a Tensor, not the mapping"),
    "no weights": (lambda p: save(p, {"meta": {}, "epoch": 3}), "its top level holds meta, epoch"),
    "detection": (_with(rpn_head__rpn_cls__weight=torch.zeros(1)), "this is a detection checkpoint"),
    "a classifier": (
        lambda p: save(p, {"state_dict": {"fc.weight": torch.zeros(2, 2)}}),
        "not a DenseCLIP segmentation checkpoint: it has no decode_head",
    ),
    "missing key": (_without("context_decoder.out_proj.1.bias"), "lacks the weights of context_decoder"),
    "missing lateral": (_without("neck.lateral_convs.2.conv.weight"), "has no neck.lateral_convs.2.conv.weight"),
    "wrong axes": (_with(contexts=torch.zeros(3)), "it has no contexts of 3 axes"),
    "odd class names": (lambda p: save(p, release(CLASSES=5)), "`meta` holds something of an unexpected type"),
    "unused key": (_with(surprise=torch.zeros(1)), "does not know: surprise"),
    "misshapen key": (_with(gamma=torch.zeros(3)), "gamma has shape"),
    "class list of the wrong length": (
        lambda p: save(p, release(CLASSES=tuple(NAMES[:4]), PALETTE=PALETTE[:4])),
        "names 4 classes, but the checkpoint was trained on 5",
    ),
    "another number of classes": (
        lambda p: save(p, release(options={"decode_head": {**_head(), "num_classes": 19}})),
        "`decode_head.num_classes` of the original config is 19, for 5 classes",
    ),
    "one weight twice": (_with(module__gamma=torch.ones(20)), "has both gamma and module.gamma"),
    "too few colours": (lambda p: save(p, release(PALETTE=PALETTE[:3])), "has 5 classes but 3 palette colours"),
    "odd colours": (lambda p: save(p, release(PALETTE=[[0, 0, 300], *PALETTE[1:]])), "three whole numbers 0…255"),
    "no class names": (lambda p: save(p, release(CLASSES=None)), "does not name its 5 classes"),
    "a name too long": (lambda p: save(p, release(CLASSES=("xylophone quartz jumping", *NAMES[1:]))), "shorten it"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint_is_refused_in_one_sentence(tmp_path, case):
    build, message = BAD[case]
    path = build(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        convert_release(path, tmp_path / "out" / "model", tokenizer())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() and not (tmp_path / "mark").exists()


def test_another_models_tokenizer_is_refused(tmp_path):
    other = make_example_tokenizer(NAMES, vocab_size=530)
    with pytest.raises(ValueError, match=f"the tokenizer has {len(other)} tokens, but the checkpoint"):
        convert_release(save(tmp_path, release()), tmp_path / "model", other)
    assert not (tmp_path / "model").exists()


def test_class_file_of_the_wrong_length_is_refused(tmp_path):
    (tmp_path / "names.json").write_text('["sky", "road"]')
    with pytest.raises(ValueError, match="names 2 classes, but the checkpoint was trained on 5"):
        convert_release(save(tmp_path, release()), tmp_path / "model", tokenizer(), classes=tmp_path / "names.json")


def test_tokenizer_that_can_not_be_loaded_is_refused(tmp_path):
    with pytest.raises(ValueError, match="tokenizer .* can't be loaded"):
        convert_release(save(tmp_path, release()), tmp_path / "model", tmp_path)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("error", "reason"),
    [(OSError(errno.ENOSPC, "No space left on device"), "No space left"), (PermissionError(13, "denied"), "denied")],
)
def test_nothing_is_left_when_writing_fails_half_way(tmp_path, monkeypatch, error, reason):
    path = save(tmp_path, release())

    def fail(self, directory, **kwargs):
        (Path(directory) / "tokenizer.json").write_text("{")
        raise error

    monkeypatch.setattr(type(tokenizer()), "save_pretrained", fail)
    with pytest.raises(OutputError, match=f"could not be written .{reason}.*nothing is left"):
        convert_release(path, tmp_path / "model", tokenizer())
    assert [f.name for f in tmp_path.iterdir()] == ["released.pth"]


@pytest.mark.slow
def test_a_real_full_disk_leaves_nothing(tmp_path):
    """The largest file the process may write is 100 kB, as if the disk ended there."""
    path = save(tmp_path, release())
    tokenizer().save_pretrained(tmp_path / "words")
    command = [SCRIPT, path, tmp_path / "model", "--tokenizer", tmp_path / "words"]
    code, said = run_script(*command, largest_file=100_000)
    assert code == 1 and "could not be written" in said.splitlines()[-1], said
    assert sorted(f.name for f in tmp_path.iterdir()) == ["released.pth", "words"]


@pytest.mark.slow
def test_script_prints_the_check(tmp_path):
    tokenizer().save_pretrained(tmp_path / "words")
    command = [SCRIPT, save(tmp_path, release()), tmp_path / "model", "--tokenizer", tmp_path / "words"]
    code, said = run_script(*command)
    assert code == 0 and "every weight equal" in said and "sha256" in said and "parameters" in said, said


def test_weights_that_are_not_finite_are_noticed(tmp_path):
    content = release()
    content["state_dict"]["decode_head.conv_seg.bias"] = torch.full((5,), torch.nan)
    with pytest.raises(ValueError, match="decode_head.classifier.bias has values that are not finite"):
        convert_release(save(tmp_path, content), tmp_path / "model", tokenizer())
    assert not (tmp_path / "model").exists()


def test_checkpoint_without_model_in_its_config(tmp_path):
    with pytest.raises(ValueError, match="assigns no `model"):
        convert_release(save(tmp_path, release(config="x = 1")), tmp_path / "model", tokenizer())


def test_directory_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="there is no file"):
        read_checkpoint(tmp_path)
