"""Layer inputs in the two forms that occur: dense rows, and one-hot rows kept as indices."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from weingarten.layers.sharing import Reduce, Sharing
from weingarten.operators import Eigenbasis

__all__ = ["DenseRows", "OneHotRows", "Rows", "factor_type", "gram"]

_CHUNK = 2**24  # entries of per-datum gradients held at once


class Rows(ABC):
    """The inputs of one layer for one batch, with the second moments that are taken of them."""

    @abstractmethod
    def moment(self, sharing: Sharing) -> tuple[Tensor, int]:
        """Sum of outer products over rows (or its diagonal), and the number of rows."""

    @abstractmethod
    def rotated(self, right: Tensor | None) -> Rows:
        """The rows in another basis of the inputs, ``(groups, in, in)``; None for the one they are in."""

    @abstractmethod
    def squares(self, g: Tensor) -> Tensor:
        """Sum over data and columns of squared per-datum gradients, ``(groups, out, in)``.

        Args:
            g: output gradients ``(K, groups, N, T, out)``.
        """

    def spectrum(self, basis: Eigenbasis, g: Tensor) -> Tensor:
        """:meth:`squares` in an eigenbasis."""
        return self.rotated(basis.right).squares(g @ basis.left.unsqueeze(1))


@dataclass(frozen=True)
class DenseRows(Rows):
    """Inputs ``(groups, N, T, in)``."""

    values: Tensor

    def moment(self, sharing: Sharing) -> tuple[Tensor, int]:
        rows = sharing.inputs(self.values)
        return gram(rows), rows.shape[1]

    def rotated(self, right: Tensor | None) -> DenseRows:
        return self if right is None else DenseRows(self.values @ right.unsqueeze(1))

    def squares(self, g: Tensor) -> Tensor:
        a = self.values
        if g.shape[3] == 1:  # one position: the square of an outer product is the outer product of squares
            return ((g[..., 0, :] ** 2).sum(0)).mT @ a[..., 0, :] ** 2
        result = torch.zeros(g.shape[1], g.shape[-1], a.shape[-1], dtype=a.dtype, device=a.device)
        step = max(1, _CHUNK // max(1, g.shape[0] * result.numel()))
        for first in range(0, g.shape[2], step):
            piece = slice(first, first + step)
            gradients = g[:, :, piece].mT @ a[:, piece]  # (K, groups, n, out, in)
            result += (gradients**2).sum((0, 2))
        return result


@dataclass(frozen=True)
class OneHotRows(Rows):
    """Inputs that pick one of ``size`` rows of a table: indices ``(N, T)``; ``ignored`` picks none (padding)."""

    indices: Tensor
    size: int
    dtype: torch.dtype
    ignored: int | None = None

    def moment(self, sharing: Sharing) -> tuple[Tensor, int]:
        if isinstance(sharing, Reduce):
            counts = self._pair_counts()
            squares = (counts[1].to(self.dtype) / self.indices.shape[1]) ** 2
            total = torch.zeros(self.size, dtype=self.dtype, device=self.indices.device)
            return total.index_add_(0, counts[0] % self.size, squares)[None], len(self.indices)
        kept = self._kept(self.indices.flatten())
        return torch.bincount(kept, minlength=self.size).to(self.dtype)[None], kept.numel()

    def rotated(self, right: Tensor | None) -> OneHotRows:
        if right is not None:
            raise ValueError("OneHotRows: one-hot rows stay in their own basis, expected None")
        return self

    def squares(self, g: Tensor) -> Tensor:
        g = g[:, 0].flatten(1, 2)  # (K, N T, out)
        keys = self._keys()
        keep = (
            torch.ones_like(keys, dtype=torch.bool)
            if self.ignored is None
            else keys % self.size != self.ignored
        )
        pairs, where = torch.unique(keys[keep], return_inverse=True)
        per_pair = torch.zeros(g.shape[0], len(pairs), g.shape[2], dtype=g.dtype, device=g.device)
        per_pair.index_add_(1, where, g[:, keep])
        result = torch.zeros(self.size, g.shape[2], dtype=g.dtype, device=g.device)
        result.index_add_(0, pairs % self.size, (per_pair**2).sum(0))
        return result.mT[None]

    def _keys(self) -> Tensor:
        data = torch.arange(len(self.indices), device=self.indices.device)
        return (self.indices + data[:, None] * self.size).flatten()

    def _pair_counts(self) -> tuple[Tensor, Tensor]:
        keys = self._keys()
        if self.ignored is not None:
            keys = keys[keys % self.size != self.ignored]
        pairs, counts = torch.unique(keys, return_counts=True)
        return pairs, counts

    def _kept(self, flat: Tensor) -> Tensor:
        return flat if self.ignored is None else flat[flat != self.ignored]


def gram(rows: Tensor) -> Tensor:
    """``X^T X`` of ``(..., R, d)``, in blocks so that only one triangle is computed where that pays."""
    width = rows.shape[-1]
    if width < 384:
        return rows.mT @ rows
    half = width // 2
    first, second = rows[..., :half], rows[..., half:]
    off = first.mT @ second
    top = torch.cat([gram(first), off], dim=-1)
    return torch.cat([top, torch.cat([off.mT, gram(second)], dim=-1)], dim=-2)


def factor_type(x: Tensor) -> Tensor:
    """Half precision raised to float32, in which factors are summed; indices as they are."""
    return x.float() if x.is_floating_point() and x.element_size() < 4 else x
