"""The truncated Neumann series, as damped Richardson iteration."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch

from weingarten import tree
from weingarten.operators import Operator
from weingarten.solvers.direct import relative
from weingarten.solvers.solver import DivergenceError, Solution, Solver
from weingarten.tree import Tree, TreeLike

__all__ = ["Neumann", "largest_eigenvalue"]


@final
@dataclass(frozen=True)
class Neumann(Solver):
    r"""``x = a sum_{k<K} (I - a P^{-1} A)^k P^{-1} b`` (Lorraine et al. 2020, https://arxiv.org/abs/1911.02590).

    Converges for ``0 < a < 2 / largest eigenvalue`` of ``P^{-1} A`` and A positive definite; each step costs one product.

    Args:
        steps: K, the number of terms.
        step: a; by default the inverse of the largest eigenvalue, estimated by ``power_steps`` further products.
        tol: stop when ``|b - A x| <= tol |b|``.
        preconditioner: an operator that applies ``P^{-1}``.
        power_steps: products spent on the eigenvalue; ten are within a few per cent, and a factor of two is allowed for.

    Raises (from ``solve``):
        DivergenceError: if the residual is larger at the end than at the start: the step is too long or A is indefinite.
    """

    steps: int = 20
    step: float | None = None
    tol: float = 1e-6
    preconditioner: Operator | None = None
    power_steps: int = 10

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.step is not None and not self.step > 0):
            raise ValueError(
                f"Neumann: steps is {self.steps} and step {self.step}, expected steps >= 1 and step > 0 (or None)"
            )

    def solve(self, operator: Operator, b: TreeLike, x0: TreeLike | None = None) -> Solution:
        operator.space.check(b, "Neumann.solve")
        size = tree.norm(b)
        if float(size) == 0:
            return Solution(tree.zeros_like(b), steps=0, residual=0.0, converged=True)
        if x0 is not None:
            operator.space.check(x0, "Neumann.solve, x0")
        step = (
            self.step
            if self.step is not None
            else 1 / largest_eigenvalue(operator, self.preconditioner, self.power_steps)
        )
        x: Tree = tree.zeros_like(b) if x0 is None else dict(x0)
        r: Tree = dict(b) if x0 is None else tree.sub(b, operator.apply(x))
        first, steps = self._size(r), 0
        while steps < self.steps and float(tree.norm(r)) > self.tol * float(size):
            z = r if self.preconditioner is None else self.preconditioner.apply(r)
            x, r = tree.axpy(step, z, x), tree.axpy(-step, operator.apply(z), r)
            steps += 1
        residual, last = relative(tree.norm(r), size), self._size(r)
        if not (last <= first or residual <= self.tol):
            raise DivergenceError(
                f"Neumann.solve: the residual grew from {first:.3g} to {last:.3g} in {steps} steps of {step:.3g}; leave "
                "step=None, raise the damping, or use GGN instead of an indefinite Hessian"
            )
        return Solution(x, steps, residual, converged=residual <= self.tol)

    def _size(self, r: Tree) -> float:
        """The norm that every step shortens: ``sqrt(r^T P^{-1} r)``."""
        if self.preconditioner is None:
            return float(tree.norm(r))
        return float(tree.dot(r, self.preconditioner.apply(r)).sqrt())

    def preconditioned(self, inverse: Operator) -> Neumann:
        return replace(self, preconditioner=inverse)


def largest_eigenvalue(operator: Operator, preconditioner: Operator | None = None, steps: int = 10) -> float:
    """Largest eigenvalue in size of ``A``, or of ``P^{-1} A``, by power iteration from a fixed start; approached from below.

    Raises:
        DivergenceError: if a product is zero or not finite.
    """
    generator = torch.Generator(device=operator.space.device).manual_seed(0)
    v = operator.space.randn(generator)
    value = 0.0
    for _ in range(steps):
        v = tree.scale(1 / tree.norm(v), v)
        v = operator.apply(v)
        if preconditioner is not None:
            v = preconditioner.apply(v)
        value = float(tree.norm(v))
        if not 0 < value < float("inf"):
            raise DivergenceError(
                f"largest_eigenvalue: a product has norm {value}, expected a finite number > 0"
            )
    return value
