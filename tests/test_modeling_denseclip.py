import copy
import logging

import pytest
import torch
from conftest import EOS, SOS, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSemanticSegmentation, CLIPModel

from denseclip_hf import (
    CLIPResNetModel,
    DenseCLIPForSemanticSegmentation,
    class_embeddings_denseclip,
    modeling_denseclip,
)
from denseclip_hf.context_decoder_denseclip import cosine_score_maps
from denseclip_hf.modeling_clip_resnet import resize_position_grid


class Tokenizer:
    """Words as single ids, for tests that need no real vocabulary."""

    def __call__(self, text):
        return {"input_ids": [SOS, *(sum(map(ord, word)) % 90 for word in text.split()), EOS]}


class CallCounter:
    """Counts passes through the text tower and the tokens that went through it."""

    def __init__(self, model):
        self.calls, self.tokens = 0, 0
        model.clip.text_model.encoder.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs, output):
        self.calls += 1
        self.tokens += kwargs["inputs_embeds"].shape[:2].numel()


def forward(model, images, labels=None):
    with torch.no_grad():
        return model(images, labels)


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


def test_batch_gives_what_single_images_give(kind, images):
    model = tiny_model(kind)
    together = forward(model, images).logits
    alone = torch.cat([forward(model, image[None]).logits for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_loss_is_the_sum_of_its_parts(kind, images, labels):
    output = tiny_model(kind)(images, labels=labels)
    assert output.loss == output.decode_loss + output.auxiliary_loss
    assert output.auxiliary_loss > 0


def test_all_ignored_labels_give_finite_gradients(kind, images):
    model = tiny_model(kind).train()
    model(images, labels=torch.full((2, 64, 64), 255)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        (torch.full((2, 64, 64), 3), "from 3 to 3, but the model's classes are 0 … 2"),
        (torch.full((2, 64, 64), -1), "from -1"),
        (torch.full((2, 64, 64), -1, dtype=torch.int8), "from -1"),
        (torch.zeros(1, 64, 64).long(), r"one integer map per image, shape \(2, height, width\)"),
        (torch.zeros(2, 64, 64), "torch.float32"),
        (torch.zeros(2, 1, 64, 64).long(), "one integer map per image"),
    ],
)
def test_labels_that_do_not_fit_are_refused(bad, sentence, images):
    with pytest.raises(ValueError, match=sentence):
        tiny_model()(images, labels=bad)


def test_too_small_images_are_refused(kind):
    with pytest.raises(ValueError, match="at least 32 pixels"):
        tiny_model(kind)(torch.zeros(1, 3, 31, 64))


@pytest.mark.parametrize(("patch", "least"), [(8, 16), (32, 64)])
def test_the_smallest_image_of_a_vit_has_two_patches_a_side(patch, least):
    config = tiny_config()
    config.clip_config.vision_config.patch_size = patch
    model = DenseCLIPForSemanticSegmentation(config).eval()
    assert forward(model, torch.zeros(1, 3, least, least)).score_maps.shape == (1, 3, 2, 2)
    with pytest.raises(ValueError, match=f"at least {least} pixels"):
        model(torch.zeros(1, 3, least, least - 1))


def test_every_trainable_parameter_gets_a_gradient(kind, images, labels):
    model = tiny_model(kind).train()
    model(images, labels=labels).loss.backward()
    without = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    assert not model.clip.logit_scale.requires_grad


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


# Class embeddings: once, and never stale


def test_eval_runs_the_text_tower_once(kind, images):
    model = tiny_model(kind)
    counter = CallCounter(model)
    for _ in range(3):
        forward(model, images)
    model(images)  # with gradients enabled too
    model.config.inference_mode = "slide"
    forward(model, torch.randn(1, 3, 96, 160))
    with torch.inference_mode():
        model(images)
    # SOS and 4 contexts once, then 1 + 2 + 3 tokens of names with an EOS each
    assert (counter.calls, counter.tokens) == (1, 14)


def change_in_place(model):
    with torch.no_grad():
        model.prompts.context_vectors.add_(1.0)


def change_data(model):
    model.prompts.context_vectors.data.add_(1.0)


def put_average_in_place(model):
    for parameter in model.parameters():
        parameter.data.mul_(0.9)


def scale_projection(model):
    model.clip.text_projection.weight.data.mul_(2.0)


def change_token(model):
    model.prompts.token_ids[0, -2] += 1


def step_optimizer(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.encode_classes().sum().backward()
    optimizer.step()


def load_weights(model):
    state = {k: v + 0.1 * torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}
    model.load_state_dict(state)


def load_part(model):
    model.clip.load_state_dict({k: v + 1 if "text_projection" in k else v for k, v in model.clip.state_dict().items()})


def replace_parameter(model):
    model.prompts.context_vectors = torch.nn.Parameter(torch.randn(4, 16))


def change_one_value_of_a_context(model):
    model.prompts.context_vectors.data[1, 1] += 1.0


def change_what_is_not_sampled(model):
    model.clip.text_projection.weight.data[0, 1] += 1.0
    model.train().eval()


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_data,
        change_one_value_of_a_context,
        put_average_in_place,
        scale_projection,
        change_token,
        step_optimizer,
        load_weights,
        load_part,
        replace_parameter,
        lambda model: model.double(),
        lambda model: model.set_classes(["one", "two", "three"], Tokenizer()),
        change_what_is_not_sampled,
    ],
)
def test_class_embeddings_are_never_stale(change, images):
    model = tiny_model()
    forward(model, images)
    change(model)
    with torch.no_grad():
        expected = model.prompts(model.clip)
        torch.testing.assert_close(model.encode_classes(), expected, atol=0, rtol=0)
    assert model.encode_classes().dtype == expected.dtype


