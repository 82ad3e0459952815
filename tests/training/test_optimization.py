import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from denseclip_hf.optimization import optimize_for_inference
from helpers.models import tiny_model


def randomised(kind, **options):
    """A tiny model whose batch norms are no identities."""
    model = tiny_model(kind, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    return model


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"score_map_level": 0}, {"use_text_guidance": False}, {"inference_mode": "slide"}]
)
def test_optimized_models_give_the_same(kind, options):
    model = randomised(kind, **options)
    optimized = optimize_for_inference(model)
    for size in ((64, 64), (96, 128), (75, 101)):
        images = torch.randn(2, 3, *size)
        expected, output = model(images), optimized(images)
        torch.testing.assert_close(output.logits, expected.logits, rtol=1e-5, atol=1e-5)
        if expected.score_maps is not None:
            torch.testing.assert_close(output.score_maps, expected.score_maps, rtol=1e-5, atol=1e-5)


def test_optimizing_folds_every_batch_norm_and_leaves_the_model_alone(kind):
    model = randomised(kind)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    optimized = optimize_for_inference(model)
    assert not [m for m in optimized.modules() if isinstance(m, nn.BatchNorm2d)]
    assert optimized.clip.text_model is None and model.clip.text_model is not None
    assert not any(p.requires_grad for p in optimized.parameters())
    assert all(
        module.weight.is_contiguous(memory_format=torch.channels_last)
        for module in optimized.modules()
        if isinstance(module, nn.Conv2d)
    )
    assert not [m for m in optimized.clip.vision_model.modules() if isinstance(m, nn.Linear)] or kind == "resnet"
    joined = [isinstance(lateral, nn.Identity) for lateral in optimized.neck.lateral_convs]
    assert joined == [kind == "vit"] * 2 + [False] * 2
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.train()


def test_optimized_models_refuse_to_be_saved_or_trained(kind, tmp_path):
    optimized = optimize_for_inference(tiny_model(kind))
    with pytest.raises(ValueError, match="cannot be saved: use the model it was made from"):
        optimized.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="cannot be trained"):
        optimized.train()
    assert not optimized.eval().training and not (tmp_path / "model").exists()


def test_a_copy_of_an_optimized_model_is_a_model_of_its_own(kind):
    optimized = optimize_for_inference(tiny_model(kind))
    half = copy.deepcopy(optimized).to(torch.bfloat16).eval()
    assert half is not optimized and half.dtype == torch.bfloat16 and optimized.dtype == torch.float32
    with pytest.raises(ValueError, match="cannot be trained"):
        half.train()


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("optimized", [False, True])
def test_compiles_as_one_graph_for_all_sizes(kind, optimized):
    model = randomised(kind)
    expected = {size: _logits(model, size) for size in ((64, 96), (96, 128), (160, 224))}
    backend = CompileCounter()
    compiled = torch.compile(optimize_for_inference(model) if optimized else model, backend=backend, fullgraph=True)
    for size, logits in expected.items():
        torch.testing.assert_close(_logits(compiled, size), logits, rtol=1e-5, atol=1e-5)
    assert backend.frame_count <= 2  # the first size, then one graph for any


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_training_compiles_as_one_graph(kind):
    model = tiny_model(kind, decode_head_dropout=0.0, drop_path_rate=0.0, context_decoder_dropout=0.0).train()
    images, labels = torch.randn(2, 3, 64, 64), torch.randint(3, (2, 64, 64))
    expected = model(images, labels).loss
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    loss = compiled(images, labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    assert model.prompts.context_vectors.grad.abs().sum() > 0


@torch.no_grad()
def _logits(model, size):
    return model(torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))).logits
