"""Trials of the bilevel benchmark: which are wanted, and one of them run."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import torch

from benchmarks import (
    bilevel_auxiliary,
    bilevel_hyper,
    bilevel_images,
    bilevel_long_tail,
    bilevel_meta,
    bilevel_robustness,
    bilevel_trec,
)
from benchmarks.bilevel_methods import METHODS
from benchmarks.bilevel_protocol import TUNING_SEED, Row, Setting

__all__ = ["GROUPS", "ROWS", "Trial", "best", "execute", "final", "told", "tuning", "wanted"]

Record = dict[str, Any]
Find = Callable[["Trial"], Record | None]

MODULES = {
    "1 image cleaning": bilevel_images,
    "2 text cleaning": bilevel_trec,
    "3 long tail": bilevel_long_tail,
    "4 meta-learning": bilevel_meta,
    "5 hyperparameters": bilevel_hyper,
    "6 robustness": bilevel_robustness,
    "7 auxiliary task": bilevel_auxiliary,
}
GROUPS: dict[str, list[str]] = {group: [row.name for row in module.ROWS] for group, module in MODULES.items()}
ROWS: dict[str, Row] = {row.name: row for module in MODULES.values() for row in module.ROWS}


@dataclass(frozen=True)
class Trial:
    """One run of one method on one row."""

    row: str
    method: str
    rate: float
    damping: float
    seed: int

    @property
    def key(self) -> str:
        """All that the result depends on but the code and the machine."""
        row = ROWS[self.row]
        return (
            f"{self.row} | {self.method} | {self.rate:g} | {self.damping:g} | {self.seed} | {row.seconds:g} s"
        )


@cache
def methods_of(row: str) -> tuple[str, ...]:
    """The methods that can take part in a row."""
    allowed = ROWS[row].methods
    names = METHODS if allowed is None else allowed
    symmetric = ROWS[row].symmetry() is not None
    return tuple(name for name in names if symmetric or not METHODS[name].symmetric)


def value(record: Record | None) -> float:
    """The metric, minus infinity where the run diverged."""
    metric = math.nan if record is None or record["metric"] is None else record["metric"]
    return -math.inf if math.isnan(metric) else metric


def tuning(row: str, method: str, find: Find) -> list[Trial]:
    """Four trials, or those of them that what is known leads to: four rates; or a search of rates and dampings.

    The search tries the two middle rates at the first damping, then the next rate on the better one's side, then the best of
    the three at the second damping.
    """
    (lowest, low, high, highest), (first, second) = ROWS[row].rates, ROWS[row].dampings

    def trial(rate: float, damping: float) -> Trial:
        return Trial(row, method, rate, damping, TUNING_SEED)

    if not METHODS[method].damped:
        return [trial(rate, first) for rate in ROWS[row].rates]
    tried = [trial(low, first), trial(high, first)]
    if None in map(find, tried):
        return tried
    tried.append(trial(highest if value(find(tried[1])) > value(find(tried[0])) else lowest, first))
    if None in map(find, tried):
        return tried
    return [*tried, trial(_best(tried, find).rate, second)]


def _best(trials: list[Trial], find: Find) -> Trial:
    return max(trials, key=lambda trial: value(find(trial)))


def best(row: str, method: str, find: Find) -> Setting | None:
    """The setting with the highest metric on the tuning seed; None while a trial is missing."""
    tried = tuning(row, method, find)
    if None in map(find, tried):
        return None
    trial = _best(tried, find)
    return Setting(trial.rate, trial.damping)


def final(row: str, method: str, find: Find) -> list[Trial]:
    """The trials on every seed at the best setting; empty until that is known."""
    found = best(row, method, find)
    if found is None:
        return []
    return [Trial(row, method, found.rate, found.damping, seed) for seed in ROWS[row].seeds]


def wanted(rows: list[str], find: Find) -> list[Trial]:
    """Trials that can be run now and have not been: methods of a row in turns, so that all meet the same load of the machine."""
    lacking = []
    for row in rows:
        names = methods_of(row)
        trials = [trial for name in names for trial in tuning(row, name, find)]
        finals = [found for found in (final(row, name, find) for name in names) if found]
        trials += [trial for turn in zip(*finals, strict=True) for trial in turn]
        lacking += [trial for trial in trials if find(trial) is None]
    return lacking


def execute(trial: Trial) -> Record:
    """The trial's result as plain values; of a method that refuses the row, its words."""
    torch.set_num_threads(1)
    method, setting = METHODS[trial.method], Setting(trial.rate, trial.damping)
    try:
        result = asdict(ROWS[trial.row].run(method.make, setting, trial.seed))
    except ValueError as refusal:
        result = {
            "metric": None,
            "steps": 0,
            "products": 0,
            "extra": {},
            "refused": " ".join(str(refusal).split()),
        }
    return dict(plain(result | asdict(trial)))


def plain(found: Any) -> Any:
    """Without numbers that JSON does not know."""
    if isinstance(found, dict):
        return {key: plain(item) for key, item in found.items()}
    if isinstance(found, list | tuple):
        return [plain(item) for item in found]
    return None if isinstance(found, float) and not math.isfinite(found) else found


def told(trial: Trial, record: Record, since: float, left: int) -> str:
    """A line about a finished trial."""
    without = "refused" if "refused" in record else "diverged"
    metric = without if record["metric"] is None else f"{record['metric']:.4f}"
    return f"{trial.key}: {metric}, {record['steps']} steps; {left} at hand"
