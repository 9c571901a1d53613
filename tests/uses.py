"""Every way of using parameters that layers know: a module, its inputs, and the same for one datum by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from tests.kfac_oracle import Hand, Matrix

__all__ = ["CONVOLUTIONS", "MATRICES", "Kind", "linear", "one", "one_hot", "weight_bias"]


@dataclass(frozen=True)
class Kind:
    """A layer that maps inputs ``(N, *shape)`` to ``(N, T, d)`` (or ``(N, d, *positions)`` with ``channels``).

    ``by_hand`` takes one datum and returns ``(T, d)``. With ``tokens`` the inputs are indices below that number; with ``masked``
    layer and hand also take the mask ``(N, T)`` or ``(T,)``, true where there is data. ``table`` is the leaf whose rows
    are numbered, if there is one.
    """

    layer: Callable[[], nn.Module]
    shape: tuple[int, ...]
    by_hand: Callable[..., Tensor]
    channels: bool = False
    tokens: int = 0
    masked: bool = False
    table: str = ""


WB = ("weight", "bias")


def weight_bias(weight: str = "weight", bias: str = "bias") -> Matrix:
    return lambda p: torch.cat([p[weight], p[bias][:, None]], 1)


def one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(*x.shape[:-1], 1, dtype=x.dtype)], -1)


def linear(hand: Hand, x: Tensor, name: str = "") -> Tensor:
    leaves = (f"{name}weight", f"{name}bias")
    return hand.use(one(x), leaves, weight_bias(*leaves))


# ------------------------------------------------------------------------------------------------------------ matrices
class Twice(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(super().forward(x)))


class Pair(nn.Module):
    """One matrix, forwards and transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(torch.tanh(functional.linear(x, self.weight)), self.weight.t())


def pair(hand: Hand, x: Tensor) -> Tensor:
    h = torch.tanh(hand.use(x, ("weight",), lambda p: p["weight"]))
    return hand.use(h, ("weight",), lambda p: p["weight"].mT, term=1)


class Conv1D(nn.Module):
    """As in Hugging Face's GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(3, 2)), nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        shape = (*x.shape[:-1], 2)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(shape)


class Matmul(nn.Module):
    """``x @ W`` with data and positions merged, positions first."""

    def __init__(self, positions_first: bool) -> None:
        super().__init__()
        self.weight, self.positions_first = nn.Parameter(torch.zeros(3, 2)), positions_first

    def forward(self, x: Tensor) -> Tensor:
        if not self.positions_first:
            return x @ self.weight
        merged = x.transpose(0, 1).reshape(-1, 3) @ self.weight
        return merged.unflatten(0, (x.shape[1], len(x))).transpose(0, 1)


def matmul(hand: Hand, x: Tensor) -> Tensor:
    return hand.use(x, ("weight",), lambda p: p["weight"].mT)


class TiedHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(x))))


def tied_head(hand: Hand, x: Tensor) -> Tensor:
    z = hand.use(one_hot(x, 4), ("embed.weight",), lambda p: p["embed.weight"].mT)
    h = torch.tanh(linear(hand, z, "mix."))
    return hand.use(h, ("embed.weight",), lambda p: p["embed.weight"], term=1)


def one_hot(x: Tensor, size: int) -> Tensor:
    return functional.one_hot(x, size).double()


class FromTheEnd(nn.Embedding):
    """Gives the row of the padding as a negative number, which the module itself would not pass on."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.embedding(x, self.weight, padding_idx=-3)


def embedding(hand: Hand, x: Tensor) -> Tensor:
    return hand.use(one_hot(x, 4), ("weight",), lambda p: p["weight"].mT)


def padded_embedding(hand: Hand, x: Tensor) -> Tensor:
    """Rows of the padding are used as constants."""
    table = hand["weight"].detach()
    z = hand.use(one_hot(x, 4), ("weight",), lambda p: p["weight"].mT)
    return torch.where((x == 1)[:, None], table[x], z)


