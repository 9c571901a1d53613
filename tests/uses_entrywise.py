"""As `tests.uses`: leaves that act entry by entry, rows of tables that belong to all data, and attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.kfac_oracle import Hand
from tests.uses import Kind, linear, one, one_hot

__all__ = ["ATTENTION", "ENTRYWISE", "NORMS"]


class Leaf(nn.Module):
    """One parameter of this shape, used by a function ``(leaf, x)``."""

    def __init__(self, shape: tuple[int, ...], function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.leaf, self.function = nn.Parameter(torch.zeros(shape)), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.leaf, x)


def entrywise(
    shape: tuple[int, ...],
    function: Callable[[Tensor, Tensor], Tensor],
    by_hand: Callable[[Tensor, Tensor], Tensor],
    x=(2, 3),
) -> Kind:
    def hand_written(hand: Hand, row: Tensor) -> Tensor:
        hand.gain("leaf")
        return by_hand(hand["leaf"], row)

    return Kind(lambda: Leaf(shape, function), x, hand_written)


class Positions(nn.Module):
    """A learned table of positions, looked up at the same indices for all data."""

    def __init__(self, batch_axis: bool) -> None:
        super().__init__()
        self.table, self.batch_axis = nn.Embedding(5, 3), batch_axis

    def forward(self, x: Tensor) -> Tensor:
        index = torch.arange(x.shape[1])
        return x + self.table(index[None] if self.batch_axis else index)


def positions(hand: Hand, x: Tensor) -> Tensor:
    return x + hand.use(one_hot(torch.arange(len(x)), 5), ("table.weight",), lambda p: p["table.weight"].mT)


class HalfTable(nn.Module):
    """Positions that are looked up and passed through a linear layer, whose input is the same for all data."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.shift


def half_table(hand: Hand, x: Tensor) -> Tensor:
    hand.gain("scale")
    hand.gain("shift")
    return hand["scale"] * x + hand["shift"]


ENTRYWISE: dict[str, Kind] = {
    "positions": Kind(lambda: Positions(False), (3, 3), positions, table="table.weight"),
    "positions with batch axis": Kind(lambda: Positions(True), (3, 3), positions, table="table.weight"),
    "added vector": entrywise((3,), lambda p, x: x + p, lambda p, x: x + p),
    "added matrix": entrywise((2, 3), lambda p, x: p + x, lambda p, x: x + p),
    "added with batch axis": entrywise((1, 2, 3), lambda p, x: x + p, lambda p, x: x + p[0]),
    "added slice": entrywise((1, 5, 3), lambda p, x: x + p[:, : x.shape[1]], lambda p, x: x + p[0, :2]),
    "added column": entrywise((2, 1), lambda p, x: torch.add(x, p), lambda p, x: x + p),
    "added in place": entrywise((3,), lambda p, x: x.clone().add_(p), lambda p, x: x + p),
    "subtracted after a product": entrywise((3,), lambda p, x: (p * x).sin(), lambda p, x: (p * x).sin()),
    "multiplied vector": entrywise((3,), lambda p, x: x * p, lambda p, x: x * p),
    "multiplied scalar": entrywise((1,), lambda p, x: torch.mul(x, p), lambda p, x: x * p),
    "added to merged rows": entrywise(
        (3,), lambda p, x: (x.reshape(-1, 3) + p).reshape(x.shape), lambda p, x: x + p
    ),
    "multiplies merged rows, positions first": entrywise(
        (3,),
        lambda p, x: (x.transpose(0, 1).reshape(-1, 3) * p).unflatten(0, (-1, len(x))).transpose(0, 1),
        lambda p, x: x * p,
    ),
    "multiplied number": entrywise((), lambda p, x: x * p, lambda p, x: x * p),
    "added number": entrywise((), lambda p, x: p + x, lambda p, x: x + p),
    "multiplied column of channels": entrywise(
        (2,), lambda p, x: p[:, None] * x, lambda p, x: x * p[:, None]
    ),
    "multiplied and repeated": entrywise(
        (1, 3), lambda p, x: x * p.repeat(2, 1), lambda p, x: x * torch.cat([p, p])
    ),
    "multiplied twice": entrywise(
        (3,), lambda p, x: torch.tanh(x * p) * p, lambda p, x: torch.tanh(x * p) * p
    ),
    "class token": entrywise(
        (1, 1, 3),
        lambda p, x: torch.cat([p.expand(len(x), -1, -1), x], 1).cumsum(1),
        lambda p, x: torch.cat([p[0], x]).cumsum(0),
    ),
    "class token as a vector": entrywise(
        (3,),
        lambda p, x: torch.cat([p[None, None].expand(x.shape[0], 1, 3), x], 1).cumsum(1),
        lambda p, x: torch.cat([p[None], x]).cumsum(0),
    ),
    "scale and shift": Kind(HalfTable, (2, 3), half_table),
}


