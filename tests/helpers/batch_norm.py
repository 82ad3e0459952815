"""Batch norms over several processes of the CPU, where torch has no SyncBatchNorm."""

import torch
from torch import distributed, nn

from denseclip_hf.training.trainer import DenseCLIPTrainer


class _SumOverProcesses(torch.autograd.Function):
    """All-reduce whose gradient is all-reduced too."""

    @staticmethod
    def forward(ctx, values):
        values = values.clone()
        distributed.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        distributed.all_reduce(gradient)
        return gradient


class AllReduceBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x):
        if not self.training or not distributed.is_initialized():
            return super().forward(x)
        count = x.new_full((1,), x.numel() / x.shape[1])
        total, number = _SumOverProcesses.apply(torch.cat([x.sum((0, 2, 3)), count])).split([x.shape[1], 1])
        mean = total / number
        # The deviations take a second exchange: beside a large mean, means of squares lose the digits of a variance.
        centered = x - mean[:, None, None]
        variance = _SumOverProcesses.apply(centered.square().sum((0, 2, 3))) / number
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * number / (number - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias[:, None, None], centered, scale[:, None, None])


def synchronize_trainers_batch_norms():
    """From now on, trainers on the CPU do what they do on GPUs."""
    start = DenseCLIPTrainer.__init__

    def synchronized(self, model, *args, **kwargs):
        for module in model.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = AllReduceBatchNorm2d
        start(self, model, *args, **kwargs)

    DenseCLIPTrainer.__init__ = synchronized
