import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, CLIPConfig

from denseclip_hf import CLIPResNetConfig, CLIPResNetVisionConfig, DenseCLIPConfig, DenseCLIPForSemanticSegmentation
from helpers.models import EOS, SOS, tiny_config


def test_config_survives_json(kind, tmp_path):
    config = tiny_config(kind, inference_mode="slide", crop_size=[64, 96], stride=[43, 64])
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "denseclip"
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DenseCLIPConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_default_config_is_the_published_vit():
    config = DenseCLIPConfig()
    assert (config.image_size, config.crop_size, config.stride) == (640, [640, 640], [426, 426])
    assert (config.out_indices, config.score_map_level, config.embedding_stride) == ([3, 5, 7, 11], 2, 16)


def test_preset_rn50_is_the_published_one():
    config = DenseCLIPConfig.from_preset("denseclip-rn50")
    assert isinstance(config.clip_config, CLIPResNetConfig)
    assert config.feature_channels == [256, 512, 1024, 2048]
    assert (config.crop_size, config.stride, config.score_map_level) == ([512, 512], [341, 341], 3)


def test_vision_config_decides_the_tower():
    resnet = DenseCLIPConfig(clip_config={"vision_config": {"model_type": "clip_resnet_vision_model"}})
    assert isinstance(resnet.clip_config.vision_config, CLIPResNetVisionConfig)
    assert type(DenseCLIPConfig(clip_config=CLIPConfig()).clip_config) is CLIPConfig


REFUSED = (ValueError, StrictDataclassError)


@pytest.mark.parametrize(
    ("options", "thing"),
    [
        ({"score_map_level": 4}, "score_map_level"),
        ({"crop_size": 32, "stride": 33}, "stride"),
        ({"crop_size": [1, 2, 3]}, "crop_size"),
        ({"class_token_ids": [[SOS, 5, EOS]]}, "class_token_ids"),
        ({"class_token_ids": [[SOS, 100, EOS]] * 3}, "below 100"),
        ({"class_token_ids": [[SOS, *range(11), EOS]] * 3}, "13 tokens, but 12 fit"),
        ({"num_context_tokens": -1}, "num_context_tokens"),
        ({"prompt_template": "a photo"}, "prompt_template"),
        ({"inference_mode": "tiled"}, "inference_mode"),
        ({"sliding_window_batch_size": 0}, "sliding_window_batch_size"),
        ({"palette": [[0, 0, 0]]}, "palette"),
        ({"palette": [[0, 0, 0], [0, 0], [0, 0, 0]]}, "palette"),
        ({"palette": [[0, 0, 0], [300, 0, 0], [0, 0, 0]]}, "palette"),
        ({"temperature": 0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"gamma_init": float("inf")}, "gamma_init"),
        ({"gamma_init": float("nan")}, "gamma_init"),
        ({"context_decoder_num_attention_heads": 0}, "context_decoder_num_attention_heads"),
        ({"context_decoder_num_layers": -1}, "context_decoder_num_layers"),
        ({"neck_hidden_size": 0}, "neck_hidden_size"),
        ({"id2label": {0: "a", 1: "b", 2: "A "}}, "'A ' appears twice"),
        ({"id2label": {"a": "b"}}, "class ids"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"context_decoder_num_attention_heads": 3}, "must divide"),
        ({"semantic_loss_ignore_index": 1}, "semantic_loss_ignore_index"),
        ({"id2label": {1: "a", 2: "b", 3: "c"}}, "without gaps"),
        ({"top_k": 5}, "top_k"),
        ({"clip_config": {"model_type": "clip_resnet", "vission_config": {}}}, "vision_config"),
        ({"gama_init": 1.0}, "gamma_init"),
    ],
)
def test_wrong_combinations_are_refused(options, thing):
    with pytest.raises(REFUSED, match=thing):
        tiny_config(**options)


def test_two_numbers_of_classes_are_refused():
    with pytest.raises(ValueError, match="num_labels"):
        DenseCLIPConfig(num_labels=5, id2label={0: "sky"})


@pytest.mark.parametrize("num_labels", [255, 256, 300])
def test_no_class_is_ignored_by_default(num_labels):
    config = DenseCLIPConfig(num_labels=num_labels)
    assert config.semantic_loss_ignore_index == (255 if num_labels == 255 else -100)
    if num_labels > 255:
        with pytest.raises(REFUSED, match="semantic_loss_ignore_index"):
            DenseCLIPConfig(num_labels=num_labels, semantic_loss_ignore_index=255)


@pytest.mark.parametrize(
    ("kind", "out_indices"), [("vit", [0, 1, 2]), ("vit", [0, 1, 2, 4]), ("resnet", [0, 1, 2, 3])]
)
def test_blocks_that_a_tower_has_not_are_refused(kind, out_indices):
    with pytest.raises(REFUSED, match="out_indices"):
        tiny_config(kind, out_indices=out_indices)


@pytest.mark.parametrize(
    "options",
    [
        {"depths": [1, 1, 1]},
        {"embedding_size": 5},
        {"num_attention_heads": 7},
        {"num_attention_heads": 0},
        {"image_size": 100},
        {"vission_config": {}},
    ],
)
def test_wrong_resnets_are_refused(options):
    kind = CLIPResNetConfig if "vission_config" in options else CLIPResNetVisionConfig
    with pytest.raises(REFUSED, match=next(iter(options))):
        kind(**options)


@pytest.mark.parametrize(("contexts", "template"), [(8, "{}"), (0, "a photo of a {}.")])
def test_prompt_template_follows_the_contexts(contexts, template):
    assert DenseCLIPConfig(num_context_tokens=contexts).prompt_template == template


def test_classes_are_kept_in_the_order_of_their_ids():
    names = {str(i): f"class {i}" for i in sorted(range(12), key=str)}
    assert list(DenseCLIPConfig(id2label=names).id2label.items()) == [(i, f"class {i}") for i in range(12)]


def test_a_clips_own_data_type_does_not_outlive_it(kind, tmp_path):
    clip = tiny_config(kind).clip_config.to_dict()
    for part in (clip, clip["text_config"], clip["vision_config"]):
        part["dtype"] = "float32"
    model = DenseCLIPForSemanticSegmentation(tiny_config(kind, clip_config=clip))
    model.save_pretrained(tmp_path)
    assert "float32" not in json.dumps(json.loads((tmp_path / "config.json").read_text())["clip_config"])
    half = DenseCLIPForSemanticSegmentation.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_options_of_every_transformers_config_survive_a_file(tmp_path):
    config = tiny_config()
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path)
    assert DenseCLIPConfig.from_pretrained(tmp_path).tie_word_embeddings is False


def test_a_clip_is_not_taken_for_a_segmenter(kind, tmp_path):
    tiny_config(kind).clip_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_clip"):
        DenseCLIPConfig.from_pretrained(tmp_path)