def test_where_values_are_not_read_versions_tell(images, monkeypatch):
    monkeypatch.setattr(class_embeddings_denseclip, "_sample", lambda *args: None)  # as on an accelerator
    model = tiny_model()
    counter = CallCounter(model)
    for _ in range(2):
        forward(model, images)
    assert counter.calls == 1
    change_in_place(model)
    forward(model, images)
    assert counter.calls == 2
    monkeypatch.undo()
    forward(model, images)
    assert counter.calls == 3


def test_values_of_a_spread_tensor_are_not_read():
    model = tiny_model()
    sources = [model.prompts.context_vectors, model.clip.text_projection.weight]
    assert len(class_embeddings_denseclip._sample(model.prompts, sources)) == 2
    sources[1].placements = ("sharded",)
    assert class_embeddings_denseclip._sample(model.prompts, sources) is None


def test_weights_made_in_inference_mode_have_no_version():
    with torch.inference_mode():
        model = tiny_model()
        assert torch.equal(model.encode_classes(), model.encode_classes())


def test_around_a_frozen_clip_the_text_tower_runs_once(kind, images, labels):
    model = DenseCLIPForSemanticSegmentation(tiny_config(kind))
    model.clip.requires_grad_(False)
    model.prompts.requires_grad_(False)
    counter = CallCounter(model)
    for _ in range(2):
        model(images, labels=labels).loss.backward()
    assert model.training and counter.calls == 1


@pytest.mark.parametrize("freeze", [False, True])
def test_callers_may_change_the_class_embeddings_they_got(freeze, images):
    model = tiny_model(gamma_init=1.0)
    if freeze:
        model.freeze_classes()
    expected = forward(model, images).score_maps
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            embeddings = model.encode_classes()
            embeddings.mul_(2.0).add_(1.0)
        assert torch.equal(forward(model, images).score_maps, expected)


def test_copies_do_not_share_class_embeddings(images):
    model = tiny_model()
    forward(model, images)
    other = copy.deepcopy(model)
    change_in_place(other)
    with torch.no_grad():
        assert torch.equal(other.encode_classes(), other.prompts(other.clip))
        assert torch.equal(model.encode_classes(), model.prompts(model.clip))


