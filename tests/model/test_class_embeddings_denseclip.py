"""Class embeddings: computed once, shared within a step, and never stale."""

import copy

import pytest
import torch

from denseclip_hf import DenseCLIPForSemanticSegmentation
from denseclip_hf.model import class_embeddings_denseclip
from helpers.models import Tokenizer, forward, tiny_config, tiny_model


class CallCounter:
    """Counts passes through the text tower and the tokens that went through it."""

    def __init__(self, model):
        self.calls, self.tokens = 0, 0
        model.clip.text_model.encoder.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs, output):
        self.calls += 1
        self.tokens += kwargs["inputs_embeds"].shape[:2].numel()


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


def test_new_classes_reach_a_compiler(images, monkeypatch):
    model = tiny_model()
    forward(model, images)
    model.set_classes(["one", "two", "three"], Tokenizer())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with torch.no_grad():
        torch.testing.assert_close(model.encode_classes(), model.prompts(model.clip), atol=0, rtol=0)


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
