"""Optimisers from the symmetry of the loss."""

from weingarten.optim.adapted import Adapted, adapted
from weingarten.optim.choice import Axes, BothSides, Choice, Eigenbases, OneSide, Polar
from weingarten.optim.moment import Moment
from weingarten.optim.routes import Route, architecture
from weingarten.optim.scaling import AdamWScale, FixedScale, Natural, Scaling, Spectral
from weingarten.optim.symo import NonFiniteGradientError, Symo

__all__ = [
    "AdamWScale",
    "Adapted",
    "Axes",
    "BothSides",
    "Choice",
    "Eigenbases",
    "FixedScale",
    "Moment",
    "Natural",
    "NonFiniteGradientError",
    "OneSide",
    "Polar",
    "Route",
    "Scaling",
    "Spectral",
    "Symo",
    "adapted",
    "architecture",
]
