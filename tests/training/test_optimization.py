import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from denseclip_hf.benchmarking import (
    Timing,
    build_model,
    class_token_ids,
    multiply_adds,
    take_turns,
    time_of_parts,
    training_step,
    work_like_the_original,
)
from denseclip_hf.model.prompts_denseclip import MAX_PACKED_TOKENS, pack_prompts
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
    with pytest.raises(ValueError, match="can not be saved: use the model it was made from"):
        optimized.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="can not be trained"):
        optimized.train()
    assert not optimized.eval().training and not (tmp_path / "model").exists()


def test_a_copy_of_an_optimized_model_is_a_model_of_its_own(kind):
    optimized = optimize_for_inference(tiny_model(kind))
    half = copy.deepcopy(optimized).to(torch.bfloat16).eval()
    assert half is not optimized and half.dtype == torch.bfloat16 and optimized.dtype == torch.float32
    with pytest.raises(ValueError, match="can not be trained"):
        half.train()


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_the_originals_way_gives_the_same_results(kind, mode):
    model, images = randomised(kind, inference_mode=mode), torch.randn(1, 3, 96, 160)
    labels = torch.randint(3, (1, 96, 160))
    labels[:, :40] = 255
    with torch.no_grad():
        ours = model(images, labels if mode == "whole" else None)
        theirs = work_like_the_original(model)(images, labels if mode == "whole" else None)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-5, atol=1e-5)
    if mode == "whole":
        torch.testing.assert_close(ours.decode_loss, theirs.decode_loss, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours.auxiliary_loss, theirs.auxiliary_loss, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("optimized", [False, True])
def test_compiles_as_one_graph_for_all_sizes(kind, optimized):
    model = randomised(kind)
    expected = {size: _logits(model, size) for size in ((64, 96), (96, 128), (128, 160), (160, 224))}
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


def test_made_up_names_have_the_lengths_of_ade20k():
    lengths = [len(ids) - 2 for ids in class_token_ids(150)]
    assert sum(lengths) == 184 and min(lengths) == 1 and max(lengths) == 3
    assert len({tuple(ids) for ids in class_token_ids(10_000)}) == 10_000


def test_the_text_towers_work_grows_with_the_distinct_tokens():
    tokens = {number: pack_prompts(class_token_ids(number), 8).token_ids for number in (150, 1500, 10_000)}
    assert tokens[150].shape == (1, 343)  # SOS, 8 contexts, 184 tokens of names, 150 EOS; unpacked it is 150 x 13
    own = 334 / 150
    for number, layout in tokens.items():
        assert layout.shape[1] <= 9 + MAX_PACKED_TOKENS  # so memory for masks grows as the tokens do
        assert layout.numel() < 1.1 * (number * own + 9 * len(layout))


def test_cases_take_turns_and_ratios_are_paired():
    order = []
    timings = take_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, rounds=2, warmup=1)
    assert order == ["a", "b"] * 3 and all(len(t.seconds) == 2 for t in timings.values())
    assert Timing([1.0, 2.0, 4.0]).ratio_to(Timing([2.0, 8.0, 8.0]))[0] == 2.0


def test_parts_and_multiply_adds_of_a_forward_pass(kind):
    model = tiny_model(kind)
    times = time_of_parts(model, torch.randn(1, 3, 64, 64), rounds=2)
    assert times["image tower"] > 0 and times["head"] > 0 and times["text tower"] == 0
    assert times["all"] >= times["image tower"] + times["head"]
    assert not [m for m in model.modules() if "forward" in vars(m)]
    few = multiply_adds(model, 64)
    assert 0 < few < multiply_adds(work_like_the_original(model), 64)
    own = model.decode_head.forward
    assert time_of_parts(model, torch.randn(1, 3, 64, 64), rounds=1)["text tower"] >= 0
    assert model.decode_head.forward == own and "forward" in vars(model.decode_head)  # still the original's way


def test_training_steps_of_both_ways_start_from_the_same_loss_and_learn(kind):
    losses = {}
    for way in (lambda m: m, work_like_the_original):
        step = training_step(way(tiny_model(kind)), 64)
        losses[way] = [step() for _ in range(3)]
        assert losses[way][-1] < losses[way][0]
    first, second = losses.values()
    assert first[0] == pytest.approx(second[0], rel=1e-5)


@pytest.mark.slow
def test_full_size_models_are_built_for_measuring():
    model = build_model("denseclip-rn50", 2)
    assert model.config.num_labels == 2 and not model.training and model.config.inference_mode == "whole"
