"""weingarten: curvature for deep learning that people can use."""

from weingarten.bilevel import L2, SGD, Adam, Batches, Hypergradient, Implicit, Level, Problem, Unrolled
from weingarten.estimators import EKFAC, KFAC, Diagonal, Estimator, estimate
from weingarten.fisher import Empirical, Exact, Fisher, MonteCarlo
from weingarten.layers import Expand, Reduce
from weingarten.losses import MSE, BinaryCrossEntropy, CrossEntropy, Loss
from weingarten.matfun import FactoredPower, Log, MatrixFunction, Power, Scale, Shift
from weingarten.objective import Batch, Objective
from weingarten.operators import (
    GGN,
    BlockDiagonal,
    Curvature,
    DiagonalCurvature,
    Eigenbasis,
    Hessian,
    Identity,
    Kronecker,
    Operator,
)
from weingarten.solvers import CG, Direct, DivergenceError, FirstOrder, Neumann, Solution, Solver

__version__ = "0.1.0"

__all__ = [
    "CG",
    "EKFAC",
    "GGN",
    "KFAC",
    "L2",
    "MSE",
    "SGD",
    "Adam",
    "Batch",
    "Batches",
    "BinaryCrossEntropy",
    "BlockDiagonal",
    "CrossEntropy",
    "Curvature",
    "Diagonal",
    "DiagonalCurvature",
    "Direct",
    "DivergenceError",
    "Eigenbasis",
    "Empirical",
    "Estimator",
    "Exact",
    "Expand",
    "FactoredPower",
    "FirstOrder",
    "Fisher",
    "Hessian",
    "Hypergradient",
    "Identity",
    "Implicit",
    "Kronecker",
    "Level",
    "Log",
    "Loss",
    "MatrixFunction",
    "MonteCarlo",
    "Neumann",
    "Objective",
    "Operator",
    "Power",
    "Problem",
    "Reduce",
    "Scale",
    "Shift",
    "Solution",
    "Solver",
    "Unrolled",
    "estimate",
]
