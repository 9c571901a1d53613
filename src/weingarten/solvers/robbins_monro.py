"""Stochastic approximation: one random batch per step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import final

import torch

from weingarten import tree
from weingarten.operators import Operator
from weingarten.solvers.direct import relative
from weingarten.solvers.neumann import largest_eigenvalue
from weingarten.solvers.solver import DivergenceError, Solution, Solver
from weingarten.tree import Tree, TreeLike

__all__ = ["RobbinsMonro"]


@final
@dataclass(frozen=True)
class RobbinsMonro(Solver):
    r"""``x_{t+1} = x_t + a P^{-1} (b - A_t x_t)`` with random ``A_t``, ``E A_t = A``; returns the mean of the second half.

    Stochastic gradient descent on ``x^T A x / 2 - b^T x`` (Robbins and Monro 1951, https://doi.org/10.1214/aoms/1177729586), the
    inner solver of stochastic bilevel methods (Ghadimi and Wang 2018, https://arxiv.org/abs/1802.02246; Arbel and Mairal 2021,
    https://arxiv.org/abs/2111.14580; Dagreou et al. 2022, https://arxiv.org/abs/2201.13409). ``A_t`` is ``operator.draw()``:
    for ``GGN`` and ``Hessian`` over a list of batches the product of *one* batch, drawn in proportion to its rows; a multiple
    of the identity added to them stays as it is. Any other operator is its own draw, and the iterates are then Neumann's.

    With a constant step the iterates themselves keep a distance to the solution that is proportional to the step, but their
    stationary mean is exact, since ``A_t`` does not depend on ``x_t``: the tail average converges as ``1 / sqrt(steps)`` (Polyak
    and Juditsky 1992, https://doi.org/10.1137/0330046; Bach and Moulines 2013, https://arxiv.org/abs/1306.2119), and the first
    half, which remembers ``x0``, is left out (Jain et al. 2018, https://arxiv.org/abs/1610.03774).

    Costs ``steps`` products with draws, ``4 power_steps`` for the default step, and one product with A itself for the residual
    reported (of the average). Where ``|b - A_t x_t| <= tol |b|``, one more tells whether ``x_t`` is the solution.

    Args:
        steps: number of draws.
        step: a; by default the inverse of the largest eigenvalue of four draws of ``P^{-1} A_t``. Stable below
            ``2 / max_t eigenvalue``, where the maximum is over the draws and not of their mean.
        tol: stop when ``|b - A x| <= tol |b|``.
        preconditioner: an operator that applies ``P^{-1}``.
        power_steps: products spent on the eigenvalue of each of the four draws.
        generator: draws; default: a fresh one with seed 0 in every call, so that results repeat. Pass one, which then moves
            on, where calls follow each other with few steps, as with warm starts: else each sees the same few batches.

    Raises (from ``solve``):
        DivergenceError: if the residual at the end is larger than both that of ``x0`` and that of zero.
        TypeError: if the operator's batches are in a loader, not in a list.
    """

    steps: int = 200
    step: float | None = None
    tol: float = 1e-6
    preconditioner: Operator | None = None
    power_steps: int = 10
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.step is not None and not self.step > 0):
            raise ValueError(
                f"RobbinsMonro: steps is {self.steps} and step {self.step}, expected steps >= 1 and step > 0 (or None)"
            )

    def solve(self, operator: Operator, b: TreeLike, x0: TreeLike | None = None) -> Solution:
        operator.space.check(b, "RobbinsMonro.solve")
        size = tree.norm(b)
        if float(size) == 0:
            return Solution(tree.zeros_like(b), steps=0, residual=0.0, converged=True)
        if x0 is not None:
            operator.space.check(x0, "RobbinsMonro.solve, x0")

        def residual(x: TreeLike) -> float:
            return relative(tree.norm(tree.sub(b, operator.apply(x))), size)

        generator = self.generator
        if generator is None:
            generator = torch.Generator(device=operator.space.device).manual_seed(0)
        step = self._default_step(operator, generator) if self.step is None else self.step
        x: Tree = tree.zeros_like(b) if x0 is None else dict(x0)
        first = 1.0 if x0 is None else max(1.0, residual(x))
        mean, half = tree.zeros_like(b), self.steps // 2
        for t in range(self.steps):
            r = tree.sub(b, operator.draw(generator).apply(x))
            if float(tree.norm(r)) <= self.tol * float(size):
                found = residual(x)
                if found <= self.tol:
                    return Solution(x, t, found, converged=True)
            z = r if self.preconditioner is None else self.preconditioner.apply(r)
            x = tree.axpy(step, z, x)
            if t >= half:
                mean = tree.axpy(1 / (t - half + 1), tree.sub(x, mean), mean)
        last = residual(mean)
        if not (last <= first or last <= self.tol):
            raise DivergenceError(
                f"RobbinsMonro.solve: the residual is {last:.3g} |b| after {self.steps} steps of {step:.3g}, expected at most "
                f"{first:.3g} |b|; shorten the step, raise the damping, or use GGN instead of an indefinite Hessian"
            )
        return Solution(mean, self.steps, last, converged=last <= self.tol)

    def _default_step(self, operator: Operator, generator: torch.Generator) -> float:
        draws = [operator.draw(generator) for _ in range(4)]
        return 1 / max(largest_eigenvalue(a, self.preconditioner, self.power_steps) for a in draws)

    def preconditioned(self, inverse: Operator) -> RobbinsMonro:
        return replace(self, preconditioner=inverse)
