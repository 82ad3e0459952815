"""Class names through a text tower: learnable contexts, layouts of prompts, embeddings computed once.

A causal tower is read at EOS, so all prompts share what comes before their first difference (`[SOS] p_1 … p_N` and
common first words), and nothing after EOS matters. Several classes therefore go through it as one sequence: the shared
prefix once, then each class's own tokens with positions restarted after the prefix and a mask that hides the other
classes. In a tower that is not causal every token sees the whole prompt, so each prompt is a sequence of its own.

Shapes: K classes, N contexts, G packed sequences of L tokens, C text width, D embedding size.
"""

import os
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init

from .configuration_denseclip import DenseCLIPConfig
from .layers_denseclip import is_transformed


# Own tokens per packed sequence: the mask grows with the square, so thousands of classes are spread over sequences.
MAX_PACKED_TOKENS = 512
PREFIX, PADDING = -1, -2


class PackedPrompts(NamedTuple):
    """Layout of K prompts: `token_ids`, `position_ids` and `owners` are `(G, L)`, `last_index` `(K,)` is flat."""

    token_ids: torch.Tensor
    position_ids: torch.Tensor
    owners: torch.Tensor  # the class a token belongs to, PREFIX or PADDING
    last_index: torch.Tensor  # position of each prompt's last token

    def attention_mask(self, causal: bool) -> torch.Tensor:
        """`(G, 1, L, L)` bool, `True` where a query (row) sees a key: its class or the prefix, not ahead if causal."""
        seen = (self.owners[:, :, None] == self.owners[:, None, :]) | (self.owners == PREFIX)[:, None, :]
        return (seen.tril() if causal else seen)[:, None]

    def repeated(self, times: int) -> "PackedPrompts":
        """The same prompts `times` times over, as sequences of their own."""
        first = torch.arange(times, device=self.last_index.device)[:, None] * self.token_ids.numel()
        rows = (tensor.repeat(times, 1) for tensor in self[:3])
        return PackedPrompts(*rows, last_index=(first + self.last_index).flatten())


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
    rows, last_index = [], []
    length = len(prefix) + max(sum(len(class_token_ids[i]) - len(shared) for i in group) for group in groups)
    for row, group in enumerate(groups):
        tokens, positions, owners = list(prefix), list(range(len(prefix))), [PREFIX] * len(prefix)
        for index in group:
            own_tokens = class_token_ids[index][len(shared) :]
            tokens += own_tokens
            positions += range(len(prefix), len(prefix) + len(own_tokens))
            owners += [index] * len(own_tokens)
            last_index.append(row * length + len(tokens) - 1)
        fill = length - len(tokens)
        rows.append((tokens + tokens[:1] * fill, positions + [0] * fill, owners + [PADDING] * fill))
    token_ids, position_ids, owner_ids = (torch.tensor(column) for column in zip(*rows, strict=True))
    return PackedPrompts(token_ids, position_ids, owner_ids, torch.tensor(last_index))


def lay_out_rows(class_token_ids: list[list[int]], num_context_tokens: int) -> PackedPrompts:
    """
    Lay out K prompts `[p_1 … p_N, *name]`, each as a sequence of its own, padded to the longest.

    Args:
        class_token_ids (`list[list[int]]`): per class at least one id.
        num_context_tokens (`int`): N; the contexts' places hold zeros, to be overwritten.
    """
    lengths = [num_context_tokens + len(ids) for ids in class_token_ids]
    token_ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    owners = torch.full_like(token_ids, PADDING)
    for row, (ids, length) in enumerate(zip(class_token_ids, lengths, strict=True)):
        token_ids[row, num_context_tokens:length] = torch.tensor(ids)
        owners[row, :length] = row
    position_ids = torch.arange(max(lengths)).repeat(len(lengths), 1)
    last_index = torch.arange(len(lengths)) * max(lengths) + torch.tensor(lengths) - 1
    return PackedPrompts(token_ids, position_ids, owners, last_index)


