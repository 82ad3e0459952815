"""Image-text models of every family: what DenseCLIP reads from them is what they say themselves."""

import os
import subprocess
import sys

import pytest
import torch
import transformers

from denseclip_hf import DenseCLIPForSemanticSegmentation, DenseCLIPImageProcessor, DenseCLIPModel
from denseclip_hf.inference import Segmenter, load_model
from denseclip_hf.sharing import add_code, export
from denseclip_hf.sharing.export import run_exported
from helpers.families import FAMILIES, NAMES, SIZES, VISION, image_text_model, segmenter_of, tokenizer_of
from helpers.models import COST_AGGREGATION, saved_frozen_and_loaded


every_family = pytest.mark.parametrize("family", FAMILIES)
every_architecture = pytest.mark.parametrize("family", [name for name in FAMILIES if name != "Siglip 2"])


@every_family
@torch.no_grad()
def test_image_embedding_is_the_familys_own(family):
    clip = image_text_model(family)
    options = {} if family == "Tipsv2" else {"interpolate_pos_encoding": True}
    for image_size, size in ((64, (64, 64)), (64, (48, 80)), (96, (96, 96))):  # in turn, resized on the way and once
        model = DenseCLIPModel.from_clip(clip, image_size=image_size).eval()
        images = torch.randn(2, 3, *size)
        own = clip.get_image_features(images, **options).pooler_output
        torch.testing.assert_close(model.get_image_features(images).pooler_output, own, atol=1e-5, rtol=0)
        assert model.get_dense_features(images).shape == (2, own.shape[1], size[0] // 16, size[1] // 16)


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_class_embeddings_are_the_familys_own(family, attention):
    clip, tokenizer = image_text_model(family), tokenizer_of(family)
    model = DenseCLIPModel.from_clip(clip, NAMES, tokenizer).eval()
    model.set_attn_implementation(attention)
    other = "Siglip" if family in ("MetaClip2", "Tipsv2") else "MetaClip2"
    with pytest.raises(ValueError, match="tokenizer"):
        DenseCLIPModel.from_clip(clip, NAMES, tokenizer_of(other))
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


@every_architecture
def test_every_trainable_parameter_gets_a_gradient(family):
    model, _ = segmenter_of(family)
    model.train()
    model(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # A key's bias cancels in the softmax.
    assert not {name for name in without if "k_proj.bias" not in name}
    assert model.prompts.context_vectors.grad.any()


@every_architecture
def test_saved_model_loads_bit_equal(family, tmp_path):
    model, _ = segmenter_of(family)
    frozen = saved_frozen_and_loaded(model, tmp_path)
    assert not any("text_model" in name for name in frozen.state_dict())


@every_family
def test_from_a_directory(family, tmp_path):
    model, clip = segmenter_of(family)
    clip.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        DenseCLIPModel.from_clip(tmp_path, NAMES)
    tokenizer_of(family).save_pretrained(tmp_path)
    loaded = DenseCLIPForSemanticSegmentation.from_clip(tmp_path, NAMES, **SIZES)
    assert loaded.config.class_token_ids == model.config.class_token_ids
    for name, weight in model.clip.state_dict().items():
        assert torch.equal(loaded.clip.state_dict()[name], weight), name


REMOTE = """
import sys, torch
sys.modules["denseclip_hf"] = None
from pathlib import Path
from transformers import AutoModelForSemanticSegmentation
for folder in Path(sys.argv[1]).iterdir():
    model = AutoModelForSemanticSegmentation.from_pretrained(folder, trust_remote_code=True)
    saved = torch.load(folder / "saved.pt", weights_only=True)
    with torch.no_grad():
        assert torch.equal(model(saved["images"]).logits, saved["logits"]), folder
    print(folder.name)
"""


@pytest.mark.slow
def test_remote_code_without_the_package(tmp_path):
    models = {name: segmenter_of(name)[0] for name in FAMILIES if name != "Siglip 2"}
    stages = transformers.ConvNextConfig(hidden_sizes=[4, 8, 16, 32], depths=[1, 1, 1, 1])
    models["a backbone"] = DenseCLIPForSemanticSegmentation.from_backbone(
        stages, image_text_model("MetaClip2"), NAMES, tokenizer_of("MetaClip2"), **SIZES
    ).eval()
    for family, model in models.items():
        model.save_pretrained(tmp_path / "models" / family)
        DenseCLIPImageProcessor().save_pretrained(tmp_path / "models" / family)
        add_code(tmp_path / "models" / family)
        images = torch.randn(1, 3, 64, 96)
        with torch.no_grad():
            saved = {"images": images, "logits": model(images).logits}
        torch.save(saved, tmp_path / "models" / family / "saved.pt")
    result = subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path / "models")],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert sorted(result.stdout.splitlines()) == sorted(models), result.stderr


