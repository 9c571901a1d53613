"""Rules of operators that move, merge, split, pick and repeat axes."""

from __future__ import annotations

from math import prod
from typing import Any

from torch import Tensor, fx

from weingarten.symmetry.trace import Axes, Trace, Value, operator_name, tie_all
from weingarten.symmetry.trace_axes import Axis, Bound, concat, cut, divide, factors, frozen, product, root

__all__ = [
    "concatenate",
    "expand",
    "gate",
    "getitem",
    "index",
    "permute",
    "repeat",
    "repeat_interleave",
    "same",
    "select",
    "slice_axis",
    "split",
    "squeeze",
    "stack",
    "transpose",
    "unbind",
    "unsqueeze",
    "view",
]

CARRIERS = (
    "permute",
    "transpose",
    "unsqueeze",
    "squeeze",
    "clone",
    "view",
    "contiguous",
    "_to_copy",
    "alias",
)


def same(trace: Trace, node: fx.Node) -> Value:
    """Copies, casts, dropout in evaluation mode."""
    return list(trace.of(node.args[0]))


def getitem(trace: Trace, node: fx.Node) -> Value:
    """One of several results."""
    return trace.values[node.all_input_nodes[0]][node.args[1]]


def _order(node: fx.Node, rank: int) -> list[int]:
    """Which input dimension every output dimension is, for operators that only move axes."""
    order = list(range(rank))
    name, args = operator_name(node), node.args
    if name == "permute":
        return [int(str(d)) % rank for d in args[1]]  # type: ignore[union-attr]
    if name in ("transpose", "t"):
        first, second = (int(str(args[1])), int(str(args[2]))) if len(args) > 2 else (0, rank - 1)
        order[first], order[second] = order[second], order[first]
    return order


def permute(trace: Trace, node: fx.Node) -> Value:
    """Axes in another order; also ``transpose`` and ``t``."""
    axes = trace.of(node.args[0])
    return [axes[d] for d in _order(node, len(axes))]


transpose = permute


def unsqueeze(trace: Trace, node: fx.Node) -> Value:
    """A new axis of size one."""
    axes = list(trace.of(node.args[0]))
    axes.insert(int(str(node.args[1])) % (len(axes) + 1), Axis(1))
    return axes


def squeeze(trace: Trace, node: fx.Node) -> Value:
    """Axes of size one go."""
    axes = trace.of(node.args[0])
    dims = node.args[1] if len(node.args) > 1 else list(range(len(axes)))
    chosen = {int(str(d)) % max(len(axes), 1) for d in (dims if isinstance(dims, list | tuple) else [dims])}
    return [axis for dim, axis in enumerate(axes) if dim not in chosen or axis.size > 1]


def _moved(node: fx.Node, user: fx.Node, dim: int) -> int | None:
    """Where a dimension of ``node`` is in the result of an operator that only moves axes."""
    before, after = ([int(n) for n in n.meta["val"].shape] for n in (node, user))
    name = operator_name(user)
    if name in ("permute", "transpose"):
        return _order(user, len(before)).index(dim)
    if name in ("clone", "contiguous", "_to_copy", "alias"):
        return dim
    if name == "unsqueeze":
        return dim + (int(str(user.args[1])) % len(after) <= dim)
    head = prod(before[:dim])
    places = [d for d, n in enumerate(after) if n == before[dim] and prod(after[:d]) == head]
    return places[0] if places else None


def _is_picked(node: fx.Node, dim: int) -> bool:
    """Whether the entries along a dimension are taken apart later, as in ``q, k, v = qkv.unbind(2)``."""
    for user in node.users:
        name = operator_name(user)
        if name in ("select", "unbind"):
            chosen = int(str(user.args[1])) if len(user.args) > 1 else 0
            if chosen % len(node.meta["val"].shape) == dim:
                return True
        elif name in CARRIERS and isinstance(user.meta["val"], Tensor):
            place = _moved(node, user, dim)
            if place is not None and _is_picked(user, place):
                return True
    return False


