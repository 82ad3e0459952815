"""The published training recipe: parameter groups, schedule, arguments (section 4.1)."""

import logging
import platform
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import TrainingArguments

from .adapters import plain_name


logger = logging.getLogger(__name__)


NO_PUSH = (
    "training does not push, as Trainer would upload optimizer states and half-written checkpoints too: push what it "
    "leaves with `scripts/push_to_hub.py OUTPUT_DIR USER/NAME --push`."
)


class GroupRow(NamedTuple):
    """One row of the table of parameter groups."""

    name: str
    pattern: str
    multiplier: str  # which learning-rate multiplier: "image_encoder", "text_encoder", "one" or "zero"
    decays: bool = True


ADAPTERS = GroupRow("adapters", "", "one")  # of `peft`; new, wherever they are and whatever their names
# The first row whose pattern matches the beginning of a parameter's name has it.
GROUP_TABLE = [
    GroupRow("text_encoder", r"clip\.text_(model|projection)\.", "text_encoder"),
    GroupRow("image_encoder", r"clip\.(vision_model|visual_projection)\.|pyramid\.", "image_encoder"),
    GroupRow("context_decoder_norms", r"context_decoder\.layers\.\d+\.norm\d\.", "one", decays=False),
    GroupRow("decoder", r"(context_decoder|neck|decode_head|prompts)\.|gamma$", "one"),
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
        image_encoder_lr_multiplier (`float`): on `lr`, for the image tower and the ViT's pyramid; 0 freezes them.
        text_encoder_lr_multiplier (`float`): on `lr`, for the text tower; 0 freezes it.
        exempt_norms_and_biases (`bool`): no decay on any norm, bias or other vector, as transformers does.

    Returns:
        `list[dict]`: groups with `name`, `params`, `lr`, `weight_decay`; frozen parameters have `lr` 0.

    Raises:
        ValueError: for a multiplier below 0, or naming a parameter that no row of the table covers.
    """
    _check_multipliers(image_encoder_lr_multiplier, text_encoder_lr_multiplier)
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


def _is_slow_in_bf16() -> bool:
    """Whether this CPU is one of Intel's kind without AVX-512, on which oneDNN has no fast kernels for bf16."""
    return platform.machine() in ("x86_64", "AMD64") and "AVX512" not in torch.backends.cpu.get_cpu_capability()


def _check_multipliers(image_encoder: float, text_encoder: float) -> None:
    if image_encoder < 0 or text_encoder < 0:
        raise ValueError(
            f"`image_encoder_lr_multiplier` and `text_encoder_lr_multiplier` must be at least 0, which freezes, got "
            f"{image_encoder} and {text_encoder}."
        )


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


@dataclass
class DenseCLIPTrainingArguments(TrainingArguments):
    """
    How it is trained: transformers' `TrainingArguments`, by default the published recipe, and its learning rates.

    Batch 32 is part of the recipe: devices x `per_device_train_batch_size` x `gradient_accumulation_steps`.

    Raises:
        ValueError: for values without a meaning, or that contradict each other.
    """

    output_dir: str | None = field(default=None, metadata={"help": "Needed: the directory of the run."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Rate of what is new: contexts, γ, decoders."})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's, see `parameter_groups`."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 clips nothing."})
    max_steps: int | None = field(  # type: ignore[assignment]  # a number once it is made
        default=None, metadata={"help": "Optimizer steps: 80000, or -1 (count epochs) if `num_train_epochs` is given."}
    )
    num_train_epochs: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Epochs, where `max_steps` is not given."}
    )
    warmup_steps: float = field(default=1500, metadata={"help": "Warm-up steps, or below 1 their share of all."})
    lr_scheduler_type: str = field(
        default="polynomial", metadata={"help": "`polynomial` is the original's schedule; others are transformers'."}
    )
    per_device_train_batch_size: int = field(default=4, metadata={"help": "Images per device and forward pass."})
    per_device_eval_batch_size: int = field(default=4, metadata={"help": "Images of one size per forward pass."})
    dataloader_drop_last: bool = field(default=True, metadata={"help": "Leave an incomplete last batch out."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: file names travel along."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Kept off: a bad loss stops training."})
    metric_for_best_model: str | None = field(default="mean_iou", metadata={"help": "What `best` means."})
    greater_is_better: bool | None = field(default=True, metadata={"help": "Whether more of it is better."})
    image_encoder_lr_multiplier: float = field(
        default=0.1,
        metadata={"help": "Learning rate of the image encoder, as a share of `learning_rate`; 0 freezes it."},
    )
    text_encoder_lr_multiplier: float = field(
        default=0.0, metadata={"help": "Learning rate of the text encoder, as a share; 0 freezes it."}
    )
    min_learning_rate: float = field(default=1e-6, metadata={"help": "Rate of every group at the last step."})
    poly_power: float = field(default=0.9, metadata={"help": "Exponent of the polynomial decay."})
    warmup_start_ratio: float = field(default=1e-6, metadata={"help": "Share of the rate at step 0."})
    channels_last: bool = field(
        default=False, metadata={"help": "Keep convolutions' tensors channels-last: faster with bf16 and ResNets."}
    )
    exempt_norms_and_biases: bool = field(default=False, metadata={"help": "No weight decay on norms and biases."})
    save_code: bool = field(
        default=False,
        metadata={"help": "Put the model's code beside the weights, for `trust_remote_code=True`."},
    )
    if not hasattr(TrainingArguments, "activation_checkpointing"):  # the name since transformers 5.23
        activation_checkpointing: bool = field(
            default=False, metadata={"help": "Compute activations again in the backward pass, to need less memory."}
        )

    @property
    def device(self) -> torch.device:
        """[`TrainingArguments.device`]; a CPU without its number, which older Trainers ask `torch.load` for vainly."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def __post_init__(self):
        if self.max_steps is None:
            self.max_steps = 80_000 if self.num_train_epochs is None else -1
        elif self.max_steps > 0 and self.num_train_epochs is not None:
            logger.warning(
                "max_steps %d counts, not num_train_epochs %g: to train for epochs, pass `--max_steps -1`.",
                self.max_steps,
                self.num_train_epochs,
            )
        if self.max_steps == 0 or self.max_steps < -1:
            raise ValueError(f"max_steps is {self.max_steps}: give a positive number of steps, or -1 to count epochs.")
        self.num_train_epochs = 3.0 if self.num_train_epochs is None else self.num_train_epochs
        if self.label_smoothing_factor:
            raise ValueError("label_smoothing_factor is not used: the losses are those of the paper, see the model.")
        if self.push_to_hub:
            raise ValueError(NO_PUSH)
        _check_multipliers(self.image_encoder_lr_multiplier, self.text_encoder_lr_multiplier)
        # Without an accelerator, bf16 is refused unless the CPU is asked for by name.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.bf16 and self.use_cpu and _is_slow_in_bf16():
            logger.warning("This CPU has no AVX-512: bf16 is many times slower on it than float32, leave it out.")
        if not hasattr(TrainingArguments, "activation_checkpointing"):
            self.gradient_checkpointing = self.gradient_checkpointing or self.activation_checkpointing
        super().__post_init__()


__all__ = ["DenseCLIPTrainingArguments", "parameter_groups", "poly_learning_rate"]
