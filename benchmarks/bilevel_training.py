"""What the rows of the bilevel benchmark share: fresh models, training at fixed outer variables, and how a timed run ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

import weingarten as wg
from benchmarks.bilevel_protocol import Clock
from weingarten.bilevel.problem import NonFiniteError
from weingarten.bilevel.sampling import seeded_by
from weingarten.matfun import SingularMatrixError
from weingarten.tree import Tree

__all__ = ["DIVERGED", "accuracy", "adam", "fresh", "loss", "predicted", "timed", "train"]

Built = TypeVar("Built")
DIVERGED = (wg.DivergenceError, NonFiniteError, SingularMatrixError, torch.linalg.LinAlgError)
"""How a run may end without a result. A method that refuses a row raises another error, which is told apart."""


def adam(rate: float) -> Callable[[list[Tensor]], torch.optim.Optimizer]:
    return partial(torch.optim.Adam, lr=rate)


def timed(
    clock: Clock, problem: wg.Problem, method: wg.HypergradientMethod, *optimizers: Any, **arguments: Any
) -> wg.bilevel.Outcome | None:
    """``wg.solve`` until the clock ends it; None where it diverged."""
    callbacks = [*arguments.pop("callbacks", ()), clock]
    try:
        return wg.solve(problem, method, *optimizers, steps=10**6, callbacks=callbacks, **arguments)
    except DIVERGED:
        return None


def fresh(build: Callable[[], Built], seed: int) -> Built:
    """The model, or what holds it, at a start that the seed decides."""
    with seeded_by(seed):
        return build()


def train(
    level: wg.Level,
    params: Tree,
    hparams: Tree,
    source: wg.Source,
    steps: int,
    rate: float,
    seed: int = 0,
    last: float = 1.0,
) -> Tree:
    """Minimise the level by Adam from the parameters; the outer variables stay.

    Args:
        level: the inner level, say.
        params: at the start, which are not changed.
        hparams: the outer variables.
        source: of batches.
        steps: of Adam.
        rate: at the start.
        seed: of the batches.
        last: the rate falls linearly to this part of it.
    """
    params = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    generator, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(params.values(), rate)
    fall = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, last, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        level.value(params, hparams, source.draw(generator)).backward()
        optimizer.step()
        fall.step()
    return {name: p.detach() for name, p in params.items()}


def predicted(level: wg.Level, params: Tree, inputs: Any) -> Tensor:
    """The most likely class of each row (N,)."""
    with torch.no_grad():
        return level.objective.forward(params, inputs).argmax(1)


def accuracy(level: wg.Level, params: Tree, data: tuple[Any, Tensor]) -> float:
    return float((predicted(level, params, data[0]) == data[1]).float().mean())


def loss(level: wg.Level, params: Tree, data: tuple[Any, Tensor]) -> float:
    with torch.no_grad():
        return float(level.objective.value(params, wg.Batch(*data)))
