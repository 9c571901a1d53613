"""One bilevel problem of cleaning with its data: trained, and asked what it has learned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from weingarten.applications.clean.folds import Folds, assign_folds, out_of_fold
from weingarten.applications.clean.levels import (
    GivenAndTrusted,
    Levels,
    believed_transition,
    evenly_wrong,
)
from weingarten.applications.clean.network import build_network
from weingarten.applications.clean.record import Record
from weingarten.applications.clean.rounds import FIRST
from weingarten.applications.clean.row_adam import RowAdam
from weingarten.applications.clean.settings import DAMPING, STEPS, Settings
from weingarten.bilevel import Outcome, Problem, Source, make_method, solve
from weingarten.tree import Tree

__all__ = ["Task"]

FOLDS, BATCH = 3, 4096
WARM_STEPS, INNER_STEPS, INNER_RATE = 100, 5, 1e-2
RATES, BETAS = {"weight": 0.02, "transition": 0.1, "trusted": 0.05}, (0.9, 0.99)
"""The weights move slowly: there are as many as rows, and at a rate that lets them go far in the steps there are, they learn the
few trusted rows by heart."""
ALONE = 0.1
"""The weights' rate without correction, where nothing else can tell wrong labels."""
REFRESH = 5
"""Outer steps between two estimates of the curvature."""
CHECKPOINT_EVERY = 10


@dataclass(frozen=True)
class Task:
    """The bilevel problem of one call and its data.

    Attributes:
        levels: the problem.
        x: features of the given rows, then of the trusted ones.
        labels: theirs.
        fold: theirs.
        first: T (C, C) at the start of the loop, as a network believes it that knows the trusted rows alone; None without
            correction.
    """

    levels: Levels
    x: Tensor
    labels: Tensor
    fold: Tensor
    first: Tensor | None

    @staticmethod
    def make(
        x: Tensor,
        given: Tensor,
        trusted_x: Tensor,
        trusted_y: Tensor,
        classes: int,
        settings: Settings,
        seed: int,
    ) -> Task:
        """The problem with fresh networks and folds, drawn from the seed."""
        generator = torch.Generator().manual_seed(seed)
        fold = torch.cat([assign_folds(y, FOLDS, generator) for y in (given, trusted_y)])
        seeds = torch.randint(2**31, (FOLDS,), generator=generator).tolist()
        networks = [build_network(settings.model, x.shape[1], settings.hidden, classes, s) for s in seeds]
        levels = Levels(Folds(networks).to(x), classes, len(given), settings.correct_labels)
        first = None
        if settings.correct_labels:
            network = build_network(settings.model, x.shape[1], settings.hidden, classes, seed).to(x)
            trusted = functional.one_hot(trusted_y, classes).to(x)
            FIRST.fit(network, trusted_x, trusted, torch.ones_like(trusted[:, 0]), seed)
            with torch.no_grad():
                first = believed_transition(network(x).softmax(1), given, evenly_wrong(classes))
        return Task(levels, torch.cat([x, trusted_x]), torch.cat([given, trusted_y]), fold, first)

    def solve(
        self,
        settings: Settings,
        seed: int,
        checkpoint: Path | None = None,
        resume: bool = False,
        progress: Callable[[float, str], None] = lambda part, text: None,
    ) -> tuple[Outcome, list[dict[str, float]]]:
        """Alternate training and hypergradients; what it left, and its history."""
        damping = DAMPING if settings.damping is None else settings.damping
        problem, hparams = self.levels.problem(), self.levels.start(self.first)
        data = GivenAndTrusted.pair(self.x, self.labels, self.fold, FOLDS, self.levels.given, BATCH)
        with Record(
            self.trusted_accuracy, settings.seconds, progress, checkpoint, CHECKPOINT_EVERY, resume
        ) as record:
            outcome = solve(
                problem,
                make_method(settings.method, damping, REFRESH),
                partial(torch.optim.Adam, lr=INNER_RATE),
                partial(RowAdam, rates=self._rates(hparams), betas=BETAS),
                STEPS if settings.steps is None else settings.steps,
                hparams=hparams,
                params=self._warm(problem, hparams, data[0], seed),
                inner_data=data[0],
                outer_data=data[1],
                inner_steps=INNER_STEPS,
                callbacks=[record],
                checkpoint=checkpoint,
                checkpoint_every=0 if checkpoint is None else CHECKPOINT_EVERY,
                resume=resume,
                seed=seed,
            )
        return outcome, record.rows(outcome.history, damping, FOLDS)

    def out_of_fold(self, params: Tree, rows: slice) -> Tensor:
        """Log-probabilities (N, C) of the true classes by networks that did not train on the row."""
        x, classes = self.x[rows], self.levels.classes
        clean = (
            torch.eye(classes, dtype=x.dtype).expand(len(x), -1, -1),
            torch.zeros(len(x), dtype=torch.bool),
        )
        with torch.no_grad():
            output = self.levels.problem().inner.objective.forward(params, (x, *clean))
        return out_of_fold(output, self.fold[rows])

    def trusted_accuracy(self, params: Tree) -> float:
        """On trusted rows, each judged by a network that did not train on it."""
        rows = slice(self.levels.given, None)
        return float((self.out_of_fold(params, rows).argmax(1) == self.labels[rows]).float().mean())

    def _rates(self, hparams: Tree) -> list[float]:
        rates = RATES if self.levels.correct else RATES | {"weight": ALONE}
        return [rates[name] for name in hparams]

    def _warm(self, problem: Problem, hparams: Tree, source: Source, seed: int) -> Tree:
        """The networks' parameters after training at the first outer variables."""
        start = problem.inner.objective.params()
        params = {name: p.clone().requires_grad_() for name, p in start.items()}
        optimizer = torch.optim.Adam(params.values(), lr=INNER_RATE)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(WARM_STEPS):
            optimizer.zero_grad()
            problem.inner.value(params, hparams, source.draw(generator)).backward()
            optimizer.step()
        return params
