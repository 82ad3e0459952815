"""Class names through CLIP's text tower: learnable contexts, packed prompts, embeddings computed once.

CLIP's text tower is causal and is read at EOS, so all prompts share what comes before their first difference
(`[SOS] p_1 … p_N` and common first words), and nothing after EOS matters. Several classes therefore go through the
tower as one sequence: the shared prefix once, then each class's own tokens with positions restarted after the prefix
and a mask that hides the other classes.

Shapes: K classes, N contexts, G packed sequences of L tokens, C text width, D embedding size.
"""

import os
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn
from transformers import CLIPModel
from transformers import initialization as init

from .configuration_denseclip import DenseCLIPConfig


# Own tokens per packed sequence: the mask grows with the square, so thousands of classes are spread over sequences.
MAX_PACKED_TOKENS = 512
PREFIX, PADDING = -1, -2


class PackedPrompts(NamedTuple):
    """Layout of K prompts: `token_ids`, `position_ids` and `owners` are `(G, L)`, `eos_index` `(K,)` is flat."""

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    owners: torch.Tensor  # the class a token belongs to, PREFIX or PADDING
    eos_index: torch.Tensor

    def attention_mask(self) -> torch.Tensor:
        """`(G, 1, L, L)` bool, `True` where a query (row) sees a key: its class or the prefix, never ahead."""
        same = self.owners[:, :, None] == self.owners[:, None, :]
        return (same | (self.owners == PREFIX)[:, None, :]).tril()[:, None]


def pack_prompts(
    class_token_ids: list[list[int]], num_context_tokens: int, max_tokens: int = MAX_PACKED_TOKENS
) -> PackedPrompts:
    """
    Lay out K prompts `[SOS, p_1 … p_N, *name, EOS]` as packed sequences.

    Args:
        class_token_ids (`list[list[int]]`): per class `[SOS, …, EOS]`.
        num_context_tokens (`int`): N; the contexts' places hold SOS ids, to be overwritten.
        max_tokens (`int`): most own tokens of a sequence (a single longer class still gets one).
    """
    shared = os.path.commonprefix(class_token_ids)[: min(map(len, class_token_ids)) - 1]
    prefix = [shared[0]] * num_context_tokens + list(shared)
    groups: list[list[int]] = [[]]
    room = max_tokens
    for index, ids in enumerate(class_token_ids):
        own = len(ids) - len(shared)
        if groups[-1] and own > room:
            groups.append([])
            room = max_tokens
        groups[-1].append(index)
        room -= own
    rows, eos_index = [], []
    length = len(prefix) + max(sum(len(class_token_ids[i]) - len(shared) for i in group) for group in groups)
    for row, group in enumerate(groups):
        tokens, positions, owners = list(prefix), list(range(len(prefix))), [PREFIX] * len(prefix)
        for index in group:
            own_tokens = class_token_ids[index][len(shared) :]
            tokens += own_tokens
            positions += range(len(prefix), len(prefix) + len(own_tokens))
            owners += [index] * len(own_tokens)
            eos_index.append(row * length + len(tokens) - 1)
        fill = length - len(tokens)
        rows.append((tokens + tokens[:1] * fill, positions + [0] * fill, owners + [PADDING] * fill))
    token_ids, position_ids, owner_ids = (torch.tensor(column) for column in zip(*rows, strict=True))
    return PackedPrompts(token_ids, position_ids, owner_ids, torch.tensor(eos_index))


