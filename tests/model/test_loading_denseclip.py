"""Models around a CLIP, and new names on a trained one."""

import copy
import logging

import pytest
import torch
from transformers import CLIPModel

from denseclip_hf import CLIPResNetModel, DenseCLIPForSemanticSegmentation
from denseclip_hf.example import make_example_clip
from denseclip_hf.model.layers_denseclip import resize_position_grid
from denseclip_hf.model.loading_denseclip import load_clip, load_pretrained
from helpers.models import Tokenizer, forward, tiny_config, tiny_model


def tiny_clip(kind):
    config = tiny_config(kind).clip_config
    torch.manual_seed(5)
    return (CLIPModel if kind == "vit" else CLIPResNetModel)(config)


SIZES = {"context_decoder_hidden_size": 8, "context_decoder_num_attention_heads": 2, "neck_hidden_size": 8}


def test_from_clip_keeps_clip_and_resizes_its_positions(kind, images):
    clip = tiny_clip(kind)
    model = DenseCLIPForSemanticSegmentation.from_clip(
        clip, ["sky", "road"], tokenizer=Tokenizer(), image_size=128, **SIZES
    )
    ours, theirs = model.clip.state_dict(), clip.state_dict()
    key = {
        "vit": "vision_model.embeddings.position_embedding.weight",
        "resnet": "vision_model.attention_pool.position_embedding",
    }
    key = key[kind]
    side = {"vit": 8, "resnet": 4}[kind]
    assert torch.equal(ours[key], resize_position_grid(theirs[key], (side, side)))
    assert all(torch.equal(ours[k], theirs[k]) for k in ours if k != key)
    assert model.config.id2label == {0: "sky", 1: "road"}
    assert (model.config.image_size, model.config.crop_size) == (128, [128, 128])
    assert torch.equal(model.gamma, torch.full((12,), 1e-4))
    assert forward(model.eval(), images).logits.shape[1] == 2


def test_from_clip_by_directory_reports_what_is_new(kind, tmp_path, caplog):
    clip = tiny_clip(kind)
    clip.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        DenseCLIPForSemanticSegmentation.from_clip(tmp_path, ["sky"], tokenizer=Tokenizer(), image_size=96, **SIZES)
    assert "decode_head" in caplog.text
    baseline = {"use_text_guidance": False, "image_size": 64, **SIZES}  # which needs no tokenizer
    assert DenseCLIPForSemanticSegmentation.from_clip(clip, ["sky"], **baseline).clip.text_model is None


def test_from_clip_orders_names_by_their_ids_and_trains_at_the_published_size(kind):
    names = {"1": "road", "0": "sky"}
    model = DenseCLIPForSemanticSegmentation.from_clip(tiny_clip(kind), names, Tokenizer(), **SIZES)
    assert model.config.id2label == {0: "sky", 1: "road"}
    assert model.config.image_size == {"vit": 640, "resnet": 512}[kind]


@pytest.mark.parametrize(
    ("names", "keyword"), [(["a b c d e f g h i j k l"], "tokens"), ([" "], "empty"), ({1: "sky"}, "gaps")]
)
def test_from_clip_refuses_names_that_do_not_fit(names, keyword):
    with pytest.raises(ValueError, match=keyword):
        DenseCLIPForSemanticSegmentation.from_clip(tiny_clip("vit"), names, tokenizer=Tokenizer())


def test_set_classes_keeps_what_known_classes_learned(kind, images):
    model = tiny_model(kind)
    weight = model.decode_head.classifier.weight.clone()
    before = forward(model, images)
    model.set_classes({1: "class 2", 0: "new", 2: "class 0", 3: "newer"}, Tokenizer())
    assert model.config.id2label == {0: "new", 1: "class 2", 2: "class 0", 3: "newer"}
    assert torch.equal(model.decode_head.classifier.weight[[1, 2]], weight[[2, 0]])
    after = forward(model, images)
    assert after.logits.shape[1] == after.score_maps.shape[1] == 4
    assert before.logits.shape[1] == 3


def test_a_tokenizer_of_another_model_is_refused():
    class Other:
        def __call__(self, text):
            return {"input_ids": [1, 5, 2]}

    model = tiny_model()
    before = copy.deepcopy(model.config)
    with pytest.raises(ValueError, match="tokenizer"):
        model.set_classes(["cat", "dog"], Other())
    assert model.config.to_dict() == before.to_dict()
    with pytest.raises(ValueError, match="tokenizer"):
        model.encode_texts(["cat"], Other())


@pytest.mark.parametrize(
    ("clip", "error", "named"),
    [
        ("no/such/directory", OSError, "no/such/directory"),
        ("no-such-name", OSError, "no-such-name"),
        (torch.nn.Identity(), AttributeError, "Identity"),
    ],
)
def test_what_is_no_clip_is_refused(clip, error, named):
    with pytest.raises(error, match=named):
        DenseCLIPForSemanticSegmentation.from_clip(clip, ["sky"], Tokenizer())


@pytest.mark.parametrize(
    ("file", "content", "part"),
    [
        ("model.safetensors", b"", "model"),
        ("config.json", b'{"model_type": "clip", "vision_config": 5}', "model"),
        ("tokenizer.json", b"{}", "tokenizer"),
        ("tokenizer.json", b'{"model":', "tokenizer"),
    ],
)
def test_a_damaged_clip_is_refused_by_name(tmp_path, file, content, part):
    make_example_clip(tmp_path / "clip")
    (tmp_path / "clip" / file).write_bytes(content)
    with pytest.raises(ValueError, match=part) as caught:
        load_clip(tmp_path / "clip")
    assert str(tmp_path / "clip") in str(caught.value) and "\n" not in str(caught.value)


def test_a_clip_without_a_tokenizer_is_told_so(tmp_path):
    tiny_clip("vit").save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="no tokenizer"):
        load_clip(tmp_path / "clip")


def test_a_run_that_has_not_ended_is_told_so(tmp_path):
    tiny_model().save_pretrained(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match="checkpoint-6"):
        load_pretrained(DenseCLIPForSemanticSegmentation, tmp_path)
