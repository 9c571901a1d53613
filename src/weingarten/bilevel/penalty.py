"""Penalties of the inner problem whose curvature is known."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weingarten import tree
from weingarten.objective import gradient_twice
from weingarten.operators import DiagonalCurvature, Operator
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["L2", "Penalty", "PenaltyHessian", "Proximal"]

Coefficient = float | Tensor | Mapping[str, Tensor]


class Penalty(ABC):
    """A term of the inner objective that depends on parameters and outer variables but on no data."""

    @abstractmethod
    def __call__(self, params: TreeLike, hparams: TreeLike) -> Tensor:
        """Its value, a 0-d tensor."""

    @abstractmethod
    def isotropic(self, params: TreeLike, hparams: TreeLike) -> float | None:
        """``c`` if its Hessian in the parameters is ``c I``, else None."""

    @abstractmethod
    def hessian(self, params: TreeLike, hparams: TreeLike) -> Operator:
        """Its Hessian in the parameters."""


@dataclass(frozen=True)
class L2(Penalty):
    r"""``1/2 sum_i c_i params_i^2``: weight decay.

    Args:
        coefficient: a number c, or a function of the outer variables that returns a 0-d tensor or a dict of tensors that
            broadcast to the parameters (one decay per leaf or per weight).

    >>> float(L2(2.0)({"w": torch.tensor([1.0, 2.0])}, {}))
    5.0
    """

    coefficient: float | Callable[[TreeLike], Coefficient]

    def __call__(self, params: TreeLike, hparams: TreeLike) -> Tensor:
        c = self._coefficients(params, hparams)
        return 0.5 * torch.stack([(c[name] * p**2).sum() for name, p in params.items()]).sum()

    def isotropic(self, params: TreeLike, hparams: TreeLike) -> float | None:
        c = self.coefficient(hparams) if callable(self.coefficient) else self.coefficient
        if isinstance(c, Mapping):
            return None
        return float(c) if not isinstance(c, Tensor) or c.ndim == 0 else None

    def hessian(self, params: TreeLike, hparams: TreeLike) -> DiagonalCurvature:
        c = self._coefficients(params, hparams)
        return DiagonalCurvature(
            {name: torch.as_tensor(c[name]).detach().to(p).expand_as(p) for name, p in params.items()}
        )

    def _coefficients(self, params: TreeLike, hparams: TreeLike) -> dict[str, float | Tensor]:
        c = self.coefficient(hparams) if callable(self.coefficient) else self.coefficient
        return {name: c[name] if isinstance(c, Mapping) else c for name in params}


def itself(hparams: TreeLike) -> TreeLike:
    """The outer variables as they are: a centre with the parameters' own names."""
    return hparams


@dataclass(frozen=True)
class Proximal(Penalty):
    r"""``1/2 strength |params - centre(hparams)|^2``: stay near a centre that the outer variables move.

    The inner problem of implicit MAML (Rajeswaran et al. 2019, https://arxiv.org/abs/1909.04630). Its Hessian in the parameters
    is ``strength I``, its mixed derivative ``-strength d centre / d hparams``.

    Args:
        strength: >= 0, in units of the inner loss per squared parameter.
        centre: from the outer variables to a tensor for each parameter, by its name and of its shape; default: the outer
            variables themselves.

    Raises:
        ValueError: if the strength is negative; when called, if the centre lacks a parameter or differs from it in shape.

    >>> float(Proximal(2.0)({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])}))
    4.0
    """

    strength: float
    centre: Callable[[TreeLike], TreeLike] = itself

    def __post_init__(self) -> None:
        if not self.strength >= 0:
            raise ValueError(f"Proximal: strength is {self.strength}, expected >= 0")

    def __call__(self, params: TreeLike, hparams: TreeLike) -> Tensor:
        centre = self.centre(hparams)
        for name, p in params.items():
            found = tuple(centre[name].shape) if name in centre else "no such leaf"
            if found != tuple(p.shape):
                raise ValueError(
                    f"Proximal: the centre of parameter {name!r} is {found}, expected shape {tuple(p.shape)}; "
                    "pass centre=, which maps the outer variables to the parameters' names and shapes"
                )
        distance = [((p - centre[name]) ** 2).sum() for name, p in params.items()]
        return 0.5 * self.strength * torch.stack(distance).sum()

    def isotropic(self, params: TreeLike, hparams: TreeLike) -> float:
        return self.strength

    def hessian(self, params: TreeLike, hparams: TreeLike) -> DiagonalCurvature:
        return DiagonalCurvature({name: torch.full_like(p, self.strength) for name, p in params.items()})


class PenaltyHessian(Operator):
    """The Hessian of any function ``penalty(params, hparams)``, by double backward.

    Raises (from ``apply``):
        NotImplementedError: if an operation of the penalty has no second derivative.
    """

    def __init__(
        self, penalty: Callable[[TreeLike, TreeLike], Tensor], params: TreeLike, hparams: TreeLike
    ) -> None:
        self.penalty, self.params, self.hparams = penalty, tree.detach(params), tree.detach(hparams)

    @property
    def space(self) -> Space:
        return Space.of(self.params)

    def apply(self, v: TreeLike) -> Tree:
        with torch.enable_grad():
            params = {name: p.detach().requires_grad_() for name, p in self.params.items()}
            value = self.penalty(params, self.hparams)
            remedy = "write the penalty in operations that have one"
            inner = tree.dot(gradient_twice("PenaltyHessian.apply", value, params, remedy), v)
            if not inner.requires_grad:  # it does not depend on the parameters
                return tree.zeros_like(params)
            product = torch.autograd.grad(inner, list(params.values()), materialize_grads=True)
        return dict(zip(params, product, strict=True))