def view(trace: Trace, node: fx.Node) -> Value:
    """Axes are merged and split; also ``unflatten`` and ``reshape``."""
    rest = product(trace.of(node.args[0]))
    shape = trace.shape(node)
    result: Axes = []
    for dim, size in enumerate(shape):
        if size == 1 or size == rest.size:
            halves: tuple[Axis, Axis] | None = (Axis(1), rest) if size == 1 else (rest, Axis(1))
        else:
            halves = divide(rest, size, stacked=_is_picked(node, dim))
        if halves is None:
            why = f"{trace.why(node)} to {shape} does not follow the axes"
            trace.free(trace.of(node.args[0]), why)
            return [frozen(n, why) for n in shape]
        result.append(halves[0])
        rest = halves[1]
    return result


def _pick(trace: Trace, node: fx.Node, axes: Axes, dim: int, position: int) -> Axes:
    """One entry along a dimension; the others' choices that depend on it are made."""
    index = root(axes[dim])
    others = [axis for d, axis in enumerate(axes) if d != dim]
    if not any(
        f.kind == "choice" and f.index is not None and root(f.index) is index
        for a in others
        for f in factors(a)
    ):
        trace.free([index], f"{trace.why(node)} takes one entry")
        return others
    return [_choose(axis, index, position) for axis in others]


def _choose(axis: Axis, index: Axis, position: int) -> Axis:
    """An axis where the choices that depend on ``index`` are made."""
    found = []
    for factor in factors(axis):
        chosen = factor.kind == "choice" and factor.index is not None and root(factor.index) is index
        found.append(factor.parts[position] if chosen else factor)
    return product(found) if found else axis


def select(trace: Trace, node: fx.Node) -> Value:
    """``x[..., i, ...]``."""
    axes = trace.of(node.args[0])
    dim = int(str(node.args[1])) % len(axes)
    return _pick(trace, node, axes, dim, int(str(node.args[2])))


def unbind(trace: Trace, node: fx.Node) -> Value:
    """All entries along a dimension."""
    axes = trace.of(node.args[0])
    dim = (int(str(node.args[1])) if len(node.args) > 1 else 0) % len(axes)
    return [_pick(trace, node, axes, dim, position) for position in range(axes[dim].size)]


def slice_axis(trace: Trace, node: fx.Node) -> Value:
    """``x[first:last]`` along one axis; a stride makes it free."""
    axes = list(trace.of(node.args[0]))
    dim, first, _, step = (int(str(a)) if a is not None else None for a in (*node.args[1:], *[None] * 4)[:4])
    dim, size = (dim or 0) % len(axes), trace.shape(node)[(dim or 0) % len(axes)]
    if step not in (None, 1):
        trace.free([axes[dim]], f"the stride of {trace.why(node)}")
    whole = axes[dim].size
    start = 0 if first is None else min(max(first + whole if first < 0 else first, 0), whole)
    if size == 0 or axes[dim].size == 1 or step not in (None, 1):
        axes[dim] = frozen(size, f"a stride or an empty part in {trace.why(node)}") if size != 1 else Axis(1)
    else:
        axes[dim] = cut(axes[dim], start, start + size, trace.why(node))
    return axes


def split(trace: Trace, node: fx.Node) -> Value:
    """Consecutive parts of an axis; also ``chunk``."""
    axes = trace.of(node.args[0])
    dim = (int(str(node.args[2])) if len(node.args) > 2 else 0) % len(axes)
    result, start = [], 0
    for value in node.meta["val"]:
        size = int(value.shape[dim])
        piece = cut(axes[dim], start, start + size, trace.why(node))
        result.append([*axes[:dim], piece, *axes[dim + 1 :]])
        start += size
    return result


