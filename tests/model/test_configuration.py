import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from denseclip_hf import CLIPResNetConfig, CLIPResNetVisionConfig, DenseCLIPConfig, DenseCLIPForSemanticSegmentation
from helpers.models import EOS, SOS, tiny_config


def test_config_survives_json(kind, tmp_path):
    config = tiny_config(kind, inference_mode="slide", crop_size=[64, 96], stride=[43, 64])
    config.tie_word_embeddings = False
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is DenseCLIPConfig
    assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()


def test_defaults_are_the_published_ones():
    vit, resnet = DenseCLIPConfig(), DenseCLIPConfig.from_preset("denseclip-rn50")
    assert (vit.image_size, vit.crop_size, vit.stride) == (640, [640, 640], [426, 426])
    assert (vit.out_indices, vit.score_map_level, vit.embedding_stride) == ([3, 5, 7, 11], 2, 16)
    assert isinstance(resnet.clip_config, CLIPResNetConfig)
    assert resnet.feature_channels == [256, 512, 1024, 2048]
    assert (resnet.crop_size, resnet.stride, resnet.score_map_level) == ([512, 512], [341, 341], 3)
    prompts = [DenseCLIPConfig(num_context_tokens=n).prompt_template for n in (8, 0)]
    assert prompts == ["{}", "a photo of a {}."]


REFUSED = (ValueError, StrictDataclassError)


@pytest.mark.parametrize(
    ("options", "thing"),
    [
        ({"score_map_level": 4}, "score_map_level"),
        ({"crop_size": 32, "stride": 33}, "stride"),
        ({"crop_size": [1, 2, 3]}, "crop_size"),
        ({"class_token_ids": [[SOS, 5, EOS]]}, "class_token_ids"),
        ({"inference_mode": "tiled"}, "inference_mode"),
        ({"palette": [[0, 0, 0]]}, "palette"),
        ({"temperature": 0}, "temperature"),
        ({"gamma_init": float("nan")}, "gamma_init"),
        ({"context_decoder_num_attention_heads": 0}, "context_decoder_num_attention_heads"),
        ({"id2label": {0: "a", 1: "b", 2: "A "}}, "'A ' appears twice"),
        ({"id2label": {"a": "b"}}, "class ids"),
        ({"drop_path_rate": 1.0}, "drop_path_rate"),
        ({"out_indices": [0, 1, 2, 4]}, "out_indices"),
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


@pytest.mark.parametrize("num_labels", [255, 256])
def test_no_class_is_ignored_by_default(num_labels):
    config = DenseCLIPConfig(num_labels=num_labels)
    assert config.semantic_loss_ignore_index == (255 if num_labels == 255 else -100)
    if num_labels > 255:
        with pytest.raises(REFUSED, match="semantic_loss_ignore_index"):
            DenseCLIPConfig(num_labels=num_labels, semantic_loss_ignore_index=255)


@pytest.mark.parametrize(
    "options",
    [
        {"num_attention_heads": 0},
        {"vission_config": {}},
    ],
)
def test_wrong_resnets_are_refused(options):
    kind = CLIPResNetConfig if "vission_config" in options else CLIPResNetVisionConfig
    with pytest.raises(REFUSED, match=next(iter(options))):
        kind(**options)


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


def test_a_clip_is_not_taken_for_a_segmenter(kind, tmp_path):
    tiny_config(kind).clip_config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="from_clip"):
        DenseCLIPConfig.from_pretrained(tmp_path)
