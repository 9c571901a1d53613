"""Rows of the bilevel benchmark: long-tailed classes, with weights from a network that a small balanced set judges.

Images of MNIST (14 by 14): the largest class has 300, the others fall geometrically to a tenth, a fiftieth or a hundredth of
that, in an order of the classes that the seed draws; 10 images of each class are the outer level. A run starts from an MLP
trained without weights (set-up, not counted), which also gives the losses that the weight network sees. When its time is up,
an MLP is trained anew with the weights found; the metric is that one's balanced accuracy, the mean of the classes' recalls, on
test images.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from sklearn.metrics import balanced_accuracy_score

import weingarten as wg
from benchmarks import bilevel_mnist as mnist
from benchmarks.bilevel_protocol import MOST_SEEDS, TUNING_SEEDS, Clock, Make, Probe, Result, Row, Setting
from benchmarks.bilevel_training import adam, fresh, predicted, timed, train
from weingarten.applications.problems import WeightNetwork

__all__ = ["ROWS", "LongTail"]

LARGEST, TRUSTED, BATCH, INNER_STEPS = 300, 10, 250, 60
WARM, RETRAIN, LAST = 600, 600, 0.02
"""Steps of Adam before the run and for the network trained anew after it, and the part of the rate that is left at their end."""


def _data(seed: int, imbalance: int) -> tuple[mnist.Labelled, mnist.Labelled, mnist.Labelled]:
    """Images and labels of the long tail, of the balanced set, and for the metric."""
    generator = torch.Generator().manual_seed(seed)
    (x, y), judges = mnist.split(seed, generator)
    tail, balanced = [], []
    for place, label in enumerate(torch.randperm(mnist.CLASSES, generator=generator).tolist()):
        rows = (y == label).nonzero()[:, 0]
        balanced.append(rows[:TRUSTED])
        size = round(LARGEST * imbalance ** (-place / (mnist.CLASSES - 1)))
        tail.append(rows[TRUSTED : TRUSTED + size])
    inner, outer = torch.cat(tail), torch.cat(balanced)
    return (x[inner], y[inner]), (x[outer], y[outer]), judges


@dataclass(frozen=True)
class LongTail(Row):
    """One imbalance: the largest class over the smallest."""

    imbalance: int
    name: str
    seconds: float = 2.0
    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    dampings: tuple[float, float] = (1e-2, 1e-1)
    seeds: tuple[int, ...] = MOST_SEEDS
    tuning_seeds: tuple[int, ...] = TUNING_SEEDS
    weight_decay: float = 3e-3
    metric: str = "balanced accuracy"

    def run(self, make: Make, setting: Setting, seed: int) -> Result:
        task, problem, params, rows, outer, (x, y) = _start(self, seed)
        clock = Clock(self.seconds)
        found = timed(
            clock,
            problem,
            make(setting.damping, self.symmetry()),
            adam(1e-3),
            adam(setting.rate),
            params=params,
            hparams=task.start(),
            inner_data=rows,
            outer_data=outer,
            inner_steps=INNER_STEPS,
            seed=seed,
        )
        if found is None:
            return clock.result(float("nan"))
        anew = wg.Objective(fresh(mnist.mlp, seed + 1), wg.CrossEntropy()).params()
        last = train(problem.inner, anew, found.hparams, rows, RETRAIN, 1e-2, seed + 1, LAST)
        metric, before, end = (
            float(balanced_accuracy_score(y.numpy(), predicted(problem.outer, p, x).numpy()))
            for p in (last, params, found.params)
        )
        return clock.result(metric, accuracy_unweighted=before, accuracy_at_the_end=end)

    def probe(self, seed: int) -> Probe:
        task, problem, params, rows, outer, _ = _start(self, seed)
        inner = rows.draw(torch.Generator().manual_seed(seed))
        hparams = task.start()
        draw = torch.Generator().manual_seed(seed)  # off zero, where the first layer's gradient vanishes
        hparams["last.weight"] = 0.3 * torch.randn(hparams["last.weight"].shape, generator=draw)
        return Probe(problem, params, hparams, wg.Batches(wg.Batch(*outer), inner))

    def symmetry(self) -> wg.Symmetry | None:
        return wg.infer_symmetry(fresh(mnist.mlp, 0), torch.zeros(2, 1, 14, 14))


@lru_cache(1)  # the methods of a row take turns on a seed
def _start(
    row: LongTail, seed: int
) -> tuple[WeightNetwork, wg.Problem, wg.Tree, wg.Rows, mnist.Labelled, mnist.Labelled]:
    (x, y), outer, judges = _data(seed, row.imbalance)
    task = WeightNetwork(fresh(mnist.mlp, seed), mnist.CLASSES, row.weight_decay, seed=seed)
    problem, first = task.problem(), task.problem().inner.objective.params()
    plain = wg.Rows(task.inputs(x, y), y, min(BATCH, len(y)))  # all weights are 1 at the start
    params = train(problem.inner, first, task.start(), plain, WARM, 1e-2, seed, LAST)
    return task, problem, params, wg.Rows(task.inputs(x, y, params), y, plain.batch_size), outer, judges


ROWS: list[Row] = [LongTail(imbalance, f"long tail {imbalance}") for imbalance in (10, 50, 100)]