# --------------------------------------------------------------------------------------------------------- convolutions
def conv(
    function: Any, groups: int = 1, bias: bool = True, **options: Any
) -> Callable[[Hand, Tensor], Tensor]:
    """Input rows from the outputs for unit kernels: ``z_t = sum_i a_ti W_i`` is linear in W."""

    def by_hand(hand: Hand, x: Tensor) -> Tensor:
        w = hand["weight"]
        parts, out = [], len(w) // groups
        for group in range(groups):
            units = torch.zeros(w[0].numel(), *w.shape, dtype=w.dtype)
            units[:, group * out] = torch.eye(w[0].numel(), dtype=w.dtype).reshape(-1, *w.shape[1:])
            rows = [
                function(x[None], u, None, groups=groups, **options)[0, group * out].flatten() for u in units
            ]
            mine = slice(group * out, (group + 1) * out)
            parts.append(
                conv_use(hand, rows, lambda p, mine=mine: p["weight"][mine].flatten(1), mine, group, bias)
            )
        return torch.cat(parts, 1)

    return by_hand


def conv_transpose(
    function: Any, groups: int = 1, bias: bool = True, **options: Any
) -> Callable[[Hand, Tensor], Tensor]:
    def by_hand(hand: Hand, x: Tensor) -> Tensor:
        w = hand["weight"]
        parts, ins, out = [], len(w) // groups, w.shape[1]
        for group in range(groups):
            mine, outs = slice(group * ins, (group + 1) * ins), slice(group * out, (group + 1) * out)
            size = w[mine, 0].numel()
            units = torch.zeros(size, *w.shape, dtype=w.dtype)
            units[:, mine, 0] = torch.eye(size, dtype=w.dtype).reshape(-1, *w[mine, 0].shape)
            rows = [
                function(x[None], u, None, groups=groups, **options)[0, group * out].flatten() for u in units
            ]
            matrix = lambda p, mine=mine: p["weight"][mine].transpose(0, 1).flatten(1)  # noqa: E731
            parts.append(conv_use(hand, rows, matrix, outs, group, bias))
        return torch.cat(parts, 1)

    return by_hand


def conv_use(hand: Hand, rows: list[Tensor], matrix: Matrix, outs: slice, group: int, bias: bool) -> Tensor:
    a = torch.stack(rows, -1)
    if not bias:
        return hand.use(a, ("weight",), matrix, group)
    return hand.use(one(a), WB, lambda p: torch.cat([matrix(p), p["bias"][outs][:, None]], 1), group)


def circular(hand: Hand, x: Tensor) -> Tensor:
    return conv(functional.conv1d)(hand, functional.pad(x[None], (1, 1), mode="circular")[0])


