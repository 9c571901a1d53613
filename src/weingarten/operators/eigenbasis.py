"""One block as two rotations and a spectrum: the storage of EKFAC and of matrix functions of KFAC."""

from __future__ import annotations

from typing import final

from torch import Tensor

from weingarten.matfun import MatrixFunction
from weingarten.operators.layout import Layout
from weingarten.operators.operator import Curvature
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Eigenbasis"]


@final
class Eigenbasis(Curvature):
    r"""``(L (x) R) diag(spectrum) (L (x) R)^T`` on matrices ``W`` of shape (out, in): ``W -> L (spectrum * (L^T W R)) R^T``.

    George et al. 2018, https://arxiv.org/abs/1806.03884.

    Args:
        layout: where the leaves lie in the matrices.
        left: orthogonal ``(groups, out, out)``.
        right: orthogonal ``(groups, in, in)``, or None for the identity (embeddings).
        spectrum: ``(groups, out, in)``, >= 0.
    """

    def __init__(self, layout: Layout, left: Tensor, right: Tensor | None, spectrum: Tensor) -> None:
        self.layout, self.left, self.right, self.spectrum = layout, left, right, spectrum

    @property
    def space(self) -> Space:
        return self.layout.space

    def rotate(self, w: Tensor) -> Tensor:
        """``L^T W R``: coordinates of matrices ``(..., groups, out, in)`` in the eigenbasis."""
        w = self.left.mT @ w
        return w if self.right is None else w @ self.right

    def rotate_back(self, w: Tensor) -> Tensor:
        """``L W R^T``, the inverse of :meth:`rotate`."""
        w = self.left @ w
        return w if self.right is None else w @ self.right.mT

    def apply(self, v: TreeLike) -> Tree:
        self.space.check(v, "Eigenbasis.apply")
        w = self.rotate(self.layout.merge(v).to(self.spectrum.dtype))
        return self.layout.split(self.rotate_back(self.spectrum * w))

    def map(self, function: MatrixFunction) -> Eigenbasis:
        return Eigenbasis(self.layout, self.left, self.right, function(self.spectrum))

    def trace(self) -> Tensor:
        return self.spectrum.sum()

    def diag(self) -> Tree:
        rows = self.left**2 @ self.spectrum
        return self.layout.split(rows if self.right is None else rows @ (self.right**2).mT)
