"""Pictures of different sizes in one batch, each with the result it has alone.

Shapes: B images, K classes, D embedding size, H x W pixels, h x w the grid of a map.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch


class LonePicture(torch.Tensor):
    """
    One picture's `pixel_values` `(1, 3, H, W)`, which `torch.cat` joins with those of other sizes as a list.

    A pipeline with `batch_size > 1` preprocesses each picture alone and concatenates the results, which fails where
    they differ in size; padding them would change the predictions. As a list the model takes them. Everything else
    is as with any tensor, and gives plain tensors.
    """

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.cat:
            tensors, dim = _of_cat(*args, **kwargs)
            if dim == 0 and len({tensor.shape[1:] for tensor in tensors}) > 1:
                return [tensor.as_subclass(torch.Tensor) for tensor in tensors]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return result.as_subclass(cls) if func is torch.Tensor.to else result

    def __deepcopy__(self, memo: dict[int, Any]) -> "LonePicture":
        return self.as_subclass(torch.Tensor).clone().as_subclass(LonePicture)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)  # a saved file needs no class of ours


def _of_cat(tensors: Sequence[torch.Tensor], dim: int = 0, **_: Any) -> tuple[Sequence[torch.Tensor], int]:
    return tensors, dim


def forward_by_size(forward: Callable[[torch.Tensor], Any], pictures: Sequence[torch.Tensor]) -> dict[str, list]:
    """
    Run `forward` on pictures of any sizes, those of one size together.

    Args:
        forward (`Callable`): maps `pixel_values` `(n, 3, H, W)` to a model output.
        pictures (sequence of tensors `(3, H, W)` or `(1, 3, H, W)`): B pictures.

    Returns:
        `dict` with the output's `logits`, `score_maps` and `text_embeds`, as far as it has them: lists of B tensors
        `(K, h, w)`, `(K, h, w)` and `(K, D)`, in the order of the pictures.

    Raises:
        ValueError: for no picture, or one of another shape.
    """
    if not pictures or any(p.dim() not in (3, 4) or (p.dim() == 4 and len(p) != 1) for p in pictures):
        shapes = [tuple(picture.shape) for picture in pictures]
        raise ValueError(f"a list of `pixel_values` must hold pictures of shape (3, height, width), got {shapes}.")
    by_size: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        by_size.setdefault(tuple(picture.shape[-2:]), []).append(index)
    results: dict[str, list] = {}
    for indices in by_size.values():
        outputs = forward(torch.stack([pictures[i].reshape(pictures[i].shape[-3:]) for i in indices]))
        for name in ("logits", "score_maps", "text_embeds"):
            if outputs.get(name) is not None:
                places = results.setdefault(name, [None] * len(pictures))
                for row, index in enumerate(indices):
                    places[index] = outputs[name][row]
    return results


__all__ = ["LonePicture", "forward_by_size"]
