"""Why three rows of the bilevel benchmark come out as they do: measurements behind sentences of README.

*Minimum*: the length of the inner gradient at the probe of each row of meta-learning, after so many times the row's steps of
adaptation. *Indirect*: features for digits, with the indirect term of the hypergradient times a factor; two rates, and seeds that
nothing else uses. *Linear*: on the linear model, KFAC with 3 steps and Neumann 20 at the settings of the committed results, on
seeds that nothing else uses, judged by the validation images in place of the test images.

    python -m benchmarks.bilevel_whys [--json PATH]
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import weingarten as wg
from benchmarks.bilevel import committed
from benchmarks.bilevel_meta import ROWS, FeaturesDigits, MetaRow
from benchmarks.bilevel_methods import METHODS
from benchmarks.bilevel_protocol import Setting
from benchmarks.bilevel_summary import spread
from benchmarks.bilevel_trials import execute
from benchmarks.environment import report
from benchmarks.trial_pool import pool
from weingarten import tree
from weingarten.applications.problems import adapt

SEEDS, TIMES = (200, 201, 202), (1, 4, 16)
RATES, DAMPING = (3e-4, 1e-3), 1e-3
FACTORS = (
    ("Nystrom 10", 1),
    ("identity", 1),
    ("identity", 30),
    ("identity", 1000),
    ("KFAC, 3 steps", 1),
    ("KFAC, 3 steps", 30),
)

LINEAR, OTHER_SEEDS = "images linear", tuple(range(103, 127))
COMPARED = ("KFAC, 3 steps", "Neumann 20")


@dataclass(frozen=True)
class Longer(wg.HypergradientMethod):
    """Another method's hypergradient, its indirect term times a factor."""

    method: wg.HypergradientMethod
    factor: float

    def __call__(self, *arguments: Any, **named: Any) -> wg.Hypergradient:
        found = self.method(*arguments, **named)
        indirect = tree.sub(found.value, found.direct)
        return replace(found, value=tree.axpy(self.factor, indirect, found.direct))


def gradients(row: MetaRow) -> dict[str, float]:
    """Lengths of the inner gradient over that where adaptation starts, by steps."""
    probe, task, (optimizer, steps) = row.probe(0), row.seeded(0), row.inner
    inner, support = task.problem().inner, probe.batches.mixed

    def length(params: wg.Tree) -> float:
        leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
        found = torch.autograd.grad(inner.value(leaves, probe.hparams, support), list(leaves.values()))
        return float(sum(g.square().sum() for g in found).sqrt())

    start = length(task.begin(probe.hparams))
    adapted = {n * steps: adapt(task, probe.hparams, support, optimizer, n * steps)[0] for n in TIMES}
    return {str(count): round(length(params) / start, 4) for count, params in adapted.items()}


def longer(name: str, factor: float, rate: float) -> list[float]:
    """Mean and standard error of the metric of features for digits."""

    def make(damping: float, symmetry: wg.Symmetry | None) -> wg.HypergradientMethod:
        return Longer(METHODS[name].make(damping, symmetry), factor)

    values = [FeaturesDigits().run(make, Setting(rate, DAMPING), seed).metric for seed in SEEDS]
    return [round(v, 4) for v in spread(values)]


def linear() -> dict[str, list[float]]:
    """Mean and standard error of the accuracy of both methods on the validation images, and of their difference by seed."""
    with pool() as executor:
        found = executor.map(execute, committed(LINEAR, COMPARED, OTHER_SEEDS))
        values = [record["metric"] for record in found]
    mine, other = values[::2], values[1::2]
    parts = mine, other, [a - b for a, b in zip(mine, other, strict=True)]
    return {
        key: [round(v, 4) for v in spread(part)]
        for key, part in zip((*COMPARED, "difference"), parts, strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where to write the figures")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    minimum = {row.name: gradients(row) for row in ROWS if isinstance(row, MetaRow)}
    print(minimum, flush=True)
    indirect = {
        f"{name} x {factor}, rate {rate:g}": longer(name, factor, rate)
        for name, factor in FACTORS
        for rate in RATES
    }
    summary = {"minimum": minimum, "indirect": indirect, "linear": linear()}
    report(summary, {"seeds": SEEDS, "seeds of linear": OTHER_SEEDS}, arguments.json)


if __name__ == "__main__":
    main()
