from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from denseclip_hf import DenseCLIPForSemanticSegmentation
from denseclip_hf.model import modeling_denseclip
from denseclip_hf.model.decoder_denseclip import cosine_score_maps
from denseclip_hf.model.layers_denseclip import StochasticDepth
from helpers.models import COST_AGGREGATION, EOS, SOS, calls_in_checkpointed_layers, forward, tiny_config, tiny_model


@pytest.mark.parametrize("size", [(64, 64), (96, 64), (75, 101), (32, 32)])
def test_output_shapes(kind, size):
    model = tiny_model(kind)
    output = forward(model, torch.randn(2, 3, *size))
    stride = model.config.embedding_stride
    if kind == "vit":  # patches floor, the pyramid multiplies by four
        assert output.logits.shape == (2, 3, 4 * (size[0] // 16), 4 * (size[1] // 16))
    else:
        assert output.logits.shape[:2] == (2, 3)
        assert abs(output.logits.shape[2] - size[0] / 4) <= 1 and abs(output.logits.shape[3] - size[1] / 4) <= 1
    assert output.score_maps.shape == (2, 3, size[0] // stride, size[1] // stride)
    assert output.score_maps.abs().max() <= 1 + 1e-5
    assert output.text_embeds.shape == (2, 3, 12)
    assert output.loss is None


def test_loss_is_the_sum_of_its_parts(kind, images, labels):
    output = tiny_model(kind)(images, labels=labels)
    assert output.loss == output.decode_loss + output.auxiliary_loss
    assert output.auxiliary_loss > 0


def test_all_ignored_labels_give_finite_gradients(kind, images):
    model = tiny_model(kind).train()
    model(images, labels=torch.full((2, 64, 64), 255)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    "labels", [torch.zeros(1, 64, 64).long(), torch.zeros(2, 64, 64), torch.zeros(2, 1, 64, 64).long()]
)
def test_labels_that_do_not_fit_are_refused(labels, images):
    with pytest.raises(ValueError, match="labels"):
        tiny_model()(images, labels=labels)


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (3, 64, 64), (0, 3, 64, 64)])
def test_what_is_no_batch_of_large_enough_images_is_refused(kind, shape):
    with pytest.raises(ValueError, match="pixel_values"):
        tiny_model(kind)(torch.zeros(shape))


@pytest.mark.parametrize(("patch", "least"), [(8, 16), (32, 64)])
def test_the_smallest_image_of_a_vit_has_two_patches_a_side(patch, least):
    config = tiny_config()
    config.clip_config.vision_config.patch_size = patch
    model = DenseCLIPForSemanticSegmentation(config).eval()
    assert forward(model, torch.zeros(1, 3, least, least)).score_maps.shape == (1, 3, 2, 2)
    with pytest.raises(ValueError, match=f"{least} pixels"):
        model(torch.zeros(1, 3, least, least - 1))


def test_every_trainable_parameter_gets_a_gradient(kind, images, labels):
    model = tiny_model(kind).train()
    model(images, labels=labels).loss.backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without


def test_baseline_has_no_language(kind, images, labels):
    model = tiny_model(kind, use_text_guidance=False).train()
    output = model(images, labels=labels, output_hidden_states=True)
    output.loss.backward()
    assert [c.shape[-1] for c in output.hidden_states] == [16, 8, 4, 2]
    assert output.score_maps is output.text_embeds is output.auxiliary_loss is None
    assert output.loss == output.decode_loss
    names = dict(model.named_parameters())
    assert not any(
        part in name for name in names for part in ("text", "prompts", "context", "gamma", "attention_pool")
    )
    assert all(p.grad is not None for p in names.values())
    with pytest.raises(ValueError, match="no text guidance"):
        model.encode_classes()


def test_fixed_gamma_and_prompt_have_no_parameters(kind, images):
    model = tiny_model(kind, gamma_learnable=False, gamma_init=0.5, num_context_tokens=0)
    assert "gamma" not in dict(model.named_parameters()) and "gamma" in model.state_dict()
    assert torch.equal(model.gamma, torch.full((12,), 0.5))
    assert not any("context_vectors" in name for name, _ in model.named_parameters())
    assert forward(model, images).logits.isfinite().all()


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_gamma_scales_the_context(gamma, images):
    model = tiny_model(gamma_init=gamma)
    output = forward(model, images)
    moved = (output.text_embeds - model.encode_classes()).abs().max().item()
    assert moved == 0 if gamma == 0 else moved > 1e-3


def test_autocast_leaves_score_maps_and_losses_in_float32(kind, images, labels):
    model = tiny_model(kind)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = forward(model, images, labels)
    assert output.logits.dtype == torch.bfloat16
    assert output.score_maps.dtype == output.decode_loss.dtype == output.auxiliary_loss.dtype == torch.float32


def test_cosines_of_half_precision_are_taken_in_float32():
    context, texts = torch.randn(1, 5, 4).bfloat16(), torch.randn(1, 3, 4).bfloat16()
    expected = torch.nn.functional.cosine_similarity(context[:, None, 1:].float(), texts[:, :, None].float(), dim=-1)
    torch.testing.assert_close(cosine_score_maps(context, texts, (2, 2)), expected.unflatten(2, (2, 2)))


class NeverWaiting(TorchDispatchMode):
    """Refuses what would make a program wait for its accelerator: values and shapes read from tensors."""

    READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in self.READS, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("mode", ["whole", "slide", "training"])
def test_forward_never_waits_for_the_device(kind, mode, images, labels, monkeypatch, device):
    """On "meta" tensors have no values, so that reading them fails however it is done."""
    monkeypatch.setattr(modeling_denseclip, "checked_labels", lambda labels, *args: labels)  # on a CPU it reads them
    if device == "meta":  # which autocast does not know
        monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    model = tiny_model(kind, inference_mode="slide" if mode == "slide" else "whole").to(device)
    if mode == "training":
        with NeverWaiting():
            model.train()(images.to(device), labels.to(device)).loss.backward()
    else:
        with torch.no_grad(), NeverWaiting():
            model(torch.randn(2, 3, 96, 160, device=device))


def test_new_parts_start_as_the_config_says(kind):
    sizes = {"neck_hidden_size": 8, "decode_head_hidden_size": 32, "num_context_tokens": 8}
    model = tiny_model(kind, initializer_range=0.1, gamma_init=0.5, context_init_std=0.3, **sizes)
    linears = [module for module in model.context_decoder.modules() if isinstance(module, torch.nn.Linear)]
    weights = torch.cat([linear.weight.detach().flatten() for linear in linears])
    assert not any(linear.bias is not None and linear.bias.any() for linear in linears)
    # a normal distribution cut off at two standard deviations has 0.88 of them left
    assert weights.std() == pytest.approx(0.088, rel=0.1) and 0.19 < weights.abs().max() <= 0.2
    contexts = model.prompts.context_vectors.detach()
    assert contexts.std() == pytest.approx(0.264, rel=0.2) and contexts.abs().max() <= 0.6
    assert torch.equal(model.gamma, torch.full((12,), 0.5))
    convolution = model.decode_head.scale_heads[0][0].weight.detach()  # 8 -> 32 channels, He et al. by outputs
    assert convolution.std() == pytest.approx((2 / (32 * 9)) ** 0.5, rel=0.1)


def test_frozen_classes_start_as_unit_vectors_on_average():
    model = tiny_model(num_labels=200, class_token_ids=[[SOS, 5, EOS]] * 200, frozen_classes=True)
    assert model.class_embeddings.norm(dim=-1).square().mean() == pytest.approx(1, rel=0.1)


def test_what_a_checkpoint_lacks_starts_anew(kind):
    model = tiny_model(kind, gamma_init=0.5)
    weights = model.state_dict()
    random = ["prompts.context_vectors", "decode_head.classifier.weight", "decode_head.scale_heads.1.0.weight"]
    lacking = ["gamma", "context_decoder.layers.0.mlp.0.bias", *random]
    kept = {name: value for name, value in weights.items() if name not in lacking}
    loaded, info = DenseCLIPForSemanticSegmentation.from_pretrained(
        None, config=model.config, state_dict=kept, output_loading_info=True
    )
    state = loaded.state_dict()
    assert set(info["missing_keys"]) == set(lacking)
    assert {name for name in weights if not torch.equal(state[name], weights[name])} == set(random)
    assert all(0.05 < state[name].std() < 1.5 for name in random)


def test_what_transformers_asks_of_the_class():
    models = [tiny_model("vit"), tiny_model("resnet"), tiny_model("vit", **COST_AGGREGATION)]
    assert all(model.base_model is model.clip for model in models)
    assert DenseCLIPForSemanticSegmentation.input_modalities == ("image",)
    parts = {type(module).__name__ for model in models for module in model.modules()}
    assert set(DenseCLIPForSemanticSegmentation._no_split_modules) <= parts


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient(kind, images, labels, reentrant):
    options = {"context_decoder_dropout": 0.0, "decode_head_dropout": 0.0, "drop_path_rate": 0.5}
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model(kind, **options).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": reentrant})
        calls.append(calls_in_checkpointed_layers(model))
        torch.manual_seed(3)
        model(images.clone().requires_grad_(), labels=labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(calls[1]) == 2 * len(calls[0]) > 0
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-3)


def test_attention_implementations_agree(kind, images):
    model = tiny_model(kind)
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        model._class_embeddings.clear()
        outputs.append(forward(model, images))
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=0)


