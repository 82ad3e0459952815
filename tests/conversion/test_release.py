"""Released checkpoints as model directories, and what is refused on the way."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSemanticSegmentation, AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from denseclip_hf.cli.convert import main
from denseclip_hf.conversion import config_from_original, convert_original_state_dict, convert_release
from denseclip_hf.conversion.options import model_options
from denseclip_hf.conversion.release import class_table, model_kwargs_from_weights
from denseclip_hf.training.tokenizer import learn_tokenizer
from helpers.checkpoints import NAMES, PALETTE, release, save, tokenizer
from helpers.forked import run_script
from helpers.golden import FIXTURES, golden_case


RELEASED = json.loads((FIXTURES / "keys.json").read_text())["models"]
SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_original_denseclip.py"


@pytest.mark.parametrize(("name", "zipped"), [("seg_vit", True), ("seg_resnet", False)])
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
    "a type of its own": (lambda p: save(p, release(env_info=Path("x"))), "pathlib"),
    "no mapping": (lambda p: save(p, torch.zeros(3)), "Tensor"),
    "no weights": (lambda p: save(p, {"meta": {}, "epoch": 3}), "meta, epoch"),
    "a few numbers repeated": (_with(gamma=torch.zeros(1).expand(10**12)), "state_dict"),
    "odd class names": (lambda p: save(p, release(CLASSES=5)), "meta"),
    "unused key": (_with(surprise=torch.zeros(1)), "surprise"),
    "not finite": (_with(decode_head__conv_seg__bias=torch.full((5,), torch.nan)), "decode_head.classifier.bias"),
    "too few class names": (lambda p: save(p, release(CLASSES=tuple(NAMES[:4]), PALETTE=PALETTE[:4])), "4 .* 5"),
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


def test_a_tokenizer_or_class_file_of_another_model_is_refused(tmp_path):
    path = save(tmp_path, release())
    for other in (learn_tokenizer(NAMES, vocab_size=530), tmp_path):
        with pytest.raises(ValueError, match="tokenizer"):
            convert_release(path, tmp_path / "model", other)
    (tmp_path / "names.json").write_text('["sky", "road"]')
    with pytest.raises(ValueError, match="names.json"):
        convert_release(path, tmp_path / "model", tokenizer(), classes=tmp_path / "names.json")
    assert not (tmp_path / "model").exists()


def test_command(tmp_path, capsys):
    """What no weight shows is read from the config inside, or given; sums of the files are printed."""
    tokenizer().save_pretrained(tmp_path / "words")
    (tmp_path / "options.json").write_text('{"tau": 0.25}')
    path, words = str(save(tmp_path, release(options={"tau": 0.5}))), ["--tokenizer", str(tmp_path / "words")]
    main(["release", path, str(tmp_path / "inside"), *words])
    main(["release", path, str(tmp_path / "given"), *words, "--options", str(tmp_path / "options.json")])
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("inside", "given")]
    assert [config["temperature"] for config in configs] == [0.5, 0.25]
    said = capsys.readouterr().out
    assert "sha256" in said and "parameters" in said


@pytest.mark.slow
def test_on_a_full_disk_nothing_is_left(tmp_path):
    tokenizer().save_pretrained(tmp_path / "words")
    command = [SCRIPT, save(tmp_path, release()), tmp_path / "model", "--tokenizer", tmp_path / "words"]
    code, said = run_script(*command, largest_file=100_000)
    assert code == 1 and "Traceback" not in said, said
    assert not (tmp_path / "model").exists()
