"""OpenAI's and open_clip's checkpoints: the same features as a reference written for the test."""

import json
import zipfile
from functools import cache
from pathlib import Path

import pytest
import torch
from clip_reference import reference_clip
from forked import run_script
from safetensors.torch import save_file
from transformers import AutoModel, AutoTokenizer, CLIPModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from denseclip_hf import CLIPResNetModel, DenseCLIPForSemanticSegmentation
from denseclip_hf.conversion.clip import OPENAI_SETTINGS, clip_config_from_weights, convert_clip
from denseclip_hf.conversion.weights import CheckpointError, _ScriptObject, _tensors, _view, read_torchscript
from denseclip_hf.example.tiny_clip import make_example_tokenizer
from denseclip_hf.files import OutputError


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
IMAGE = torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(3))
SCRIPT = Path(__file__).parents[2] / "scripts" / "convert_openai_clip.py"


@cache
def tokenizer():
    return make_example_tokenizer(["a photo of a cat", "sky", "road"], vocab_size=540)


def _archive(clip, path):
    tokens = torch.tensor(tokenizer()("a cat")["input_ids"])
    for name in ("input_resolution", "context_length", "vocab_size"):
        clip.register_buffer(name, torch.tensor(64))
    torch.jit.trace(clip, (IMAGE, tokens), check_trace=False).save(str(path))


FORMATS = {
    "torchscript": _archive,
    "state dict": lambda clip, path: torch.save(clip.state_dict(), path),
    "training checkpoint": lambda clip, path: torch.save(
        {"epoch": 3, "state_dict": {f"module.{k}": v for k, v in clip.state_dict().items()}, "optimizer": {}}, path
    ),
    "safetensors": lambda clip, path: save_file(clip.state_dict(), path),
}


def write(kind, format, tmp_path, half=False):
    clip = reference_clip(kind, len(tokenizer()))
    if half:  # as OpenAI's are: the values of half precision, whatever runs them
        for tensor in clip.parameters():
            tensor.data = tensor.data.half().float()
    path = tmp_path / ("clip.safetensors" if format == "safetensors" else "clip.pt")
    FORMATS[format](clip, path)
    return clip, path


@pytest.mark.parametrize("format", FORMATS)
def test_features_are_the_reference(tmp_path, kind, format):
    clip, path = write(kind, format, tmp_path)
    told = {} if format == "torchscript" else {"hidden_act": "quick_gelu"}
    convert_clip(path, tmp_path / "out", tokenizer(), **told)
    expected_class = CLIPModel if kind == "vit" else CLIPResNetModel
    model = expected_class.from_pretrained(tmp_path / "out").eval()
    assert type(AutoModel.from_pretrained(tmp_path / "out")) is expected_class
    words = AutoTokenizer.from_pretrained(tmp_path / "out")(["a photo of a cat", "sky"], padding=True)
    with torch.no_grad():
        image = model.get_image_features(IMAGE[None]).pooler_output[0]
        text = model.get_text_features(
            torch.tensor(words["input_ids"]), torch.tensor(words["attention_mask"])
        ).pooler_output
        wanted = clip.visual(IMAGE)
        texts = [clip.text(torch.tensor(tokenizer()(t)["input_ids"])) for t in ("a photo of a cat", "sky")]
    torch.testing.assert_close(image, wanted, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(text, torch.stack(texts), atol=2e-5, rtol=1e-4)
    assert model.logit_scale.item() == 2.5
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    assert processor.crop_size["height"] == 64


@pytest.mark.parametrize("format", ["torchscript", "state dict"])
def test_half_precision_becomes_float32_with_the_same_values(tmp_path, kind, format):
    clip = reference_clip(kind, len(tokenizer()))
    half = {k: v.half() if v.is_floating_point() else v for k, v in clip.state_dict().items()}
    path = tmp_path / "clip.pt"
    if format == "torchscript":
        _save_script_of(half, path)
    else:
        torch.save(half, path)
    model = convert_clip(path, tmp_path / "out", tokenizer(), hidden_act="quick_gelu")
    assert model.dtype == torch.float32
    assert torch.equal(model.text_model.embeddings.token_embedding.weight, half["token_embedding.weight"].float())
    small = convert_clip(path, tmp_path / "half", tokenizer(), hidden_act="quick_gelu", dtype="float16")
    assert small.dtype == torch.float16
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float16"


def test_the_archive_reader_agrees_with_pytorch(tmp_path, kind):
    clip, path = write(kind, "torchscript", tmp_path)
    ours, theirs = read_torchscript(path), torch.jit.load(path).state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], value) for key, value in theirs.items())


