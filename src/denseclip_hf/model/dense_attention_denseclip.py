"""
Patch embeddings of an untrained CLIP ViT that know where things are: other ways for its last block to attend.

Shape letters: B images, h x w patches in rows and columns, n = h * w, C the tower's width, D the text space, H heads.
"""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class LastBlock:
    """How the last block attends.

    Args:
        weights (`tuple[str, ...]`): maps that are summed: `"qk"`, `"qq"`, `"kk"`; none: each token keeps its value.
        bare (`bool`): drop the block's residual and MLP.
        neighbors (`bool`): add a Gaussian of the distance on the grid to the attention's logits.
    """

    weights: tuple[str, ...] = ()
    bare: bool = False
    neighbors: bool = False


LAST_BLOCKS = {
    "plain": LastBlock(("qk",)),
    "plain_bare": LastBlock(("qk",), bare=True),
    "maskclip": LastBlock(),
    "maskclip_bare": LastBlock(bare=True),
    "sclip": LastBlock(("qq", "kk")),
    "sclip_bare": LastBlock(("qq", "kk"), bare=True),
    "qq_full": LastBlock(("qq",)),
    "clearclip": LastBlock(("qq",), bare=True),
    "kk": LastBlock(("kk",), bare=True),
    "kk_full": LastBlock(("kk",)),
    "naclip": LastBlock(("kk",), bare=True, neighbors=True),
    "naclip_full": LastBlock(("kk",), neighbors=True),
}


def word_positions(table: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """
    The position table `(1 + N * N, C)` for a grid (h, w), resized bicubically as the published numbers were measured.

    The authors resize by the factor (h + 0.1) / N, not to the size h: new positions lie slightly closer together. A
    grid with as many patches as the table takes the table unchanged.

    Returns:
        `torch.Tensor` of shape `(1 + h * w, C)`.
    """
    count = len(table) - 1
    if grid[0] * grid[1] == count:
        return table
    side = int(count**0.5 + 0.5)
    positions = table[1:].float().unflatten(0, (side, side))  # N*N, C -> N, N, C
    positions = _resize_rows(positions, grid[0])  # h, N, C
    positions = _resize_rows(positions.transpose(0, 1), grid[1]).transpose(0, 1)  # h, w, C
    return torch.cat([table[:1], positions.flatten(0, 1).to(table.dtype)])


def _resize_rows(x: torch.Tensor, rows: int) -> torch.Tensor:
    """The first axis of `x` (N, ...) sampled bicubically (a = -0.75) at `rows` places, borders repeated."""
    old = len(x)
    places = (torch.arange(rows, device=x.device, dtype=x.dtype) + 0.5) * (old / (rows + 0.1)) - 0.5
    first = places.floor()
    t = places - first
    a = -0.75

    def near(d: torch.Tensor) -> torch.Tensor:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: torch.Tensor) -> torch.Tensor:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    weights = [far(t + 1), near(t), near(1 - t), far(2 - t)]
    total = torch.zeros_like(x[:1])
    for offset, weight in zip((-1, 0, 1, 2), weights, strict=True):
        index = (first.long() + offset).clamp(0, old - 1)
        total = total + x[index] * weight[:, None, None]
    return total


