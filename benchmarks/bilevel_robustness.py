"""Rows of the bilevel benchmark that measure robustness: a small model whose training digits are changed within a ball.

``poisoning``: a fraction of the training rows is changed so that a model retrained from scratch loses on clean held-out rows.
``unlearnable``: every training row, in a smaller ball. ``detection`` and ``defence``: the rows were changed, and weights of rows
are learned on a few trusted rows; do they separate changed rows from others, and does retraining with them win the loss back?

Look at one row by itself: ``python -m benchmarks.bilevel_robustness --row poisoning --method "CG 10" --rate 0.1 --damping 0.01``
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

import weingarten as wg
from benchmarks.bilevel_methods import METHODS
from benchmarks.bilevel_protocol import Clock, Make, Probe, Result, Row, Setting
from benchmarks.bilevel_training import DIVERGED, adam, fresh, timed
from weingarten.applications.problems import Poisoning, RowWeights

TRAIN, HELD, TRUSTED = 400, 400, 50
DECAY = 1e-3
INNER = adam(1e-2)


@dataclass(frozen=True)
class Digits:
    """Digits in four parts: training, held-out rows of whoever changes the training rows, trusted rows, test."""

    train: wg.Batch
    held: wg.Batch
    trusted: wg.Batch
    test: wg.Batch

    @staticmethod
    def draw(seed: int) -> Digits:
        pixels, labels = load_digits(return_X_y=True)
        x, y = torch.as_tensor(pixels, dtype=torch.float32) / 16, torch.as_tensor(labels)
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        parts = order.split([TRAIN, HELD, TRUSTED, len(x) - TRAIN - HELD - TRUSTED])
        return Digits(*(wg.Batch(x[part], y[part], rows=torch.arange(len(part))) for part in parts))


def network(seed: int) -> nn.Module:
    return fresh(lambda: nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)), seed)


def retrain(batch: wg.Batch, seed: int, steps: int = 100) -> nn.Module:
    """A network trained from scratch, on all rows at every step; Adam's decay is the gradient of ``L2(DECAY)``."""
    model, loss = network(seed), wg.CrossEntropy()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-2, weight_decay=DECAY)
    for _ in range(steps):
        optimizer.zero_grad()
        (loss.total(model(batch.inputs), batch.targets, batch.weights) / len(batch.targets)).backward()
        optimizer.step()
    return model


def accuracy(train: wg.Batch, test: wg.Batch, seed: int) -> float:
    """On the test rows, after retraining from scratch: mean of three initialisations."""
    models = [retrain(train, 1000 + 10 * seed + k) for k in range(3)]
    with torch.no_grad():
        return float(
            torch.stack([model(test.inputs).argmax(1) == test.targets for model in models]).float().mean()
        )


def poisoning(data: Digits, model: nn.Module, fraction: float, epsilon: float, seed: int) -> Poisoning:
    """The task in which a fraction of the training rows, drawn at random, may be changed."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randperm(TRAIN, generator=generator)[: round(fraction * TRAIN)].sort().values
    objective = wg.Objective(model, wg.CrossEntropy())
    return Poisoning(objective, data.train.inputs[rows], rows, epsilon, penalty=wg.L2(DECAY))


def poison(
    task: Poisoning,
    data: Digits,
    method: wg.HypergradientMethod,
    rate: float,
    clock: wg.Callback | None,
    steps: int,
    seed: int,
) -> wg.Tree:
    """The changes that maximise the held-out loss; ``rate`` is in units of epsilon per step."""
    return wg.solve(
        task.problem(),
        method,
        INNER,
        partial(torch.optim.Adam, lr=rate * task.epsilon, maximize=True),
        steps=steps,
        inner_steps=5,
        hparams=task.start(),
        inner_data=data.train,
        outer_data=data.held,
        project=task.projection(),
        callbacks=[] if clock is None else [clock],
        seed=seed,
    ).hparams


class Changes(Row):
    """Rows changed for the worst; the metric is the test accuracy that retraining loses."""

    metric = "drop of test accuracy"
    seconds = 3.0
    rates = (0.007, 0.02, 0.05, 0.15, 0.4, 1.0)
    dampings = (3e-3, 3e-2)
    fraction: float
    epsilon: float

    def run(self, make: Make, setting: Setting, seed: int) -> Result:
        data = Digits.draw(seed)
        task = poisoning(data, retrain(data.train, seed), self.fraction, self.epsilon, seed)
        method = make(setting.damping, self.symmetry())
        clean = accuracy(data.train, data.test, seed)
        random = task.change(task.random(torch.Generator().manual_seed(seed)), data.train)
        controls = {"clean accuracy": clean, "drop, random": clean - accuracy(random, data.test, seed)}
        clock = Clock(self.seconds)
        try:
            found = poison(task, data, method, setting.rate, clock, 10**6, seed)
        except DIVERGED:
            return clock.result(float("nan"), **controls)
        return clock.result(clean - accuracy(task.change(found, data.train), data.test, seed), **controls)

    def probe(self, seed: int) -> Probe:
        data = Digits.draw(seed)
        start = poisoning(data, network(seed), self.fraction, self.epsilon, seed)
        hparams = start.random(torch.Generator().manual_seed(seed))
        model = retrain(start.change(hparams, data.train), seed)
        task = replace(start, objective=wg.Objective(model, wg.CrossEntropy()))
        return Probe(task.problem(), task.objective.params(), hparams, wg.Batches(data.held, data.train))

    def symmetry(self) -> wg.Symmetry | None:
        return wg.infer_symmetry(network(0), Digits.draw(0).train.inputs[:4])


class PoisoningRow(Changes):
    name = "poisoning"
    fraction, epsilon = 0.3, 0.3


class UnlearnableRow(Changes):
    name = "unlearnable"
    fraction, epsilon = 1.0, 0.1


@lru_cache(maxsize=4)
def poisoned(seed: int) -> tuple[Digits, wg.Batch, Tensor]:
    """Digits, the training rows after ``PoisoningRow``'s changes, and which were changed; the same for every method."""
    data = Digits.draw(seed)
    task = poisoning(data, retrain(data.train, seed), Weights.fraction, Weights.epsilon, seed)
    exact = wg.Implicit(solver=wg.CG(20), preconditioner=None, damping=1e-3)
    found = poison(task, data, exact, 0.2, None, 30, seed)
    changed = torch.zeros(TRAIN, dtype=torch.bool)
    changed[task.rows] = True
    return data, task.change(found, data.train), changed


