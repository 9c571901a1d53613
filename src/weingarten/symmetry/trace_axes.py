"""Axes of tensors as terms that are tied and refined: the union-find under ``infer_symmetry``.

An axis is a leaf, a product of axes (row-major, as in a view into heads), a concatenation of axes, or a choice: an axis whose
meaning depends on the index of another axis of the same tensor, as in ``qkv.view(3, heads, d)`` where q, k and v are different.
Tying two axes says that the same group element moves both. Every leaf keeps an upper bound on its group.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import IntEnum
from math import prod

__all__ = [
    "Axis",
    "Bound",
    "choice",
    "cut",
    "divide",
    "factors",
    "frozen",
    "is_frozen",
    "leaves",
    "limit",
    "product",
    "root",
    "segments",
    "settle",
    "terms",
    "tie",
]


class Bound(IntEnum):
    """The largest group that may act on an axis, by inclusion."""

    FREE = 0
    PERMUTATION = 1
    SIGNED = 2
    ROTATION = 3


class Axis:
    """A node. Compare the ``root`` of two axes, not the axes.

    Args:
        size: the length.
        bound: the largest group so far, of a leaf.
        why: what set the bound.
        kind: ``leaf``, ``product``, ``concat`` or ``choice``.
        parts: factors, segments or alternatives.
        index: of a choice, the axis that chooses.
    """

    def __init__(
        self,
        size: int,
        bound: Bound = Bound.ROTATION,
        why: str = "",
        kind: str = "leaf",
        parts: Sequence[Axis] = (),
        index: Axis | None = None,
    ) -> None:
        self.size, self.bound, self.why = size, bound, why
        self.kind, self.parts, self.index = kind, list(parts), index
        self.parent: Axis | None = None
        self.role = ""  # of an axis in attention, for names
        self.constant = False  # made by repeating one entry


def frozen(size: int, why: str) -> Axis:
    """A new axis on which nothing may act."""
    return Axis(size, Bound.FREE, why)


def root(axis: Axis) -> Axis:
    """The representative of an axis."""
    while axis.parent is not None:
        if axis.parent.parent is not None:
            axis.parent = axis.parent.parent
        axis = axis.parent
    return axis


def factors(axis: Axis) -> list[Axis]:
    """Factors of size above one, slowest first; leaves, concatenations and choices."""
    axis = root(axis)
    if axis.size == 1:
        return []
    return [f for part in axis.parts for f in factors(part)] if axis.kind == "product" else [axis]


def segments(axis: Axis) -> list[Axis]:
    """Segments of a concatenation, or the axis itself."""
    axis = root(axis)
    return [s for part in axis.parts for s in segments(part)] if axis.kind == "concat" else [axis]


def leaves(axes: Iterable[Axis]) -> list[Axis]:
    """All leaves of size above one below some axes, with repetitions."""
    found = []
    for axis in map(root, axes):
        if axis.kind == "leaf":
            found += [axis] if axis.size > 1 else []
        else:
            found += leaves(axis.parts)
    return found


def terms(axes: Sequence[Axis]) -> list[list[Axis]]:
    """The leaves of a tensor's axes for every choice of segments and alternatives."""
    found: list[list[Axis]] = [[]]
    for axis in map(root, axes):
        if axis.size == 1:
            continue
        if axis.kind == "leaf":
            mine = [[axis]]
        elif axis.kind == "product":
            mine = terms(axis.parts)
        else:
            mine = [term for part in axis.parts for term in terms([part])]
        unique = {tuple(map(id, term)): term for term in mine}.values()
        found = [[*before, *term] for before in found for term in unique]
    return found


def is_frozen(axis: Axis) -> bool:
    """Whether no group acts on it."""
    return all(leaf.bound == Bound.FREE for leaf in leaves([axis]))


def product(axes: Sequence[Axis]) -> Axis:
    """Axes merged by a view, the slowest first."""
    found = [f for axis in axes for f in factors(axis)]
    if len(found) == 1:
        return found[0]
    return Axis(prod(f.size for f in found), kind="product" if found else "leaf", parts=found)


def concat(axes: Sequence[Axis]) -> Axis:
    """Axes one after another."""
    return axes[0] if len(axes) == 1 else Axis(sum(a.size for a in axes), kind="concat", parts=axes)


def choice(index: Axis, alternatives: Sequence[Axis]) -> Axis:
    """An axis that is the i-th alternative at position i of ``index``."""
    return Axis(alternatives[0].size, kind="choice", parts=alternatives, index=index)


def limit(axis: Axis, bound: Bound, why: str) -> None:
    """Lower the bound of every leaf of an axis."""
    for leaf in leaves([axis]):
        if bound < leaf.bound:
            leaf.bound, leaf.why = bound, why


def settle(axis: Axis) -> None:
    """Make a choice an ordinary axis by tying its alternatives."""
    axis = root(axis)
    if axis.kind == "choice":
        for other in axis.parts[1:]:
            tie(axis.parts[0], other)
        axis.parent = root(axis.parts[0])


