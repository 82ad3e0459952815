"""A decoder that knows no classes: every class's score map goes through the same weights (CAT-Seg, Cho et al. 2024).

Shapes: B images, T classes, P templates, D embedding size, H x W the grid of the image tower, C hidden size, G size of
a guidance. Score maps are (B, T, H, W, C), channels last, outside of convolutions.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer


# What a class that the selection leaves out has in place of a logit: a probability of zero.
LEFT_OUT = -100.0


class Linear(nn.Linear):
    """A linear layer that starts as PyTorch starts one, not as CLIP's and the context decoder's do."""


class WindowAttention(nn.Module):
    """Attention within windows of one class's map; queries and keys also see the image's guidance."""

    def __init__(self, hidden_size: int, guidance_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = Linear(hidden_size + guidance_size, hidden_size)
        self.k_proj = Linear(hidden_size + guidance_size, hidden_size)
        self.v_proj = Linear(hidden_size, hidden_size)
        self.out_proj = Linear(hidden_size, hidden_size)

    def forward(self, states: torch.Tensor, guidance: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """`(N, windows, places, C)`, `(N, windows, places, G)`, `(windows, places, places)` -> as `states`."""
        count, windows, places, _ = states.shape
        guided = torch.cat([states, guidance], dim=-1)

        def heads(projected: torch.Tensor) -> torch.Tensor:
            # N, windows, places, C -> N, windows * heads, places, C / heads
            split = projected.view(count, windows, places, self.num_heads, -1).transpose(2, 3)
            return split.flatten(1, 2)

        if mask is not None:
            mask = mask.to(states.dtype).repeat_interleave(self.num_heads, dim=0)
        attended = F.scaled_dot_product_attention(
            heads(self.q_proj(guided)), heads(self.k_proj(guided)), heads(self.v_proj(states)), attn_mask=mask
        )
        attended = attended.view(count, windows, self.num_heads, places, -1).transpose(2, 3)
        return self.out_proj(attended.flatten(3))


class SpatialBlock(nn.Module):
    """A Swin block without position bias over one class's map, its windows shifted by half their side or not."""

    def __init__(self, hidden_size: int, guidance_size: int, num_heads: int, window_size: int, shifted: bool):
        super().__init__()
        self.window_size = window_size
        self.shifted = shifted
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attention = WindowAttention(hidden_size, guidance_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(Linear(hidden_size, 4 * hidden_size), nn.GELU(), Linear(4 * hidden_size, hidden_size))

    def forward(self, states: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """`(N, H, W, C)` and `(N, H, W, G)` -> `(N, H, W, C)`."""
        height, width = states.shape[1:3]
        window = min(self.window_size, height, width)
        # Where one window spans the shorter side there is nothing to shift into.
        shift = window // 2 if self.shifted and window < min(height, width) else 0
        mask = shifted_window_mask(height, width, window, shift, states.device) if shift else None

        def windows(maps: torch.Tensor) -> torch.Tensor:
            return split_windows(maps.roll((-shift, -shift), dims=(1, 2)) if shift else maps, window)

        attended = join_windows(self.attention(windows(self.norm1(states)), windows(guidance), mask), height, width)
        states = states + (attended.roll((shift, shift), dims=(1, 2)) if shift else attended)
        return states + self.mlp(self.norm2(states))


def split_windows(maps: torch.Tensor, window: int) -> torch.Tensor:
    """`(N, H, W, C)` -> `(N, windows, window * window, C)`, in row-major order."""
    count, height, width, channels = maps.shape
    if height % window or width % window:
        raise ValueError(
            f"a grid of {height} x {width} places cannot be cut into windows of {window}: choose another "
            "`tower_image_size`, or another `window_size` in the config's `aggregator`."
        )
    maps = maps.reshape(count, height // window, window, width // window, window, channels)
    return maps.transpose(2, 3).reshape(count, -1, window * window, channels)


def join_windows(windows: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of [`split_windows`]."""
    count, _, places, channels = windows.shape
    side = int(places**0.5)
    maps = windows.reshape(count, height // side, width // side, side, side, channels)
    return maps.transpose(2, 3).reshape(count, height, width, channels)


def shifted_window_mask(height: int, width: int, window: int, shift: int, device: torch.device) -> torch.Tensor:
    """`(windows, places, places)`: -100 between places that only rolling the map made neighbors, otherwise 0."""

    def regions(side: int) -> torch.Tensor:
        place = torch.arange(side, device=device)
        return (place >= side - window).long() + (place >= side - shift).long()

    region = 3 * regions(height)[:, None] + regions(width)
    region = split_windows(region[None, :, :, None], window)[0, :, :, 0]
    return (region[:, :, None] != region[:, None, :]).float() * -100.0


class ClassAttention(nn.Module):
    """Linear attention among the classes of one place: its cost grows with their number, not with its square."""

    def __init__(self, hidden_size: int, guidance_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = Linear(hidden_size + guidance_size, hidden_size)
        self.k_proj = Linear(hidden_size + guidance_size, hidden_size)
        self.v_proj = Linear(hidden_size, hidden_size)

    def forward(self, states: torch.Tensor, guidance: torch.Tensor, repeats: int = 0) -> torch.Tensor:
        """
        `(N, S, C)` and `(N, S, G)` -> `(N, S, C)`.

        With `repeats`, the last of the S rows stands for that many equal ones: as a key it counts so often.
        """
        guided = torch.cat([states, guidance], dim=-1)
        # N, S, C -> N, S, heads, C / heads
        query, key, value = (
            projected.unflatten(-1, (self.num_heads, -1))
            for projected in (self.q_proj(guided), self.k_proj(guided), self.v_proj(states))
        )
        query, key = F.elu(query) + 1, F.elu(key) + 1
        if repeats:
            counts = torch.ones_like(key[0, :, :1, :1])
            counts[-1] = repeats
            counted = key * counts
        else:
            counted = key
        mixed = torch.einsum("nshd,nshe->nhde", counted, value)
        norm = torch.einsum("nshd,nhd->nsh", query, counted.sum(dim=1)) + 1e-6
        return (torch.einsum("nshd,nhde->nshe", query, mixed) / norm[..., None]).flatten(2)


class ClassBlock(nn.Module):
    """
    Attention among classes, at every place of a pooled map, guided by their text embeddings.

    A model trained with `max_classes` rows sees as many whatever is asked for: learned padding fills up to them. The
    padding rows are equal, so one of them is computed and counted as often as needed.
    """

    def __init__(self, hidden_size: int, guidance_size: int, num_heads: int, max_classes: int):
        super().__init__()
        self.max_classes = max_classes
        if max_classes:
            self.padding_token = nn.Parameter(torch.zeros(hidden_size))
            self.padding_guidance = nn.Parameter(torch.zeros(guidance_size))
        self.norm1 = nn.LayerNorm(hidden_size)
        self.attention = ClassAttention(hidden_size, guidance_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size)
        self.mlp = nn.Sequential(Linear(hidden_size, 4 * hidden_size), nn.ReLU(), Linear(4 * hidden_size, hidden_size))

    def forward(self, states: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        """`(N, T, C)` and `(N, T, G)` -> `(N, T, C)`."""
        count, classes, _ = states.shape
        padding = max(self.max_classes - classes, 0)
        if padding:
            states = torch.cat([states, self.padding_token.to(states.dtype).expand(count, 1, -1)], dim=1)
            guidance = torch.cat([guidance, self.padding_guidance.to(guidance.dtype).expand(count, 1, -1)], dim=1)
        states = states + self.attention(self.norm1(states), guidance, repeats=padding)
        states = states[:, :classes]
        return states + self.mlp(self.norm2(states))


class CostAggregationLayer(GradientCheckpointingLayer):
    """Two spatial blocks for each class by itself, then attention among classes."""

    def __init__(
        self,
        hidden_size: int,
        image_guidance_size: int,
        text_guidance_size: int,
        num_heads: int,
        window_size: int,
        max_classes: int,
    ):
        super().__init__()
        self.guidance_norm = nn.LayerNorm(image_guidance_size)
        self.spatial_block1 = SpatialBlock(hidden_size, image_guidance_size, num_heads, window_size, shifted=False)
        self.spatial_block2 = SpatialBlock(hidden_size, image_guidance_size, num_heads, window_size, shifted=True)
        self.class_block = ClassBlock(hidden_size, text_guidance_size, num_heads, max_classes)

    def forward(
        self,
        states: torch.Tensor,
        image_guidance: torch.Tensor,
        text_guidance: torch.Tensor,
        pooling: tuple[int, int],
        chunk: int,
    ) -> torch.Tensor:
        """`(B, T, H, W, C)`, `(B, H, W, G)` and `(B, T, G)` -> `(B, T, H, W, C)`."""
        guidance = self.guidance_norm(image_guidance)
        states = in_parts(lambda part: self._within_classes(part, guidance), states, chunk)
        return states + self._among_classes(states, text_guidance, pooling, chunk)

    def _within_classes(self, states: torch.Tensor, guidance: torch.Tensor) -> torch.Tensor:
        batch, classes = states.shape[:2]
        states = states.flatten(0, 1)  # B, T, H, W, C -> B * T, H, W, C
        guidance = repeated(guidance, classes)
        states = self.spatial_block2(self.spatial_block1(states, guidance), guidance)
        return states.unflatten(0, (batch, classes))

    def _among_classes(
        self, states: torch.Tensor, guidance: torch.Tensor, pooling: tuple[int, int], chunk: int
    ) -> torch.Tensor:
        batch, classes, height, width, _ = states.shape
        pooled = states.flatten(0, 1).permute(0, 3, 1, 2)  # B, T, H, W, C -> B * T, C, H, W
        if pooling != (1, 1):
            pooled = F.avg_pool2d(pooled, pooling)
        small = pooled.shape[-2:]
        # B * T, C, h, w -> B, h * w, T, C: one sequence of classes for each place
        sequences = pooled.flatten(2).unflatten(0, (batch, classes)).permute(0, 3, 1, 2)

        def attend(part: torch.Tensor) -> torch.Tensor:
            places = part.shape[1]
            attended = self.class_block(part.flatten(0, 1), repeated(guidance, places))
            return attended.unflatten(0, (batch, places))

        # As many places at a time as make a chunk of whole maps.
        attended = in_parts(attend, sequences, max(chunk * height * width // classes, 1))
        maps = attended.permute(0, 2, 3, 1).flatten(0, 1).unflatten(-1, small)  # -> B * T, C, h, w
        if small != (height, width):
            maps = F.interpolate(maps, size=(height, width), mode="bilinear", align_corners=True)
        return maps.permute(0, 2, 3, 1).unflatten(0, (batch, classes))


class UpsamplingBlock(nn.Module):
    """Twice the resolution: transposed convolution, a skip beside it, two convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int):
        super().__init__()
        groups = max(out_channels // 16, 1)
        self.upsample = nn.ConvTranspose2d(in_channels, in_channels - skip_channels, kernel_size=2, stride=2)
        self.conv1 = nn.Conv2d(in_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(groups, out_channels)

    def forward(self, maps: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        """`(N, C, h, w)` and `(N, C', 2h, 2w)` -> `(N, C'', 2h, 2w)`."""
        maps = self.upsample(maps)
        maps = F.relu(self.norm1(self.conv1(torch.cat([maps, skip], dim=1))))
        return F.relu(self.norm2(self.conv2(maps)))


class CostAggregationHead(nn.Module):
    """
    From the cosines of places and class names to logits, one channel for each class that is asked for.

    Args:
        embedding_size (`int`): D, of dense features and text embeddings.
        skip_size (`int`): width of the image tower's blocks that guide the upsampling.
        max_classes (`int`): with fewer classes, learned padding takes their places in the attention among classes;
            of more, those with the highest cosine anywhere in the image are kept and the others' logits are -100.
            0 does neither.
        pooling_size, inference_pooling_size (`int`): pooling of the maps before the attention among classes, which
            has no weights for it, in training and in eval mode.
        chunk_size (`int`): class maps that are computed at a time where no gradient is asked for. Bounds memory; the
            result is the same.
        num_templates (`int`): P, sentences per class.
    """

    def __init__(
        self,
        embedding_size: int,
        skip_size: int,
        hidden_size: int = 128,
        num_layers: int = 2,
        num_heads: int = 4,
        window_size: int = 12,
        max_classes: int = 256,
        pooling_size: int | Sequence[int] = 2,
        inference_pooling_size: int | Sequence[int] = 1,
        image_guidance_size: int = 128,
        text_guidance_size: int = 128,
        skip_sizes: Sequence[int] = (256, 128),
        skip_projection_sizes: Sequence[int] = (32, 16),
        upsampling_sizes: Sequence[int] = (64, 32),
        num_templates: int = 1,
        chunk_size: int = 64,
    ):
        super().__init__()
        self.max_classes = max_classes
        self.pooling_size = _pair(pooling_size)
        self.inference_pooling_size = _pair(inference_pooling_size)
        self.chunk_size = chunk_size
        self.skip_upsamplers = nn.ModuleList(
            nn.ConvTranspose2d(skip_size, channels, kernel_size=factor, stride=factor)
            for factor, channels in zip((2, 4), skip_sizes, strict=True)
        )
        self.skip_projections = nn.ModuleList(
            nn.Conv2d(channels, projected, kernel_size=3, padding=1)
            for channels, projected in zip(skip_sizes, skip_projection_sizes, strict=True)
        )
        self.cost_embedding = nn.Conv2d(num_templates, hidden_size, kernel_size=7, padding=3)
        self.image_projection = nn.Conv2d(embedding_size, image_guidance_size, kernel_size=3, padding=1)
        self.text_projection = Linear(embedding_size, text_guidance_size)
        self.layers = nn.ModuleList(
            CostAggregationLayer(
                hidden_size, image_guidance_size, text_guidance_size, num_heads, window_size, max_classes
            )
            for _ in range(num_layers)
        )
        sizes = [hidden_size, *upsampling_sizes]
        self.upsampling_blocks = nn.ModuleList(
            UpsamplingBlock(before, skip, after)
            for before, skip, after in zip(sizes[:-1], skip_projection_sizes, sizes[1:], strict=True)
        )
        self.classifier = nn.Conv2d(sizes[-1], 1, kernel_size=3, padding=1)

    def forward(
        self, features: torch.Tensor, text_embeds: torch.Tensor, skips: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """
        Args:
            features (`torch.Tensor` of shape `(B, D, H, W)`): one embedding per place in text space, of any length.
            text_embeds (`torch.Tensor` of shape `(B, T, P, D)`): class names, of any length.
            skips (`Sequence[torch.Tensor]` of two `(B, skip_size, H, W)`): outputs of two blocks of the image tower.

        Returns:
            `torch.Tensor` of shape `(B, T, 4H, 4W)`: logits of independent binary decisions.
        """
        upsampled = [upsample(skip) for upsample, skip in zip(self.skip_upsamplers, skips, strict=True)]
        return self.aggregate(features, text_embeds, features, upsampled)

    def aggregate(
        self,
        features: torch.Tensor,
        text_embeds: torch.Tensor,
        appearance: torch.Tensor,
        skips: Sequence[torch.Tensor],
    ) -> torch.Tensor:
        """[`forward`] with the image's guidance `(B, D, H, W)` and skips at 2H x 2W and 4H x 4W given."""
        costs = cosines(features, text_embeds)
        classes = costs.shape[1]
        kept = None
        if 0 < self.max_classes < classes:
            kept = costs.amax(dim=(2, 3, 4)).topk(self.max_classes, dim=1, sorted=False).indices
            costs = costs.gather(1, kept[:, :, None, None, None].expand(-1, -1, *costs.shape[2:]))
            text_embeds = F.normalize(text_embeds, dim=-1)
            text_embeds = text_embeds.gather(1, kept[:, :, None, None].expand(-1, -1, *text_embeds.shape[2:]))

        image_guidance = F.relu(self.image_projection(appearance)).permute(0, 2, 3, 1)
        text_guidance = F.relu(self.text_projection(F.normalize(text_embeds.mean(dim=2), dim=-1)))
        skips = [F.relu(project(skip)) for project, skip in zip(self.skip_projections, skips, strict=True)]

        pooling = self.pooling_size if self.training else self.inference_pooling_size
        states = in_parts(self._embed, costs, self.chunk_size)
        for layer in self.layers:
            states = layer(states, image_guidance, text_guidance, pooling, self.chunk_size)
        logits = in_parts(lambda part: self._decode(part, skips), states, self.chunk_size)
        if kept is None:
            return logits
        everything = logits.new_full((logits.shape[0], classes, *logits.shape[2:]), LEFT_OUT)
        return everything.scatter(1, kept[:, :, None, None].expand_as(logits), logits)

    def _embed(self, costs: torch.Tensor) -> torch.Tensor:
        """`(B, T, P, H, W)` -> `(B, T, H, W, C)`."""
        embedded = self.cost_embedding(costs.flatten(0, 1))
        return embedded.permute(0, 2, 3, 1).unflatten(0, costs.shape[:2])

    def _decode(self, states: torch.Tensor, skips: Sequence[torch.Tensor]) -> torch.Tensor:
        """`(B, T, H, W, C)` -> `(B, T, 4H, 4W)`."""
        maps = states.flatten(0, 1).permute(0, 3, 1, 2)
        for block, skip in zip(self.upsampling_blocks, skips, strict=True):
            maps = block(maps, repeated(skip, states.shape[1]))  # the same for every class
        return self.classifier(maps).squeeze(1).unflatten(0, states.shape[:2])


def cosines(features: torch.Tensor, text_embeds: torch.Tensor) -> torch.Tensor:
    """`(B, D, H, W)` and `(B, T, P, D)` -> `(B, T, P, H, W)`."""
    return torch.einsum("bdhw,btpd->btphw", F.normalize(features, dim=1), F.normalize(text_embeds, dim=-1))


def repeated(values: torch.Tensor, times: int) -> torch.Tensor:
    """`(B, ...)` -> `(B * times, ...)`, each entry `times` times in a row."""
    return values[:, None].expand(-1, times, *values.shape[1:]).flatten(0, 1)


def in_parts(function: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, chunk: int) -> torch.Tensor:
    """`function(states)` `(B, N, ...)`; where no gradient is asked for, about `chunk` of the B * N at a time."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or states.shape[0] * states.shape[1] <= chunk:
        return function(states)
    return torch.cat([function(part) for part in states.split(max(chunk // states.shape[0], 1), dim=1)], dim=1)


def _pair(value: int | Sequence[int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


__all__ = ["LEFT_OUT", "ClassBlock", "CostAggregationHead", "Linear", "cosines"]
