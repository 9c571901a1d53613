"""Rules of reductions, normalisations, softmax and what mixes positions along an axis."""

from __future__ import annotations

import re
from typing import Any

from torch import fx

from weingarten.symmetry.rules_pointwise import ANY, MULTIPLY, combine, dims_of
from weingarten.symmetry.trace import Axes, Rule, Trace, Value, operator_name
from weingarten.symmetry.trace_axes import Axis, Bound, divide, frozen, is_frozen, product

__all__ = [
    "batch_norm",
    "group_norm",
    "layer_norm",
    "mixing",
    "native_batch_norm",
    "pool",
    "reduce",
    "reduce_with_position",
    "rms_norm",
    "slopes",
    "softmax",
    "triangle",
    "vector_norm",
]


def reduce(along: Bound, others: Bound, position: int = 1) -> Rule:
    """The rule of a reduction.

    Args:
        along: the group that may act on the reduced axes.
        others: on the rest.
        position: of the argument that holds the dimensions.
    """

    def rule(trace: Trace, node: fx.Node) -> Value:
        axes = trace.of(node.args[0])
        args = (*node.args, None, None, None)
        dims = dims_of(args[position], len(axes))
        if any(not isinstance(d, int) for d in dims):
            return trace.unknown_operator(node)
        inner = trace.products.get(node.args[0], set()) if isinstance(node.args[0], fx.Node) else set()
        trace.limit([axes[d] for d in dims if d not in inner], along, node)
        kept = [axis for d, axis in enumerate(axes) if d not in dims]
        trace.limit(kept, others, node)
        trace.mix([axes[d] for d in dims], kept)
        keep = len(trace.shape(node)) == len(axes)
        return [Axis(1) if d in dims else axis for d, axis in enumerate(axes)] if keep else kept

    return rule


def vector_norm(trace: Trace, node: fx.Node) -> Value:
    """The Euclidean norm is invariant under rotations, other norms under permutations."""
    order = node.args[1] if len(node.args) > 1 else 2
    return reduce(Bound.ROTATION if order == 2 else Bound.PERMUTATION, Bound.PERMUTATION, 2)(trace, node)


def reduce_with_position(trace: Trace, node: fx.Node) -> Value:
    """``max`` and ``min`` along one axis, which also return where: the axis becomes free."""
    axes = trace.of(node.args[0])
    if len(node.args) < 2:
        return reduce(Bound.PERMUTATION, Bound.PERMUTATION)(trace, node)
    dim = int(str(node.args[1])) % len(axes)
    trace.free([axes[dim]], f"the position in {trace.why(node)}")
    kept = [axis for d, axis in enumerate(axes) if d != dim]
    trace.limit(kept, Bound.PERMUTATION, node)
    keep = len(node.meta["val"][0].shape) == len(axes)
    result = [*axes[:dim], *([Axis(1)] if keep else []), *axes[dim + 1 :]]
    return [result, list(result)]


def softmax(trace: Trace, node: fx.Node) -> Value:
    """Softmax and its logarithm commute with permutations."""
    axes = trace.of(node.args[0])
    dim = int(str(node.args[1])) % len(axes)
    trace.limit(axes, Bound.PERMUTATION, node)
    trace.mix([axes[dim]], [axis for d, axis in enumerate(axes) if d != dim])
    return list(axes)


def mixing(others: Bound, position: int = 1) -> Rule:
    """The rule of what depends on positions along some axes: cumulative sums, flips, rolls; these axes become free."""

    def rule(trace: Trace, node: fx.Node) -> Value:
        axes = trace.of(node.args[0])
        dims = dims_of(node.args[position] if len(node.args) > position else None, len(axes))
        trace.free([axes[d] for d in dims], f"the positions of {trace.why(node)}")
        kept = [axis for d, axis in enumerate(axes) if d not in dims]
        trace.limit(kept, others, node)
        trace.mix([axes[d] for d in dims], kept)
        return [frozen(n, trace.why(node)) if d in dims else axes[d] for d, n in enumerate(trace.shape(node))]

    return rule


