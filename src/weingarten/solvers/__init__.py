"""Solvers of ``operator x = b``; damping belongs to the operator, never to a solver."""

from weingarten.solvers.cg import CG
from weingarten.solvers.direct import Direct
from weingarten.solvers.first_order import FirstOrder
from weingarten.solvers.minres import MINRES
from weingarten.solvers.neumann import Neumann
from weingarten.solvers.nystrom import Nystrom
from weingarten.solvers.robbins_monro import RobbinsMonro
from weingarten.solvers.solver import DivergenceError, Solution, Solver

SOLVERS: dict[str, type[Solver]] = {
    "first-order": FirstOrder,
    "neumann": Neumann,
    "robbins-monro": RobbinsMonro,
    "cg": CG,
    "minres": MINRES,
    "nystrom": Nystrom,
    "direct": Direct,
}
"""The table, for the command line and the contract test."""

__all__ = [
    "CG",
    "MINRES",
    "SOLVERS",
    "Direct",
    "DivergenceError",
    "FirstOrder",
    "Neumann",
    "Nystrom",
    "RobbinsMonro",
    "Solution",
    "Solver",
]
