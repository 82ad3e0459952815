"""Which pictures each process trains on, so that any number of processes and workers takes the same steps."""

from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler


class GlobalBatches(Sampler[list[int]]):
    """
    One process's batches of an epoch: positions in an order drawn from (seed, epoch) alone.

    Every `world * batch_size` positions are a global batch, which the processes share; `accumulation` global batches
    are an optimizer step. An incomplete last step is left out with `drop_last`. Otherwise its pictures are shared as
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
            wanted = f"there are {world} processes"
            remedy = ""
            if drop_last:
                parts = f"{world} processes x batch {batch_size} x {accumulation} accumulated"
                wanted = f"one step needs {self.step_size} ({parts})"
                remedy = ", or set `dataloader_drop_last` to false" if num_samples >= world else ""
            raise ValueError(
                f"the training data has {num_samples} pictures but {wanted}, so nothing would be trained: lower the "
                f"batch, the accumulation or the number of processes{remedy}."
            )

    def set_epoch(self, epoch: int) -> None:
        """Draw the order of epoch `epoch` (from 0) from the next iterator on."""
        self.epoch = epoch

    def pictures_in_step(self, step: int) -> int:
        """Pictures, of all processes, in optimizer step `step`, counted from 0 through all epochs."""
        steps_per_epoch = -(-self.used // self.step_size)
        return min(self.step_size, self.used - step % steps_per_epoch * self.step_size)

    def __len__(self) -> int:
        return -(-self.used // (self.batch_size * self.world))

    def __iter__(self) -> Iterator[list[int]]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.num_samples)[: self.used].tolist()
        size = self.batch_size * self.world
        for start in range(0, self.used, size):
            yield order[start : start + size][self.rank :: self.world]


__all__ = ["GlobalBatches"]
