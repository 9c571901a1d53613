"""Symmetric operators on named parameters, and curvatures: operators with a spectrum."""

from weingarten.operators.block_diagonal import BlockDiagonal
from weingarten.operators.diagonal import DiagonalCurvature
from weingarten.operators.eigenbasis import Eigenbasis
from weingarten.operators.exact import GGN, Hessian
from weingarten.operators.kronecker import Kronecker
from weingarten.operators.layout import Layout
from weingarten.operators.operator import Curvature, Identity, Operator

__all__ = [
    "GGN",
    "BlockDiagonal",
    "Curvature",
    "DiagonalCurvature",
    "Eigenbasis",
    "Hessian",
    "Identity",
    "Kronecker",
    "Layout",
    "Operator",
]
