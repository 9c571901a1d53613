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

__all__ = ["GROUPS", "ROWS", "Trial", "best", "execute", "settings", "told", "wanted"]

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


def settings(row: Row, method: str) -> list[Setting]:
    """Four settings to try: two rates at two dampings, or four rates."""
    if METHODS[method].damped:
        return [Setting(rate, damping) for rate in row.rates[1:3] for damping in row.dampings]
    return [Setting(rate, row.dampings[0]) for rate in row.rates]


def tuning(row: str, method: str) -> list[Trial]:
    return [Trial(row, method, s.rate, s.damping, TUNING_SEED) for s in settings(ROWS[row], method)]


def value(record: Record | None) -> float:
    """The metric, minus infinity where the run diverged."""
    metric = math.nan if record is None or record["metric"] is None else record["metric"]
    return -math.inf if math.isnan(metric) else metric


def best(row: str, method: str, find: Find) -> Setting | None:
    """The setting with the highest metric on the tuning seed; None while a trial is missing."""
    tried = [(find(trial), trial) for trial in tuning(row, method)]
    if any(record is None for record, _ in tried):
        return None
    trial = max(tried, key=lambda pair: value(pair[0]))[1]
    return Setting(trial.rate, trial.damping)


def final(row: str, method: str, find: Find) -> list[Trial]:
    """The trials on every seed at the best setting; empty until that is known."""
    found = best(row, method, find)
    if found is None:
        return []
    return [Trial(row, method, found.rate, found.damping, seed) for seed in ROWS[row].seeds]


def wanted(rows: list[str], find: Find) -> list[Trial]:
    """Trials that can be run now and have not been: methods of a row in turns, so that all meet the same load of the machine."""
    found = []
    for row in rows:
        names = methods_of(row)
        trials = [trial for name in names for trial in tuning(row, name)]
        finals = [final(row, name, find) for name in names]
        trials += [
            trial
            for seed in range(len(ROWS[row].seeds))
            for trials in finals
            if trials
            for trial in trials[seed : seed + 1]
        ]
        found += [trial for trial in trials if find(trial) is None]
    return found


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
