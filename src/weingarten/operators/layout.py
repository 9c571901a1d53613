"""How the parameters of one block lie in a stack of matrices."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Layout"]


@dataclass(frozen=True)
class Layout:
    r"""Leaves side by side in matrices ``(groups, out, in)``.

    Each leaf becomes a stack ``(groups, out_i, in_i)``, and these are joined along the columns (``axis=2``) or the rows
    (``axis=1``):

    ===================  =====================================  ====================================================
    leaf                 as stored (``transposed=False``)       inputs first (``transposed=True``)
    ===================  =====================================  ====================================================
    two axes and more    ``(out, in / groups, *kernel)`` to     ``(in, out / groups, *kernel)`` to
                         ``(groups, out / groups, rest)``       ``(groups, out / groups, in / groups * kernel)``
    one axis, ``axis=2`` ``(out,)`` to ``(groups, out / groups, 1)``, the bias as last column
    one axis, ``axis=1`` ``(n,)`` to ``(groups, n / groups, 1)``  ``(n,)`` to ``(groups, 1, n / groups)``, as last row
    ===================  =====================================  ====================================================

    ``transposed`` so covers embeddings ``(V, d)``, layers that multiply from the right (a weight ``(in, out)``), transposed
    convolutions, and, with ``axis=1``, a head ``(V, d)`` with bias ``(V,)`` stored the other way round, as ``(1, d + 1, V)``.

    Args:
        space: the leaves of the block in order.
        groups: number of independent matrices (groups of a grouped convolution), else 1.
        axis: where several leaves are joined.
        transposed: whether the first axis of a leaf counts the columns of the matrix.

    >>> layout = Layout(Space.of({"w": torch.zeros(3, 2), "b": torch.zeros(2)}), transposed=True)
    >>> layout.shape
    (1, 2, 4)
    """

    space: Space
    groups: int = 1
    axis: int = 2
    transposed: bool = False

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Of the joined matrices: ``(groups, out, in)``."""
        joined = list(self._leaves[0][-1])
        joined[self.axis] = sum(self._sizes)
        return (joined[0], joined[1], joined[2])

    def merge(self, values: TreeLike) -> Tensor:
        """The leaves as one tensor ``(groups, out, in)``, a view where there is one leaf only."""
        found = [
            self._swapped(values[name], piece) if swap else values[name].reshape(piece)
            for name, _, _, swap, piece in self._leaves
        ]
        return found[0] if len(found) == 1 else torch.cat(found, self.axis)

    def split(self, matrix: Tensor) -> Tree:
        """The inverse of :meth:`merge`, each leaf in its own shape and type."""
        sizes = self._sizes
        pieces = (matrix,) if len(sizes) == 1 else matrix.split_with_sizes(sizes, self.axis)
        result: Tree = {}
        for (name, shape, dtype, swap, _), piece in zip(self._leaves, pieces, strict=True):
            leaf = self._swapped_back(piece, shape) if swap else piece.reshape(shape)
            result[name] = leaf if leaf.dtype == dtype else leaf.to(dtype)
        return result

    def _swapped(self, leaf: Tensor, piece: tuple[int, int, int]) -> Tensor:
        """From ``(in, out / groups, *kernel)`` to ``(groups, out / groups, in / groups * kernel)``."""
        leaf = leaf.reshape(self.groups, -1, piece[1], prod(leaf.shape[2:]))
        return leaf.transpose(1, 2).reshape(piece)

    def _swapped_back(self, piece: Tensor, shape: torch.Size) -> Tensor:
        piece = piece.reshape(self.groups, shape[1], -1, prod(shape[2:]))
        return piece.transpose(1, 2).reshape(shape)

    @cached_property
    def _leaves(self) -> list[tuple[str, torch.Size, torch.dtype, bool, tuple[int, int, int]]]:
        """Name, shape, type, whether the axes are swapped, and the shape of its matrices, for each leaf."""
        return [
            (
                name,
                shape,
                self.space.dtypes[name],
                self.transposed and len(shape) > 1,
                self._matrix_shape(shape),
            )
            for name, shape in self.space.shapes.items()
        ]

    @cached_property
    def _sizes(self) -> list[int]:
        """The length of each leaf's matrices along the axis on which they are joined."""
        return [piece[self.axis] for *_, piece in self._leaves]

    def _matrix_shape(self, shape: torch.Size) -> tuple[int, int, int]:
        size, groups = prod(shape), self.groups
        if self.transposed:
            if len(shape) > 1:
                return (groups, shape[1], size // (groups * shape[1]))
            return (groups, 1, size // groups) if self.axis == 1 else (groups, size // groups, 1)
        if self.axis == 1:
            return (groups, size // groups, 1)
        return (groups, shape[0] // groups, prod(shape[1:]))
