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
        damped: whether it knows a damping; if not, it tries four outer rates in place of three and a second damping.
        symmetric: whether it needs a symmetry, without which the row leaves it out.
        ours: whether it is a curvature method of this library, and no rival.
    """

    make: Make
    damped: bool = True
    symmetric: bool = False
    ours: bool = False


def _named(name: str) -> Make:
    """A method of the library's table."""
    return lambda damping, symmetry: wg.make_method(name, damping, REFRESH)


def _orbit(damping: float, symmetry: wg.Symmetry | None) -> wg.HypergradientMethod:
    assert symmetry is not None
    return wg.Implicit(wg.OrbitFisher(symmetry), wg.Direct(), None, damping=damping, refresh=REFRESH)


def _orbit_preconditioned(damping: float, symmetry: wg.Symmetry | None) -> wg.HypergradientMethod:
    assert symmetry is not None
    return wg.Implicit(
        solver=wg.CG(3), preconditioner=wg.OrbitFisher(symmetry), damping=damping, refresh=REFRESH
    )


METHODS: dict[str, Method] = {
    "identity": Method(_named("identity"), damped=False),
    "one step": Method(_named("one-step"), damped=False),
    "unrolled 5": Method(_named("unrolled"), damped=False),
    "SAMA": Method(_named("sama"), damped=False),
    "F2SA": Method(_named("f2sa"), damped=False),
    "Neumann 20": Method(_named("neumann")),
    "CG 10": Method(_named("cg")),
    "Nystrom 10": Method(_named("nystrom")),
    "KFAC": Method(_named("kfac"), ours=True),
    "KFAC, length": Method(_named("kfac-length"), ours=True),
    "KFAC, 3 steps": Method(_named("pcg"), ours=True),
    "orbit": Method(_orbit, symmetric=True, ours=True),
    "orbit, 3 steps": Method(_orbit_preconditioned, symmetric=True, ours=True),
}
