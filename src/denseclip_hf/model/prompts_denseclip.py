"""Class names as prompts for CLIP's text tower: learnable contexts, packed so that no token is encoded twice.

CLIP's text tower is causal and is read at EOS, so all prompts share what comes before their first difference
(`[SOS] p_1 … p_N` and common first words), and nothing after EOS matters. Several classes therefore go through the
tower as one sequence: the shared prefix once, then each class's own tokens with positions restarted after the prefix
and a mask that hides the other classes.

Shapes: K classes, N contexts, G packed sequences of L tokens, C text width, D embedding size.
"""

import os
from typing import Any, NamedTuple

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
        width = config.clip_config.text_config.hidden_size
        self.context_vectors = None
        if config.num_context_tokens:
            self.context_vectors = nn.Parameter(torch.empty(config.num_context_tokens, width))
        self.set_token_ids(config.class_token_ids)

    def set_token_ids(self, class_token_ids: list[list[int]] | None) -> None:
        """Lay the prompts out anew, for `class_token_ids` (`None`: no class names are known yet)."""
        layout: tuple[Any, ...] = (None,) * 4
        if class_token_ids is not None:
            device = self.context_vectors.device if self.context_vectors is not None else None
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

    def attention_mask(self) -> torch.Tensor:
        """`(G, 1, L, L)` bool, `True` where a query (row) sees a key: its class or the prefix, never ahead."""
        same = self.owners[:, :, None] == self.owners[:, None, :]
        mask = (same | (self.owners == PREFIX)[:, None, :]).tril()
        return mask[:, None]

    def forward(self, clip: CLIPModel) -> torch.Tensor:
        """
        Class embeddings t `(K, D)`: the prompts through `clip`'s text tower, read at EOS and projected.

        Raises:
            ValueError: if there are no class names yet.
        """
        if self.token_ids is None:
            raise ValueError(
                "this model has no class names yet that its text tower could read: call "
                "`model.set_classes(names, tokenizer)`, or give `class_token_ids` in its config."
            )
        text = clip.text_model
        hidden = text.embeddings.token_embedding(self.token_ids)  # G, L, C
        if self.context_vectors is not None:
            contexts = self.context_vectors.to(hidden.dtype).expand(len(hidden), -1, -1)
            hidden = torch.cat([hidden[:, :1], contexts, hidden[:, 1 + contexts.shape[1] :]], dim=1)
        hidden = hidden + text.embeddings.position_embedding(self.position_ids)
        mask = self.attention_mask()
        if text.config._attn_implementation == "eager":  # adds its mask, where sdpa selects by it
            mask = torch.zeros_like(mask, dtype=hidden.dtype).masked_fill(~mask, torch.finfo(hidden.dtype).min)
        hidden = text.encoder(inputs_embeds=hidden, attention_mask=mask).last_hidden_state
        eos = hidden.flatten(0, 1)[self.eos_index]  # G, L, C -> K, C
        return clip.text_projection(text.final_layer_norm(eos))


def tokenize_classes(names: list[str], tokenizer, config: DenseCLIPConfig) -> list[list[int]]:
    """
    Token ids `[SOS, …, EOS]` of every class name (or sentence), put into `config.prompt_template`.

    Args:
        names (`list[str]`): K class names or descriptions.
        tokenizer (`PreTrainedTokenizerBase`): CLIP's.
        config ([`DenseCLIPConfig`]): template, SOS and EOS, and how many tokens fit.

    Raises:
        ValueError: for an empty or too long name, never a silently shortened one; for a tokenizer of another model.
    """
    token_ids = []
    for name in names:
        ids = tokenizer(config.prompt_template.replace("{}", name))["input_ids"]
        if not name.strip():
            raise ValueError("a class name is empty: every class needs a word the text encoder can read.")
        if (ids[0], ids[-1]) != config.special_token_ids:
            sos, eos = config.special_token_ids
            raise ValueError(
                f"this tokenizer is not the model's: its texts go from token {ids[0]} to {ids[-1]}, the model's from "
                f"SOS ({sos}) to EOS ({eos}). Give the tokenizer of the CLIP that the model was made from."
            )
        if len(ids) > config.max_class_tokens:
            raise ValueError(
                f"the class name {name!r} has {len(ids)} tokens with SOS and EOS, but {config.max_class_tokens} fit "
                f"beside {config.num_context_tokens} contexts: shorten it."
            )
        token_ids.append(list(ids))
    return token_ids


__all__ = ["ContextPrompts", "PackedPrompts", "pack_prompts", "tokenize_classes"]
