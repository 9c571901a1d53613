"""Projections of the outer variables onto the sets they may lie in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

__all__ = ["Box", "Projection", "Simplex"]


class Projection(ABC):
    """The nearest point of a closed convex set."""

    @abstractmethod
    def __call__(self, leaf: Tensor) -> Tensor:
        """The projection of one outer variable."""


@final
@dataclass(frozen=True)
class Box(Projection):
    """Entries between ``low`` and ``high``; infinite bounds are allowed.

    >>> Box(0, 1)(torch.tensor([-1.0, 0.5, 3.0]))
    tensor([0.0000, 0.5000, 1.0000])

    Raises:
        ValueError: if ``low > high`` or one is NaN.
    """

    low: float = -float("inf")
    high: float = float("inf")

    def __post_init__(self) -> None:
        if not self.low <= self.high:
            raise ValueError(f"Box: low is {self.low} and high {self.high}, expected low <= high")

    def __call__(self, leaf: Tensor) -> Tensor:
        return leaf.clamp(self.low, self.high)


@final
@dataclass(frozen=True)
class Simplex(Projection):
    r"""Entries >= 0 that sum to ``total``: ``x -> max(x - t, 0)`` with the one threshold t that gives the sum.

    By sorting, O(n log n): Held, Wolfe and Crowder 1974; Duchi et al. 2008, https://doi.org/10.1145/1390156.1390191.

    Args:
        total: the sum, > 0.
        axis: the axis along which entries sum; default the last one (a table of label distributions); None for the whole leaf.

    >>> Simplex()(torch.tensor([[0.5, 0.5], [2.0, 0.0]]))
    tensor([[0.5000, 0.5000],
            [1.0000, 0.0000]])

    Raises:
        ValueError: if ``total`` is not a finite number > 0.
    """

    total: float = 1.0
    axis: int | None = -1

    def __post_init__(self) -> None:
        if not 0 < self.total < float("inf"):
            raise ValueError(f"Simplex: total is {self.total}, expected a finite number > 0")

    def __call__(self, leaf: Tensor) -> Tensor:
        if self.axis is None:
            return self._project(leaf.reshape(-1)).reshape(leaf.shape)
        return self._project(leaf.movedim(self.axis, -1)).movedim(-1, self.axis)

    def _project(self, x: Tensor) -> Tensor:
        x = x - x.amax(-1, keepdim=True)  # changes nothing, except that large entries keep their digits
        ordered = x.sort(dim=-1, descending=True).values
        count = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device)
        threshold = (ordered.cumsum(-1) - self.total) / count
        support = (
            (ordered > threshold).sum(-1, keepdim=True).clamp(min=1)
        )  # the largest entry is always in it
        return (x - threshold.gather(-1, support - 1)).clamp(min=0)
