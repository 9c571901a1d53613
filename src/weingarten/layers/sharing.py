"""How a weight that is used at several positions of one datum is treated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Expand", "Reduce", "Sharing"]


class Sharing(ABC):
    """An approximation for shared positions (Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636).

    Both agree, and are exact for one datum, where there is one position. A layer that is called several times has the positions
    of all its calls.
    """

    @abstractmethod
    def inputs(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Rows ``(groups, R, in)`` and their weights ``(groups, R)``, from ``(groups, N, T, in)`` and ``(groups, N, T)``."""

    @abstractmethod
    def shares(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """What each position contributes to its row, and the rows' weights, from weights ``(..., N, T)``."""

    @abstractmethod
    def outputs(self, g: Tensor) -> Tensor:
        """Rows ``(groups, R', out)`` from output gradients ``(K, groups, N, T, out)``."""


@dataclass(frozen=True)
class Expand(Sharing):
    """Each position counts as a datum of its own. Exact for deep linear networks with a loss at every position."""

    def inputs(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        x = x.expand(len(weight), -1, -1, -1)
        return x.flatten(1, 2), weight.flatten(1, 2)

    def shares(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.new_ones(weight.shape), weight

    def outputs(self, g: Tensor) -> Tensor:
        return g.movedim(1, 0).flatten(1, 3)


@dataclass(frozen=True)
class Reduce(Sharing):
    """Inputs are averaged and gradients summed over positions first. Exact for deep linear networks that average positions."""

    def inputs(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        share, weights = self.shares(weight)
        return (x * share.unsqueeze(-1)).sum(2), weights

    def shares(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        total = weight.sum(-1, keepdim=True)
        return weight / total.where(total > 0, 1.0), weight.amax(-1)

    def outputs(self, g: Tensor) -> Tensor:
        return g.sum(3).movedim(1, 0).flatten(1, 2)