# ---------------------------------------------------------------------------------------------------------------- norms
class HandwrittenRMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6))


def gained(function: Callable[[Hand, Tensor], Tensor], *leaves: str) -> Callable[[Hand, Tensor], Tensor]:
    def by_hand(hand: Hand, x: Tensor) -> Tensor:
        hand.gain(*leaves)
        return function(hand, x)

    return by_hand


def standard(x: Tensor, axes: tuple[int, ...], eps: float = 1e-5) -> Tensor:
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, unbiased=False, keepdim=True) + eps).sqrt()


def batch_norm(channels: int, axes: int) -> Callable[[Hand, Tensor], Tensor]:
    """Running statistics are set to these by :func:`set_statistics`."""

    def function(hand: Hand, x: Tensor) -> Tensor:
        shape = (-1, *[1] * axes)
        mean, var = (statistic(channels, name).reshape(shape) for name in ("mean", "var"))
        z = (x - mean) / (var + 1e-5).sqrt() * hand["weight"].reshape(shape) + hand["bias"].reshape(shape)
        return z.reshape(channels, -1).mT

    return gained(function, "weight", "bias")


def statistic(channels: int, name: str) -> Tensor:
    return 0.5 + torch.arange(channels, dtype=torch.float64) / (2 if name == "mean" else 3)


def with_statistics(norm: Any) -> nn.Module:
    norm.double()
    norm.set_statistics = lambda: [
        getattr(norm, f"running_{name}").copy_(statistic(norm.num_features, name)) for name in ("mean", "var")
    ]
    return norm


def channels_norm(groups: int) -> Callable[[Hand, Tensor], Tensor]:
    def function(hand: Hand, x: Tensor) -> Tensor:
        z = torch.cat([standard(part, tuple(range(x.ndim))) for part in x.chunk(groups)])
        shape = (-1, *[1] * (x.ndim - 1))
        return (z * hand["weight"].reshape(shape) + hand["bias"].reshape(shape)).flatten(1).mT

    return gained(function, "weight", "bias")


NORMS: dict[str, Kind] = {
    "LayerNorm": Kind(
        lambda: nn.LayerNorm(3),
        (2, 3),
        gained(lambda hand, x: standard(x, (-1,)) * hand["weight"] + hand["bias"], "weight", "bias"),
    ),
    "LayerNorm, no bias": Kind(
        lambda: nn.LayerNorm(3, bias=False),
        (2, 3),
        gained(lambda hand, x: standard(x, (-1,)) * hand["weight"], "weight"),
    ),
    "LayerNorm over two axes": Kind(
        lambda: nn.Sequential(nn.LayerNorm((2, 3)), nn.Flatten(2)),
        (2, 2, 3),
        gained(
            lambda hand, x: (standard(x, (-1, -2)) * hand["0.weight"] + hand["0.bias"]).flatten(1),
            "0.weight",
            "0.bias",
        ),
    ),
    "RMSNorm": Kind(
        lambda: nn.RMSNorm(3, eps=1e-6),
        (2, 3),
        gained(lambda hand, x: hand["weight"] * x / ((x**2).mean(-1, keepdim=True) + 1e-6).sqrt(), "weight"),
    ),
    "handwritten RMSNorm": Kind(
        HandwrittenRMSNorm,
        (2, 3),
        gained(lambda hand, x: hand["weight"] * x / ((x**2).mean(-1, keepdim=True) + 1e-6).sqrt(), "weight"),
    ),
    "GroupNorm": Kind(lambda: nn.GroupNorm(2, 4), (4, 2, 2), channels_norm(2), channels=True),
    "InstanceNorm": Kind(
        lambda: nn.InstanceNorm2d(2, affine=True), (2, 2, 2), channels_norm(2), channels=True
    ),
    "BatchNorm of vectors": Kind(
        lambda: with_statistics(nn.BatchNorm1d(3)), (3,), batch_norm(3, 0), channels=True
    ),
    "BatchNorm1d": Kind(lambda: with_statistics(nn.BatchNorm1d(3)), (3, 2), batch_norm(3, 1), channels=True),
    "BatchNorm2d": Kind(
        lambda: with_statistics(nn.BatchNorm2d(2)), (2, 2, 2), batch_norm(2, 2), channels=True
    ),
}


