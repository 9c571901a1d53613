"""Trials of the bilevel benchmark: which are wanted, and one of them run."""

from __future__ import annotations

import math
import statistics
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
from benchmarks.bilevel_protocol import Row, Setting

__all__ = ["GROUPS", "ROWS", "Trial", "best", "execute", "final", "settings", "told", "tuning", "wanted"]

TRIALS = 4
"""Settings that every method tries."""
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


def judged(row: str, method: str, setting: Setting, find: Find) -> float | None:
    """The mean metric of a setting over the row's tuning seeds; None while one is missing."""
    records = [find(trial) for trial in trials_of(row, method, setting, ROWS[row].tuning_seeds)]
    return None if None in records else statistics.mean(map(value, records))


def trials_of(row: str, method: str, setting: Setting, seeds: tuple[int, ...]) -> list[Trial]:
    return [Trial(row, method, setting.rate, setting.damping, seed) for seed in seeds]


def settings(row: str, method: str, find: Find) -> dict[Setting, float | None]:
    """Four settings and what they came to, or those of them that what is known leads to.

    First the two rates in the middle of the row's grid, at its first damping. Then the next rate on the side of the better end of
    those tried; then, without a damping, once more the next rate, with one, the best rate at the second damping.
    """
    grid, (first, second) = ROWS[row].rates, ROWS[row].dampings
    low, high = len(grid) // 2 - 1, len(grid) // 2
    tried = [Setting(grid[low], first), Setting(grid[high], first)]
    while True:
        found = {setting: judged(row, method, setting, find) for setting in tried}
        known = {setting: metric for setting, metric in found.items() if metric is not None}
        if len(tried) == TRIALS or len(known) < len(tried):
            return found
        if METHODS[method].damped and len(tried) == TRIALS - 1:
            tried.append(Setting(max(known, key=known.__getitem__).rate, second))
        elif known[Setting(grid[high], first)] > known[Setting(grid[low], first)]:
            high += 1
            tried.append(Setting(grid[high], first))
        else:
            low -= 1
            tried.append(Setting(grid[low], first))


def tuning(row: str, method: str, find: Find) -> list[Trial]:
    """The trials of these settings, on every tuning seed."""
    seeds = ROWS[row].tuning_seeds
    return [
        trial for setting in settings(row, method, find) for trial in trials_of(row, method, setting, seeds)
    ]


def best(row: str, method: str, find: Find) -> Setting | None:
    """The setting with the highest mean metric on the tuning seeds; None while a trial is missing."""
    found = settings(row, method, find)
    known = {setting: metric for setting, metric in found.items() if metric is not None}
    return max(known, key=known.__getitem__) if len(known) == TRIALS else None


def final(row: str, method: str, find: Find) -> list[Trial]:
    """The trials on every seed at the best setting; empty until that is known."""
    found = best(row, method, find)
    if found is None:
        return []
    return trials_of(row, method, found, ROWS[row].seeds)


def wanted(rows: list[str], find: Find) -> list[Trial]:
    """Trials that can be run now and have not been: seed by seed, the methods of a row in turns, that all meet the same load."""
    lacking = []
    for row in rows:
        names = methods_of(row)
        trials = [trial for name in names for trial in tuning(row, name, find)]
        trials.sort(key=lambda trial: trial.seed)
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
