"""Isotypic coordinates of whole parameter dicts: one stack of vectors per kind of the product group."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from weingarten.groups import Kind
from weingarten.groups.action import TRIVIAL
from weingarten.symmetry.kinds import Arrangement, KindKey
from weingarten.symmetry.part import Part
from weingarten.symmetry.spec import Symmetry
from weingarten.tree import Space, Tree, TreeLike

__all__ = ["Coordinates", "Isotypic"]

Names = tuple[tuple[str, str], ...]

Coordinates = dict[KindKey, Tensor]
"""``(count, length, multiplicity)`` by kind."""


class Isotypic:
    """Gather and scatter between parameter dicts and coordinates, for one symmetry and one set of shapes.

    Args:
        symmetry: what acts where. Leaves that it does not speak of are not part of the space.
        params: shapes, types, device, and the order of the leaves.

    Attributes:
        blocks: the kinds, in order of appearance.
        arranged: for each part, its axes in the order of the coordinates.
        sizes: of the names.
    """

    def __init__(self, symmetry: Symmetry, params: TreeLike) -> None:
        self.symmetry = symmetry
        self.kinds = symmetry.kinds(params)
        leaves = set(symmetry.leaves())
        self.space = Space.of({leaf: p for leaf, p in params.items() if leaf in leaves})
        self.blocks, self.arranged, self.sizes = self.kinds.blocks, self.kinds.arranged, self.kinds.sizes

    def gather(self, values: TreeLike) -> Coordinates:
        """Coordinates ``(..., count, length, multiplicity)`` of each kind; an isometry."""
        pieces: dict[KindKey, list[Tensor]] = {key: [] for key in self.blocks}
        for part in self.symmetry.parts:
            for key, piece in self.split_part(part, part.of(values)).items():
                pieces[key].append(piece)
        return {key: torch.cat(found, dim=-1) for key, found in pieces.items()}

    def scatter(self, coordinates: Coordinates) -> Tree:
        """The adjoint of :meth:`gather`, its inverse on coordinates that were gathered."""
        like = next(iter(coordinates.values()))  # new_zeros keeps the batch dimension of a vmap
        result = {leaf: like.new_zeros(shape) for leaf, shape in self.space.shapes.items()}
        for part in self.symmetry.parts:
            arranged = self.arranged[part.key]
            x = self._merge(part, arranged, coordinates)
            shape = [arranged.lengths[i] for i in arranged.order]
            x = x.reshape(shape).permute(sorted(range(len(shape)), key=arranged.order.__getitem__))
            target = part.of(result)
            target.copy_(x.reshape(target.shape))
        return {leaf: value.to(self.space.dtypes[leaf]) for leaf, value in result.items()}

    def split_part(self, part: Part, x: Tensor) -> Coordinates:
        """Coordinates of one part: one name after another moves its axes to the back as count, length and copies."""
        arranged = self.arranged[part.key]
        x = x.reshape(arranged.lengths).permute(arranged.order)
        x = x.reshape(*x.shape[: x.ndim - len(arranged.free)], prod(arranged.free))
        found: dict[Names, Tensor] = {(): x}
        for name, times in arranged.names:
            group = self.symmetry.groups[name]
            new: dict[Names, Tensor] = {}
            for key, value in found.items():
                moved = value.movedim(0, -1) if times == 1 else value.movedim(0, -1).movedim(0, -1)
                pieces = group.split(moved) if times == 1 else group.pair_split(moved)
                for label, piece in pieces.items():
                    new[key if label == TRIVIAL else (*key, (name, label))] = piece
            found = new
        names = len(arranged.names)
        return {(part.cluster, key): _to_columns(value, names) for key, value in found.items()}

    def _merge(self, part: Part, arranged: Arrangement, coordinates: Coordinates) -> Tensor:
        tensors: dict[Names, Tensor] = {}
        for key, kinds in self.kinds.of(part):
            columns = self.blocks[key].columns[part.key]
            tensors[key[1]] = _from_columns(coordinates[key][..., columns], kinds, prod(arranged.free))
        for name, times in reversed(arranged.names):
            group, size = self.symmetry.groups[name], self.sizes[name]
            groups: dict[Names, dict[str, Tensor]] = {}
            for names, value in tensors.items():
                label = dict(names).get(name, TRIVIAL)
                rest = tuple(item for item in names if item[0] != name)
                groups.setdefault(rest, {})[label] = value
            merged: dict[Names, Tensor] = {}
            for rest, pieces in groups.items():
                if times == 1:
                    merged[rest] = group.merge(pieces, size).movedim(-1, 0)
                else:
                    merged[rest] = group.pair_merge(pieces, size).movedim(-1, 0).movedim(-1, 0)
            tensors = merged
        return tensors[()]


def _to_columns(x: Tensor, names: int) -> Tensor:
    """From ``(free, c1, l1, m1, c2, l2, m2, ...)`` to ``(c1 c2 .., l1 l2 .., m1 m2 .. free)``."""
    axes = range(1, 1 + 3 * names)
    counts, lengths, copies = list(axes[0::3]), list(axes[1::3]), list(axes[2::3])
    x = x.permute(*counts, *lengths, *copies, 0)
    return x.reshape(prod(x.shape[:names]), prod(x.shape[names : 2 * names]), -1)


def _from_columns(x: Tensor, kinds: list[Kind], free: int) -> Tensor:
    """The inverse of :func:`_to_columns`."""
    names = len(kinds)
    x = x.reshape(*[k.count for k in kinds], *[k.length for k in kinds], *[k.copies for k in kinds], free)
    order = [3 * names] + [group * names + i for i in range(names) for group in range(3)]
    return x.permute(order)