class Weights(Row):
    """Weights of rows, learned on trusted rows, after some rows were changed."""

    seconds = 3.0
    rates = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    dampings = (1e-2, 1e-1)
    fraction, epsilon = 0.3, 0.3
    column: str

    def run(self, make: Make, setting: Setting, seed: int) -> Result:
        data, train, changed = poisoned(seed)
        both = [(getattr(train, name), getattr(data.trusted, name)) for name in ("inputs", "targets")]
        found = {
            "clean rows": accuracy(data.train, data.test, seed),
            "all rows": accuracy(train, data.test, seed),
            "trusted rows": accuracy(data.trusted, data.test, seed),
            "all and trusted rows": accuracy(wg.Batch(*map(torch.cat, both)), data.test, seed),
        }
        task = RowWeights(retrain(train, seed), TRAIN, DECAY)
        method, clock = make(setting.damping, self.symmetry()), Clock(self.seconds)
        outcome = timed(
            clock,
            task.problem(),
            method,
            INNER,
            adam(setting.rate),
            inner_steps=5,
            hparams=task.start(),
            inner_data=train,
            outer_data=data.trusted,
            seed=seed,
        )
        if outcome is None:
            return clock.result(float("nan"), **found)
        weights = task.weights(outcome.hparams)
        found["AUROC"] = float(roc_auc_score(changed.numpy(), -weights.numpy()))
        weights = weights / weights.mean().clamp(min=1e-6)
        found["learned weights"] = accuracy(replace(train, weights=weights), data.test, seed)
        return clock.result(found[self.column], **found)

    def probe(self, seed: int) -> Probe:
        data, train, _ = poisoned(seed)
        task = RowWeights(
            retrain(train, seed), TRAIN, DECAY
        )  # all weights are 1 at the start, as in this training
        problem = task.problem()
        params = problem.inner.objective.params()
        return Probe(problem, params, task.start(), wg.Batches(data.trusted, train))

    def symmetry(self) -> wg.Symmetry | None:
        return wg.infer_symmetry(network(0), Digits.draw(0).train.inputs[:4])


class DetectionRow(Weights):
    name = "detection"
    metric = "AUROC of changed rows"
    column = "AUROC"


class DefenceRow(Weights):
    name = "defence"
    metric = "test accuracy"
    column = "learned weights"


ROWS: list[Row] = [PoisoningRow(), UnlearnableRow(), DetectionRow(), DefenceRow()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--row", choices=[row.name for row in ROWS], default="poisoning")
    parser.add_argument("--method", choices=METHODS, default="CG 10")
    parser.add_argument("--rate", type=float, default=0.2)
    parser.add_argument("--damping", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=50)
    options = parser.parse_args()
    row = next(row for row in ROWS if row.name == options.row)
    result = row.run(METHODS[options.method].make, Setting(options.rate, options.damping), options.seed)
    extra = "  ".join(f"{name} {value:.3f}" for name, value in result.extra.items())
    print(f"{options.method}: {row.metric} {result.metric:.3f}  steps {result.steps}  {extra}")


if __name__ == "__main__":
    main()
