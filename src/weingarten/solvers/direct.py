"""Solve exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from weingarten import tree
from weingarten.matfun import SingularMatrixError
from weingarten.operators import Curvature, Operator
from weingarten.solvers.solver import Solution, Solver
from weingarten.tree import TreeLike

__all__ = ["Direct"]


@final
@dataclass(frozen=True)
class Direct(Solver):
    """Through the spectrum of a curvature; otherwise through the dense matrix, P products and O(P^3): an oracle.

    Args:
        max_size: largest number of parameters for which a dense matrix is formed.
    """

    max_size: int = 5000

    def solve(self, operator: Operator, b: TreeLike, x0: TreeLike | None = None) -> Solution:
        """As the protocol; raises ``ValueError`` above ``max_size`` and ``SingularMatrixError`` for a singular operator."""
        space = operator.space
        space.check(b, "Direct.solve")
        negative = False
        if isinstance(operator, Curvature):
            value = operator.solve(b)
        else:
            if space.size > self.max_size:
                raise ValueError(
                    f"Direct.solve: the operator has {space.size} parameters, expected at most max_size={self.max_size}; use CG"
                )
            matrix = operator.dense()
            matrix = (matrix + matrix.mT) / 2
            flat, negative = _solve_symmetric(matrix, space.flatten(b))
            value = space.unflatten(flat)
        residual = relative(tree.norm(tree.sub(b, operator.apply(value))), tree.norm(b))
        return Solution(
            value, steps=1, residual=residual, converged=residual < 1e-2, negative_curvature=negative
        )


def _solve_symmetric(matrix: Tensor, b: Tensor) -> tuple[Tensor, bool]:
    """The solution, and whether an eigenvalue is negative; by Cholesky where the matrix is well conditioned."""
    tolerance = len(matrix) * torch.finfo(matrix.dtype).eps
    factor, failed = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal()
    if int(failed) == 0 and float(pivots.min()) ** 2 > tolerance**0.5 * float(pivots.max()) ** 2:
        return torch.cholesky_solve(b[:, None], factor)[:, 0], False
    spectrum, basis = torch.linalg.eigh(matrix)
    smallest, largest = float(spectrum.abs().min()), float(spectrum.abs().max())
    if not smallest > tolerance * largest:
        raise SingularMatrixError(
            f"Direct.solve: the smallest eigenvalue is {smallest:.2g} in size at a largest of {largest:.2g}, which is singular "
            f"at {matrix.dtype}; add damping * Identity(operator.space)"
        )
    return basis @ ((basis.mT @ b) / spectrum), float(spectrum[0]) < 0


def relative(residual: Tensor, size: Tensor) -> float:
    """``residual / size``, zero for a zero right-hand side."""
    return 0.0 if float(size) == 0 else float(residual / size)
