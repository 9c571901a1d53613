"""One block as a Kronecker product of two factors."""

from __future__ import annotations

from math import prod
from typing import final

import torch
from torch import Tensor

from weingarten.matfun import FactoredPower, MatrixFunction, Power, Scale, evaluate
from weingarten.operators.eigenbasis import Eigenbasis
from weingarten.operators.layout import Layout
from weingarten.operators.operator import Curvature
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Kronecker"]


@final
class Kronecker(Curvature):
    r"""``B (x) A`` on matrices ``W`` of shape (out, in): ``W -> B W A`` (row-major vec; output factor first).

    Matrix functions go through the two small eigendecompositions and give an :class:`Eigenbasis`; ``Scale`` and
    ``FactoredPower`` stay Kronecker products.

    Args:
        layout: where the leaves lie in the matrices.
        inputs: input factor A, ``(groups, in, in)``, or its diagonal ``(groups, in)`` when it is diagonal (embeddings).
        outputs: output factor B, ``(groups, out, out)``.
    """

    def __init__(self, layout: Layout, inputs: Tensor, outputs: Tensor) -> None:
        self.layout, self.inputs, self.outputs = layout, inputs, outputs

    @property
    def space(self) -> Space:
        return self.layout.space

    def apply(self, v: TreeLike) -> Tree:
        self.space.check(v, "Kronecker.apply")
        w = self.layout.merge(v).to(self.outputs.dtype)
        right = w * self.inputs.unsqueeze(-2) if self._diagonal_inputs else w @ self.inputs
        return self.layout.split(self.outputs @ right)

    def map(self, function: MatrixFunction) -> Curvature:
        if isinstance(function, Scale):
            return Kronecker(self.layout, self.inputs, function.factor * self.outputs)
        if isinstance(function, FactoredPower):
            return self._factored(function)
        return self.diagonalise().map(function)

    def trace(self) -> Tensor:
        return (self._input_diagonal.sum(-1) * self.outputs.diagonal(dim1=-2, dim2=-1).sum(-1)).sum()

    def diag(self) -> Tree:
        b = self.outputs.diagonal(dim1=-2, dim2=-1)
        return self.layout.split(b.unsqueeze(-1) * self._input_diagonal.unsqueeze(-2))

    def diagonalise(self) -> Eigenbasis:
        """The same operator as two rotations and the outer product of the factors' eigenvalues."""
        b, left = torch.linalg.eigh(self.outputs)
        if self._diagonal_inputs:
            return Eigenbasis(
                self.layout, left, None, b.clamp(min=0).unsqueeze(-1) * self.inputs.unsqueeze(-2)
            )
        a, right = torch.linalg.eigh(self.inputs)
        return Eigenbasis(
            self.layout, left, right, b.clamp(min=0).unsqueeze(-1) * a.clamp(min=0).unsqueeze(-2)
        )

    def _factored(self, function: FactoredPower) -> Kronecker:
        a, b = self._input_diagonal.mean(-1), self.outputs.diagonal(dim1=-2, dim2=-1).mean(-1)
        known = (a > 0) & (b > 0)
        pi = torch.where(known, a.clamp(min=1e-30) / b.clamp(min=1e-30), 1.0).sqrt()
        shift_a, shift_b = pi * function.damping**0.5, function.damping**0.5 / pi
        power = Power(function.exponent)
        outputs = evaluate(power, _shifted(self.outputs, shift_b))
        if self._diagonal_inputs:
            return Kronecker(self.layout, power(self.inputs + shift_a.unsqueeze(-1)), outputs)
        return Kronecker(self.layout, evaluate(power, _shifted(self.inputs, shift_a)), outputs)

    @property
    def _diagonal_inputs(self) -> bool:
        return self.inputs.ndim == self.outputs.ndim - 1

    @property
    def _input_diagonal(self) -> Tensor:
        return self.inputs if self._diagonal_inputs else self.inputs.diagonal(dim1=-2, dim2=-1)

    def __repr__(self) -> str:
        """Leaves and sizes of the factors."""
        out, size = self.outputs.shape[-1], prod(self.space.shapes[n].numel() for n in self.space.shapes)
        return (
            f"Kronecker({', '.join(self.space.shapes)}: {out} x {self.inputs.shape[-1]}, {size} parameters)"
        )


def _shifted(matrix: Tensor, shift: Tensor) -> Tensor:
    result = matrix.clone()
    result.diagonal(dim1=-2, dim2=-1).add_(shift.unsqueeze(-1))
    return result