def test_eval_gradients_are_those_of_training(images, labels):
    model = tiny_model(context_decoder_dropout=0.0, decode_head_dropout=0.0, drop_path_rate=0.0)
    model(images, labels=labels).loss.backward()
    kept = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model._class_embeddings.get = lambda prompts, clip, training: prompts(clip)
    model(images, labels=labels).loss.backward()
    assert kept.keys() == {n for n, p in model.named_parameters() if p.grad is not None}
    for name, parameter in model.named_parameters():
        if name in kept:
            torch.testing.assert_close(kept[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_forward_passes_of_one_step_share_the_text_tower(images, labels):
    model = tiny_model(context_decoder_dropout=0.0, decode_head_dropout=0.0, drop_path_rate=0.0).train()
    gradients = []
    for shares in (False, True):
        model.zero_grad()
        counter = CallCounter(model)
        for index in range(3):
            model.share_class_embeddings(until_next=shares and index < 2)
            model(images + index, labels=labels).loss.backward()
        assert (counter.calls, counter.tokens) == ((1, 14) if shares else (3, 42))
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and "prompts.context_vectors" in gradients[1]
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-6, rtol=1e-4)


def test_a_shared_pass_may_have_no_backward(images, labels):
    model = tiny_model(context_decoder_dropout=0.0, decode_head_dropout=0.0, drop_path_rate=0.0).train()
    model(images, labels=labels).loss.backward()
    expected = model.prompts.context_vectors.grad.clone()
    model.zero_grad()
    model.share_class_embeddings(until_next=True)
    model(images, labels=labels)
    model.share_class_embeddings(until_next=False)
    model(images, labels=labels).loss.backward()
    torch.testing.assert_close(model.prompts.context_vectors.grad, expected, atol=1e-6, rtol=1e-4)


def test_nothing_is_shared_beyond_an_evaluation(images, labels):
    model = tiny_model().train()
    counter = CallCounter(model)
    model.share_class_embeddings(until_next=True)
    model(images, labels=labels)
    model.eval().train()
    for _ in range(2):
        model(images, labels=labels)
    assert counter.calls == 3


def test_a_compiler_sees_kept_embeddings_or_the_whole_way(monkeypatch):
    model = tiny_model()
    counter, compiling = CallCounter(model), True
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    assert model.encode_classes().requires_grad and model.encode_classes().requires_grad and counter.calls == 2
    with torch.no_grad():
        model.encode_classes(), model.encode_classes()
        assert counter.calls == 4  # nothing is kept by a graph
        compiling = False
        kept = model.encode_classes()
        compiling = True
        model.encode_classes().zero_()
        assert torch.equal(model.encode_classes(), kept) and counter.calls == 5


def test_weights_that_change_between_passes_that_share_are_refused(images, labels):
    model = tiny_model().train()
    model.share_class_embeddings(until_next=True)
    model(images, labels=labels).loss.backward()
    with torch.no_grad():
        model.prompts.context_vectors.add_(1.0)
    with pytest.raises(RuntimeError, match="changed while gradients were accumulated"):
        model(images, labels=labels)


def test_class_embeddings_from_inference_mode_serve_autograd(images, labels):
    model = tiny_model()
    with torch.inference_mode():
        model(images)
    model(images, labels=labels).loss.backward()


def test_autocast_does_not_leak_into_kept_embeddings(images):
    model = tiny_model()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(images)
    with torch.no_grad():
        assert torch.equal(model.encode_classes(), model.prompts(model.clip))


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


@pytest.mark.parametrize("mode", ["whole", "slide", "training"])
def test_forward_never_waits_for_the_device(kind, mode, images, labels, monkeypatch):
    monkeypatch.setattr(modeling_denseclip, "checked_labels", lambda labels, *args: labels)  # on a CPU it reads them
    model = tiny_model(kind, inference_mode="slide" if mode == "slide" else "whole")
    if mode == "training":
        with NeverWaiting():
            model.train()(images, labels).loss.backward()
    else:
        with torch.no_grad(), NeverWaiting():
            model(torch.randn(2, 3, 96, 160))
    with pytest.raises(AssertionError, match="waits for the device"), NeverWaiting():
        images.sum().item()


# Start values


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
    lacking = ["clip.logit_scale", "gamma", "context_decoder.layers.0.mlp.0.bias", *random]
    kept = {name: value for name, value in weights.items() if name not in lacking}
    loaded, info = DenseCLIPForSemanticSegmentation.from_pretrained(
        None, config=model.config, state_dict=kept, output_loading_info=True
    )
    state = loaded.state_dict()
    assert set(info["missing_keys"]) == set(lacking)
    assert {name for name in weights if not torch.equal(state[name], weights[name])} == set(random)
    assert all(0.05 < state[name].std() < 1.5 for name in random)


# Behaviour inside transformers


def test_what_transformers_asks_of_the_class():
    models = [tiny_model("vit"), tiny_model("resnet")]
    assert all(model.base_model is model.clip for model in models)
    assert DenseCLIPForSemanticSegmentation.input_modalities == ("image",)
    parts = {type(module).__name__ for model in models for module in model.modules()}
    assert set(DenseCLIPForSemanticSegmentation._no_split_modules) <= parts


@pytest.mark.parametrize("part", ["clip", "decode_head"])
def test_weights_left_on_the_disk_give_the_same(kind, part, images, tmp_path):
    model = tiny_model(kind)
    model.save_pretrained(tmp_path)
    places = {name: "disk" if name == part else "cpu" for name, _ in model.named_children()} | {"gamma": "cpu"}
    loaded = DenseCLIPForSemanticSegmentation.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offload"
    )
    assert next(getattr(loaded, part).parameters()).is_meta
    assert torch.equal(forward(loaded, images).logits, forward(model, images).logits)