@pytest.mark.slow
@every_architecture
def test_exported_programs_compute_the_same(family, tmp_path):
    """At any size, but for MetaCLIP 2: its image tower is CLIP's, whose programs tests/sharing tries at any."""
    model, _ = segmenter_of(family)
    fixed = (64, 96) if family == "MetaClip2" else None
    file = export(model, DenseCLIPImageProcessor(), tmp_path, "onnx", size=fixed)
    for shape in [(1, 3, *fixed)] if fixed else [(1, 3, 64, 64), (2, 3, 96, 64), (1, 3, 64, 160)]:
        images = torch.randn(shape)
        with torch.no_grad():
            expected = model(images).logits
        torch.testing.assert_close(run_exported(file, images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@every_architecture
def test_compiles_as_one_graph(family):
    model, _ = segmenter_of(family, drop_path_rate=0.0, decode_head_dropout=0.0, context_decoder_dropout=0.0)
    images, labels = torch.randn(2, 3, 96, 64), torch.randint(3, (2, 96, 64))
    model.train()
    loss = torch.compile(model, backend="eager", fullgraph=True)(images, labels).loss
    torch.testing.assert_close(loss, model(images, labels).loss, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert model.prompts.context_vectors.grad.any()


@every_architecture
def test_baseline_has_no_language(family):
    model, _ = segmenter_of(family, use_text_guidance=False)
    model.train()
    model(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))).loss.backward()
    assert not any("text" in name for name, _ in model.named_parameters())
    assert all(p.grad is not None for p in model.parameters())


@every_architecture
@torch.no_grad()
def test_sliding_windows(family):
    model, _ = segmenter_of(family, inference_mode="slide", crop_size=64, stride=32)
    images = torch.randn(1, 3, 64, 96)
    assert model(images).logits.shape == (1, 3, 64, 96)
    assert model.predict_from_scores(images).segmentation[0].shape == (64, 96)


@every_architecture
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


@every_architecture
def test_a_decoder_that_knows_no_classes(family):
    last_block = "class_token" if family == "MetaClip2" else "plain"
    model, _ = segmenter_of(family, **COST_AGGREGATION | {"last_block": last_block})
    words = model.encode_texts(["tall road", *NAMES], tokenizer_of(family))
    outputs = model(torch.randn(2, 3, 64, 80), torch.randint(4, (2, 64, 80)), text_embeds=words)
    assert outputs.logits.shape == (2, 4, 16, 16)
    outputs.loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.clip.vision_model.embeddings.parameters())


def test_a_patch_of_14_has_whole_patches():
    clip = image_text_model("Tipsv2", image_size=56, patch_size=14)
    options = {**SIZES, "image_size": None}
    model = DenseCLIPForSemanticSegmentation.from_clip(clip, NAMES, tokenizer_of("Tipsv2"), **options)
    assert model.config.image_size == 630 and model.config.crop_size == [630, 630]
    decoder = {"decode_head": "cost_aggregation", "last_block": "plain"}
    model = DenseCLIPForSemanticSegmentation.from_clip(clip, NAMES, tokenizer_of("Tipsv2"), **decoder)
    assert model.config.tower_image_size == 336
    with pytest.raises(ValueError, match="504 or 518"):
        DenseCLIPForSemanticSegmentation.from_clip(
            clip, NAMES, tokenizer_of("Tipsv2"), **{**options, "image_size": 512}
        )


@every_architecture
def test_a_processor_of_another_family_is_refused(family, tmp_path):
    model, _ = segmenter_of(family)
    own = DenseCLIPImageProcessor(image_mean=model.tower.image_mean, image_std=model.tower.image_std)
    assert Segmenter(model, own)
    other = DenseCLIPImageProcessor(image_mean=[0.4] * 3, image_std=model.tower.image_std)
    with pytest.raises(ValueError, match="image_mean"):
        Segmenter(model, other)
    for part in (model, other):
        part.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_mean"):
        load_model(tmp_path)


def test_a_model_of_another_kind_or_without_that_last_block_is_refused(tmp_path):
    vision = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**VISION, intermediate_size=32))
    with pytest.raises(ValueError, match="image-text model"):
        DenseCLIPModel.from_clip(vision)
    vision.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image-text model"):
        DenseCLIPModel.from_clip(tmp_path)
    with pytest.raises(ValueError, match="last_block"):
        DenseCLIPModel.from_clip(image_text_model("Siglip"), last_block="class_token")
