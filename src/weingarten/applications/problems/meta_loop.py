"""The loop of meta-learning: fresh episodes in every outer step, inner training from the start that the task says."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from weingarten import tree
from weingarten.bilevel import Batches, Callback, Event, History, HypergradientMethod, Outcome, Problem
from weingarten.bilevel.problem import refuse_diverged
from weingarten.bilevel.run import OptimizerFactory
from weingarten.objective import Batch
from weingarten.tree import Tree, TreeLike

__all__ = ["EpisodeSource", "Episodes", "MetaTask", "adapt", "meta_solve"]


@dataclass(frozen=True)
class Episodes:
    """B small tasks of one kind, datum n of each in row n.

    Attributes:
        support: inputs (N, B, ...) and targets (N, B) or (N, C, B) to adapt to.
        query: of the same tasks, with as many rows as it likes, to judge by.
    """

    support: Batch
    query: Batch


class EpisodeSource(ABC):
    """Something episodes can be drawn from."""

    @abstractmethod
    def draw(self, episodes: int, generator: torch.Generator) -> Episodes:
        """So many episodes; equal generator states give equal ones."""


class MetaTask(ABC):
    """A bilevel problem whose inner level is posed anew by every batch of episodes."""

    @abstractmethod
    def problem(self) -> Problem:
        """The two levels."""

    @abstractmethod
    def start(self) -> Tree:
        """The outer variables at the start."""

    @abstractmethod
    def begin(self, hparams: TreeLike) -> Tree:
        """The parameters from which inner training starts."""


def adapt(
    task: MetaTask, hparams: TreeLike, support: Batch, inner_optimizer: OptimizerFactory, inner_steps: int
) -> tuple[Tree, float]:
    """Inner training on whole support sets: the parameters, and the loss before the last step.

    What the outer variables make of the data (features, say) is computed once, since they stay.

    Args:
        task: where to start from and what to minimise.
        hparams: the outer variables, which stay as they are.
        support: of B episodes.
        inner_optimizer: from a list of tensors to a ``torch.optim.Optimizer``: ``functools.partial(torch.optim.SGD, lr=0.1)``.
            The inner problem is a mean over episodes, so that a rate for one of them is to be multiplied by B.
        inner_steps: steps of it, >= 0.

    Raises:
        DivergenceError: if the parameters are not finite.
    """
    inner, fixed = task.problem().inner, tree.detach(hparams)
    with torch.no_grad():
        batch = inner.transform(fixed, support)
        params = {name: p.detach().clone().requires_grad_() for name, p in task.begin(fixed).items()}
    optimizer, loss = inner_optimizer(list(params.values())), torch.tensor(torch.nan)
    for _ in range(inner_steps):
        loss = inner.objective.value(params, batch)
        loss = loss if inner.penalty is None else loss + inner.penalty(params, fixed)
        for p, g in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
            p.grad = g
        optimizer.step()
    refuse_diverged("adapt: parameter", params, "lower the inner optimiser's rate")
    return tree.detach(params), float(loss.detach())


def meta_solve(
    task: MetaTask,
    hypergradient: HypergradientMethod,
    inner_optimizer: OptimizerFactory,
    outer_optimizer: OptimizerFactory,
    steps: int,
    *,
    episodes: EpisodeSource,
    batch: int,
    inner_steps: int,
    hparams: TreeLike | None = None,
    callbacks: Iterable[Callback] = (),
    seed: int = 0,
) -> Outcome:
    r"""Draw episodes, adapt to their support sets, step the outer variables by the hypergradient on their queries; again.

    Every outer step is a new inner problem with a new start, so that the method is called with no state: factors of other
    episodes' parameters are no curvature of these, a warm start would solve another system, and a method that trains
    parameters of its own starts them from the adapted ones. ``refresh`` of ``Implicit`` is therefore without effect here. A
    method that unrolls steps takes them on from the adapted parameters.

    Args:
        task: ``ImplicitMAML(...)`` or ``HyperRepresentation(...)``.
        hypergradient: ``Implicit()``, ``Unrolled(...)`` or another.
        inner_optimizer: as for :func:`adapt`, made anew for each batch of episodes.
        outer_optimizer: the same for the outer variables.
        steps: outer steps in all.
        episodes: where they come from.
        batch: B, as the task's networks have it.
        inner_steps: inner steps per batch of episodes.
        hparams: the outer variables at the start, which are not changed; default: ``task.start()``.
        callbacks: called with an :class:`~weingarten.Event` after every outer step; one that returns True ends the run.
        seed: of all draws.

    Returns:
        As :func:`~weingarten.solve`; the parameters are those adapted to the last episodes.

    Raises:
        DivergenceError: if the parameters, the hypergradient or the outer variables are not finite.
        ValueError: for numbers out of range.

    >>> from functools import partial
    >>> from weingarten import MSE, Implicit
    >>> from weingarten.applications.problems import GroupedMLP, ImplicitMAML, Sines
    >>> task = ImplicitMAML(GroupedMLP((1, 8, 1), episodes=4), MSE(), prox=1.0)
    >>> sgd, adam = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adam, lr=1e-3)
    >>> found = meta_solve(task, Implicit(), sgd, adam, 3, episodes=Sines(), batch=4, inner_steps=2)
    >>> found.completed, len(found.history)
    (True, 3)
    """
    if min(steps, batch, inner_steps) < 1:
        raise ValueError(
            f"meta_solve: steps is {steps}, batch {batch} and inner_steps {inner_steps}, expected all >= 1"
        )
    start = task.start() if hparams is None else hparams
    leaves = {name: h.detach().clone().requires_grad_() for name, h in start.items()}
    optimizer, problem, history = outer_optimizer(list(leaves.values())), task.problem(), History()
    draws = torch.Generator().manual_seed(seed)
    of_method = torch.Generator(device=next(iter(leaves.values())).device).manual_seed(seed)
    listeners, stop, step = list(callbacks), False, 0
    while step < steps and not stop:
        began, step = time.perf_counter(), step + 1
        drawn = episodes.draw(batch, draws)
        params, loss = adapt(task, leaves, drawn.support, inner_optimizer, inner_steps)
        batches = Batches(outer=drawn.query, mixed=drawn.support)
        found = hypergradient(problem, params, tree.detach(leaves), batches, None, of_method)
        refuse_diverged(f"meta_solve: at outer step {step}, hypergradient", found.value, "raise the damping")
        for name, leaf in leaves.items():
            leaf.grad = found.value[name].to(leaf.dtype)
        optimizer.step()
        refuse_diverged(f"meta_solve: at outer step {step}, outer variable", leaves, "lower the outer rate")
        history.append(step, loss, found, time.perf_counter() - began)
        event = Event(step, steps, params, tree.detach(leaves), found, history)
        stop = sum(bool(listener(event)) for listener in listeners) > 0
    copied = {name: h.detach().clone() for name, h in leaves.items()}
    return Outcome(params, copied, history, step, step == steps)