def test_from_clip_takes_the_result(tmp_path, kind):
    _, path = write(kind, "torchscript", tmp_path)
    convert_clip(path, tmp_path / "out", tokenizer())
    model = DenseCLIPForSemanticSegmentation.from_clip(
        tmp_path / "out", ["sky", "road"], image_size=64, num_context_tokens=4, context_decoder_hidden_size=8
    )
    logits = model.eval()(IMAGE[None]).logits
    assert logits.shape[:2] == (1, 2) and torch.isfinite(logits).all()


@pytest.mark.parametrize(
    ("name", "shape", "depths", "heads", "size"),
    [("RN50", (64, 1024, 512, 49), [3, 4, 6, 3], 32, 224), ("RN101", (64, 512, 512, 49), [3, 4, 23, 3], 32, 224)],
)
def test_openai_sizes(name, shape, depths, heads, size):
    width, output, text, grid = shape
    config = CLIPResNetModel.config_class(
        text_config={"hidden_size": text, "projection_dim": output},
        vision_config={"embedding_size": width, "depths": depths, "projection_dim": output, "image_size": size},
    )
    with torch.device("meta"):
        weights = _original_names(CLIPResNetModel(config))
    found = clip_config_from_weights(weights)
    assert found.vision_config.num_attention_heads == heads and found.text_config.num_attention_heads == 8
    assert list(found.vision_config.depths) == depths and found.vision_config.image_size == size
    assert found.projection_dim == output and found.text_config.num_hidden_layers == 12


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "torchscript"])
def test_an_activation_is_never_guessed(tmp_path, kind, format):
    _, path = write(kind, format, tmp_path)
    with pytest.raises(ValueError, match="does not tell its activation: give `--hidden_act quick_gelu` for OpenAI's"):
        convert_clip(path, tmp_path / "out", tokenizer())
    assert not (tmp_path / "out").exists()
    model = convert_clip(path, tmp_path / "out", tokenizer(), hidden_act="gelu")
    assert model.config.text_config.hidden_act == "gelu"


def test_the_settings_in_openais_files_tell_the_activation(tmp_path):
    weights = reference_clip("vit", len(tokenizer())).state_dict()
    settings = {name: torch.tensor(64) for name in OPENAI_SETTINGS}
    torch.save({**weights, **settings}, tmp_path / "clip.pt")
    model = convert_clip(tmp_path / "clip.pt", tmp_path / "out", tokenizer())
    assert model.config.vision_config.hidden_act == model.config.text_config.hidden_act == "quick_gelu"


@pytest.mark.parametrize(
    ("width", "heads"), [(384, 6), (768, 12), (1024, 16), (1280, 16), (1408, 16), (1664, 16), (1792, 16)]
)
def test_heads_of_known_image_towers(width, heads):
    """As in open_clip's model configs: head widths of 64, and 80, 88, 104, 112 in the wide ones."""
    assert clip_config_from_weights(_wide(width)).vision_config.num_attention_heads == heads


@pytest.mark.parametrize("width", [352, 1152, 2048])
def test_heads_are_asked_for_where_nobody_can_know_them(width):
    with pytest.raises(
        ValueError, match=f"how many attention heads an image tower of width {width} has: give `--num_"
    ):
        clip_config_from_weights(_wide(width))
    assert clip_config_from_weights(_wide(width), num_attention_heads=8).vision_config.num_attention_heads == 8
    for wrong in (0, 5):
        with pytest.raises(ValueError, match=rf"`num_attention_heads` .{wrong}. must divide the image tower's width"):
            clip_config_from_weights(_wide(width), num_attention_heads=wrong)


def test_a_text_tower_of_an_odd_width_is_refused():
    weights = _wide(768) | {"positional_embedding": torch.zeros(16, 100)}
    with pytest.raises(ValueError, match="text tower is 100 wide"):
        clip_config_from_weights(weights)


def test_given_heads_are_those_of_the_image_tower(tmp_path):
    _, path = write("vit", "torchscript", tmp_path)
    model = convert_clip(path, tmp_path / "out", tokenizer(), num_attention_heads=4)
    assert model.config.vision_config.num_attention_heads == 4 and model.config.text_config.num_attention_heads == 2


