"""Agreement with the authors' implementation, on tiny models whose every stage was recorded."""

import copy
import json
import re

import pytest
import torch

from denseclip_hf import DenseCLIPConfig, DenseCLIPForSemanticSegmentation
from denseclip_hf.conversion import config_from_original, convert_original_state_dict
from denseclip_hf.conversion.keys import ORIGINAL_KEY_TABLE, rename
from helpers.golden import FIXTURES, golden_case, golden_config, golden_model


CASES = ["seg_vit", "seg_resnet"]
IMAGES = ["img_a", "img_b", "img_c"]
RELEASED = json.loads((FIXTURES / "keys.json").read_text())["models"]


def assert_golden(name: str, key: str, value: torch.Tensor) -> None:
    """Within ten times the recorded float32 noise (of one machine's kernels), and never beyond 1e-4 or that noise."""
    case, tensors = golden_case(name)
    noise = case["tensors"][key]["fp32_kernel_noise"]
    tolerance = min(max(10 * noise, 1e-6 * max(case["tensors"][key]["absmax"], 1)), max(1e-4, noise))
    torch.testing.assert_close(value, tensors[key], atol=tolerance, rtol=0, msg=lambda m: f"{key}: {m}")


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param, golden_model(request.param)


@pytest.mark.parametrize("image", IMAGES)
def test_every_stage_agrees_with_the_original(case, image):
    name, model = case
    _, tensors = golden_case(name)
    seen = {}
    model.context_decoder.register_forward_hook(lambda m, i, o: seen.update(text_diff=o, context=i[1]))
    model.neck.register_forward_hook(lambda m, i, o: seen.update({f"neck{level}": p for level, p in enumerate(o)}))
    with torch.no_grad():
        output = model(tensors[f"in/{image}"], output_hidden_states=True)
        classes = model.encode_classes()
    seen |= {f"stage{level}": c for level, c in enumerate(output.hidden_states)}
    grid = output.score_maps.shape[-2:]
    seen["global_feat"] = seen["context"][:, 0]
    seen["visual_embeddings"] = seen.pop("context")[:, 1:].transpose(1, 2).unflatten(2, grid)
    seen |= {
        "text_embeddings": output.text_embeds,
        "text_embeddings_base": classes[None].expand_as(tensors[f"out/{image}/text_embeddings_base"]),
        "score_map": output.score_maps,
        "logits": output.logits,
        "logits_full": torch.nn.functional.interpolate(
            output.logits, size=tensors[f"in/{image}"].shape[-2:], mode="bilinear"
        ),
    }
    recorded = {k.rsplit("/", 1)[1] for k in tensors if k.startswith(f"out/{image}/")}
    assert recorded == seen.keys()
    for stage, value in seen.items():
        assert_golden(name, f"out/{image}/{stage}", value)


@pytest.mark.parametrize("windows_at_a_time", [1, 3])
def test_sliding_window_agrees_with_the_original(case, windows_at_a_time):
    name, model = case
    golden = golden_config(name)
    assert golden.inference_mode == "slide" and golden.crop_size == [64, 64] and golden.stride == [43, 43]
    model.config.inference_mode, model.config.sliding_window_batch_size = "slide", windows_at_a_time
    with torch.no_grad():
        logits = model(golden_case(name)[1]["in/img_b"]).logits
    model.config.inference_mode = "whole"
    assert_golden(name, "out/slide", logits)


@pytest.fixture(scope="module", params=CASES)
def training_step(request):
    """One training forward and backward, with every dropout off as when it was recorded."""
    model = golden_model(request.param).train()
    tensors = golden_case(request.param)[1]
    output = model(tensors["in/train/img"], labels=tensors["in/train/label"])
    output.loss.backward()
    return request.param, model, output


def test_losses_agree_with_the_original(training_step):
    name, _, output = training_step
    tensors = golden_case(name)[1]
    for ours, theirs in {
        "decode_loss": "decode.loss_ce",
        "auxiliary_loss": "aux_identity.loss_ce",
        "loss": "total",
    }.items():
        assert getattr(output, ours).item() == pytest.approx(tensors[f"out/train/{theirs}"].item(), abs=1e-5)
    for ours, theirs in {"logits": "logits", "score_maps": "score_map", "text_embeds": "text_embeddings"}.items():
        assert_golden(name, f"out/train/{theirs}", getattr(output, ours))


def test_gradients_agree_with_the_original(training_step):
    name, model, _ = training_step
    case, tensors = golden_case(name)
    original = {k.removeprefix("grad/"): v for k, v in tensors.items() if k.startswith("grad/")}
    # A gradient is renamed as its weight is; the folded class embedding gets the sum of both its gradients.
    converted = rename(original, ORIGINAL_KEY_TABLE)
    zero = {k.removeprefix("grad/") for k in case["train"]["analytically_zero_gradients"]}
    zero = set(rename({k: original[k] for k in zero}, ORIGINAL_KEY_TABLE))
    ours = dict(model.named_parameters())
    compared = 0
    for key, theirs in converted.items():
        gradient = ours[key].grad
        if key == "prompts.context_vectors":
            theirs = theirs.squeeze(0)
        if key.endswith("embeddings.class_embedding"):
            theirs = theirs - ours["clip.vision_model.embeddings.position_embedding.weight"].grad[0]
        if key in zero or key.endswith("k_proj.bias"):
            torch.testing.assert_close(gradient, theirs, atol=1e-5, rtol=0)
            continue
        scale = theirs.abs().max().item()
        torch.testing.assert_close(
            gradient, theirs, atol=1e-3 * scale + 1e-9, rtol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
        )
        compared += 1
    assert compared > 50
    assert {k for k, p in ours.items() if p.requires_grad} == converted.keys()


