"""Hypergradients by differentiating through the inner steps."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weingarten import tree
from weingarten.bilevel.gradients import hparams_gradient
from weingarten.bilevel.problem import (
    Batches,
    Hypergradient,
    HypergradientMethod,
    Problem,
    refuse_non_finite,
    refuse_unused,
)
from weingarten.objective import curvature_pass, refuse_once_differentiable
from weingarten.tree import Tree, TreeLike

__all__ = ["SGD", "Adam", "DifferentiableOptimizer", "Unrolled"]

Rate = float | Tensor | Mapping[str, Tensor]


class DifferentiableOptimizer(ABC):
    """An optimiser step as a differentiable function."""

    @abstractmethod
    def init(self, params: Tree) -> Any:
        """The state before the first step."""

    @abstractmethod
    def step(self, params: Tree, gradient: Tree, state: Any) -> tuple[Tree, Any]:
        """Parameters and state after one step."""


@dataclass(frozen=True)
class SGD(DifferentiableOptimizer):
    """``m <- momentum m + g``, ``p <- p - lr m``, as ``torch.optim.SGD``.

    Args:
        lr: a number, a 0-d tensor, or a dict of tensors that broadcast to the parameters (one rate per leaf). A tensor may depend
            on outer variables, if ``Unrolled`` gets a function of them that makes the optimiser.
        momentum: in [0, 1).
    """

    lr: Rate
    momentum: float = 0.0

    def init(self, params: Tree) -> Tree:
        return tree.zeros_like(params)

    def step(self, params: Tree, gradient: Tree, state: Tree) -> tuple[Tree, Tree]:
        state = tree.axpy(self.momentum, state, gradient)
        return {name: p - _of(self.lr, name) * state[name] for name, p in params.items()}, state


@dataclass(frozen=True)
class Adam(DifferentiableOptimizer):
    """As ``torch.optim.Adam``, with a derivative that stays finite where a gradient is zero.

    There ``sqrt(v)`` has no derivative; the update ``m / (sqrt(v) + eps)`` of an entry that has never had a gradient is taken as
    ``m / eps`` with the denominator constant. The rate is as that of ``SGD``.
    """

    lr: Rate = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def init(self, params: Tree) -> tuple[int, Tree, Tree]:
        return 0, tree.zeros_like(params), tree.zeros_like(params)

    def step(
        self, params: Tree, gradient: Tree, state: tuple[int, Tree, Tree]
    ) -> tuple[Tree, tuple[int, Tree, Tree]]:
        count, first, second = state[0] + 1, state[1], state[2]
        b1, b2 = self.betas
        first = {name: b1 * m + (1 - b1) * gradient[name] for name, m in first.items()}
        second = {name: b2 * v + (1 - b2) * gradient[name] ** 2 for name, v in second.items()}
        scale1, scale2 = 1 - b1**count, 1 - b2**count
        moved = {
            name: p - _of(self.lr, name) * (first[name] / scale1) / (_sqrt(second[name] / scale2) + self.eps)
            for name, p in params.items()
        }
        return moved, (count, first, second)


def _of(rate: Rate, name: str) -> float | Tensor:
    return rate[name] if isinstance(rate, Mapping) else rate


def _sqrt(x: Tensor) -> Tensor:
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


@dataclass(frozen=True)
class Unrolled(HypergradientMethod):
    r"""``dF/dhparams`` of ``F = f(params_T(hparams), hparams)`` after T inner steps from the given parameters.

    Reverse mode through the last ``truncate`` steps (Maclaurin et al. 2015; Shaban et al. 2019, https://arxiv.org/abs/1810.10667).
    Memory grows with the number of steps differentiated; one step is the look-ahead of DARTS. The inner steps use the batch
    ``batches.mixed`` each time.

    Args:
        steps: T.
        truncate: how many of the last steps to differentiate; default: all.
        optimizer: the inner step, ``SGD(lr, momentum)`` or ``Adam(lr)``; or a function of the outer variables that makes
            one, whose rates are then outer variables: ``lambda hparams: SGD(hparams["log_rate"].exp())``.

    Raises (when called):
        NotImplementedError: if an operation of the inner objective has no second derivative.
        ValueError: if the result is not finite, or an outer variable enters neither a level nor the optimiser.
    """

    steps: int
    optimizer: DifferentiableOptimizer | Callable[[TreeLike], DifferentiableOptimizer]
    truncate: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or (self.truncate is not None and not 1 <= self.truncate <= self.steps):
            raise ValueError(
                f"Unrolled: steps is {self.steps} and truncate {self.truncate}, expected 1 <= truncate <= steps"
            )

    def __call__(
        self,
        problem: Problem,
        params: TreeLike,
        hparams: TreeLike,
        batches: Batches,
        state: Any = None,
        generator: torch.Generator | None = None,
    ) -> Hypergradient:
        start = time.perf_counter()
        leaves = {name: h.detach().requires_grad_() for name, h in hparams.items()}
        with (
            curvature_pass(problem.inner.objective.model),
            curvature_pass(problem.outer.objective.model),
            torch.enable_grad(),
        ):
            moved = self._inner_steps(problem, tree.detach(params), leaves, batches)
            outer = problem.outer.value(moved, leaves, batches.outer)
            refuse_once_differentiable(
                "Unrolled", [outer], "write the inner objective in operations that have one"
            )
            found = torch.autograd.grad(outer, list(leaves.values()), allow_unused=True)
            refuse_unused("Unrolled", [name for name, g in zip(leaves, found, strict=True) if g is None])
            value = dict(zip(leaves, found, strict=True))
        direct = hparams_gradient(problem.outer, moved, hparams, batches.outer)
        refuse_non_finite("unrolled hypergradient", value)
        return Hypergradient(
            value=value,
            direct=direct,
            inverse_product=None,
            outer_loss=float(outer.detach()),
            seconds=time.perf_counter() - start,
        )

    def _inner_steps(self, problem: Problem, params: Tree, hparams: Tree, batches: Batches) -> Tree:
        differentiated = self.steps if self.truncate is None else self.truncate
        params = {name: p.requires_grad_() for name, p in params.items()}
        optimizer = (
            self.optimizer if isinstance(self.optimizer, DifferentiableOptimizer) else self.optimizer(hparams)
        )
        state = optimizer.init(params)
        for step in range(self.steps):
            live = step >= self.steps - differentiated
            value = problem.inner.value(params, hparams, batches.mixed)
            found = torch.autograd.grad(
                value,
                list(params.values()),
                torch.ones_like(value, requires_grad=live),  # as in gradient_twice
                create_graph=live,
                materialize_grads=True,
            )
            params, state = optimizer.step(params, dict(zip(params, found, strict=True)), state)
            if not live:
                params = {name: p.detach().requires_grad_() for name, p in params.items()}
                state = _detached(state)
        return params


def _detached(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.detach()
    if isinstance(state, dict):
        return {name: _detached(value) for name, value in state.items()}
    return tuple(_detached(value) for value in state) if isinstance(state, tuple) else state