def test_stochastic_depth_drops_whole_samples():
    torch.manual_seed(0)
    module = torch.nn.Identity().train()
    dropped = StochasticDepth(0.5)(module, None, torch.ones(64, 3, 2))
    assert all(sample.unique().tolist() in ([0.0], [2.0]) for sample in dropped)
    assert 16 < sum(sample.any().item() for sample in dropped) < 48
    assert torch.equal(StochasticDepth(0.5)(module.eval(), None, torch.ones(4, 3, 2)), torch.ones(4, 3, 2))
    branch, *rest = StochasticDepth(0.999)(torch.nn.Identity().train(), None, (torch.ones(4, 3, 2), "a", "b"))
    assert not branch.any() and rest == ["a", "b"]


@pytest.mark.parametrize("branch", ["self_attn", "mlp"])
def test_stochastic_depth_rises_linearly(branch):
    model = tiny_model(drop_path_rate=0.3)
    layers = model.clip.vision_model.encoder.layers
    rates = [next(iter(getattr(layer, branch)._forward_hooks.values())).rate for layer in layers]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_epsilons_and_dropout_are_the_configs():
    options = {"context_decoder_dropout": 0.3, "decode_head_dropout": 0.2}
    model = tiny_model(layer_norm_eps=1e-3, batch_norm_eps=1e-4, **options)
    norms = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.BatchNorm2d)
    decoder = model.context_decoder.modules()
    others = [m for part in (model.pyramid, model.neck, model.decode_head) for m in part.modules()]
    assert {module.eps for module in decoder if isinstance(module, norms)} == {1e-3}
    assert {module.eps for module in others if isinstance(module, norms)} == {1e-4}
    dropouts = [module for module in model.context_decoder.modules() if isinstance(module, torch.nn.Dropout)]
    assert [module.p for module in dropouts] == [0.3, 0.3] and model.decode_head.dropout.p == 0.2


def test_training_is_random_and_eval_is_not(images):
    model = tiny_model(drop_path_rate=0.5)
    assert torch.equal(forward(model, images).logits, forward(model, images).logits)
    model.train()
    assert not torch.equal(forward(model, images).logits, forward(model, images).logits)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_may_be_any_integers(images, labels, dtype):
    model = tiny_model()
    expected = forward(model, images, labels).loss
    assert forward(model, images, labels.to(dtype)).loss == expected > 0
