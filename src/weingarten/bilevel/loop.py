"""The loop: train the parameters a little, move the outer variables a little, again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weingarten import tree
from weingarten.bilevel.checkpoint import read, write
from weingarten.bilevel.events import Callback, Event
from weingarten.bilevel.history import History
from weingarten.bilevel.interrupt import Interrupted, Interrupts
from weingarten.bilevel.problem import HypergradientMethod, Problem
from weingarten.bilevel.progress import ProgressBar
from weingarten.bilevel.projection import Projection
from weingarten.bilevel.run import OptimizerFactory, Run
from weingarten.bilevel.sampling import Source, as_source
from weingarten.objective import Batch
from weingarten.solvers import DivergenceError
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Outcome", "solve"]

Data = Source | Batch | Sequence[Any]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves.

    Attributes:
        params: the trained parameters.
        hparams: the outer variables.
        history: one row per outer step.
        step: outer steps done.
        completed: whether these are all; False if a callback ended the run.
    """

    params: Tree
    hparams: Tree
    history: History
    step: int
    completed: bool


def solve(
    problem: Problem,
    hypergradient: HypergradientMethod,
    inner_optimizer: OptimizerFactory,
    outer_optimizer: OptimizerFactory,
    steps: int,
    *,
    hparams: TreeLike | nn.Module,
    inner_data: Data,
    outer_data: Data,
    curvature_data: Data | None = None,
    params: TreeLike | None = None,
    inner_steps: int = 1,
    project: Projection | Mapping[str, Projection] | None = None,
    callbacks: Iterable[Callback] = (),
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 0,
    resume: bool = True,
    seed: int = 0,
    progress: bool = False,
) -> Outcome:
    r"""Alternate ``inner_steps`` training steps of the parameters with one step of the outer variables.

    One outer step: train the parameters by ``inner_steps`` optimiser steps on fresh inner batches; take the
    hypergradient on an outer, a mixed (inner) and a curvature batch; step the outer optimiser; project. Everything
    random comes from ``seed``; torch's global generators are as before afterwards. On a CPU, a run that was
    interrupted and resumed equals the uninterrupted one bit for bit.

    Training runs in training mode (dropout is on, repeatably) except for batch normalisation, whose statistics stay
    as they are; the model's own modes come back. Hypergradients are taken without dropout.

    Args:
        problem: the two levels.
        hypergradient: ``Implicit()``, ``Unrolled(...)``, or one of ``METHODS``.
        inner_optimizer: from a list of tensors to a ``torch.optim.Optimizer``: ``functools.partial(torch.optim.Adam, lr=1e-3)``.
            Its state is kept from one outer step to the next, except that of ``LBFGS``, which is of one objective only.
        outer_optimizer: the same for the outer variables; not ``LBFGS``.
        steps: outer steps in all.
        hparams: the outer variables at the start: named tensors, which are not changed, or a module, whose
            trainable parameters they are and which is loaded with the result when the run ends (not if it is
            interrupted or fails).
        inner_data: a source such as ``Rows(x, y, batch_size=128)``, or one batch that is used every time.
        outer_data: the same for the outer level.
        curvature_data: the same for the curvature; default: the mixed batch.
        params: parameters at the start, which are not changed; default: those of the inner level's module, which
            is then loaded with the result when the run ends.
        inner_steps: inner optimiser steps per outer step.
        project: where the outer variables may lie, for all of them or by name; also applied at the start.
        callbacks: called with an :class:`Event` after every outer step; one that returns True ends the run.
        checkpoint: file to save to: every ``checkpoint_every`` steps (0: never), on SIGINT and at the end.
        checkpoint_every: outer steps between checkpoints.
        resume: continue from ``checkpoint`` if that file exists; False: start anew and replace it.
        seed: of all random draws.
        progress: show a :class:`ProgressBar`.

    Raises:
        CheckpointError: if the checkpoint cannot be read or was made under other settings (data is compared by size only).
        DivergenceError: if a loss, the parameters or the hypergradient is not finite; the last checkpoint stays.
        Interrupted: a ``KeyboardInterrupt``, after a SIGINT in the main thread, once the step it fell into is done and saved; its
            ``outcome`` holds the state. A second SIGINT does what it would have done without the loop.
        ValueError: for numbers out of range, names that do not exist, and ``LBFGS`` as outer optimiser.

    >>> from functools import partial
    >>> from weingarten import L2, MSE, Box, Implicit, Level, Objective
    >>> x, y = torch.eye(2), torch.tensor([[1.0], [0.0]])
    >>> ridge = Objective(lambda params, inputs: inputs @ params["w"], MSE())
    >>> decay = Level(ridge, penalty=L2(lambda hparams: hparams["c"]))
    >>> sgd = partial(torch.optim.SGD, lr=0.5)
    >>> start = {"c": torch.tensor(1.0)}, {"w": torch.zeros(2, 1)}
    >>> first_order = Implicit(preconditioner=None)
    >>> found = solve(
    ...     Problem(decay, Level(ridge)), first_order, sgd, sgd, steps=20, inner_steps=10, project=Box(0),
    ...     hparams=start[0], params=start[1], inner_data=(x, y), outer_data=(x, y),
    ... )
    >>> found.completed, bool(found.hparams["c"] < 0.5)
    (True, True)
    """
    _check_numbers(steps, inner_steps, checkpoint, checkpoint_every)
    run = Run.start(
        problem=problem,
        method=hypergradient,
        params=problem.inner.objective.params() if params is None else params,
        hparams=_named(hparams),
        factories=(inner_optimizer, outer_optimizer),
        sources=(
            as_source(inner_data),
            as_source(outer_data),
            None if curvature_data is None else as_source(curvature_data),
        ),
        inner_steps=inner_steps,
        project=project,
        seed=seed,
    )
    path = None if checkpoint is None else Path(checkpoint)
    settings = run.settings(steps, seed)
    if path is not None and resume and path.exists():
        run.restore(read(path, settings, Space.of(run.params).device))
    interrupted = _loop(run, steps, list(callbacks), path, checkpoint_every, settings, progress)
    outcome = Outcome(_copy(run.params), _copy(run.hparams), run.history, run.step, run.step == steps)
    if interrupted:
        raise Interrupted(_how_to_go_on(outcome, steps, path), outcome)
    if isinstance(hparams, nn.Module):
        _load(hparams, outcome.hparams)
    if params is None and isinstance(problem.inner.objective.model, nn.Module):
        _load(problem.inner.objective.model, outcome.params)
    return outcome


