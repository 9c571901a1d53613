"""Curvatures that commute with a symmetry: one small block per kind."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import final

import torch
from torch import Tensor

from weingarten.groups import Action
from weingarten.matfun import MatrixFunction, evaluate
from weingarten.operators.operator import Curvature
from weingarten.symmetry.isotypic import Coordinates, Isotypic
from weingarten.symmetry.kinds import KindKey
from weingarten.symmetry.part import Part
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Commutant"]

_CHUNK = 256  # unit vectors looked at together


@final
class Commutant(Curvature):
    r"""``direct sum over kinds of I_dim (x) S_kind`` in isotypic coordinates (Schur's lemma).

    Artemev et al. 2026, https://arxiv.org/abs/2606.00442. Every matrix function acts on the small blocks; traces weigh a block by
    the dimension of its kind.

    Args:
        isotypic: the coordinates.
        blocks: ``(count, multiplicity, multiplicity)`` for each kind, symmetric positive semi-definite.
    """

    def __init__(self, isotypic: Isotypic, blocks: Mapping[KindKey, Tensor]) -> None:
        self.isotypic, self.blocks = isotypic, dict(blocks)

    @property
    def space(self) -> Space:
        return self.isotypic.space

    def apply(self, v: TreeLike) -> Tree:
        self.space.check(v, "Commutant.apply")
        coordinates = self.isotypic.gather(v)
        moved: Coordinates = {
            key: u.to(self.blocks[key].dtype) @ self.blocks[key] for key, u in coordinates.items()
        }
        return self.isotypic.scatter(moved)

    def map(self, function: MatrixFunction) -> Commutant:
        """Equal sizes are treated in one batch."""
        sizes: dict[tuple[int, torch.dtype], list[KindKey]] = {}
        for key, block in self.blocks.items():
            sizes.setdefault((block.shape[-1], block.dtype), []).append(key)
        found: dict[KindKey, Tensor] = {}
        for keys in sizes.values():
            stacked = evaluate(function, torch.cat([self.blocks[key] for key in keys]))
            counts = [len(self.blocks[key]) for key in keys]
            found |= dict(zip(keys, stacked.split(counts), strict=True))
        return Commutant(self.isotypic, {key: found[key] for key in self.blocks})

    def trace(self) -> Tensor:
        terms = [
            self.isotypic.blocks[key].dim * block.diagonal(dim1=-2, dim2=-1).sum()
            for key, block in self.blocks.items()
        ]
        return torch.stack(terms).sum()

    def diag(self) -> Tree:
        result = self.space.zeros()
        for part in self.isotypic.symmetry.parts:
            target = part.of(result)
            target.copy_(self._part_diagonal(part).reshape(target.shape))
        return result

    def _part_diagonal(self, part: Part) -> Tensor:
        """Entry i of a part is ``sum over kinds of tr(U_i S U_i^T)`` with U_i the coordinates of the i-th unit vector."""
        arranged = self.isotypic.arranged[part.key]
        free = prod(arranged.free)
        total: Tensor | float = 0.0
        for key, kinds in self.isotypic.kinds.of(part):
            block = self.blocks[key]
            columns = self.isotypic.blocks[key].columns[part.key]
            counts, copies = [kind.count for kind in kinds], [kind.copies for kind in kinds]
            value = block[:, columns, columns].reshape(*counts, *copies, free, *copies, free)
            value = value.diagonal(dim1=2 * len(kinds), dim2=-1)  # (counts, copies, copies, free)
            for name, times in reversed(arranged.names):
                kind = kinds.pop()
                weight = _projector(
                    self.isotypic.symmetry.groups[name], kind.label, self.isotypic.sizes[name], times
                )
                value = _contract(value, weight.to(value), len(kinds))
            total = total + value
        assert isinstance(total, Tensor)
        shape = [arranged.lengths[i] for i in arranged.order]
        inverse = sorted(range(len(shape)), key=lambda i: arranged.order[i])
        return total.reshape(shape).permute(inverse)


def _projector(group: Action, label: str, n: int, times: int) -> Tensor:
    """``sum over length of u_i u_i^T`` for each unit vector i of the axes: ``(n^times, count, copies, copies)``."""
    units = torch.eye(n**times, dtype=torch.float64).reshape(n**times, *[n] * times)
    found = []
    for piece in units.split(_CHUNK):
        u = (group.split(piece) if times == 1 else group.pair_split(piece))[label]
        found.append(torch.einsum("icla,iclb->icab", u, u))
    return torch.cat(found)


def _contract(value: Tensor, weight: Tensor, before: int) -> Tensor:
    """Replace the last of ``before + 1`` kinds, at count, copy and copy axes, by entries of the axis, in front of free."""
    kinds = before + 1
    # axes: counts 0..before, copies kinds..kinds+before, copies 2*kinds..2*kinds+before, then what is done and free
    value = value.movedim((before, kinds + before, 2 * kinds + before), (0, 1, 2))
    return torch.tensordot(value, weight, dims=([0, 1, 2], [1, 2, 3])).movedim(-1, 3 * before)
