"""Backbones without language in place of a CLIP's image tower, and the pool that embeds their places."""

import copy

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoBackbone, CLIPModel

from denseclip_hf import DenseCLIPConfig, DenseCLIPForSemanticSegmentation
from denseclip_hf.model.image_processing_denseclip import DenseCLIPImageProcessorPil
from denseclip_hf.model.modeling_clip_resnet import CLIPResNetAttentionPool
from denseclip_hf.optimization import optimize_for_inference
from denseclip_hf.sharing import check_export, export
from denseclip_hf.training import parameter_groups
from helpers.families import NAMES, SIZES
from helpers.models import Tokenizer, saved_frozen_and_loaded, tiny_config, tiny_model


VIT = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2}
STAGES = {"hidden_sizes": [4, 8, 16, 32], "depths": [1, 1, 1, 1]}
BACKBONES = {
    "Swin": {"embed_dim": 4, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2], "window_size": 2},
    "ConvNext": STAGES,
    "ResNet": {**STAGES, "embedding_size": 4},
    "PvtV2": {**STAGES, "num_attention_heads": [1, 1, 2, 2]},
    "Dinov2": {**VIT, "image_size": 56, "patch_size": 14},
    "DINOv3ViT": {**VIT, "intermediate_size": 32, "patch_size": 16, "num_register_tokens": 1},
}
PATCHES = {"Dinov2": 14, "DINOv3ViT": 16}
every_backbone = pytest.mark.parametrize("kind", BACKBONES)


def config_of(kind, **options):
    return getattr(transformers, f"{kind}Config")(**{**BACKBONES[kind], **options})


def clip(kind="vit"):
    torch.manual_seed(1)
    return CLIPModel(tiny_config().clip_config) if kind == "vit" else tiny_model("resnet").clip


def segmenter_of(kind, **options):
    """A tiny segmenter in eval mode, every weight random."""
    torch.manual_seed(0)
    options = {**SIZES, **options}
    return DenseCLIPForSemanticSegmentation.from_backbone(
        config_of(kind), clip(), NAMES, Tokenizer(), **options
    ).eval()


@every_backbone
def test_maps_score_maps_and_logits(kind):
    model = segmenter_of(kind)
    with torch.no_grad():
        outputs = model(torch.randn(2, 3, 64, 96), output_hidden_states=True)
    patch = PATCHES.get(kind)
    h, w = (2, 3) if patch is None else (64 // patch, 96 // patch)
    assert outputs.score_maps.shape == (2, 3, h, w) and outputs.text_embeds.shape == (2, 3, 12)
    sizes = [tuple(m.shape[-2:]) for m in outputs.hidden_states]
    finest = (16, 24) if patch is None else (4 * h, 4 * w)
    assert sizes == [(finest[0] // s, finest[1] // s) for s in (1, 2, 4, 8)]
    assert outputs.logits.shape == (2, 3, *finest)
    channels = [m.shape[1] for m in outputs.hidden_states]
    assert channels == model.config.feature_channels == model.backbone.channels


@every_backbone
@torch.no_grad()
def test_sliding_windows_optimized_and_without_language(kind):
    model = segmenter_of(kind, inference_mode="slide", crop_size=64, stride=32)
    images = torch.randn(1, 3, 64, 96)
    assert model(images).logits.shape == (1, 3, 64, 96)
    model.config.inference_mode = "whole"
    torch.testing.assert_close(optimize_for_inference(model)(images).logits, model(images).logits)
    baseline = segmenter_of(kind, use_text_guidance=False)
    parts = {name.split(".")[0] for name, _ in baseline.named_parameters()}
    assert parts <= {"backbone", "pyramid", "neck", "decode_head"}
    assert baseline(images).score_maps is None


@pytest.mark.parametrize(
    ("kind", "pool"), [*((kind, "attention") for kind in BACKBONES), ("ConvNext", "linear"), ("Dinov2", "linear")]
)
def test_gradients_reach_contexts_pool_and_backbone(kind, pool):
    model = segmenter_of(kind, backbone_pool=pool).train()
    model(torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))).loss.backward()
    without = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    # What only pretraining uses; keys' biases, and what one image token of this tiny Swin's attention never reads.
    unused = ("mask_token", "swin.layernorm", "k_proj.bias", "key.bias")
    assert not {name for name in without if not any(part in name for part in unused)}


@every_backbone
def test_saved_model_loads_bit_equal(kind, tmp_path):
    frozen = saved_frozen_and_loaded(segmenter_of(kind), tmp_path)
    assert not any(part in name for name in frozen.state_dict() for part in ("text_model", "clip.vision_model"))


@pytest.mark.parametrize("kind", ["ConvNext", "Dinov2"])
def test_from_directories(kind, tmp_path):
    backbone = AutoBackbone.from_config(config_of(kind))
    backbone.save_pretrained(tmp_path / "backbone")
    (tmp_path / "backbone" / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.1, 0.2, 0.3]}'
    )
    clip().save_pretrained(tmp_path / "clip")
    model = DenseCLIPForSemanticSegmentation.from_backbone(
        tmp_path / "backbone", tmp_path / "clip", NAMES, Tokenizer(), **SIZES
    )
    weights = backbone.state_dict()
    shared = {name: weight for name, weight in model.backbone.state_dict().items() if name in weights}
    assert len(shared) >= len(weights) - 2
    assert all(torch.equal(weight, weights[name]) for name, weight in shared.items())
    assert (model.tower.image_mean, model.tower.image_std) == ([0.4, 0.5, 0.6], [0.1, 0.2, 0.3])
    assert str(tmp_path) not in model.config.to_json_string()


