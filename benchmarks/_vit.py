"""A transformer with the shape of ViT-Tiny, for cost measurements only."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, DEPTH, HEADS, RATIO, PATCH, IMAGE = 192, 12, 3, 4, 4, 32
TOKENS = (IMAGE // PATCH) ** 2


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, RATIO * width), nn.Linear(RATIO * width, width)

    def forward(self, x_BTC: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same."""
        b, t, c = x_BTC.shape
        q, k, v = self.qkv(self.norm1(x_BTC)).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        a = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)
        x_BTC = x_BTC + self.proj(a)
        return x_BTC + self.fc2(F.gelu(self.fc1(self.norm2(x_BTC))))


class ViTTiny(nn.Module):
    """Width 192, 12 layers, 3 heads, MLP x4, as ViT-Tiny; but 4x4 patches of a 32x32 image, so 64 tokens.

    No class token: the classifier reads the mean over tokens. 5.4 million parameters.

    >>> ViTTiny(depth=1, generator=torch.Generator())(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """

    def __init__(self, *, depth: int = DEPTH, num_classes: int = 10, generator: torch.Generator) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, PATCH, stride=PATCH)
        self.position = nn.Parameter(torch.zeros(1, TOKENS, WIDTH))
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_classes)
        with torch.no_grad():
            for p in self.parameters():
                if p.dim() > 1:
                    p.normal_(std=0.02, generator=generator)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(batch, 3, 32, 32) -> (batch, classes)."""
        x_BTC = self.embed(x_BCHW).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x_BTC)).mean(dim=1))
