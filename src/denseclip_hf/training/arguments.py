"""`TrainingArguments` with the published training recipe as its defaults (section 4.1)."""

import logging
import platform
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from ..model.configuration_clip_resnet import refuse_first


logger = logging.getLogger(__name__)

NO_PUSH = (
    "training does not push, as Trainer would upload optimizer states and half-written checkpoints too: push what it "
    "leaves with `denseclip push OUTPUT_DIR USER/NAME --push`."
)


def has_bf16(cpu: bool) -> bool:
    """Whether the hardware multiplies bfloat16 itself; others take many times longer for it than for float32."""
    if not cpu:
        return not torch.cuda.is_available() or torch.cuda.is_bf16_supported(including_emulation=False)
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


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
    early_stopping_patience: int | None = field(
        default=None, metadata={"help": "Stop after this many evaluations without a better `metric_for_best_model`."}
    )
    precision: str | None = field(
        default=None,
        metadata={
            "help": "auto: `bf16` where the hardware has it, else float32; by default as `--bf16` and `--fp16` say."
        },
    )
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
        self.num_train_epochs = 3.0 if self.num_train_epochs is None else self.num_train_epochs
        refuse_first(
            (
                self.max_steps == 0 or self.max_steps < -1,
                f"max_steps is {self.max_steps}: give a positive number of steps, or -1 to count epochs.",
            ),
            (
                self.label_smoothing_factor,
                "label_smoothing_factor is not used: the losses are those of the paper, see the model.",
            ),
            (self.push_to_hub, NO_PUSH),
            (
                min(self.image_encoder_lr_multiplier, self.text_encoder_lr_multiplier) < 0,
                "learning-rate multipliers are at least 0, which freezes.",
            ),
            (
                self.precision not in (None, "auto"),
                f"`precision` is auto or left out, got {self.precision!r}: see `--bf16` and `--fp16`.",
            ),
        )
        # Without an accelerator, bf16 is refused unless the CPU is asked for by name.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        if self.precision == "auto":
            self.bf16 = has_bf16(self.use_cpu)
        elif self.bf16 and not has_bf16(self.use_cpu):
            logger.warning(
                "This hardware has no bf16 instructions: leave `bf16` out, which is many times faster here."
            )
        if not hasattr(TrainingArguments, "activation_checkpointing"):
            self.gradient_checkpointing = self.gradient_checkpointing or self.activation_checkpointing
        super().__post_init__()


__all__ = ["DenseCLIPTrainingArguments"]
