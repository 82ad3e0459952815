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

    In training t is computed anew for every forward pass, or, if `share_until_next` tells of a next one before the
    optimizer's step, once for all of them.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget the kept embeddings."""
        self.value: torch.Tensor | None = None
        self.key: tuple | None = None
        self.contexts: torch.Tensor | None = None
        self.share_until_next = False
        self.shared: torch.Tensor | None = None
        self.shared_key: tuple | None = None
        self.stand_in: torch.Tensor | None = None

    def get(self, prompts: ContextPrompts, clip: CLIPModel, training: bool) -> torch.Tensor:
        """t `(K, D)` of `prompts` through `clip`'s text tower, with the gradient that the caller may ask for."""
        sources = list(chain(prompts.parameters(), clip.text_model.parameters(), clip.text_projection.parameters()))
        trainable = [p for p in sources if p.requires_grad] if torch.is_grad_enabled() else []
        if trainable and torch.compiler.is_compiling():
            return prompts(clip)
        if trainable and training:
            return self._for_step(prompts, clip, sources)
        if torch.compiler.is_compiling():  # versions can't be read in a graph; `clear` guards it there
            return prompts(clip) if self.value is None else self.value
        self._refresh(prompts, clip, sources)
        if trainable:
            return _GradientOnDemand.apply(self.value, lambda: prompts(clip), *trainable)
        return self.value

    def _for_step(self, prompts: ContextPrompts, clip: CLIPModel, sources: list[torch.Tensor]) -> torch.Tensor:
        """t with its graph; earlier passes of the step get a stand-in that collects their gradients for the last."""
        if not self.share_until_next and self.shared is None:
            return prompts(clip)
        key = _layout_and_fingerprints(prompts, sources)
        if self.shared is None:
            self.shared, self.shared_key = prompts(clip), key
        elif self.shared_key != key:
            raise RuntimeError(
                "weights of the text encoder or the contexts changed while gradients were accumulated: call "
                "`share_class_embeddings(False)` before the last forward pass before each optimizer step."
            )
        if self.share_until_next:
            if self.stand_in is None:
                self.stand_in = self.shared.detach().requires_grad_()
            return self.stand_in
        value, collected = self.shared, self.stand_in
        self.shared = self.shared_key = self.stand_in = None
        if collected is not None and collected.grad is not None:
            collected_gradient = collected.grad
            value.register_hook(lambda gradient: gradient + collected_gradient)
        return value

    def _refresh(self, prompts: ContextPrompts, clip: CLIPModel, sources: list[torch.Tensor]) -> None:
        key = _layout_and_fingerprints(prompts, sources)
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


def _layout_and_fingerprints(prompts: ContextPrompts, sources: list[torch.Tensor]) -> tuple:
    return (prompts.eos_index is not None and id(prompts.eos_index), *map(_fingerprint, sources))


def _fingerprint(tensor: torch.Tensor) -> tuple:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device


__all__ = ["ClassEmbeddingCache"]
