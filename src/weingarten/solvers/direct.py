"""Solve exactly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from weingarten import tree
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
            factor, failed = torch.linalg.cholesky_ex(matrix)
            flat = space.flatten(b)
            if int(failed) == 0:
                value = space.unflatten(torch.cholesky_solve(flat[:, None], factor)[:, 0])
            else:
                negative = True
                value = space.unflatten(torch.linalg.solve(matrix, flat))
        residual = relative(tree.norm(tree.sub(b, operator.apply(value))), tree.norm(b))
        return Solution(value, steps=1, residual=residual, converged=residual < 1e-2, negative_curvature=negative)


def relative(residual: torch.Tensor, size: torch.Tensor) -> float:
    """``residual / size``, zero for a zero right-hand side."""
    return float(residual / size) if float(size) > 0 else 0.0
