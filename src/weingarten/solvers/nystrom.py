"""The inverse of a randomised low-rank approximation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch

from weingarten import tree
from weingarten.operators import Operator, nystrom
from weingarten.solvers.direct import relative
from weingarten.solvers.solver import Solution, Solver
from weingarten.tree import TreeLike

__all__ = ["Nystrom"]


@final
@dataclass(frozen=True)
class Nystrom(Solver):
    r"""``x = (N + damping I)^{-1} b`` with N the Nystrom approximation of ``H = A - damping I``, by Woodbury's formula.

    Hataya and Yamada 2023, https://arxiv.org/abs/2302.09726, with the approximation of Frangella, Tropp and Udell 2021,
    https://arxiv.org/abs/2110.02820 (:func:`~weingarten.operators.nystrom`). From ``x0`` the same is done to the
    residual. It costs ``rank`` products and one more for the residual it reports, which says whether the rank was enough; to
    iterate from there, pass ``nystrom(A, rank, damping).power(-1, damping)`` to CG as its preconditioner.

    Args:
        rank: products, and columns of N; exact if at least the rank of H.
        damping: the multiple of the identity that the operator *already contains*: with ``Implicit``, its damping plus the
            coefficient of a weight decay. It is not added to the operator, it is taken off before the approximation.
            The default, 0, suits only a full rank.
        tol: what counts as converged, ``|b - A x| <= tol |b|``.
        generator: draws the test matrix; default: a fresh one with seed 0 in every call, so that results repeat.

    Raises (from ``solve``):
        ValueError: if A - damping I is seen not to be positive semi-definite (as with a larger damping than A contains), or a
            product is not finite.
        SingularMatrixError: if N is singular and damping is 0.
    """

    rank: int = 10
    damping: float = 0.0
    tol: float = 1e-6
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 <= self.damping < float("inf"):
            raise ValueError(
                f"Nystrom: rank is {self.rank} and damping {self.damping}, expected rank >= 1 and a finite damping >= 0"
            )

    def solve(self, operator: Operator, b: TreeLike, x0: TreeLike | None = None) -> Solution:
        operator.space.check(b, "Nystrom.solve")
        size = tree.norm(b)
        if float(size) == 0:
            return Solution(tree.zeros_like(b), steps=0, residual=0.0, converged=True)
        if x0 is not None:
            operator.space.check(x0, "Nystrom.solve, x0")
        approximation = nystrom(operator, self.rank, self.damping, self.generator)
        r = dict(b) if x0 is None else tree.sub(b, operator.apply(x0))
        x = approximation.solve(r, self.damping)
        x = x if x0 is None else tree.add(x0, x)
        residual = relative(tree.norm(tree.sub(b, operator.apply(x))), size)
        return Solution(x, steps=1, residual=residual, converged=residual <= self.tol)