# ------------------------------------------------------------------------------------------------------------ attention
class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` with queries, keys and values from ``x``, or keys and values from a part of it."""

    def __init__(
        self, cross: bool = False, causal: bool = False, padded: bool = False, **options: Any
    ) -> None:
        super().__init__()
        self.cross, self.causal, self.padded = cross, causal, padded
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, memory = (x[:, :2], x[:, 2:]) if self.cross else (x, x)
        blocked = torch.ones(len(x[0]), len(x[0])).triu(1).bool() if self.causal else None
        ignored = ~mask if self.padded and mask is not None else None
        first = self.attention.batch_first
        args = [query, memory, memory] if self.cross else [x, x, x]
        if not first:
            swapped = {id(a): a.transpose(0, 1) for a in args}
            args = [swapped[id(a)] for a in args]
        found = self.attention(*args, key_padding_mask=ignored, attn_mask=blocked, need_weights=False)[0]
        return found if first else found.transpose(0, 1)


def attention(
    cross: bool = False, causal: bool = False, padded: bool = False, bias: bool = True
) -> Callable[..., Tensor]:
    def by_hand(hand: Hand, x: Tensor, mask: Tensor | None = None) -> Tensor:
        query, memory = (x[:2], x[2:]) if cross else (x, x)
        q, k, v = (project(hand, rows, group, bias) for group, rows in enumerate((query, memory, memory)))
        heads = []
        for head in (slice(0, 2), slice(2, 4)):
            scores = q[:, head] @ k[:, head].mT / 2**0.5
            if causal:
                scores = scores.masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
            if padded and mask is not None:
                scores = scores.masked_fill(~mask[None], -torch.inf)
            heads.append(scores.softmax(-1) @ v[:, head])
        h = torch.cat(heads, -1)
        if bias:
            return linear(hand, h, "attention.out_proj.")
        return hand.use(h, ("attention.out_proj.weight",), lambda p: p["attention.out_proj.weight"])

    return by_hand


def project(hand: Hand, x: Tensor, group: int, bias: bool) -> Tensor:
    mine, w, b = slice(4 * group, 4 * group + 4), "attention.in_proj_weight", "attention.in_proj_bias"
    if not bias:
        return hand.use(x, (w,), lambda p: p[w][mine], group)
    return hand.use(one(x), (w, b), lambda p: torch.cat([p[w][mine], p[b][mine, None]], 1), group)


class OtherWidths(nn.Module):
    """Keys and values of other widths than queries, whose projections are three weights with one bias."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x[..., :3], x[..., :2], need_weights=False)[0]


def other_widths(hand: Hand, x: Tensor) -> Tensor:
    hand.gain("attention.in_proj_bias")
    bias = hand["attention.in_proj_bias"].split(4)
    q, k, v = (
        hand.use(x[:, :width], (w,), lambda p, w=w: p[w]) + b
        for width, w, b in zip((4, 3, 2), (f"attention.{n}_proj_weight" for n in "qkv"), bias, strict=True)
    )
    h = torch.cat(
        [(q[:, a] @ k[:, a].mT / 2**0.5).softmax(-1) @ v[:, a] for a in (slice(0, 2), slice(2, 4))], -1
    )
    return linear(hand, h, "attention.out_proj.")


ATTENTION: dict[str, Kind] = {
    "attention of other widths": Kind(OtherWidths, (3, 4), other_widths),
    "attention, batch first": Kind(lambda: SelfAttention(batch_first=True), (3, 4), attention()),
    "attention, positions first": Kind(SelfAttention, (3, 4), attention()),
    "attention, no bias": Kind(
        lambda: SelfAttention(batch_first=True, bias=False), (3, 4), attention(bias=False)
    ),
    "cross attention, batch first": Kind(
        lambda: SelfAttention(cross=True, batch_first=True), (5, 4), attention(cross=True)
    ),
    "cross attention, positions first": Kind(
        lambda: SelfAttention(cross=True), (4, 4), attention(cross=True)
    ),
    "causal attention": Kind(
        lambda: SelfAttention(causal=True, batch_first=True), (3, 4), attention(causal=True)
    ),
    "padded attention, batch first": Kind(
        lambda: SelfAttention(padded=True, batch_first=True), (3, 4), attention(padded=True), masked=True
    ),
    "padded attention, positions first": Kind(
        lambda: SelfAttention(padded=True), (3, 4), attention(padded=True), masked=True
    ),
}