class TextTower:
    """
    How a family's text tower reads prompts. This class reads as CLIP does: causal, from SOS to EOS, read at EOS.

    `text_parts` names the modules that only texts go through; `num_start_tokens` come before the contexts.
    """

    is_causal = True
    num_start_tokens = 1
    text_parts: tuple[str, ...] = ("text_model", "text_projection")

    @staticmethod
    def special_token_ids(text_config: PreTrainedConfig) -> tuple[int | None, int]:
        """Ids of SOS (`None` where only the tokenizer knows it) and EOS."""
        sos, eos = text_config.bos_token_id, text_config.eos_token_id
        # Configs of OpenAI's checkpoints on the Hub carry 0 and 2 from before transformers learned the real ones;
        # CLIP's vocabulary always ends with SOS, EOS.
        if eos == 2 or not isinstance(eos, int) or sos is None:
            return text_config.vocab_size - 2, text_config.vocab_size - 1
        return sos, eos

    @classmethod
    def check_token_ids(cls, ids: list[int], config: DenseCLIPConfig) -> None:
        """
        Raises:
            ValueError: if `ids`, of one class, are no prompt that this tower can read.
        """
        sos, eos = cls.special_token_ids(config.clip_config.text_config)
        if len(ids) < 2 or (sos is not None and ids[0] != sos) or ids[-1] != eos or eos in ids[:-1]:
            start = "" if sos is None else f" start with SOS ({sos}) and"
            raise ValueError(f"`class_token_ids` must each{start} end with their only EOS ({eos}), got {ids}.")

    @classmethod
    def tokenize(cls, text: str, tokenizer, config: DenseCLIPConfig, room: int) -> list[int]:
        """
        Token ids of one prompt, which has `room` positions beside the contexts.

        Raises:
            ValueError: for a tokenizer of another model.
        """
        ids = list(tokenizer(text)["input_ids"])
        sos, eos = cls.special_token_ids(config.clip_config.text_config)
        sos = tokenizer.bos_token_id if sos is None else sos
        if (ids[0], ids[-1]) != (sos, eos):
            raise ValueError(
                f"this tokenizer is not the model's: its texts go from token {ids[0]} to {ids[-1]}, the model's from "
                f"SOS ({sos}) to EOS ({eos}). Give the tokenizer of the CLIP that the model was made from."
            )
        return ids

    @staticmethod
    def lay_out(class_token_ids: list[list[int]], num_context_tokens: int) -> PackedPrompts:
        """The layout of K prompts with N contexts each."""
        return pack_prompts(class_token_ids, num_context_tokens)

    @staticmethod
    def embed_tokens(clip: PreTrainedModel, token_ids: torch.Tensor) -> torch.Tensor:
        """`(G, L)` -> `(G, L, C)`, without positions."""
        return clip.text_model.embeddings.token_embedding(token_ids)

    @staticmethod
    def read(clip: PreTrainedModel, hidden: torch.Tensor, layout: PackedPrompts) -> torch.Tensor:
        """The last layer's `(G, L, C)` -> class embeddings `(K, D)`."""
        last = hidden.flatten(0, 1)[layout.last_index]  # G, L, C -> K, C
        return clip.text_projection(clip.text_model.final_layer_norm(last))


class BidirectionalTextTower(TextTower):
    """Without SOS: contexts come first, every prompt is a sequence of its own. `has_eos`: whether EOS ends a text."""

    is_causal = False
    num_start_tokens = 0
    text_parts = ("text_model",)
    has_eos = False

    @classmethod
    def check_token_ids(cls, ids, config) -> None:
        """Any ids are a prompt."""

    @classmethod
    def tokenize(cls, text, tokenizer, config, room) -> list[int]:
        ids = cls.pad(text, tokenizer, room)
        has_eos = tokenizer.eos_token_id in ids
        too_large = max(ids, default=0) >= config.clip_config.text_config.vocab_size
        if ids[:1] == [tokenizer.bos_token_id] or has_eos != cls.has_eos or too_large:
            raise ValueError(
                f"this tokenizer is not the model's: it reads {text!r} as {ids}, the model reads texts without SOS "
                f"and {'with' if cls.has_eos else 'without'} EOS. Give the tokenizer of the image-text model."
            )
        return ids

    @staticmethod
    def pad(text: str, tokenizer, room: int) -> list[int]:
        """Token ids as the tower wants them."""
        return list(tokenizer(text)["input_ids"])

    @staticmethod
    def lay_out(class_token_ids, num_context_tokens) -> PackedPrompts:
        return lay_out_rows(class_token_ids, num_context_tokens)


