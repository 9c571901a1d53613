"""Why rows of meta-learning in the bilevel benchmark come out as they do: measurements behind sentences of README.

*Minimum*: how far from the inner minimum each row's probe is, after so many times the row's steps of adaptation: the length of
the inner gradient, the outer loss, what that would change by if adaptation were finished, as an exact hypergradient foretells
(`outer_change`), and what it does change by. *Indirect*: features for digits, with the indirect term of the hypergradient times a
factor, at two rates. Mean and standard error over three seeds that nothing else uses.

    python -m benchmarks.bilevel_whys [--json PATH]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import weingarten as wg
from benchmarks.bilevel_meta import ROWS, FeaturesDigits, MetaRow
from benchmarks.bilevel_methods import METHODS
from benchmarks.bilevel_protocol import Setting
from benchmarks.bilevel_summary import spread
from benchmarks.environment import report
from weingarten import tree
from weingarten.applications.problems import adapt
from weingarten.bilevel.gradients import level_value, params_gradient

SEEDS, TIMES, FINISHED = (200, 201, 202), (1, 4, 16), 64
RATES, DAMPING = (3e-4, 1e-3), 1e-3
FACTORS = (
    ("Nystrom 10", 1),
    ("identity", 1),
    ("identity", 30),
    ("identity", 1000),
    ("KFAC, 3 steps", 1),
    ("KFAC, 3 steps", 30),
)

EXACT = wg.Implicit(solver=wg.CG(100, tol=1e-6), preconditioner=None, damping=1e-6)


@dataclass(frozen=True)
class Longer(wg.HypergradientMethod):
    """Another method's hypergradient, its indirect term times a factor."""

    method: wg.HypergradientMethod
    factor: float

    def __call__(self, *arguments: Any, **named: Any) -> wg.Hypergradient:
        found = self.method(*arguments, **named)
        indirect = tree.sub(found.value, found.direct)
        return replace(found, value=tree.axpy(self.factor, indirect, found.direct))


def distance(row: MetaRow, seed: int) -> dict[str, dict[str, float]]:
    """By steps of adaptation; the length of the gradient is over that where adaptation starts."""
    probe, task, (optimizer, steps) = row.probe(seed), row.seeded(seed), row.inner
    inner, outer, support = task.problem().inner, task.problem().outer, probe.batches.mixed

    def adapted(times: int) -> wg.Tree:
        return adapt(task, probe.hparams, support, optimizer, times * steps)[0]

    start = tree.norm(params_gradient(inner, task.begin(probe.hparams), probe.hparams, support))
    finished = level_value(outer, adapted(FINISHED), probe.hparams, probe.batches.outer)
    lines = {}
    for times in TIMES:
        found = EXACT(task.problem(), adapted(times), probe.hparams, probe.batches)
        lines[str(times * steps)] = {
            "gradient": found.inner_gradient / float(start),
            "outer loss": found.outer_loss,
            "change foretold": found.outer_change,
            "change": finished - found.outer_loss,
        }
    return lines


def minimum(row: MetaRow) -> dict[str, dict[str, list[float]]]:
    """Mean and standard error over the seeds."""
    found = [distance(row, seed) for seed in SEEDS]
    return {
        steps: {name: [round(v, 4) for v in spread([f[steps][name] for f in found])] for name in figures}
        for steps, figures in found[0].items()
    }


def longer(name: str, factor: float, rate: float) -> list[float]:
    """Mean and standard error of the metric of features for digits."""

    def make(damping: float, symmetry: wg.Symmetry | None) -> wg.HypergradientMethod:
        return Longer(METHODS[name].make(damping, symmetry), factor)

    values = [FeaturesDigits().run(make, Setting(rate, DAMPING), seed).metric for seed in SEEDS]
    return [round(v, 4) for v in spread(values)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = {row.name: minimum(row) for row in ROWS if isinstance(row, MetaRow)}
    print(found, flush=True)
    indirect = {
        f"{name} x {factor}, rate {rate:g}": longer(name, factor, rate)
        for name, factor in FACTORS
        for rate in RATES
    }
    report({"minimum": found, "indirect": indirect}, {"seeds": SEEDS}, arguments.json)


if __name__ == "__main__":
    main()
