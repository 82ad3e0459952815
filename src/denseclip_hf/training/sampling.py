"""Which images each process trains on, so that any number of processes takes the same steps."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from ..transforms import AugmentedStream
from .arguments import DenseCLIPTrainingArguments
from .stopping import leave_signals_to_main_process


class GlobalBatches(Sampler[list[int]]):
    """
    One process's batches of an epoch: positions in an order drawn from (seed, epoch) alone.

    Every `world * batch_size` positions are a global batch, which the processes share; `accumulation` global batches
    are an optimizer step. An incomplete last step is left out with `drop_last`. Otherwise its images are shared as
    evenly as they go, and only fewer than there are processes are left out, as every process must have one.

    Args:
        num_samples (`int`): size of the data set.
        batch_size (`int`): positions per process and batch.
        accumulation (`int`): batches per optimizer step.
        world (`int`), rank (`int`): number of processes, and which of them this is.
        seed (`int`): non-negative.
        drop_last (`bool`): leave out what does not fill a step.

    Raises:
        ValueError: if not a single step can be made.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        *,
        accumulation: int = 1,
        world: int = 1,
        rank: int = 0,
        seed: int = 0,
        drop_last: bool = True,
    ):
        self.num_samples, self.batch_size, self.world, self.rank = num_samples, batch_size, world, rank
        self.seed, self.epoch = seed, 0
        self.step_size = batch_size * world * accumulation
        left_out = num_samples % (self.step_size if drop_last else batch_size * world)
        self.used = num_samples - left_out if drop_last or left_out < world else num_samples
        if not self.used:
            needed, remedy = (self.step_size, " or set `dataloader_drop_last` to false") if drop_last else (world, "")
            raise ValueError(
                f"the training data has {num_samples} images and one step needs {needed} ({world} processes x batch "
                f"{batch_size} x {accumulation} accumulated): lower one of these{remedy}."
            )

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of epoch `epoch` (from 0) from the next iterator on."""
        self.epoch = epoch

    def images_in_step(self, step: int) -> int:
        """Images, of all processes, in optimizer step `step`, counted from 0 through all epochs."""
        steps_per_epoch = -(-self.used // self.step_size)
        return min(self.step_size, self.used - step % steps_per_epoch * self.step_size)

    def __len__(self) -> int:
        return -(-self.used // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_samples)[: self.used].tolist()
        size = self.batch_size * self.world
        for start in range(0, self.used, size):
            yield order[start : start + size][self.rank :: self.world]


def collate(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack `pixel_values` and `labels`; whatever else a sample has (its file name) stays a list."""
    batch: dict[str, Any] = {key: [sample[key] for sample in samples] for key in samples[0]}
    return {k: torch.stack(v) if k in ("pixel_values", "labels") else v for k, v in batch.items()}


def training_loader(
    dataset: Any, args: DenseCLIPTrainingArguments, batch_size: int, collate_fn: Callable = collate
) -> tuple[DataLoader, GlobalBatches | None]:
    """
    This process's batches of `dataset`, and how they are chosen; an [`AugmentedStream`] gives them without an end.

    Args:
        dataset ([`AugmentedStream`], or any with a length): augmented samples.
        args ([`DenseCLIPTrainingArguments`]): processes, seeds and options of the loader.
        batch_size (`int`): samples per process and batch.
        collate_fn (`Callable`): makes a batch of a list of samples.

    Raises:
        ValueError: if there are fewer samples than a step needs.
    """
    batches = None
    options: dict[str, Any] = {"batch_size": batch_size}
    if isinstance(dataset, AugmentedStream):
        dataset.share(args.world_size, args.process_index)
    else:
        batches = GlobalBatches(
            len(dataset),
            batch_size,
            accumulation=args.gradient_accumulation_steps,
            world=args.world_size,
            rank=args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            drop_last=args.dataloader_drop_last,
        )
        options = {"batch_sampler": batches}
    loader = DataLoader(
        dataset,
        collate_fn=collate_fn,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
        worker_init_fn=leave_signals_to_main_process,
        # Not torch's global generator: every new iterator draws a number, and a resumed run makes one more.
        generator=torch.Generator().manual_seed(args.seed + args.process_index),
        **options,
    )
    return loader, batches


__all__ = ["GlobalBatches", "collate", "training_loader"]
