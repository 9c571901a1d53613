"""Hypergradients by a penalty on the inner problem's value: first derivatives only."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from weingarten import tree
from weingarten.bilevel.gradients import hparams_gradient, level_value, params_gradient
from weingarten.bilevel.problem import (
    Batches,
    Hypergradient,
    HypergradientMethod,
    Problem,
    refuse_diverged,
    refuse_non_finite,
    refuse_silent_zeros,
)
from weingarten.tree import Tree, TreeLike

__all__ = ["F2SA"]


@dataclass(frozen=True)
class F2SA(HypergradientMethod):
    r"""``dF/dhparams ~ d_hparams f(y) + sigma d_hparams (g(y) - g(z))`` with ``y ~ argmin f / sigma + g``, ``z ~ argmin g``.

    Kwon et al. 2023, https://arxiv.org/abs/2301.10945: the derivative of the Lagrangian ``f(y) + sigma (g(y) - g(z))``, whose
    distance from the hypergradient falls like ``1 / sigma``. Both y and z start at the parameters and take ``steps`` steps of
    gradient descent on the same batches, so that what the parameters have still to descend, and the batch's noise, cancels in the
    difference. What is kept between calls is ``y - z`` and not y itself: the parameters are trained by an optimiser of their
    own, and y follows them. The paper's growing sigma is a constant here.

    A call costs ``3 steps`` gradients in the parameters (one outer and two inner a step), three in the outer variables, one
    outer value, and no curvature-vector product. The field ``inverse_product`` of the result is ``sigma (z - y)``.

    Args:
        sigma: weight of the inner problem. The larger, the smaller the bias, and the closer y and z, until rounding shows in
            their difference. The default, 100, keeps both small in single precision.
        steps: of y and z, per call; 5, since what is kept adds up over calls.
        lr: of these steps, below ``2 / largest curvature`` of the inner objective; 0.1 suits networks on inputs of unit size.

    Raises (when called):
        DivergenceError: if y or z is not finite after the steps.
        ValueError: if the outer loss, the inner gradient at the parameters or the result is not finite, or an outer variable
            enters neither level.

    >>> from weingarten import MSE, Batch, Batches, Level, Objective, Problem
    >>> objective = Objective(lambda params, x: x @ params["w"], MSE())
    >>> level = Level(objective, penalty=lambda p, h: h["c"] * (p["w"] ** 2).sum())
    >>> batch = Batch(torch.eye(2), torch.ones(2, 1))
    >>> params, hparams = {"w": torch.full((2, 1), 0.5)}, {"c": torch.tensor(0.5)}
    >>> found = F2SA()(Problem(level, Level(objective)), params, hparams, Batches(batch, batch))
    >>> bool(found.value["c"] > 0), found.products
    (True, 0)
    """

    sigma: float = 100.0
    steps: int = 5
    lr: float = 0.1

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.sigma < math.inf or not 0 < self.lr < math.inf:
            raise ValueError(
                f"F2SA: sigma is {self.sigma}, steps {self.steps} and lr {self.lr}, expected finite numbers > 0 and steps >= 1"
            )

    def __call__(
        self,
        problem: Problem,
        params: TreeLike,
        hparams: TreeLike,
        batches: Batches,
        state: Tree | None = None,
        generator: torch.Generator | None = None,
    ) -> Hypergradient:
        start = time.perf_counter()
        params, hparams = tree.detach(params), tree.detach(hparams)
        loss = level_value(problem.outer, params, hparams, batches.outer)
        refuse_non_finite("F2SA: outer loss at the parameters", {"value": torch.tensor(loss)})
        y, z = self._moved(problem, params, hparams, batches, state)
        direct = hparams_gradient(problem.outer, y, hparams, batches.outer)
        refuse_non_finite("F2SA: direct term", direct)
        at_y, at_z = (hparams_gradient(problem.inner, p, hparams, batches.mixed) for p in (y, z))
        indirect = tree.scale(self.sigma, tree.sub(at_y, at_z))
        refuse_non_finite("F2SA: indirect term", indirect)
        refuse_silent_zeros("F2SA", problem, params, hparams, batches, direct, indirect)
        offset = tree.sub(y, z)
        return Hypergradient(
            value=tree.add(direct, indirect),
            direct=direct,
            inverse_product=tree.scale(-self.sigma, offset),
            outer_loss=loss,
            seconds=time.perf_counter() - start,
            state=offset,
        )

    def _moved(
        self, problem: Problem, params: Tree, hparams: Tree, batches: Batches, offset: Tree | None
    ) -> tuple[Tree, Tree]:
        """Both points after the steps."""
        y, z = params if offset is None else tree.add(params, offset), params
        for step in range(self.steps):
            down = params_gradient(problem.inner, z, hparams, batches.mixed)
            if step == 0:
                refuse_non_finite("F2SA: inner gradient at the parameters", down)
            outer = params_gradient(problem.outer, y, hparams, batches.outer)
            inner = params_gradient(problem.inner, y, hparams, batches.mixed)
            z = tree.axpy(-self.lr, down, z)
            y = tree.axpy(-self.lr, tree.axpy(1 / self.sigma, outer, inner), y)
        for name, point in {"z": z, "y": y}.items():
            refuse_diverged(
                f"F2SA: after {self.steps} steps, {name}",
                point,
                f"expected steps that descend; lr is {self.lr}, lower it",
            )
        return y, z
