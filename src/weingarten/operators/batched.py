"""Curvatures of which many are mapped at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, final

from weingarten.matfun import MatrixFunction
from weingarten.operators.operator import Curvature

__all__ = ["Batched", "map_each"]


class Batched(Curvature):
    """A curvature that shares the work of a matrix function with others of its kind: equal sizes are factorised together."""

    @staticmethod
    @abstractmethod
    def map_all(curvatures: Sequence[Any], function: MatrixFunction) -> list[Curvature]:
        """The matrix function of several curvatures of this kind, one result for each."""

    @final
    def map(self, function: MatrixFunction) -> Curvature:
        return self.map_all([self], function)[0]


def map_each(curvatures: Sequence[Curvature], function: MatrixFunction) -> list[Curvature]:
    """The matrix function of each curvature, those of one :class:`Batched` kind together."""
    kinds: dict[type[Batched], list[int]] = {}
    found: dict[int, Curvature] = {}
    for i, curvature in enumerate(curvatures):
        if isinstance(curvature, Batched):
            kinds.setdefault(type(curvature), []).append(i)
        else:
            found[i] = curvature.map(function)
    for kind, places in kinds.items():
        mapped = kind.map_all([curvatures[i] for i in places], function)
        found |= dict(zip(places, mapped, strict=True))
    return [found[i] for i in range(len(curvatures))]
