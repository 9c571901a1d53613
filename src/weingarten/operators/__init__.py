"""Symmetric operators on named parameters, and curvatures: operators with a spectrum."""

from weingarten.operators.block_diagonal import BlockDiagonal
from weingarten.operators.common_basis import common_eigenbasis
from weingarten.operators.commutant import Commutant
from weingarten.operators.diagonal import DiagonalCurvature
from weingarten.operators.eigenbasis import Eigenbasis
from weingarten.operators.exact import GGN, Hessian
from weingarten.operators.finite_difference import FiniteDifferenceHessian
from weingarten.operators.geometric_mean import geometric_mean
from weingarten.operators.kronecker import Kronecker
from weingarten.operators.layout import Layout
from weingarten.operators.low_rank import LowRank, nystrom
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
    "FiniteDifferenceHessian",
    "Hessian",
    "Identity",
    "Kronecker",
    "Layout",
    "LowRank",
    "Operator",
    "common_eigenbasis",
    "geometric_mean",
    "gram",
    "nystrom",
    "orbit_mean",
    "orbit_moment",
]
