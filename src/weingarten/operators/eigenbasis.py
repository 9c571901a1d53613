"""One block as two rotations and a spectrum: the storage of EKFAC and of matrix functions of KFAC."""

from __future__ import annotations

from typing import final

from torch import Tensor

from weingarten.matfun import MatrixFunction, on_spectrum
from weingarten.operators.factor import product_type, times_left, times_right
from weingarten.operators.layout import Layout
from weingarten.operators.operator import Curvature
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Eigenbasis"]


@final
class Eigenbasis(Curvature):
    r"""``(L (x) R) diag(spectrum) (L (x) R)^T`` on matrices ``W`` of shape (out, in): ``W -> L (spectrum * (L^T W R)) R^T``.

    George et al. 2018, https://arxiv.org/abs/1806.03884. Rotations may be kept in half precision while the spectrum stays in
    float32, so that small eigenvalues and the damping keep their digits.

    Args:
        layout: where the leaves lie in the matrices.
        left: orthogonal ``(groups, out, out)``, or None for the identity (heads over a vocabulary).
        right: orthogonal ``(groups, in, in)``, or None for the identity (embeddings).
        spectrum: ``(groups, out, in)``, >= 0.

    Raises:
        ValueError: if a shape is not the one that the layout asks for.
    """

    def __init__(self, layout: Layout, left: Tensor | None, right: Tensor | None, spectrum: Tensor) -> None:
        groups, rows, columns = layout.shape
        expected = {
            "left": (groups, rows, rows),
            "right": (groups, columns, columns),
            "spectrum": layout.shape,
        }
        for (name, shape), value in zip(expected.items(), (left, right, spectrum), strict=True):
            if value is not None and value.shape != shape:
                raise ValueError(
                    f"Eigenbasis: {name} has shape {tuple(value.shape)}, expected {shape}; sizes follow from the layout"
                )
        self.layout, self.left, self.right, self.spectrum = layout, left, right, spectrum

    @property
    def space(self) -> Space:
        return self.layout.space

    def rotate(self, w: Tensor) -> Tensor:
        """``L^T W R``: coordinates of matrices ``(groups, out, in)`` in the eigenbasis."""
        w = w if self.left is None else times_left(self.left.mT, w)
        return w if self.right is None else times_right(w, self.right)

    def rotate_back(self, w: Tensor) -> Tensor:
        """``L W R^T``, the inverse of :meth:`rotate`."""
        w = w if self.left is None else times_left(self.left, w)
        return w if self.right is None else times_right(w, self.right.mT)

    def apply(self, v: TreeLike) -> Tree:
        self.space.check(v, "Eigenbasis.apply")
        rotations = (self.left, self.right)
        dtype = product_type(*(rotations if any(r is not None for r in rotations) else (self.spectrum,)))
        w = self.rotate(self.layout.merge(v).to(dtype))
        return self.layout.split(self.rotate_back((self.spectrum * w).to(dtype)))

    def map(self, function: MatrixFunction) -> Eigenbasis:
        return Eigenbasis(self.layout, self.left, self.right, on_spectrum(function, self.spectrum))

    def trace(self) -> Tensor:
        return self.spectrum.sum()

    def diag(self) -> Tree:
        squares = self.spectrum
        if self.left is not None:
            squares = times_left(self.left.to(squares.dtype) ** 2, squares)
        if self.right is not None:
            squares = times_right(squares, self.right.mT.to(squares.dtype) ** 2)
        return self.layout.split(squares)
