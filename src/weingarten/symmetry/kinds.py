"""The kinds of a product group, and how wide their blocks are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import torch

from weingarten.groups import Action, Kind
from weingarten.groups.action import TRIVIAL
from weingarten.symmetry.part import Part
from weingarten.symmetry.words import FREE, resolve
from weingarten.tree import TreeLike

__all__ = ["Arrangement", "KindBlock", "KindKey", "Kinds"]

KindKey = tuple[str, tuple[tuple[str, str], ...]]
"""Cluster, and the nontrivial kinds ``(name, label)`` in order of name; no kind at all is the trivial one of the whole group."""


@dataclass(frozen=True)
class KindBlock:
    """One kind of the product group.

    Attributes:
        dim: dimension of the irreducible representation; the weight of the block in traces and log-determinants.
        length: coordinates used for it.
        count: members of the family.
        columns: for each part that contains it, where its columns lie.
        multiplicity: number of columns, the size of the block.
    """

    dim: int
    length: int
    count: int
    columns: dict[str, slice]
    multiplicity: int


@dataclass(frozen=True)
class Arrangement:
    """How the axes of one part are arranged: named ones first, by name, then the free ones.

    Attributes:
        order: the permutation that does it.
        lengths: of the axes as they come.
        names: each name and on how many axes it acts, 1 or 2.
        free: lengths of the free axes.
    """

    order: tuple[int, ...]
    lengths: tuple[int, ...]
    names: tuple[tuple[str, int], ...]
    free: tuple[int, ...]


class Kinds:
    """The kinds of parts under a product group.

    Args:
        parts: the parts.
        groups: by name.
        sizes: known sizes of names.
        params: shapes.

    Attributes:
        sizes: of all names.
        arranged: each part's axes.
        blocks: the kinds, in order of appearance.

    Raises:
        ValueError: if a leaf is missing, not covered exactly once, or the sizes do not fit.
    """

    def __init__(
        self, parts: Sequence[Part], groups: Mapping[str, Action], sizes: Mapping[str, int], params: TreeLike
    ) -> None:
        self.parts, self.groups = tuple(parts), groups
        by_leaf: dict[str, list[Part]] = {}
        for part in parts:
            by_leaf.setdefault(part.leaf, []).append(part)
        for leaf, mine in by_leaf.items():
            _check_cover(leaf, mine, params)
        self.sizes = dict(sizes)
        simple = sorted(parts, key=lambda part: max((len(word.atoms) for word in part.words), default=0))
        found = {
            part.key: resolve(part.words, tuple(part.of(params).shape), self.sizes, part.key)
            for part in simple
        }
        self.arranged = {part.key: _arrange(*found[part.key]) for part in parts}
        for part in parts:
            self._check_lengths(part)
        self.blocks = self._find_blocks()

    def _check_lengths(self, part: Part) -> None:
        """Groups refuse lengths they cannot act on; say where. Names that move together may not meet on one leaf."""
        atoms = [atom for word in part.words for atom in word.atoms]
        shared: dict[str, str] = {}
        for name, _ in self.arranged[part.key].names:
            other = shared.setdefault(getattr(self.groups[name], "tie", None) or name, name)
            if other != name:
                raise ValueError(
                    f"Symmetry: {part.key!r} carries {other!r} and {name!r}, whose heads move together; free one of them"
                )
        for name, times in self.arranged[part.key].names:
            group, size = self.groups[name], self.sizes[name]
            try:
                group.kinds(size)
                if times == 2:
                    group.pair_kinds(size)
            except ValueError as error:
                where = [_axis_of(part, i) for i, atom in enumerate(atoms) if atom == name]
                raise ValueError(f"Symmetry: {name!r} on axis {where} of {part.key!r}: {error}") from error

    def of(self, part: Part) -> list[tuple[KindKey, list[Kind]]]:
        """All choices of a kind per name for one part, with the key and the kinds in order of name."""
        found: list[tuple[tuple[tuple[str, str], ...], list[Kind]]] = [((), [])]
        for name, times in self.arranged[part.key].names:
            group, size = self.groups[name], self.sizes[name]
            found = [
                (key if kind.label == TRIVIAL else (*key, (name, kind.label)), [*kinds, kind])
                for key, kinds in found
                for kind in (group.kinds(size) if times == 1 else group.pair_kinds(size))
            ]
        return [((part.cluster, key), kinds) for key, kinds in found]

    def _find_blocks(self) -> dict[KindKey, KindBlock]:
        columns: dict[KindKey, dict[str, slice]] = {}
        nontrivial: dict[KindKey, list[Kind]] = {}
        widths: dict[KindKey, int] = {}
        for part in self.parts:
            free = prod(self.arranged[part.key].free)
            for key, kinds in self.of(part):
                nontrivial[key] = [kind for kind in kinds if kind.label != TRIVIAL]
                start = widths.get(key, 0)
                widths[key] = start + prod(kind.copies for kind in kinds) * free
                columns.setdefault(key, {})[part.key] = slice(start, widths[key])
        return {
            key: KindBlock(
                dim=prod(kind.dim for kind in kinds),
                length=prod(kind.length for kind in kinds),
                count=prod(kind.count for kind in kinds),
                columns=columns[key],
                multiplicity=widths[key],
            )
            for key, kinds in nontrivial.items()
        }


def _axis_of(part: Part, atom: int) -> int:
    """The axis of the leaf on which an atom lies, the first one if it spans several."""
    first, seen = 0, 0
    for word in part.words:
        seen += len(word.atoms)
        if atom < seen:
            break
        first += word.span
    return first


def _check_cover(leaf: str, mine: Sequence[Part], params: TreeLike) -> None:
    """Whether the parts of a leaf cover each of its entries once."""
    if leaf not in params:
        raise ValueError(f"Symmetry: leaf {leaf!r} is not among the parameters {list(params)}")
    for part in mine:
        if len(part.index) > params[leaf].ndim:
            raise ValueError(
                f"Symmetry: {part.key!r} has {len(part.index)} slices, but {leaf!r} has {params[leaf].ndim} axes"
            )
    if len(mine) == 1 and not mine[0].index:
        return
    times = sorted(_times_covered([part.index for part in mine], tuple(params[leaf].shape)))
    if times not in ([1], []):
        raise ValueError(
            f"Symmetry: the parts {[part.key for part in mine]} cover entries of {leaf!r} {times} times, expected once each"
        )


def _times_covered(indices: Sequence[tuple[slice, ...]], shape: tuple[int, ...]) -> set[int]:
    """How often slices cover the entries of a shape, seen on the grid of boxes that their ends cut it into."""
    bounds = [
        [slice(None).indices(n), *(i[axis].indices(n) for i in indices if axis < len(i))]
        for axis, n in enumerate(shape)
    ]
    cuts = [sorted({end for first, last, _ in found for end in (first, last)}) for found in bounds]
    cover = torch.zeros([len(ends) - 1 for ends in cuts], dtype=torch.int64)
    for index in indices:
        boxes = []
        for ends, n, piece in zip(cuts, shape, index, strict=False):
            first, last, _ = piece.indices(n)
            boxes.append(slice(ends.index(first), ends.index(last)))
        cover[tuple(boxes)] += 1
    return set(cover.flatten().tolist())


def _arrange(atoms: list[str], lengths: list[int]) -> Arrangement:
    names = sorted({atom for atom in atoms if atom != FREE})
    order = [axis for name in names for axis, atom in enumerate(atoms) if atom == name]
    free = [axis for axis, atom in enumerate(atoms) if atom == FREE]
    return Arrangement(
        order=(*order, *free),
        lengths=tuple(lengths),
        names=tuple((name, atoms.count(name)) for name in names),
        free=tuple(lengths[axis] for axis in free),
    )