def tie(a: Axis, b: Axis) -> None:
    """Let the same element move both axes; what cannot be matched becomes free."""
    a, b = root(a), root(b)
    if a is b or a.size == 1:
        return
    if "choice" in (a.kind, b.kind):
        _tie_choice(a, b)
        return
    if b.kind == "leaf":
        a, b = b, a
    if a.kind == "leaf":
        a.parent = b
        limit(b, a.bound, a.why)
        b.role = b.role or a.role
        b.constant = b.constant and a.constant
        return
    if a.kind == b.kind and (_match_factors(a, b) if a.kind == "product" else _match_segments(a, b)):
        a, b = root(a), root(b)
        if a is not b:
            a.parent = b
        return
    for axis in (a, b):
        limit(axis, Bound.FREE, f"two different splits of an axis of size {a.size}")


def _tie_choice(a: Axis, b: Axis) -> None:
    if a.kind == b.kind and a.index is not None and b.index is not None and root(a.index) is root(b.index):
        for x, y in zip(a.parts, b.parts, strict=True):
            tie(x, y)
        a.parent = b
        return
    settle(a)
    settle(b)
    tie(a, b)


def _match_factors(a: Axis, b: Axis) -> bool:
    """Tie two products factor by factor, splitting leaves where needed."""
    left, right = factors(a), factors(b)
    while left and right:
        if left[0].size > right[0].size:
            left, right = right, left
        x, y = left[0], right[0]
        if x.size < y.size:
            if divide(y, x.size) is None:
                return False
            right = factors(y) + right[1:]
            continue
        tie(x, y)
        left, right = left[1:], right[1:]
    return True


def _match_segments(a: Axis, b: Axis) -> bool:
    """Tie two concatenations segment by segment, cutting leaves where needed."""
    for x, y in ((a, b), (b, a)):
        point = 0
        for segment in segments(x)[:-1]:
            point += segment.size
            if not _break(y, point):
                return False
    for x, y in zip(segments(a), segments(b), strict=True):
        tie(x, y)
    return True


def divide(axis: Axis, size: int, stacked: bool = False) -> tuple[Axis, Axis] | None:
    """Split an axis into its slow factor of the given size and the rest.

    Args:
        axis: what to split; leaves are refined in place, and so everywhere they occur.
        size: of the slow factor.
        stacked: the slow factor will be indexed, so the rest may differ from index to index.

    Returns:
        Both factors, or None if they do not divide.
    """
    front: list[Axis] = []
    found = factors(axis)
    while size > 1:
        first, found = found[0], found[1:]
        if size % first.size == 0:
            front, size = [*front, first], size // first.size
            continue
        parts = _divide_factor(first, size, stacked and not front) if first.size % size == 0 else None
        if parts is None:
            return None
        front, found, size = [*front, parts[0]], [*factors(parts[1]), *found], 1
    return product(front), product(found)


def _divide_factor(axis: Axis, size: int, stacked: bool) -> tuple[Axis, Axis] | None:
    rest = axis.size // size
    if stacked and not is_frozen(axis):
        if axis.kind == "leaf":
            axis.parts = [Axis(rest, axis.bound, axis.why) for _ in range(size)]
            axis.kind = "concat"
        pieces = segments(axis)
        if axis.kind == "concat" and [p.size for p in pieces] == [rest] * size:
            index = frozen(size, "an index into stacked parts")
            return index, choice(index, pieces)
    if axis.kind == "choice" and axis.index is not None:
        pairs = [divide(part, size) for part in axis.parts]
        halves = [pair for pair in pairs if pair is not None]
        if len(halves) < len(pairs):
            return None
        return choice(axis.index, [h[0] for h in halves]), choice(axis.index, [h[1] for h in halves])
    if axis.kind != "leaf":
        return None
    axis.parts = [Axis(size, axis.bound, axis.why), Axis(rest, axis.bound, axis.why)]
    axis.kind = "product"
    return axis.parts[0], axis.parts[1]


def cut(axis: Axis, first: int, last: int, why: str) -> Axis:
    """The entries ``first:last``; an axis that cannot be cut there becomes free."""
    settle(axis)
    axis = root(axis)
    if (first, last) == (0, axis.size):
        return axis
    if first < last and not is_frozen(axis) and _break(axis, first) and _break(axis, last):
        found, offset = [], 0
        for segment in segments(axis):
            found += [segment] if first <= offset < last else []
            offset += segment.size
        return concat(found)
    limit(axis, Bound.FREE, why)
    return frozen(last - first, why)


def _break(axis: Axis, point: int) -> bool:
    """Make ``point`` a boundary between segments; whether that was possible."""
    axis = root(axis)
    if point in (0, axis.size):
        return True
    if axis.kind == "leaf":
        axis.parts = [Axis(n, axis.bound, axis.why) for n in (point, axis.size - point)]
        axis.kind = "concat"
        return True
    if axis.kind != "concat":
        return False
    for segment in segments(axis):
        if point <= segment.size:
            return _break(segment, point)
        point -= segment.size
    return False