def neighbor_gaussian(
    grid: tuple[int, int], std: float, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """exp(-distance² / (2 std²)) between patches, `(1 + n, 1 + n)`; 0 in the class token's row and column."""
    rows, columns = (torch.arange(side, device=device, dtype=torch.float32) for side in grid)
    along_rows = (rows[:, None] - rows) ** 2
    along_columns = (columns[:, None] - columns) ** 2
    squared = (along_rows[:, None, :, None] + along_columns[None, :, None, :]).flatten(2).flatten(0, 1)
    return F.pad(torch.exp(-squared / (2 * std**2)), (1, 0, 1, 0)).to(dtype or torch.float32)


def last_block(
    layer: nn.Module, x: torch.Tensor, grid: tuple[int, int], how: LastBlock, neighbor_std: float = 5.0
) -> torch.Tensor:
    """The last block's output `(B, 1 + n, C)` for the tokens `x` before it, attending as `how` says."""
    q, k, v = _heads(layer.self_attn, layer.layer_norm1(x))
    bias = neighbor_gaussian(grid, neighbor_std, x.device, x.dtype) if how.neighbors else None
    attended = sum((w @ v for w in attention_maps(q, k, how, bias)), start=torch.zeros_like(v)) if how.weights else v
    out = layer.self_attn.out_proj(_merge(attended))
    if how.bare:
        return out
    x = x + out
    return x + layer.mlp(layer.layer_norm2(x))


def attention_maps(
    q: torch.Tensor, k: torch.Tensor, how: LastBlock, bias: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """The attention weights `(B, H, tokens, tokens)` that `how` sums; each row of each adds up to 1."""
    parts = {"q": q, "k": k}
    return [_weights(parts[pair[0]], parts[pair[1]], bias) for pair in how.weights]


def _weights(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    logits = a * a.shape[-1] ** -0.5 @ b.transpose(-1, -2)
    return (logits if bias is None else logits + bias).softmax(-1)


def _heads(attention: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Queries, keys and values of `x` (B, tokens, C), each `(B, H, tokens, C / H)`."""
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [p(x).unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for p in projections]


def _merge(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).flatten(2)  # B, H, tokens, C / H -> B, tokens, C


@dataclass(frozen=True)
class OutlierRepair:
    """How SFP repairs a ViT's outlier tokens.

    Args:
        factor (`float`): a patch is suspect if the class token attends `factor` times more to it than it does itself.
        count (`int`): most outliers of an image.
        floor (`float`): smaller cosines between patches count as none.
        class_share (`float`): how much of the class token is added to every patch.
        sharpness (`float`): of the attention among patches that resemble each other.
    """

    factor: float = 1.5
    count: int = 10
    floor: float = 0.4
    class_share: float = 0.3
    sharpness: float = 3.0


def repaired_features(
    layers: nn.ModuleList, states: list[torch.Tensor], grid: tuple[int, int], how: OutlierRepair = OutlierRepair()
) -> torch.Tensor:
    """
    Patch tokens `(B, n, C)` before the final norm, after SFP: outliers of the last block but one become the mean of
    their neighbors, and similar patches are averaged. Blocks are those of a 12-block tower, in proportion for others.

    Args:
        layers (`nn.ModuleList`): the tower's blocks.
        states (list of tensors `(B, 1 + n, C)`): what goes into each block.
        grid (`tuple[int, int]`): (h, w).
        how ([`OutlierRepair`]): its constants.
    """
    depth, early = len(layers), len(layers) // 3
    x, last = states[-1], layers[-1]
    outliers = find_outliers(*patch_attention(layers[-2], states[-2]), how)
    similar = similarity(purify(states[depth - 3][:, 1:], outliers, grid), how.floor)
    smooth = unit_rows(similarity(states[early][:, 1:], how.floor))
    patches = unit_rows(similar) @ purify(x[:, 1:], outliers, grid)
    total = torch.stack(states[early : depth - 1]).sum(0)
    spread = spread_weights(similar, how.sharpness)
    main = repaired_attention(last, patches, spread) + how.class_share * x[:, :1]
    second = spread_values(last, total[:, 1:], spread) + how.class_share * total[:, :1]
    return smooth @ main + smooth @ second


def repaired_attention(layer: nn.Module, patches: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """The last block's attention among patches `(B, n, C)` alone: the mean of k-k, q-q and [`spread_weights`]."""
    q, k, v = _heads(layer.self_attn, layer.layer_norm1(patches))
    weights = (_weights(k, k) + _weights(q, q) + spread[:, None]) / 3
    return layer.self_attn.out_proj(_merge(weights @ v))


def spread_values(layer: nn.Module, patches: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """The last block's values of patches `(B, n, C)`, averaged by [`spread_weights`]."""
    v = _heads(layer.self_attn, layer.layer_norm1(patches))[2]
    return layer.self_attn.out_proj(_merge(spread[:, None] @ v))


def patch_attention(layer: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How strongly the class token, and each patch itself, attends to each patch: two `(B, n)`, means of the heads."""
    q, k, _ = _heads(layer.self_attn, layer.layer_norm1(x))
    weights = _weights(q, k).mean(1)
    return weights[:, 0, 1:], weights.diagonal(dim1=1, dim2=2)[:, 1:]


def find_outliers(
    cls_attention: torch.Tensor, self_attention: torch.Tensor, how: OutlierRepair = OutlierRepair()
) -> torch.Tensor:
    """Outliers `(B, n)` bool: patches that the class token attends to most, and more than they do themselves."""
    suspects = how.factor * cls_attention > self_attention
    ranked = cls_attention.masked_fill(~suspects, -1)
    chosen = ranked.topk(min(how.count, ranked.shape[1]), dim=1).indices
    return torch.zeros_like(suspects).scatter(1, chosen, True) & suspects


def purify(patches: torch.Tensor, outliers: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Patches `(B, n, C)`, outliers replaced by the mean of their 8 neighbors that are none; 0 without such."""
    good = (~outliers)[..., None].to(patches.dtype)
    maps = torch.cat([patches * good, good], 2).transpose(1, 2).unflatten(2, grid)  # B, C + 1, h, w
    sums = F.avg_pool2d(maps, 3, stride=1, padding=1, divisor_override=1).flatten(2).transpose(1, 2)
    return torch.where(outliers[..., None], sums[..., :-1] / sums[..., -1:].clamp(min=1), patches)


def similarity(patches: torch.Tensor, floor: float = OutlierRepair.floor) -> torch.Tensor:
    """Cosines between patches `(B, n, n)`, small ones set to 0; a patch that is 0 resembles none."""
    unit = F.normalize(patches, dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    return cosines.masked_fill(cosines < floor, 0)


def spread_weights(similar: torch.Tensor, sharpness: float = OutlierRepair.sharpness) -> torch.Tensor:
    """Softmax over the patches that resemble each more than is usual in its image, `(B, n, n)`."""
    logits = sharpness * (similar - similar.mean((1, 2), keepdim=True))
    # a patch always counts itself, else one that resembles none would have nothing to average
    itself = torch.eye(logits.shape[-1], dtype=torch.bool, device=logits.device)
    return logits.masked_fill((logits < 0) & ~itself, -torch.inf).softmax(-1)


def unit_rows(matrix: torch.Tensor) -> torch.Tensor:
    """`matrix` with rows that add up to 1, or to 0 where nothing is in them."""
    return matrix / (matrix.sum(-1, keepdim=True) + 1e-6)


__all__ = ["LAST_BLOCKS", "LastBlock", "OutlierRepair", "last_block", "repaired_features", "word_positions"]
