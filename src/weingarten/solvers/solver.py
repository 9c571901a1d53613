"""The protocol of solvers and what they return."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from weingarten.operators import Operator
from weingarten.tree import Tree, TreeLike

__all__ = ["DivergenceError", "Solution", "Solver"]


class DivergenceError(RuntimeError):
    """An iteration moves away from the solution."""


@dataclass(frozen=True)
class Solution:
    """An approximate solution of ``A x = b``.

    Attributes:
        value: x.
        steps: iterations done.
        residual: ``|b - A x| / |b|`` (0 for b = 0), or NaN where knowing it would cost a product that was not asked for.
        converged: whether the residual is at most the solver's tolerance.
        negative_curvature: whether a direction with ``p^T A p <= 0`` was met, in which case A is not positive definite.
    """

    value: Tree
    steps: int
    residual: float
    converged: bool
    negative_curvature: bool = False


class Solver(ABC):
    """A method for ``A x = b`` with A symmetric, positive definite unless a solver says otherwise."""

    @abstractmethod
    def solve(self, operator: Operator, b: TreeLike, x0: TreeLike | None = None) -> Solution:
        """Solve from ``x0`` (default: zero).

        Raises:
            ValueError: if ``b`` does not lie in the operator's space.
        """

    def preconditioned(self, inverse: Operator) -> Solver:
        """The same solver with ``inverse`` (an approximation to ``A^{-1}``) as its preconditioner.

        Raises:
            TypeError: if the solver takes none.
        """
        raise TypeError(
            f"{type(self).__name__} takes no preconditioner; use CG, MINRES, Neumann or RobbinsMonro"
        )
