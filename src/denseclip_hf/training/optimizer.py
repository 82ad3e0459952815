"""Which parameters learn at which rate, and how the rates change: the published recipe (section 4.1)."""

import re
from typing import Any, NamedTuple

from torch import nn

from .adapters import plain_name


class GroupRow(NamedTuple):
    """One row of the table of parameter groups."""

    name: str
    pattern: str
    multiplier: str  # which learning-rate multiplier: "image_encoder", "text_encoder", "one" or "zero"
    decays: bool = True


ADAPTERS = GroupRow("adapters", "", "one")  # peft's; new, wherever they are and whatever their names
# The first row whose pattern matches the beginning of a parameter's name has it.
GROUP_TABLE = [
    GroupRow("text_encoder", r"clip\.text_(model|projection)\.", "text_encoder"),
    GroupRow("image_encoder", r"clip\.(vision_model|visual_projection)\.|backbone\.|pyramid\.", "image_encoder"),
    GroupRow("context_decoder_norms", r"context_decoder\.layers\.\d+\.norm\d\.", "one", decays=False),
    GroupRow("decoder", r"(pool|context_decoder|neck|decode_head|prompts)\.|gamma$", "one"),
]
# With cost aggregation CLIP is trained in the queries and values of its attention alone, as in CAT-Seg. Those queries
# that its last image block does not use would miss their gradient.
COST_AGGREGATION_GROUP_TABLE = [
    GroupRow("text_encoder", r"clip\.text_model\..*\.[qv]_proj\.weight$", "text_encoder"),
    GroupRow("image_encoder", r"clip\.vision_model\..*\.[qv]_proj\.weight$", "image_encoder"),
    GroupRow("frozen", r"clip\.", "zero"),
    GroupRow("decoder_norms", r"decode_head\..*norm\d?\.", "one", decays=False),
    *GROUP_TABLE[-2:],
]


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float,
    image_encoder_lr_multiplier: float = 0.1,
    text_encoder_lr_multiplier: float = 0.0,
    exempt_norms_and_biases: bool = False,
) -> list[dict[str, Any]]:
    """
    All parameters of `model`, each in exactly one group with its own base learning rate and decay.

    Args:
        model (`DenseCLIPForSemanticSegmentation`): the model, with or without adapters of `peft`.
        lr (`float`): learning rate of what is new.
        weight_decay (`float`): decay of everything but the context decoder's layer norms, as in the original.
        image_encoder_lr_multiplier (`float`): on `lr`, for the image tower or backbone, and the ViT's pyramid; 0
            freezes them. A backbone's attention pool is new and has `lr`; the authors trained theirs in this group.
        text_encoder_lr_multiplier (`float`): on `lr`, for the text tower; 0 freezes it.
        exempt_norms_and_biases (`bool`): no decay on any norm, bias or other vector, as transformers does.

    Returns:
        `list[dict]`: groups with `name`, `params`, `lr`, `weight_decay`; frozen parameters have `lr` 0.

    Raises:
        ValueError: naming a parameter that no row of the table covers.
    """
    multipliers = {
        "image_encoder": image_encoder_lr_multiplier,
        "text_encoder": text_encoder_lr_multiplier,
        "one": 1.0,
        "zero": 0.0,
    }
    table = GROUP_TABLE
    config: Any = model.config
    if config.decode_head == "cost_aggregation":
        depth = config.clip_config.vision_config.num_hidden_layers
        unused = GroupRow("unused", rf"clip\.vision_model\.encoder\.layers\.{depth - 1}\.self_attn\.q_proj\.", "zero")
        table = [unused, *COST_AGGREGATION_GROUP_TABLE]
    groups: dict[str, dict[str, Any]] = {}
    adapters = set(getattr(model, "peft_config", None) or ())
    for name, parameter in model.named_parameters():
        plain = plain_name(name)
        row = next((row for row in table if re.match(row.pattern, plain)), None)
        row = row if adapters.isdisjoint(plain.split(".")) else ADAPTERS
        if row is None:
            raise ValueError(f"no parameter group covers {name}: add a row for it to `GROUP_TABLE`.")
        exempt = exempt_norms_and_biases and row.decays and parameter.dim() < 2
        group_name = f"{row.name}_without_decay" if exempt else row.name
        group = groups.setdefault(
            group_name,
            {
                "name": group_name,
                "params": [],
                "lr": lr * multipliers[row.multiplier],
                "weight_decay": weight_decay if row.decays and not exempt else 0.0,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def poly_learning_rate(
    step: int,
    base_lr: float,
    *,
    total_steps: int,
    min_lr: float = 1e-6,
    power: float = 0.9,
    warmup_steps: int = 1500,
    warmup_ratio: float = 1e-6,
) -> float:
    """
    Learning rate while step `step` (0-based) runs: polynomial decay, linear warm-up on top (the original's schedule).

    Args:
        step (`int`): 0 … `total_steps`.
        base_lr (`float`): the group's own rate.
        total_steps (`int`): T, when the rate reaches `min_lr`.
        min_lr (`float`): the rate at the end, the same for every group.
        power (`float`): exponent of the decay.
        warmup_steps (`int`): steps of the warm-up, during which the decay already runs.
        warmup_ratio (`float`): share of the rate at step 0.

    Raises:
        ZeroDivisionError: if `total_steps` is 0.
    """
    progress = min(step / total_steps, 1.0)
    rate = (base_lr - min_lr) * (1 - progress) ** power + min_lr
    if step < warmup_steps:
        rate *= 1 - (1 - step / warmup_steps) * (1 - warmup_ratio)
    return rate


__all__ = ["parameter_groups", "poly_learning_rate"]
