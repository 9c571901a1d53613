"""The minimal residual method."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import hypot
from typing import final

import torch

from weingarten import tree
from weingarten.operators import Operator
from weingarten.solvers.solver import Solution, Solver
from weingarten.tree import Tree, TreeLike

__all__ = ["MINRES"]


@final
@dataclass(frozen=True)
class MINRES(Solver):
    r"""Minimal residuals for symmetric A, indefinite or singular (Paige and Saunders 1975, https://doi.org/10.1137/0712047).

    Step k minimises ``|b - A x|`` over the Krylov space of k products from ``x0``, so that the residual never grows; with a
    preconditioner, ``sqrt(r^T P^{-1} r)`` over the preconditioned space (Elman, Silvester and Wathen 2014, algorithm 4.1). A
    singular system is solved if it is consistent; otherwise the iteration ends, not converged, at a least-squares solution:
    where ``|A r| <= eps^(3/4) |A| |r|``, which leaves a direction ``r`` without curvature.

    ``negative_curvature`` says whether A restricted to the Krylov space is not positive definite. The method knows that at no
    cost: the pivots of the Lanczos matrix are then not all positive, and at the first such step the residual itself has
    ``r^T A r <= 0`` (Liu and Roosta 2022, https://arxiv.org/abs/2206.05732). Negative eigenvalues without share in ``b - A x0``,
    and those not reached yet, stay unseen.

    Args:
        steps: at most so many products.
        tol: stop when ``|b - A x| <= tol |b|``.
        preconditioner: an operator that applies ``P^{-1}``, symmetric positive definite whatever A is; default none.

    Raises (from ``solve``):
        ValueError: if the preconditioner is seen not to be positive definite.
    """

    steps: int = 10
    tol: float = 1e-6
    preconditioner: Operator | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(
                f"MINRES: steps is {self.steps}, expected >= 1; for no product at all use FirstOrder"
            )

    def solve(self, operator: Operator, b: TreeLike, x0: TreeLike | None = None) -> Solution:
        operator.space.check(b, "MINRES.solve")
        size = float(tree.norm(b))
        if size == 0:
            return Solution(tree.zeros_like(b), steps=0, residual=0.0, converged=True)
        if x0 is not None:
            operator.space.check(x0, "MINRES.solve, x0")
        x: Tree = tree.zeros_like(b) if x0 is None else dict(x0)
        r: Tree = dict(b) if x0 is None else tree.sub(b, operator.apply(x))
        eps, negative, steps = torch.finfo(operator.space.dtype).eps, False, 0
        tiny = eps**0.75  # beside |A|, the rounding error of Lanczos vectors
        v, v_old = r, tree.zeros_like(b)  # Lanczos vectors, times gamma
        z, gamma = self._dual(v)
        w, w_old, eta, gamma_old, scale = tree.zeros_like(b), tree.zeros_like(b), gamma, 1.0, 0.0
        (c, s), (c_old, s_old) = (1.0, 0.0), (1.0, 0.0)  # the last two rotations
        while steps < self.steps and gamma > tiny * scale and float(tree.norm(r)) > self.tol * size:
            q = tree.scale(1 / gamma, z)
            product = operator.apply(q)
            delta = float(tree.dot(q, product))
            v_new = tree.axpy(-delta / gamma, v, tree.axpy(-gamma / gamma_old, v_old, product))
            z, gamma_new = self._dual(v_new)
            pivot = c * delta - c_old * s * gamma
            second, third = s * delta + c_old * c * gamma, s_old * gamma
            diagonal = hypot(pivot, gamma_new)
            scale = max(scale, abs(delta), gamma_new)
            negative |= pivot <= eps * scale
            if hypot(pivot, c * gamma_new) <= tiny * scale:  # |A r| / |r|: no vector of the space shortens r
                negative = True
                break
            (c_old, s_old), (c, s) = (c, s), (pivot / diagonal, gamma_new / diagonal)
            w_old, w = w, tree.scale(1 / diagonal, tree.axpy(-second, w, tree.axpy(-third, w_old, q)))
            x = tree.axpy(c * eta, w, x)
            r = tree.axpy(-eta * c / diagonal, v_new, tree.scale(s**2, r))
            eta, v_old, v, gamma_old, gamma = -s * eta, v, v_new, gamma, gamma_new
            steps += 1
        residual = float(tree.norm(r)) / size
        return Solution(x, steps, residual, converged=residual <= self.tol, negative_curvature=negative)

    def _dual(self, v: Tree) -> tuple[Tree, float]:
        """``P^{-1} v`` and ``sqrt(v^T P^{-1} v)``."""
        if self.preconditioner is None:
            return v, float(tree.norm(v))
        z = self.preconditioner.apply(v)
        square, bound = float(tree.dot(v, z)), float(tree.norm(v) * tree.norm(z))
        if square < -(torch.finfo(v[next(iter(v))].dtype).eps ** 0.5) * bound:  # and not by rounding
            raise ValueError(
                f"MINRES.solve: the preconditioner has v^T P^-1 v = {square:.3g} for a v, expected > 0; use the inverse of a "
                "Curvature with damping > 0"
            )
        return z, max(square, 0.0) ** 0.5

    def preconditioned(self, inverse: Operator) -> MINRES:
        return replace(self, preconditioner=inverse)
