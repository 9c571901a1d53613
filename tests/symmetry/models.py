"""Small models for the inference of symmetries, in float64 with every parameter and running statistic away from its start."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


class Net(nn.Module):
    """A module from a forward function of itself, and submodules or parameters."""

    def __init__(self, forward, **members):
        super().__init__()
        self.function = forward
        for name, member in members.items():
            if isinstance(member, torch.Tensor) and not isinstance(member, nn.Parameter):
                self.register_buffer(name, member)
            else:
                setattr(self, name, member)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def scramble(model: nn.Module, seed: int = 0) -> nn.Module:
    """Generic float64 parameters: nothing is zero, one or equal, which would hide differences."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double()
    with torch.no_grad():
        for p in model.parameters():
            fan = math.prod(p.shape[1:]) if p.dim() > 1 else 4
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * (1.5 / fan) ** 0.5 + 0.1)
        for name, b in model.named_buffers():
            if "running" in name:
                b.copy_(torch.rand(b.shape, generator=generator, dtype=b.dtype) + 0.5)
    return model.eval()


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(*shape: int, vocabulary: int = 11) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(1))


def mlp(activation: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(3, 5), activation, nn.Linear(5, 6), activation, nn.Linear(6, 2))


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2), nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 6)
    )


def conv_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3),
        nn.BatchNorm2d(6),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24, 3),
    )


class Residual(nn.Module):
    """conv, norm, then ``x + branch(x)``."""

    def __init__(self, norm):
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, 8, 3, padding=1, bias=False), norm(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 6, 3, padding=1), norm(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, padding=1), norm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = F.relu(self.norm0(self.stem(x)))
        y = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(x + self.norm2(self.conv2(y)))
        return self.head(x.mean((2, 3)))


class RMS(nn.Module):
    """Written by hand."""

    def __init__(self, d, gain=True):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(d)) if gain else None

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x if self.gain is None else self.gain * x


class Attention(nn.Module):
    """Causal attention in the usual spellings."""

    def __init__(self, d, heads, groups=None, fused="split", sdpa=True, rope=0, bias=True):
        super().__init__()
        self.heads, self.groups, self.size, self.fused, self.sdpa = (
            heads,
            groups or heads,
            d // heads,
            fused,
            sdpa,
        )
        if fused:
            self.qkv = nn.Linear(d, 3 * d, bias=bias)
        else:
            self.q = nn.Linear(d, d, bias=bias)
            self.k = nn.Linear(d, self.groups * self.size, bias=bias)
            self.v = nn.Linear(d, self.groups * self.size, bias=bias)
        self.proj = nn.Linear(d, d, bias=bias)
        self.rope = rope
        if rope:
            angle = torch.arange(rope)[:, None] * 0.3 ** torch.arange(self.size // 2)[None]
            self.register_buffer("cos", torch.cat([angle.cos(), angle.cos()], -1).double())
            self.register_buffer("sin", torch.cat([angle.sin(), angle.sin()], -1).double())

    def qkv_heads(self, x):
        b, t, d = x.shape
        if self.fused == "stack":
            return self.qkv(x).view(b, t, 3, self.heads, self.size).permute(2, 0, 3, 1, 4).unbind(0)
        q, k, v = self.qkv(x).split(d, -1) if self.fused else (self.q(x), self.k(x), self.v(x))
        return (z.view(b, t, -1, self.size).transpose(1, 2) for z in (q, k, v))

    def rotate(self, x):
        half = self.size // 2
        return x * self.cos + torch.cat([-x[..., half:], x[..., :half]], -1) * self.sin

    def forward(self, x):
        q, k, v = self.qkv_heads(x)
        if self.rope:
            q, k = self.rotate(q), self.rotate(k)
        if self.sdpa:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups != self.heads)
        else:
            k, v = (z.repeat_interleave(self.heads // self.groups, 1) for z in (k, v))
            scores = q @ k.transpose(-2, -1) / self.size**0.5
            hidden = torch.ones(x.shape[1], x.shape[1]).tril() == 0
            y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class SwiGLU(nn.Module):
    def __init__(self, d, h):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(d, h), nn.Linear(d, h), nn.Linear(h, d)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GPT(nn.Module):
    def __init__(self, attention, mlp=None, norm=nn.LayerNorm, d=8, tied=False, layers=1, length=5):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(11, d), nn.Embedding(length, d)
        self.attn = nn.ModuleList(attention(d) for _ in range(layers))
        make = mlp or (lambda d: nn.Sequential(nn.Linear(d, 12), nn.GELU(), nn.Linear(12, d)))
        self.mlp = nn.ModuleList(make(d) for _ in range(layers))
        self.norm = nn.ModuleList(norm(d) for _ in range(2 * layers + 1))
        self.head = nn.Linear(d, 11, bias=False)
        if tied:
            self.head.weight = self.wte.weight

    def forward(self, ids):
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for i, (attn, mlp) in enumerate(zip(self.attn, self.mlp, strict=True)):
            x = x + attn(self.norm[2 * i](x))
            x = x + mlp(self.norm[2 * i + 1](x))
        return self.head(self.norm[-1](x))


def encoder(**kwargs) -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **kwargs)
    return nn.Sequential(
        nn.Linear(3, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 2)
    )


def recurrent(kind, **kwargs) -> nn.Module:
    width = 5 * (2 if kwargs.get("bidirectional") else 1)
    return Net(
        lambda s, x: s.head(s.cell(x)[0]),
        cell=kind(3, 5, batch_first=True, **kwargs),
        head=nn.Linear(width, 2),
    )
