"""`scripts/train.py` with a fault: `faulty_training.py FAULT ARGUMENTS ...`; test_faults.py starts it."""

import os
import resource
import signal
import sys
from pathlib import Path

from accelerate import state
from accelerate.utils import DistributedType
from torch import distributed
from torch.utils.data import get_worker_info

from denseclip_hf import training, transforms
from denseclip_hf.cli import train as command
from denseclip_hf.evaluation import loop as evaluation
from denseclip_hf.training import trainer
from helpers.batch_norm import synchronize_trainers_batch_norms


TRAIN = Path(__file__).parents[2] / "scripts" / "train.py"


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fill_disk():
    """From now on no file grows above a hundred bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))


def full_at_checkpoint():
    """No room for the checkpoint of step 4."""
    save_model = trainer.DenseCLIPTrainer.save_model

    def fail(self, *args, **kwargs):
        if self.state.global_step == 4:
            fill_disk()
        save_model(self, *args, **kwargs)

    trainer.DenseCLIPTrainer.save_model = fail


def full_at_end():
    """No room for the final model."""
    save_final_model = training.save_final_model

    def fail(trainer):
        fill_disk()
        save_final_model(trainer)

    training.save_final_model = fail


def in_checkpoint():
    """Killed between a checkpoint's files, at step 4."""
    save_rng_state = trainer.DenseCLIPTrainer._save_rng_state

    def fail(self, output_dir):
        if self.state.global_step == 4:
            die()
        save_rng_state(self, output_dir)

    trainer.DenseCLIPTrainer._save_rng_state = fail


def in_evaluation():
    """Killed when the first prediction is compared."""
    evaluation.resize_argmax = lambda *args: die()


def worker():
    """A data-loader worker is killed in the second epoch."""
    get = transforms.AugmentedDataset.__getitem__

    def fail(self, index):
        if get_worker_info() is not None and get_worker_info().id == 1 and self._epoch == 1:
            die()
        return get(self, index)

    transforms.AugmentedDataset.__getitem__ = fail


def none():
    """The batch norms of several processes work together, as on GPUs."""
    synchronize_trainers_batch_norms()


def fsdp():
    """No fault: accelerate shards on the CPU too, which it does on GPUs only, and gloo's means are means.

    Asked for a mean, `reduce_scatter_tensor` of torch 2.8 gives the sum on the CPU.
    """
    synchronize_trainers_batch_norms()
    scatter = distributed.reduce_scatter_tensor

    def mean(output, input, op=distributed.ReduceOp.SUM, group=None, **options):
        if op != distributed.ReduceOp.AVG:
            return scatter(output, input, op=op, group=group, **options)
        scatter(output, input, op=distributed.ReduceOp.SUM, group=group, **options)
        output.div_(distributed.get_world_size(group))

    distributed.reduce_scatter_tensor = mean
    start = state.PartialState.__init__

    def with_gpus(self, *args, **kwargs):
        start(self, *args, **kwargs)
        shared = state.PartialState._shared_state
        if shared["distributed_type"] == DistributedType.MULTI_CPU:
            shared["distributed_type"] = DistributedType.MULTI_GPU

    state.PartialState.__init__ = with_gpus


def rank():
    """The second process is killed in the middle of step 5, and leaves a file that tells when."""
    synchronize_trainers_batch_norms()
    compute_loss = trainer.DenseCLIPTrainer.compute_loss

    def fail(self, *args, **kwargs):
        if self.args.process_index == 1 and self.state.global_step == 5:
            Path(f"{self.args.output_dir}.killed").touch()
            die()
        return compute_loss(self, *args, **kwargs)

    trainer.DenseCLIPTrainer.compute_loss = fail


if __name__ == "__main__":
    globals()[sys.argv[1]]()
    sys.argv = [str(TRAIN), *sys.argv[2:]]
    command.main()
