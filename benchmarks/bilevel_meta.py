"""Rows of the bilevel benchmark: meta-learning on sine regression, rotated digits and one-dimensional signals.

Implicit MAML (Rajeswaran et al. 2019, https://arxiv.org/abs/1909.04630) learns where inner training starts, hyper-representation
(Franceschi et al. 2018, https://arxiv.org/abs/1806.04910) learns features under a linear head. A trial meta-trains for its
CPU-seconds; the metric is over held-out episodes after the same inner training as in the trial.

How the settings were chosen, on seed 50 and before any final seed. The penalty's strength is one at which the identity's
direction is far from the exact hypergradient's in mid-training (cosine at most about 0.75), since where the penalty dominates the
curvature no method matters. "iMAML sine" has the paper's strength of 2 and 16 steps (cosine 0.80): with weaker terms inner
training became unstable in the course of meta-training. Under a linear head the inner rate is about the largest that is stable
with momentum 0.9, lr < 3.8 / lambda_max: on F tanh features lambda_max is at most 2 (F + 1) for squared error and (F + 1) / 2 for
cross-entropy. Digits have ten ways and one shot because five ways and two shots leave nothing to learn (0.90 from a
random start). Unrolled steps go on from the adapted parameters.

"iMAML sine, 64 steps" was added when the first had been measured: 16 steps leave two fifths of the inner gradient's length at the
start, 64 leave 4 %, and implicit differentiation speaks of a point where there is none. On seeds 200 to 202, which nothing else
uses, KFAC and unrolled steps had changed places.

Whether a setting leaves something to learn was judged by runs of "KFAC, 3 steps" alone: ways and shots, the split of the digits
(with whole digits held out, features learned nothing that helped), their lower outer rates, and the strength of "iMAML sine". The
inner rates of the two iMAML rows are no more than rates that did not diverge.

    python -m benchmarks.bilevel_meta [--row NAME] [--seed N]      a first look at all methods, not tuned
"""

from __future__ import annotations

import argparse
from abc import abstractmethod
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

import weingarten as wg
from benchmarks.bilevel_methods import METHODS
from benchmarks.bilevel_protocol import (
    MORE_SEEDS,
    MOST_SEEDS,
    ONE_TUNING_SEED,
    TUNING_SEEDS,
    Clock,
    Make,
    Probe,
    Result,
    Row,
    Setting,
    for_tuning,
)
from benchmarks.bilevel_training import DIVERGED, fresh
from weingarten.applications.problems import (
    EpisodeSource,
    FewShot,
    GroupedMLP,
    HyperRepresentation,
    ImplicitMAML,
    MetaTask,
    Sines,
    adapt,
    meta_solve,
    rotated_digits,
    signal_classes,
)

BATCH = 8
"""Episodes of one outer step."""
HELD_OUT = 25
"""Batches of held-out episodes for the metric."""
STEPS = 10**6


class MetaRow(Row):
    """What the rows of meta-learning share."""

    seconds = 4.0
    rates = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
    seeds, tuning_seeds = MORE_SEEDS, TUNING_SEEDS
    inner: ClassVar[tuple[partial, int]]

    @abstractmethod
    def task(self) -> MetaTask:
        """Networks drawn from torch's generator."""

    @abstractmethod
    def sources(self) -> tuple[EpisodeSource, EpisodeSource]:
        """For meta-training and for the metric; nothing random."""

    @abstractmethod
    def score(self, output: Tensor, target: Tensor) -> Tensor:
        """0-d, higher is better."""

    def seeded(self, seed: int) -> MetaTask:
        return fresh(self.task, seed)

    def run(self, make: Make, setting: Setting, seed: int) -> Result:
        torch.set_num_threads(1)
        task, (train, test), symmetry = self.seeded(seed), self.sources(), self.symmetry()
        outer = partial(torch.optim.Adam, lr=setting.rate)
        method = make(setting.damping, symmetry)
        meta_solve(
            task, method, self.inner[0], outer, 1, episodes=train, batch=BATCH, inner_steps=1, seed=seed
        )
        clock = Clock(self.seconds)
        try:
            found = meta_solve(
                task, method, self.inner[0], outer, STEPS,
                episodes=train, batch=BATCH, inner_steps=self.inner[1], callbacks=[clock], seed=seed,
            )  # fmt: skip
            return clock.result(self.judge(task, found.hparams, test, seed))
        except DIVERGED:
            return clock.result(float("nan"))

    def judge(
        self, task: MetaTask, hparams: wg.bilevel.problem.TreeLike, test: EpisodeSource, seed: int
    ) -> float:
        """The mean score of the query sets after adaptation.

        Each seed has its own episodes, the same for every method; all seeds for tuning share others.
        """
        generator = torch.Generator().manual_seed(0 if for_tuning(seed) else 1 + seed)
        outer = task.problem().outer
        scores = []
        for _ in range(HELD_OUT):
            drawn = test.draw(BATCH, generator)
            params, _ = adapt(task, hparams, drawn.support, *self.inner)
            with torch.no_grad():
                query = outer.transform(hparams, drawn.query)
                scores.append(self.score(outer.objective.forward(params, query.inputs), query.targets))
        return float(torch.stack(scores).mean())

    def probe(self, seed: int) -> Probe:
        task, train = self.seeded(seed), self.sources()[0]
        method, outer = (
            wg.Implicit(solver=wg.FirstOrder(), preconditioner=None),
            partial(torch.optim.Adam, lr=3e-3),
        )
        hparams = meta_solve(
            task, method, self.inner[0], outer, 40,
            episodes=train, batch=BATCH, inner_steps=self.inner[1], seed=seed,
        ).hparams  # fmt: skip
        drawn = train.draw(BATCH, torch.Generator().manual_seed(1000 + seed))
        params, _ = adapt(task, hparams, drawn.support, *self.inner)
        return Probe(task.problem(), params, hparams, wg.Batches(drawn.query, drawn.support))

    def symmetry(self) -> wg.Symmetry | None:
        return None  # a linear head has no hidden units