def _loop(
    run: Run,
    steps: int,
    callbacks: list[Callback],
    path: Path | None,
    every: int,
    settings: Mapping[str, str],
    progress: bool,
) -> bool:
    """Run to the end, to a callback's stop or to an interrupt; whether it was the last."""
    saved = run.step if run.step else None
    with ExitStack() as stack:
        interrupts = stack.enter_context(Interrupts())
        if progress:
            callbacks = [*callbacks, stack.enter_context(ProgressBar())]
        stop = False
        while run.step < steps and not stop:
            try:
                found = run.advance()
            except DivergenceError as error:
                raise DivergenceError(f"{error}{_what_stays(path, saved)}") from error
            event = Event(
                run.step, steps, tree.detach(run.params), tree.detach(run.hparams), found, run.history
            )
            stop = sum(bool(callback(event)) for callback in callbacks) > 0 or interrupts.seen
            due = every > 0 and run.step % every == 0
            if path is not None and (due or stop or run.step == steps):
                write(path, run.content(), settings)
                saved = run.step
        return interrupts.seen


def _check_numbers(steps: int, inner_steps: int, checkpoint: str | Path | None, every: int) -> None:
    if steps < 1 or inner_steps < 1:
        raise ValueError(f"solve: steps is {steps} and inner_steps {inner_steps}, expected both >= 1")
    if every < 0 or (every > 0 and checkpoint is None):
        raise ValueError(
            f"solve: checkpoint_every is {every} and checkpoint {checkpoint}, expected a number >= 0 and a file to write to"
        )


def _named(hparams: TreeLike | nn.Module) -> TreeLike:
    if isinstance(hparams, nn.Module):
        return {name: p for name, p in hparams.named_parameters() if p.requires_grad}
    return hparams


def _load(module: nn.Module, values: TreeLike) -> None:
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name in values:
                p.copy_(values[name])


def _copy(values: Mapping[str, Tensor]) -> Tree:
    return {name: leaf.detach().clone() for name, leaf in values.items()}


def _what_stays(path: Path | None, saved: int | None) -> str:
    return "" if path is None or saved is None else f"; the checkpoint {path} still holds step {saved}"


def _how_to_go_on(outcome: Outcome, steps: int, path: Path | None) -> str:
    start = f"interrupted after outer step {outcome.step} of {steps}; "
    if outcome.completed:
        return start + "all steps are done"
    if path is None:
        return (
            start
            + "nothing was saved, since no checkpoint was given; this exception's .outcome holds the state"
        )
    return (
        start
        + f"saved to {path}; to go on, call solve again with the same arguments, checkpoint={str(path)!r} and resume=True"
    )
