"""Class embeddings that are computed once and can not be stale."""

from itertools import chain

import torch
from transformers import CLIPModel

from .prompts_denseclip import ContextPrompts


class _GradientOnDemand(torch.autograd.Function):
    """Hands out a kept value; only if a backward pass comes is it computed again, with its graph."""

    @staticmethod
    def forward(ctx, value, compute, *parameters):
        ctx.compute, ctx.parameters = compute, parameters
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        with torch.enable_grad():
            value = ctx.compute()
            gradients = torch.autograd.grad(value, ctx.parameters, gradient, allow_unused=True)
        return (None, None, *gradients)


class ClassEmbeddingCache:
    """
    Keeps t `(K, D)` for as long as the tensors it was computed from are the same and unchanged.

    Every use compares identity, version, type and device of those tensors (and the contexts' values on the CPU, where
    that costs nothing and `.data` edits leave no other trace). The model also clears it when it is trained, cast,
    moved or loaded.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget the kept embeddings."""
        self.value: torch.Tensor | None = None
        self.key: tuple | None = None
        self.contexts: torch.Tensor | None = None

    def get(self, prompts: ContextPrompts, clip: CLIPModel, training: bool) -> torch.Tensor:
        """t `(K, D)` of `prompts` through `clip`'s text tower, with the gradient that the caller may ask for."""
        sources = list(chain(prompts.parameters(), clip.text_model.parameters(), clip.text_projection.parameters()))
        trainable = [p for p in sources if p.requires_grad] if torch.is_grad_enabled() else []
        if trainable and (training or torch.compiler.is_compiling()):
            return prompts(clip)
        if torch.compiler.is_compiling():  # versions can't be read in a graph; `clear` guards it there
            return prompts(clip) if self.value is None else self.value
        self._refresh(prompts, clip, sources)
        if trainable:
            return _GradientOnDemand.apply(self.value, lambda: prompts(clip), *trainable)
        return self.value

    def _refresh(self, prompts: ContextPrompts, clip: CLIPModel, sources: list[torch.Tensor]) -> None:
        key = (prompts.eos_index is not None and id(prompts.eos_index), *map(_fingerprint, sources))
        contexts = prompts.context_vectors
        if contexts is not None and contexts.device.type != "cpu":
            contexts = None
        unchanged = contexts is None or (self.contexts is not None and torch.equal(contexts, self.contexts))
        if self.value is not None and key == self.key and unchanged:
            return
        # Neither a caller's inference mode (its tensors can't meet autograd later) nor its autocast may get in.
        device = clip.text_projection.weight.device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            self.value = prompts(clip)
        self.key = key
        self.contexts = None if contexts is None else contexts.detach().clone()


def _fingerprint(tensor: torch.Tensor) -> tuple:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device


__all__ = ["ClassEmbeddingCache"]