class Regression(MetaRow):
    metric = "minus mean squared error after adaptation"

    def sources(self) -> tuple[EpisodeSource, EpisodeSource]:
        return Sines(), Sines(queries=50)

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        return -(output - target).square().mean()


class Classification(MetaRow):
    metric = "accuracy on meta-test episodes"

    def score(self, output: Tensor, target: Tensor) -> Tensor:
        return (output.argmax(1) == target).float().mean()


def few_shot(classes: tuple[Tensor, Tensor], ways: int, shots: int) -> tuple[EpisodeSource, EpisodeSource]:
    """More queries for the metric than for training."""
    return tuple(FewShot(part, ways, shots, queries) for part, queries in zip(classes, (5, 10), strict=True))


class MAMLSine(Regression):
    name, dampings = "iMAML sine", (1e-2, 1e-1)
    rates = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
    inner = (partial(torch.optim.SGD, lr=0.02 * BATCH, momentum=0.9), 16)

    def task(self) -> MetaTask:
        return ImplicitMAML(GroupedMLP((1, 32, 32, 1), BATCH), wg.MSE(), prox=2.0)

    def symmetry(self) -> wg.Symmetry | None:
        return wg.infer_symmetry(self.seeded(0).networks, torch.zeros(2, BATCH, 1))


class MAMLSineLonger(MAMLSine):
    name, inner = "iMAML sine, 64 steps", (MAMLSine.inner[0], 64)
    rates, tuning_seeds = MetaRow.rates, ONE_TUNING_SEED


class MAMLDigits(Classification):
    name, dampings = "iMAML digits", (1e-3, 1e-2)
    rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    inner = (partial(torch.optim.SGD, lr=0.1 * BATCH, momentum=0.9), 10)

    def task(self) -> MetaTask:
        return ImplicitMAML(GroupedMLP((64, 32, 10), BATCH), wg.CrossEntropy(), prox=0.1)

    def sources(self) -> tuple[EpisodeSource, EpisodeSource]:
        return few_shot(rotated_digits(), ways=10, shots=1)

    def symmetry(self) -> wg.Symmetry | None:
        return wg.infer_symmetry(self.seeded(0).networks, torch.zeros(2, BATCH, 64))


class FeaturesSine(Regression):
    name, dampings, seeds = "hyper-representation sine", (1e-3, 1e-2), MOST_SEEDS
    inner = (partial(torch.optim.SGD, lr=0.05 * BATCH, momentum=0.9), 20)

    def task(self) -> MetaTask:
        body = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh())
        return HyperRepresentation(body, GroupedMLP((32, 1), BATCH), wg.MSE(), decay=0.1)


class FeaturesDigits(Classification):
    name, dampings = "hyper-representation digits", (1e-3, 1e-2)
    rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    inner = (partial(torch.optim.SGD, lr=0.2 * BATCH, momentum=0.9), 20)

    def task(self) -> MetaTask:
        body = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 32), nn.Tanh())
        return HyperRepresentation(body, GroupedMLP((32, 10), BATCH), wg.CrossEntropy(), decay=0.1)

    def sources(self) -> tuple[EpisodeSource, EpisodeSource]:
        return few_shot(rotated_digits(), ways=10, shots=1)


class FeaturesSignals(Classification):
    name, dampings = "hyper-representation signals", (1e-3, 1e-2)
    rates = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
    inner = (partial(torch.optim.SGD, lr=0.1 * BATCH, momentum=0.9), 20)

    def task(self) -> MetaTask:
        body = nn.Sequential(
            nn.Unflatten(1, (1, 40)), nn.Conv1d(1, 16, 7, stride=2, padding=3), nn.Tanh(),
            nn.Conv1d(16, 32, 5, stride=2, padding=2), nn.Tanh(), nn.AvgPool1d(5), nn.Flatten(),
        )  # fmt: skip
        return HyperRepresentation(body, GroupedMLP((64, 5), BATCH), wg.CrossEntropy(), decay=0.1)

    def sources(self) -> tuple[EpisodeSource, EpisodeSource]:
        return few_shot(signal_classes(60, torch.Generator().manual_seed(0)), ways=5, shots=2)


ROWS: list[Row] = [
    MAMLSine(),
    MAMLSineLonger(),
    MAMLDigits(),
    FeaturesSine(),
    FeaturesDigits(),
    FeaturesSignals(),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", action="append", choices=[row.name for row in ROWS], help="default: all")
    parser.add_argument("--method", action="append", choices=list(METHODS), help="default: all")
    parser.add_argument("--seed", type=int, default=50)
    options = parser.parse_args()
    for row in ROWS:
        if options.row and row.name not in options.row:
            continue
        print(f"{row.name}: {row.metric}, seed {options.seed}, {row.seconds} CPU-seconds a trial", flush=True)
        for name, method in METHODS.items():
            if (options.method and name not in options.method) or (
                method.symmetric and row.symmetry() is None
            ):
                continue
            cells = []
            for rate in row.rates[2:4]:
                for damping in row.dampings if method.damped else row.dampings[:1]:
                    found = row.run(method.make, Setting(rate, damping), options.seed)
                    cells.append(f"{rate:g} {damping:g}: {found.metric:.4f} ({found.steps} steps)")
            print(f"  {name:16s}", "   ".join(cells), flush=True)


if __name__ == "__main__":
    main()
