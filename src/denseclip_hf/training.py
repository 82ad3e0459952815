"""The published training recipe through `Trainer`: parameter groups, schedule, arguments, trainer (section 4.1)."""

import logging
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .evaluation import evaluate_segmentation
from .transforms import AugmentedDataset, AugmentedStream, EpochCallback


logger = logging.getLogger(__name__)


class GroupRow(NamedTuple):
    """One row of the table of parameter groups."""

    name: str
    pattern: str
    multiplier: str  # which learning-rate multiplier: "image_encoder", "text_encoder", "one" or "zero"
    decays: bool = True


# The first row whose pattern matches the beginning of a parameter's name has it.
GROUP_TABLE = [
    GroupRow("logit_scale", r"clip\.logit_scale$", "zero"),  # only CLIP's contrastive loss trains it
    GroupRow("text_encoder", r"clip\.text_(model|projection)\.", "text_encoder"),
    GroupRow("image_encoder", r"clip\.(vision_model|visual_projection)\.|pyramid\.", "image_encoder"),
    GroupRow("context_decoder_norms", r"context_decoder\.layers\.\d+\.norm\d\.", "one", decays=False),
    GroupRow("decoder", r"(context_decoder|neck|decode_head|prompts)\.|gamma$", "one"),
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
        model (`DenseCLIPForSemanticSegmentation`): the model.
        lr (`float`): learning rate of what is new.
        weight_decay (`float`): decay of everything but the context decoder's layer norms, as in the original.
        image_encoder_lr_multiplier (`float`): on `lr`, for the image tower and the ViT's pyramid.
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
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        row = next((row for row in GROUP_TABLE if re.match(row.pattern, name)), None)
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
    """
    progress = min(step / total_steps, 1.0)
    rate = (base_lr - min_lr) * (1 - progress) ** power + min_lr
    if step < warmup_steps:
        rate *= 1 - (1 - step / warmup_steps) * (1 - warmup_ratio)
    return rate


@dataclass
class DenseCLIPTrainingArguments(TrainingArguments):
    """
    `TrainingArguments` whose defaults are the published recipe, with its learning-rate options.

    Batch 32 is part of the recipe: devices x `per_device_train_batch_size` x `gradient_accumulation_steps`.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "Rate of what is new: contexts, γ, decoders."})
    weight_decay: float = field(default=1e-4, metadata={"help": "AdamW's, see `parameter_groups`."})
    max_grad_norm: float = field(default=0.0, metadata={"help": "Gradient clipping; 0 clips nothing."})
    max_steps: int = field(default=80_000, metadata={"help": "Optimizer steps; -1 counts `num_train_epochs` instead."})
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
        default=0.1, metadata={"help": "Learning rate of the image encoder, as a share of `learning_rate`."}
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

    def __post_init__(self):
        # Without an accelerator, bf16 is refused unless the CPU is asked for by name.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()


