"""Rules of operators that act entry by entry, with broadcasting, and of reductions and normalisations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from weingarten.symmetry.trace import Axes, Rule, Trace, Value, operator_name, tie_all
from weingarten.symmetry.trace_axes import Axis, Bound, root

__all__ = [
    "ADD",
    "ANY",
    "KEEP",
    "MULTIPLY",
    "ODD",
    "Pointwise",
    "combine",
    "divide_by",
    "multiply",
    "pointwise",
    "power",
]


@dataclass(frozen=True)
class Pointwise:
    """What an operator allows on an axis.

    Attributes:
        shared: that all operands have.
        partial: along which some operand is constant.
    """

    shared: Bound
    partial: Bound


ADD = Pointwise(Bound.ROTATION, Bound.PERMUTATION)
MULTIPLY = Pointwise(Bound.PERMUTATION, Bound.ROTATION)
ODD = Pointwise(Bound.SIGNED, Bound.SIGNED)
KEEP = Pointwise(Bound.ROTATION, Bound.ROTATION)
ANY = Pointwise(Bound.PERMUTATION, Bound.PERMUTATION)


def combine(
    trace: Trace, node: fx.Node, operands: Sequence[Axes], kind: Pointwise, summed: Sequence[int] = ()
) -> Axes:
    """Tie broadcast operands axis by axis, bound them, and return the result's axes.

    Args:
        trace: the walk.
        node: the operator, for reasons.
        operands: axes of the arguments; numbers have none.
        kind: what the operator allows.
        summed: dimensions that all users sum over: there a product is an inner product.
    """
    rank = max(len(axes) for axes in operands)
    result: Axes = []
    shared: Axes = []
    single: Axes = []
    for dim in range(rank):
        here = [
            axes[dim - rank] for axes in operands if rank - dim <= len(axes) and axes[dim - rank].size > 1
        ]
        if not here:
            result.append(Axis(1))
            continue
        here = [
            axis for axis in here if not root(axis).constant
        ] or here  # repeated entries are as good as one
        result.append(tie_all(here))
        full = len(here) == len(operands)
        (shared if len(here) > 1 else single).append(here[0])
        if len(operands) == 1 or not (full and dim in summed):
            shares = full or (len(here) > 1 and kind.shared < kind.partial)
            bound = kind.shared if shares else kind.partial
            trace.limit(here[:1], bound, node)
    trace.misalign(single, shared)
    return result


def pointwise(kind: Pointwise) -> Rule:
    """The rule of an operator whose tensor arguments are all broadcast against each other."""

    def rule(trace: Trace, node: fx.Node) -> Value:
        args = [
            *node.args,
            *(v for key, v in node.kwargs.items() if key in ("value", "weight", "min", "max")),
        ]
        operands = [trace.of(arg) for arg in args if isinstance(arg, fx.Node)]
        numbers = any(isinstance(arg, int | float) for arg in args[1:2]) and kind is ADD
        return combine(trace, node, [*operands, *([[]] if numbers else [])], kind)

    return rule


def _summed_dims(node: fx.Node, rank: int) -> tuple[int, ...]:
    """The dimensions over which every user of a product sums it."""
    found: set[tuple[int, ...]] = set()
    for user in node.users:
        dims = user.args[1] if len(user.args) > 1 else None
        if operator_name(user) not in ("sum", "mean") or not isinstance(dims, list | tuple):
            return ()
        found.add(tuple(sorted(int(str(d)) % rank for d in dims)))
    return found.pop() if len(found) == 1 else ()


def _product(trace: Trace, node: fx.Node, operands: Sequence[Axes], kind: Pointwise) -> Axes:
    """A product of two tensors: an inner product where all users sum it."""
    rank = max(len(axes) for axes in operands)
    dims = _summed_dims(node, rank)
    result = combine(trace, node, operands, kind, dims)
    both = {d for d in dims if all(rank - d <= len(axes) and axes[d - rank].size > 1 for axes in operands)}
    if both:
        trace.products[node] = both
    return result


def multiply(trace: Trace, node: fx.Node) -> Value:
    """``a * b``."""
    return _product(trace, node, [trace.of(arg) for arg in node.args[:2]], MULTIPLY)


def power(trace: Trace, node: fx.Node) -> Value:
    """``a ** b``; a square that is summed is a squared norm."""
    operands = [trace.of(node.args[0])] * 2
    if operator_name(node) == "square" or node.args[1] == 2:
        return _product(trace, node, operands, MULTIPLY)
    return combine(trace, node, [trace.of(arg) for arg in node.args[:2] if isinstance(arg, fx.Node)], ANY)


def divide_by(trace: Trace, node: fx.Node) -> Value:
    """``a / b``: a product with the inverse of b."""
    numerator, denominator = (trace.of(arg) for arg in node.args[:2])
    trace.limit([a for a in denominator if not root(a).constant], Bound.PERMUTATION, node)
    return combine(trace, node, [numerator, denominator], MULTIPLY)


def dims_of(value: Any, rank: int) -> list[int]:
    """Dimensions of an argument: all for None."""
    if value is None or value == []:
        return list(range(rank))
    return [int(d) % rank for d in (value if isinstance(value, list | tuple) else [value])]
