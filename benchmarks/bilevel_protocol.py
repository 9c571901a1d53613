"""What a row of the bilevel benchmark is, the methods that every row compares, and their equal budget.

A *row* is one task on one data set. Each of its methods tries the same number of settings, four, judged by the row's metric:
four outer rates, or where there is a damping three rates and a second damping, on a grid that is climbed from its middle
(`bilevel_trials.settings`). Rows of tasks 1 to 4 judge a setting by its mean over three tuning seeds; the two of them whose
trials take ten seconds or more with set-up ("images CNN", "iMAML sine, 64 steps"), and the other tasks, by one.
What judges a tuning seed of tasks 1 to 4 judges no other (`for_tuning`); the other seeds draw what judges them.
Three seeds follow at the best setting, in rows of tasks 1 to 4 five more: the claim is about these, and three seeds left many
of its leads undecided. Where eight left it open whether the plain methods are behind, sixteen more follow; what these alone
say of the method that was best on the eight is reported too (`bilevel_summary.unseen`). A trial is a whole run of the task
that ends when it has used the row's CPU-seconds, set-up not counted.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field

import weingarten as wg

SEEDS, MORE_SEEDS, MOST_SEEDS = (0, 1, 2), tuple(range(8)), tuple(range(24))
ONE_TUNING_SEED, TUNING_SEEDS = (100,), (100, 101, 102)
TUNING_FROM = 50


def for_tuning(seed: int) -> bool:
    """Whether a seed serves tuning or first looks: from 50 on. What judges those judges no other."""
    return seed >= TUNING_FROM


Make = Callable[[float, wg.Symmetry | None], wg.HypergradientMethod]
"""From damping and the model's symmetry (None: there is none) to a method."""


@dataclass(frozen=True)
class Setting:
    """What is tuned: the rate of the outer optimiser and the damping of the curvature."""

    rate: float
    damping: float


@dataclass(frozen=True)
class Result:
    """What a trial came to.

    Attributes:
        metric: of the task, higher is better; NaN if the run diverged.
        curve: CPU-seconds since the start and the outer loss there, a few dozen points.
        steps: outer steps done.
        products: curvature-vector products of the whole run.
        extra: other figures worth a column, by name.
    """

    metric: float
    curve: list[tuple[float, float]]
    steps: int
    products: int
    extra: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Probe:
    """A point in mid-training where single hypergradients are compared: time, products, memory, and error if parameters are few.

    Attributes:
        problem: the problem; its model is small enough for a dense solve, or not.
        params: parameters, trained.
        hparams: outer variables.
        batches: of the hypergradient.
    """

    problem: wg.Problem
    params: wg.Tree
    hparams: wg.Tree
    batches: wg.Batches


class Row(ABC):
    """One task on one data set.

    Class attributes: ``name``; ``metric``, its name; ``seconds``, CPU-seconds of a trial; ``rates``, six outer rates,
    increasing, the two in the middle tried first; ``dampings``, two, the first one tried first; ``tuning_seeds``, that judge a
    setting; ``seeds``, of the runs at the best setting; ``methods``, names of those that take part, or None for all.
    """

    name: str
    metric: str
    seconds: float
    rates: tuple[float, ...]
    dampings: tuple[float, float]
    seeds: tuple[int, ...] = SEEDS
    tuning_seeds: tuple[int, ...] = ONE_TUNING_SEED
    methods: tuple[str, ...] | None = None

    @abstractmethod
    def run(self, make: Make, setting: Setting, seed: int) -> Result:
        """One whole run within ``seconds``, by the method ``make(setting.damping, symmetry)``."""

    @abstractmethod
    def probe(self, seed: int) -> Probe:
        """A point to compare single hypergradients at."""

    @abstractmethod
    def symmetry(self) -> wg.Symmetry | None:
        """The symmetry of the model of the inner problem, as ``wg.infer_symmetry`` finds it."""


class Clock:
    """A callback of ``wg.solve`` that keeps the curve and ends the run when its CPU-seconds are used up.

    >>> clock = Clock(seconds=1.0)
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.process_time()
        self.curve: list[tuple[float, float]] = []
        self.steps = self.products = 0

    @property
    def used(self) -> float:
        """CPU-seconds since the start."""
        return time.process_time() - self.start

    def record(self, outer_loss: float, products: int) -> bool:
        """Note a step; whether the time is up."""
        self.steps, self.products = self.steps + 1, self.products + products
        self.curve.append((self.used, outer_loss))
        return self.used >= self.seconds

    def __call__(self, event: wg.Event) -> bool:
        """Note a step of ``wg.solve``; whether the time is up."""
        return self.record(event.hypergradient.outer_loss, event.hypergradient.products)

    def result(self, metric: float, **extra: float) -> Result:
        """The trial's result, with the curve thinned out."""
        stride = max(1, math.ceil(len(self.curve) / 40))
        kept = [(round(t, 3), float(f"{loss:.5g}")) for t, loss in self.curve[::stride]]
        return Result(metric, kept, self.steps, self.products, extra)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error, which is NaN for a single value."""
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return statistics.mean(values), error
