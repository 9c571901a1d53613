"""Averages over the orbit of one or two vectors."""

from __future__ import annotations

from typing import final

import torch

from weingarten.operators.commutant import Commutant
from weingarten.operators.operator import Operator
from weingarten.symmetry.isotypic import Coordinates, Isotypic
from weingarten.symmetry.spec import Symmetry
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["CommutantMap", "gram", "orbit_mean", "orbit_moment"]


def orbit_mean(symmetry: Symmetry, v: TreeLike) -> Tree:
    """``R1(v) = E[A v]`` over the group: the part of ``v`` that is invariant.

    >>> from weingarten.groups import Permutation
    >>> symmetry = Symmetry.parse({"w": "h ."}, h=Permutation())
    >>> orbit_mean(symmetry, {"w": torch.tensor([[1.0, 5.0], [3.0, 7.0]])})
    {'w': tensor([[2., 6.],
            [2., 6.]])}
    """
    isotypic = Isotypic(symmetry, v)
    coordinates = isotypic.gather(v)
    kept = {key: u if not key[1] else torch.zeros_like(u) for key, u in coordinates.items()}
    return isotypic.scatter(kept)


def orbit_moment(symmetry: Symmetry, v: TreeLike, other: TreeLike | None = None) -> Commutant | CommutantMap:
    r"""``R2(v, v') = E[(A v)(A v')^T]``: by Schur's lemma ``V_kind^T V'_kind / dim`` on every kind.

    Args:
        symmetry: the group.
        v: a vector.
        other: v'; default: v itself, and the result is a curvature.
    """
    isotypic = Isotypic(symmetry, v)
    first = isotypic.gather(v)
    if other is None:
        return Commutant(isotypic, gram(isotypic, first))
    second = isotypic.gather(other)
    return CommutantMap(
        isotypic, {key: u.mT @ second[key] / isotypic.blocks[key].dim for key, u in first.items()}
    )


def gram(isotypic: Isotypic, coordinates: Coordinates) -> Coordinates:
    """``V^T V / dim`` for each kind, ``(count, multiplicity, multiplicity)``."""
    return {key: u.mT @ u / isotypic.blocks[key].dim for key, u in coordinates.items()}


@final
class CommutantMap(Operator):
    """A linear map that commutes with a symmetry and need not be symmetric: ``u -> u S^T`` in isotypic coordinates."""

    def __init__(self, isotypic: Isotypic, blocks: Coordinates) -> None:
        self.isotypic, self.blocks = isotypic, dict(blocks)

    @property
    def space(self) -> Space:
        return self.isotypic.space

    def apply(self, v: TreeLike) -> Tree:
        self.space.check(v, "CommutantMap.apply")
        return self.isotypic.scatter(
            {key: u @ self.blocks[key].mT for key, u in self.isotypic.gather(v).items()}
        )
