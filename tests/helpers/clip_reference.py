"""CLIP as OpenAI describes it, written from the paper for the tests alone: the same names of weights, own code."""

import torch
from torch import nn
from torch.nn import functional as F


HEAD = 64


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.heads = width // HEAD
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * 0.1)
        self.in_proj_bias = nn.Parameter(torch.randn(3 * width) * 0.1)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, mask):
        n, width = x.shape
        q, k, v = (x @ self.in_proj_weight.T + self.in_proj_bias).view(n, 3, self.heads, HEAD).permute(1, 2, 0, 3)
        weights = (q @ k.transpose(1, 2) / HEAD**0.5 + mask).softmax(-1)
        return self.out_proj((weights @ v).permute(1, 0, 2).reshape(n, width))


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.attn, self.mlp = Attention(width), MLP(width)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x, mask):
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers):
        super().__init__()
        self.resblocks = nn.ModuleList(Block(width) for _ in range(layers))

    def forward(self, x, mask):
        for block in self.resblocks:
            x = block(x, mask)
        return x


class ViT(nn.Module):
    def __init__(self, width, layers, patch, grid, output):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers)
        self.proj = nn.Parameter(torch.randn(width, output) * 0.1)

    def forward(self, image):
        x = self.conv1(image[None])[0].flatten(1).T
        x = torch.cat([self.class_embedding[None], x]) + self.positional_embedding
        x = self.transformer(self.ln_pre(x), torch.zeros(len(x), len(x)))
        return self.ln_post(x[0]) @ self.proj


class Bottleneck(nn.Module):
    def __init__(self, inner, planes, stride):
        super().__init__()
        self.stride = stride
        self.conv1, self.bn1 = nn.Conv2d(inner, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.conv2, self.bn2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False), nn.BatchNorm2d(planes)
        self.conv3, self.bn3 = nn.Conv2d(planes, 4 * planes, 1, bias=False), nn.BatchNorm2d(4 * planes)
        self.downsample = None
        if stride > 1 or inner != 4 * planes:
            conv = nn.Conv2d(inner, 4 * planes, 1, bias=False)
            self.downsample = nn.ModuleDict({"0": conv, "1": nn.BatchNorm2d(4 * planes)})

    def forward(self, x):
        out = F.relu(self.bn1(self.conv1(x)))
        out = F.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(F.avg_pool2d(out, self.stride)))
        if self.downsample is not None:
            x = self.downsample["1"](self.downsample["0"](F.avg_pool2d(x, self.stride)))
        return F.relu(out + x)


class AttentionPool(nn.Module):
    def __init__(self, width, grid, output):
        super().__init__()
        self.heads = width // HEAD
        self.positional_embedding = nn.Parameter(torch.randn(grid * grid + 1, width))
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, output)

    def forward(self, c5):
        tokens = c5[0].flatten(1).T
        tokens = torch.cat([tokens.mean(0, keepdim=True), tokens]) + self.positional_embedding
        q = self.q_proj(tokens[:1]).view(1, self.heads, HEAD).transpose(0, 1)
        k, v = (p(tokens).view(-1, self.heads, HEAD).transpose(0, 1) for p in (self.k_proj, self.v_proj))
        return self.c_proj(((q @ k.transpose(1, 2) / HEAD**0.5).softmax(-1) @ v).flatten())


class ResNet(nn.Module):
    def __init__(self, width, layers, grid, output):
        super().__init__()
        sizes = [(3, width // 2, 2), (width // 2, width // 2, 1), (width // 2, width, 1)]
        for number, (inner, outer, stride) in enumerate(sizes, start=1):
            self.add_module(f"conv{number}", nn.Conv2d(inner, outer, 3, stride, 1, bias=False))
            self.add_module(f"bn{number}", nn.BatchNorm2d(outer))
        inner = width
        for stage, depth in enumerate(layers):
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck(inner, width * 2**stage, 2 if stage and not block else 1))
                inner = 4 * width * 2**stage
            self.add_module(f"layer{stage + 1}", nn.Sequential(*blocks))
        self.attnpool = AttentionPool(32 * width, grid, output)

    def forward(self, image):
        x = image[None]
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = F.avg_pool2d(F.relu(self.bn3(self.conv3(x))), 2)
        return self.attnpool(self.layer4(self.layer3(self.layer2(self.layer1(x)))))


class CLIP(nn.Module):
    def __init__(self, visual, vocab_size, width=128, layers=2, positions=16, output=24):
        super().__init__()
        self.visual, self.transformer = visual, Transformer(width, layers)
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.randn(positions, width))
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.randn(width, output) * 0.1)
        self.logit_scale = nn.Parameter(torch.tensor(2.5))

    def text(self, tokens):
        """Features `(D,)` of one text, tokens `(L,)` with EOS last."""
        mask = torch.full((len(tokens), len(tokens)), float("-inf")).triu(1)
        x = self.token_embedding(tokens) + self.positional_embedding[: len(tokens)]
        return self.ln_final(self.transformer(x, mask))[-1] @ self.text_projection

    def forward(self, image, tokens):
        return self.visual(image), self.text(tokens)


def reference_clip(kind, vocab_size, seed=0):
    """A tiny CLIP in eval mode, every weight and statistic random."""
    torch.manual_seed(seed)
    visual = ViT(128, 3, 16, 4, 24) if kind == "vit" else ResNet(8, (1, 2, 1, 1), 2, 24)
    clip = CLIP(visual, vocab_size)
    for name, tensor in [*clip.named_parameters(), *clip.named_buffers()]:
        if tensor.dim() == 1 and ("bn" in name or "ln" in name or "downsample" in name) and "bias" not in name:
            tensor.data = torch.rand_like(tensor) + 0.5
    return clip.eval()