class ContextPrompts(nn.Module):
    """
    The prompts of all classes and, with N > 0, their learnable contexts (CoOp: one set shared by all classes).

    Args:
        config ([`DenseCLIPConfig`]): `class_token_ids`, `num_context_tokens` and the text tower's sizes.
    """

    def __init__(self, config: DenseCLIPConfig):
        super().__init__()
        self.config = config
        self.context_vectors = None
        if config.num_context_tokens:
            width = config.clip_config.text_config.hidden_size
            self.context_vectors = nn.Parameter(torch.empty(config.num_context_tokens, width))
        self.set_token_ids(config.class_token_ids)

    def set_token_ids(self, class_token_ids: list[list[int]] | None) -> None:
        """Lay the prompts out anew, for `class_token_ids` (`None`: no class names are known yet)."""
        layout: tuple[torch.Tensor | None, ...] = (None,) * 4
        if class_token_ids is not None:
            device = None if self.context_vectors is None else self.context_vectors.device
            layout = tuple(t.to(device) for t in pack_prompts(class_token_ids, self.config.num_context_tokens))
        for name, tensor in zip(PackedPrompts._fields, layout, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def initialize(self) -> None:
        """Start values: contexts from a truncated normal; the layout again, which a meta-device load leaves unset."""
        if self.context_vectors is not None:
            std = float(self.config.context_init_std)
            init.trunc_normal_(self.context_vectors, std=std, a=-2 * std, b=2 * std)
        if self.config.class_token_ids is not None:
            layout = pack_prompts(self.config.class_token_ids, self.config.num_context_tokens)
            for name, tensor in layout._asdict().items():
                init.copy_(getattr(self, name), tensor)

    def layout(self, device: torch.device) -> PackedPrompts:
        """
        The prompts of the model's own classes, for a text tower on `device`.

        Raises:
            ValueError: if there are no class names yet.
        """
        if self.token_ids is None:
            raise ValueError(
                "this model has no class names yet that its text tower could read: call "
                "`model.set_classes(names, tokenizer)`, or give `class_token_ids` in its config."
            )
        if self.token_ids.is_meta and device.type != "meta":  # a program has filled in the saved weights only
            layout = pack_prompts(self.config.class_token_ids, self.config.num_context_tokens)
            return PackedPrompts(*(tensor.to(device) for tensor in layout))
        return PackedPrompts(self.token_ids, self.position_ids, self.owners, self.eos_index)

    def forward(self, token_embeds: torch.Tensor) -> torch.Tensor:
        """`token_embeds` `(G, L, C)` with the contexts in place of the N tokens after SOS."""
        if self.context_vectors is None:
            return token_embeds
        contexts = self.context_vectors.to(token_embeds.dtype).expand(len(token_embeds), -1, -1)
        return torch.cat([token_embeds[:, :1], contexts, token_embeds[:, 1 + contexts.shape[1] :]], dim=1)


def encode_prompts(clip: CLIPModel, layout: PackedPrompts, prompts: ContextPrompts | None = None) -> torch.Tensor:
    """
    Embeddings `(K, D)` of packed prompts: through `clip`'s text tower, read at EOS and projected.

    Args:
        clip (`CLIPModel`): with its text tower.
        layout ([`PackedPrompts`]): on the tower's device.
        prompts ([`ContextPrompts`], *optional*): puts its contexts into the places that `layout` leaves for them.
    """
    text = clip.text_model
    hidden = text.embeddings.token_embedding(layout.token_ids)  # G, L, C
    if prompts is not None:
        hidden = prompts(hidden)
    hidden = hidden + text.embeddings.position_embedding(layout.position_ids)
    mask = layout.attention_mask()
    if text.config._attn_implementation == "eager":  # adds its mask, where sdpa selects by it
        mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    hidden = text.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
    eos = hidden.flatten(0, 1)[layout.eos_index]  # G, L, C -> K, C
    return clip.text_projection(text.final_layer_norm(eos))


class ClassEmbeddingCache:
    """
    Class embeddings t `(K, D)`, computed once where that is safe.

    In eval mode without gradient they are kept for as long as the tensors they came from are the same and unchanged.
    That tells all only of plain modules: nothing is kept where the text side has hooks, adapters, replaced methods or
    weights of another kind than `nn.Parameter`, nor inside a compiled or traced graph. An edit through `.data` leaves
    no trace; `model.train().eval()` makes the embeddings anew after one.

    In training they are computed for every forward pass or, if `share_until_next` announces another one before the
    optimizer's step, once for all of them.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget what is kept."""
        self.value: torch.Tensor | None = None
        self.key: tuple | None = None
        self.share_until_next = False
        self.shared: torch.Tensor | None = None
        self.stand_in: torch.Tensor | None = None

    def get(self, compute: Callable[[], torch.Tensor], parts: list[nn.Module], training: bool) -> torch.Tensor:
        """
        t `(K, D)`, a tensor of the caller's own.

        Args:
            compute (`Callable`): gives t, with its graph where gradients are enabled.
            parts (`list[nn.Module]`): all that `compute` runs.
            training (`bool`): whether the model is in training mode.
        """
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return compute()
        modules = [module for part in parts for module in part.modules()]
        tensors = [t for part in parts for t in chain(part.parameters(), part.buffers())]
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
            return self._for_step(compute) if training else compute()
        if training or not all(map(_is_plain, modules)) or not all(map(_has_version, tensors)):
            return compute()
        key = tuple((id(t), t.data_ptr(), t._version, t.dtype, t.device) for t in tensors)
        if self.value is None or key != self.key:
            # Neither a caller's inference mode (its tensors cannot meet autograd later) nor its autocast may get in.
            device = next((t.device.type for t in tensors if not t.is_meta), "cpu")
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                self.value, self.key = compute(), key
        return self.value.clone()  # callers may normalize it in place

    def _for_step(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """t with its graph; earlier passes of a step get a stand-in that collects their gradients for the last."""
        if self.shared is None:
            self.shared = compute()
        if self.share_until_next:
            if self.stand_in is None:
                self.stand_in = self.shared.detach().requires_grad_()
            return self.stand_in
        value, collected = self.shared, self.stand_in
        self.shared = self.stand_in = None
        if collected is not None and collected.grad is not None:
            collected_gradient = collected.grad
            value.register_hook(lambda gradient: gradient + collected_gradient)
        return value


def _is_plain(module: nn.Module) -> bool:
    """Whether what `module` computes depends on its tensors alone."""
    known = isinstance(module, ContextPrompts) or type(module).__module__.startswith(("torch.nn.", "transformers."))
    hooked = module._forward_hooks or module._forward_pre_hooks
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")  # accelerate's only moves tensors
    return known and not module.training and not hooked and not replaced


def _has_version(tensor: torch.Tensor) -> bool:
    return type(tensor) in (nn.Parameter, torch.Tensor) and not tensor.is_inference()


def tokenize_classes(
    names: list[str],
    tokenizer,
    config: DenseCLIPConfig,
    template: str | None = None,
    num_context_tokens: int | None = None,
) -> list[list[int]]:
    """
    Token ids `[SOS, …, EOS]` of every class name (or sentence), put into a template.

    Args:
        names (`list[str]`): K class names or descriptions.
        tokenizer (`PreTrainedTokenizerBase`): CLIP's.
        config ([`DenseCLIPConfig`]): SOS and EOS, and how many positions there are.
        template (`str`, *optional*): with one `{}` for the name; the config's by default.
        num_context_tokens (`int`, *optional*): contexts that need room; the config's by default.

    Raises:
        ValueError: for a too long name, never a silently shortened one; for a tokenizer of another model.
    """
    template = config.prompt_template if template is None else template
    contexts = config.num_context_tokens if num_context_tokens is None else num_context_tokens
    room = config.clip_config.text_config.max_position_embeddings - contexts
    token_ids = []
    for name in names:
        ids = tokenizer(template.replace("{}", name))["input_ids"]
        if (ids[0], ids[-1]) != config.special_token_ids:
            sos, eos = config.special_token_ids
            raise ValueError(
                f"this tokenizer is not the model's: its texts go from token {ids[0]} to {ids[-1]}, the model's from "
                f"SOS ({sos}) to EOS ({eos}). Give the tokenizer of the CLIP that the model was made from."
            )
        if len(ids) > room:
            raise ValueError(
                f"the class name {name!r} has {len(ids)} tokens with SOS and EOS, but {room} fit beside {contexts} "
                "contexts: shorten it."
            )
        token_ids.append(list(ids))
    return token_ids


__all__ = [
    "ClassEmbeddingCache",
    "ContextPrompts",
    "PackedPrompts",
    "encode_prompts",
    "pack_prompts",
    "tokenize_classes",
]
