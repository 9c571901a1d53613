"""Symmetric operators on named parameters, and curvatures: operators with a spectrum."""

from weingarten.operators.block_diagonal import BlockDiagonal
from weingarten.operators.commutant import Commutant
from weingarten.operators.diagonal import DiagonalCurvature
from weingarten.operators.eigenbasis import Eigenbasis
from weingarten.operators.exact import GGN, Hessian
from weingarten.operators.geometric_mean import geometric_mean
from weingarten.operators.kronecker import Kronecker
from weingarten.operators.layout import Layout
from weingarten.operators.operator import Curvature, Identity, Operator
from weingarten.operators.orbit_average import CommutantMap, gram, orbit_mean, orbit_moment

__all__ = [
    "GGN",
    "BlockDiagonal",
    "Commutant",
    "CommutantMap",
    "Curvature",
    "DiagonalCurvature",
    "Eigenbasis",
    "Hessian",
    "Identity",
    "Kronecker",
    "Layout",
    "Operator",
    "geometric_mean",
    "gram",
    "orbit_mean",
    "orbit_moment",
]
