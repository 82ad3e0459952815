"""Class embeddings: computed once, shared within a step, and never stale."""

import copy

import pytest
import torch
from torch.nn.utils import prune

from denseclip_hf.model.text_encoder_denseclip import encode_prompts
from helpers.models import Tokenizer, forward, tiny_model


class CallCounter:
    """Counts passes through the text tower and the tokens that went through it."""

    def __init__(self, model, monkeypatch):
        self.calls, self.tokens = 0, 0
        monkeypatch.setattr("denseclip_hf.model.modeling_denseclip.encode_prompts", self.count)

    def count(self, tower, clip, layout, prompts=None):
        self.calls += 1
        self.tokens += layout.token_ids.numel()
        return encode_prompts(tower, clip, layout, prompts)


def computed(model):
    with torch.no_grad():
        return encode_prompts(model.tower, model.clip, model.prompts.layout(model.device), model.prompts)


def test_eval_runs_the_text_tower_once(images, monkeypatch):
    model = tiny_model()
    counter = CallCounter(model, monkeypatch)
    for _ in range(3):
        forward(model, images)
    model.config.inference_mode = "slide"
    forward(model, torch.randn(1, 3, 96, 160))
    with torch.inference_mode():
        model(images)
    # SOS and 4 contexts once, then 1 + 2 + 3 tokens of names with an EOS each
    assert (counter.calls, counter.tokens) == (1, 14)


def change_in_place(model):
    with torch.no_grad():
        model.prompts.context_vectors.add_(1.0)


def change_token(model):
    model.prompts.token_ids[0, -2] += 1


def load_part(model):
    model.clip.load_state_dict({k: v + 1 if "text_projection" in k else v for k, v in model.clip.state_dict().items()})


def edit_without_a_trace(model):
    model.clip.text_projection.weight.data[0, 1] += 1.0
    model.train().eval()


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


def test_forward_passes_of_one_step_share_the_text_tower(images, labels, monkeypatch):
    model = tiny_model(context_decoder_dropout=0.0, decode_head_dropout=0.0, drop_path_rate=0.0).train()
    gradients = []
    for shares in (False, True):
        model.zero_grad()
        counter = CallCounter(model, monkeypatch)
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


def test_nothing_is_shared_beyond_an_evaluation(images, labels, monkeypatch):
    model = tiny_model().train()
    counter = CallCounter(model, monkeypatch)
    model.share_class_embeddings(until_next=True)
    model(images, labels=labels)
    model.eval().train()
    for _ in range(2):
        model(images, labels=labels)
    assert counter.calls == 3


def test_neither_inference_mode_nor_autocast_leaks_into_kept_embeddings(images, labels):
    model = tiny_model()
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        model(images)
    with torch.no_grad():
        assert torch.equal(model.encode_classes(), computed(model))
    model(images, labels=labels).loss.backward()
    assert model.prompts.context_vectors.grad.any()


def disable_adapter(model):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(
        model, LoraConfig(target_modules=r"clip\.text_model\..*\.q_proj", init_lora_weights=False)
    )
    forward(model.eval(), torch.zeros(1, 3, 64, 64))
    adapted.base_model.disable_adapter_layers()


def prune_twice(model):
    layer = model.clip.text_model.encoder.layers[0].mlp.fc1
    prune.random_unstructured(layer, "weight", amount=0.5)
    forward(model, torch.zeros(1, 3, 64, 64))
    prune.random_unstructured(layer, "weight", amount=0.5)


def hook(model):
    model.clip.text_model.final_layer_norm.register_forward_hook(lambda module, args, output: output + 1)


def replace_method(model):
    model.clip.text_model.final_layer_norm.forward = lambda x: x + 1


def replace_parameter(model):
    model.prompts.context_vectors = torch.nn.Parameter(torch.randn(4, 16))


@pytest.mark.parametrize(
    "change",
    [
        change_in_place,
        change_token,
        load_part,
        edit_without_a_trace,
        disable_adapter,
        prune_twice,
        hook,
        replace_method,
        replace_parameter,
        lambda model: model.double(),
        lambda model: model.set_classes(["one", "two", "three"], Tokenizer()),
    ],
)
def test_class_embeddings_are_never_stale(change, images):
    model = tiny_model()
    forward(model, images)
    untouched = copy.deepcopy(model)
    change(model)
    with torch.no_grad():
        for each in (model, untouched):
            assert torch.equal(each.encode_classes(), computed(each))
