"""One level in float64 as plain functions, and the minimum of the inner one by Newton's method: for checks on small problems."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from weingarten import tree
from weingarten.bilevel.problem import Level
from weingarten.objective import Batch, Objective, curvature_pass
from weingarten.solvers import DivergenceError
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Level64", "doubled", "minimise"]


def doubled(value: Any) -> Any:
    """Floating-point tensors of a batch, or of nested containers, in float64; all else as it is."""
    if isinstance(value, Batch):
        return Batch(doubled(value.inputs), doubled(value.targets), doubled(value.weights), value.rows)
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: doubled(item) for name, item in value.items()}
    return tuple(doubled(item) for item in value) if isinstance(value, tuple | list) else value


class Level64:
    """A level on one batch, both as copies in float64.

    Derivatives come from ``torch.func`` and from differences, apart from the code they are to check.
    """

    def __init__(self, level: Level, batch: Batch) -> None:
        model = level.objective.model
        model = copy.deepcopy(model).double() if isinstance(model, nn.Module) else model
        self.level = replace(level, objective=Objective(model, level.objective.loss, level.objective.output))
        self.batch = doubled(batch)

    def value(self, params: TreeLike, hparams: TreeLike) -> float:
        """The level's objective."""
        with torch.no_grad(), curvature_pass(self.level.objective.model):
            return float(self._value(dict(params), dict(hparams)))

    def gradients(self, params: TreeLike, hparams: TreeLike) -> tuple[Tree, Tree]:
        """Its gradients in the parameters and in the outer variables."""
        with curvature_pass(self.level.objective.model):
            return torch.func.grad(self._value, argnums=(0, 1))(dict(params), dict(hparams))

    def mixed(self, params: Tree, hparams: Tree, q: Tree) -> Tree:
        """``(d^2_{params hparams} g)^T q`` as a central difference, of fourth order, of the gradient in the outer variables."""
        size = float(tree.norm(q))
        if size == 0:
            return tree.zeros_like(hparams)
        h = 1e-3 * max(1.0, float(tree.norm(params))) / size
        near, far = (self._difference(params, hparams, q, step) for step in (h / 2, h))
        return tree.sub(tree.scale(4 / 3, near), tree.scale(1 / 3, far))

    def hessian(self, params: Tree, hparams: Tree) -> Tensor:
        """The dense Hessian in the parameters."""
        with curvature_pass(self.level.objective.model):
            return _dense_hessian(lambda p: self._value(p, hparams), params)

    def penalty_hessian(self, params: Tree, hparams: Tree) -> Tensor:
        """The dense Hessian of the penalty alone."""
        penalty = self.level.penalty
        if penalty is None:
            size = Space.of(params).size
            return torch.zeros(size, size, dtype=torch.float64, device=Space.of(params).device)
        return _dense_hessian(lambda p: penalty(p, hparams), params)

    def _value(self, params: Tree, hparams: Tree) -> Tensor:
        return self.level.value(params, hparams, self.batch)

    def _difference(self, params: Tree, hparams: Tree, q: Tree, step: float) -> Tree:
        ends = [self.gradients(tree.axpy(sign * step, q, params), hparams)[1] for sign in (1, -1)]
        return tree.scale(1 / (2 * step), tree.sub(*ends))


def minimise(inner: Level64, params: Tree, hparams: Tree, tol: float, max_steps: int) -> Tree:
    """The minimum of the inner level near ``params``, by Newton steps that are damped until they descend.

    Raises:
        DivergenceError: if the norm of the gradient stays above ``tol``.
    """
    space, damping = Space.of(params), 0.0
    value = inner.value(params, hparams)
    for _ in range(max_steps):
        gradient = space.flatten(inner.gradients(params, hparams)[0])
        slope = float(gradient.norm())
        if slope <= tol:
            return params
        eigenvalues, basis = torch.linalg.eigh(inner.hessian(params, hparams))
        while True:
            curvature = eigenvalues.abs().clamp(min=1e-12 * float(eigenvalues.abs().max())) + damping
            step = basis @ ((basis.mT @ gradient) / curvature)
            moved = space.unflatten(space.flatten(params) - step)
            reached = inner.value(moved, hparams)
            if reached <= value + 1e-13 * abs(value) or damping > 1e12:
                break
            damping = max(10 * damping, 1e-4)
        params, value, damping = moved, reached, damping / 10 if damping > 1e-8 else 0.0
    raise DivergenceError(
        f"minimise: the inner gradient has norm {slope:.3g} after {max_steps} Newton steps, expected <= {tol:.3g}; "
        "start nearer to a minimum, give the inner problem a penalty, or raise tol"
    )


def _dense_hessian(function: Callable[[Tree], Tensor], params: Tree) -> Tensor:
    space = Space.of(params)
    result: Tensor = torch.autograd.functional.hessian(
        lambda flat: function(space.unflatten(flat)), space.flatten(params)
    )
    return result
