"""Estimators: from an objective and data to a curvature."""

from weingarten.estimators.diagonal import Diagonal
from weingarten.estimators.ekfac import EKFAC
from weingarten.estimators.estimator import Estimator, estimate
from weingarten.estimators.kfac import KFAC
from weingarten.estimators.orbit import Orbit, OrbitSecant
from weingarten.estimators.orbit_fisher import OrbitFisher

__all__ = ["EKFAC", "KFAC", "Diagonal", "Estimator", "Orbit", "OrbitFisher", "OrbitSecant", "estimate"]