class ContextPrompts(nn.Module):
    """
    The prompts of all classes and, with N > 0, their learnable contexts (CoOp: one set shared by all classes).

    Args:
        config ([`DenseCLIPConfig`]): `class_token_ids`, `num_context_tokens` and the text tower's sizes.
        tower (subclass of [`TextTower`]): what reads the prompts.
    """

    def __init__(self, config: DenseCLIPConfig, tower: type[TextTower]):
        super().__init__()
        self.config = config
        self.tower = tower
        self.context_vectors = None
        if config.num_context_tokens:
            width = config.clip_config.text_config.hidden_size
            self.context_vectors = nn.Parameter(torch.empty(config.num_context_tokens, width))
        self.set_token_ids(config.class_token_ids)

    def set_token_ids(self, class_token_ids: list[list[int]] | None) -> None:
        """Lay the prompts out again, for `class_token_ids` (`None`: no class names are known yet)."""
        layout: tuple[torch.Tensor | None, ...] = (None,) * 4
        if class_token_ids is not None:
            for ids in class_token_ids:
                self.tower.check_token_ids(ids, self.config)
            layout = self.tower.lay_out(class_token_ids, self.config.num_context_tokens)
        for name, tensor in zip(PackedPrompts._fields, layout, strict=True):
            self.register_buffer(name, tensor, persistent=False)

    def initialize(self) -> None:
        """Start values: contexts from a truncated normal; the layout again, which a meta-device load leaves unset."""
        if self.context_vectors is not None:
            std = float(self.config.context_init_std)
            init.trunc_normal_(self.context_vectors, std=std, a=-2 * std, b=2 * std)
        if self.config.class_token_ids is not None:
            layout = self.tower.lay_out(self.config.class_token_ids, self.config.num_context_tokens)
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
        layout = PackedPrompts(self.token_ids, self.position_ids, self.owners, self.last_index)
        if device.type == "meta":  # so are offloaded weights, until they are used
            return layout
        return PackedPrompts(*(tensor.to(device) for tensor in layout))

    def forward(self, token_embeds: torch.Tensor, contexts: torch.Tensor | None = None) -> torch.Tensor:
        """
        `token_embeds` `(G, L, C)` with the contexts in place of the N tokens after SOS, or of the first N; for B
        images' `contexts` `(B, N, C)`, of `token_embeds` `(B * G, L, C)`.
        """
        if self.context_vectors is None:
            return token_embeds
        contexts = self.context_vectors[None] if contexts is None else contexts
        each = token_embeds.shape[0] // contexts.shape[0]
        contexts = contexts.to(token_embeds.dtype)[:, None].expand(-1, each, -1, -1).flatten(0, 1)
        start = self.tower.num_start_tokens
        return torch.cat([token_embeds[:, :start], contexts, token_embeds[:, start + contexts.shape[1] :]], dim=1)


