"""`Trainer` for DenseCLIP: its recipe, what one watches while it trains, evaluation."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback

from ..evaluation import evaluate_segmentation
from ..metrics import scores_from_confusion_matrix
from ..transforms import AugmentedDataset, AugmentedStream, EpochCallback
from .arguments import DenseCLIPTrainingArguments
from .callbacks import TrainingLog
from .checkpoints import CheckpointingTrainer, check_whole, newest_whole_checkpoint
from .optimizer import parameter_groups, poly_learning_rate
from .sampling import GlobalBatches, collate, training_loader
from .stopping import StopCallback, TrainingStopped, leave_signals_to_main_process


logger = logging.getLogger(__name__)


class NonFiniteLossError(RuntimeError):
    """Raised when the loss or its gradient is NaN or infinite, before it reaches a weight or a checkpoint."""


class DenseCLIPTrainer(CheckpointingTrainer):
    """
    `Trainer` with DenseCLIP's parameter groups, schedule, logging and evaluation.

    Args:
        model (`DenseCLIPForSemanticSegmentation`): the model, with or without adapters of `peft`.
        args ([`DenseCLIPTrainingArguments`]): the recipe.
        train_dataset ([`AugmentedDataset`] or [`AugmentedStream`]): augmented samples.
        eval_dataset (*optional*): samples `{"image", "mask"}`, images and masks of class ids, see
            [`SegmentationData`]; or several such sets in a `dict` by name.
        image_processor ([`DenseCLIPImageProcessor`]): used in evaluation and saved with the model.
        tokenizer (*optional*): saved with the model.
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
        **kwargs,
    ):
        if args.n_gpu > 1:  # torch's DataParallel, whose copies of the model have no parameters to train
            logger.warning("One of %d devices is used: `accelerate launch` uses all.", args.n_gpu)
            args._n_gpu = 1
        if args.world_size > 1 and args.device.type == "cuda":  # torch has none for the CPU
            model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self._log = TrainingLog()
        self._unchecked: list[tuple[torch.Tensor, Any]] = []  # losses of the step that runs, and their files' names
        self._still: list[nn.Module] = []  # batch norms that keep their statistics
        self._batches: GlobalBatches | None = None
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
        if args.early_stopping_patience is not None:
            self.add_callback(EarlyStoppingCallback(args.early_stopping_patience))
        self._stop = StopCallback()
        self.add_callback(self._stop)
        if (
            type(self).evaluate is DenseCLIPTrainer.evaluate
            and eval_dataset is not None
            and not _prepared(eval_dataset)
        ):
            self._check_metrics()

    def _check_metrics(self) -> None:
        """Refuse metric functions that would never be called, and a best metric that evaluation does not give."""
        if self.compute_metrics is not None or self.preprocess_logits_for_metrics is not None:
            raise ValueError(
                "`compute_metrics` and `preprocess_logits_for_metrics` have no effect on images and masks, of which "
                "only counts are kept: give an `eval_dataset` of prepared samples (`pixel_values`, `labels`), or "
                "override `evaluate`."
            )
        asked = self.args.metric_for_best_model
        if asked is None or self.args.eval_strategy == "no":
            return
        scores = [key for key, value in scores_from_confusion_matrix(torch.eye(1)).items() if isinstance(value, float)]
        scores += ["loss"] if self.model.config.inference_mode == "whole" else []
        scores += [f"iou/{name}" for name in self.model.config.id2label.values()]
        if isinstance(self.eval_dataset, dict):
            scores = ["mean_iou", *(f"{name}_{key}" for name in self.eval_dataset for key in scores)]
        if asked.removeprefix("eval_") not in scores:
            raise ValueError(
                f"`metric_for_best_model` is {asked!r}, which evaluation does not give: name one of "
                f"{', '.join(scores)}."
            )

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """
        [`Trainer.train`], which SIGTERM and Ctrl-C end with a checkpoint and [`TrainingStopped`].

        Raises:
            ValueError: if the data does not suffice for a single step, or `resume_from_checkpoint` is not whole.
            NonFiniteLossError: if a loss or gradient is NaN or infinite.
        """
        if resume_from_checkpoint is True:
            with self.args.main_process_first(desc="looking for the last checkpoint"):
                main = self.args.local_process_index == 0
                resume_from_checkpoint = newest_whole_checkpoint(Path(str(self.args.output_dir)), main) or True
        elif resume_from_checkpoint:
            check_whole(resume_from_checkpoint)
        with self._stop.listening():
            try:
                output = super().train(resume_from_checkpoint, *args, **kwargs)
            except TrainingStopped:  # loggers finish, as at any other end
                self.callback_handler.on_train_end(self.args, self.state, self.control)
                raise
        if not output.global_step:
            raise ValueError("the training stream gives not a single batch, so nothing was trained: fill it.")
        return output

    def _init_training_state(self, max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs):
        """[`Trainer._init_training_state`]; a moved run finds its best model, one that is over takes no step."""
        start = super()._init_training_state(max_steps, num_update_steps_per_epoch, num_train_epochs, *args, **kwargs)
        self._find_best_checkpoint(Path(str(self.args.output_dir)))
        return (num_train_epochs, 0) if self.state.global_step >= max_steps else start

    def end(self):
        """[`Trainer.end`]; unwraps the model first, as freeing DDP after the process group is gone can hang."""
        self.model_wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()

    def get_train_dataloader(self):
        """Batches of this process, see [`GlobalBatches`]; of an [`AugmentedStream`], pass after pass, endlessly."""
        args, dataset = self.args, self.train_dataset
        if not (isinstance(dataset, AugmentedStream) or hasattr(dataset, "__len__")):
            loader = super().get_train_dataloader()
            getattr(loader, "base_dataloader", loader).worker_init_fn = leave_signals_to_main_process
            return loader
        batch_size = self._train_batch_size
        loader, self._batches = training_loader(dataset, args, batch_size, self.data_collator)
        non_blocking = self.accelerator.non_blocking
        # The batches are this process's already: accelerate sees just the one.
        return prepare_data_loader(
            loader, args.device, 1, 0, put_on_device=True, dispatch_batches=False, non_blocking=non_blocking
        )

    # Recipe

    def create_optimizer(self, model=None):
        """
        An optimizer of the groups of [`parameter_groups`]; parameters whose rate is 0 are frozen and not in it.

        Raises:
            ValueError: naming a parameter that no group covers.
        """
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
            for parameter in group["params"]:  # what a user or an adapter froze stays frozen
                parameter.requires_grad_(parameter.requires_grad and group["lr"] > 0)
            group["params"] = [parameter for parameter in group["params"] if parameter.requires_grad]
        trained = [group for group in groups if group["params"]]
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(args, self.model)
        self.optimizer = optimizer_class(trained, **options)
        self._log.rates = {group["name"]: 0.0 for group in groups}
        self._still = _frozen_batch_norms(model)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """The original's schedule over `num_training_steps`, [`poly_learning_rate`], or another that is asked for."""
        warmup_steps = self.args.get_warmup_steps(num_training_steps)
        if warmup_steps >= num_training_steps and self.is_world_process_zero():
            logger.warning(
                "The warm-up of %d steps does not end within the %d steps of this run, which hardly trains: lower "
                "`warmup_steps`.",
                warmup_steps,
                num_training_steps,
            )
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
        """
        The model's loss; in training, weighted so that its mean over the processes and batches of a step is the mean
        over all images of the step, however unevenly they are spread.
        """
        names, labels = inputs.pop("name", None), inputs.get("labels")  # a `compute_loss_func` takes the labels out
        if self.args.channels_last:
            inputs["pixel_values"] = inputs["pixel_values"].contiguous(memory_format=torch.channels_last)
        # Micro-batches share a pass through the text tower, unless it is spread or compiled.
        is_elsewhere = self.is_fsdp_enabled or self.is_deepspeed_enabled or self.args.torch_compile
        if model.training and not is_elsewhere:
            self.model.share_class_embeddings(until_next=not self.accelerator.sync_gradients)
        for batch_norm in self._still:
            batch_norm.eval()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            share = len(labels) / self._images_in_step()
            self._unchecked.append((loss.detach(), names))
            self._log.add(outputs, labels, share, self.model.config.semantic_loss_ignore_index)
            self._log.note_rates(self.optimizer.param_groups)
            # Undo the two divisions that follow: Trainer's by the accumulation steps, DDP's by the world size.
            loss = loss * (share * self.current_gradient_accumulation_steps * self.args.world_size)
        return (loss, outputs) if return_outputs else loss

    def _images_in_step(self) -> int:
        """Images, of all processes, in the step that runs."""
        if self._batches is not None:
            return self._batches.images_in_step(self.state.global_step)
        return self._train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps

    def _get_grad_norm(self, model, grad_norm=None):
        """The last moment before the optimizer steps: one look at the device checks the losses and the gradient."""
        norm = super()._get_grad_norm(model, grad_norm)
        checked, self._unchecked = self._unchecked, []
        values = [loss for loss, _ in checked]
        if norm is not None and self.accelerator.scaler is None:  # a scaler leaves out steps that overflow by itself
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            values.append(torch.as_tensor(whole, dtype=torch.float32, device=self.args.device))
        if values and not torch.stack(values).isfinite().all():
            self._refuse_step(checked, values[-1])
        return norm

    def _refuse_step(self, losses: list[tuple[torch.Tensor, Any]], norm: torch.Tensor) -> None:
        bad = [(loss, names) for loss, names in losses if not loss.isfinite()]
        what = f"the loss is {bad[0][0].item()}" if bad else f"the norm of the gradient is {norm.item()}"
        if not bad and self.args.world_size > 1:
            losses = []  # it may be another process's images
        files = [str(name) for _, names in bad or losses for name in names or ()]
        on = f" on {', '.join(files)}" if files else ""
        raise NonFiniteLossError(
            f"{what} at step {self.state.global_step}{on}: training stops before it reaches a weight; the checkpoints "
            f"in {self.args.output_dir} are from before. Lower `learning_rate` or look at these files."
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """[`Trainer.log`]; beside the loss, both its parts, accuracy, rates and speed, all of every process."""
        if "loss" in logs:
            logs |= self._log.next_line(self.accelerator)
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset=None):
        """[`Trainer.get_eval_dataloader`], whose last batch is never dropped."""
        with self._last_batch_kept():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        """[`Trainer.get_test_dataloader`] of prepared samples, whose last batch is never dropped."""
        if not _prepared(test_dataset):
            raise ValueError(
                "`predict` takes prepared samples (`pixel_values`, `labels`): measure images and masks with "
                "`evaluate`, or give images to transformers' pipeline."
            )
        with self._last_batch_kept():
            return super().get_test_dataloader(test_dataset)

    @contextmanager
    def _last_batch_kept(self) -> Iterator[None]:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    # Evaluation: every image once, at its own size, only a K x K matrix kept

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, Any]:
        """
        Scores on `eval_dataset`, or the trainer's own; every image is counted once, on however many processes.

        Args:
            eval_dataset (sequence or stream of `{"image", "mask"}`, *optional*): images and masks. Of a `dict`
                of such sets each is evaluated, its name after the prefix; `eval_mean_iou` is the mean of all
                `eval_NAME_mean_iou`. Prepared samples `{"pixel_values", "labels"}` are evaluated as `Trainer` does,
                with `compute_metrics` and `preprocess_logits_for_metrics`.
            ignore_keys (*optional*): outputs that `compute_metrics` does not get, for prepared samples.
            metric_key_prefix (`str`): what all keys begin with.

        Returns:
            `dict`: what [`evaluate_segmentation`] returns, the keys with `eval_` before them: `eval_mean_iou`, ….

        Raises:
            ValueError: if there is nothing to evaluate on.
        """
        start = time.perf_counter()
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if rows is None or _prepared(rows):
            return super().evaluate(rows, ignore_keys, metric_key_prefix)
        if isinstance(rows, dict) and rows:
            results = [self.evaluate(part, ignore_keys, f"{metric_key_prefix}_{name}") for name, part in rows.items()]
            scores = {key: value for result in results for key, value in result.items()}
            best = [scores[f"{metric_key_prefix}_{name}_mean_iou"] for name in rows]
            return scores | {f"{metric_key_prefix}_mean_iou": sum(best) / len(best)}
        scores = evaluate_segmentation(
            self.model,
            rows,
            self.image_processor,
            accelerator=self.accelerator,
            batch_size=self.args.per_device_eval_batch_size,
            num_workers=self.args.dataloader_num_workers,
            progress=not self.args.disable_tqdm,
            worker_init_fn=leave_signals_to_main_process,
        )
        names = self.model.config.id2label.values()
        scores |= {f"iou/{name}": iou for name, iou in zip(names, scores["per_category_iou"], strict=True)}
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in scores.items()}
        self.log({key: value for key, value in metrics.items() if isinstance(value, (int, float))})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._log.leave_out(time.perf_counter() - start)
        return metrics


def _prepared(rows: Any) -> bool:
    """Whether `rows` are samples as plain `Trainer` takes them, `{"pixel_values", "labels"}`."""
    if isinstance(rows, dict):
        return bool(rows) and all(_prepared(part) for part in rows.values())
    is_sequence = hasattr(rows, "__getitem__") and hasattr(rows, "__len__")
    return is_sequence and len(rows) > 0 and "pixel_values" in rows[0]


def _frozen_batch_norms(model: nn.Module) -> list[nn.Module]:
    """Batch norms of `model` none of whose parameters is trained, so that their statistics must not move either."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if not any(parameter.requires_grad for parameter in norm.parameters())]


__all__ = ["DenseCLIPTrainer", "NonFiniteLossError"]
