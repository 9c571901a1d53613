"""The methods by name, for the command line, the benchmarks and the tests."""

from __future__ import annotations

from collections.abc import Callable

from weingarten.bilevel.implicit import Implicit
from weingarten.bilevel.problem import HypergradientMethod
from weingarten.bilevel.unrolled import SGD, Unrolled
from weingarten.estimators import EKFAC, KFAC, Diagonal
from weingarten.matfun import Power
from weingarten.solvers import CG, Direct, FirstOrder, Neumann

__all__ = ["METHODS", "make_method"]

METHODS: dict[str, Callable[[float, int], HypergradientMethod]] = {
    "identity": lambda d, r: Implicit(solver=FirstOrder(), preconditioner=None, damping=d, refresh=r),
    "neumann": lambda d, r: Implicit(solver=Neumann(steps=20), preconditioner=None, damping=d, refresh=r),
    "cg": lambda d, r: Implicit(solver=CG(steps=10), preconditioner=None, damping=d, refresh=r),
    "pcg": lambda d, r: Implicit(solver=CG(steps=3), preconditioner=KFAC(), damping=d, refresh=r),
    "kfac": lambda d, r: Implicit(KFAC(), Direct(), None, damping=d, refresh=r),
    "kfac-length": lambda d, r: Implicit(solver=CG(steps=1), preconditioner=KFAC(), damping=d, refresh=r),
    "ekfac": lambda d, r: Implicit(EKFAC(), Direct(), None, damping=d, refresh=r, inverse=Power),
    "diagonal": lambda d, r: Implicit(Diagonal(), Direct(), None, damping=d, refresh=r, inverse=Power),
    "exact": lambda d, r: Implicit(solver=Direct(), preconditioner=None, damping=d, refresh=r),
    "unrolled": lambda d, r: Unrolled(steps=5, optimizer=SGD(lr=0.1, momentum=0.9)),
}
"""From ``(damping, refresh)`` to a method; ``unrolled`` knows neither, ``refresh`` matters to those that estimate a curvature."""


def make_method(name: str, damping: float = 1e-2, refresh: int = 1) -> HypergradientMethod:
    """The method of that name; for other settings build ``Implicit`` or ``Unrolled`` yourself.

    ===========  =================================================================================
    identity     no curvature (T1-T2, first-order DARTS)
    neumann      20 terms of the Neumann series on the GGN
    cg           10 steps of conjugate gradients on the GGN
    pcg          3 steps, preconditioned by KFAC
    kfac         KFAC's inverse, no product
    kfac-length  KFAC's direction with the length from one product (the default elsewhere)
    ekfac        EKFAC's inverse, no product
    diagonal     the inverse of the GGN's diagonal, no product
    exact        a dense solve with the GGN; small problems only
    unrolled     back through 5 steps of SGD
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
