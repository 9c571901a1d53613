"""From tied axes to words: which atoms carry a group, and how every parameter axis is written with them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product as cartesian

from weingarten.groups import Action, Permutation, Rotation, SignedPermutation, Wreath
from weingarten.symmetry.trace import Axes, Trace
from weingarten.symmetry.trace_axes import Axis, Bound, leaves, limit, root, settle, terms
from weingarten.symmetry.words import FREE

__all__ = ["Block", "Piece", "group_of", "pieces_of", "readable", "wreaths"]

Atoms = tuple[Axis, ...]
"""Factors of one segment, slowest first; an axis on which nothing acts stands for a free factor."""


@dataclass(frozen=True)
class Piece:
    """A leaf, or a slice of one, with the atoms of each of its axes."""

    leaf: str
    bounds: tuple[tuple[int, int], ...]
    whole: bool
    axes: tuple[Atoms, ...]

    @property
    def key(self) -> str:
        """As ``Symmetry.parse`` takes it."""
        return self.leaf if self.whole else f"{self.leaf}[{', '.join(f'{a}:{b}' for a, b in self.bounds)}]"


@dataclass(frozen=True)
class Block:
    """Atoms that are written with one name: one atom, or the heads and the inner axis of a ``Wreath``."""

    atoms: Atoms
    group: Action


def _merge(sizes: list[tuple[int, Atoms]]) -> list[tuple[int, Atoms]]:
    """Neighbouring free segments become one, equal segments a free factor before their atoms."""
    atoms = [tuple(a for a in found) for _, found in sizes]
    acting = any(a.bound for found in atoms for a in found)
    if len(sizes) > 1 and acting and all(found == atoms[0] for found in atoms):
        gates = Axis(len(sizes), Bound.FREE, "equal parts of one axis")
        return [(sum(n for n, _ in sizes), (gates, *atoms[0]))]
    result: list[tuple[int, Atoms]] = []
    for size, found in sizes:
        free = all(not a.bound for a in found)
        if free and result and all(not a.bound for a in result[-1][1]):
            before = result.pop()[0]
            why = found[0].why if found else "size one"
            size, found = before + size, (Axis(before + size, Bound.FREE, why),)
        result.append((size, found))
    return result


def _layout(axis: Axis) -> list[tuple[int, Atoms]]:
    """Segments of an axis with their factors; concatenations inside a product become free, for words cannot say them."""
    settle(axis)
    axis = root(axis)
    if axis.kind == "concat":
        return _merge([segment for part in axis.parts for segment in _layout(part)])
    if axis.kind == "leaf":
        return [(axis.size, (axis,) if axis.size > 1 else ())]
    atoms: list[Axis] = []
    for part in axis.parts:
        found = _layout(part)
        if len(found) > 1:
            limit(part, Bound.FREE, "different parts inside a factor of a split axis")
            found = [(part.size, (Axis(part.size, Bound.FREE, "different parts inside a factor"),))]
        atoms += found[0][1]
    return [(axis.size, tuple(atoms))]


def pieces_of(tensors: Mapping[str, Axes]) -> list[Piece]:
    """All parameters, cut where their axes are concatenations."""
    found = []
    for leaf, axes in tensors.items():
        layouts = [_layout(axis) for axis in axes]
        starts = [[sum(n for n, _ in layout[:i]) for i in range(len(layout))] for layout in layouts]
        whole = all(len(layout) == 1 for layout in layouts)
        for place in cartesian(*(range(len(layout)) for layout in layouts)):
            bounds = tuple((s[i], s[i] + lay[i][0]) for s, lay, i in zip(starts, layouts, place, strict=True))
            atoms = tuple(layout[i][1] for layout, i in zip(layouts, place, strict=True))
            found.append(Piece(leaf, bounds, whole, atoms))
    return found


def readable(pieces: Iterable[Piece]) -> bool:
    """Free what words cannot say; whether nothing had to be freed.

    A word has at most one free factor, and a part of a leaf carries a name at most twice.
    """
    fine = True
    for piece in pieces:
        for atoms in piece.axes:
            gaps = [i for i, atom in enumerate(atoms) if not atom.bound]
            for atom in atoms[gaps[0] : gaps[-1]] if gaps else ():
                if atom.bound:
                    limit(atom, Bound.FREE, "it lies between two free factors of an axis")
                    fine = False
        acting = [atom for atoms in piece.axes for atom in atoms if atom.bound]
        for atom in {a for a in acting if acting.count(a) > 2 or not _pairs(a, acting.count(a))}:
            limit(atom, Bound.FREE, f"{piece.key} carries it too often, or twice with too short a length")
            fine = False
    return fine


def _pairs(atom: Axis, times: int) -> bool:
    """Whether the atom's group has coordinates for that many axes of one leaf."""
    try:
        group = group_of(atom)
        (group.kinds if times == 1 else group.pair_kinds)(atom.size)
    except ValueError:
        return False
    return True


