"""Cross entropy at the labels' resolution without ever holding the logits at that resolution.

Shapes: B images, K classes, h x w the logits' grid, H x W the labels' pixels.
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .configuration_denseclip import DenseCLIPConfig
from .fpn_denseclip import resize_bilinear


# Resized logits that exist at a time (16 MiB of float32).
_STRIP_ELEMENTS = 2**22


def checked_labels(labels: torch.Tensor, batch_size: int, config: DenseCLIPConfig) -> torch.Tensor:
    """
    `labels` as int64, once they fit the images and the classes.

    Args:
        labels (`torch.Tensor`): what should be integers of shape `(batch_size, H, W)`.
        batch_size (`int`): number of images.
        config ([`DenseCLIPConfig`]): K classes, and the label that is ignored.

    Raises:
        ValueError: for another shape or type, an ignored label that is a class, or, on a CPU, one that is none.
    """
    ignore_index, num_labels = config.semantic_loss_ignore_index, config.num_labels
    if labels.dim() != 3 or len(labels) != batch_size or labels.is_floating_point():
        raise ValueError(
            f"`labels` must hold one integer map per image, shape ({batch_size}, height, width), got {labels.dtype} "
            f"of shape {tuple(labels.shape)}."
        )
    if 0 <= ignore_index < num_labels:
        raise ValueError(
            f"`semantic_loss_ignore_index` ({ignore_index}) is one of the {num_labels} classes, which would not be "
            "learnt: set it to a value that is none, such as -100, and mark pixels without a label with that."
        )
    labels = labels.long()
    # On an accelerator this would make the host wait; there the data set's own check has to catch it.
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        known = labels[labels != ignore_index]
        if known.numel() and (known.min() < 0 or known.max() >= num_labels):
            raise ValueError(
                f"`labels` has values from {known.min()} to {known.max()}, but the model's classes are "
                f"0 … {num_labels - 1} and {ignore_index} is ignored: check the masks, or whether they need "
                "`do_reduce_labels`."
            )
    return labels


def pixel_cross_entropy(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """
    Cross entropy of `logits` resized bilinearly to `labels`, in float32, averaged over all B*H*W pixels.

    Ignored pixels count as zero, as in the original: a padded image weighs less and one without labels gives 0. The
    gradient is computed together with the loss, strip by strip, so that memory does not grow with K*H*W. (A compiler
    fuses these steps by itself and gets the plain formula.)

    Args:
        logits (`torch.Tensor` of shape `(B, K, h, w)`): class scores.
        labels (`torch.Tensor` of shape `(B, H, W)`): int64 class ids or `ignore_index`.
        ignore_index (`int`): label of pixels that don't count.

    Returns:
        `torch.Tensor` of shape `()`, float32.
    """
    if torch.compiler.is_compiling():
        return _summed(resize_bilinear(logits, labels.shape[-2:]).float(), labels, ignore_index) / labels.numel()
    return _StripCrossEntropy.apply(logits, labels, ignore_index) / labels.numel()


class _StripCrossEntropy(torch.autograd.Function):
    """Sum of the pixels' cross entropies; what it keeps for the backward pass is of the logits' own size."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
        batch_size, classes, rows, _ = logits.shape
        height, width = labels.shape[-2:]
        # Where one row of logits makes a whole number of label rows, a strip needs just one more row on either side.
        scale = height / rows
        step = rows
        if height % rows == 0:
            step = max(1, int(_STRIP_ELEMENTS / (batch_size * classes * width * scale)))
        total = torch.zeros((), device=logits.device)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(logits, dtype=torch.float32) if needs_gradient else None
        with torch.autocast(logits.device.type, enabled=False):
            for top in range(0, rows, step):
                bottom = min(top + step, rows)
                first, last = max(top - 1, 0), min(bottom + 1, rows)
                above, below, count = (round(n * scale) for n in (top - first, bottom - first, last - first))
                wanted = labels[:, round(top * scale) : round(bottom * scale)]
                with torch.set_grad_enabled(needs_gradient):
                    part = logits[:, :, first:last].detach().float().requires_grad_(needs_gradient)
                    resized = resize_bilinear(part, (count, width))[:, :, above:below]
                    loss = _summed(resized, wanted, ignore_index)
                total += loss.detach()
                if gradient is not None:
                    gradient[:, :, first:last] += torch.autograd.grad(loss, part)[0]
        ctx.save_for_backward(None if gradient is None else gradient.to(logits.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * upstream[0].to(gradient.dtype), None, None


def _summed(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int) -> torch.Tensor:
    return F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="sum")


__all__ = ["checked_labels", "pixel_cross_entropy"]
