"""A Llama-like causal Transformer over bytes, in plain torch: no tokenizer, no dependency, nothing LoRA about it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder; ``kv_heads`` below ``heads`` is grouped-query attention."""

    width: int
    layers: int
    heads: int
    kv_heads: int
    hidden: int

    @property
    def head_width(self) -> int:
        """The width of one attention head."""
        return self.width // self.heads


class Attention(nn.Module):
    """Causal self-attention with rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_width = shape.kv_heads * shape.head_width
        self.q = nn.Linear(shape.width, shape.width, bias=False)
        self.k = nn.Linear(shape.width, kv_width, bias=False)
        self.v = nn.Linear(shape.width, kv_width, bias=False)
        self.o = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """x [B, T, width], rotation [2, T, head_width] -> [B, T, width]."""
        q, k, v = (p(x).unflatten(-1, (-1, self.shape.head_width)).transpose(1, 2) for p in (self.q, self.k, self.v))
        q, k = rotated(q, rotation), rotated(k, rotation)
        grouped = self.shape.kv_heads < self.shape.heads
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        y: Tensor = self.o(mixed.transpose(1, 2).flatten(2))
        return y


class MLP(nn.Module):
    """The gated feed-forward layer, SwiGLU (Shazeer, 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.width, shape.hidden, bias=False)
        self.up = nn.Linear(shape.width, shape.hidden, bias=False)
        self.down = nn.Linear(shape.hidden, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, T, width] -> [B, T, width]."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added back to it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(shape.width)
        self.attention = Attention(shape)
        self.mlp_norm = nn.RMSNorm(shape.width)
        self.mlp = MLP(shape)

    def forward(self, x: Tensor, rotation: Tensor) -> Tensor:
        """x [B, T, width], rotation [2, T, head_width] -> [B, T, width]."""
        x = x + self.attention(self.attention_norm(x), rotation)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class Decoder(nn.Module):
    """Predicts the next byte at every position."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        self.head = nn.Linear(shape.width, VOCABULARY, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:
                into_stream = name.endswith(("o.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * shape.layers) if into_stream else 0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens [B, T] -> logits [B, T, 256]."""
        x = self.embedding(tokens)
        rotation = rotations(tokens.shape[1], self.shape.head_width, tokens.device)
        for block in self.blocks:
            x = block(x, rotation)
        logits: Tensor = self.head(self.norm(x))
        return logits


def rotations(length: int, head_width: int, device: torch.device) -> Tensor:
    """Cosines and sines of the rotary embedding (Su et al., 2021, https://arxiv.org/abs/2104.09864): [2, T, D]."""
    frequency = torch.pow(10000, -torch.arange(0, head_width, 2, device=device) / head_width)
    angle = torch.outer(torch.arange(length, device=device), frequency).repeat(1, 2)
    return torch.stack((angle.cos(), angle.sin()))


def rotated(x: Tensor, rotation: Tensor) -> Tensor:
    """x [B, H, T, D], its two halves turned against each other by each position's angles."""
    cosine, sine = rotation.to(x.dtype).unbind()
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat((-second, first), dim=-1) * sine