def gate(trace: Trace, node: fx.Node) -> Value:
    """``glu``: one half of an axis times a function of the other."""
    axes = list(trace.of(node.args[0]))
    dim = (int(str(node.args[1])) if len(node.args) > 1 else -1) % len(axes)
    size = axes[dim].size // 2
    first, second = (cut(axes[dim], i * size, (i + 1) * size, trace.why(node)) for i in (0, 1))
    axes[dim] = tie_all([first, second])
    trace.limit(axes, Bound.PERMUTATION, node)
    return axes


def concatenate(trace: Trace, node: fx.Node) -> Value:
    """One axis after another; the other axes are tied."""
    tensors = [axes for axes in (trace.of(arg) for arg in node.args[0]) if axes]  # type: ignore[union-attr]
    rank = len(trace.shape(node))
    dim = (int(str(node.args[1])) if len(node.args) > 1 else 0) % rank
    tensors = [axes for axes in tensors if len(axes) == rank and axes[dim].size > 0]
    return [
        tie_all([a[d] for a in tensors]) if d != dim else concat([a[d] for a in tensors]) for d in range(rank)
    ]


def stack(trace: Trace, node: fx.Node) -> Value:
    """Tensors along a new axis; their axes are tied."""
    tensors = [trace.of(arg) for arg in node.args[0]]  # type: ignore[union-attr]
    dim = (int(str(node.args[1])) if len(node.args) > 1 else 0) % (len(tensors[0]) + 1)
    tied = [tie_all([axes[d] for axes in tensors]) for d in range(len(tensors[0]))]
    return [*tied[:dim], frozen(len(tensors), trace.why(node)), *tied[dim:]]


def expand(trace: Trace, node: fx.Node) -> Value:
    """Repeat along axes of size one: the entries there are equal, so any permutation of them is harmless."""
    axes, shape = trace.of(node.args[0]), trace.shape(node)
    result = [Axis(size, Bound.PERMUTATION, trace.why(node)) for size in shape]
    for axis in result:
        axis.constant = True
    missing = len(shape) - len(axes)
    return result[:missing] + [
        a if a.size == new.size else new for a, new in zip(axes, result[missing:], strict=True)
    ]


def repeat(trace: Trace, node: fx.Node) -> Value:
    """Tile: the copies are the slow factor of every axis."""
    axes, shape = trace.of(node.args[0]), trace.shape(node)
    padded = [*(Axis(1) for _ in range(len(shape) - len(axes))), *axes]
    result = []
    for axis, size in zip(padded, shape, strict=True):
        copies = Axis(size // max(axis.size, 1), Bound.PERMUTATION, trace.why(node))
        result.append(product([copies, axis]) if size != axis.size else axis)
    return result


def repeat_interleave(trace: Trace, node: fx.Node) -> Value:
    """Repeat every entry: the copies are the fast factor."""
    args: Any = (*node.args, *[None] * 3)
    dim = args[2] if args[2] is not None else node.kwargs.get("dim")
    axes = list(trace.of(args[0]))
    if not isinstance(args[1], int) or not isinstance(dim, int):
        return trace.unknown_operator(node)
    dim %= len(axes)
    axes[dim] = product([axes[dim], Axis(args[1], Bound.PERMUTATION, trace.why(node))])
    return axes


def index(trace: Trace, node: fx.Node) -> Value:
    """``x[i, :, j]`` with tensors of positions: the indexed axes become free."""
    axes, places = trace.of(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    where = [d for d, p in enumerate(places) if p is not None]
    indices = [trace.of(places[d]) for d in where]
    if len(places) > len(axes) or any("bool" in str(places[d].meta["val"].dtype) for d in where):
        return trace.unknown_operator(node)
    for found in [[axes[d] for d in where], *indices]:
        trace.free(found, f"the positions of {trace.why(node)}")
    kept = [axis for d, axis in enumerate(axes) if d not in where]
    rank = max(map(len, indices))
    together = where == list(range(where[0], where[0] + len(where)))
    at = where[0] if together else 0
    new = [frozen(n, f"the positions of {trace.why(node)}") for n in trace.shape(node)[at : at + rank]]
    trace.mix([axes[d] for d in where], kept)
    return [*kept[:at], *new, *kept[at:]]
