"""`TrainingArguments` with the published training recipe as its defaults (section 4.1)."""

import logging
import platform
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from ..devices import needed
from ..options import TrainingOptions


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
class DenseCLIPTrainingArguments(TrainingOptions, TrainingArguments):  # type: ignore[misc]  # None until it is made
    """
    How it is trained: transformers' `TrainingArguments`, by default the published recipe, and its learning rates.

    Batch 32 is part of the recipe: devices x `per_device_train_batch_size` x `gradient_accumulation_steps`.

    Raises:
        ValueError: for values without a meaning, or that contradict each other.
    """

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
        multipliers = self.image_encoder_lr_multiplier, self.text_encoder_lr_multiplier
        if self.max_steps == 0 or self.max_steps < -1 or min(multipliers) < 0:
            raise ValueError(
                f"`max_steps` ({self.max_steps}) must be above 0, or -1 to count epochs, and the multipliers of "
                f"learning rates {multipliers} at least 0, which freezes."
            )
        if self.label_smoothing_factor or self.train_sampling_strategy != "random":
            raise ValueError(
                f"`label_smoothing_factor` ({self.label_smoothing_factor}) and `train_sampling_strategy` "
                f"({self.train_sampling_strategy}) have no effect: losses are the paper's, and the order is random."
            )
        if self.push_to_hub:
            raise ValueError(NO_PUSH)
        if self.precision not in (None, "auto"):
            raise ValueError(f"`precision` is auto or left out, got {self.precision!r}: see `--bf16` and `--fp16`.")
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
        if "mlflow" in (self.report_to or ()):  # its callback's own error is followed by a traceback
            needed("mlflow", "`report_to`", "mlflow")


__all__ = ["DenseCLIPTrainingArguments"]
