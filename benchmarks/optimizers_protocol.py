"""Which trials a comparison needs, decided before looking."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from benchmarks.optimizers_rivals import method
from benchmarks.optimizers_trials import Trial, final
from benchmarks.optimizers_workloads import WORKLOADS
from benchmarks.trial_pool import Record

TUNING_SEED, SEEDS = 100, (0, 1, 2)
ABLATION_STEPS = 150
Find = Callable[[Trial], Record | None]
"""The record of a trial, None if it has not been run."""


@dataclass(frozen=True)
class Tuned:
    """What tuning has come to: trials still to run, or the best one, and every one it looked at."""

    missing: tuple[Trial, ...]
    best: Trial | None
    seen: tuple[Trial, ...]


def _best(trials: Iterable[Trial], find: Find) -> Trial:
    return min(trials, key=lambda trial: final(find(trial) or {"diverged": True}))


def _missing(trials: Iterable[Trial], find: Find) -> tuple[Trial, ...]:
    return tuple(trial for trial in trials if find(trial) is None)


def tune(name: str, key: str, find: Find) -> Tuned:
    """The grid of rates, longer by a point while the best is at an edge; then the other weight decays at the best rate.

    Args:
        name: of the workload.
        key: of the method.
        find: looks up trials.
    """
    workload = WORKLOADS[name]
    exponents = [exponent + method(key).shift for exponent in workload.rates]
    gap = exponents[1] - exponents[0]

    def at(exponent: float) -> Trial:
        steps = workload.tuning_steps or workload.steps
        return Trial(name, key, _power(exponent), workload.decays[0], TUNING_SEED, steps)

    for _ in range(workload.extensions + 1):
        trials = [at(exponent) for exponent in exponents]
        if missing := _missing(trials, find):
            return Tuned(missing, None, tuple(trials))
        best = _best(trials, find)
        if best == trials[0]:
            exponents.insert(0, exponents[0] - gap)
        elif best == trials[-1]:
            exponents.append(exponents[-1] + gap)
        else:
            break
    decayed = [replace(best, weight_decay=decay) for decay in workload.decays[1:]]
    missing = _missing(decayed, find)
    return Tuned(missing, None if missing else _best([best, *decayed], find), (*trials, *decayed))


def _power(exponent: float) -> float:
    return float(f"{10**exponent:.4g}")


def compared(name: str, key: str, find: Find) -> tuple[Tuned, tuple[Trial, ...]]:
    """Tuning, and the trials with the tuned rate on every seed, empty until it is known."""
    tuned = tune(name, key, find)
    if tuned.best is None:
        return tuned, ()
    return tuned, tuple(replace(tuned.best, seed=seed, steps=WORKLOADS[name].steps) for seed in SEEDS)


def ablated(key: str, find: Find) -> tuple[Trial, ...]:
    """The tuned rate of Symo on the GPT and half a decade below, for a short run; empty until that is known."""
    best = tune("gpt", "symo", find).best
    if best is None:
        return ()
    rates = [_power(round(math.log10(best.lr), 3) + shift) for shift in (-0.5, 0.0)]
    return tuple(replace(best, method=key, lr=rate, steps=ABLATION_STEPS) for rate in rates)


def wanted(pairs: Iterable[tuple[str, str]], ablations: Iterable[str], find: Find) -> list[Trial]:
    """Trials that can be run now and have not been, in the order of the work.

    Args:
        pairs: workload and method.
        ablations: methods.
        find: looks up trials.
    """
    found: list[Trial] = []
    for name, key in pairs:
        tuned, trials = compared(name, key, find)
        found += [*tuned.missing, *_missing(trials, find)]
    for key in ablations:
        found += _missing(ablated(key, find), find)
    return list(dict.fromkeys(found))


def told(trial: Trial, record: Record, since: float, left: int) -> str:
    seconds = record["gradient_seconds"] + record["optimizer_seconds"]
    outcome = "diverged" if record["diverged"] else f"loss {record['final']:.4f}"
    return f"[{(time.monotonic() - since) / 60:6.1f} min] {trial}: {outcome}, {seconds:.0f} CPU s; {left} at hand"