def test_batch_norm_statistics_agree_with_the_original(training_step):
    name, model, _ = training_step
    tensors = golden_case(name)[1]
    recorded = {k.removeprefix("out/train/bn/"): v for k, v in tensors.items() if k.startswith("out/train/bn/")}
    converted = rename(recorded, ORIGINAL_KEY_TABLE)
    ours = dict(model.named_buffers())
    assert len(converted) > 10
    for key, theirs in converted.items():
        torch.testing.assert_close(ours[key], theirs, atol=1e-5, rtol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


@pytest.mark.parametrize("name", RELEASED)
def test_released_keys_are_each_consumed_once(name):
    released = RELEASED[name]
    tokens = json.loads((FIXTURES / "tokens_ade20k.json").read_text())
    token_ids = [ids[: ids.index(tokens["eot"]) + 1] for ids in tokens["ids"]]
    config = config_from_original(released["model_cfg"], dict(enumerate(tokens["classes"])), token_ids)
    with torch.device("meta"):
        model = DenseCLIPForSemanticSegmentation(config)
        original = {key: torch.empty(shape) for key, shape in released["state_dict"].items()}
        fused = sum(key.endswith(("in_proj_weight", "in_proj_bias")) for key in original)
        converted = convert_original_state_dict(original, config)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert len(converted) == len(original) + 2 * fused  # each fused projection becomes three
    without_text = sum(
        p.numel() for n, p in model.named_parameters()
        if not n.startswith("clip.text_")
    )  # fmt: skip
    assert without_text == released["params_without_text_encoder"]


@pytest.mark.parametrize(
    ("preset", "millions"), [("denseclip-rn50", 50.248), ("denseclip-rn101", 67.795), ("denseclip-vit-b16", 105.273)]
)
def test_presets_have_the_published_number_of_parameters(preset, millions):
    config = DenseCLIPConfig.from_preset(preset, num_labels=150)
    with torch.device("meta"):
        model = DenseCLIPForSemanticSegmentation(config)
    count = sum(p.numel() for n, p in model.named_parameters() if not n.startswith("clip.text_"))
    assert round(count / 1e6, 3) == millions


def _original(name="seg_vit"):
    return {k.removeprefix("state_dict/"): v for k, v in golden_case(name)[1].items() if k.startswith("state_dict/")}


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"backbone.surprise": torch.zeros(1)}, "backbone.surprise"),
        ({"gamma": torch.zeros(3)}, "gamma"),
        ({"gamma": None}, "gamma"),
        ({"backbone.bn1.weight": torch.zeros(3)}, "stem.0.normalization.weight"),  # of the other tower
    ],
)
def test_a_key_that_does_not_fit_stops_the_conversion_and_is_named(change, named):
    weights = {key: value for key, value in (_original() | change).items() if value is not None}
    with pytest.raises(ValueError, match=named):
        convert_original_state_dict(weights, golden_config("seg_vit"))


def _options(part, **changes):
    """The golden ViT's model options with some changed in `part`, such as "decode_head.loss_decode"."""
    kwargs = copy.deepcopy(golden_case("seg_vit")[0]["model_cfg"])
    options = kwargs
    for name in filter(None, part.split(".")):
        options = options[name]
    options.update(changes)
    return kwargs


def _converted(kwargs):
    return config_from_original(kwargs, dict(enumerate("abcde")), None)


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        # What the baselines inherit from mmsegmentation's ResNet.
        ("backbone", {"depth": 50, "num_stages": 4, "dilations": (1, 1, 1, 1), "strides": (1, 2, 2, 2)}),
        ("backbone", {"norm_eval": False, "norm_cfg": {"type": "SyncBN", "requires_grad": True}}),
        # The original's defaults.
        ("neck", {"upsample_cfg": {"mode": "nearest"}, "start_level": 0, "end_level": -1, "act_cfg": None}),
        ("decode_head", {"in_index": (0, 1, 2, 3), "ignore_index": 255, "align_corners": False}),
        ("", {"auxiliary_head": None, "text_head": False}),
    ],
)
def test_options_that_change_nothing_are_fine(part, changes):
    assert _converted(_options(part, **changes)).to_dict() == _converted(_options("")).to_dict()


def test_the_size_of_the_embedding_is_by_default_that_of_the_tower():
    kwargs = copy.deepcopy(golden_case("seg_resnet")[0]["model_cfg"])
    del kwargs["backbone"]["output_dim"]
    kwargs["text_encoder"].pop("embed_dim", None)
    assert _converted(kwargs).clip_config.projection_dim == 1024


@pytest.mark.parametrize(
    ("part", "option", "value"),
    [
        ("", "text_head", True),
        ("", "surprise", 1),
        ("backbone", "type", "ResNetV1c"),
        ("neck", "upsample_cfg", {"mode": "bilinear"}),
        ("decode_head", "align_corners", True),
        ("decode_head", "loss_decode", [{"type": "CrossEntropyLoss"}]),
        ("decode_head", "feature_strides", (8, 8, 16, 32)),
        ("decode_head.norm_cfg", "eps", 1e-3),
        ("decode_head.loss_decode", "class_weight", [1.0, 2.0]),
        ("identity_head.loss_decode", "use_sigmoid", True),
    ],
)
def test_options_whose_meaning_would_be_lost_are_refused(part, option, value):
    with pytest.raises(ValueError, match=re.escape(f"{part}.{option}".lstrip("."))):
        _converted(_options(part, **{option: value}))