def _wide(width):
    """The weights that a ViT's config is read from, at any image width."""
    with torch.device("meta"):
        return {
            "visual.conv1.weight": torch.empty(width, 3, 14, 14),
            "visual.class_embedding": torch.empty(width),
            "visual.positional_embedding": torch.empty(257, width),
            "visual.transformer.resblocks.0.mlp.c_fc.weight": torch.empty(4 * width, width),
            "transformer.resblocks.0.mlp.c_fc.weight": torch.empty(512, 128),
            "token_embedding.weight": torch.empty(540, 128),
            "positional_embedding": torch.empty(16, 128),
            "text_projection": torch.empty(128, 24),
        }


BAD = {
    "no CLIP": (
        {"fc.weight": torch.zeros(1)},
        "not a CLIP of OpenAI's architecture: it has no visual.conv1.weight of 4 axes; name one",
    ),
    "transformers' own": (
        {"text_model.embeddings.token_embedding.weight": torch.zeros(1)},
        "in transformers' format already: give its folder",
    ),
    "a timm tower": ({"visual.trunk.x": torch.zeros(1)}, "not a CLIP"),
    "unused key": ({"logit_bias": torch.zeros(())}, "does not know: logit_bias"),
    "misshapen key": ({"ln_final.bias": torch.zeros(3)}, "ln_final|final_layer_norm.bias has shape"),
    "not finite": (
        {"ln_final.bias": torch.full((128,), torch.inf)},
        "final_layer_norm.bias has values that are not finite",
    ),
    "another vocabulary": ({"token_embedding.weight": torch.zeros(600, 128)}, "the tokenizer has .* tokens"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused(tmp_path, case):
    changes, message = BAD[case]
    weights = {} if case in ("no CLIP", "a timm tower") else reference_clip("vit", len(tokenizer())).state_dict()
    torch.save({**weights, **changes}, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=message):
        convert_clip(tmp_path / "clip.pt", tmp_path / "out", tokenizer(), hidden_act="quick_gelu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no file"),
        (b"", "is not a checkpoint"),
        (b"<html>404 Not Found</html>", "is not a checkpoint: it begins with .*; download it again"),
    ],
    ids=["missing", "empty", "a web page"],
)
def test_files_that_are_no_checkpoints_are_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "RN50.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        convert_clip(tmp_path / "RN50.pt", tmp_path / "out", tokenizer())
    assert not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def fail_half_way(self, directory, **_):
        (Path(directory) / "tokenizer.json").write_text("{")
        raise OSError(28, "No space left on device")

    _, path = write("vit", "state dict", tmp_path)
    monkeypatch.setattr(type(tokenizer()), "save_pretrained", fail_half_way)
    with pytest.raises(OutputError, match="out could not be written .No space left on device.; nothing is left"):
        convert_clip(path, tmp_path / "out", tokenizer(), hidden_act="quick_gelu")
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_full_disk_leaves_nothing(tmp_path, small_disk):
    _, path = write("vit", "state dict", tmp_path)
    disk = small_disk("64k")
    words = (
        r"out could not be written \(.*No space left on device.*\); nothing is left of it: make room, or name another"
    )
    with pytest.raises(OutputError, match=words):
        convert_clip(path, disk / "parent" / "out", tokenizer(), hidden_act="quick_gelu")
    assert not list(disk.iterdir())


def test_missing_key_is_named(tmp_path):
    weights = dict(reference_clip("vit", len(tokenizer())).state_dict())
    del weights["visual.ln_post.bias"]
    torch.save(weights, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match="lacks the weights of vision_model.post_layernorm.bias"):
        convert_clip(tmp_path / "clip.pt", tmp_path / "out", tokenizer(), hidden_act="quick_gelu")


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"cposix\nsystem\n(S'touch MARK'\ntR.", "asks for posix.system"),
        (b"\x80\x02garbage", "no Tor"),
    ],
)
def test_code_in_an_archive_is_not_run(tmp_path, pickled, message):
    _, path = write("vit", "torchscript", tmp_path)
    evil = tmp_path / "evil.pt"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(evil, "w") as target:
        for name in source.namelist():
            target.writestr(
                name,
                pickled.replace(b"MARK", bytes(tmp_path / "mark"))
                if name.endswith("/data.pkl")
                else source.read(name),
            )
    with pytest.raises(CheckpointError, match=message):
        convert_clip(evil, tmp_path / "out", tokenizer())
    assert not (tmp_path / "mark").exists() and not (tmp_path / "out").exists()


