"""Layer inputs in the two forms that occur: dense rows, and one-hot rows kept as indices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from weingarten.layers.sharing import Expand, Sharing

__all__ = [
    "DenseRows",
    "OneHotRows",
    "Rows",
    "chunks_of_data",
    "every",
    "factor_type",
    "gram",
    "joined",
    "output_moment",
    "turned",
]

_CHUNK = 2**20  # entries of per-datum gradients held at once: as many as a cache holds
_PANEL = 128  # columns of a Gram matrix computed together: half the work for large matrices, and still fast products


class Rows(ABC):
    """The inputs of one block for one batch, ``(groups, N, T, in)``, with the second moments that are taken of them."""

    @property
    @abstractmethod
    def width(self) -> int:
        """Length of a row."""

    @property
    @abstractmethod
    def number(self) -> int:
        """How many rows there are, data times positions."""

    @abstractmethod
    def moment(self, sharing: Sharing, weight: Tensor | None, dense: bool) -> tuple[Tensor, Tensor]:
        """Weighted sum of outer products of rows (or its diagonal), and the sum of the weights by group.

        Args:
            sharing: what counts as a row.
            weight: ``(groups, N, T)``, zero for positions to leave out; None for ones.
            dense: whether the whole matrix is wanted, where it is not known to be diagonal.
        """

    def thinned(self, weight: Tensor | None, start: int, stride: int) -> tuple[Rows, Tensor | None]:
        """Every ``stride``-th row with its weight, where leaving out the others saves work."""
        return self, weight

    def formed(self) -> DenseRows:
        """The rows as dense ones."""
        raise TypeError(f"{type(self).__name__} are not formed")

    @abstractmethod
    def rotated(self, right: Tensor | None) -> Rows:
        """The rows in another basis of the inputs, ``(groups, in, in)``; None for the one they are in."""

    @abstractmethod
    def gradients(self, g: Tensor, data: slice) -> Tensor:
        """Per-datum gradients ``sum_t g_t a_t^T`` of some data, ``(K, groups, n, out, in)``, from ``g`` as in :meth:`squares`."""

    def squares(self, g: Tensor) -> Tensor:
        """Sum over data and columns of squared per-datum gradients, ``(groups, out, in)``.

        Args:
            g: output gradients ``(K, groups, N, T, out)``.
        """
        return sum_of_squares(self.gradients(g, data) for data in chunks_of_data(g, self.width))


@dataclass(frozen=True)
class DenseRows(Rows):
    """Inputs ``(groups, N, T, in)``, where one group may stand for all, with a one at the end of each row if ``one``."""

    values: Tensor
    one: bool = False

    @property
    def width(self) -> int:
        return self.values.shape[-1] + self.one

    @property
    def number(self) -> int:
        return self.values.shape[1:3].numel()

    def thinned(self, weight: Tensor | None, start: int, stride: int) -> tuple[Rows, Tensor | None]:
        kept = every(self.values.shape[1:3], start, stride)
        return replace(self, values=self.values[(slice(None), *kept)]), None if weight is None else weight[
            (slice(None), *kept)
        ]

    def formed(self) -> DenseRows:
        return self

    def full(self) -> Tensor:
        """The rows with their ones."""
        if not self.one:
            return self.values
        ones = torch.ones(*self.values.shape[:-1], 1, dtype=self.values.dtype, device=self.values.device)
        return torch.cat([self.values, ones], dim=-1)

    def moment(self, sharing: Sharing, weight: Tensor | None, dense: bool) -> tuple[Tensor, Tensor]:
        if weight is None and isinstance(sharing, Expand):
            number = self.values.new_full((1,), self.values.shape[1:3].numel())
            if not dense:
                return torch.cat([(self.values**2).sum((1, 2)), *[number[None]] * self.one], -1), number
            return position_gram(self.values, self.one), number
        if weight is None:
            weight = self.values.new_ones(self.values.shape[:3])
        rows, weights = sharing.inputs(self.full(), weight)
        scaled = rows * weights.sqrt().unsqueeze(-1)
        return gram(scaled) if dense else (scaled**2).sum(1), weights.sum(1)

    def rotated(self, right: Tensor | None) -> DenseRows:
        if right is None:
            return self
        if self.one:
            return DenseRows(turned(self.values, right[:, :-1]) + right[:, None, -1:])
        return DenseRows(turned(self.values, right))

    def gradients(self, g: Tensor, data: slice) -> Tensor:
        piece = g[:, :, data].mT
        found = piece @ self.values[:, data]
        return torch.cat([found, piece.sum(-1, keepdim=True)], dim=-1) if self.one else found

    def squares(self, g: Tensor) -> Tensor:
        if g.shape[3] > 1:
            return super().squares(g)
        a = self.full()  # one position: the square of an outer product is the outer product of squares
        return ((g[..., 0, :] ** 2).sum(0)).mT @ a[..., 0, :] ** 2


@dataclass(frozen=True)
class OneHotRows(Rows):
    """Inputs that pick one of ``size`` rows of a table: indices ``(N, T)``."""

    indices: Tensor
    size: int
    dtype: torch.dtype

    @property
    def width(self) -> int:
        return self.size

    @property
    def number(self) -> int:
        return self.indices.numel()

    def moment(self, sharing: Sharing, weight: Tensor | None, dense: bool) -> tuple[Tensor, Tensor]:
        weight = torch.ones_like(self.indices, dtype=self.dtype) if weight is None else weight[0]
        total = torch.zeros(self.size, dtype=self.dtype, device=self.indices.device)
        if isinstance(sharing, Expand):
            total.index_add_(0, self.indices.flatten(), weight.flatten())
            return total[None], weight.sum().reshape(1)
        share, weights = sharing.shares(weight)  # of each position in its datum's average row
        pairs, where = torch.unique(self._keys(), return_inverse=True)
        entry = torch.zeros(len(pairs), dtype=self.dtype, device=self.indices.device)
        entry.index_add_(0, where, share.flatten())
        datum = pairs // self.size
        total.index_add_(0, pairs % self.size, weights[datum] * entry**2)
        return total[None], weights.sum().reshape(1)

    def rotated(self, right: Tensor | None) -> OneHotRows:
        if right is not None:
            raise ValueError("OneHotRows: one-hot rows stay in their own basis, expected None")
        return self

    def gradients(self, g: Tensor, data: slice) -> Tensor:
        g, indices = g[:, 0, data], self.indices[data]
        result = torch.zeros(g.shape[0], len(indices), self.size, g.shape[-1], dtype=g.dtype, device=g.device)
        index = indices[None, :, :, None].expand(g.shape)
        return result.scatter_add_(2, index, g).mT[:, None]

    def squares(self, g: Tensor) -> Tensor:
        g = g[:, 0].flatten(1, 2)  # (K, N T, out)
        pairs, where = torch.unique(self._keys(), return_inverse=True)
        per_pair = torch.zeros(g.shape[0], len(pairs), g.shape[2], dtype=g.dtype, device=g.device)
        per_pair.index_add_(1, where, g)
        result = torch.zeros(self.size, g.shape[2], dtype=g.dtype, device=g.device)
        result.index_add_(0, pairs % self.size, (per_pair**2).sum(0))
        return result.mT[None]

    def _keys(self) -> Tensor:
        data = torch.arange(len(self.indices), device=self.indices.device)
        return (self.indices + data[:, None] * self.size).flatten()


def joined(rows: Sequence[Rows]) -> Rows:
    """The rows of several uses of the same leaves as further positions."""
    first = rows[0]
    if len(rows) == 1:
        return first
    if isinstance(first, OneHotRows):
        indices = [row.indices for row in rows if isinstance(row, OneHotRows)]
        return replace(first, indices=torch.cat(indices, dim=1))
    formed = [row.formed() for row in rows]
    return DenseRows(torch.cat([row.values for row in formed], dim=2), formed[0].one)


def output_moment(sharing: Sharing, g: Tensor, dense: bool) -> Tensor:
    """Sum of outer products of rows of output gradients ``(K, groups, N, T, out)``, or its diagonal: ``(groups, out[, out])``."""
    if dense and isinstance(sharing, Expand):
        return position_gram(g.movedim(1, 0).flatten(1, 2))
    rows = sharing.outputs(g)
    return gram(rows) if dense else (rows**2).sum(1)


def position_gram(rows: Tensor, one: bool = False) -> Tensor:
    """:func:`gram` of ``(groups, N, T, d)`` over data and positions."""
    positions, width = rows.shape[-2:]
    if rows.stride(-2) != 1 or width == 1 or width > positions:
        return gram(rows.flatten(1, 2), one)
    inner = (rows.mT @ rows).sum(
        1
    )  # positions lie side by side, as in images: turning them around costs more
    if not one:
        return inner
    side = rows.sum((1, 2)).unsqueeze(-1)
    number = rows.new_full((len(rows), 1, 1), rows.shape[1:3].numel())
    return torch.cat([torch.cat([inner, side], dim=-1), torch.cat([side.mT, number], dim=-1)], dim=-2)


def sum_of_squares(gradients: Iterator[Tensor]) -> Tensor:
    """Sum over columns and data of the squares of ``(K, groups, n, out, in)``, which are overwritten."""
    total: Tensor | None = None
    for piece in gradients:
        if piece.shape[0] == piece.shape[2] == 1 and total is not None:
            total.addcmul_(piece[0, :, 0], piece[0, :, 0])
        else:
            squares = piece.square_().sum((0, 2))
            total = squares if total is None else total.add_(squares)
    assert total is not None
    return total


def turned(rows: Tensor, basis: Tensor | None) -> Tensor:
    """Rows ``(..., groups, N, T, d)`` times a matrix for each group, ``(groups, d, e)``, as one product for all positions."""
    if basis is None:
        return rows
    return (rows.flatten(-3, -2) @ basis).unflatten(-2, rows.shape[-3:-1])


def every(shape: Sequence[int], start: int, stride: int) -> tuple[slice, slice]:
    """Slices of data and positions, ``(N, T)``, that keep every ``stride``-th row: of the positions, if there are enough."""
    data, positions = shape
    if positions >= stride:
        return slice(None), slice(start % stride, None, stride)
    stride = min(stride, data)
    return slice(start % stride, None, stride), slice(None)


def chunks_of_data(g: Tensor, width: int) -> list[slice]:
    """Slices of data whose per-datum gradients, from output gradients ``(K, groups, N, T, out)``, take little memory."""
    columns, groups, data, positions, out = g.shape
    step = max(1, _CHUNK // max(1, groups * max(columns * out, positions) * width))
    return [slice(first, first + step) for first in range(0, data, step)]


def gram(rows: Tensor, one: bool = False) -> Tensor:
    """``X^T X`` of ``(groups, R, d)``, by panels so that little more than one triangle is computed.

    Args:
        rows: X; also transposed views.
        one: whether every row is meant to end with a one, which adds a row and a column of sums.
    """
    groups, number, width = rows.shape
    size = width + one
    if rows.is_cuda or width < _PANEL:  # small products gain nothing, a GPU is fastest with large ones
        inner = rows.mT @ rows
        if not one:
            return inner
        result = rows.new_empty(groups, size, size)
        result[:, :width, :width] = inner
    else:
        result = rows.new_empty(groups, size, size)
        for x, out in zip(rows, result[:, :width, :width], strict=True):
            for first in range(0, width, _PANEL):
                last = min(first + _PANEL, width)
                torch.mm(x[:, first:last].mT, x[:, first:], out=out[first:last, first:])
                out[last:, first:last] = out[first:last, last:].mT
    if one:
        result[:, :width, width] = result[:, width, :width] = rows.sum(1)
        result[:, width, width] = number
    return result


def factor_type(x: Tensor) -> Tensor:
    """Half precision raised to float32, in which factors are summed; indices as they are."""
    return x.float() if x.is_floating_point() and x.element_size() < 4 else x
