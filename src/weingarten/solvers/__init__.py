"""Solvers of ``operator x = b``; damping belongs to the operator, never to a solver."""

from weingarten.solvers.cg import CG
from weingarten.solvers.direct import Direct
from weingarten.solvers.first_order import FirstOrder
from weingarten.solvers.neumann import Neumann
from weingarten.solvers.solver import DivergenceError, Solution, Solver

SOLVERS: dict[str, type[Solver]] = {"first-order": FirstOrder, "neumann": Neumann, "cg": CG, "direct": Direct}
"""The table, for the command line and the contract test."""

__all__ = ["CG", "SOLVERS", "Direct", "DivergenceError", "FirstOrder", "Neumann", "Solution", "Solver"]
