"""Small models of the kinds that people train, with a batch each; random weights, float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import weingarten as wg
from tests.cases import initialised, integers, normal

CLASSES, VOCABULARY, WIDTH, POSITIONS, DATA = 3, 7, 4, 3, 3


@dataclass(frozen=True)
class Case:
    """A model with what the objective and the batch need."""

    model: Callable[[], nn.Module]
    inputs: Any
    targets: Tensor
    output: Callable[[Any], Tensor] | None = None
    weights: Tensor | None = None
    digits: int = 8  # that the model computes with

    def objective(self) -> wg.Objective:
        return wg.Objective(initialised(self.model()), wg.CrossEntropy(), self.output)

    def batch(self) -> wg.Batch:
        return wg.Batch(self.inputs, self.targets, self.weights)


class Residual(nn.Module):
    """Two convolutions with norms, and a projected shortcut where the width changes."""

    def __init__(self, inside: int, outside: int, norm: Callable[[int], nn.Module], stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False), norm(outside)
        self.conv2, self.norm2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False), norm(outside)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), norm(outside))
            if inside != outside
            else nn.Identity()
        )
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        out += self.shortcut(x)
        return self.relu(out)


def resnet(norm: Callable[[int], nn.Module]) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 2, 3, padding=1, bias=False),
        norm(2),
        nn.ReLU(inplace=True),
        Residual(2, 2, norm, 1),
        Residual(2, 4, norm, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, CLASSES),
    )


class Encoder(nn.Module):
    """PyTorch's encoder under a head for every position."""

    def __init__(self, batch_first: bool, norm_first: bool) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, 2, 5, batch_first=batch_first, norm_first=norm_first, activation="gelu"
        )
        self.batch_first = batch_first
        self.encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(WIDTH), enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, src: Tensor, src_key_padding_mask: Tensor | None = None) -> Tensor:
        x = src if self.batch_first else src.transpose(0, 1)
        x = self.head(self.encoder(x, src_key_padding_mask=src_key_padding_mask))
        return (x if self.batch_first else x.transpose(0, 1)).mT


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = (
            nn.MultiheadAttention(WIDTH, 2, batch_first=True),
            nn.Linear(WIDTH, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.attention(x, x, x, need_weights=False)[0])).mean(1)


class CrossAttention(nn.Module):
    """Queries from one sequence, keys and values from another, of other widths."""

    def __init__(self, **widths: int) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(WIDTH, 2, **widths), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        return self.head(torch.tanh(self.attention(x, memory, memory)[0])).mean(0)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(WIDTH, 2, 5, batch_first=True)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.head(self.layer(x, memory, tgt_mask=mask, tgt_is_causal=True)).mT


class CausalBlock(nn.Module):
    """Fused projections of query, key and value, split after."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH, bias=bias), nn.LayerNorm(WIDTH, bias=bias)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH, bias=bias)
        self.up, self.down = nn.Linear(WIDTH, 5, bias=bias), nn.Linear(5, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        n, t, _ = x.shape
        q, k, v = (part.view(n, t, 2, -1).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, t, -1))
        return x + self.down(functional.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """A decoder as people write it, with a head tied to its embedding.

    Args:
        table: whether positions are an embedding of ``arange``, or a parameter of which the first rows are taken.
        bias: of all layers.
    """

    def __init__(self, table: bool, bias: bool = True) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        if table:
            self.positions: nn.Module | nn.Parameter = nn.Embedding(POSITIONS + 2, WIDTH)
        else:
            self.positions = nn.Parameter(torch.zeros(1, POSITIONS + 2, WIDTH))
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(CausalBlock(bias) for _ in range(2))
        self.norm = nn.LayerNorm(WIDTH, bias=bias)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        places = (
            self.positions(torch.arange(t, device=x.device))
            if isinstance(self.positions, nn.Module)
            else self.positions[:, :t]
        )
        h = self.drop(self.tokens(x) + places)
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h)).mT


class ViT(nn.Module):
    """Patches, a class token and positions as raw parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, WIDTH, 2, stride=2)
        self.cls = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos = nn.Parameter(torch.zeros(1, 5, WIDTH))
        self.encoder = nn.TransformerEncoderLayer(WIDTH, 2, 5, batch_first=True, norm_first=True)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.cls.expand(len(x), -1, -1), h], dim=1) + self.pos
        return self.head(self.norm(self.encoder(h))[:, 0])


