"""`Trainer` for DenseCLIP: its recipe, what one watches while it trains, evaluation, checkpoints that are complete."""

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from .adapters import batch_norms_outside, is_adapted, load_added_adapter
from .batch_norm import synchronise_batch_norms
from .evaluation import evaluate_segmentation
from .runs import WRITING_DIR
from .stopping import OutlivesSignals, StopCallback, TrainingStopped
from .training import DenseCLIPTrainingArguments, parameter_groups, poly_learning_rate
from .transforms import AugmentedDataset, AugmentedStream, EpochCallback


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
        model (`DenseCLIPForSemanticSegmentation`): the model, with or without adapters of `peft`.
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
        if args.world_size > 1:
            synchronise_batch_norms(model, args.device.type)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.image_processor, self.tokenizer, self.do_reduce_labels = image_processor, tokenizer, do_reduce_labels
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
        self._still = batch_norms_outside(model)
        if isinstance(train_dataset, (AugmentedDataset, AugmentedStream)):
            self.add_callback(EpochCallback(train_dataset))
        if self.is_fsdp_enabled:
            hold_scalars(self.model)
        self._stop = StopCallback()
        self.add_callback(self._stop)

    def train(self, *args, **kwargs):
        """[`Trainer.train`], which SIGTERM and Ctrl-C end with a checkpoint and [`TrainingStopped`]."""
        with self._stop.listening():
            try:
                return super().train(*args, **kwargs)
            except TrainingStopped:  # loggers close their books, as at any other end
                self.callback_handler.on_train_end(self.args, self.state, self.control)
                raise

    def get_train_dataloader(self):
        loader = super().get_train_dataloader()
        for part in (loader, getattr(loader, "base_dataloader", loader)):  # accelerate's, and torch's inside
            part.worker_init_fn = OutlivesSignals(part.worker_init_fn)
        return loader

    # Recipe

    def create_optimizer(self, model=None):
        if self.optimizer is not None:
            return self.optimizer
        args = self.args
        model = self.model if model is None else model
        groups = parameter_groups(
            model,
            args.learning_rate,
            args.weight_decay,
            args.image_encoder_lr_multiplier,
            args.text_encoder_lr_multiplier,
            args.exempt_norms_and_biases,
        )
        for group in groups:
            for parameter in group["params"]:  # an adapter has already frozen what it is not to train
                parameter.requires_grad_(group["lr"] > 0 and (parameter.requires_grad or not is_adapted(model)))
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        trained = [group for group in groups if group["params"]]
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
        if model.training and self._shares_class_embeddings:
            self.model.share_class_embeddings(until_next=not self.accelerator.sync_gradients)
        for batch_norm in self._still:
            batch_norm.eval()
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

    @property
    def _shares_class_embeddings(self) -> bool:
        """Whether micro-batches share a pass through the text tower: not one that is spread or compiled."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile)

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
        folder = Path(str(output_dir or self.args.output_dir))
        (folder / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle that nothing reads, with `hub_token` in it
        for part in (self.image_processor, self.tokenizer):
            if part is not None:
                part.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        if getattr(self.model, "_hf_peft_config_loaded", False):
            load_added_adapter(self.model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self):
        if getattr(self.model, "_hf_peft_config_loaded", False):
            load_added_adapter(self.model, str(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _get_output_dir(self, trial):
        return self._writing_dir or super()._get_output_dir(trial)

    _writing_dir: str | None = None

    def _save_checkpoint(self, model, trial):
        """Write into a folder beside the checkpoints, then rename: a kill leaves the previous one usable."""
        run_dir = Path(super()._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        writing = run_dir / WRITING_DIR
        self._writing_dir = str(writing)
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self._publish(writing, run_dir, name)
        except Exception as error:  # a full disk shows as OSError, RuntimeError or SafetensorError
            shutil.rmtree(writing, ignore_errors=True)
            raise OSError(
                f"the checkpoint of step {self.state.global_step} could not be written ({error}): those before it are "
                "complete; make room and start again with the same command."
            ) from error
        finally:
            self._writing_dir = None
        self.accelerator.wait_for_everyone()

    def _publish(self, writing: Path, run_dir: Path, name: str) -> None:
        """Move a complete checkpoint to where it belongs, and remove those that are too many."""
        if self.state.best_global_step:
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            if best.exists() or best.name == name:
                self.state.best_model_checkpoint = str(best)
        self.state.save_to_json(str(writing / name / "trainer_state.json"))
        shutil.rmtree(run_dir / name, ignore_errors=True)
        os.replace(writing / name, run_dir / name)
        shutil.rmtree(writing)
        rotate_checkpoints(
            output_dir=str(run_dir),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
            use_mtime=False,
        )


def hold_scalars(model: nn.Module) -> None:
    """FSDP2 shards no parameter without a dimension: CLIP's temperature, which is not trained, becomes a buffer."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() == 0:
                delattr(module, name)
                module.register_buffer(name, parameter.detach())


def peak_memory() -> float:
    """Most bytes in use so far: on the current CUDA device, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if os.uname().sysname == "Darwin" else 1024)


__all__ = ["DenseCLIPTrainer", "NonFiniteLossError", "collate"]