class NonFiniteLossError(RuntimeError):
    """Raised when the loss is NaN or infinite, before it reaches a weight or a checkpoint."""


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack `pixel_values` and `labels`; whatever else a sample has (its file name) stays a list."""
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
    return {k: torch.stack(v) if k in ("pixel_values", "labels") else v for k, v in batch.items()}


class DenseCLIPTrainer(Trainer):
    """
    `Trainer` with DenseCLIP's parameter groups, schedule, logging and evaluation.

    Args:
        model (`DenseCLIPForSemanticSegmentation`): the model.
        args ([`DenseCLIPTrainingArguments`]): the recipe.
        train_dataset ([`AugmentedDataset`] or [`AugmentedStream`]): augmented samples.
        eval_dataset (*optional*): samples `{"image", "mask"}`, pictures and raw masks, see [`SegmentationData`].
        image_processor ([`DenseCLIPImageProcessor`]): used in evaluation and saved with the model.
        tokenizer (*optional*): saved with the model.
        do_reduce_labels (`bool`): of the raw masks in `eval_dataset`.
        kwargs: further arguments of `Trainer`.
    """

    model: Any
    optimizer: Any
    args: DenseCLIPTrainingArguments

    def __init__(
        self,
        model,
        args: DenseCLIPTrainingArguments,
        train_dataset=None,
        eval_dataset=None,
        image_processor=None,
        tokenizer=None,
        do_reduce_labels: bool = False,
        **kwargs,
    ):
        if args.world_size > 1 and args.device.type == "cuda":
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.image_processor, self.tokenizer, self.do_reduce_labels = image_processor, tokenizer, do_reduce_labels
        self._groups: list[dict[str, Any]] = []
        self._sums: dict[str, Any] = defaultdict(float)
        self._last_log = time.perf_counter()
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            data_collator=kwargs.pop("data_collator", collate),
            **kwargs,
        )
        if isinstance(train_dataset, (AugmentedDataset, AugmentedStream)):
            self.add_callback(EpochCallback(train_dataset))

    # Recipe

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return self.optimizer
        args = self.args
        self._groups = parameter_groups(
            self.model if model is None else model,
            args.learning_rate,
            args.weight_decay,
            args.image_encoder_lr_multiplier,
            args.text_encoder_lr_multiplier,
            args.exempt_norms_and_biases,
        )
        for group in self._groups:
            for parameter in group["params"]:
                parameter.requires_grad_(group["lr"] > 0)
        trained = [group for group in self._groups if group["lr"] > 0]
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, self.model)
        self.optimizer = optimizer_class(trained, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is not None or self.args.lr_scheduler_type != "polynomial":
            return super().create_scheduler(num_training_steps, optimizer)
        optimizer = self.optimizer if optimizer is None else optimizer
        factors = [self._rate_factor(group["lr"], num_training_steps) for group in optimizer.param_groups]
        self.lr_scheduler = LambdaLR(optimizer, factors)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _rate_factor(self, base_lr: float, total_steps: int) -> Callable[[int], float]:
        args = self.args

        def factor(step: int) -> float:
            rate = poly_learning_rate(
                step,
                base_lr,
                total_steps=total_steps,
                min_lr=args.min_learning_rate,
                power=args.poly_power,
                warmup_steps=args.get_warmup_steps(total_steps),
                warmup_ratio=args.warmup_start_ratio,
            )
            return rate / base_lr

        return factor

    # Loss and what is logged

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        names = inputs.pop("name", None)
        if self.args.channels_last:
            inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if not torch.isfinite(loss):
            files = f" on {', '.join(map(str, names))}" if names else ""
            raise NonFiniteLossError(
                f"the loss is {loss.item()} at step {self.state.global_step}{files}: training stops before it reaches "
                f"a weight; the checkpoints in {self.args.output_dir} are from before. Lower `learning_rate` or look "
                "at these files."
            )
        if model.training:
            self._count(outputs, inputs["labels"])
        return (loss, outputs) if return_outputs else loss

    @torch.no_grad()
    def _count(self, outputs, labels: torch.Tensor) -> None:
        """Add a step to what the next log line averages, without waiting for the device."""
        sums = self._sums
        sums["forwards"] += 1
        sums["images"] += len(labels)
        for key in ("decode_loss", "auxiliary_loss"):
            if outputs.get(key) is not None:
                sums[key] += outputs[key].detach()
        # At the logits' own resolution: exact enough to watch, and nothing is upsampled for it.
        small = F.interpolate(labels[:, None].float(), size=outputs["logits"].shape[-2:], mode="nearest")[:, 0]
        labelled = small != self.model.config.semantic_loss_ignore_index
        sums["hits"] += ((outputs["logits"].argmax(1) == small) & labelled).sum()
        sums["pixels"] += labelled.sum()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._sums["forwards"]:
            sums, self._sums = self._sums, defaultdict(float)
            for key in ("decode_loss", "auxiliary_loss"):
                if key in sums:
                    logs[key] = float(sums[key]) / sums["forwards"]
            logs["pixel_accuracy"] = float(sums["hits"]) / max(float(sums["pixels"]), 1.0)
            for group in self.optimizer.param_groups:
                logs[f"learning_rate/{group['name']}"] = group["lr"]
            now = time.perf_counter()
            logs["images_per_second"] = sums["images"] * self.args.world_size / (now - self._last_log)
            logs["peak_memory_gib"] = peak_memory() / 2**30
            self._last_log = now
        super().log(logs, start_time)

    # Evaluation: every image once, at its own size, only a K x K matrix kept

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        scores = evaluate_segmentation(
            self.model,
            rows,
            self.image_processor,
            do_reduce_labels=self.do_reduce_labels,
            accelerator=self.accelerator,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            progress=not self.args.disable_tqdm,
        )
        scalars = {f"{metric_key_prefix}_{k}": v for k, v in scores.items() if isinstance(v, (int, float))}
        self.log(dict(scalars))
        metrics = {
            **scalars,
            **{f"{metric_key_prefix}_{k}": v for k, v in scores.items() if not isinstance(v, (int, float))},
        }
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._last_log = time.perf_counter()
        return metrics

    # Checkpoints: complete or absent

    def _save(self, output_dir=None, state_dict=None):
        super()._save(output_dir, state_dict)
        for part in (self.image_processor, self.tokenizer):
            if part is not None:
                part.save_pretrained(output_dir or self.args.output_dir)

    def _get_output_dir(self, trial):
        return self._writing_dir or super()._get_output_dir(trial)

    _writing_dir: str | None = None

    def _save_checkpoint(self, model, trial):
        """Write into a folder beside the checkpoints, then rename: a kill leaves the previous one usable."""
        run_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self._writing_dir = str(run_dir / ".writing")
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writing_dir = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if self.state.best_global_step:
                best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
                if best.exists() or best.name == name:
                    self.state.best_model_checkpoint = str(best)
            written = run_dir / ".writing" / name
            self.state.save_to_json(str(written / "trainer_state.json"))
            shutil.rmtree(run_dir / name, ignore_errors=True)
            os.replace(written, run_dir / name)
            shutil.rmtree(run_dir / ".writing")
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=False,
            )
        self.accelerator.wait_for_everyone()


def peak_memory() -> float:
    """Most bytes in use so far: on the current CUDA device, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


__all__ = ["DenseCLIPTrainer", "DenseCLIPTrainingArguments", "parameter_groups", "poly_learning_rate"]
