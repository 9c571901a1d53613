"""Conjugate gradients with a preconditioner."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

from torch import Tensor

from weingarten import tree
from weingarten.operators import Operator
from weingarten.solvers.direct import relative
from weingarten.solvers.solver import Solution, Solver
from weingarten.tree import Tree, TreeLike

__all__ = ["CG"]


@final
@dataclass(frozen=True)
class CG(Solver):
    r"""Preconditioned conjugate gradients (Hestenes and Stiefel 1952; Nocedal and Wright 2006, algorithm 5.3).

    One step from zero is ``(b^T z / z^T A z) z`` with ``z = P^{-1} b``: the preconditioner's direction with the length that is
    best in the A-norm. The iteration stops at negative curvature and says so; if that is met in the first step from zero, the
    value is the preconditioned right-hand side itself, since no length along it is better than another.

    Args:
        steps: at most so many products.
        tol: stop when ``|b - A x| <= tol |b|``.
        preconditioner: an operator that applies ``P^{-1}``, such as ``curvature.power(-1, damping)``; default none.
    """

    steps: int = 10
    tol: float = 1e-6
    preconditioner: Operator | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(
                f"CG: steps is {self.steps}, expected >= 1; for no product at all use FirstOrder or a Curvature's solve"
            )

    def solve(self, operator: Operator, b: TreeLike, x0: TreeLike | None = None) -> Solution:
        operator.space.check(b, "CG.solve")
        size = tree.norm(b)
        if float(size) == 0:
            return Solution(tree.zeros_like(b), steps=0, residual=0.0, converged=True)
        if x0 is not None:
            operator.space.check(x0, "CG.solve, x0")
        x: Tree = tree.zeros_like(b) if x0 is None else dict(x0)
        r: Tree = dict(b) if x0 is None else tree.sub(b, operator.apply(x))
        p, rz, negative, steps = None, None, False, 0
        while steps < self.steps and float(tree.norm(r)) > self.tol * float(size):
            z = r if self.preconditioner is None else self.preconditioner.apply(r)
            rz, p = _direction(r, z, rz, p)
            product = operator.apply(p)
            curvature = tree.dot(p, product)
            if not float(curvature) > 0:
                negative = float(curvature) <= 0  # and not NaN
                if steps == 0 and x0 is None:
                    x = p
                    r = tree.sub(b, product)
                break
            alpha = rz / curvature
            x, r = tree.axpy(alpha, p, x), tree.axpy(-alpha, product, r)
            steps += 1
        residual = relative(tree.norm(r), size)
        return Solution(x, steps, residual, converged=residual <= self.tol, negative_curvature=negative)

    def preconditioned(self, inverse: Operator) -> CG:
        return replace(self, preconditioner=inverse)


def _direction(r: Tree, z: Tree, rz: Tensor | None, p: Tree | None) -> tuple[Tensor, Tree]:
    """``r^T z`` and the next search direction ``z + beta p`` with ``beta`` from the *new* residual over the old."""
    new = tree.dot(r, z)
    return (new, z) if p is None or rz is None else (new, tree.axpy(new / rz, p, z))
