"""Released checkpoints as model directories, and what is refused on the way."""

import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSemanticSegmentation, AutoTokenizer, CLIPTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from denseclip_hf.conversion import config_from_original, convert_original_state_dict, convert_release
from denseclip_hf.conversion.options import model_options
from denseclip_hf.conversion.release import class_table, model_kwargs_from_weights
from denseclip_hf.training.tokenizer import learn_tokenizer
from helpers.checkpoints import NAMES, PALETTE, release, save, tokenizer
from helpers.forked import run_script
from helpers.golden import FIXTURES, golden_case


RELEASED = json.loads((FIXTURES / "keys.json").read_text())["models"]
SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_original_denseclip.py"


@pytest.mark.parametrize("name", ["seg_vit", "seg_resnet"])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_release_becomes_a_complete_directory(tmp_path, name, zipped):
    content = release(name)
    path = save(tmp_path, content, _use_new_zipfile_serialization=zipped)
    convert_release(path, tmp_path / "model", tokenizer())
    files = {f.name for f in (tmp_path / "model").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "tokenizer.json"} <= files
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


@pytest.mark.parametrize(("given", "expected"), [(None, 0.5), ({"tau": 0.25}, 0.25)])
def test_what_no_weight_shows_comes_from_the_config_inside_or_is_given(tmp_path, given, expected):
    path = save(tmp_path, release(options={"tau": 0.5}))
    model = convert_release(path, tmp_path / "model", tokenizer(), options=given)
    assert model.config.temperature == expected


def test_a_config_is_read_and_never_run(tmp_path):
    mark = tmp_path / "mark"
    text = f"import os\nos.system('touch {mark}')\nwork = os.getcwd()\nmodel = dict(a=[1, dict(b=(2, -1))])"
    assert model_options(text) == {"a": [1, {"b": (2, -1)}]}
    assert not mark.exists()


@pytest.mark.parametrize(
    "text", ["x = 1", "model = (", "model = dict(a=open('x'))", "model = dict(**{'a': 1})", "model = " + "-" * 90_000]
)
def test_a_config_that_is_not_plain_data_is_refused(text):
    with pytest.raises(ValueError, match="--options"):
        model_options(text)


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
    converted = convert_release(path, tmp_path / "model", _clip_sized_tokenizer(tokens["classes"]))
    text = "clip.text_"
    counts = {key: parameter.numel() for key, parameter in converted.named_parameters() if not key.startswith(text)}
    assert sum(counts.values()) == RELEASED[name]["params_without_text_encoder"]
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "model")
    expected = convert_original_state_dict(state, model.config)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def _adamw_state(state):
    """The optimizer's part of a checkpoint: two moments for every weight."""
    weights = [value for value in state.values() if value.is_floating_point()]
    moments = [{"step": 80000, "exp_avg": torch.zeros_like(w), "exp_avg_sq": torch.zeros_like(w)} for w in weights]
    group = {"lr": 1e-8, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4, "initial_lr": 1e-4}
    groups = [{**group, "params": [index]} for index in range(len(weights))]
    return {"state": dict(enumerate(moments)), "param_groups": groups}


def _clip_sized_tokenizer(names):
    """A tokenizer with as many tokens as CLIP's, that has one for every word of `names`."""
    small = learn_tokenizer(names, vocab_size=49408)
    model = json.loads(small.backend_tokenizer.to_str())["model"]
    words = sorted(model["vocab"], key=model["vocab"].get)
    fillers = [f"filler{number}" for number in range(49408 - len(words))]
    vocab = {word: number for number, word in enumerate([*words[:-2], *fillers, *words[-2:]])}
    return CLIPTokenizer(vocab=vocab, merges=[tuple(pair) for pair in model["merges"]], model_max_length=77)


def _truncated(**options):
    def build(tmp_path):
        path = save(tmp_path, release(), **options)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        return path

    return build


def _with(**weights):
    def build(tmp_path):
        content = release()
        content["state_dict"].update({key.replace("__", "."): value for key, value in weights.items()})
        return save(tmp_path, content)

    return build


# How a file is made, and what its refusal names.
BAD = {
    "truncated zip": (_truncated(), "cut off"),
    "truncated legacy": (_truncated(_use_new_zipfile_serialization=False), "cut off"),
    "a type of its own": (lambda p: save(p, release(env_info=Path("x"))), "pathlib"),
    "no mapping": (lambda p: save(p, torch.zeros(3)), "Tensor"),
    "no weights": (lambda p: save(p, {"meta": {}, "epoch": 3}), "meta, epoch"),
    "a classifier": (lambda p: save(p, {"state_dict": {"fc.weight": torch.zeros(2, 2)}}), "decode_head"),
    "a few numbers repeated": (_with(gamma=torch.zeros(1).expand(10**12)), "state_dict"),
    "wrong axes": (_with(contexts=torch.zeros(3)), "contexts"),
    "odd class names": (lambda p: save(p, release(CLASSES=5)), "meta"),
    "unused key": (_with(surprise=torch.zeros(1)), "surprise"),
    "not finite": (_with(decode_head__conv_seg__bias=torch.full((5,), torch.nan)), "decode_head.classifier.bias"),
    "too few class names": (lambda p: save(p, release(CLASSES=tuple(NAMES[:4]), PALETTE=PALETTE[:4])), "4 .* 5"),
    "another number of classes": (lambda p: save(p, release(options={"decode_head": _head(num_classes=19)})), "19"),
    "one weight twice": (_with(module__gamma=torch.ones(20)), "module.gamma"),
    "too few colors": (lambda p: save(p, release(PALETTE=PALETTE[:3])), "palette"),
    "no class names": (lambda p: save(p, release(CLASSES=None)), "--classes"),
    "a name too long": (lambda p: save(p, release(CLASSES=("xylophone quartz jumping", *NAMES[1:]))), "xylophone"),
}  # fmt: skip


def _head(**changes):
    return {**golden_case("seg_vit")[0]["model_cfg"]["decode_head"], **changes}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoint_is_refused_in_one_sentence(tmp_path, case):
    build, message = BAD[case]
    path = build(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        convert_release(path, tmp_path / "out" / "model", tokenizer())
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_another_models_tokenizer_is_refused(tmp_path):
    other = learn_tokenizer(NAMES, vocab_size=530)
    for tokenizer_ in (other, tmp_path):
        with pytest.raises(ValueError, match="tokenizer"):
            convert_release(save(tmp_path, release()), tmp_path / "model", tokenizer_)
    assert not (tmp_path / "model").exists()


def test_class_file_of_the_wrong_length_is_refused(tmp_path):
    (tmp_path / "names.json").write_text('["sky", "road"]')
    with pytest.raises(ValueError, match="names.json"):
        convert_release(save(tmp_path, release()), tmp_path / "model", tokenizer(), classes=tmp_path / "names.json")


@pytest.mark.slow
def test_command(tmp_path):
    """It prints sums of the files; on a disk that ends at 100 kB it leaves nothing."""
    tokenizer().save_pretrained(tmp_path / "words")
    (tmp_path / "options.json").write_text('{"tau": 0.25}')
    command = [SCRIPT, save(tmp_path, release()), tmp_path / "model", "--tokenizer", tmp_path / "words"]
    code, said = run_script(*command, largest_file=100_000)
    assert code == 1 and "Traceback" not in said, said
    assert not (tmp_path / "model").exists()
    code, said = run_script(*command, "--options", tmp_path / "options.json")
    assert code == 0 and "sha256" in said and "parameters" in said, said
    assert json.loads((tmp_path / "model" / "config.json").read_text())["temperature"] == 0.25
