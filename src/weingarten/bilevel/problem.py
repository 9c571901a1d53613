r"""Bilevel problems: an inner level that trains the parameters, an outer level that judges them.

``min over hparams of F = f(params*(hparams), hparams)`` with ``params*(hparams) = argmin over params of g(params, hparams)``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weingarten.objective import Batch, Objective, curvature_pass
from weingarten.solvers import DivergenceError
from weingarten.tree import Tree, TreeLike

__all__ = [
    "Batches",
    "Hypergradient",
    "HypergradientMethod",
    "Level",
    "NonFiniteError",
    "Problem",
    "refuse_diverged",
    "refuse_non_finite",
    "refuse_silent_zeros",
    "refuse_unused",
    "unchanged",
]


def unchanged(hparams: TreeLike, batch: Batch) -> Batch:
    """The batch as it is: a level whose data does not depend on the outer variables."""
    return batch


@dataclass(frozen=True)
class Level:
    """One level: an objective, how the outer variables change its data, and a penalty.

    Args:
        objective: model and loss.
        transform: ``(hparams, batch) -> Batch`` with weights, targets or inputs that depend on the outer variables,
            found by ``batch.rows``; default: unchanged. Applied exactly once.
        penalty: ``(params, hparams) -> 0-d tensor``, such as ``L2(1e-3)``; default none.
    """

    objective: Objective
    transform: Callable[[TreeLike, Batch], Batch] = unchanged
    penalty: Callable[[TreeLike, TreeLike], Tensor] | None = None

    def value(self, params: TreeLike, hparams: TreeLike, batch: Batch) -> Tensor:
        """The level's objective on one batch."""
        value = self.objective.value(params, self.transform(hparams, batch))
        return value if self.penalty is None else value + self.penalty(params, hparams)


@dataclass(frozen=True)
class Problem:
    """A bilevel problem.

    Args:
        inner: what training minimises over the parameters.
        outer: what the outer variables minimise; usually the loss on trusted or held-out data.
    """

    inner: Level
    outer: Level


@dataclass(frozen=True)
class Batches:
    """The data of one hypergradient, drawn independently or not.

    Attributes:
        outer: for the outer gradient.
        mixed: for the mixed derivative, which reaches outer variables that belong to its rows; for unrolling, the inner data.
        curvature: for the curvature; default: that of ``mixed``.
    """

    outer: Batch
    mixed: Batch
    curvature: Batch | None = None

    @property
    def for_curvature(self) -> Batch:
        """The curvature batch, or its default."""
        return self.mixed if self.curvature is None else self.curvature


@dataclass(frozen=True)
class Hypergradient:
    """A hypergradient and how it came about.

    Attributes:
        value: ``dF/dhparams``.
        direct: its direct term ``d f/dhparams``.
        inverse_product: q, the approximation to ``(d^2 g + damping)^{-1} d f/dparams``; None for unrolling.
        outer_loss: f.
        seconds: wall time.
        inner_gradient: ``|d_params g|`` on the mixed batch. The implicit function theorem speaks of a minimum, where it is zero.
            NaN for methods that do not take this gradient.
        outer_change: ``-q . d_params g``, what f would change by, to first order, if inner training went on to its minimum. It
            is in the unit of f, and so tells whether training was long enough; no better than q is, and nothing where the
            identity stands for the curvature. NaN likewise. (The estimate by a dual solution, Becker and Rannacher 2001,
            https://doi.org/10.1017/S0962492901000010.)
        residual: ``|b - A q| / |b|``, NaN where it would have cost a product or no system was solved.
        converged: whether a solver reached its tolerance.
        negative_curvature: whether a solver met it.
        products: curvature-vector products used.
        state: to be passed to the next call (kept factors, warm start); None where there is none.
    """

    value: Tree
    direct: Tree
    inverse_product: Tree | None
    outer_loss: float
    seconds: float
    inner_gradient: float = math.nan
    outer_change: float = math.nan
    residual: float = math.nan
    converged: bool = False
    negative_curvature: bool = False
    products: int = 0
    state: Any = None


class HypergradientMethod(ABC):
    """A way to compute ``dF/dhparams``."""

    @abstractmethod
    def __call__(
        self,
        problem: Problem,
        params: TreeLike,
        hparams: TreeLike,
        batches: Batches,
        state: Any = None,
        generator: torch.Generator | None = None,
    ) -> Hypergradient:
        """The hypergradient at ``params`` and ``hparams``; nothing passed in is changed and no graph is kept."""


class NonFiniteError(ValueError):
    """A quantity of a hypergradient is NaN or infinite."""


def refuse_non_finite(quantity: str, values: TreeLike) -> None:
    """Raise a ``NonFiniteError`` that names the first leaf with an entry that is NaN or infinite."""
    for name, leaf in values.items():
        if not torch.isfinite(leaf).all():
            raise NonFiniteError(
                f"{quantity}: leaf {name!r} has {int((~torch.isfinite(leaf)).sum())} entries that are not finite; "
                "look for NaN or inf in the data, the parameters and the outer variables"
            )


def refuse_diverged(quantity: str, values: TreeLike, advice: str) -> None:
    """Raise a ``DivergenceError`` that names the first leaf with an entry that is NaN or infinite, and what to do.

    Args:
        quantity: the call, and what the leaves are.
        values: leaves; one without a name goes by the quantity alone.
        advice: what to change.
    """
    for name, leaf in values.items():
        if not torch.isfinite(leaf).all():
            bad = int((~torch.isfinite(leaf)).sum())
            found = f"is {float(leaf)}" if leaf.ndim == 0 else f"has {bad} entries that are not finite"
            raise DivergenceError(f"{quantity}{f' {name!r}' if name else ''} {found}; {advice}")


def refuse_unused(call: str, names: Iterable[str]) -> None:
    """Raise a ``ValueError`` if there are names, of outer variables that nothing depends on."""
    for name in names:
        raise ValueError(
            f"{call}: the outer variable {name!r} enters neither level on these batches, so that its hypergradient would be zero "
            "whatever it means; a rate of the inner optimiser moves no minimum and is found by unrolling only: "
            "Unrolled(steps, lambda hparams: SGD(...)); leave out a variable that has no use"
        )


def refuse_silent_zeros(
    call: str,
    problem: Problem,
    params: TreeLike,
    hparams: TreeLike,
    batches: Batches,
    direct: TreeLike,
    indirect: TreeLike,
) -> None:
    """Refuse outer variables that enter neither level; where no gradient is exactly zero this costs nothing.

    By the implicit function theorem the hypergradient of such a variable is zero, whatever it means.
    """
    if not any(not direct[name].any() and not indirect[name].any() for name in hparams):
        return
    params = {name: p.detach() for name, p in params.items()}
    leaves = {name: h.detach().requires_grad_() for name, h in hparams.items()}
    unused = set(leaves)
    for level, batch in ((problem.inner, batches.mixed), (problem.outer, batches.outer)):
        with curvature_pass(level.objective.model), torch.enable_grad():
            value = level.value(params, leaves, batch)
            if value.requires_grad:
                gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
                unused -= {name for name, g in zip(leaves, gradients, strict=True) if g is not None}
    refuse_unused(call, [name for name in leaves if name in unused])
