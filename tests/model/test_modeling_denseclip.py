from contextlib import nullcontext

import pytest
import torch

from denseclip_hf.model.decoder_denseclip import cosine_score_maps
from denseclip_hf.model.layers_denseclip import StochasticDepth
from helpers.models import calls_in_checkpointed_layers, forward, tiny_model


@pytest.mark.parametrize("size", [(75, 101), (32, 32)])
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


def test_all_ignored_labels_give_finite_gradients(images):
    model = tiny_model().train()
    model(images, labels=torch.full((2, 64, 64), 255)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("image_shape", "label_shape", "dtype", "named"),
    [
        ((1, 3, 31, 64), None, None, "pixel_values"),
        ((3, 64, 64), None, None, "pixel_values"),
        ((0, 3, 64, 64), None, None, "pixel_values"),
        ((2, 3, 64, 64), (1, 64, 64), torch.long, "labels"),
        ((2, 3, 64, 64), (2, 64, 64), torch.float32, "labels"),
        ((2, 3, 64, 64), (2, 1, 64, 64), torch.long, "labels"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(kind, image_shape, label_shape, dtype, named):
    labels = None if label_shape is None else torch.zeros(label_shape, dtype=dtype)
    with pytest.raises(ValueError, match=named):
        tiny_model(kind)(torch.zeros(image_shape), labels=labels)


def test_every_trainable_parameter_gets_a_gradient(kind, images, labels):
    model = tiny_model(kind).train()
    output = model(images, labels=labels)
    assert output.loss == output.decode_loss + output.auxiliary_loss and output.auxiliary_loss > 0
    output.loss.backward()
    assert not {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}


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


def test_fixed_gamma_and_prompt_have_no_parameters(images):
    model = tiny_model(gamma_learnable=False, gamma_init=0.5, num_context_tokens=0)
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


@pytest.mark.parametrize("mode", ["slide", "training"])
def test_forward_never_waits_for_the_device(kind, mode, images, labels, monkeypatch):
    """On "meta" tensors have no values, so that reading them fails however it is done."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # which does not know "meta"
    model = tiny_model(kind, inference_mode="slide").to("meta")
    if mode == "training":
        model.train()(images.to("meta"), labels.to("meta")).loss.backward()
    else:
        with torch.no_grad():
            model(torch.randn(2, 3, 96, 160, device="meta"))


def test_new_parts_start_as_the_config_says():
    sizes = {"neck_hidden_size": 8, "decode_head_hidden_size": 32, "num_context_tokens": 8}
    model = tiny_model(initializer_range=0.1, gamma_init=0.5, context_init_std=0.3, **sizes)
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


def test_activation_checkpointing_changes_no_gradient(kind, images, labels):
    options = {"context_decoder_dropout": 0.0, "decode_head_dropout": 0.0, "drop_path_rate": 0.5}
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = tiny_model(kind, **options).train()
        if checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": kind == "vit"})
        calls.append(calls_in_checkpointed_layers(model))
        torch.manual_seed(3)
        model(images.clone().requires_grad_(), labels=labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert len(calls[1]) == 2 * len(calls[0]) > 0
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-3)


def test_stochastic_depth_drops_whole_samples():
    torch.manual_seed(0)
    module = torch.nn.Identity().train()
    dropped = StochasticDepth(0.5)(module, None, torch.ones(64, 3, 2))
    assert all(sample.unique().tolist() in ([0.0], [2.0]) for sample in dropped)
    assert 16 < sum(sample.any().item() for sample in dropped) < 48
    assert torch.equal(StochasticDepth(0.5)(module.eval(), None, torch.ones(4, 3, 2)), torch.ones(4, 3, 2))


def test_epsilons_dropout_and_stochastic_depth_are_the_configs():
    options = {"context_decoder_dropout": 0.3, "decode_head_dropout": 0.2, "drop_path_rate": 0.3}
    model = tiny_model(layer_norm_eps=1e-3, batch_norm_eps=1e-4, **options)
    for branch in ("self_attn", "mlp"):  # it rises linearly over the blocks
        layers = [getattr(layer, branch) for layer in model.clip.vision_model.encoder.layers]
        rates = [next(iter(layer._forward_hooks.values())).rate for layer in layers]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])
    norms = (torch.nn.LayerNorm, torch.nn.GroupNorm, torch.nn.BatchNorm2d)
    decoder = model.context_decoder.modules()
    others = [m for part in (model.pyramid, model.neck, model.decode_head) for m in part.modules()]
    assert {module.eps for module in decoder if isinstance(module, norms)} == {1e-3}
    assert {module.eps for module in others if isinstance(module, norms)} == {1e-4}
    dropouts = [module for module in model.context_decoder.modules() if isinstance(module, torch.nn.Dropout)]
    assert [module.p for module in dropouts] == [0.3, 0.3] and model.decode_head.dropout.p == 0.2


def test_labels_may_be_any_integers(images, labels):
    model = tiny_model()
    expected = forward(model, images, labels).loss
    assert forward(model, images, labels.to(torch.uint8)).loss == expected > 0
