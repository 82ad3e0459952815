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

    Every use compares identity, version, type and device of those tensors. The model also clears it when it is
    trained, cast, moved or loaded. Edits through `.data` leave none of these traces: on a CPU, where it costs next to
    nothing, the contexts and a few values of every other tensor are compared too, so that edits of whole tensors (a
    moving average put in place) are noticed. After such an edit elsewhere, or any edit of text weights between two
    calls of a compiled model in eval mode, `model.train().eval()` makes the embeddings anew.

    In training t is computed anew for every forward pass, or, if `share_until_next` tells of a next one before the
    optimizer's step, once for all of them.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget the kept embeddings."""
        self.value: torch.Tensor | None = None
        self.key: tuple | None = None
        self.sample: list[torch.Tensor] | None = None
        self.share_until_next = False
        self.shared: torch.Tensor | None = None
        self.shared_key: tuple | None = None
        self.stand_in: torch.Tensor | None = None

    def get(self, prompts: ContextPrompts, clip: CLIPModel, training: bool) -> torch.Tensor:
        """t `(K, D)` of `prompts` through `clip`'s text tower, with the gradient that the caller may ask for."""
        sources = list(chain(prompts.parameters(), clip.text_model.parameters(), clip.text_projection.parameters()))
        trainable = [p for p in sources if p.requires_grad] if torch.is_grad_enabled() else []
        if trainable and torch.compiler.is_compiling():
            return prompts(clip=clip)
        if trainable and training:
            return self._for_step(prompts, clip, sources)
        if torch.compiler.is_compiling():  # versions can't be read in a graph; `clear` guards it there
            return prompts(clip=clip) if self.value is None else self.value.clone()
        self._refresh(prompts, clip, sources)
        if trainable:
            return _GradientOnDemand.apply(self.value, lambda: prompts(clip=clip), *trainable)
        return self.value.clone()  # callers may normalise it in place

    def _for_step(self, prompts: ContextPrompts, clip: CLIPModel, sources: list[torch.Tensor]) -> torch.Tensor:
        """t with its graph; earlier passes of the step get a stand-in that collects their gradients for the last."""
        if not self.share_until_next and self.shared is None:
            return prompts(clip=clip)
        key = _layout_and_fingerprints(prompts, sources)
        if self.shared is None:
            self.shared, self.shared_key = prompts(clip=clip), key
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
        key, sample = _layout_and_fingerprints(prompts, sources), _sample(prompts, sources)
        if self.value is not None and key == self.key and _equal(sample, self.sample):
            return
        # Neither a caller's inference mode (its tensors can't meet autograd later) nor its autocast may get in.
        placed = (tensor for tensor in chain(prompts.buffers(), sources) if not tensor.is_meta)  # others: offloaded
        device = next(placed, torch.empty(0)).device.type
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
            self.value = prompts(clip=clip)
        self.key, self.sample = key, sample


def _layout_and_fingerprints(prompts: ContextPrompts, sources: list[torch.Tensor]) -> tuple:
    return tuple(map(_fingerprint, [*prompts.buffers(), *sources]))


def _fingerprint(tensor: torch.Tensor) -> tuple:
    version = 0 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.dtype, tensor.device


@torch.no_grad()
def _sample(prompts: ContextPrompts, sources: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """The contexts and, of every other source, a few values; `None` where reading them would make others wait."""
    if any(source.device.type != "cpu" or hasattr(source, "placements") for source in sources):
        return None  # on an accelerator, or spread over processes (DTensor)
    step = {id(source): max(1, source.numel() // 8) for source in sources}
    if prompts.context_vectors is not None:
        step[id(prompts.context_vectors)] = 1
    return [source.detach().reshape(-1)[:: step[id(source)]].clone() for source in sources]


def _equal(sample: list[torch.Tensor] | None, other: list[torch.Tensor] | None) -> bool:
    if sample is None or other is None:
        return sample is other
    return len(sample) == len(other) and all(map(torch.equal, sample, other))


__all__ = ["ClassEmbeddingCache"]