def triangle(trace: Trace, node: fx.Node) -> Value:
    """``tril`` and ``triu``: the last two axes become free."""
    axes = trace.of(node.args[0])
    trace.free(axes[-2:], f"the positions of {trace.why(node)}")
    return list(axes)


def pool(others: Bound) -> Rule:
    """The rule of poolings, paddings and resizing: the spatial axes, the last ones, become free."""

    def rule(trace: Trace, node: fx.Node) -> Value:
        axes, shape = trace.of(node.args[0]), trace.shape(node)
        digits = re.findall(r"([123])d", operator_name(node))
        spatial = int(digits[0]) if digits else len(node.args[1]) // 2  # type: ignore[arg-type]
        first = len(axes) - spatial
        trace.free(axes[first:], f"the positions of {trace.why(node)}")
        trace.limit(axes[:first], others, node)
        trace.mix(axes[first:], axes[:first])
        return [*axes[:first], *(frozen(n, trace.why(node)) for n in shape[first:])]

    return rule


def _normalised(trace: Trace, node: fx.Node, bound: Bound) -> tuple[Axes, int]:
    axes = trace.of(node.args[0])
    rank = len(node.args[1])  # type: ignore[arg-type]
    trace.limit(axes[-rank:], bound, node)
    trace.limit(axes[:-rank], Bound.PERMUTATION, node)
    trace.mix(axes[-rank:], axes[:-rank])
    return axes, rank


def layer_norm(trace: Trace, node: fx.Node) -> Value:
    """The mean is subtracted and the rest scaled: permutations; gain and bias are tied."""
    axes, _ = _normalised(trace, node, Bound.PERMUTATION)
    affine = [trace.of(arg) for arg in node.args[2:4] if isinstance(arg, fx.Node)]
    return combine(trace, node, [axes, *affine], ANY) if affine else list(axes)


def rms_norm(trace: Trace, node: fx.Node) -> Value:
    """The norm is invariant under rotations; with a gain, permutations."""
    axes, _ = _normalised(trace, node, Bound.ROTATION)
    gain = node.args[2] if len(node.args) > 2 else None
    return combine(trace, node, [axes, trace.of(gain)], MULTIPLY) if isinstance(gain, fx.Node) else list(axes)


def _per_channel(trace: Trace, node: fx.Node, axes: Axes, extra: Any) -> Axes:
    """Tie vectors of one entry per channel to axis 1."""
    vectors = [trace.of(arg) for arg in extra if isinstance(arg, fx.Node)]
    operands = [[*vector, *(Axis(1) for _ in axes[2:])] for vector in vectors]
    trace.limit(axes, Bound.PERMUTATION, node)
    return combine(trace, node, [axes, *operands], ANY)


def batch_norm(trace: Trace, node: fx.Node) -> Value:
    """Every channel by itself; gain, bias and running statistics are tied."""
    axes = trace.of(node.args[0])
    trace.mix([axes[0], *axes[2:]], [axes[1]])
    return _per_channel(trace, node, axes, node.args[1:5])


def native_batch_norm(trace: Trace, node: fx.Node) -> Value:
    """The same with its two by-products, which are empty in evaluation mode."""
    return [batch_norm(trace, node), *trace.fresh(node)[1:]]


def slopes(trace: Trace, node: fx.Node) -> Value:
    """``prelu``: a slope for every channel, or one for all."""
    return _per_channel(trace, node, trace.of(node.args[0]), node.args[1:2])


def group_norm(trace: Trace, node: fx.Node) -> Value:
    """Channels are split in (groups, channels of a group); each factor may be permuted."""
    axes, groups = trace.of(node.args[0]), int(str(node.args[1]))
    halves = (
        divide(axes[1], groups)
        if not is_frozen(axes[1])
        else (frozen(groups, ""), frozen(axes[1].size // groups, ""))
    )
    if halves is None:
        trace.free([axes[1]], f"the groups of {trace.why(node)}")
        halves = (axes[1], Axis(1))
    trace.mix([halves[1], *axes[2:]], [axes[0], halves[0]])
    channels = product(halves) if not is_frozen(axes[1]) else axes[1]
    return _per_channel(trace, node, [axes[0], channels, *axes[2:]], node.args[2:4])
