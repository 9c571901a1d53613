"""The tasks of bilevel learning as problem classes: each gives the two levels and the outer variables at the start."""

from weingarten.applications.problems.row_weights import RowWeights
from weingarten.applications.problems.weight_network import WeightNetwork

__all__ = ["RowWeights", "WeightNetwork"]
