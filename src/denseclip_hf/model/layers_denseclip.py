"""Building blocks that the towers and the decoders share."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.clip.modeling_clip import eager_attention_forward


def is_transformed() -> bool:
    """Whether torch.func is at work, under which neither values can be looked at nor checkpoints be made."""
    return torch._C._functorch.peek_interpreter_stack() is not None


class ImageNorm(nn.GroupNorm):
    """Norm over all channels and places of an image, written out under torch.func, whose vmap refuses torch's own."""

    def __init__(self, channels: int, eps: float):
        super().__init__(1, channels, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not is_transformed():
            return super().forward(x)
        variance, mean = torch.var_mean(x, (1, 2, 3), correction=0, keepdim=True)
        return (x - mean) * (variance + self.eps).rsqrt() * self.weight[:, None, None] + self.bias[:, None, None]


def choose_hidden_states(
    hidden_states: tuple[torch.Tensor, ...] | None, choice: bool | int | list[int] | None
) -> tuple[torch.Tensor | None, ...] | None:
    """All of `hidden_states`, none, or those at the indices `choice` names, with `None` in place of the others."""
    if hidden_states is None or isinstance(choice, bool) or choice is None:
        return hidden_states if choice else None
    kept = {index % len(hidden_states) for index in ([choice] if isinstance(choice, int) else choice)}
    return tuple(state if index in kept else None for index, state in enumerate(hidden_states))


def resize_bilinear(x: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Resize `x` `(B, C, h, w)` to `size` (rows, columns), align_corners False; returned as it is if it fits."""
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def resize_position_grid(
    positions: torch.Tensor, size: tuple[int, int], mode: str = "bilinear", antialias: bool = False, first: int = 1
) -> torch.Tensor:
    """
    Resize learned positions `[global, grid]` to another grid, align_corners False.

    Args:
        positions (`torch.Tensor` of shape `(first + n * n, C)`): the global (or class) positions and a square grid's.
        size (`tuple[int, int]`): rows and columns of the wanted grid.
        mode (`str`): `"bilinear"`, or `"bicubic"`.
        antialias (`bool`): whether a smaller grid is smoothed first; bilinear only.
        first (`int`): positions before the grid's, which stay as they are.

    Returns:
        `torch.Tensor` of shape `(first + size[0] * size[1], C)`.
    """
    side = int((positions.shape[0] - first) ** 0.5 + 0.5)
    grid = positions[first:].unflatten(0, (side, side)).permute(2, 0, 1)[None]  # n*n, C -> 1, C, n, n
    if antialias:  # torch's own cannot be exported for any size
        rows, columns = (_triangle_weights(side, length, positions) for length in size)
        grid = (rows @ grid.float() @ columns.T).to(positions.dtype)
    else:
        grid = F.interpolate(grid, size=size, mode=mode, align_corners=False)
    return torch.cat([positions[:first], grid[0].flatten(1).T])  # 1, C, h, w -> first + h*w, C


def _triangle_weights(old: int, new: int, like: torch.Tensor) -> torch.Tensor:
    """`(new, old)` float32: what each new place takes of the old ones, bilinear and antialiased."""
    places = torch.arange(new, device=like.device) + 0.5
    step = old / (places[-1:] + 0.5)  # a tensor, which exported programs follow
    distance = torch.arange(old, device=like.device) + 0.5 - (places * step)[:, None]
    weights = (1 - distance.abs() / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(dim=1, keepdim=True)


class MultiHeadAttention(nn.Module):
    """
    Multi-head attention with separate query, key and value projections, through transformers' attention interface.

    Args:
        config (`PreTrainedConfig`): only its attention implementation is read, at run time.
        hidden_size (`int`): size of queries and of keys and values.
        num_heads (`int`): heads; must divide `hidden_size`.
        output_size (`int`, *optional*): size after the output projection, `hidden_size` by default.
        qkv_bias (`bool`): whether the first three projections have a bias.

    Raises:
        ValueError: if the heads do not divide the size.
    """

    is_causal = False

    def __init__(
        self, config, hidden_size: int, num_heads: int, output_size: int | None = None, qkv_bias: bool = True
    ):
        super().__init__()
        if hidden_size % num_heads:
            raise ValueError(f"{num_heads} attention heads do not divide the width {hidden_size}: choose a divisor.")
        self.config = config
        self.head_dim = hidden_size // num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.out_proj = nn.Linear(hidden_size, output_size or hidden_size)

    def forward(self, queries: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
        """`queries` `(B, Q, C)` attend to `memory` `(B, M, C)`; returns `(B, Q, output_size)`."""
        heads = [
            x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # B, L, C -> B, heads, L, head_dim
            for x in (self.q_proj(queries), self.k_proj(memory), self.v_proj(memory))
        ]
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        attended, _ = attention(self, *heads, None, scaling=self.head_dim**-0.5, dropout=0.0)
        return self.out_proj(attended.flatten(2))  # B, Q, heads, head_dim -> B, Q, output_size


class StochasticDepth:
    """Forward hook that drops a residual branch's output for whole samples in training (Huang et al. 2016)."""

    def __init__(self, rate: float):
        self.rate = rate

    def __call__(self, module: nn.Module, args, output):
        if not module.training or self.rate == 0.0:
            return output
        branch = output[0] if isinstance(output, tuple) else output
        keep = branch.new_empty(len(branch), *[1] * (branch.dim() - 1)).bernoulli_(1 - self.rate)
        branch = branch * (keep / (1 - self.rate))
        return (branch, *output[1:]) if isinstance(output, tuple) else branch


__all__ = [
    "ImageNorm",
    "MultiHeadAttention",
    "StochasticDepth",
    "choose_hidden_states",
    "is_transformed",
    "resize_bilinear",
    "resize_position_grid",
]
