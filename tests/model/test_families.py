"""Image-text models of every family: what DenseCLIP reads from them is what they say themselves."""

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSemanticSegmentation, PreTrainedTokenizerFast

from denseclip_hf import DenseCLIPForSemanticSegmentation, DenseCLIPModel


NAMES = ["cat", "wet road", "tall green tree"]
SIZES = {
    "num_context_tokens": 4, "context_decoder_hidden_size": 8, "context_decoder_num_attention_heads": 2,
    "context_decoder_num_layers": 1, "neck_hidden_size": 8, "decode_head_hidden_size": 8, "image_size": 64,
}  # fmt: skip
TEXT = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 16,
}  # fmt: skip
VISION = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "image_size": 64, "patch_size": 16}
FAMILIES = {
    "MetaClip2": (
        {"text_config": {**TEXT, "eos_token_id": 2, "projection_dim": 12},
         "vision_config": {**VISION, "intermediate_size": 32, "projection_dim": 12}, "projection_dim": 12},
        "<s> $A </s>", "<pad>",
    ),
    "Siglip": (
        {"text_config": {**TEXT, "projection_size": 16}, "vision_config": {**VISION, "intermediate_size": 32}},
        "$A </s>", "</s>",
    ),
    # The fixed-size checkpoints of SigLIP 2 are SigLIPs whose tokenizer pads with another token than the config names.
    "Siglip 2": (
        {"text_config": {**TEXT, "projection_size": 16}, "vision_config": {**VISION, "intermediate_size": 32}},
        "$A </s>", "<pad>",
    ),
    "Tipsv2": (
        {"text_config": TEXT, "vision_config": {**VISION, "mlp_ratio": 2, "num_register_tokens": 1}},
        "$A", "<pad>",
    ),
}  # fmt: skip
every_family = pytest.mark.parametrize("family", FAMILIES)


def image_text_model(family, **vision):
    """A tiny model of the family's own class, every weight random."""
    options = FAMILIES[family][0]
    name = family.removesuffix(" 2")
    options = {**options, "vision_config": {**options["vision_config"], **vision}}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # many start at zero or one, where a forgotten one makes no difference
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def tokenizer_of(family):
    """A tokenizer of a few words that ends, and pads, its texts as the family's does."""
    _, template, pad = FAMILIES[family]
    words = ["<s>", "<pad>", "</s>", "<unk>", "a", "photo", "of", *" ".join(NAMES).split()]
    tokens = {word: index for index, word in enumerate(words)}
    backend = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(word, tokens[word]) for word in ("<s>", "</s>") if word in template]
    backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
    ends = {"<s>": "bos_token", "</s>": "eos_token"}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=pad, unk_token="<unk>", model_max_length=16,
        **{ends[word]: word for word, _ in special},
    )  # fmt: skip


def segmenter_of(family, **options):
    """A tiny segmenter in eval mode around `image_text_model(family)`, which is returned too."""
    clip = image_text_model(family)
    options = {**SIZES, **options}
    model = DenseCLIPForSemanticSegmentation.from_clip(clip, NAMES, tokenizer=tokenizer_of(family), **options)
    return model.eval(), clip


