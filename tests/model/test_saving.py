"""Saved and loaded again: equal bit for bit, in every way transformers offers."""

import json

import accelerate
import pytest
import torch
from packaging import version
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from denseclip_hf import DenseCLIPForSemanticSegmentation
from helpers.models import EOS, SOS, tiny_model


def assert_same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


@pytest.fixture
def model(kind):
    """A whole ViT, a ResNet with frozen classes."""
    model = tiny_model(kind)
    if kind == "resnet":
        model.freeze_classes()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_is_exact(model, dtype, tmp_path, images):
    model.to(dtype).save_pretrained(tmp_path)
    for loaded in (
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path),
        DenseCLIPForSemanticSegmentation.from_pretrained(tmp_path, dtype=dtype, device_map="auto"),
    ):
        assert loaded.dtype == dtype and not loaded.training
        assert_same_weights(loaded, model)
        with torch.no_grad():
            assert torch.equal(loaded(images.to(dtype)).logits, model(images.to(dtype)).logits)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoConfig.from_pretrained(tmp_path).class_token_ids == model.config.class_token_ids
    half = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same_weights(half, model.to(torch.bfloat16))


def test_sharded(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_weights(AutoModelForSemanticSegmentation.from_pretrained(tmp_path), model)


@pytest.mark.parametrize("through_config", [False, True])
def test_new_names_are_read_by_the_tokenizer_beside_the_model(word_model_dir, tmp_path, through_config):
    """As transformers' example scripts and task guides load a model for other classes."""
    classes = {"id2label": {0: "tree", 1: "sea", 2: "sky"}, "label2id": {"tree": 0, "sea": 1, "sky": 2}}
    before = AutoModelForSemanticSegmentation.from_pretrained(word_model_dir)
    if through_config:
        classes = {"config": AutoConfig.from_pretrained(word_model_dir, **classes)}
    loaded = AutoModelForSemanticSegmentation.from_pretrained(
        word_model_dir, ignore_mismatched_sizes=True, **classes
    ).eval()
    assert loaded.config.id2label == {0: "tree", 1: "sea", 2: "sky"}
    weights, kept = loaded.decode_head.classifier.weight, before.decode_head.classifier.weight
    old = before.config.label2id
    assert torch.equal(weights[0], kept[old["tree"]]) and torch.equal(weights[2], kept[old["sky"]])
    assert not any(torch.equal(weights[1], row) for row in kept)
    assert loaded(torch.zeros(1, 3, 64, 64)).logits.shape[1] == 3


def test_new_names_without_a_tokenizer_stop_at_loading(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer"):
        AutoModelForSemanticSegmentation.from_pretrained(tmp_path, id2label={0: "tree", 1: "sea", 2: "car"})


def test_the_usual_idiom_for_another_number_of_classes(kind, tmp_path, images):
    model = tiny_model(kind, palette=[[0, 0, 0]] * 3)
    model.save_pretrained(tmp_path)
    for loader in (DenseCLIPForSemanticSegmentation, AutoModelForSemanticSegmentation):
        loaded = loader.from_pretrained(tmp_path, ignore_mismatched_sizes=True, num_labels=7)
        assert loaded.config.num_labels == 7 == len(loaded.config.label2id)
        assert loaded.config.class_token_ids is None and loaded.config.palette is None
        assert loaded.config.id2label == {i: f"LABEL_{i}" for i in range(7)}
    with pytest.raises(ValueError, match="set_classes"):
        loaded(images)
    names = ["sky", "road", "car", "tree", "sea"]
    loaded.set_classes(names, lambda text: {"input_ids": [SOS, 3 + names.index(text), EOS]})
    assert loaded(images).logits.shape[1] == 5
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "again").eval()
    assert again.config.id2label == dict(enumerate(names))
    with torch.no_grad():
        assert torch.equal(again(images).logits, loaded(images).logits)


def test_the_same_classes_stay(tmp_path):
    model = tiny_model(palette=[[0, 0, 0]] * 3)
    model.save_pretrained(tmp_path)
    for same in ({"num_labels": 3}, {"id2label": {str(i): f"class {i}" for i in range(3)}}, {"temperature": 0.5}):
        loaded = DenseCLIPForSemanticSegmentation.from_pretrained(tmp_path, **same)
        assert loaded.config.class_token_ids == model.config.class_token_ids and loaded.config.palette
        assert loaded.config.id2label == model.config.id2label


def test_other_names_with_their_tokens(tmp_path, images):
    tiny_model().save_pretrained(tmp_path)
    new = {"id2label": {0: "a", 1: "b"}, "class_token_ids": [[SOS, 5, EOS], [SOS, 6, EOS]]}
    loaded = DenseCLIPForSemanticSegmentation.from_pretrained(tmp_path, ignore_mismatched_sizes=True, **new)
    assert loaded.config.class_token_ids == new["class_token_ids"] and loaded(images).logits.shape[1] == 2


OLD_ACCELERATE = version.parse(accelerate.__version__) < version.parse("1.15")
ALL_ON_DISK = pytest.mark.skipif(OLD_ACCELERATE, reason="accelerate before 1.15 leaves no model wholly on the disk")


@pytest.mark.parametrize("share", [pytest.param(0.1, marks=ALL_ON_DISK), 0.8])
@pytest.mark.filterwarnings("ignore")
def test_offloaded(model, tmp_path, images, share):
    """Memory for a share of the model: to the disk all of it or some; the logits stay bit for bit."""
    memory = int(share * sum(p.numel() * p.element_size() for p in model.parameters()))
    model.save_pretrained(tmp_path / "model")
    loaded = AutoModelForSemanticSegmentation.from_pretrained(
        tmp_path / "model", device_map="auto", max_memory={"cpu": memory}, offload_folder=tmp_path / "offload"
    )
    on_disk = {parameter.is_meta for parameter in loaded.parameters()}
    assert on_disk == {0.1: {True}, 0.8: {True, False}}[share]
    with torch.no_grad():
        for pixels in (images, torch.cat([images, images], dim=3)):
            assert torch.equal(loaded(pixels).logits, model(pixels).logits)
