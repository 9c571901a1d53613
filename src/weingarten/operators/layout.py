"""How the parameters of one block lie in a stack of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    r"""Leaves side by side in matrices ``(groups, out, in)``.

    Each leaf is reshaped to ``(groups, out_i, in_i)`` and the results are concatenated along the rows (``axis=1``) or the
    columns (``axis=2``): a weight with its bias appended as the last column is ``axis=2``. A ``transposed`` leaf swaps its axes
    first.

    Args:
        space: the leaves of the block in order.
        groups: number of independent matrices (groups of a grouped convolution), else 1.
        axis: where several leaves are joined.
        transposed: whether a two-dimensional leaf ``(in, out)`` is stored as its transpose (embeddings).
    """

    space: Space
    groups: int = 1
    axis: int = 2
    transposed: bool = False

    def merge(self, values: TreeLike) -> Tensor:
        """The leaves as one tensor ``(groups, out, in)``."""
        return torch.cat([self._to_matrix(values[name]) for name in self.space.shapes], dim=self.axis)

    def split(self, matrix: Tensor) -> Tree:
        """The inverse of :meth:`merge`, each leaf in its own shape and type."""
        result, first = {}, 0
        for name, shape in self.space.shapes.items():
            size = self._matrix_shape(shape)[self.axis]
            piece = matrix.narrow(self.axis - 3, first, size)
            first += size
            leaf = piece[0].mT if self.transposed else piece
            result[name] = leaf.reshape(shape).to(self.space.dtypes[name])
        return result

    def _to_matrix(self, leaf: Tensor) -> Tensor:
        if self.transposed:
            return leaf.mT.unsqueeze(0)
        return leaf.reshape(self._matrix_shape(leaf.shape))

    def _matrix_shape(self, shape: torch.Size) -> tuple[int, int, int]:
        if self.transposed:
            return (1, shape[1], shape[0])
        if self.axis == 1:
            return (self.groups, prod(shape) // self.groups, 1)
        rows = shape[0] // self.groups
        return (self.groups, rows, prod(shape[1:]))
