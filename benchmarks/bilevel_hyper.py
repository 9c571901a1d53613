"""Rows of the bilevel benchmark: hyperparameters of training (weight decays, ranges of augmentation, inner rates).

Every row trains a small network on few rows of handwritten digits, which it can fit whatever the hyperparameters are, and judges
them by the network that a training of fixed length from the same start then gives.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import weingarten as wg
from benchmarks.bilevel_protocol import Clock, Make, Probe, Result, Row, Setting
from benchmarks.bilevel_training import accuracy, adam, fresh, loss, timed, train
from weingarten.applications.problems import AugmentationRange, InnerRates, Jittered, WeightDecays
from weingarten.applications.problems.augmentation_range import TRANSFORMS, warp
from weingarten.tree import Tree


@lru_cache
def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.as_tensor(images).float().reshape(-1, 8, 8) / 16, torch.as_tensor(labels)


@dataclass(frozen=True)
class Split:
    """Images (N, 8, 8) or features (N, D), and labels, of three disjoint sets."""

    train: tuple[Tensor, Tensor]
    held: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def split(x: Tensor, y: Tensor, train: int, held: int, generator: torch.Generator) -> Split:
    order = torch.randperm(len(x), generator=generator)
    parts = order[:train], order[train : train + held], order[train + held :]
    return Split(*((x[rows], y[rows]) for rows in parts))


@dataclass(frozen=True)
class Setup:
    """One task on one seed: both levels, the start, and the data of both levels."""

    problem: wg.Problem
    params: Tree
    hparams: Tree
    inner: wg.Source
    outer: wg.Source
    test: tuple[Tensor, Tensor]


class Retrained(Row):
    """A row whose outer variables are judged by training again, for ``length`` steps from the same start."""

    length: int = 300
    inner_rate: float = 1e-2
    inner_steps: int = 5

    def setup(self, seed: int) -> Setup:
        raise NotImplementedError

    def warm(self, setup: Setup) -> Tree:
        return train(
            setup.problem.inner, setup.params, setup.hparams, setup.inner, self.length, self.inner_rate
        )

    def run(self, make: Make, setting: Setting, seed: int) -> Result:
        setup = self.setup(seed)
        warm, symmetry = self.warm(setup), self.symmetry()
        clock = Clock(self.seconds)
        outcome = timed(
            clock,
            setup.problem,
            make(setting.damping, symmetry),
            adam(self.inner_rate),
            adam(setting.rate),
            hparams=setup.hparams,
            params=warm,
            inner_data=setup.inner,
            outer_data=setup.outer,
            inner_steps=self.inner_steps,
            seed=seed,
        )
        if outcome is None:
            return clock.result(math.nan)
        hparams = outcome.hparams
        found = train(setup.problem.inner, setup.params, hparams, setup.inner, self.length, self.inner_rate)
        outer, test = setup.problem.outer, setup.test
        return clock.result(
            accuracy(outer, found, test), test_loss=loss(outer, found, test), **self.describe(hparams)
        )

    def describe(self, hparams: Tree) -> dict[str, float]:
        """Figures of the outer variables at the end."""
        return {}

    def probe(self, seed: int) -> Probe:
        setup = self.setup(seed)
        generator = torch.Generator().manual_seed(seed)
        batches = wg.Batches(setup.outer.draw(generator), setup.inner.draw(generator))
        return Probe(setup.problem, self.warm(setup), setup.hparams, batches)


class Decays(Retrained):
    """100 digits of 64 pixels and 64 columns of noise; the decays can tell layers, or columns, apart.

    Without decay the network fits the noise; one decay for all that is strong enough against the noise hurts the pixels. With few
    rows and a trained network the curvature is far from a multiple of the identity, so that a hypergradient without curvature is
    wrong in length by decay and in direction across layers.
    """

    metric = "test accuracy"
    seconds = 2.0
    rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    dampings = (1e-3, 1e-2)
    each_weight = False

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(128, 24), nn.Tanh(), nn.Linear(24, 10))

    def setup(self, seed: int) -> Setup:
        generator = torch.Generator().manual_seed(seed)
        images, labels = digits()
        x = torch.cat([images.flatten(1), 0.5 * torch.randn(len(images), 64, generator=generator)], 1)
        data = split(x, labels, 100, 300, generator)
        model = fresh(self.model, seed)
        task = WeightDecays(model, decay=1e-3, each_weight=self.each_weight)
        problem = task.problem()
        params = {name: p.clone() for name, p in problem.inner.objective.params().items()}
        return Setup(problem, params, task.start(), wg.Rows(*data.train), wg.Rows(*data.held), data.test)

    def symmetry(self) -> wg.Symmetry | None:
        return wg.infer_symmetry(self.model(), torch.randn(3, 128))


class DecayPerGroup(Decays):
    """One decay per leaf."""

    name = "decay per group"

    def describe(self, hparams: Tree) -> dict[str, float]:
        return {f"log decay {name}": float(h) for name, h in hparams.items()}


class DecayPerWeight(Decays):
    """One decay per weight: 3,346 outer variables, and 300 rows to find them by."""

    name = "decay per weight"
    each_weight = True

    def describe(self, hparams: Tree) -> dict[str, float]:
        first = hparams["0.weight"]
        return {
            "log decay pixels": float(first[:, :64].mean()),
            "log decay noise": float(first[:, 64:].mean()),
        }


TRUE_RANGES = (0.5, 0.02, 0.1, 1.5)
"""By which held-out and test digits were turned, scaled and shifted; the training digits were not."""


class Augmentation(Retrained):
    """Upright digits to train on, turned and shifted ones to judge by: the ranges that made these are known.

    The loss depends on the ranges by way of the trained network only, and through the pixels it learns from, so that the
    hypergradient is all mixed derivative.
    """

    name, metric = "augmentation", "test accuracy"
    seconds = 3.0
    rates = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    dampings = (1e-3, 1e-2)
    length = 400

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))

    def setup(self, seed: int) -> Setup:
        generator = torch.Generator().manual_seed(seed)
        data = split(*digits(), 300, 300, generator)
        model = fresh(self.model, seed)
        task = AugmentationRange(model, decay=1e-3)
        problem = task.problem()
        params = {name: p.clone() for name, p in problem.inner.objective.params().items()}
        held, test = ((moved(x, generator), y) for x, y in (data.held, data.test))
        inner = Jittered(wg.Rows(*data.train, batch_size=100))
        return Setup(problem, params, task.start(), inner, wg.Rows(*held), test)

    def describe(self, hparams: Tree) -> dict[str, float]:
        return {f"range {name}": float(h.exp()) for name, h in hparams.items()}

    def symmetry(self) -> wg.Symmetry | None:
        return wg.infer_symmetry(self.model(), torch.randn(3, 8, 8))


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    noise = 2 * torch.rand(len(images), len(TRANSFORMS), generator=generator) - 1
    return warp(images, *(noise * torch.tensor(TRUE_RANGES)).unbind(1))


class InnerRate(Row):
    """Rates of SGD, one per leaf, from a start a hundred times too small, while training goes on from scratch.

    A rate moves no minimum, so implicit differentiation has no say; unrolled methods run with the row's optimiser in place of
    their own, which would not depend on the rates. How many steps they look ahead decides how small a rate they prefer.
    """

    name, metric = "inner rate", "minus test loss"
    seconds = 2.0
    rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    dampings = (1e-3, 1e-2)
    methods = ("one step", "unrolled 5")

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 10))

    def setup(self, seed: int) -> tuple[InnerRates, Setup]:
        generator = torch.Generator().manual_seed(seed)
        images, labels = digits()
        data = split(images.flatten(1), labels, 600, 300, generator)
        task = InnerRates(fresh(self.model, seed), rate=3e-3, momentum=0.9)
        problem = task.problem()
        params = {name: p.clone() for name, p in problem.inner.objective.params().items()}
        rows = (wg.Rows(*part, batch_size=64) for part in (data.train, data.held))
        return task, Setup(problem, params, task.start(), *rows, data.test)

    def run(self, make: Make, setting: Setting, seed: int) -> Result:
        task, setup = self.setup(seed)
        method, followed = make(setting.damping, None), task.followed()
        assert isinstance(method, wg.Unrolled), f"the row {self.name} takes unrolled methods only"
        # the first optimiser of a process costs torch's imports, about 2 CPU-seconds: not within the clock
        train(setup.problem.inner, setup.params, setup.hparams, setup.inner, 1, setting.rate)
        clock = Clock(self.seconds)
        found = timed(
            clock,
            setup.problem,
            replace(method, optimizer=task.optimizer),
            followed.make,
            adam(setting.rate),
            hparams=setup.hparams,
            params=setup.params,
            inner_data=setup.inner,
            outer_data=setup.outer,
            inner_steps=5,
            callbacks=[followed.follow],
            seed=seed,
        )
        if found is None:
            return clock.result(math.nan)
        outer = setup.problem.outer
        logs = {f"log rate {name}": float(h) for name, h in found.hparams.items()}
        right = accuracy(outer, found.params, setup.test)
        return clock.result(-loss(outer, found.params, setup.test), test_accuracy=right, **logs)

    def symmetry(self) -> wg.Symmetry | None:
        return None

    def probe(self, seed: int) -> Probe:
        _, setup = self.setup(seed)
        generator = torch.Generator().manual_seed(seed)
        batches = wg.Batches(setup.outer.draw(generator), setup.inner.draw(generator))
        return Probe(setup.problem, setup.params, setup.hparams, batches)


ROWS: list[Row] = [DecayPerWeight(), DecayPerGroup(), Augmentation(), InnerRate()]