class Grid(nn.Module):
    """Positions on a grid from one table, turned and cut before they are added; packed weights of the model's own, split."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, WIDTH)
        self.shifts = nn.Parameter(torch.zeros(2 * WIDTH))
        self.scores = nn.Embedding(3, 2)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.shifts.chunk(2)
        places = self.table(torch.arange(9, device=x.device).view(3, 3)).transpose(0, 1)[
            :2
        ]  # (2, 3, width), not as in the table
        h = torch.tanh(x + places + first)
        scores = self.scores(torch.tensor([[0, 1, 2], [1, 1, 0]], device=x.device)).permute(
            2, 0, 1
        )  # (2 heads, 2, 3)
        h = h.unflatten(-1, (2, -1)).permute(0, 3, 1, 2, 4) * torch.ones_like(x[:, None, :, :, :2])
        h = torch.tanh(h + scores.unsqueeze(-1))
        return self.head(h.permute(0, 2, 3, 1, 4).flatten(3) + second).mean((1, 2))


def mask_of(*lengths: int, width: int = POSITIONS) -> Tensor:
    """One for tokens, zero for padding after them."""
    return (torch.arange(width) < torch.tensor(lengths)[:, None]).long()


TOKENS = integers(VOCABULARY, DATA, POSITIONS)
MASK = mask_of(2, 3, 1)
NEXT = integers(VOCABULARY, DATA, POSITIONS, seed=1).where(MASK == 1, -100)
SEQUENCES = normal(DATA, POSITIONS, WIDTH)
MEMORY = normal(DATA, 2, WIDTH, seed=1)
LABELS = torch.tensor([0, 2, 1])
POSITION_LABELS = integers(CLASSES, DATA, POSITIONS, seed=2).where(MASK == 1, -100)
WEIGHTS = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)

TORCH: dict[str, Case] = {
    "ResNet, batch norm": Case(
        lambda: resnet(nn.BatchNorm2d), normal(DATA, 2, 4, 4), LABELS, weights=WEIGHTS
    ),
    "ResNet, group norm": Case(lambda: resnet(lambda c: nn.GroupNorm(2, c)), normal(DATA, 2, 4, 4), LABELS),
    **{
        f"nn.TransformerEncoder, batch_first={first}, norm_first={norm}": Case(
            lambda first=first, norm=norm: Encoder(first, norm),
            {"src": SEQUENCES, "src_key_padding_mask": MASK == 0},
            POSITION_LABELS,
        )
        for first in (True, False)
        for norm in (True, False)
    },
    "nn.MultiheadAttention, self": Case(SelfAttention, SEQUENCES, LABELS),
    "nn.MultiheadAttention, cross": Case(CrossAttention, (SEQUENCES, MEMORY), LABELS),
    "nn.MultiheadAttention, cross, other widths": Case(
        lambda: CrossAttention(kdim=3, vdim=3), (SEQUENCES, MEMORY[..., :3]), LABELS
    ),
    "nn.TransformerDecoderLayer": Case(Decoder, (SEQUENCES, MEMORY), POSITION_LABELS),
    "GPT, positions from a table": Case(lambda: GPT(True), TOKENS, NEXT, weights=WEIGHTS),
    "GPT, positions a parameter, no bias": Case(lambda: GPT(False, bias=False), TOKENS, NEXT),
    "grid of positions": Case(Grid, normal(DATA, 2, 3, WIDTH), LABELS),
    "ViT": Case(ViT, normal(DATA, 1, 4, 4), LABELS),
}
