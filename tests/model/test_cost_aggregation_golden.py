"""The cost aggregation decoder computes what CAT-Seg's does: each step, logits, loss and gradients."""

import re
from typing import NamedTuple

import pytest
import torch
from torch.nn import functional as F

from denseclip_hf.conversion.catseg import aggregator_key_table
from denseclip_hf.conversion.keys import rename
from denseclip_hf.model.cost_aggregation_denseclip import LEFT_OUT, CostAggregationHead, cosines
from helpers.catseg import aggregator, catseg_case, compare, parameters


# Case, the fixture it lies in, the prefix of its tensors' names there.
CASES = [("aggregator", "a", "")] + [
    (fixture, case, f"{case}/")
    for fixture in ("aggregator_cases_bcd", "aggregator_cases_efg")
    for case in catseg_case(fixture)[0]["cases"]
]


class Run(NamedTuple):
    head: CostAggregationHead
    config: dict
    inputs: dict[str, torch.Tensor]
    logits: torch.Tensor
    loss: torch.Tensor
    steps: dict[str, torch.Tensor]  # by our module's name: its output, and for some the input as `NAME.input`


def run(fixture: str, case: str, prefix: str) -> Run:
    description, tensors = catseg_case(fixture)
    weights = parameters(catseg_case("aggregator")[1]) | parameters(tensors, f"state_dict/{prefix}")
    config = description["cases"][case]["config"]
    head = aggregator(config, weights)
    inputs = {name: value.clone().requires_grad_() for name, value in parameters(tensors, f"in/{prefix}").items()}
    steps: dict[str, torch.Tensor] = {}
    for name, module in head.named_modules():

        def keep(module, args, output, name=name):
            steps[name] = output
            steps.update({f"{name}.input{index or ''}": value for index, value in enumerate(args)})
            if re.fullmatch(r"upsampling_blocks\.\d\.norm\d", name):
                # A ReLU comes next. One value (case c) is so near 0 that rounding decides its sign, and a part of
                # the gradient with it: in the reference it was positive.
                return output + 1e-7 * (output.abs() < 1e-7)

        module.register_forward_hook(keep)
    attend, attentions = F.scaled_dot_product_attention, []

    def attention(query, key, value, attn_mask=None):
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
        attentions.append((scores if attn_mask is None else scores + attn_mask).softmax(-1))
        return attend(query, key, value, attn_mask=attn_mask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", attention)
        logits = head.aggregate(
            inputs["img_feats"], inputs["text_feats"], inputs["guidance0"], [inputs["guidance1"], inputs["guidance2"]]
        )
    for index, softmax in enumerate(attentions):  # two blocks in each layer
        steps[f"layers.{index // 2}.spatial_block{index % 2 + 1}.softmax"] = softmax
    return Run(head, config, inputs, logits, (logits * tensors[f"in/{prefix}weight"]).sum(), steps)


def step(ran: Run, name: str, classes: int) -> torch.Tensor:
    """What the fixtures call `name`, in their layout: (B, C, T, H, W) or rows of B * T."""
    steps = ran.steps

    def maps(rows):  # B * T, H, W, C -> B, C, T, H, W
        return rows.unflatten(0, (-1, classes)).permute(0, 4, 1, 2, 3)

    if name == "corr":
        return cosines(ran.inputs["img_feats"], ran.inputs["text_feats"]).transpose(1, 2)
    if name == "corr_embed":
        return maps(steps["cost_embedding"].permute(0, 2, 3, 1))
    direct = {"corr_in": "cost_embedding.input", "text_guidance_in": "text_projection.input"}
    if name in direct:
        return steps[direct[name]]
    projections = {"guidance_projection": "image_projection", "text_guidance_projection": "text_projection"}
    if match := re.fullmatch(r"(?:decoder_guidance_projection\.(\d)|.*guidance_projection)", name):
        return steps[projections.get(name, f"skip_projections.{match[1]}")].relu()
    if match := re.fullmatch(r"decoder([12])(.*)", name):
        part = {"": "", ".up": ".upsample", ".gn_1": ".norm1"}[match[2]]
        return steps[f"upsampling_blocks.{int(match[1]) - 1}{part}"]
    number, part = re.fullmatch(r"layers\.(\d+)\.(.*)", name).groups()
    layer = f"layers.{number}"
    if part == "out":
        return steps[layer].permute(0, 4, 1, 2, 3)
    if part == "swin_block":
        return maps(steps[f"{layer}.spatial_block2"])
    if part == "guidance_norm":
        return steps[f"{layer}.guidance_norm"].flatten(1, 2)
    if match := re.fullmatch(r"block_([12])(\.\w+)?", part):
        block = f"{layer}.spatial_block{match[1]}"
        if match[2] is None:
            return steps[block].flatten(1, 2)
        if match[2] == ".attn":
            return steps[f"{block}.attention"].flatten(0, 1)
        if match[2] == ".softmax":  # the first class of the first image
            return steps[f"{block}.softmax"][0].unflatten(0, (-1, ran.config["nheads"]))
        return torch.cat([steps[f"{block}.attention.input"][0], steps[f"{block}.attention.input1"][0]], dim=-1)
    block = f"{layer}.class_block"
    if part == "pool":
        pools = zip(steps[layer].shape[2:4], ran.head.pooling_size, strict=True)
        height, width = (side // pool for side, pool in pools)
        return steps[f"{block}.input"].unflatten(0, (-1, height, width)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    if part == "mlp":
        return steps[f"{block}.mlp"]
    sources = {
        "padded": f"{block}.norm1.input",
        "linear_attention": f"{block}.attention",
        **{letter: f"{block}.attention.{letter}_proj" for letter in "qkv"},
    }
    rows = steps[sources[part]]
    padding = max(ran.config["pad_len"] - rows.shape[1], 0)  # one row of it stands for all
    rows = torch.cat([rows, rows[:, -1:].expand(-1, padding, -1)], dim=1)
    return rows if part == "padded" else rows.unflatten(-1, (ran.config["nheads"], -1))


@pytest.mark.parametrize(("fixture", "case", "prefix"), CASES)
def test_steps_logits_loss_and_gradients(fixture, case, prefix):
    ran = run(fixture, case, prefix)
    description, tensors = catseg_case(fixture)
    classes = ran.steps["cost_embedding"].shape[0] // len(ran.logits)
    for name in parameters(tensors, f"step/{prefix}"):
        actual, full = step(ran, name, classes), f"step/{prefix}{name}"
        if rows := re.search(r"rows \[([\d, ]+)\] of", description["tensors"][full].get("meaning", "")):
            actual = actual[[int(row) for row in rows[1].split(",")]]
        if name.endswith(".mlp"):  # ours leaves the padding out of it
            actual = torch.cat([actual, tensors[full][:, actual.shape[1] :]], dim=1)
        compare(actual, full, fixture)
    compare(ran.logits, f"out/{prefix}logits", fixture)
    compare(ran.loss[None], f"out/{prefix}loss", fixture)
    if f"out/{prefix}kept" in tensors:
        assert torch.equal((ran.logits != LEFT_OUT).all(dim=(2, 3)), tensors[f"out/{prefix}kept"].bool())

    ran.loss.backward()
    if fixture == "aggregator":
        fixture = "aggregator_grad"
    _, tensors = catseg_case(fixture)
    expected = parameters(tensors, f"grad/{prefix}")
    inputs = {key.removeprefix("in/"): value for key, value in expected.items() if key.startswith("in/")}
    ours = {
        key: next(iter(rename({key: value}, aggregator_key_table("", ""))))
        for key, value in expected.items()
        if not key.startswith("in/")
    }
    for name in inputs:
        compare(ran.inputs[name].grad, f"grad/{prefix}in/{name}", fixture)
    for key, name in ours.items():
        compare(ran.head.get_parameter(name).grad.view_as(expected[key]), f"grad/{prefix}{key}", fixture)
    padded = ran.logits.shape[1] < ran.config["pad_len"]
    for name, parameter in ran.head.named_parameters():
        if "padding" in name:
            assert (parameter.grad is not None) == padded, name
