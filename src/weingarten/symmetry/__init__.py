"""Symmetries of a loss in its parameters: notation, coordinates, orbit averages, and finding them in a model."""

from weingarten.symmetry.check import SymmetryError, check_symmetry
from weingarten.symmetry.infer import Inference, explain_symmetry, infer_symmetry
from weingarten.symmetry.isotypic import Isotypic
from weingarten.symmetry.plan import Plan, plan
from weingarten.symmetry.spec import Symmetry

__all__ = [
    "Inference",
    "Isotypic",
    "Plan",
    "Symmetry",
    "SymmetryError",
    "check_symmetry",
    "explain_symmetry",
    "infer_symmetry",
    "plan",
]