def test_a_big_endian_archive_is_refused(tmp_path):
    _, path = write("vit", "torchscript", tmp_path)
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(tmp_path / "big.pt", "w") as target:
        for name in source.namelist():
            if not name.endswith("byteorder"):
                target.writestr(name, source.read(name))
        target.writestr(f"{source.namelist()[0].split('/')[0]}/byteorder", b"big")
    with pytest.raises(CheckpointError, match="big.pt can't be used: it was written on a big-endian machine"):
        convert_clip(tmp_path / "big.pt", tmp_path / "out", tokenizer())


@pytest.mark.parametrize("refer", ["itself", "everything twice"])
def test_modules_that_refer_to_each_other_end(tmp_path, refer):
    """Cycles and doublings, which PyTorch's own archives do not have, neither hang nor repeat tensors."""
    module = _ScriptObject()
    module.attributes = {"x": torch.zeros(1)}
    if refer == "itself":
        module.attributes["inner"] = module
    for _ in range(100 if refer == "everything twice" else 0):
        inner, module = module, _ScriptObject()
        module.attributes = {"a": inner, "b": inner}
    assert len(list(_tensors(module, "", {id(module)}))) == 1


@pytest.mark.parametrize("size", [(10**6, 10**6), (3,)])
def test_a_tensor_that_is_larger_than_its_storage_is_refused(size):
    with pytest.raises(CheckpointError, match="larger than what is stored"):
        _view(torch.zeros(2), 0, size, (0,) * len(size))


def test_a_zip_archive_of_other_things_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("a/photo.jpg", b"")
    with pytest.raises(
        CheckpointError, match="photos.pt is a zip archive, but not a checkpoint: name the file inside"
    ):
        convert_clip(tmp_path / "photos.pt", tmp_path / "out", tokenizer())


def test_a_truncated_archive_is_refused(tmp_path):
    _, path = write("vit", "torchscript", tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="cut off or damaged .* download it again"):
        convert_clip(path, tmp_path / "out", tokenizer())


def test_a_truncated_safetensors_file_is_refused(tmp_path):
    _, path = write("vit", "safetensors", tmp_path)
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(
        CheckpointError, match="clip.safetensors is cut off or no safetensors file .*: download it again"
    ):
        convert_clip(path, tmp_path / "out", tokenizer())


@pytest.mark.parametrize(("option", "value"), [("hidden_act", "relu"), ("dtype", "int8")])
def test_unknown_options_are_refused(tmp_path, option, value):
    with pytest.raises(ValueError, match=option):
        convert_clip(tmp_path / "x", tmp_path / "out", tokenizer(), **{option: value})


@pytest.mark.slow
def test_script(tmp_path):
    _, path = write("resnet", "safetensors", tmp_path)
    tokenizer().save_pretrained(tmp_path / "words")
    command = [SCRIPT, path, tmp_path / "out", "--tokenizer", tmp_path / "words"]
    code, said = run_script(*command, "--hidden_act", "quick_gelu", "--num_attention_heads", "2")
    assert code == 0 and "CLIPResNetModel" in said and "sha256" in said, said


def _save_script_of(weights, path):
    """A TorchScript archive that holds `weights` under their names."""
    root = torch.nn.Module()
    for key, value in weights.items():
        *parents, name = key.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        module.register_buffer(name, value)
    torch.jit.script(root).save(str(path))


def _original_names(model):
    """Shapes of `model`'s weights under OpenAI's names, those that the config is read from."""
    state = model.state_dict()
    text, vision = "text_model.", "vision_model."
    names = {
        "positional_embedding": f"{text}embeddings.position_embedding.weight",
        "token_embedding.weight": f"{text}embeddings.token_embedding.weight",
        "visual.conv1.weight": f"{vision}stem.0.convolution.weight",
        "visual.attnpool.positional_embedding": f"{vision}attention_pool.position_embedding",
        "visual.attnpool.c_proj.weight": f"{vision}attention_pool.attention.out_proj.weight",
        "transformer.resblocks.0.mlp.c_fc.weight": f"{text}encoder.layers.0.mlp.fc1.weight",
    }
    weights = {original: state[ours] for original, ours in names.items()}
    weights["text_projection"] = state["text_projection.weight"].T
    for key in state:
        if key.startswith(f"{vision}stages."):
            _, _, stage, block, *_ = key.split(".")
            weights[f"visual.layer{int(stage) + 1}.{block}.conv1.weight"] = state[key]
        elif key.startswith(f"{text}encoder.layers."):
            weights[f"transformer.resblocks.{key.split('.')[3]}.ln_1.bias"] = state[key]
    return weights
