"""Bilevel problems, their hypergradients, and the loop that uses them."""

from weingarten.bilevel.checkpoint import CheckpointError
from weingarten.bilevel.damping import DampingRow, DampingSweep, suggest_damping
from weingarten.bilevel.diagnose import Check, Dense, Oracle, Part, ReSolve, check_hypergradient
from weingarten.bilevel.events import Callback, Event
from weingarten.bilevel.f2sa import F2SA
from weingarten.bilevel.history import History
from weingarten.bilevel.implicit import Implicit, ImplicitState
from weingarten.bilevel.interrupt import Interrupted
from weingarten.bilevel.loop import Outcome, solve
from weingarten.bilevel.methods import METHODS, make_method
from weingarten.bilevel.penalty import L2, Penalty, Proximal
from weingarten.bilevel.problem import (
    Batches,
    Hypergradient,
    HypergradientMethod,
    Level,
    NonFiniteError,
    Problem,
)
from weingarten.bilevel.progress import ProgressBar
from weingarten.bilevel.projection import Box, Projection, Simplex
from weingarten.bilevel.sama import SAMA, AdamAdaptation, Adaptation
from weingarten.bilevel.sampling import FromDataset, Rows, Source
from weingarten.bilevel.unrolled import SGD, Adam, DifferentiableOptimizer, Unrolled

__all__ = [
    "F2SA",
    "L2",
    "METHODS",
    "SAMA",
    "SGD",
    "Adam",
    "AdamAdaptation",
    "Adaptation",
    "Batches",
    "Box",
    "Callback",
    "Check",
    "CheckpointError",
    "DampingRow",
    "DampingSweep",
    "Dense",
    "DifferentiableOptimizer",
    "Event",
    "FromDataset",
    "History",
    "Hypergradient",
    "HypergradientMethod",
    "Implicit",
    "ImplicitState",
    "Interrupted",
    "Level",
    "NonFiniteError",
    "Oracle",
    "Outcome",
    "Part",
    "Penalty",
    "Problem",
    "ProgressBar",
    "Projection",
    "Proximal",
    "ReSolve",
    "Rows",
    "Simplex",
    "Source",
    "Unrolled",
    "check_hypergradient",
    "make_method",
    "solve",
    "suggest_damping",
]
