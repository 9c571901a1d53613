"""Symmetries of a loss in its parameters: notation, coordinates, orbit averages, and finding them in a model."""

from weingarten.symmetry.isotypic import Isotypic
from weingarten.symmetry.plan import Plan, plan
from weingarten.symmetry.spec import Symmetry

__all__ = ["Isotypic", "Plan", "Symmetry", "plan"]
