"""Models around a CLIP, and new names on a trained one."""

import copy
import logging
import re

import pytest
import torch
from transformers import CLIPModel

from denseclip_hf import CLIPResNetModel, DenseCLIPForSemanticSegmentation
from denseclip_hf.example import make_example_clip
from denseclip_hf.model.layers_denseclip import resize_position_grid
from denseclip_hf.model.loading_denseclip import load_clip, load_pretrained
from helpers.models import EOS, SOS, Tokenizer, forward, tiny_config, tiny_model


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


def test_from_clip_trains_at_the_published_size(kind):
    model = DenseCLIPForSemanticSegmentation.from_clip(tiny_clip(kind), ["sky"], Tokenizer(), **SIZES)
    assert model.config.image_size == {"vit": 640, "resnet": 512}[kind]


def test_from_clip_takes_token_ids_without_a_tokenizer():
    ids = [[SOS, 5, EOS]]
    model = DenseCLIPForSemanticSegmentation.from_clip(tiny_clip("vit"), ["sky"], class_token_ids=ids, **SIZES)
    assert model.config.class_token_ids == ids


def test_from_clip_by_directory_reports_what_is_new(kind, tmp_path, caplog):
    tiny_clip(kind).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        DenseCLIPForSemanticSegmentation.from_clip(tmp_path, ["sky"], tokenizer=Tokenizer(), image_size=96, **SIZES)
    assert "Newly initialized" in caplog.text and "decode_head" in caplog.text


def test_from_clip_makes_the_baseline_without_tokenizer(kind):
    model = DenseCLIPForSemanticSegmentation.from_clip(
        tiny_clip(kind), ["sky"], image_size=64, use_text_guidance=False, **SIZES
    )
    assert model.clip.text_model is None


def test_from_clip_orders_names_by_their_ids():
    model = DenseCLIPForSemanticSegmentation.from_clip(
        tiny_clip("vit"), {"1": "road", "0": "sky"}, tokenizer=Tokenizer(), image_size=64, **SIZES
    )
    assert model.config.id2label == {0: "sky", 1: "road"}
    with pytest.raises(ValueError, match="without gaps"):
        DenseCLIPForSemanticSegmentation.from_clip(tiny_clip("vit"), {1: "sky"}, tokenizer=Tokenizer())


@pytest.mark.parametrize(
    ("names", "sentence"), [(["a b c d e f g h i j k l"], "tokens with SOS and EOS"), ([" "], "empty")]
)
def test_from_clip_refuses_names_that_do_not_fit(names, sentence):
    with pytest.raises(ValueError, match=sentence):
        DenseCLIPForSemanticSegmentation.from_clip(tiny_clip("vit"), names, tokenizer=Tokenizer())


def test_set_classes_keeps_what_known_classes_learned(kind, images):
    model = tiny_model(kind)
    weight = model.decode_head.classifier.weight.clone()
    before = forward(model, images)
    model.set_classes(["new", "class 2", "class 0", "newer"], Tokenizer())
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
        (torch.nn.Identity(), ValueError, "Identity"),
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


def test_refusals_of_this_library_keep_their_own_remedy(tmp_path):
    """A CLIP is a model, here or on the Hub, only no segmenter: neither damaged nor misspelled."""
    make_example_clip(tmp_path / "clip")

    class FromTheHub:
        @staticmethod
        def from_pretrained(name):
            return DenseCLIPForSemanticSegmentation.from_pretrained(tmp_path / "clip")

    for kind, name in ((DenseCLIPForSemanticSegmentation, str(tmp_path / "clip")), (FromTheHub, "openai/clip")):
        with pytest.raises(ValueError, match="not a segmenter") as caught:
            load_pretrained(kind, name)
        assert not re.search("name on the Hub|save it again|give another", str(caught.value))


def test_a_clip_without_a_tokenizer_is_told_so(tmp_path):
    tiny_clip("vit").save_pretrained(tmp_path / "clip")
    with pytest.raises(ValueError, match="no tokenizer"):
        load_clip(tmp_path / "clip")


def test_a_run_that_has_not_ended_is_told_so(tmp_path):
    tiny_model().save_pretrained(tmp_path / "checkpoint-6")
    with pytest.raises(ValueError, match="checkpoint-6"):
        load_pretrained(DenseCLIPForSemanticSegmentation, tmp_path)


def test_set_classes_takes_a_mapping():
    model = tiny_model()
    model.set_classes({1: "road", 0: "sky"}, Tokenizer())
    assert model.config.id2label == {0: "sky", 1: "road"}