def test_a_plain_vits_maps_come_from_all_its_depth():
    model = segmenter_of("Dinov2")
    assert model.config.backbone_config.out_features == ["stage2", "stage3", "stage4", "stage6"]
    chosen = config_of("Dinov2", out_indices=[1, 2, 3, 4])
    assert DenseCLIPConfig(backbone_config=chosen).backbone_config.out_indices == [1, 2, 3, 4]
    assert DenseCLIPConfig(backbone_config=chosen).image_size == 630


def test_the_pool_is_clips_own():
    """With the weights of a CLIP ResNet's attention pool, of another grid too, its places are embedded as there."""
    torch.manual_seed(0)
    resnet = tiny_model("resnet").clip.vision_model
    heads = resnet.config.num_attention_heads
    backbone = config_of("ResNet", hidden_sizes=resnet.config.hidden_sizes)
    options = {**SIZES, "backbone_pool_num_attention_heads": heads}
    model = DenseCLIPForSemanticSegmentation.from_backbone(
        backbone, clip("resnet"), NAMES, Tokenizer(), **options
    ).eval()
    assert isinstance(model.pool, CLIPResNetAttentionPool)
    model.pool.load_state_dict(resnet.attention_pool.state_dict())
    images = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        maps = resnet(images).feature_maps
        model.backbone.forward = lambda pixels: transformers.modeling_outputs.BackboneOutput(feature_maps=maps)
        context = model.encode_image(images).context
        torch.testing.assert_close(context, resnet(images).last_hidden_state, atol=1e-5, rtol=0)


def test_a_linear_layer_in_place_of_the_pool():
    model = segmenter_of("ConvNext", backbone_pool="linear")
    with torch.no_grad():
        outputs = model.backbone(images := torch.randn(1, 3, 64, 96))
        places = model.pool.projection(outputs.feature_maps[-1].permute(0, 2, 3, 1))  # B, h, w, D
        torch.testing.assert_close(model.get_dense_features(images).permute(0, 2, 3, 1), places)
        torch.testing.assert_close(model.get_image_features(images).pooler_output, places.mean((1, 2)))


def test_the_backbone_learns_at_a_tenth_and_the_new_pool_at_the_full_rate():
    model = segmenter_of("Dinov2")
    rates = {p: group["lr"] for group in parameter_groups(model, 1.0, 0.0) for p in group["params"]}
    for name, parameter in model.named_parameters():
        part = name.split(".")[0]
        assert rates[parameter] == {"clip": 0.0, "backbone": 0.1, "pyramid": 0.1}.get(part, 1.0), name


def test_a_backbone_of_one_image_size_sees_resized_images():
    torch.manual_seed(0)
    hiera = transformers.HieraConfig(embed_dim=4, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], image_size=[64, 64])
    model = DenseCLIPForSemanticSegmentation.from_backbone(
        hiera, clip(), NAMES, Tokenizer(), tower_image_size=64, **SIZES
    ).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 96, 128)).logits.shape == (1, 3, 16, 16)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Swin", "ConvNext", "ResNet", "DINOv3ViT"])
def test_compiles_to_one_graph(kind):
    model, images = segmenter_of(kind), torch.randn(1, 3, 64, 64)
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(images).logits, model(images).logits)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Swin", "ConvNext", "ResNet", "DINOv3ViT"])
def test_exports_to_onnx(kind, tmp_path):
    pytest.importorskip("onnxruntime")
    model = segmenter_of(kind)
    processor = DenseCLIPImageProcessorPil(size={"shortest_edge": 64})
    assert check_export(model, export(model, processor, tmp_path, "onnx", size=(64, 96))) < 1e-4


@pytest.mark.parametrize(
    ("backbone", "options", "keyword"),
    [
        (config_of("ResNet"), {"tokenizer": None}, "tokenizer"),
        (AutoBackbone.from_config(config_of("ResNet", out_features=["stage3", "stage4"])), {}, r"stage3.*stem"),
        (config_of("ConvNext"), {"backbone_pool_num_attention_heads": 5}, "32"),
        (config_of("ConvNext"), {"decode_head": "cost_aggregation"}, "decode_head"),
        (config_of("ConvNext"), {"out_indices": [0, 1, 2, 3]}, "out_indices"),
        (config_of("ConvNext"), {"last_block": "naclip"}, "last_block"),
    ],
)
def test_what_cannot_work_is_refused(backbone, options, keyword):
    options = {"tokenizer": Tokenizer(), **SIZES, **options}
    with pytest.raises((ValueError, StrictDataclassError), match=keyword):
        DenseCLIPForSemanticSegmentation.from_backbone(backbone, clip(), NAMES, **options)


def test_other_models_are_refused(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="bert"):
        DenseCLIPForSemanticSegmentation.from_backbone(tmp_path, clip(), NAMES, Tokenizer())


@pytest.mark.skipif(transformers.utils.is_timm_available(), reason="timm is installed")
def test_a_backbone_of_a_missing_library_is_named():
    backbone = transformers.TimmBackboneConfig(backbone="resnet18", out_indices=[1, 2, 3, 4])
    with pytest.raises(ImportError, match="timm"):
        DenseCLIPForSemanticSegmentation(DenseCLIPConfig(backbone_config=backbone))
