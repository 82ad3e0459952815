"""OpenAI's and open_clip's checkpoints: the same features as a reference written for the test."""

import json
import zipfile

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, CLIPModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from denseclip_hf import CLIPResNetModel, DenseCLIPForSemanticSegmentation
from denseclip_hf.cli.convert import main
from denseclip_hf.conversion import CheckpointError, convert_clip
from denseclip_hf.conversion.clip import OPENAI_SETTINGS, clip_config_from_weights
from helpers.checkpoints import FORMATS, IMAGE, tokenizer, write_clip
from helpers.clip_reference import reference_clip
from helpers.golden import FIXTURES


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
RELEASED = json.loads((FIXTURES / "keys.json").read_text())["models"]


@pytest.fixture(autouse=True)
def published(monkeypatch):
    """The archives that these tests write count as OpenAI's."""
    known = type("Known", (), {"__contains__": lambda self, digest: True})()
    monkeypatch.setattr("denseclip_hf.conversion.weights.OPENAI_ARCHIVES", known)


@pytest.mark.parametrize(
    ("kind", "format"),
    [("vit", name) for name in FORMATS] + [("resnet", "torchscript"), ("resnet", "training checkpoint")],
)
def test_features_are_the_reference(tmp_path, kind, format):
    clip, path = write_clip(kind, format, tmp_path)
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
    segmenter = DenseCLIPForSemanticSegmentation.from_clip(
        tmp_path / "out", ["sky", "road"], image_size=64, num_context_tokens=4, context_decoder_hidden_size=8
    )
    logits = segmenter.eval()(IMAGE[None]).logits
    assert logits.shape[:2] == (1, 2) and logits.isfinite().all()


@pytest.mark.parametrize(("kind", "format"), [("vit", "torchscript"), ("resnet", "state dict")])
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


@pytest.mark.parametrize(("size", "depths", "output"), [("res50", [3, 4, 6, 3], 1024), ("res101", [3, 4, 23, 3], 512)])
def test_openais_resnets_have_the_published_heads(size, depths, output):
    """Read from the released DenseCLIPs, which have the names of their CLIPs."""
    (released,) = [shapes["state_dict"] for name, shapes in RELEASED.items() if size in name]
    clip = {key.replace("backbone.", "visual.").replace("text_encoder.", ""): shape for key, shape in released.items()}
    found = clip_config_from_weights({key: torch.empty(shape, device="meta") for key, shape in clip.items()})
    assert found.vision_config.num_attention_heads == 32 and found.text_config.num_attention_heads == 8
    assert list(found.vision_config.depths) == depths and found.vision_config.image_size == 512
    assert found.projection_dim == output and found.text_config.num_hidden_layers == 12


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "torchscript"])
def test_an_activation_is_never_guessed(tmp_path, format):
    """It is given, or told by the settings in OpenAI's files."""
    _, path = write_clip("vit", format, tmp_path)
    with pytest.raises(ValueError, match="--hidden_act"):
        convert_clip(path, tmp_path / "out", tokenizer())
    assert not (tmp_path / "out").exists()
    model = convert_clip(path, tmp_path / "out", tokenizer(), hidden_act="gelu", num_attention_heads=4)
    assert model.config.text_config.hidden_act == "gelu"
    assert model.config.vision_config.num_attention_heads == 4 and model.config.text_config.num_attention_heads == 2
    if format == "state dict":
        settings = {name: torch.tensor(64) for name in OPENAI_SETTINGS}
        torch.save({**torch.load(path), **settings}, path)
        config = convert_clip(path, tmp_path / "told", tokenizer()).config
        assert config.vision_config.hidden_act == config.text_config.hidden_act == "quick_gelu"


def test_heads_of_known_image_towers_and_of_others_only_on_demand():
    """As in open_clip's model configs: head widths of 64, and 80, 88, 104, 112 in the wide ones."""
    for width, heads in {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 1664: 16, 1792: 16}.items():
        assert clip_config_from_weights(_wide(width)).vision_config.num_attention_heads == heads
    for width in (352, 1152, 2048):
        with pytest.raises(ValueError, match="--num_attention_heads"):
            clip_config_from_weights(_wide(width))
        assert clip_config_from_weights(_wide(width), num_attention_heads=8).vision_config.num_attention_heads == 8


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
    "no CLIP": ({"fc.weight": torch.zeros(1)}, "visual.conv1.weight"),
    "a timm tower": ({"visual.trunk.x": torch.zeros(1)}, "visual.conv1.weight"),
    "unused key": ({"logit_bias": torch.zeros(())}, "logit_bias"),
    "missing key": ({"visual.ln_post.bias": None}, "post_layernorm.bias"),
    "misshapen key": ({"ln_final.bias": torch.zeros(3)}, "final_layer_norm.bias"),
    "not finite": ({"ln_final.bias": torch.full((128,), torch.inf)}, "final_layer_norm.bias"),
    "another vocabulary": ({"token_embedding.weight": torch.zeros(600, 128)}, "tokenizer"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_checkpoints_are_refused(tmp_path, case):
    changes, named = BAD[case]
    weights = {} if case in ("no CLIP", "a timm tower") else reference_clip("vit", len(tokenizer())).state_dict()
    weights = {key: value for key, value in {**weights, **changes}.items() if value is not None}
    torch.save(weights, tmp_path / "clip.pt")
    with pytest.raises(ValueError, match=named):
        convert_clip(tmp_path / "clip.pt", tmp_path / "out", tokenizer(), hidden_act="quick_gelu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("RN50.pt", None), ("RN50.pt", b""), ("RN50.pt", b"<html>404 Not Found</html>"), ("RN50.pt", "half"),
        ("clip.safetensors", b"<html>404 Not Found</html>"), ("clip.safetensors", "half"),
    ],
)  # fmt: skip
def test_files_that_are_no_checkpoints_are_refused(tmp_path, name, content):
    if content == "half":
        _, whole = write_clip("vit", "safetensors" if name.endswith("s") else "torchscript", tmp_path)
        content = whole.read_bytes()[:-2000]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OSError if content is None else CheckpointError, match=name):
        convert_clip(tmp_path / name, tmp_path / "out", tokenizer())
    assert not (tmp_path / "out").exists()


def test_programs_that_openai_did_not_publish_are_not_run(tmp_path, monkeypatch):
    monkeypatch.undo()
    _, path = write_clip("vit", "torchscript", tmp_path)
    with pytest.raises(CheckpointError, match="TorchScript"):
        convert_clip(path, tmp_path / "out", tokenizer())


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archives_that_are_no_checkpoints_are_refused(tmp_path, method):
    """A compressed one could take a thousand times its size."""
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", method) as archive:
        archive.writestr("a/data.pkl", bytes(10**6))
    with pytest.raises(CheckpointError, match="bomb.pt"):
        convert_clip(tmp_path / "bomb.pt", tmp_path / "out", tokenizer())


def test_command(tmp_path, capsys):
    _, path = write_clip("resnet", "safetensors", tmp_path)
    tokenizer().save_pretrained(tmp_path / "words")
    given = ["--tokenizer", str(tmp_path / "words"), "--hidden_act", "quick_gelu", "--num_attention_heads", "2"]
    main(["clip", str(path), str(tmp_path / "out"), *given])
    said = capsys.readouterr().out
    assert "parameters" in said and "sha256" in said


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