def test_saved_model_loads_bit_equal(kind, images, tmp_path):
    model = tiny_model(kind)
    expected = forward(model, images)
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is DenseCLIPForSemanticSegmentation
    assert loaded.get_input_embeddings() is loaded.clip.vision_model.get_input_embeddings() is not None
    assert [name for name, p in loaded.named_parameters() if not p.requires_grad] == ["clip.logit_scale"]
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(forward(loaded, images).logits, expected.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_and_runs(kind, dtype, images, tmp_path):
    tiny_model(kind).save_pretrained(tmp_path)
    model = AutoModelForSemanticSegmentation.from_pretrained(tmp_path, dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert forward(model, images.to(dtype)).logits.isfinite().all()


def test_another_class_count_loads_with_ignored_mismatches(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    config = tiny_config(num_labels=5)
    model = DenseCLIPForSemanticSegmentation.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=True)
    assert model.decode_head.classifier.weight.shape[0] == 5
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_no_gradient_and_no_statistics(kind, images, labels, reentrant):
    options = {"context_decoder_dropout": 0.0, "decode_head_dropout": 0.0, "drop_path_rate": 0.5}
    gradients, buffers = [], []
    for checkpointing in (False, True):
        model = tiny_model(kind, **options).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        model(images.clone().requires_grad_(), labels=labels).loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        buffers.append(dict(model.named_buffers()))
    assert gradients[0].keys() == gradients[1].keys()
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], atol=1e-5, rtol=1e-3)
    for name, buffer in buffers[0].items():
        assert torch.equal(buffer, buffers[1][name]), name


def test_attention_implementations_agree(kind, images):
    model = tiny_model(kind)
    outputs = []
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        model._class_embeddings.clear()
        outputs.append(forward(model, images))
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, atol=1e-5, rtol=0)


def test_stochastic_depth_drops_whole_samples():
    from denseclip_hf.image_encoder_denseclip import StochasticDepth

    torch.manual_seed(0)
    module = torch.nn.Identity().train()
    dropped = StochasticDepth(0.5)(module, None, torch.ones(64, 3, 2))
    assert all(sample.unique().tolist() in ([0.0], [2.0]) for sample in dropped)
    assert 16 < sum(sample.any().item() for sample in dropped) < 48
    assert torch.equal(StochasticDepth(0.5)(module.eval(), None, torch.ones(4, 3, 2)), torch.ones(4, 3, 2))


def test_stochastic_depth_drops_the_branch_of_a_tuple():
    from denseclip_hf.image_encoder_denseclip import StochasticDepth

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


# From CLIP, and new classes


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
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs if k != key)
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
    with caplog.at_level(logging.WARNING):
        DenseCLIPForSemanticSegmentation.from_clip(tmp_path, ["sky"], tokenizer=Tokenizer(), image_size=96, **SIZES)
    assert "Newly initialised" in caplog.text and "decode_head" in caplog.text and "resized to" in caplog.text


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


def test_from_clip_refuses_what_is_no_clip(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="type 'denseclip', not a CLIP"):
        DenseCLIPForSemanticSegmentation.from_clip(tmp_path, ["sky"])


def test_from_clip_needs_a_tokenizer_for_names():
    with pytest.raises(ValueError, match="pass `tokenizer=`"):
        DenseCLIPForSemanticSegmentation.from_clip(tiny_clip("vit"), ["sky"])