@every_family
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (48, 80)])
def test_image_embedding_is_the_familys_own(family, size):
    clip = image_text_model(family)
    model = DenseCLIPModel.from_clip(clip).eval()
    images = torch.randn(2, 3, *size)
    options = {} if family == "Tipsv2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        own = clip.get_image_features(images, **options).pooler_output
        torch.testing.assert_close(model.get_image_features(images).pooler_output, own, atol=1e-5, rtol=0)
        places = model.get_dense_features(images)
    assert places.shape == (2, own.shape[1], size[0] // 16, size[1] // 16)


@every_family
def test_positions_are_resized_as_the_family_does(family):
    clip = image_text_model(family)
    model = DenseCLIPModel.from_clip(clip, image_size=96).eval()
    images = torch.randn(1, 3, 96, 96)
    options = {} if family == "Tipsv2" else {"interpolate_pos_encoding": True}
    with torch.no_grad():
        own = clip.get_image_features(images, **options).pooler_output
        torch.testing.assert_close(model.get_image_features(images).pooler_output, own, atol=1e-5, rtol=0)


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_class_embeddings_are_the_familys_own(family, attention):
    clip, tokenizer = image_text_model(family), tokenizer_of(family)
    model = DenseCLIPModel.from_clip(clip, NAMES, tokenizer).eval()
    model.set_attn_implementation(attention)
    texts = [f"a photo of a {name}." for name in NAMES]
    padding = "max_length" if family.startswith("Siglip") else True
    inputs = tokenizer(texts, padding=padding, max_length=16, return_tensors="pt", return_token_type_ids=False)
    if family.startswith("Siglip"):
        inputs.pop("attention_mask")  # it reads padding as a part of the text
    with torch.no_grad():
        own = clip.get_text_features(**inputs).pooler_output
        torch.testing.assert_close(model.encode_classes(), own, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_texts(NAMES, tokenizer, ["a photo of a {}."]), own, atol=1e-5, rtol=0)


def test_a_siglip_place_is_what_pooling_it_alone_gives():
    clip = image_text_model("Siglip")
    model = DenseCLIPModel.from_clip(clip).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        tokens = clip.vision_model(images).last_hidden_state  # 1, 16, 16
        alone = clip.vision_model.head(tokens.transpose(0, 1))
        places = model.get_dense_features(images)[0].flatten(1).T
    torch.testing.assert_close(places, alone, atol=1e-5, rtol=0)


@every_family
def test_every_trainable_parameter_gets_a_gradient(family):
    model, _ = segmenter_of(family)
    model.train()
    model(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A key's bias cancels in the softmax.
    assert not {name for name in without if "k_proj.bias" not in name}
    assert model.prompts.context_vectors.grad.any()


@every_family
def test_saved_model_loads_bit_equal(family, tmp_path):
    model, _ = segmenter_of(family)
    images = torch.randn(1, 3, 80, 64)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(images).logits, model(images).logits)
        model.freeze_classes()
        model.save_pretrained(tmp_path)
        frozen = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
        assert torch.equal(frozen(images).logits, loaded(images).logits)
    assert not any("text_model" in name for name in frozen.state_dict())


@every_family
def test_from_a_directory(family, tmp_path):
    model, clip = segmenter_of(family)
    clip.save_pretrained(tmp_path)
    tokenizer_of(family).save_pretrained(tmp_path)
    loaded = DenseCLIPForSemanticSegmentation.from_clip(tmp_path, NAMES, **SIZES)
    assert loaded.config.class_token_ids == model.config.class_token_ids
    for name, weight in model.clip.state_dict().items():
        assert torch.equal(loaded.clip.state_dict()[name], weight), name


@every_family
def test_new_classes(family):
    model, _ = segmenter_of(family)
    before = model.encode_classes()
    model.set_classes(["tall green tree", "cat"], tokenizer_of(family))
    torch.testing.assert_close(model.encode_classes(), before[[2, 0]], atol=1e-5, rtol=0)
    assert model(torch.randn(1, 3, 64, 64)).logits.shape == (1, 2, 16, 16)


@every_family
def test_sliding_windows(family):
    model, _ = segmenter_of(family, inference_mode="slide", crop_size=64, stride=32)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        assert model(images).logits.shape == (1, 3, 64, 96)
        scores = model.predict_from_scores(images)
    assert scores.segmentation[0].shape == (64, 96)


@every_family
def test_baseline_has_no_language(family):
    model, _ = segmenter_of(family, use_text_guidance=False)
    model.train()
    model(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))).loss.backward()
    assert not any("text" in name for name, _ in model.named_parameters())
    assert all(p.grad is not None for p in model.parameters())


@every_family
def test_adapters(family):
    peft = pytest.importorskip("peft")
    model, _ = segmenter_of(family)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = model(images).logits
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2))
    with torch.no_grad():
        torch.testing.assert_close(adapted.eval()(images).logits, before)
    adapted(images, torch.randint(3, (1, 64, 64))).loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_a_patch_of_14_has_whole_patches():
    clip = image_text_model("Tipsv2", image_size=56, patch_size=14)
    options = {**SIZES, "image_size": None}
    model = DenseCLIPForSemanticSegmentation.from_clip(clip, NAMES, tokenizer_of("Tipsv2"), **options)
    assert model.config.image_size == 630 and model.config.crop_size == [630, 630]
    with pytest.raises(ValueError, match="504 or 518"):
        DenseCLIPForSemanticSegmentation.from_clip(
            clip, NAMES, tokenizer_of("Tipsv2"), **{**options, "image_size": 512}
        )


@every_family
def test_a_tokenizer_of_another_family_is_refused(family):
    other = "Siglip" if family in ("MetaClip2", "Tipsv2") else "MetaClip2"
    with pytest.raises(ValueError, match="tokenizer"):
        DenseCLIPModel.from_clip(image_text_model(family), NAMES, tokenizer_of(other))


def test_a_model_of_another_kind_is_refused():
    vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, intermediate_size=32))
    with pytest.raises(ValueError, match="image-text model"):
        DenseCLIPModel.from_clip(vision)


@pytest.mark.parametrize("family", ["Siglip", "Tipsv2"])
def test_a_last_block_that_the_tower_does_not_have_is_refused(family):
    with pytest.raises(ValueError, match="last_block"):
        DenseCLIPModel.from_clip(image_text_model(family), last_block="class_token")
