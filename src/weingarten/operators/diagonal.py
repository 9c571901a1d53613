"""A diagonal curvature."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from weingarten.matfun import MatrixFunction, on_spectrum
from weingarten.operators.operator import Curvature
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["DiagonalCurvature"]


@final
class DiagonalCurvature(Curvature):
    """``v -> d * v``.

    Args:
        values: the diagonal, >= 0, in the shape of the parameters.
        space: the parameters' own types, where they differ from those of ``values``.

    >>> curvature = DiagonalCurvature({"w": torch.tensor([1.0, 3.0])})
    >>> curvature.solve({"w": torch.tensor([2.0, 4.0])}, damping=1.0)
    {'w': tensor([1., 1.])}
    """

    def __init__(self, values: TreeLike, space: Space | None = None) -> None:
        self.values = dict(values)
        self._space = Space.of(values) if space is None else space
        self._space.check(self.values, "DiagonalCurvature")

    @property
    def space(self) -> Space:
        return self._space

    def apply(self, v: TreeLike) -> Tree:
        self._space.check(v, "DiagonalCurvature.apply")
        return {name: (self.values[name] * v[name]).to(dtype) for name, dtype in self._space.dtypes.items()}

    def map(self, function: MatrixFunction) -> DiagonalCurvature:
        return DiagonalCurvature(
            {name: on_spectrum(function, d) for name, d in self.values.items()}, self._space
        )

    def trace(self) -> Tensor:
        return torch.stack([d.sum() for d in self.values.values()]).sum()

    def diag(self) -> Tree:
        return {name: self.values[name].to(dtype) for name, dtype in self._space.dtypes.items()}