def encode_prompts(
    tower: type[TextTower],
    clip: PreTrainedModel,
    layout: PackedPrompts,
    prompts: ContextPrompts | None = None,
    contexts: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Embeddings `(K, D)` of prompts: through `clip`'s text tower, in the space that it shares with the images.

    With `contexts` of B images, all prompts go through it for each of them: `(B * K, D)`.

    Args:
        tower (subclass of [`TextTower`]): of `clip`'s family.
        clip (`PreTrainedModel`): with its text tower.
        layout ([`PackedPrompts`]): on the tower's device.
        prompts ([`ContextPrompts`], *optional*): puts its contexts into the places that `layout` leaves for them.
        contexts (`torch.Tensor` of shape `(B, N, C)`, *optional*): in place of those that `prompts` has learned.
    """
    text = clip.text_model
    if contexts is not None:
        layout = layout.repeated(contexts.shape[0])  # len() is fixed by torch.export
    hidden = tower.embed_tokens(clip, layout.token_ids)  # G, L, C
    if prompts is not None:
        hidden = prompts(hidden, contexts)
    hidden = hidden + text.embeddings.position_embedding(layout.position_ids).to(hidden.dtype)
    mask = layout.attention_mask(tower.is_causal)
    if text.config._attn_implementation == "eager":  # adds its mask, where sdpa selects by it
        mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
    hidden = text.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
    return tower.read(clip, hidden, layout)


class ClassEmbeddingCache:
    """
    Class embeddings t `(K, D)`, computed once where that is safe.

    In eval mode they are kept for as long as the tensors that they came from are the same and unchanged, if they came
    from plain modules and parameters alone: never with hooks, adapters or quantized weights, nor in a compiled or
    traced graph. An edit through `.data` leaves no trace; `model.train().eval()` computes them again after one.

    In training they are computed for every forward pass or, if `share_until_next` announces another one before the
    optimizer's step, once for all of them.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget what is kept."""
        self.value: torch.Tensor | None = None
        self.origin: tuple | None = None
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
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or is_transformed():
            return compute()
        if training:
            return self._for_step(compute) if torch.is_grad_enabled() else compute()
        tensors = [t for part in parts for t in chain(part.parameters(), part.buffers())]
        wants_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if wants_gradient or not all(_is_plain(module) for part in parts for module in part.modules()):
            return compute()
        if any(type(t) not in (nn.Parameter, torch.Tensor) or t.is_inference() for t in tensors):
            return compute()
        origin = tuple((id(t), t.data_ptr(), t._version, t.dtype) for t in tensors)
        if origin != self.origin:
            # Neither a caller's inference mode (its tensors cannot meet autograd later) nor its autocast may get in.
            device = next((t.device.type for t in tensors if not t.is_meta), "cpu")
            with torch.inference_mode(False), torch.no_grad(), torch.autocast(device, enabled=False):
                self.value, self.origin = compute(), origin
        assert self.value is not None
        return self.value.clone()  # callers may normalize it in place

    def _for_step(self, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """t with its graph; earlier passes of a step get a stand-in that collects their gradients for the last."""
        if self.shared is None:
            self.shared = compute()
        if self.share_until_next:
            if self.stand_in is None:
                self.stand_in = self.shared.detach().requires_grad_()
            return self.stand_in
        value, collected = self.shared, None if self.stand_in is None else self.stand_in.grad
        self.shared = self.stand_in = None
        if collected is not None and value.requires_grad:
            value.register_hook(lambda gradient: gradient + collected)
        return value


def _is_plain(module: nn.Module) -> bool:
    """Whether what `module` computes depends on its tensors alone."""
    known = isinstance(module, ContextPrompts) or type(module).__module__.startswith(("torch.nn.", "transformers."))
    hooked = module._forward_hooks or module._forward_pre_hooks
    replaced = "forward" in vars(module) and not hasattr(module, "_hf_hook")  # accelerate's only moves tensors
    return known and not (module.training or hooked or replaced)


def tokenize_classes(
    names: list[str],
    tokenizer,
    tower: type[TextTower],
    config: DenseCLIPConfig,
    template: str | None = None,
    num_context_tokens: int | None = None,
) -> list[list[int]]:
    """
    Token ids of every class name (or sentence), put into a template: `[SOS, …, EOS]` for CLIP.

    Args:
        names (`list[str]`): K class names or descriptions.
        tokenizer (`PreTrainedTokenizerBase`): CLIP's.
        tower (subclass of [`TextTower`]): what reads the prompts.
        config ([`DenseCLIPConfig`]): the text tower's sizes.
        template (`str`, *optional*): with one `{}` for the name; the config's by default.
        num_context_tokens (`int`, *optional*): contexts that need room; the config's by default.

    Raises:
        ValueError: for a too long name, never a silently shortened one; for a tokenizer of another model or none, and
            for a template without `{}`.
    """
    if tokenizer is None:
        raise ValueError("words need the tokenizer of the image-text model, beside the model or as `tokenizer=`.")
    template = config.prompt_template if template is None else template
    if template.count("{}") != 1:
        raise ValueError(f"a prompt's template must contain {{}} once, got {template!r}.")
    contexts = config.num_context_tokens if num_context_tokens is None else num_context_tokens
    room = config.clip_config.text_config.max_position_embeddings - contexts
    token_ids = []
    for name in names:
        ids = tower.tokenize(template.replace("{}", name), tokenizer, config, room)
        if len(ids) > room:
            raise ValueError(
                f"the class name {name!r} has {len(ids)} tokens with SOS and EOS, but {room} fit beside {contexts} "
                "contexts: shorten it."
            )
        token_ids.append(ids)
    return token_ids


__all__ = [
    "BidirectionalTextTower",
    "ClassEmbeddingCache",
    "ContextPrompts",
    "PackedPrompts",
    "TextTower",
    "encode_prompts",
    "pack_prompts",
    "tokenize_classes",
]
