"""No curvature at all: the identity in place of the inverse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from weingarten.operators import Operator
from weingarten.solvers.solver import Solution, Solver
from weingarten.tree import TreeLike

__all__ = ["FirstOrder"]


@final
@dataclass(frozen=True)
class FirstOrder(Solver):
    """``x = b``: T1-T2 (Luketina et al. 2016) and first-order DARTS. Not a solution; no product, residual unknown."""

    def solve(self, operator: Operator, b: TreeLike, x0: TreeLike | None = None) -> Solution:
        operator.space.check(b, "FirstOrder.solve")
        return Solution(dict(b), steps=0, residual=float("nan"), converged=False)
