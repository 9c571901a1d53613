"""How a weight that is used at several positions of one datum is treated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Expand", "Reduce", "Sharing"]


class Sharing(ABC):
    """An approximation for shared positions (Eschenhagen et al. 2023, https://arxiv.org/abs/2311.00636).

    Both agree, and are exact for one datum, where there is one position.
    """

    @abstractmethod
    def inputs(self, x: Tensor) -> Tensor:
        """Rows ``(groups, R, in)`` from layer inputs ``(groups, N, T, in)``."""

    @abstractmethod
    def outputs(self, g: Tensor) -> Tensor:
        """Rows ``(groups, R', out)`` from output gradients ``(K, groups, N, T, out)``."""


@dataclass(frozen=True)
class Expand(Sharing):
    """Each position counts as a datum of its own. Exact for deep linear networks with a loss at every position."""

    def inputs(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)

    def outputs(self, g: Tensor) -> Tensor:
        return g.movedim(1, 0).flatten(1, 3)


@dataclass(frozen=True)
class Reduce(Sharing):
    """Inputs are averaged and gradients summed over positions first. Exact for deep linear networks that average positions."""

    def inputs(self, x: Tensor) -> Tensor:
        return x.mean(2)

    def outputs(self, g: Tensor) -> Tensor:
        return g.sum(3).movedim(1, 0).flatten(1, 2)
