"""The methods that every row of the bilevel benchmark compares, from damping and symmetry."""

from __future__ import annotations

from dataclasses import dataclass

import weingarten as wg
from benchmarks.bilevel_protocol import Make

__all__ = ["METHODS", "Method"]

REFRESH = 5
"""Outer steps for which every method that estimates a curvature keeps it."""


@dataclass(frozen=True)
class Method:
    """A method of the comparison.

    Attributes:
        make: from damping and symmetry.
        damped: whether it knows a damping; if not, it tries four outer rates in place of two at two dampings.
        symmetric: whether it needs a symmetry, without which the row leaves it out.
        ours: whether it is a curvature method of this library, and no rival.
    """

    make: Make
    damped: bool = True
    symmetric: bool = False
    ours: bool = False


def _iterative(solver: wg.Solver) -> Make:
    return lambda damping, symmetry: wg.Implicit(solver=solver, preconditioner=None, damping=damping)


def _nystrom(damping: float, symmetry: wg.Symmetry | None) -> wg.HypergradientMethod:
    return wg.Implicit(solver=wg.Nystrom(10, damping), preconditioner=None, damping=damping)


def _kfac(solver: wg.Solver) -> Make:
    return lambda damping, symmetry: wg.Implicit(solver=solver, damping=damping, refresh=REFRESH)


def _alone(damping: float, symmetry: wg.Symmetry | None) -> wg.HypergradientMethod:
    return wg.Implicit(wg.KFAC(), wg.Direct(), None, damping=damping, refresh=REFRESH)


def _orbit(damping: float, symmetry: wg.Symmetry | None) -> wg.HypergradientMethod:
    assert symmetry is not None
    return wg.Implicit(wg.OrbitFisher(symmetry), wg.Direct(), None, damping=damping, refresh=REFRESH)


def _orbit_preconditioned(damping: float, symmetry: wg.Symmetry | None) -> wg.HypergradientMethod:
    assert symmetry is not None
    return wg.Implicit(
        solver=wg.CG(3), preconditioner=wg.OrbitFisher(symmetry), damping=damping, refresh=REFRESH
    )


METHODS: dict[str, Method] = {
    "identity": Method(_iterative(wg.FirstOrder()), damped=False),
    "one step": Method(lambda damping, symmetry: wg.Unrolled(1, wg.SGD(0.1)), damped=False),
    "unrolled 5": Method(lambda damping, symmetry: wg.Unrolled(5, wg.SGD(0.1, 0.9)), damped=False),
    "SAMA": Method(lambda damping, symmetry: wg.SAMA(), damped=False),
    "F2SA": Method(lambda damping, symmetry: wg.F2SA(), damped=False),
    "Neumann 20": Method(_iterative(wg.Neumann(20))),
    "CG 10": Method(_iterative(wg.CG(10))),
    "Nystrom 10": Method(_nystrom),
    "KFAC": Method(_alone, ours=True),
    "KFAC, length": Method(_kfac(wg.CG(1)), ours=True),
    "KFAC, 3 steps": Method(_kfac(wg.CG(3)), ours=True),
    "orbit": Method(_orbit, symmetric=True, ours=True),
    "orbit, 3 steps": Method(_orbit_preconditioned, symmetric=True, ours=True),
}