@pytest.mark.parametrize(
    ("names", "sentence"), [(["a b c d e f g h i j k l"], "tokens with SOS and EOS"), ([" "], "empty")]
)
def test_from_clip_refuses_names_that_do_not_fit(names, sentence):
    with pytest.raises(ValueError, match=sentence):
        DenseCLIPForSemanticSegmentation.from_clip(tiny_clip("vit"), names, tokenizer=Tokenizer())


def test_set_classes_keeps_what_known_classes_learnt(kind, images):
    model = tiny_model(kind)
    weight = model.decode_head.classifier.weight.clone()
    before = forward(model, images)
    model.set_classes(["new", "class 2", "class 0", "newer"], Tokenizer())
    assert model.config.id2label == {0: "new", 1: "class 2", 2: "class 0", 3: "newer"}
    assert torch.equal(model.decode_head.classifier.weight[[1, 2]], weight[[2, 0]])
    after = forward(model, images)
    assert after.logits.shape[1] == after.score_maps.shape[1] == 4
    assert before.logits.shape[1] == 3


def test_set_classes_round_trips_through_disk(images, tmp_path):
    model = tiny_model()
    model.set_classes(["sky", "road", "car", "tree", "house"], Tokenizer())
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path)
    assert torch.equal(forward(loaded, images).logits, forward(model, images).logits)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        ([], "at least one"),
        ({}, "at least one"),
        (["sky", ""], "none of them empty"),
        (["sky", "sky"], "'sky' is given twice"),
        ("sky", "must be a list of texts"),
        ([["sky", "heaven"], "road"], "a class has one name"),
        ({1: "sky", 2: "road"}, "must be 0 … 1 without gaps"),
    ],
)
@pytest.mark.parametrize("guided", [False, True])
def test_class_names_that_are_refused(names, sentence, guided):
    with pytest.raises(ValueError, match=sentence):
        tiny_model(use_text_guidance=guided).set_classes(names, Tokenizer())
    with pytest.raises(ValueError, match=sentence):
        DenseCLIPForSemanticSegmentation.from_clip(tiny_model().clip, names, Tokenizer(), use_text_guidance=guided)


def test_set_classes_takes_a_mapping():
    model = tiny_model()
    model.set_classes({1: "road", 0: "sky"}, Tokenizer())
    assert model.config.id2label == {0: "sky", 1: "road"}


@pytest.mark.parametrize(
    ("clip", "error", "sentence"),
    [
        ("no/such/directory", OSError, "no/such/directory is neither a folder here nor a name on the Hub"),
        ("no-such-name", OSError, "no-such-name is neither a folder here"),
        (torch.nn.Identity(), ValueError, "`clip` is a Identity: give a whole `CLIPModel`"),
    ],
)
def test_what_is_no_clip_is_refused(clip, error, sentence):
    with pytest.raises(error, match=sentence):
        DenseCLIPForSemanticSegmentation.from_clip(clip, ["sky"], Tokenizer())


def test_a_misspelt_argument_is_refused(images, labels):
    with pytest.raises(TypeError, match="unexpected keyword argument 'lables'"):
        tiny_model()(images, lables=labels)


def test_a_picture_without_a_batch_is_refused(kind):
    with pytest.raises(ValueError, match=r"shape \(batch_size, channels, height, width\), got \(3, 64, 64\)"):
        tiny_model(kind)(torch.zeros(3, 64, 64))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_may_be_any_integers(images, labels, dtype):
    model = tiny_model()
    expected = forward(model, images, labels).loss
    assert forward(model, images, labels.to(dtype)).loss == expected > 0


def test_an_ignored_class_is_refused(images):
    model = tiny_model(num_labels=300, semantic_loss_ignore_index=255, class_token_ids=[[SOS, 5, EOS]] * 300)
    assert forward(model, images).logits.shape[1] == 300
    with pytest.raises(ValueError, match="is one of the 300 classes, which would not be learnt"):
        model(images, labels=torch.zeros(2, 64, 64).long())


def test_model_without_class_names_says_so(images):
    model = tiny_model(class_token_ids=None)
    with pytest.raises(ValueError, match="no class names yet"):
        model(images)
