"""Batch norms whose statistics are those of the whole batch when it is spread over several processes."""

import torch
from torch import distributed, nn
from torch.nn.modules.batchnorm import _BatchNorm


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
    """`nn.BatchNorm2d` over all processes by differentiable sums; torch's own `SyncBatchNorm` runs on CUDA only."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not distributed.is_initialized():
            return super().forward(x)
        count = x.new_full((1,), x.numel() / x.shape[1], dtype=torch.float32)
        values = x.float()
        total, number = _SumOverProcesses.apply(torch.cat([values.sum((0, 2, 3)), count])).split([x.shape[1], 1])
        mean = total / number
        # The deviations take a second exchange: beside a large mean, means of squares lose the digits of a variance.
        centred = values - mean[:, None, None]
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / number
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        assert self.momentum is not None
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * number / (number - 1), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return torch.addcmul(self.bias[:, None, None], centred, scale[:, None, None]).to(x.dtype)


def synchronise_batch_norms(model: nn.Module, device_type: str) -> None:
    """
    Make every `nn.BatchNorm2d` in `model` use the statistics of all processes, in place; keys stay the same.

    Args:
        model (`nn.Module`): with parameters and statistics that are kept.
        device_type (`str`): `"cuda"` takes torch's `SyncBatchNorm`, anything else plain sums.
    """
    for module in model.modules():
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                setattr(module, name, _synchronised(child, device_type))


def _synchronised(old: nn.BatchNorm2d, device_type: str) -> nn.Module:
    if device_type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(old)
    new = AllReduceBatchNorm2d(old.num_features, eps=old.eps, momentum=old.momentum)
    for name, value in [*old.named_parameters(), *old.named_buffers()]:  # themselves, which may be frozen
        setattr(new, name, value)
    return new.train(old.training)


def frozen_batch_norms(model: nn.Module) -> list[nn.Module]:
    """Batch norms of `model` none of whose parameters is trained, and whose statistics so must not move either."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return [norm for norm in norms if not any(parameter.requires_grad for parameter in norm.parameters())]


__all__ = ["AllReduceBatchNorm2d", "frozen_batch_norms", "synchronise_batch_norms"]
