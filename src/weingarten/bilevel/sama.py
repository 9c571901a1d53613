"""Hypergradients by SAMA: no curvature, the base optimiser's adaptation, a mixed derivative by differences."""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch

from weingarten import tree
from weingarten.bilevel.gradients import hparams_gradient, params_gradient
from weingarten.bilevel.implicit import outer_gradients
from weingarten.bilevel.problem import (
    Batches,
    Hypergradient,
    HypergradientMethod,
    Problem,
    refuse_non_finite,
    refuse_silent_zeros,
)
from weingarten.tree import Tree, TreeLike

__all__ = ["SAMA", "AdamAdaptation", "Adaptation"]


class Adaptation(ABC):
    """How an optimiser's update ``u(g)`` answers to the gradient g, entry by entry."""

    @abstractmethod
    def derivative(self, gradient: TreeLike, state: Any) -> tuple[Tree, Any]:
        """The diagonal of ``du/dg`` at this gradient, and the state for the next call.

        Args:
            gradient: of the inner objective, at the parameters.
            state: from the last call, None in the first; tensors, numbers and containers of them.
        """


@dataclass(frozen=True)
class AdamAdaptation(Adaptation):
    r"""The derivative of Adam's update in the gradient, from running moments of the gradients that the method sees.

    With ``m = b1 m' + (1 - b1) g`` and ``v = b2 v' + (1 - b2) g^2`` the update is ``u = lr m / (sqrt(v) + eps)``, and

        du/dg = lr ((1 - b1) / (sqrt(v) + eps) - (1 - b2) m g / (sqrt(v) (sqrt(v) + eps)^2))

    which for eps = 0 is ``lr ((1 - b1) b2 v' - b1 (1 - b2) m' g) / sqrt(v)^3``, as the authors compute it
    (https://github.com/leopard-ai/betty, ``betty/hypergradient/utils.py``).

    A method does not see the optimiser's own moments. Here m and v are the running means, with Adam's correction of
    their start, of the gradients at the mixed batches, one per hypergradient. The factors ``1 - b1`` and ``1 - b2`` are
    those of an optimiser that has run for long: at Adam's very first step ``u ~ lr sign(g)``, whose derivative is 0. An
    entry that has never had a gradient, which Adam does not move, gets 0.

    Args:
        lr: learning rate of the inner optimiser; the default is Adam's. It weighs the indirect against the direct term.
        betas: ``(b1, b2)``, those of the inner optimiser; the default is Adam's.
        eps: of the inner optimiser.

    >>> diagonal, state = AdamAdaptation().derivative({"w": torch.tensor([0.002, 0.0])}, None)
    >>> diagonal["w"]
    tensor([0.0495, 0.0000])
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        if not self.lr > 0 or not all(0 <= beta < 1 for beta in self.betas) or not self.eps >= 0:
            raise ValueError(
                f"AdamAdaptation: lr is {self.lr}, betas {self.betas} and eps {self.eps}, expected lr > 0, 0 <= beta < 1 "
                "and eps >= 0"
            )

    def derivative(self, gradient: TreeLike, state: Any) -> tuple[Tree, Any]:
        b1, b2 = self.betas
        zeros = tree.zeros_like(gradient)
        count, first, second = (0, zeros, zeros) if state is None else state
        count += 1
        first = tree.axpy(b1, first, tree.scale(1 - b1, gradient))
        second = {name: b2 * v + (1 - b2) * gradient[name] ** 2 for name, v in second.items()}
        diagonal = {}
        for name, g in gradient.items():
            m, v = first[name] / (1 - b1**count), second[name] / (1 - b2**count)
            moved = v > 0
            root = torch.where(moved, v, 1.0).sqrt()
            below = root + self.eps
            slope = (1 - b1) / below - (1 - b2) * m * g / (root * below**2)
            diagonal[name] = torch.where(moved, self.lr * slope, 0.0)
        return diagonal, (count, first, second)


@dataclass(frozen=True)
class SAMA(HypergradientMethod):
    r"""``dF/dhparams = d_hparams f - (d_hparams g(params + e v) - d_hparams g(params - e v)) / (2 e)``, ``v = du/dg d_params f``.

    Choe et al. 2023, https://arxiv.org/abs/2310.05674: the derivative of the inner optimiser's fixed point, with the inverse of
    its Jacobian replaced by the identity. What remains of the optimiser is its adaptation ``du/dg``, which rescales the outer
    gradient entry by entry. The mixed derivative is a central difference with ``e = step / |v|``, as in DARTS
    (https://arxiv.org/abs/1806.09055), so that only first derivatives of the inner objective are taken. The algorithm's own move
    of the parameters along v is not made: a method changes nothing that it is given.

    It costs one outer gradient, two inner gradients in the outer variables, with an adaptation one inner gradient in the
    parameters, and no curvature-vector product. The field ``inverse_product`` of the result is v.

    Args:
        adaptation: how the inner optimiser rescales gradients; None for none, which is right for SGD. The default is Adam's.
        step: length of the difference's step in the space of parameters, by default that of DARTS. The truncation error grows
            like its square, the rounding error like its inverse.

    Raises (when called):
        ValueError: if a gradient, the adapted gradient or the mixed derivative is not finite, or an outer variable enters
            neither level.

    >>> from weingarten import MSE, Batch, Batches, Level, Objective, Problem
    >>> objective = Objective(lambda params, x: x @ params["w"], MSE())
    >>> level = Level(objective, penalty=lambda p, h: h["c"] * (p["w"] ** 2).sum())
    >>> batch = Batch(torch.eye(2), torch.ones(2, 1))
    >>> params, hparams = {"w": torch.full((2, 1), 0.5)}, {"c": torch.tensor(0.5)}
    >>> found = SAMA(adaptation=None)(Problem(level, Level(objective)), params, hparams, Batches(batch, batch))
    >>> round(float(found.value["c"]), 3), found.products  # -2 w^T d f/dw with d f/dw = w - 1
    (1.0, 0)
    """

    adaptation: Adaptation | None = AdamAdaptation()
    step: float = 1e-2

    def __post_init__(self) -> None:
        if not 0 < self.step < math.inf:
            raise ValueError(f"SAMA: step is {self.step}, expected a finite number > 0")

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
        params, hparams = tree.detach(params), tree.detach(hparams)
        loss, v, direct = outer_gradients(problem.outer, params, hparams, batches.outer)
        if self.adaptation is not None:
            gradient = params_gradient(problem.inner, params, hparams, batches.mixed)
            refuse_non_finite("SAMA: inner gradient", gradient)
            diagonal, state = self.adaptation.derivative(gradient, state)
            v = {name: diagonal[name] * leaf for name, leaf in v.items()}
            refuse_non_finite("SAMA: adapted outer gradient", v)
        mixed = self._mixed(problem, params, hparams, batches, v)
        refuse_non_finite("SAMA: mixed derivative", mixed)
        refuse_silent_zeros("SAMA", problem, params, hparams, batches, direct, mixed)
        return Hypergradient(
            value=tree.sub(direct, mixed),
            direct=direct,
            inverse_product=v,
            outer_loss=loss,
            seconds=time.perf_counter() - start,
            state=state,
        )

    def _mixed(self, problem: Problem, params: Tree, hparams: Tree, batches: Batches, v: Tree) -> Tree:
        size = float(tree.norm(v))
        if size == 0:
            return tree.zeros_like(hparams)
        e = self.step / size
        ahead, behind = (
            hparams_gradient(problem.inner, tree.axpy(sign * e, v, params), hparams, batches.mixed)
            for sign in (1, -1)
        )
        return tree.scale(1 / (2 * e), tree.sub(ahead, behind))