CONVOLUTIONS: dict[str, Kind] = {
    "conv1d": Kind(lambda: nn.Conv1d(2, 3, 2), (2, 3), conv(functional.conv1d), channels=True),
    "conv1d circular": Kind(lambda: nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), (2, 3), circular, channels=True),
    "conv1d same, even": Kind(
        lambda: nn.Conv1d(2, 2, 2, padding="same"), (2, 3), conv(functional.conv1d, padding="same"), channels=True
    ),
    "conv2d strided, dilated": Kind(
        lambda: nn.Conv2d(2, 2, (3, 2), (1, 2), (2, 1), (2, 1), bias=False),
        (2, 3, 3),
        conv(functional.conv2d, bias=False, stride=(1, 2), padding=(2, 1), dilation=(2, 1)),
        channels=True,
    ),
    "conv2d same, dilated": Kind(
        lambda: nn.Conv2d(1, 2, 2, padding="same", dilation=2),
        (1, 2, 3),
        conv(functional.conv2d, padding="same", dilation=2),
        channels=True,
    ),
    "conv2d valid": Kind(
        lambda: nn.Conv2d(1, 2, 2, padding="valid"), (1, 2, 3), conv(functional.conv2d, padding="valid"), channels=True
    ),
    "conv2d grouped": Kind(
        lambda: nn.Conv2d(4, 6, 2, groups=2), (4, 2, 3), conv(functional.conv2d, groups=2), channels=True
    ),
    "conv2d depthwise": Kind(
        lambda: nn.Conv2d(3, 6, 2, groups=3, bias=False), (3, 2, 3), conv(functional.conv2d, 3, False), channels=True
    ),
    "conv3d": Kind(
        lambda: nn.Conv3d(2, 2, (1, 2, 2), (1, 2, 1), (0, 1, 0), groups=2),
        (2, 2, 2, 3),
        conv(functional.conv3d, groups=2, stride=(1, 2, 1), padding=(0, 1, 0)),
        channels=True,
    ),
    "conv3d same, dilated": Kind(
        lambda: nn.Conv3d(1, 2, (2, 1, 2), padding="same", dilation=(1, 1, 2)),
        (1, 2, 1, 3),
        conv(functional.conv3d, padding="same", dilation=(1, 1, 2)),
        channels=True,
    ),
    "conv_transpose1d": Kind(
        lambda: nn.ConvTranspose1d(4, 4, 2, 2, 1, 1, groups=2),
        (4, 3),
        conv_transpose(functional.conv_transpose1d, 2, stride=2, padding=1, output_padding=1),
        channels=True,
    ),
    "conv_transpose2d": Kind(
        lambda: nn.ConvTranspose2d(2, 3, (2, 1), (1, 2), (1, 0), (0, 1), dilation=(2, 1)),
        (2, 2, 2),
        conv_transpose(
            functional.conv_transpose2d, stride=(1, 2), padding=(1, 0), output_padding=(0, 1), dilation=(2, 1)
        ),
        channels=True,
    ),
    "conv_transpose3d": Kind(
        lambda: nn.ConvTranspose3d(2, 2, (1, 2, 1), groups=2, bias=False),
        (2, 1, 1, 2),
        conv_transpose(functional.conv_transpose3d, 2, False),
        channels=True,
    ),
}  # fmt: skip

MATRICES: dict[str, Kind] = {
    "linear": Kind(lambda: nn.Linear(3, 2), (2, 3), linear),
    "linear, one position": Kind(lambda: nn.Linear(3, 2), (3,), lambda hand, x: linear(hand, x[None])),
    "linear, 2 x 2 positions": Kind(
        lambda: nn.Sequential(nn.Linear(2, 2), nn.Flatten(1, 2)),
        (2, 2, 2),
        lambda hand, x: linear(hand, x.reshape(4, 2), "0."),
    ),
    "linear, no bias": Kind(
        lambda: nn.Linear(3, 2, bias=False),
        (2, 3),
        lambda hand, x: hand.use(x, ("weight",), lambda p: p["weight"]),
    ),
    "linear called twice": Kind(
        lambda: Twice(3, 3), (2, 3), lambda hand, x: linear(hand, torch.tanh(linear(hand, x)))
    ),
    "tied pair": Kind(Pair, (2, 3), pair),
    "addmm on merged rows": Kind(
        Conv1D,
        (2, 3),
        lambda hand, x: hand.use(one(x), WB, lambda p: torch.cat([p["weight"].mT, p["bias"][:, None]], 1)),
    ),
    "matmul": Kind(lambda: Matmul(False), (2, 3), matmul),
    "matmul, positions first": Kind(lambda: Matmul(True), (2, 3), matmul),
    "embedding": Kind(lambda: nn.Embedding(4, 3), (3,), embedding, tokens=4, table="weight"),
    "embedding with padding": Kind(
        lambda: nn.Embedding(4, 2, padding_idx=1), (3,), padded_embedding, tokens=4, table="weight"
    ),
    "embedding with padding from the end": Kind(
        lambda: FromTheEnd(4, 2), (3,), padded_embedding, tokens=4, table="weight"
    ),
    "tied head": Kind(TiedHead, (3,), tied_head, tokens=4, table="embed.weight"),
}
