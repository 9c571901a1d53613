"""Which damping serves the task: measured on held-out data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import partial

import torch
from torch import Tensor

from weingarten import tree
from weingarten.bilevel.problem import Batches, HypergradientMethod, Level, Problem
from weingarten.bilevel.projection import Projection
from weingarten.bilevel.run import OptimizerFactory
from weingarten.matfun import SingularMatrixError
from weingarten.objective import Batch, curvature_pass
from weingarten.solvers import DivergenceError
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["DampingRow", "DampingSweep", "suggest_damping"]

ADAM: OptimizerFactory = partial(torch.optim.Adam, lr=1e-2)


@dataclass(frozen=True)
class DampingRow:
    """One damping: the held-out loss it led to, and what its hypergradient was like.

    Attributes:
        damping: the value tried.
        held_out_loss: after one outer step and retraining; infinite if there was no hypergradient.
        norm: of the hypergradient.
        residual: of its inverse product, NaN if unknown.
        reason: why there was none, or empty.
    """

    damping: float
    held_out_loss: float
    norm: float
    residual: float
    reason: str = ""


@dataclass(frozen=True)
class DampingSweep:
    """The table of :func:`suggest_damping`.

    Attributes:
        rows: one per damping, as given.
        baseline: the held-out loss after the same retraining without an outer step.
    """

    rows: tuple[DampingRow, ...]
    baseline: float

    @property
    def best(self) -> float:
        """The damping with the lowest held-out loss; the largest of those that tie."""
        lowest = min(row.held_out_loss for row in self.rows)
        return max(row.damping for row in self.rows if row.held_out_loss == lowest)

    def __str__(self) -> str:
        """A table."""
        lines = [f"{'damping':>12} {'held-out loss':>14} {'norm':>12} {'residual':>10}"]
        for row in self.rows:
            mark = f"  {row.reason}" if row.reason else "  <- best" if row.damping == self.best else ""
            lines.append(
                f"{row.damping:12.4g} {row.held_out_loss:14.6g} {row.norm:12.4g} {row.residual:10.3g}{mark}"
            )
        return "\n".join([*lines, f"{'no step':>12} {self.baseline:14.6g}"])


def suggest_damping(
    method: HypergradientMethod,
    problem: Problem,
    params: TreeLike,
    hparams: TreeLike,
    batches: Batches,
    held_out: Batch,
    dampings: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0),
    inner_optimizer: OptimizerFactory = ADAM,
    inner_steps: int = 20,
    length: float = 0.1,
    project: Projection | None = None,
) -> DampingSweep:
    """Try dampings: one outer step each, retrain from the same parameters, and measure the outer loss on held-out data.

    The outer step has the same length for all, so that the direction is judged and not the hypergradient's size.
    Limits: one step from one point on one draw of the data; a loop takes many, its best damping can differ, and it
    drifts as training goes on. Where the held-out losses differ by less than their noise over ``held_out``, prefer
    the larger damping. The best row is chosen *by* ``held_out``, which is no fair measure of the result afterwards.
    For a final word compare whole runs of :func:`solve`.

    Args:
        method: a dataclass with a field ``damping``, such as ``Implicit()``.
        problem: the two levels.
        params: where to start; best trained at ``hparams`` first.
        hparams: the outer variables.
        batches: for the hypergradients; retraining uses ``batches.mixed``, without dropout.
        held_out: for the measurement; not the batch of the outer gradient.
        dampings: the values to try.
        inner_optimizer: for retraining, from a list of tensors to an optimiser.
        inner_steps: of it.
        length: of the outer step: root mean square change of an outer variable.
        project: where the outer variables may lie.

    Raises:
        TypeError: if the method has no damping.
        ValueError: if there is none to try, or none gave a hypergradient.

    >>> from weingarten import MSE, Implicit, Objective
    >>> batch = Batch(torch.eye(2), torch.tensor([[1.0], [0.0]]))
    >>> model = Objective(lambda params, x: x @ params["w"], MSE())
    >>> weigh = lambda hparams, b: replace(b, weights=hparams["weights"])
    >>> problem, params = Problem(Level(model, weigh), Level(model)), {"w": torch.zeros(2, 1)}
    >>> found = suggest_damping(
    ...     Implicit(preconditioner=None), problem, params, {"weights": torch.ones(2)}, Batches(batch, batch), batch, [0.1],
    ...     inner_optimizer=partial(torch.optim.SGD, lr=0.1),
    ... )
    >>> found.rows[0].held_out_loss < found.baseline
    True
    """
    if not is_dataclass(method) or not hasattr(method, "damping"):
        raise TypeError(
            f"suggest_damping: {type(method).__name__} has no damping, expected a method such as Implicit()"
        )
    if not dampings or not length > 0:
        raise ValueError(
            f"suggest_damping: dampings is {list(dampings)} and length {length}, expected a value to try, and > 0"
        )
    params, hparams = tree.detach(params), tree.detach(hparams)

    def measure(moved: Tree) -> float:
        trained = _retrain(problem.inner, params, moved, batches.mixed, inner_optimizer, inner_steps)
        with torch.no_grad(), curvature_pass(problem.outer.objective.model):
            value = float(problem.outer.value(trained, moved, held_out))
        return value if math.isfinite(value) else math.inf

    rows = []
    for damping in dampings:
        try:
            found = replace(method, damping=damping)(problem, params, hparams, batches)
        except (DivergenceError, SingularMatrixError) as error:
            rows.append(DampingRow(damping, math.inf, math.nan, math.nan, type(error).__name__))
            continue
        size = float(tree.norm(found.value))
        scale = length * Space.of(hparams).size ** 0.5 / size if size > 0 else 0.0
        moved = tree.axpy(-scale, found.value, hparams)
        moved = moved if project is None else {name: project(leaf) for name, leaf in moved.items()}
        rows.append(DampingRow(damping, measure(moved), size, found.residual))
    if all(math.isinf(row.held_out_loss) for row in rows):
        raise ValueError(
            "suggest_damping: no damping gave a finite held-out loss; try larger ones or a smaller length"
        )
    return DampingSweep(tuple(rows), measure(hparams))


def _retrain(
    inner: Level, params: Tree, hparams: Tree, batch: Batch, factory: OptimizerFactory, steps: int
) -> Tree:
    leaves = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
    optimizer = factory(list(leaves.values()))

    def value_and_gradient() -> Tensor:
        value = inner.value(leaves, hparams, batch)
        gradient = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
        for p, g in zip(leaves.values(), gradient, strict=True):
            p.grad = g
        return value.detach()

    with curvature_pass(inner.objective.model), torch.enable_grad():
        for _ in range(steps):
            optimizer.step(value_and_gradient)  # type: ignore[arg-type]
    return tree.detach(leaves)