def group_of(atom: Axis) -> Action:
    """The largest group that the bound allows."""
    groups = {Bound.PERMUTATION: Permutation(), Bound.SIGNED: SignedPermutation(), Bound.ROTATION: Rotation()}
    return groups[atom.bound]


def wreaths(trace: Trace, pieces: list[Piece]) -> dict[Atoms, Wreath]:
    """Pairs (heads, inner axis) where every head may be moved by an element of its own.

    The inner axis must occur together with the heads in every tensor, right behind them in every parameter, and no operator may
    combine entries of different heads while it keeps the inner axis.
    """
    before: dict[Axis, set[Axis | None]] = {}
    for piece in pieces:
        for atoms in piece.axes:
            for i, atom in enumerate(atoms):
                before.setdefault(atom, set()).add(atoms[i - 1] if i else None)
    pairs = []
    for inner, found in before.items():
        heads = next(iter(found)) if len(found) == 1 else None
        if heads is not None and inner.bound and heads.bound <= Bound.PERMUTATION:
            pairs.append((heads, inner))
    together = _separate(trace, pairs)
    chosen: dict[Atoms, Wreath] = {}
    for heads, inner in together:
        partners = [i for h, i in together if h is heads]
        if _may_wreathe(pieces, heads, inner, partners):
            chosen[heads, inner] = Wreath(heads.size, group_of(inner), Permutation() if heads.bound else None)
    return chosen


def _separate(trace: Trace, pairs: list[tuple[Axis, Axis]]) -> list[tuple[Axis, Axis]]:
    """The pairs whose heads never meet while the inner axis is kept."""
    values = [axes for v in trace.values.values() for axes in (v if v and isinstance(v[0], list) else [v])]
    found = {tuple(term) for axes in values for term in terms(axes)}
    contracted = [(set(leaves(mixed)), set(leaves(kept))) for mixed, kept in trace.contracted]
    unaligned = [(set(leaves(single)), set(leaves(shared))) for single, shared in trace.unaligned]

    def separate(heads: Axis, inner: Axis) -> bool:
        return (
            not any(inner in term and term.count(heads) != term.count(inner) for term in found)
            and not any(heads in gone and inner not in gone and inner in kept for gone, kept in contracted)
            and not any(inner in both and heads not in both and heads in single for single, both in unaligned)
        )

    return [pair for pair in pairs if separate(*pair)]


def _may_wreathe(pieces: list[Piece], heads: Axis, inner: Axis, partners: list[Axis]) -> bool:
    """Coordinates exist: the pair occurs once per part, and tied names share no kind.

    Heads that are also moved elsewhere share their permutation through a tie. That is exact only if the inner group leaves
    nothing invariant, and if no part of a leaf is moved twice.
    """
    if any(sum(atoms.count(inner) for atoms in piece.axes) > 1 for piece in pieces):
        return False
    if not heads.bound:
        return True  # heads that stay share nothing
    alone = all(heads not in atoms or inner in atoms for piece in pieces for atoms in piece.axes)
    if inner.bound == Bound.PERMUTATION and (not alone or len(partners) > 1):
        return False
    return all(sum(atoms.count(heads) for atoms in piece.axes) <= 1 for piece in pieces)


def spell(atoms: Atoms, names: Mapping[Atoms, str]) -> str:
    """The word of one axis.

    Neighbouring free factors are merged; pairs with a name of their own come first.
    """
    words: list[str] = []
    i = 0
    while i < len(atoms):
        pair = atoms[i : i + 2]
        if pair in names:
            words.append(names[pair])
            i += 2
            continue
        word = names.get((atoms[i],), FREE)
        if word != FREE or not words or words[-1] != FREE:
            words.append(word)
        i += 1
    if len(words) <= 1:
        return words[0] if words else FREE
    return f"({' '.join(words)})"
