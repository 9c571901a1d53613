"""Bilevel problems and their hypergradients."""

from weingarten.bilevel.implicit import Implicit, ImplicitState
from weingarten.bilevel.penalty import L2
from weingarten.bilevel.problem import Batches, Hypergradient, HypergradientMethod, Level, Problem
from weingarten.bilevel.unrolled import SGD, Adam, Unrolled

__all__ = [
    "L2",
    "SGD",
    "Adam",
    "Batches",
    "Hypergradient",
    "HypergradientMethod",
    "Implicit",
    "ImplicitState",
    "Level",
    "Problem",
    "Unrolled",
]
