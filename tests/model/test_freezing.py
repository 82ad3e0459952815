"""Models for inference alone: the same logits without a text tower, and no training."""

import pytest
import torch
from transformers import AutoModelForSemanticSegmentation

from denseclip_hf import DenseCLIPForSemanticSegmentation
from helpers.models import tiny_config, tiny_model


@pytest.fixture
def frozen():
    model = tiny_model()
    model.freeze_classes()
    return model


def test_logits_are_the_same_bit_for_bit(kind, images, tmp_path):
    model = tiny_model(kind)
    with torch.no_grad():
        before = model(images)
        classes = model.encode_classes().clone()
        model.freeze_classes()
        model.freeze_classes()  # again
        after = model(images)
        model.save_pretrained(tmp_path)
        loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
        again = loaded(images)
    assert loaded.config.frozen_classes and torch.equal(loaded.encode_classes(), classes)
    for name in ("logits", "score_maps", "text_embeds"):
        assert torch.equal(before[name], after[name]) and torch.equal(before[name], again[name])


def test_nothing_of_the_text_tower_is_left(frozen):
    names = [*dict(frozen.named_parameters()), *frozen.state_dict()]
    assert not any(part in name for name in names for part in ("text_model", "clip.text_", "logit_scale", "prompts"))
    assert "class_embeddings" in frozen.state_dict()
    fresh = DenseCLIPForSemanticSegmentation(frozen.config)
    assert fresh.state_dict().keys() == frozen.state_dict().keys() and not fresh.training


@pytest.mark.parametrize(
    "action",
    [
        lambda model: model.train(),
        lambda model: model.set_classes(["sky"], None),
        lambda model: model.encode_texts(["sky"], None),
    ],
)
def test_training_and_new_words_are_refused(frozen, action):
    with pytest.raises(ValueError, match="frozen"):
        action(frozen)


def test_nothing_of_it_gets_a_gradient(frozen, images, tmp_path):
    frozen.save_pretrained(tmp_path)
    for model in (frozen, AutoModelForSemanticSegmentation.from_pretrained(tmp_path)):
        assert not any(parameter.requires_grad for parameter in model.parameters())
        with pytest.raises(RuntimeError, match="does not require grad"):
            model(images).logits.sum().backward()


def test_other_classes_are_refused(frozen, tmp_path):
    frozen.save_pretrained(tmp_path)
    load = DenseCLIPForSemanticSegmentation.from_pretrained
    for other in ({"num_labels": 7}, {"id2label": {0: "sky", 1: "road", 2: "sea"}}):
        with pytest.raises(ValueError, match="frozen"):
            load(tmp_path, ignore_mismatched_sizes=True, **other)
    assert load(tmp_path, num_labels=3).config.frozen_classes
    tiny_model().save_pretrained(tmp_path / "whole")
    config = tiny_config(num_labels=7, frozen_classes=True)
    for folder, options in (
        (tmp_path, {"config": config, "ignore_mismatched_sizes": True}),
        (tmp_path, {"frozen_classes": False}),
        (tmp_path / "whole", {"frozen_classes": True}),
    ):
        with pytest.raises(ValueError, match="noise"):
            load(folder, **options)


def test_without_text_there_is_nothing_to_freeze():
    with pytest.raises(ValueError, match="no text guidance"):
        tiny_model(use_text_guidance=False).freeze_classes()
    with pytest.raises(ValueError, match="no class names"):
        tiny_model(class_token_ids=None).freeze_classes()
