"""The methods by name, for the command line, the benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Callable

from weingarten.bilevel.f2sa import F2SA
from weingarten.bilevel.implicit import Implicit
from weingarten.bilevel.problem import HypergradientMethod
from weingarten.bilevel.sama import SAMA
from weingarten.bilevel.unrolled import SGD, Unrolled
from weingarten.estimators import EKFAC, KFAC, Diagonal
from weingarten.matfun import Power
from weingarten.solvers import CG, Direct, FirstOrder, Neumann, Nystrom

__all__ = ["METHODS", "make_method"]

METHODS: dict[str, Callable[[float, int], HypergradientMethod]] = {
    "identity": lambda d, r: Implicit(solver=FirstOrder(), preconditioner=None, damping=d, refresh=r),
    "neumann": lambda d, r: Implicit(solver=Neumann(steps=20), preconditioner=None, damping=d, refresh=r),
    "cg": lambda d, r: Implicit(solver=CG(steps=10), preconditioner=None, damping=d, refresh=r),
    "nystrom": lambda d, r: Implicit(solver=Nystrom(10, d), preconditioner=None, damping=d, refresh=r),
    "pcg": lambda d, r: Implicit(solver=CG(steps=3), preconditioner=KFAC(), damping=d, refresh=r),
    "kfac": lambda d, r: Implicit(KFAC(), Direct(), None, damping=d, refresh=r),
    "kfac-length": lambda d, r: Implicit(solver=CG(steps=1), preconditioner=KFAC(), damping=d, refresh=r),
    "ekfac": lambda d, r: Implicit(EKFAC(), Direct(), None, damping=d, refresh=r, inverse=Power),
    "diagonal": lambda d, r: Implicit(Diagonal(), Direct(), None, damping=d, refresh=r, inverse=Power),
    "exact": lambda d, r: Implicit(solver=Direct(), preconditioner=None, damping=d, refresh=r),
    "unrolled": lambda d, r: Unrolled(steps=5, optimizer=SGD(lr=0.1, momentum=0.9)),
    "one-step": lambda d, r: Unrolled(steps=1, optimizer=SGD(lr=0.1)),
    "sama": lambda d, r: SAMA(),
    "f2sa": lambda d, r: F2SA(),
}
"""From ``(damping, refresh)`` to a method; the last four know neither, ``refresh`` matters to those that estimate a curvature."""


def make_method(name: str, damping: float = 1e-2, refresh: int = 1) -> HypergradientMethod:
    """The method of that name; for other settings build ``Implicit``, ``Unrolled``, ``SAMA`` or ``F2SA`` yourself.

    ===========  =================================================================================
    identity     no curvature (T1-T2, first-order DARTS)
    neumann      20 terms of the Neumann series on the GGN
    cg           10 steps of conjugate gradients on the GGN
    nystrom      the inverse of a randomised approximation of rank 10 to the GGN
    pcg          3 steps, preconditioned by KFAC
    kfac         KFAC's inverse, no product
    kfac-length  KFAC's direction with the length from one product (the default elsewhere)
    ekfac        EKFAC's inverse, no product
    diagonal     the inverse of the GGN's diagonal, no product
    exact        a dense solve with the GGN; small problems only
    unrolled     back through 5 steps of SGD with momentum
    one-step     back through 1 step of SGD (the look-ahead of DARTS)
    sama         no curvature, Adam's adaptation, mixed derivative by differences
    f2sa         a penalty of weight 100 on the inner value, 5 steps of gradient descent
    ===========  =================================================================================

    Args:
        name: one of ``METHODS``.
        damping: in units of the inner loss per squared parameter.
        refresh: calls between two estimates of the curvature.

    Raises:
        ValueError: for an unknown name; the message lists all.

    >>> make_method("identity").solver
    FirstOrder()
    """
    if name not in METHODS:
        raise ValueError(f"make_method: no method {name!r}, expected one of {', '.join(METHODS)}")
    return METHODS[name](damping, refresh)
